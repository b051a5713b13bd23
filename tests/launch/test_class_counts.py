"""One class to 20,000, one image a class or one in all: every command works, and what it writes stays small."""

import io
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from shardstep.datasets.input_files import IMAGE_EXTENSIONS
from shardstep.datasets.manifest import open_shards
from shardstep.launch.cli import run as run_command
from shardstep.launch.evaluate import main as evaluate
from shardstep.launch.predict import main as predict
from shardstep.launch.report import main as report
from shardstep.launch.shards import main as shards_main
from tests.datasets.test_tar import write_tar
from tests.distributed import run_ranks
from tests.runs import failure_of, read_lines, write_recipe

ENDINGS = ", ".join(IMAGE_EXTENSIONS)


def noise(draw: np.random.Generator) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write_sets(folder: Path, classes: int, images_per_class: int) -> None:
    """Write images in class folders, train/ and test/, and shards of both."""
    draw = np.random.default_rng(0)
    for split in ("train", "test"):
        for label in range(classes):
            place = folder / "images" / split / f"c{label:05d}"
            place.mkdir(parents=True)
            for number in range(images_per_class):
                (place / f"{number}.png").write_bytes(noise(draw))
        arguments = ["--source", str(folder / "images"), "--split", split, "--out", str(folder / split)]
        assert shards_main(["write", *arguments]) == 0


def run_all_commands(
    folder: Path, classes: int, images: int, capsys: pytest.CaptureFixture[str], ranks: int = 1
) -> str:
    """Train, evaluate, report and predict; return what training printed."""
    recipe = write_recipe(folder, folder, train={"global_batch_size": "full", "duration": "1 epochs"})
    (code, out, err), *_ = run_ranks(ranks, failure_of, str(recipe), pictures=True)
    assert code == 0, err
    run = folder / "run"
    summary = json.loads((run / "summary.json").read_text())
    assert summary["status"] == "finished"
    capsys.readouterr()
    assert evaluate([str(run), "--device", "cpu"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert found["samples"] == images
    assert found["accuracy"] == pytest.approx(summary["eval"]["accuracy"])
    assert report([str(run), "--device", "cpu"]) == 0
    assert predict([str(run), str(folder / "images" / "test" / "c00000"), "--json", "--device", "cpu"]) == 0
    predicted = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert len(predicted["top"]) == min(3, classes)
    assert (run / "report.html").stat().st_size < 500_000
    assert max(len(json.dumps(line)) for line in read_lines(run / "metrics.jsonl")) < 30_000
    assert (run / "confusion.png").exists() == (classes <= 1000)
    assert ("confusion.png is not drawn for more than 1,000 classes" in out) == (classes > 1000)
    return out + err


@pytest.mark.parametrize(
    ("classes", "images_per_class", "ranks", "warning"),
    [
        (1, 1, 1, "the only class is c00000: every prediction is correct, and nothing is learnt"),
        (1, 5, 2, "the only class is c00000"),
        (2, 1, 2, None),
        (40, 1, 1, None),
        (1100, 1, 2, None),
    ],
)
def test_every_command_works(
    tmp_path: Path,
    classes: int,
    images_per_class: int,
    ranks: int,
    warning: str | None,
    capsys: pytest.CaptureFixture[str],
) -> None:
    write_sets(tmp_path, classes, images_per_class)
    told = run_all_commands(tmp_path, classes, classes * images_per_class, capsys, ranks)
    assert ("warning" in told) == (warning is not None)
    assert warning is None or warning in told


def test_a_class_list_larger_than_the_data(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    draw = np.random.default_rng(0)
    (tmp_path / "names.txt").write_text("\n".join(f"c{number:05d}" for number in range(1500)))
    for split in ("train", "test"):
        (tmp_path / split).mkdir()
        members = {f"{number}.{kind}": content for number in range(3) for kind, content in
                   (("png", noise(draw)), ("cls", str(700 * number).encode()))}  # fmt: skip
        write_tar(tmp_path / split / "a.tar", members)
        assert shards_main(["index", str(tmp_path / split), "--classes", f"@{tmp_path / 'names.txt'}"]) == 0
    assert "1,497 classes without images: c00001, c00002" in capsys.readouterr().err
    (tmp_path / "images" / "test" / "c00000").mkdir(parents=True)
    (tmp_path / "images" / "test" / "c00000" / "1.png").write_bytes(noise(draw))
    told = run_all_commands(tmp_path, 1500, 3, capsys)
    assert "1,497 of 1,500 classes have no training images, so nothing is learnt about them: c00001" in told


@pytest.mark.parametrize(
    ("folders", "message"),
    [
        (["a/1.png", "b/"], f"has folders for train without images ({ENDINGS}): b. Add some or remove"),
        (["a/1.png", "b/notes.txt"], f"without images ({ENDINGS}): b. Add some or remove"),
        (["a/", "b/"], "no images in "),
    ],
)
def test_empty_class_folders_are_refused_in_one_line(
    tmp_path: Path, folders: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in folders:
        path = tmp_path / "images" / "train" / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if not name.endswith("/"):
            path.write_bytes(noise(np.random.default_rng(0)))
    arguments = ["write", "--source", str(tmp_path / "images"), "--out", str(tmp_path / "out")]
    assert run_command(shards_main, arguments) == 2
    errors = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    assert message in errors[0]


@pytest.mark.drill
def test_20_000_classes_of_one_image(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A minute and 1 GB on two cores; a matrix of classes by classes would take many minutes and tens of GB."""
    write_sets(tmp_path, 20_000, 1)
    run_all_commands(tmp_path, 20_000, 20_000, capsys)
    assert open_shards(tmp_path / "train").manifest.samples_per_class == [1] * 20_000
    assert (tmp_path / "train" / "manifest.json").stat().st_size < 1_000_000
