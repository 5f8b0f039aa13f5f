"""What a run that goes on must agree on with its checkpoint, as plain rules over two sets of arguments."""
import argparse
import dataclasses
from pathlib import Path

import pytest
import torch

from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.table import table
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.optim.schedule import BPSchedule, LRSchedule
from hrm_megatron.training.checkpoint_args import MODEL_ARGUMENTS, check_given
from hrm_megatron.training.resume import (
    CHANGEABLE,
    ENTERS_FORWARD,
    changes,
    check_model,
    check_plan,
    check_vocabulary,
    differences,
    length_asked,
    nothing_left,
    schedule_settings,
    settle_length,
    settle_schedule,
)
from hrm_megatron.training.step_schedules import bp_schedule, lr_schedule

FOLDER = Path("runs/iter_0000012")
BASE = Architecture(2, 24, 3, 40, 250, h_cycles=2, l_cycles=2, init_scheme="fixed_normal", init_std=0.05)
# Another value for every field.
CHANGED = dict(num_layers=1, hidden_size=48, num_attention_heads=2, ffn_hidden_size=56, vocab_size=600, h_cycles=3,
               l_cycles=1, norm_placement="post", h_norm_placement="post", init_scheme="lecun_normal", init_std=0.1,
               rope_theta=5e4, norm_epsilon=1e-3, model_type="trm", attention_mask="causal", attention_gate="none")


def test_every_field_of_an_architecture_enters():
    assert {field.name for field in dataclasses.fields(Architecture)} == set(ENTERS_FORWARD) == set(CHANGED)


@pytest.fixture(scope="module")
def logits(single_rank):
    """The logits of an architecture with BASE's weights, or the shapes of its weights where they are not BASE's."""
    from hrm_megatron.model.hrm import HRMModel
    from hrm_megatron.transformer_config import hrm_config

    weights = HRMModel(hrm_config(BASE), seed=5).state_dict()
    example = torch.arange(3, 10).numpy(), torch.arange(20, 26).numpy()

    def of(architecture):
        shapes = {entry.megatron: entry.shape for entry in table(architecture)}
        if shapes != {entry.megatron: entry.shape for entry in table(BASE)}:
            return shapes
        model = HRMModel(hrm_config(architecture), seed=6).eval()
        model.load_state_dict(weights)
        batch = PackedBatch.from_row(assemble_row([example], 12, architecture.attention_mask == "causal"))
        with torch.no_grad():
            return model.logits_at(model.states(batch), torch.arange(12))
    return of


@pytest.mark.parametrize("field", CHANGED)
def test_what_enters_the_forward_function_must_agree(logits, field):
    changed = dataclasses.replace(BASE, **{field: CHANGED[field]})
    have, want = logits(changed), logits(BASE)
    assert isinstance(have, dict) or not torch.equal(have, want)
    with pytest.raises(ConfigError, match=f"{FOLDER}: its model has {ENTERS_FORWARD[field]}="):
        check_model(FOLDER, BASE, changed)


def test_what_computes_the_same_is_taken(logits):
    lecun = Architecture(2, 24, 3, 40, 250, h_cycles=2, l_cycles=2)
    same = dataclasses.replace(lecun, init_scheme="megatron")
    assert torch.equal(logits(lecun), logits(same))
    check_model(FOLDER, lecun, same)
    check_model(FOLDER, BASE, dataclasses.replace(BASE, vocab_size=251))  # of 256 rows
    # One ulp of a double, as a way over 1 / (1 / x) leaves it.
    check_model(FOLDER, BASE, dataclasses.replace(BASE, init_std=0.05 * (1 + 2**-52)))


def test_the_scale_of_the_embedding_is_refused_with_the_flags_that_make_it():
    with pytest.raises(ConfigError) as error:
        check_model(FOLDER, BASE, dataclasses.replace(BASE, init_scheme="lecun_normal", init_std=None))
    assert "embedding_scale=20.0, the command line makes 4.8" in str(error.value)
    assert "--init-scheme fixed_normal, --init-std 0.05" in str(error.value)
    assert "--use-checkpoint-args" in str(error.value)


@pytest.mark.parametrize("iteration, train_iters, line", [
    (19, 20, None), (0, 1, None), (20, 20, "iteration 20 of 20 is done, nothing to train (--skip-train evaluates it)"),
    (20, 12, "iteration 20 is done, nothing to train: --train-iters 12 asks for fewer")])
