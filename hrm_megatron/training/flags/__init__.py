"""What each flag of Megatron's does in a run of ours, as a table; the command line is checked by it before all else.

`python -m hrm_megatron.training.flags > docs/flags.md` prints it.
"""
