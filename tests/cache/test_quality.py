"""The quality measurement in its short form: a few pictures of the trained model, in the order that the whole one shows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[1] / "bench"


@pytest.fixture(scope="module")
def rows(comfy: None, monkeypatch_module: pytest.MonkeyPatch) -> dict[str, dict[str, float]]:
    """Means over the pictures by series."""
    monkeypatch_module.syspath_prepend(str(BENCH))
    import quality

    found = quality.short(count=3)
    return {setting.series: {name: sum(row[name] for row in those) / len(those) for name in those[0]} for setting, those in found.items()}


@pytest.fixture(scope="module")
def monkeypatch_module():
    with pytest.MonkeyPatch.context() as patch:
        yield patch


def test_forecast_is_nearest_to_the_uncached_pictures_at_half_the_work(rows: dict[str, dict[str, float]]) -> None:
    forecast, fewer, easy = (rows[series] for series in ("forecast", "fewer steps", "EasyCache"))
    assert 0.5 <= forecast["saved"] <= 0.65
    assert forecast["psnr"] >= fewer["psnr"] + 3 and fewer["saved"] <= forecast["saved"] + 0.05
    assert forecast["psnr"] >= easy["psnr"] + 1 and easy["saved"] <= forecast["saved"] + 0.05


@pytest.mark.parametrize("preset, floor", [("quality", 45), ("balanced", 40), ("fast", 35)])
def test_a_preset_keeps_the_mean_that_it_stands_for(rows: dict[str, dict[str, float]], preset: str, floor: float) -> None:
    import quality_report
    from quality_metrics import at, mean

    from para_core.cache.presets import PRESETS

    columns = json.loads((BENCH / "records/quality.json").read_text())["settings"]
    assert PRESETS[preset].start_percent == 0.2 and "20 %" in quality_report.PRESET_SERIES
    for cfg in quality_report.CFGS:
        those = quality_report.main_grid(columns, cfg)
        curve = [(column["value"], mean(column["psnr"])) for column in those[quality_report.PRESET_SERIES]]
        assert at(PRESETS[preset].threshold, curve) >= floor


def test_what_is_saved_is_counted_in_blocks(rows: dict[str, dict[str, float]]) -> None:
    assert rows["fewer steps"]["saved"] == pytest.approx(0.5)
    assert (rows["reuse"]["saved"] * 120) % 5 == pytest.approx(0, abs=0.05), "a hit of the classical rule still computes one block of six"


def test_the_report_is_made_from_the_record(tmp_path: Path, rows: dict[str, dict[str, float]]) -> None:
    import quality_report

    found = json.loads((BENCH / "records/quality.json").read_text())
    quality_report.write(found, tmp_path)
    assert (tmp_path / "quality.png").stat().st_size > 10_000
    assert (tmp_path / "RESULTS.md").read_text().partition(quality_report.BEGIN)[2] in (BENCH / "RESULTS.md").read_text()
