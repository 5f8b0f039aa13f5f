"""The benchmark of deduplication holds what was found against what it drew, and its dataset has several blocks."""
import pytest

from hrm_megatron.benchmark import deduplicate as benchmark
from hrm_megatron.config import ConfigError

pytest.importorskip("duckdb", reason="deduplication is an extra")


def test_a_row_of_the_table(tmp_path, monkeypatch):
    cells = dict(zip(benchmark.COLUMNS, benchmark.measure(tmp_path, 20_000), strict=True))
    assert cells["examples"] == "20,000" and 0.13 < int(cells["duplicates"].replace(",", "")) / 20_000 < 0.17
    assert cells["peak memory"].endswith(" GB") and not list(tmp_path.iterdir())
    drawn = benchmark.draw_keys
    monkeypatch.setattr(benchmark, "draw_keys", lambda prefix, count: drawn(prefix, count) + 1)
    with pytest.raises(ConfigError, match="duplicates were found of"):
        benchmark.measure(tmp_path, 20_000)
