"""A run or one of its checkpoints to a trained model, with all that images go through before they reach it."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.configs.schema import Recipe
from shardstep.datasets.augment import Normalize
from shardstep.datasets.manifest import Manifest, ShardFolder, open_shards, parse_manifest
from shardstep.datasets.reader import StreamReader
from shardstep.datasets.scan import file_sha256
from shardstep.trainer import data
from shardstep.trainer.check import check_recipe
from shardstep.trainer.checkpoint import load_weights
from shardstep.trainer.checkpoint_files import AVERAGE, WEIGHTS, newest_whole, problems_of
from shardstep.trainer.folder import CONFIG_NAME, MANIFEST_NAME, is_run, read_summary
from shardstep.trainer.losses import Objective, build_objective
from shardstep.trainer.models import build_model


@dataclass(frozen=True)
class Trained:
    """A trained model, ready for images.

    Attributes:
        folder: of the run.
        weights: the file that they come from.
        recipe: of the run.
        manifest: of the training set.
        image_shape: (height, width, channels) of the images that the model takes.
        module: in evaluation mode, in fp32, on the device.
        normalize: uint8 pixels (B, H, W, C) to what the model takes.
        objective: what it was trained for.
        device: where it is.
    """

    folder: Path
    weights: Path
    recipe: Recipe
    manifest: Manifest
    image_shape: tuple[int, int, int]
    module: nn.Module
    normalize: Normalize
    objective: Objective
    device: torch.device

    @property
    def which(self) -> str:
        """Of a run's weights: "the final weights", or which checkpoint's."""
        return (
            "the final weights" if self.weights.parent == self.folder else f"the checkpoint {self.weights.parent.name}"
        )

    def open_test_set(self, folder: str | None = None) -> tuple[ShardFolder, StreamReader]:
        """The run's test set, or another one of the same task.

        Raises:
            InputError: it cannot be opened, or is of another task.
        """
        place = folder or self.recipe.data.test
        test = open_shards(place)
        data.check_same_task(self.manifest, test.manifest, "the run's training set", place, self.recipe.data.resize)
        return test, StreamReader(test, self.recipe.data.resize)


def open_trained(path: Path, device: Literal["auto", "cpu", "cuda"] = "auto") -> Trained:
    """Open a run's folder, or a checkpoint of one.

    Raises:
        InputError: it is neither, has no whole weights, was written by another version, or there is no such device.
    """
    weights, folder = find_weights(path)
    recipe = check_recipe(load_recipe(str(folder / CONFIG_NAME)))
    try:
        text = (folder / MANIFEST_NAME).read_text()
    except OSError as error:
        raise InputError(f"{folder / MANIFEST_NAME} cannot be read: {error.strerror}") from None
    manifest = parse_manifest(text, str(folder / MANIFEST_NAME))
    shape = (manifest.channels, recipe.data.resize, recipe.data.resize) if recipe.data.resize else manifest.image_shape
    if shape is None:
        raise InputError(f"{folder}: neither {CONFIG_NAME} nor {MANIFEST_NAME} says how large the images are")
    channels, height, width = shape
    place = find_device(device)
    module = build_model(recipe.model, (channels, height, width), len(manifest.classes))
    load_weights(module, weights)
    image_shape = (height, width, channels)
    return Trained(
        folder=folder,
        weights=weights,
        recipe=recipe,
        manifest=manifest,
        image_shape=image_shape,
        module=module.to(place).eval(),
        normalize=data.make_normalize(recipe.data, manifest, image_shape, place),
        objective=build_objective(recipe.loss, recipe.model),
        device=place,
    )


def find_weights(path: Path) -> tuple[Path, Path]:
    """The weights of a run's folder or of one of its checkpoints, and the run's folder.

    Those of a folder are the final ones if the run is finished, else those of its newest whole checkpoint.

    Raises:
        InputError: there are none, or they are damaged.
    """
    resolved = path.resolve()
    folder = next((place for place in (resolved, resolved.parent.parent) if is_run(place)), None)
    if folder is None:
        raise InputError(f"{path} is neither a run's folder nor a checkpoint of one: no {CONFIG_NAME}")
    if folder != resolved:
        problems = problems_of(resolved, only=(WEIGHTS, AVERAGE))
        if problems:
            raise InputError(f"{path} is not whole: {'; '.join(problems)}")
        return resolved / WEIGHTS, folder
    final, summary = folder / WEIGHTS, _read_summary(folder)
    is_final = final.is_file() and summary.get("status") == "finished"
    claimed = summary.get("weights_sha256")  # runs of earlier versions have none
    if is_final and claimed and file_sha256(final) != claimed:
        raise InputError(
            f"{final} is damaged: its sha256 is another. The newest in {folder / 'checkpoints'} has the same weights"
        )
    newest, passed_over = (None, []) if is_final else newest_whole(folder / "checkpoints")
    if newest:
        return newest / WEIGHTS, folder
    if final.is_file():
        return final, folder
    damaged = f", and what is there is damaged: {'; '.join(passed_over)}" if passed_over else " yet"
    raise InputError(f"{path} has neither {WEIGHTS} nor a whole checkpoint{damaged}")


def unfinished_note(path: Path, weights: Path) -> str | None:
    """What to say where the weights found for a run's folder are those of a checkpoint; None where they are not."""
    folder = path.resolve()
    if not is_run(folder) or weights.parent == folder:
        return None
    cause = "has lost its final weights" if _read_summary(folder).get("status") == "finished" else "is not finished"
    return f"{path} {cause}: this is its checkpoint {weights.parent.name}"


def _read_summary(folder: Path) -> dict[str, Any]:
    try:
        summary = read_summary(folder)
    except (OSError, ValueError):
        return {}
    return summary if isinstance(summary, dict) else {}


def find_device(name: str) -> torch.device:
    """auto, cpu or cuda to a device; auto is cuda where there is one.

    Raises:
        InputError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: leave out --device, or use cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
