"""Causal models and losses on prefixes: what the flags do to rows, to layouts, and to what goes on or is written."""
import argparse

import numpy as np
import pytest

from hrm_megatron.checkpoint.folders import find_iteration
from hrm_megatron.checkpoint.fsdp_folder import open_run
from hrm_megatron.config import Architecture, ConfigError
from hrm_megatron.convert.run import Conversion, convert
from hrm_megatron.data.batch import PackedBatch, assemble_row
from hrm_megatron.planner.flops import rows_flops
from hrm_megatron.training.ablations import check_ablations
from tests.rounding import GRADIENTS
from tests.training.test_gradients import ROWS, STATE
from tests.training.test_layouts import CP, TP

CAUSAL = ["--attention-mask", "causal", "--loss-on-prefix"]


def test_a_causal_row_is_one_of_long_responses():
    examples = [(np.arange(1, 5), np.arange(5, 8)), (np.arange(8, 9), np.arange(9, 10))]
    rows = [assemble_row(examples, 12, causal, causal) for causal in (False, True)]
    given, causal = (PackedBatch.from_rows({name: tensor[None] for name, tensor in row.items()}) for row in rows)
    assert (given.lengths, causal.lengths) == ((((4, 2), (1, 0)),), (((1, 5), (1, 0)),))
    assert given.labels.tolist() == [[-100, -100, -100, 5, 6, 7, 9] + 5 * [-100]]
    assert causal.labels.tolist() == [[2, 3, 4, 5, 6, 7, 9] + 5 * [-100]]
    assert given.tokens.equal(causal.tokens) and given.position_ids.equal(causal.position_ids)


def test_labels_are_counted_and_not_guessed_from_lengths():
    from hrm_megatron.training.data import first_rows

    examples = [(np.arange(1, 5), np.arange(5, 8)), (np.arange(8, 9), np.arange(9, 10))]
    counts = {(causal, prefix): first_rows([assemble_row(examples, 12, causal, prefix)] * 2)[1]
              for causal, prefix in ((False, False), (True, False), (True, True))}
    assert counts == {(False, False): 8, (True, False): 8, (True, True): 14}
    arch = Architecture(1, 16, 2, 32, 64)
    guessed, counted = (rows_flops(arch, 5, 12, [[(1, 5), (1, 0)]], labels) for labels in (None, 4))
    assert guessed - counted == 3 * 2 * arch.hidden_size * arch.padded_vocab_size * (7 - 4)


def test_a_loss_on_what_the_mask_shows_is_refused():
    check_ablations(argparse.Namespace(loss_on_prefix=True, attention_mask="causal"))
    with pytest.raises(ConfigError, match="--loss-on-prefix: .* give --attention-mask causal too, or leave it out$"):
        check_ablations(argparse.Namespace(loss_on_prefix=True, attention_mask="prefix-lm"))


@pytest.fixture(scope="module")
def stepped(launch, tmp_path_factory):
    """The folder of a run of one step."""
    def run(*flags, ranks=1):
        folder = tmp_path_factory.mktemp("ablation")
        done = launch(*ROWS, "--ffn-hidden-size", 256, "--save", folder, *flags, ranks=ranks)
        assert done.code == 0, done.output[-5000:]
        return folder
    return run


@pytest.mark.slow
@pytest.mark.ranks
def test_gradients_are_those_of_one_process_and_the_mask_stays_with_the_model(stepped, launch, parity, tmp_path):
    one, other = stepped(*CAUSAL), stepped(*CAUSAL, TP, 2, CP, 2, "--sequence-parallel", ranks=4)
    found, want = (open_run(find_iteration(folder)) for folder in (other, one))
    worst = 0.0
    for name in (name for name in want.shapes() if name.startswith(STATE)):
        of_one = want.tensor(name)
        worst = max(worst, ((found.tensor(name) - of_one).abs().max() / (of_one.abs().max() or 1)).item())
    parity("causal, loss on prefixes, CP 2 x TP 2: gradients", worst, GRADIENTS)
    refused = launch(*ROWS, "--ffn-hidden-size", 256, "--load", one, "--train-iters", 2)
    assert refused.code and refused.errors[0].partition("; ")[0].endswith(
        "its model has attention_mask=causal, the command line makes prefix-lm")
    convert(Conversion(one, "megatron", tmp_path / "native", "native"))
    assert "attn_type: causal" in (tmp_path / "native" / "all_config.yaml").read_text()
    assert "target_only: false" in (tmp_path / "native" / "all_config.yaml").read_text()
    assert "logits" in convert(Conversion(one, "megatron", tmp_path / "hf", "hf"))
    assert '"prefix_lm": false' in (tmp_path / "hf" / "config.json").read_text()
