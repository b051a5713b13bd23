"""Predict the classes of image files with a run's model.

    shardstep predict RUN_DIR_OR_CHECKPOINT FILES_OR_FOLDERS ... [--top K] [--json] [--grid PICTURE] [--device auto|cpu|cuda]

Images of any size are prepared as the run's own were; docs/data.md says which formats are read. Files that cannot be read
are reported on stderr and skipped; the exit code is 2 if none could be read. With --json, each line of stdout is an object:
file, prediction, confidence, top.
"""

import argparse
import json
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shardstep.configs.errors import InputError
from shardstep.configs.text import count, printable
from shardstep.launch.cli import run_script
from shardstep.launch.trust import add_trust_option, trust_if_asked

if TYPE_CHECKING:
    from shardstep.trainer.analysis.file_predictions import FilePrediction
    from shardstep.trainer.analysis.trained_model import TrainedModel

_MOST_IN_GRID = 96
_NAME_WIDTH = 48  # of a table's column; a longer name makes its own line longer


def main(arguments: list[str]) -> int:
    """Predict; return the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep predict", description="Predict the classes of image files.")
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("files", nargs="+", type=Path, metavar="FILE_OR_FOLDER", help="images, or folders of them")
    parser.add_argument("--top", type=int, default=3, metavar="K", help="classes to print per image (default: 3)")
    parser.add_argument("--json", action="store_true", help="print one JSON object per line instead of the table")
    parser.add_argument("--grid", type=Path, metavar="PICTURE", help="draw images with predictions, such as a.png")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    if args.top < 1:
        raise InputError(f"--top={args.top} is not a number of classes: give 1 or more")

    import numpy as np

    from shardstep.trainer.analysis.trained_model import open_trained_model
    from shardstep.trainer.monitoring.pictures import check_picture, draw_grid, drawable

    if args.grid:
        check_picture("--grid", args.grid)
    trust_if_asked(args)
    trained = open_trained_model(args.run, args.device)
    files, predictions = predict_paths(trained, args.run, args.files, args.top)
    width = min(_NAME_WIDTH, max((len(printable(str(path))) for path in files), default=0))
    predicted, drawn, captions = 0, list[np.ndarray](), list[str]()
    several = trained.objective.finds_several
    for one in predictions:
        predicted += 1
        if args.json:
            print(json.dumps(as_record(one, trained)), flush=True)
        else:
            print(_as_row(one, trained.manifest.classes, several, width), flush=True)
        if args.grid and len(drawn) < _MOST_IN_GRID:
            drawn.append(one.pixels)
            labels = ", ".join(drawable(trained.manifest.classes[label]) for label in one.found) or "none"
            said = labels if several else f"{labels} {one.top[0][1]:.0%}"
            captions.append(f"{drawable(one.path.name, keep='end')}\n{said}")
    if args.grid:
        draw_grid(drawn, captions, args.grid)
        first = "" if len(drawn) == predicted else f"the first {len(drawn)} of "
        print(printable(f"{args.grid}: {first}{count(predicted, 'image')}"), file=sys.stderr)
    return 0


def predict_paths(
    trained: "TrainedModel", run: Path, paths: Iterable[Path], top: int
) -> tuple[list[Path], Iterator["FilePrediction"]]:
    """Return the image files that paths lead to, and an iterator that predicts them; report on stderr what is left out.

    Args:
        trained: the model of the run or checkpoint `run`.
        paths: of files, or of folders of them.
        top: how many classes to return for each.

    Raises:
        InputError: the model has no classes. The iterator raises it for outputs that are NaN, or if no file can be read.
    """
    from shardstep.datasets.image_files import find_image_files
    from shardstep.trainer.analysis.file_predictions import predict_files
    from shardstep.trainer.analysis.trained_model import unfinished_note

    for note in (unfinished_note(run, trained.weights), trained.crop_note):
        if note:
            _tell(note)
    if trained.objective.reconstructs:
        raise InputError(
            f"{run} reconstructs images: it has no classes to predict. `shardstep report` shows its reconstructions"
        )
    left_out = 0

    def leave_out(path: Path, reason: str) -> None:
        nonlocal left_out
        left_out += 1
        _tell(f"left out: {path}: {reason}")

    files: list[Path] = []
    for path in paths:
        try:
            found, others = find_image_files(path)
        except ValueError as error:
            leave_out(path, str(error))
            continue
        files += found
        if others:
            _tell(others)

    def predict() -> Iterator["FilePrediction"]:
        predicted = 0
        for one in predict_files(trained, files, top, leave_out):
            predicted += 1
            if math.isnan(one.top[0][1]):
                raise InputError(f"{run}: its outputs are NaN or infinite, as those of a run that has diverged")
            yield one
        if not predicted:
            raise InputError(f"nothing could be predicted: {left_out} of {left_out} could not be read")

    return files, predict()


def as_record(one: "FilePrediction", trained: "TrainedModel") -> dict[str, Any]:
    """Return the prediction for a file: file, prediction, confidence (or labels, where images have several) and top."""
    classes = trained.manifest.classes
    top = [{"class": classes[label], "probability": share} for label, share in one.top]
    best: dict[str, Any] = {"prediction": top[0]["class"], "confidence": top[0]["probability"]}
    if trained.objective.finds_several:
        best = {"labels": [classes[label] for label in one.found]}
    return {"file": str(one.path), **best, "top": top}


def _tell(text: str) -> None:
    print(printable(text), file=sys.stderr, flush=True)


def _as_row(one: "FilePrediction", classes: list[str], several: bool, width: int) -> str:
    """Return the line of an image; of several labels, a plus marks those found."""
    columns = [f"{printable(classes[label])} {100 * share:.1f} %" for label, share in one.top]
    if several:
        columns = [f"{'+' if place < len(one.found) else '-'} {text}" for place, text in enumerate(columns)]
    return f"{printable(str(one.path)):<{width}}  {'  '.join(f'{column:<20}' for column in columns).rstrip()}"


if __name__ == "__main__":
    run_script(main)
