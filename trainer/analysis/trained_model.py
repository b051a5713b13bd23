"""Open a run or one of its checkpoints as a trained model, with the preparation of its images."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from shardstep.configs.cores import usable_cores
from shardstep.configs.errors import InputError
from shardstep.configs.held_out import NO_TEST_SET
from shardstep.configs.resolve import ResolvedRecipe, as_resolved
from shardstep.configs.selection import mix_name
from shardstep.datasets.augment import Normalize
from shardstep.datasets.class_mapping import map_classes
from shardstep.datasets.decode_crop import PARTIAL, missing_for_partial
from shardstep.datasets.framing import Framing, framing_of
from shardstep.datasets.manifest import Manifest, check_same_kind, open_shards, parse_manifest
from shardstep.datasets.parts import Part
from shardstep.datasets.reader import StreamReader
from shardstep.trainer import data
from shardstep.trainer.checkpoints.checkpoint import load_weights
from shardstep.trainer.models import build_model
from shardstep.trainer.optim.losses import Objective, build_objective
from shardstep.trainer.own_code.kept_code import check_trusted
from shardstep.trainer.run_dir import RunDir, find_weights
from shardstep.trainer.validate_recipe import validate_recipe


@dataclass(frozen=True)
class TrainedModel:
    """A trained model, ready for images."""

    run_dir: RunDir
    weights: Path  # the file that they come from
    recipe: ResolvedRecipe
    manifest: Manifest  # of the training set
    image_shape: tuple[int, int, int]  # (height, width, channels) that the model takes
    module: nn.Module  # in evaluation mode, in fp32, on the device
    normalize: Normalize  # uint8 pixels (B, H, W, C) to the input of the model
    objective: Objective
    device: torch.device

    @property
    def which(self) -> str:
        """A name for the weights: "the final weights", or which checkpoint."""
        is_final = self.weights.parent == self.run_dir.path
        return "the final weights" if is_final else f"the checkpoint {self.weights.parent.name}"

    @property
    def framing(self) -> Framing:
        """How images of any size become those that the model takes: as in its run, or what comes closest on this machine."""
        height, width, _ = self.image_shape
        framing = framing_of(self.recipe.data) or Framing.covering(height, width, self.recipe.data.crop_version)
        return replace(framing, version=2) if self.crop_note else framing

    @property
    def crop_note(self) -> str | None:
        """Say that this machine does not decode images as the run did; None where it does."""
        lacks = missing_for_partial() if self.recipe.data.crop_version == PARTIAL else None
        if not lacks:
            return None
        return (
            f"JPEGs are decoded entirely, unlike in the run: pixels differ by less than 1 of 255 on average ({lacks})"
        )

    def open_test_set(
        self, folder: str | None = None, tell: Callable[[str], None] = lambda _: None
    ) -> tuple[Part, StreamReader]:
        """Open the run's test set, or another one; its images are read as the training set's were, its labels are the run's.

        A run without a test set has its validation set for one.

        Args:
            tell: called with a line on how its classes become those of the run, if they differ.

        Raises:
            InputError: it cannot be opened, or has images of other classes or of another size.
        """
        if folder is None and self.recipe.data.test == NO_TEST_SET:
            test, place = data.open_parts(self.recipe.data).final, self.test_set_name
        else:
            place = folder or self.recipe.data.test
            test = Part(open_shards(place))
        framing = self.framing if framing_of(self.recipe.data) else None
        if not self.objective.reconstructs:
            check_same_kind([("the run's training set", self.manifest), (place, test.manifest)])
            shards, note = map_classes(test.shards, self.manifest.classes, place)
            test = replace(test, shards=shards)
            if note:
                tell(note)
        data.check_same_size(self.manifest, test.manifest, "the run's training set", place, framing)
        return test, StreamReader(test.shards, framing, self.manifest.image_mode, self.recipe.data.on_bad_image)

    @property
    def test_set_name(self) -> str:
        """The folder of the run's test set; of a run without one, what its validation set is."""
        config = self.recipe.data
        if config.test != NO_TEST_SET:
            return config.test
        return config.validation if isinstance(config.validation, str) else f"what is held out of {mix_name(config)}"


def open_trained_model(
    path: Path,
    device: torch.device | Literal["auto", "cpu", "cuda"] = "auto",
    found: tuple[Path, RunDir] | None = None,
) -> TrainedModel:
    """Open the model of a run's folder, or of one of its checkpoints; `found` is what find_weights returned for it, if known.

    Raises:
        InputError: the path is neither, has no intact weights, was written by another version, or there is no such device.
    """
    weights, run_dir = found or find_weights(path)
    recipe = read_recipe(run_dir)
    manifest = read_train_manifest(run_dir)
    image_shape = manifest.shape_when_read(framing_of(recipe.data))
    if image_shape is None:
        files = f"neither {run_dir.config_path.name} nor {run_dir.train_manifest_path.name}"
        raise InputError(f"{run_dir.path}: {files} says how large the images are")
    height, width, channels = image_shape
    place = find_device(device) if isinstance(device, str) else device
    torch.set_num_threads(min(torch.get_num_threads(), usable_cores().count))  # torch knows nothing of quotas
    module = build_model(recipe.model, (channels, height, width), len(manifest.classes))
    load_weights(module, weights)
    return TrainedModel(
        run_dir=run_dir,
        weights=weights,
        recipe=recipe,
        manifest=manifest,
        image_shape=image_shape,
        module=module.to(place).eval(),
        normalize=data.make_normalize(recipe.data, manifest, image_shape, place),
        objective=build_objective(recipe.loss, recipe.model, manifest.has_several_labels),
        device=place,
    )


def read_recipe(run_dir: RunDir) -> ResolvedRecipe:
    """Read the recipe of a run, validated, and import the code that it names.

    Raises:
        InputError: it cannot be read, or is of another version; or it names code that is not trusted.
    """
    check_trusted(run_dir.config.recipe, run_dir.code_path)
    return as_resolved(validate_recipe(replace(run_dir.config, folders=(run_dir.path.absolute(),))))


def read_train_manifest(run_dir: RunDir) -> Manifest:
    """Read the manifest of a run's training set.

    Raises:
        InputError: it cannot be read.
    """
    path = run_dir.train_manifest_path
    try:
        return parse_manifest(path.read_text(), str(path))
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from None


def unfinished_note(path: Path, weights: Path) -> str | None:
    """Say that the weights found for a run's folder are those of a checkpoint; None where they are not."""
    run_dir = RunDir(path.resolve())
    if not run_dir.is_run or weights.parent == run_dir.path:
        return None
    cause = "has lost its final weights" if run_dir.summary.get("status") == "finished" else "is not finished"
    return f"{path} {cause}: using its checkpoint {weights.parent.name}"


def find_device(name: str) -> torch.device:
    """Return the device of a name: cpu, cuda, or auto, which is cuda where there is one.

    Raises:
        InputError: there is no such device.
    """
    if name == "cuda" and not torch.cuda.is_available():
        raise InputError("there is no CUDA device here: leave out --device, or use cpu")
    return torch.device("cuda" if name != "cpu" and torch.cuda.is_available() else "cpu")
