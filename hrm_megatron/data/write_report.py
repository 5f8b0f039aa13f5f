"""Write PREFIX.report.md and PREFIX.report.png beside a dataset."""
from __future__ import annotations

import importlib.util
from pathlib import Path

from hrm_megatron.config import ConfigError
from hrm_megatron.data.manifest import report_path
from hrm_megatron.data.report import DatasetReport, markdown
from hrm_megatron.program import whole_file

WITHOUT_PICTURE = "matplotlib is not installed: no picture (pip install matplotlib)"


def can_draw() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def write_report(report: DatasetReport) -> list[str]:
    """Write the report, with a picture if matplotlib is installed; return lines that say what was written."""
    text, picture = report_path(report.prefix), Path(f"{report.prefix}.report.png")
    draws = can_draw()
    try:
        with whole_file(text) as partial:
            partial.write_text(markdown(report, picture if draws else None), encoding="utf-8")
            if draws:
                from hrm_megatron.data.report_picture import draw_report
                with whole_file(picture) as drawn:
                    draw_report(report, drawn)
            else:
                picture.unlink(missing_ok=True)  # left by an earlier run
    except OSError as error:
        raise ConfigError(f"{text}: cannot write ({error.strerror}); the dataset itself is complete") from error
    return [f"report: {text}, {picture}"] if draws else [f"report: {text}", WITHOUT_PICTURE]
