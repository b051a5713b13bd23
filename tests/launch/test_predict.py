"""`shardstep predict`: image files to classes."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchvision.transforms import v2

from shardstep.configs.errors import InputError
from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.launch.cli import run as run_command
from shardstep.launch.predict import main
from shardstep.trainer.analysis.trained_model import open_trained_model
from tests.runs import spoil_weights, train_ranks, write_recipe


@pytest.fixture
def images(shards: Path, tmp_path: Path) -> Path:
    """Five of the test images as files, the first as it is, the others 2 to 5 times as large."""
    reader = StreamReader(open_shards(shards / "test"))
    folder = tmp_path / "images"
    folder.mkdir()
    for number, pixels in enumerate(reader.read(np.arange(5))[0].numpy()):
        Image.fromarray(pixels.repeat(number + 1, axis=0).repeat(number + 1, axis=1)).save(folder / f"{number}.png")
    return folder


def test_files_are_predicted_as_the_run_would(
    finished_run: Path, images: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(finished_run), str(images), "--json", "--top", "2", "--device", "cpu"]) == 0
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    trained = open_trained_model(finished_run, "cpu")
    prepare = v2.Compose([v2.Resize(32), v2.CenterCrop(32)])
    pixels = torch.from_numpy(np.stack([prepare(Image.open(images / f"{number}.png")) for number in range(5)]))
    expected = trained.module(trained.normalize(pixels)).detach().softmax(dim=1)
    assert [Path(line["file"]).name for line in found] == [f"{number}.png" for number in range(5)]
    for line, row in zip(found, expected, strict=True):
        confidence, label = row.max(dim=0)
        assert line["prediction"] == f"class{int(label)}" == line["top"][0]["class"]
        assert line["confidence"] == pytest.approx(float(confidence), abs=1e-5)
        assert len(line["top"]) == 2


def test_what_cannot_be_read_is_named_and_the_rest_goes_on(
    finished_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (images / "2.png").write_bytes(b"no image")
    (tmp_path / "none").mkdir()
    (images / ".thumbnails").mkdir()
    (images / ".thumbnails" / "0.png").write_bytes(b"no image")
    arguments = [str(finished_run), str(tmp_path / "nowhere.png"), str(tmp_path / "none"), str(images)]
    assert main([*arguments, "--grid", str(tmp_path / "grid.png")]) == 0
    printed = capsys.readouterr()
    assert [line.split()[0] for line in printed.out.splitlines()] == [str(images / f"{n}.png") for n in (0, 1, 3, 4)]
    assert all(line.count("%") == 3 for line in printed.out.splitlines())
    assert f"left out: {tmp_path / 'nowhere.png'}: does not exist\n" in printed.err
    assert f"left out: {tmp_path / 'none'}: holds no image" in printed.err
    assert f"left out of {images}: 1 hidden folder (.thumbnails); used are files that end in " in printed.err
    assert f"left out: {images / '2.png'}: not an image that can be decoded\n" in printed.err
    assert f"{tmp_path / 'grid.png'}: 4 images\n" in printed.err
    with Image.open(tmp_path / "grid.png") as grid:
        assert grid.width > 200


def test_nothing_to_read_is_bad_input(finished_run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.png").write_bytes(b"")
    assert run_command(main, [str(finished_run), str(tmp_path / "a.png"), str(tmp_path / "b.png")]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.endswith("error: nothing could be predicted: 2 of 2 could not be read\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "--top=0 is not a number of classes"),
        (["--grid", "a.doc"], "--grid=a.doc must end in one of png"),
        (["--grid", "no/where/a.png"], "there is no folder"),
        (["--device", "cuda"], "there is no CUDA device here"),
    ],
)
def test_bad_options(
    arguments: list[str], message: str, finished_run: Path, images: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import torch

    if arguments == ["--device", "cuda"] and torch.cuda.is_available():
        pytest.skip("there is a CUDA device here")
    assert run_command(main, [str(finished_run), str(images), *arguments]) == 2
    assert message in capsys.readouterr().err


def test_what_is_no_run(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run_command(main, [str(tmp_path), str(images)]) == 2
    assert "is neither a run's folder nor a checkpoint of one" in capsys.readouterr().err


def test_names_that_cannot_be_printed_or_are_formulas(
    finished_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = str(images).encode()
    (images / "0.png").rename(folder.decode() + "/a$b$_{.png")
    Path(folder.decode() + "/1.png").rename((folder + b"/\xff.png").decode(errors="surrogateescape"))
    (images / "2.png").rename(images / "\u732b.png")
    (images / "3.png").rename(images / "\x1b[31mred.png")
    assert main([str(finished_run), str(images), "--grid", str(tmp_path / "grid.svg")]) == 0
    said = capsys.readouterr().out
    assert "\\udcff.png" in said
    assert "\\x1b[31mred.png" in said
    assert "\x1b" not in said
    assert (tmp_path / "grid.svg").stat().st_size > 1000


def test_a_run_that_has_diverged(finished_run: Path, images: Path, tmp_path: Path) -> None:
    shutil.copytree(finished_run, tmp_path / "run")
    spoil_weights(tmp_path / "run", "head.weight")
    with pytest.raises(InputError, match="its outputs are NaN or infinite"):
        main([str(tmp_path / "run"), str(images), "--json"])


def test_a_run_that_has_not_finished(
    finished_run: Path, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = shutil.copytree(finished_run, tmp_path / "run", ignore=shutil.ignore_patterns("summary.json"))
    assert main([str(run), str(images), "--json"]) == 0
    assert capsys.readouterr().err == f"{run} is not finished: using its checkpoint step-00000008\n"
    assert main([str(run / "checkpoints" / "step-00000004"), str(images), "--json"]) == 0
    assert "finished" not in capsys.readouterr().err


def test_an_autoencoder_has_no_classes(shards: Path, images: Path, tmp_path: Path) -> None:
    model = {"name": "autoencoder", "widths": [4]}
    train_ranks(1, write_recipe(tmp_path, shards, model=model, loss={"name": "mse"}, train={"duration": "1 steps"}))
    assert run_command(main, [str(tmp_path / "run"), str(images)]) == 2