def test_a_finished_run_is_said_to_be_done(iteration, train_iters, line):
    assert nothing_left(iteration, train_iters) == line


@pytest.mark.parametrize("given, asked", [
    (dict(), "--train-iters 12"), (dict(train_samples=48), "--train-samples 48"), (dict(epochs=2), "--epochs 2"),
    (dict(match_flops_of="B"), "--match-flops-of B")])
def test_a_length_is_told_by_the_flag_that_gave_it(given, asked):
    args = arguments(**dict(train_iters=12) | given)
    assert nothing_left(20, 12, asked=length_asked(args)).endswith(f"nothing to train: {asked} asks for fewer")
    with pytest.raises(ConfigError) as error:
        settle_schedule(args, arguments(), FOLDER)
    assert f"--train-iters 24 (the command line makes 12{f' by {asked}' if given else ''})" in str(error.value)


def arguments(**changes):
    """What a schedule is made of, as Megatron's parser leaves it."""
    return argparse.Namespace(**dict(
        epochs=None, train_samples=None, match_flops_of=None,
        lr=4e-3, min_lr=4e-4, lr_warmup_iters=4, lr_warmup_samples=0, lr_warmup_fraction=None, lr_decay_iters=None,
        train_iters=24, weight_decay=0.1, bp_min_steps=2,
        bp_max_steps=5, bp_warmup_fraction=0.6, global_batch_size=8, override_opt_param_scheduler=False,
        use_checkpoint_opt_param_scheduler=False) | changes)


@pytest.mark.parametrize("changes, named", [
    (dict(train_iters=48), {"--train-iters": (24, 48)}),
    (dict(lr=1e-3), {"--lr": (4e-3, 1e-3)}),
    (dict(min_lr=1e-4), {"--min-lr": (4e-4, 1e-4)}),
    (dict(lr_warmup_iters=5), {"--lr-warmup-iters": (4, 5)}),
    (dict(lr_warmup_iters=0, lr_warmup_fraction=0.25), {"--lr-warmup-iters": (4, 6)}),
    (dict(lr_decay_iters=30), {"--lr-decay-iters": (24, 30)}),
    (dict(global_batch_size=4), {"--global-batch-size": (8, 4)}),
    (dict(weight_decay=0.2), {"--weight-decay": (0.1, 0.2)}),
    (dict(bp_max_steps=4), {"--bp-max-steps": (5, 4)}),
    (dict(bp_min_steps=3, bp_warmup_fraction=0.5), {"--bp-min-steps": (2, 3), "--bp-warmup-fraction": (0.6, 0.5)}),
    (dict(lr_warmup_iters=0, lr_warmup_samples=32, train_iters=24), {}),  # the same in rows
])
def test_another_schedule_is_one_line_in_the_users_units(changes, named):
    ours = arguments(**changes)
    assert differences(arguments(), ours) == named
    if not named:
        assert settle_schedule(ours, arguments(), FOLDER) is None
        return
    with pytest.raises(ConfigError) as error:
        settle_schedule(ours, arguments(), FOLDER)
    assert all(f"{flag} {have} (the command line makes {want})" in str(error.value)
               for flag, (have, want) in named.items())
    for flag in ("--override-opt-param-scheduler", "--use-checkpoint-opt-param-scheduler"):
        assert flag in str(error.value)


EVERY_CHANGE = dict(lr=1e-3, min_lr=1e-4, lr_warmup_iters=9, train_iters=48, lr_decay_iters=40, weight_decay=0.2,
                    bp_min_steps=3, bp_max_steps=4, bp_warmup_fraction=0.5)


def test_every_setting_of_the_schedule_can_be_kept():
    ours, theirs = arguments(**EVERY_CHANGE, use_checkpoint_opt_param_scheduler=True), arguments()
    before = schedule_settings(theirs)
    assert differences(theirs, ours).keys() == before.keys() - {"--global-batch-size"}
    line = settle_schedule(ours, theirs, FOLDER)
    assert "the checkpoint's (--use-checkpoint-opt-param-scheduler)" in line
    assert "learning rate and gradient ticks count iterations" in line
    assert schedule_settings(ours) == before and ours.train_iters == 48
    assert lr_schedule(ours) == LRSchedule(4e-3, 4e-4, 4, 24) and bp_schedule(ours) == BPSchedule(2, 5, 0.6, 24)
    # What this run saves goes on by the same schedule, without a word.
    assert settle_schedule(arguments(**EVERY_CHANGE, use_checkpoint_opt_param_scheduler=True), ours, FOLDER)
    again = argparse.Namespace(**vars(ours))
    assert settle_schedule(again, ours, FOLDER) is None
    assert schedule_settings(again) == before


