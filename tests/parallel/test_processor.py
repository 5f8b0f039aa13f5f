"""Which library multiplies matrices on which machine."""
import pytest
import torch

from hrm_megatron.parallel import processor


@pytest.mark.parametrize("facts, faster", [
    ("vendor_id : AuthenticAMD\n", True), ("vendor_id : GenuineIntel\n", False), (None, False)])
def test_which_machine_multiplies_with_onednn(monkeypatch, tmp_path, facts, faster):
    if facts:
        (tmp_path / "cpuinfo").write_text(facts)
    monkeypatch.setattr(processor, "CPU_FACTS", tmp_path / "cpuinfo")
    assert processor.runs_faster_on_onednn() is (faster and torch.backends.mkldnn.is_available())
