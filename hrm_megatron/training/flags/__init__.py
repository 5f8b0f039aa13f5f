"""Table of what each Megatron flag does in our runs; the command line is checked against it before all else.

`python -m hrm_megatron.training.flags > docs/flags.md` prints it.
"""
