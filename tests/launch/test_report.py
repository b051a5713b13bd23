"""`shardstep report`: one page of one or more runs, whatever state they are in; and how it looks in a real browser."""

import json
import shutil
from pathlib import Path

import pytest
import yaml

from shardstep.launch.cli import run as run_command
from shardstep.launch.report import main
from tests.browser import Browser
from tests.runs import read_lines, train_ranks, write_recipe

NASTY = "<script>alert(1)</script> & co"


def change_recipe(run: Path, section: str, key: str, value: object) -> None:
    content = yaml.safe_load((run / "config.yaml").read_text())
    content[section][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(content))


def copy_run(finished_run: Path, place: Path, name: str = "") -> Path:
    shutil.copytree(finished_run, place)
    change_recipe(place, "run", "name", name or place.name)
    return place


@pytest.fixture(scope="module")
def pages(finished_run: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Pages of one run, of three side by side with nasty names, and of one that has only just begun."""
    folder = tmp_path_factory.mktemp("pages")
    one, other, new = (copy_run(finished_run, folder / name) for name in ("one", "other", "new"))
    third = copy_run(finished_run, folder / "third", NASTY)
    change_recipe(other, "optimizer", "lr", 0.1)
    lines = read_lines(third / "metrics.jsonl")
    lines[2] |= {"loss": None, "accuracy": None}  # as of a run that has diverged
    (third / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for name in ("metrics.jsonl", "model.safetensors", "summary.json", "starts.json"):
        (new / name).unlink()
    shutil.rmtree(new / "checkpoints")
    assert main([str(one), "--device", "cpu"]) == 0
    assert main([str(one), str(other), str(third), "--out", str(folder / "three.html"), "--device", "cpu"]) == 0
    assert main([str(new)]) == 0
    return {"one": one / "report.html", "three": folder / "three.html", "new": new / "report.html"}


def test_one_run(pages: dict[str, Path], finished_run: Path) -> None:
    text = pages["one"].read_text()
    last = read_lines(finished_run / "metrics.jsonl")[-1]
    assert f"{100 * last['accuracy']:.2f}\N{NO-BREAK SPACE}%" in text
    assert f"{last['loss']:.4f}" in text
    assert "Left out" not in text
    for part in ("Curves", "Classes", "Confidence", "First layer", "Time and hardware", "How to repeat it"):
        assert f"<h2>{part}</h2>" in text
    assert "whitening_cnn" in text
    assert "shardstep train config.yaml run.dir=runs/one-again run.resume=never" in text
    assert json.loads((finished_run / "starts.json").read_text())[0]["versions"]["torch"] in text


def test_several_runs_have_what_differs_on_top(pages: dict[str, Path]) -> None:
    text = pages["three"].read_text()
    differing = text[text.index("What differs") : text.index("What came out")]
    assert differing.count("<tr>") == 2  # the head, and one key
    assert "<code>optimizer.lr</code></th><td><code>0.05</code></td><td><code>0.1</code>" in differing
    assert "alert(1)" in text
    assert "<script" not in text


def test_a_run_that_has_only_just_begun(pages: dict[str, Path]) -> None:
    text = pages["new"].read_text()
    assert "killed" in text
    assert "curves: metrics.jsonl is missing, or holds no intact line yet" in text
    assert "has neither model.safetensors nor an intact checkpoint yet" in text
    assert "<h2>How to repeat it</h2>" in text


def test_bad_input_is_one_line_each(
    finished_run: Path, shards: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    arguments = [
        str(finished_run),
        str(tmp_path / "nowhere"),
        str(tmp_path / "empty"),
        "--out",
        str(tmp_path / "a.html"),
    ]
    assert run_command(main, arguments) == 2
    assert capsys.readouterr().err == (
        f"error: no report: 2 problems\n  - {tmp_path / 'nowhere'} does not exist\n"
        f"  - {tmp_path / 'empty'} is not a run's folder: no config.yaml\n"
    )
    other = copy_run(finished_run, tmp_path / "other")
    change_recipe(other, "loss", "name", "mse")
    assert run_command(main, [str(finished_run), str(other), "--out", str(tmp_path / "a.html")]) == 2
    message = capsys.readouterr().err
    assert message.startswith("error: runs of different tasks cannot be compared")
    assert message.count("\n") == 1
    (tmp_path / "link").symlink_to(finished_run)
    for again in (f"{finished_run}/../{finished_run.name}", str(tmp_path / "link")):
        assert run_command(main, [str(finished_run), again, "--out", str(tmp_path / "a.html")]) == 2
        told = f"error: no report: {finished_run} and {again} are the same folder: give each run once\n"
        assert capsys.readouterr().err == told
    assert run_command(main, [str(finished_run), "--out", str(tmp_path)]) == 2
    assert "is a folder" in capsys.readouterr().err
    assert not list(tmp_path.glob("*.html"))


# --- in a real browser ------------------------------------------------------------------------------------------------


@pytest.fixture(params=["one", "three", "new"])
def shown(request: pytest.FixtureRequest, pages: dict[str, Path]) -> Path:
    return pages[request.param]


def test_in_a_browser(shown: Path, browser: Browser) -> None:
    for width in (1280, 390):
        browser.open(shown, width)
        assert browser.evaluate("innerWidth") == width
        assert browser.width() <= width
        assert browser.broken_images() == 0
        assert browser.smallest_text() >= 9, f"text too small at {width} pixels"
    assert browser.evaluate("document.images.length") > 20 or shown.parent.name == "new"
    assert browser.problems == []


def test_no_line_ends_inside_a_figure(finished_run: Path, browser: Browser, tmp_path: Path) -> None:
    run = copy_run(finished_run, tmp_path / "run")
    summary = json.loads((run / "summary.json").read_text())
    widest = {"wall_s": 3599.4, "eval": summary["eval"] | {"accuracy": 1.0}}  # 59 min 59 s, 100.00 %
    (run / "summary.json").write_text(json.dumps(summary | widest))
    lines = read_lines(run / "metrics.jsonl")
    (run / "metrics.jsonl").write_text("".join(json.dumps(line | {"accuracy": 1.0}) + "\n" for line in lines))
    assert main([str(run), "--device", "cpu"]) == 0
    for width in (1280, 1100, 390, 320):
        browser.open(run / "report.html", width)
        assert browser.width() <= width
        assert browser.evaluate("document.querySelector('.tiles').innerText").count("100.00\N{NO-BREAK SPACE}%") >= 1
        heights = "[...document.querySelectorAll('.tile b')].map(figure => figure.getBoundingClientRect().height)"
        assert browser.evaluate(f"Math.max(...{heights})") < 40  # one line of 22 pixels
        overflowing = (
            "[...document.querySelectorAll('.tile')].filter(tile => tile.scrollWidth > tile.clientWidth).length"
        )
        assert browser.evaluate(overflowing) == 0


def test_dark_and_paper(shown: Path, browser: Browser, tmp_path: Path) -> None:
    found = {}
    for scheme, media in (("light", "screen"), ("dark", "screen"), ("dark", "print")):
        browser.open(shown, 1280, scheme, media)
        found[scheme, media] = browser.brightness()
    assert found["light", "screen"][0] > 700 > 200 > found["light", "screen"][1]  # of 3 x 255: dark ink on light paper
    assert found["dark", "screen"][0] < 100 < 500 < found["dark", "screen"][1]
    assert found["dark", "print"] == (765, 0)  # black on white
    browser.print_pdf(tmp_path / "page.pdf")
    assert (tmp_path / "page.pdf").read_bytes().startswith(b"%PDF")
    assert browser.problems == []


def test_the_browser_would_tell(tmp_path: Path, browser: Browser) -> None:
    """The checks above see what they are made for."""
    page = tmp_path / "bad.html"
    page.write_text(
        "<!doctype html><body><img src='nowhere.png'><div style='width:900px'>wide</div><script>undefinedFunction()</script>"
    )
    already = len(browser.problems)
    browser.open(page, 390)
    assert browser.width() > 390
    assert browser.broken_images() == 1
    assert any("undefinedFunction" in problem for problem in browser.problems[already:])
    del browser.problems[already:]


def test_an_autoencoder_in_a_browser(shards: Path, browser: Browser, tmp_path: Path) -> None:
    model = {"name": "autoencoder", "widths": [4, 4]}
    train_ranks(1, write_recipe(tmp_path, shards, model=model, loss={"name": "mse"}, train={"duration": "2 steps"}))
    assert main([str(tmp_path / "run"), "--device", "cpu"]) == 0
    browser.open(tmp_path / "run" / "report.html", 390)
    assert browser.width() <= 390
    assert browser.broken_images() == 0
    assert browser.evaluate("document.images.length") == 24 + 4  # pairs, and filters
    assert "Worst reconstructions" in browser.evaluate("document.body.innerText")
