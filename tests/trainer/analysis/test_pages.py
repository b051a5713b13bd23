"""Pages: what goes in comes out, escaped, and charts tell the truth."""

import re
import xml.etree.ElementTree as ElementTree
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes

from shardstep.configs.resolve import with_keys
from shardstep.trainer.analysis.calibration import reliability
from shardstep.trainer.analysis.pages.chart import Series, confusion_chart, line_chart, reliability_chart
from shardstep.trainer.analysis.pages.html import page, table, tag
from shardstep.trainer.analysis.pages.run_page import report_page
from shardstep.trainer.analysis.predictions import Predictions
from shardstep.trainer.analysis.run_analysis import RunAnalysis
from shardstep.trainer.analysis.run_record import read_record
from shardstep.trainer.monitoring.pictures import draw_curves, training_extras
from shardstep.trainer.run_dir import State
from tests.conftest import ROOT


def points_of(chart: str) -> list[tuple[float, float]]:
    """The places of a chart's dots."""
    return [(float(x), float(y)) for x, y in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', chart)]


def test_everything_is_escaped() -> None:
    nasty = "<script>alert(1)</script>\" onload='x' &"
    written = page(nasty, tag("p", nasty, title=nasty), table([nasty], [[nasty, tag("b", nasty)]]))
    assert "<script" not in written
    assert written.count("&lt;script&gt;") == 6
    assert '" onload' not in written


def test_a_line_is_where_its_numbers_are() -> None:
    chart = line_chart([Series("a", [(0.0, 0.0), (5.0, 0.5), (10.0, 1.0)])], "epoch", "accuracy", percent=True)
    assert chart is not None
    (x0, y0), (x1, y1), (x2, y2) = points_of(chart)
    assert (x1, y1) == pytest.approx(((x0 + x2) / 2, (y0 + y2) / 2), abs=0.1)  # the middle is in the middle
    assert y2 < y0  # up
    ElementTree.fromstring(chart)  # well formed


def test_a_logarithmic_axis_where_values_span_decades() -> None:
    # 1, 0.1, 0.01: equal steps down
    chart = line_chart([Series("a", [(0.0, 1.0), (1.0, 0.1), (2.0, 0.01)])], "epoch", "loss")
    assert chart is not None
    (_, y0), (_, y1), (_, y2) = points_of(chart)
    assert y1 - y0 == pytest.approx(y2 - y1, abs=0.1)
    assert "logarithmic" in chart
    assert "logarithmic" not in str(line_chart([Series("a", [(0.0, 1.0), (1.0, 0.5)])], "epoch", "loss"))


@pytest.mark.parametrize(
    ("values", "percent", "labels"),
    [
        ([0.0, 2.4e-4], False, ["0", "5e-5", "1e-4", "1.5e-4", "2e-4", "2.5e-4"]),
        ([0.0, 2.4e5], False, ["0", "50,000", "1e5", "1.5e5", "2e5", "2.5e5"]),
        ([0.9991, 0.9999], True, ["99.9 %", "99.92 %", "99.94 %", "99.96 %", "99.98 %", "100 %"]),
        ([1.2345, 1.2346], False, ["1.2345", "1.23452", "1.23454", "1.23456", "1.23458", "1.2346"]),
    ],
)
def test_ticks_have_all_their_digits(values: list[float], percent: bool, labels: list[str]) -> None:
    chart = str(line_chart([Series("a", list(enumerate(values)))], "epoch", "y", percent=percent))
    ends = re.findall(r'<text x="([\d.]+)" [^>]*class="end">([^<]*)<', chart)
    assert [label for _, label in ends] == labels
    assert all(float(x) > 7 * len(label) for x, label in ends)  # pixels: none begins left of the picture


@pytest.mark.parametrize(
    "values", [[0.0], [2.5], [1e-14], [-1.0, -1.0], [1e-12, 1e9], [None, 3.0, None], [0.0, 0.0], [1e30, 2e30]]
)
def test_strange_values_have_a_chart(values: list[float | None]) -> None:
    chart = line_chart([Series("a", list(enumerate(values)))], "epoch", "loss")
    assert chart is not None
    ElementTree.fromstring(chart)
    places = points_of(chart)
    assert len(places) == sum(value is not None for value in values)
    assert all(0 <= x <= 440 and 0 <= y <= 260 for x, y in places)


def test_nothing_to_draw_is_no_chart() -> None:
    assert line_chart([], "epoch", "loss") is None
    assert line_chart([Series("a", []), Series("b", [(1.0, None)])], "epoch", "loss") is None


def test_a_gap_breaks_the_line() -> None:
    series = Series("a", [(0.0, 1.0), (1.0, 2.0), (2.0, None), (3.0, 2.0), (4.0, 1.0)])
    (path,) = re.findall(r'<path d="([^"]+)"', str(line_chart([series], "epoch", "loss")))
    assert path.count("M") == 2


def test_many_points_are_thinned_but_a_spike_stays() -> None:
    values = [(float(step), 100.0 if step == 70_001 else 1.0 + step % 7 / 10) for step in range(100_000)]
    chart = str(line_chart([Series("a", values, kind="faint")], "epoch", "loss", from_zero=True))
    (path,) = re.findall(r'<path d="([^"]+)"', chart)
    heights = [float(y) for y in re.findall(r"[ML][\d.]+ ([\d.]+)", path)]
    assert 400 < len(heights) < 600
    assert min(heights) < 15  # the spike reaches the top
    assert len(chart) < 20_000


def test_reliability_bars_have_their_heights() -> None:
    bins = reliability(np.array([0.9, 0.9, 0.9, 0.9]), np.array([True, True, True, False]), num_bins=5)
    chart = reliability_chart(bins)
    (height,) = re.findall(r'height="([\d.]+)" class="bar"', chart)
    assert float(height) == 300 * 0.75
    (gap,) = re.findall(r'height="([\d.]+)" class="gap over"', chart)
    assert float(gap) == pytest.approx(300 * 0.15, abs=0.01)
    ElementTree.fromstring(chart)


def test_confusion_cells_are_shares_of_the_label() -> None:
    chart = confusion_chart(np.array([[3, 1], [0, 0]]), ["cat", "dog & wolf"])
    assert "cat predicted as cat: 3 (75.0%)" in chart
    assert "cat predicted as dog &amp; wolf: 1 (25.0%)" in chart
    assert chart.count("<rect") == 2  # cells without samples are not drawn
    ElementTree.fromstring(chart)


def test_dark_and_paper_have_every_colour() -> None:
    style = Path(ROOT / "trainer" / "analysis" / "pages" / "style.css").read_text()
    blocks = re.findall(r":root \{(.*?)\}", style, flags=re.DOTALL)
    names = [set(re.findall(r"(--[\w-]+):", block)) for block in blocks]
    assert len(names) == 3  # light, dark, paper
    assert names[0] == names[1] == names[2]


def test_what_only_the_training_loss_has_is_said(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain, smoothed = read_record(finished_run), read_record(finished_run)
    smoothed.recipe.loss["label_smoothing"] = 0.1
    smoothed = replace(smoothed, recipe=with_keys(smoothed.recipe, run={"name": "smooth"}))
    told = "The training loss includes label smoothing of 0.1, the test loss does not."
    assert told in report_page([RunAnalysis(smoothed)], datetime(2026, 1, 1))
    assert "includes" not in report_page([RunAnalysis(plain)], datetime(2026, 1, 1))
    both = report_page([RunAnalysis(plain), RunAnalysis(smoothed)], datetime(2026, 1, 1))
    assert both.count(told.replace("loss", "loss of smooth", 1)) == both.count("includes") == 1
    smoothed.recipe.model["auxiliary_weight"] = 0.3
    assert training_extras(smoothed.recipe) == "label smoothing of 0.1 and 0.3 times the loss of auxiliary heads"

    legends: list[str] = []
    monkeypatch.setattr(Axes, "legend", lambda axis: legends.extend(axis.get_legend_handles_labels()[1]))
    draw_curves(finished_run / "metrics.jsonl", tmp_path / "curves.png", "label smoothing of 0.1")
    assert legends == [
        "training batch, with label smoothing of 0.1", "test set, without",
        "training batch", "test set",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("state", "summary", "shown"),
    [
        ("finished", {"status": "finished"}, "finished"),
        ("failed", {"status": "failed", "failure": "lost_rank"}, "failed (lost rank) at step 8 of 8"),
        ("failed", {"status": "failed"}, "failed at step 8 of 8"),  # of an earlier version
        ("stopped", {"status": "preempted", "stopped_by": "person"}, "stopped at step 8 of 8"),
    ],
)
def test_the_state_of_a_run_is_on_its_page(
    state: State, summary: dict[str, str], shown: str, finished_run: Path
) -> None:
    record = replace(read_record(finished_run), state=state, summary=summary)
    assert f'<span class="status {state}">{shown}</span>' in report_page([RunAnalysis(record)], datetime(2026, 1, 1))


def test_a_page_of_many_classes_stays_small(finished_run: Path) -> None:
    record, count = read_record(finished_run), 300
    assert record.manifest is not None
    record.manifest = replace(record.manifest, classes=[f"kind {label}" for label in range(count)])
    random = np.random.default_rng(0)
    labels, predicted = random.integers(0, count, (2, 20_000))
    predictions = Predictions(labels, predicted, random.random(20_000, dtype=np.float32), np.zeros(0, dtype=np.float32))
    bins = reliability(predictions.confidence, predictions.correct)
    text = report_page([RunAnalysis(record, predictions=predictions, bins=bins)], datetime(2026, 1, 1))
    assert "Accuracy of the 30 worst of 300 classes" in text
    assert "Most frequent mistakes: <bdi>kind " in text
    assert "confusion matrix" not in text  # 90,000 cells
    assert len(text) < 60_000
