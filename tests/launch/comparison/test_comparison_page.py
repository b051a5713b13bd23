"""The report of a comparison in a real browser, from folders as runs leave them, without the training."""

import json
from pathlib import Path

import pytest

from shardstep.datasets.decode import decode
from shardstep.launch import compare
from shardstep.launch.comparison.comparison_plots import PLOTS
from shardstep.launch.comparison.comparison_report import write_report
from shardstep.launch.comparison.results import Point, RunResult, Variant
from tests.browser import Browser
from tests.runs import write_recipe

NAMES = ("sgd", "adam", "adagrad", "adadelta", "rmsprop", "adamw", "adamax", "nadam")
RATES = (0.01, 0.0316, 0.1)


@pytest.fixture(scope="module")
def page(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight optimizers with three seeds and three learning rates each; one of them has failed."""
    folder = tmp_path_factory.mktemp("comparison")
    options = [str(write_recipe(folder, shards)), "--over", f"optimizer.name={','.join(NAMES)}"]
    options += ["--tune", "optimizer.lr", "--seeds", "3", "--out", str(folder / "out")]
    comparison = compare.prepare(compare._parser().parse_intermixed_args(options), "shardstep compare ...")
    for name in NAMES[:-1]:
        for rate in comparison.search(name):
            leave_run(comparison.folder / name / f"rate-{rate:g}", rate, 0.3)
    comparison.fix_rates()
    for place, name in enumerate(NAMES[:-1]):
        for seed in range(3):
            leave_run(comparison.folder / name / str(seed), 0.01, 0.3 + 0.05 * place + 0.01 * seed)
    write_report(comparison, comparison.read_results(), None)
    return comparison.folder / "report.html"


def leave_run(folder: Path, rate: float, accuracy: float) -> None:
    """The folder of a finished run, as far as a comparison reads it."""
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text("{}")
    lines = [
        {
            "kind": "eval", "step": 4 * epoch, "epoch": epoch, "samples": 101 * epoch, "loss": 2.0 / epoch, "lr": rate,
            "accuracy": accuracy * epoch / 5, "train_loss": 2.0 / epoch, "wall_s": 2.0 * epoch, "train_s": 1.5 * epoch,
        }
        for epoch in range(1, 6)
    ]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(f"{json.dumps(line)}\n" for line in lines))
    summary = {"status": "finished", "wall_s": 10.0, "world_size": 1, "device": "cpu", "precision": "fp32"}
    (folder / "summary.json").write_text(json.dumps(summary))


def test_in_a_browser(page: Path, browser: Browser) -> None:
    for width in (1280, 390):
        browser.open(page, width)
        assert browser.width() <= width
        assert browser.smallest_text() >= 9, f"text too small at {width} pixels"
    assert browser.evaluate("document.querySelectorAll('svg').length") == 3
    said = browser.evaluate("document.body.innerText")
    assert all(name in said for name in NAMES)
    assert browser.problems == []


def test_plots_fit_the_column(page: Path, browser: Browser) -> None:
    for width in (1280, 1100, 800):
        browser.open(page, width)
        assert browser.evaluate("[...document.querySelectorAll('.plot')].every(of => of.scrollWidth <= of.clientWidth)")
        ends = "[...document.querySelectorAll('svg text')].map(text => text.getBoundingClientRect().right)"
        assert browser.evaluate(f"Math.max(...{ends}) <= document.querySelector('.plot').getBoundingClientRect().right")


def test_a_mark_at_100_per_cent_is_as_large_as_others(tmp_path: Path) -> None:
    def variant(name: str, accuracy: float) -> Variant:
        point = Point(step=1, epoch=1.0, samples=1, train_s=1.0, loss=0.0, accuracy=accuracy, train_loss=0.0)
        return Variant(name, [], None, {0: RunResult("", "finished", curve=[point])}, {})

    PLOTS["final"].draw([variant("all", 1.0), variant("half", 0.5)], None, "", [tmp_path / "final.png"])
    pixels = decode((tmp_path / "final.png").read_bytes(), "RGB")
    colors = ((0x1F, 0x77, 0xB4), (0xFF, 0x7F, 0x0E))  # matplotlib's first two
    at_100, at_50 = (int((pixels == color).all(axis=2).sum()) for color in colors)
    assert at_100 == pytest.approx(at_50, rel=0.1)


def test_dark_and_paper(page: Path, browser: Browser, tmp_path: Path) -> None:
    browser.open(page, 1280, "dark")
    paper, ink = browser.brightness()
    assert paper < 100 < 500 < ink
    drawn = (
        "getComputedStyle(document.querySelector('svg text')).fill.match(/\\d+/g).map(Number).reduce((a, b) => a + b)"
    )
    assert browser.evaluate(drawn) > 300  # letters of plots, on a dark ground
    browser.open(page, 1280, "dark", "print")
    assert browser.brightness() == (765, 0)
    assert browser.evaluate(drawn) < 450
    browser.print_pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
