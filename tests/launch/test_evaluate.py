"""The command `evaluate` on other test sets: their classes are matched with those of the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from shardstep.datasets.manifest import open_shards
from shardstep.datasets.reader import StreamReader
from shardstep.launch.shards import main as shards_main
from shardstep.trainer.analysis.trained_model import open_trained_model
from tests.datasets.test_tar import write_tar
from tests.distributed import run_ranks


def evaluated(run: str, data: str) -> tuple[int, str, str]:
    """Runs in a rank: exit code, stdout and stderr of the command."""
    import contextlib
    import io

    from shardstep.launch.cli import run as run_command
    from shardstep.launch.evaluate import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run_command(main, [run, "--data", data, "--device", "cpu"])
    return code, out.getvalue(), err.getvalue()


def write_with_classes(folder: Path, source: Path, classes: list[str], keep: Callable[[str], bool]) -> Path:
    """Write the images of a data set whose class is to `keep` again, labelled by another list of classes."""
    shards = open_shards(source)
    reader, members = StreamReader(shards), {}
    for sample, label in enumerate(shards.labels.tolist()):
        name = shards.manifest.classes[label]
        if keep(name):
            label = classes.index(name) if name in classes else label
            members |= {f"{sample:03d}.png": reader.read_bytes(sample), f"{sample:03d}.cls": str(label).encode()}
    folder.mkdir()
    write_tar(folder / "a.tar", members)
    assert shards_main(["index", str(folder), "--classes", ",".join(f'"{name}"' for name in classes)]) == 0
    return folder


def expected_metrics(run: Path, keep: Callable[[str], bool]) -> dict[str, Any]:
    """Loss and accuracy on the run's own test samples of some classes, computed in one go."""
    trained = open_trained_model(run, "cpu")
    test, reader = trained.open_test_set()
    pixels, labels = reader.read(test.all_ids())
    chosen = np.array([keep(trained.manifest.classes[label]) for label in labels.tolist()])
    outputs = trained.module(trained.normalize(pixels[chosen])).detach()
    losses = trained.objective.evaluation_loss(outputs, labels[chosen])
    correct = outputs.argmax(dim=1) == labels[chosen]
    return {"loss": float(losses.mean()), "accuracy": float(correct.float().mean()), "samples": int(chosen.sum())}


@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    ("which", "told"),
    [
        ("in reverse", "x has other classes than the model: classes are matched by name\n"),
        ("some", "classes are matched by name; only the model has "),
        ("and more", "classes are matched by name; without images: extra"),
        ("without names", "so labels count as the same in both: 0 as class0, 1 as class1"),
    ],
)
def test_classes_in_another_order_give_the_same_result(
    finished_run: Path, shards: Path, tmp_path: Path, which: str, told: str, ranks: int
) -> None:
    known = open_shards(shards / "test").manifest.classes
    classes = {
        "in reverse": known[::-1],
        "some": known[3:0:-1],
        "and more": ["extra", *known],
        "without names": [str(label) for label in range(len(known))],
    }[which]

    def keep(name: str) -> bool:
        return which != "some" or name in classes

    other = write_with_classes(tmp_path / "x", shards / "test", classes, keep)
    results = run_ranks(ranks, evaluated, str(finished_run), str(other))
    code, out, err = results[0]
    assert code == 0, err
    *notes, last = out.splitlines()
    assert len(notes) == 1
    assert told in out
    assert all(more == "" for _, more, _ in results[1:])
    found = json.loads(last)
    assert {key: found[key] for key in ("loss", "accuracy", "samples")} == pytest.approx(
        expected_metrics(finished_run, keep), rel=1e-5
    )


def test_images_of_classes_that_the_run_lacks_are_refused(finished_run: Path, shards: Path, tmp_path: Path) -> None:
    known = open_shards(shards / "test").manifest.classes
    other = write_with_classes(tmp_path / "x", shards / "test", ["a\nb", *known[1:]], lambda _: True)
    results = run_ranks(2, evaluated, str(finished_run), str(other))
    assert [code for code, _, _ in results] == [2, 2]
    (message,) = [err for _, _, err in results if err]
    assert message.count("\n") == 1
    assert f"{other} has images of classes that the model does not know: a\\nb (" in message
