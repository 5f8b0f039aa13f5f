"""The settings of an export, which decide with its tensors what it computes, are those that were written."""
import pytest

from hrm_megatron.checkpoint.archive import DamagedError
from hrm_megatron.config import Architecture
from hrm_megatron.convert.hf import read_hf, write_hf
from hrm_megatron.convert.ledger import EXPORT_FILE, Ledger
from hrm_megatron.data.tokenizer import TextTokenizer


@pytest.mark.parametrize("name, old, new", [
    ("config.json", '"H_cycles": 2', '"H_cycles": 3'), ("config.json", '"prefix_lm": true', '"prefix_lm": false'),
    ("tokenizer_info.json", "<|object_ref_start|>", "<|object_ref_end|>"), ("tokenizer.json", '"7"', '"9"'),
    (EXPORT_FILE, '"iteration": 10', '"iteration": 11'), (EXPORT_FILE, '"weights": "ema"', '"weights": "raw"'),
    ("tokenizer.json", None, None)])
def test_settings_that_were_changed_are_told(random_checkpoint, tmp_path, golden, name, old, new):
    ledger, tokenizer = Ledger(), TextTokenizer(golden / "tokenizer")
    write_hf(random_checkpoint(Architecture(1, 24, 3, 256, tokenizer.vocab_size)), tmp_path / "out",
             tokenizer=golden / "tokenizer", ledger=ledger)
    ledger.write(tmp_path / "out", iteration=10, settings=dict(weights="ema"))
    assert read_hf(tmp_path / "out").origin == ("ema", 10)
    path = tmp_path / "out" / name
    if old is None:
        path.unlink()
    else:
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))
    with pytest.raises(DamagedError) as refused:
        read_hf(tmp_path / "out")
    assert str(refused.value).startswith(f"{path}: is ") and f"or remove {EXPORT_FILE} if it was" in str(refused.value)
    read_hf(tmp_path / "out", verify=False)
    (tmp_path / "out" / EXPORT_FILE).unlink()
    read_hf(tmp_path / "out")