@pytest.mark.parametrize("theirs, ours, agree", [
    (dict(), dict(), True), (dict(), dict(vocab_size=290), False),
    (dict(vocabulary="a"), dict(vocabulary="a"), True), (dict(vocabulary="a"), dict(vocabulary="b"), False),
    (dict(vocabulary="a"), dict(), True),  # data without --tokenizer-model
    (dict(vocab_size=512), dict(), True), (dict(), dict(vocab_size=512), True),  # of a format that tells rows only
    (dict(vocab_size=512, vocabulary="a"), dict(vocabulary="b"), False),
])
def test_tokens_of_the_data_are_those_of_the_checkpoint(theirs, ours, agree):
    base = dict(vocab_size=293, padded_vocab_size=512)
    theirs, ours = (argparse.Namespace(**base | one) for one in (theirs, ours))
    if agree:
        check_vocabulary(FOLDER, theirs, ours)
        assert ours.vocabulary == getattr(theirs, "vocabulary", None)  # what is known stays so
    else:
        with pytest.raises(ConfigError, match=f"{FOLDER}: was trained with the .* tokens of its tokenizer, and the "):
            check_vocabulary(FOLDER, theirs, ours)


@pytest.mark.parametrize("given, consumed, iteration, train_iters", [
    (dict(), 200, 100, 7), (dict(epochs=2, rows_of_epochs=282), 200, 100, 141),
    (dict(epochs=2, rows_of_epochs=282, global_batch_size=1), 200, 100, 182),
    (dict(epochs=2, rows_of_epochs=282, global_batch_size=4), 200, 100, 121),
    (dict(train_samples=282, global_batch_size=4), 200, 100, 120),
    (dict(train_samples=282, global_batch_size=4), 284, 71, 71),
    (dict(epochs=2, rows_of_epochs=282), 288, 36, 36),  # the last step, of 8 rows, began a third epoch
    (dict(epochs=1, rows_of_epochs=142), 200, 100, 71), (dict(train_samples=150), 200, 100, 75),  # fewer than done
    (dict(epochs=2, rows_of_epochs=282), 0, 100, 141),  # a converted checkpoint
    (dict(train_samples=282), 0, 100, 141),
    (dict(train_samples=282, global_batch_size=4, match_flops_of="B"), 200, 100, 7),
])
def test_a_run_over_epochs_or_rows_reads_what_is_left_of_them(given, consumed, iteration, train_iters):
    args = argparse.Namespace(**dict(epochs=None, rows_of_epochs=None, train_samples=None, match_flops_of=None,
                                     global_batch_size=2, train_iters=7) | given)
    for _ in range(2):  # a start settles it twice
        theirs = argparse.Namespace(consumed_train_samples=consumed, global_batch_size=8)
        settle_length(args, theirs, iteration)
        assert args.train_iters == train_iters
    assert args.train_samples == (given.get("train_samples") if consumed else None)  # Megatron counts steps, or rows


def test_every_setting_of_the_schedule_can_be_overridden():
    ours = arguments(**EVERY_CHANGE, override_opt_param_scheduler=True, global_batch_size=2)
    want = schedule_settings(ours)
    assert "the command line's (--override-opt-param-scheduler)" in settle_schedule(ours, arguments(), FOLDER)
    assert schedule_settings(ours) == want


OTHER_DATA = ("the data are not those it was trained on: their examples, or how they are mixed, have changed, and so "
              "has the order of rows")


