"""The functions of `import shardstep`: train, evaluate and predict, as the commands of these names do."""

import contextlib
import json
import os
import sys
import tempfile
from collections.abc import Iterator, Mapping
from os import PathLike
from pathlib import Path, PurePath
from typing import Any, Literal

import yaml

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.text import printable
from shardstep.launch.predict import as_record, predict_paths
from shardstep.launch.python.child import run_command
from shardstep.launch.python.loaded_run import LoadedRun, load_run, open_model, undisturbed
from shardstep.launch.python.notebook_display import NotebookDisplay, in_notebook
from shardstep.launch.ranks import TRAIN_SCRIPT
from shardstep.trainer.monitoring.display import Display
from shardstep.trainer.monitoring.display_events import show

EVALUATE_SCRIPT = TRAIN_SCRIPT.with_name("evaluate.py")
_Folder = LoadedRun | str | PathLike[str]
_Device = Literal["auto", "cpu", "cuda"]


def train(recipe: str | PathLike[str] | Mapping[str, Any], *overrides: str, nproc: int = 1) -> LoadedRun:
    """Train a recipe in processes of their own, show their output, and return the run.

    Ctrl-C, or a notebook's stop button, saves the run and returns it as stopped. The same call resumes it.

    Args:
        recipe: the name of a recipe, the path of one, or its sections, such as `{"model": {"name": "mlp"}, ...}`.
        overrides: such as "optimizer.lr=0.1".
        nproc: ranks to start on this machine.

    Raises:
        InputError: the recipe, an override, nproc or the data cannot be used.
        TrainingFailed: training has failed, for example because the loss became NaN.
        KeyboardInterrupt: Ctrl-C came before training began.
    """
    if not isinstance(nproc, int) or nproc < 1:
        raise InputError(f"nproc={nproc!r} is not a number of ranks: give 1 or more")
    if odd := [word for word in overrides if not isinstance(word, str)]:
        raise InputError(f"{odd[0]!r} is not an override: give text such as 'optimizer.lr=0.1'")
    with _file_of(recipe) as path:
        loaded = load_recipe(path, overrides)
        if loaded.problems:
            from shardstep.trainer.validate_recipe import validate_recipe

            validate_recipe(loaded)  # raises an error that has the problems of all kinds
        display = NotebookDisplay() if in_notebook() else Display(enabled=True, drops_output=True)
        ranks = [] if nproc == 1 else ["--nproc", str(nproc)]
        try:
            run_command(
                TRAIN_SCRIPT,
                [path, *overrides, *ranks],
                lambda line: show(display, line),
                lambda line: display.tell(line),
            )
        finally:
            display.stop()
    return load_run(loaded.recipe.run.dir)


def evaluate(run: _Folder, data: str | PathLike[str] | None = None, device: _Device = "auto") -> dict[str, Any]:
    """Evaluate a run, or one of its checkpoints, on a test set, in a process of its own.

    Args:
        run: a run, its folder, or a checkpoint's.
        data: test shards; None takes those of the run.
        device: auto, cpu or cuda.

    Returns:
        loss (None if it is NaN or infinite), accuracy, top5, samples and world_size; for images with several labels also map,
        f1 and f1_micro.

    Raises:
        InputError: there are no intact weights, no such device, or the test set does not fit the run.
    """
    _check_device(device)
    words = [f"--device={device}", *([] if data is None else [f"--data={os.fspath(data)}"])]
    lines: list[str] = []

    def show_all_but_the_last(line: str) -> None:
        if lines:
            print(lines.pop())
        lines.append(line)

    run_command(EVALUATE_SCRIPT, [*words, "--", str(_path(run))], show_all_but_the_last, _print_to_stderr)
    found = json.loads(lines[0])
    assert isinstance(found, dict)
    return found


def predict(run: _Folder, *files: str | PathLike[str], top: int = 3, device: _Device = "auto") -> list[dict[str, Any]]:
    """Predict the classes of image files, of any size. Files that cannot be read are reported on stderr, and left out.

    Args:
        run: a run, its folder, or a checkpoint's.
        files: image files, or folders of them.
        top: how many classes to return for each, the most probable first.
        device: auto, cpu or cuda.

    Returns:
        For each file: file, prediction, confidence and top (class and probability); where images have several labels, these
        instead of prediction and confidence.

    Raises:
        InputError: there are no intact weights, no such device, no classes, or no file that can be read.
    """
    _check_device(device)
    if not isinstance(top, int) or top < 1:
        raise InputError(f"top={top!r} is not a number of classes: give 1 or more")
    if not files:
        raise InputError("predict needs image files, or folders of them")
    path = _path(run)
    trained = open_model(path, device)
    with undisturbed():
        _, predictions = predict_paths(trained, path, map(Path, files), top)
        return [as_record(one, trained) for one in predictions]


class _Dumper(yaml.SafeDumper):
    """Writes paths as text."""


_Dumper.add_multi_representer(PurePath, lambda dumper, path: dumper.represent_str(str(path)))


@contextlib.contextmanager
def _file_of(recipe: str | PathLike[str] | Mapping[str, Any]) -> Iterator[str]:
    """Yield the name or path of a recipe; sections are in a file while the block runs."""
    if isinstance(recipe, str | PathLike):
        yield os.fspath(recipe)
        return
    if not isinstance(recipe, Mapping):
        raise InputError(f"{recipe!r} is not a recipe: give a name, a path, or a mapping of sections")
    try:
        text = yaml.dump(dict(recipe), Dumper=_Dumper, sort_keys=False)
    except yaml.representer.RepresenterError as error:
        raise InputError(
            f"a recipe holds text, numbers, lists and mappings, not {error.args[-1]!r}; a function of yours is named by its "
            f"place, as in 'path/file.py:function'"
        ) from None
    with tempfile.TemporaryDirectory(prefix="shardstep-") as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(text)
        try:
            yield str(path)
        except InputError as error:
            raise InputError(str(error).replace(str(path), "that was given")) from None


def _path(run: _Folder) -> Path:
    return run.folder if isinstance(run, LoadedRun) else Path(run)


def _check_device(device: str) -> None:
    if device not in ("auto", "cpu", "cuda"):
        raise InputError(f"device={device!r} is not a device: give auto, cpu or cuda")


def _print_to_stderr(line: str) -> None:
    print(printable(line), file=sys.stderr, flush=True)
