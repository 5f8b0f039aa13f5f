"""The benchmark of planning says of made-up examples what planning them by hand says."""
import re

import pytest

from hrm_megatron.benchmark.plan import COLUMNS, ROW_TOKENS, SEED, make_dataset, measure, mixtures
from hrm_megatron.data.plan import RowPlan


@pytest.mark.slow
def test_a_row_of_the_table(tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    cells = dict(zip(COLUMNS, measure(tmp_path, 5000), strict=True))
    assert not list(tmp_path.iterdir())
    make_dataset(tmp_path / "made", 5000)
    assert len(mixtures(str(tmp_path / "made"))[0].stores[0]) == 5000
    rows = RowPlan(mixtures(str(tmp_path / "made"))[0], ROW_TOKENS, SEED).rows_of_epoch(0)
    assert cells["examples"] == "5,000" and cells["fill"] == f"{rows.tokens / (len(rows) * ROW_TOKENS):.2%}"
    # So few examples take less time than the compilation that the first of them waits for.
    assert all(float(cells[name]) >= 0 for name in ("split M/s", "shuffle M/s", "pack M/s", "plan M/s"))
    for name in ("first start", "other starts"):
        seconds, of_core, memory = re.fullmatch(r"([\d.]+) s \(([\d.]+) s CPU\), ([\d.]+) GB", cells[name]).groups()
        assert float(seconds) >= 0 and float(of_core) >= 0 and float(memory) > 0