@pytest.mark.parametrize("changed, line", [
    (dict(), None), (dict(seed=7, ema_decay=0.5), "--seed from 1234 to 7, --ema-decay from 0.9999 to 0.5"),
    (dict(split="969, 30, 1"), None), (dict(split="97,3,0"), "--split from 969,30,1 to 97,3,0"),
    (dict(split="97,3,0", data_path=None), None),
    (dict(seq_length=128), "--seq-length from 64 to 128"),
    (dict(data_path=["0.3", "a", "0.7", "b"]), "--data-path from store to 0.3 a 0.7 b"),
    (dict(data_path=["moved/store"]), "--data-path from store to moved/store"),
    (dict(sampling_rules="r.yaml"), "--sampling-rules from None to r.yaml"),
    (dict(adam_beta1=0.8, adam_beta2=0.9), "--adam-beta1 from 0.9 to 0.8, --adam-beta2 from 0.95 to 0.9"),
    (dict(loss_on_prefix=True, adamw=True), "--loss-on-prefix from False to True, --adamw from False to True"),
])
def test_other_rows_and_averages_are_named(changed, line):
    run = dict(seed=1234, seq_length=64, split="969,30,1", data_path=["store"], ema_decay=0.9999, adam_beta1=0.9,
               adam_beta2=0.95, train_data_path=None, sampling_rules=None, loss_on_prefix=False, adamw=False)
    assert run.keys() == CHANGEABLE.keys()
    theirs, ours = argparse.Namespace(**run), argparse.Namespace(**run | changed)
    assert changes(theirs, ours) == (line and f"the command line changes {line}")
    theirs.data_digests, ours.data_digests = dict(train="a", valid="b"), dict(train="c", valid="b")
    assert changes(theirs, ours) == (f"the command line changes {line}" if line else OTHER_DATA)
    ours.data_digests["train"] = "a"
    assert changes(theirs, ours) == (line and f"the command line changes {line}")
    del theirs.adamw  # a checkpoint of an older version
    assert ("--adamw from None" in (changes(theirs, ours) or "")) == ours.adamw
    theirs.data_path = ours.data_path = None  # of a sampled folder there is no split
    assert "split" not in (changes(theirs, ours) or "")


def test_no_run_goes_on_in_the_middle_of_another_order():
    """Orders of rows changed with the version of the plan; checkpoints before the second say nothing of it."""
    theirs, ours = argparse.Namespace(seed=7), argparse.Namespace(seed=7, plan_version=2)
    with pytest.raises(ConfigError, match=f"{FOLDER}: its rows were planned by version 1 .* version 2: .*--seed"):
        check_plan(FOLDER, theirs, ours)
    ours.seed = 8  # another order by choice, which is named
    check_plan(FOLDER, theirs, ours)
    check_plan(FOLDER, ours, ours)


STORED = argparse.Namespace(num_layers=6, hidden_size=1024, num_attention_heads=8, ffn_hidden_size=2816, h_cycles=2,
                            l_cycles=3, norm_placement="pre", init_scheme="lecun_normal", init_std=None,
                            rotary_base=10000, layernorm_epsilon=1e-6, model_kind="hrm", attention_mask="prefix-lm",
                            attention_gate="sigmoid")


def test_a_flag_given_beside_the_checkpoints_arguments_must_agree():
    assert vars(STORED).keys() == MODEL_ARGUMENTS.keys()
    check_given({}, STORED, FOLDER)
    check_given({**vars(STORED), "hrm_preset": "B", "seq_length": 7}, STORED, FOLDER)
    for name, flag in MODEL_ARGUMENTS.items():
        with pytest.raises(ConfigError, match=f"{flag} other: is incompatible with --use-checkpoint-args: .* leave"):
            check_given({name: "other"}, STORED, FOLDER)
    with pytest.raises(ConfigError, match="--hrm-preset L with --num-layers 12: .* has 6"):
        check_given({"hrm_preset": "L"}, STORED, FOLDER)


def test_an_architecture_is_made_of_the_arguments_that_a_checkpoint_gives():
    from hrm_megatron.transformer_config import architecture_of

    read = set()

    class Recorder:
        def __getattr__(self, name):
            read.add(name)
            return getattr(STORED, name)

    architecture_of(Recorder(), 256)
    assert read == MODEL_ARGUMENTS.keys()


def test_the_command_line_tells_what_was_given_by_hand(monkeypatch):
    from megatron.training.arguments import parse_args

    from hrm_megatron.training.own_flags import add_hrm_arguments, given_by_hand

    # A value that is the default, a list, a switch and one of ours.
    monkeypatch.setattr("sys.argv", ["pretrain", "--num-layers", "2", "--h-cycles", "2", "--data-path", "a", "b",
                                     "--bf16", "--use-checkpoint-args"])
    args = parse_args(add_hrm_arguments)
    assert given_by_hand(args) == dict(num_layers=2, h_cycles=2, data_path=["a", "b"], bf16=True,
                                       use_checkpoint_args=True)
