"""Export a trained model to a file, load the file again and compare it with the original on real images.

Every exported model takes pixels (batch, channels, height, width), 0 to 255, as uint8 or float32, in the order RGB or grey:
scaling and normalisation are inside it (safetensors holds weights only, and the numbers for both in its metadata). It returns
what the model returns. A description of its use is in its metadata, as JSON under the key `shardstep`.
"""

import copy
import json
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import metadata, util
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors.torch
import torch
from safetensors import safe_open
from torch import Tensor, nn

from shardstep.configs.errors import InputError
from shardstep.configs.text import count
from shardstep.datasets.augment import scale_and_shift
from shardstep.datasets.framing import Framing
from shardstep.datasets.reader import Reader
from shardstep.trainer.analysis.trained_model import TrainedModel
from shardstep.trainer.checkpoints.checkpoint import weights
from shardstep.trainer.data import mean_and_std
from shardstep.trainer.models import build_model

KEY = "shardstep"  # of the metadata in each file
BATCH = "batch"  # the name of the first dimension, of any size
TOLERANCE = 1e-4  # of the largest output, or of 1 if that is smaller
_COMPARED_BATCHES = (1, 3, 60, 64)  # images of the test set; any batch size must work
_ONNX_NEEDS = ("onnx", "onnxruntime", "onnxscript")

Pixels = Literal["uint8", "float32"]
"""Type of the pixels that an exported model takes; some converters refuse integers."""
Loaded = Callable[[Tensor], Tensor]
"""A model that was loaded from a file: pixels (B, C, H, W) to outputs, on the CPU."""


class ExportFailed(RuntimeError):
    """The model cannot be written in this format, or the written one differs from it."""


class WithNormalize(nn.Module):
    """A module that takes pixels (B, C, H, W), 0 to 255, of any type, around one that takes normalised images."""

    scale: Tensor
    shift: Tensor

    def __init__(self, module: nn.Module, mean: list[float], std: list[float]):
        """`mean`, `std`: per channel on the 0..1 scale."""
        super().__init__()
        self.module = module
        scale, shift = scale_and_shift(mean, std)
        self.register_buffer("scale", scale.float().view(1, -1, 1, 1))
        self.register_buffer("shift", shift.float().view(1, -1, 1, 1))

    def forward(self, pixels: Tensor) -> Tensor:
        return self.module(pixels.float() * self.scale + self.shift)


@dataclass(frozen=True)
class Format:
    """A file format.

    Attributes:
        suffix: the end of its name.
        runtime: the library that it is loaded with.
        write: writes a model that takes pixels of a type.
        load: loads a file without the run.
    """

    suffix: str
    runtime: str
    write: Callable[[TrainedModel, Path, Pixels], None]
    load: Callable[[Path], Loaded]

    @property
    def checked_with(self) -> str:
        """The library with its version."""
        return f"{self.runtime} {metadata.version(self.runtime)}"


@dataclass(frozen=True)
class ExportCheck:
    """The difference of a loaded file from the original: the largest of any output, and the largest allowed."""

    largest: float
    allowed: float
    images: int


_ORIENTATIONS = {
    "follow": "upright, turned as EXIF says before anything else (PIL.ImageOps.exif_transpose)",
    "ignore": "as stored: EXIF's orientation is ignored",
}


def describe(trained: TrainedModel, pixels: Pixels, checked_with: str) -> dict[str, Any]:
    """Describe the use of an exported model that takes pixels of a type, for the file's metadata."""
    height, width, channels = trained.image_shape
    mean, std = mean_and_std(trained.recipe.data, trained.manifest)
    outputs = "logits of the classes: their softmax are probabilities"
    if trained.objective.finds_several:
        outputs = "logits of the classes: the sigmoid of each is its probability"
    if trained.recipe.loss["name"] == "nll":
        outputs = "log-probabilities of the classes"
    return {
        "shardstep": metadata.version("shardstep"),
        "weights": trained.which,
        "model": trained.recipe.model,
        "classes": trained.manifest.classes,
        "input": {
            "name": "pixels",
            "type": pixels,
            "shape": [BATCH, channels, height, width],
            "channels": trained.manifest.image_mode,
            "orientation": _ORIENTATIONS[trained.manifest.orientation],
            **_describe_framing(trained.framing),
        },
        "output": {
            "name": "outputs",
            "meaning": "normalised images" if trained.objective.reconstructs else outputs,
        },
        "normalize": {"mean": mean, "std": std, "formula": "(pixels / 255 - mean) / std"},
        "checked_with": checked_with,  # there is no file that did not pass
    }


def _describe_framing(framing: Framing) -> dict[str, str]:
    """Describe how pictures become what the model takes, and by which transform of torchvision, if there is one."""
    if framing.version == 1:
        return {
            "resize": "the shorter side is scaled until the image covers height and width, then the centre is cut out"
        }
    height, width = framing.cover
    described = {
        "resize": f"{framing.interpolation} with antialiasing, as by Pillow, to just cover {height}x{width} (height x "
        f"width; the other side is rounded down); then the centre of {framing.height}x{framing.width} is cut out"
    }
    if height == width:
        mode = f"v2.InterpolationMode.{framing.interpolation.upper()}"
        crop = f"v2.CenterCrop(({framing.height}, {framing.width}))"
        described["torchvision"] = f"v2.Compose([v2.Resize({height}, {mode}), {crop}])"
    return described


def export(
    trained: TrainedModel, name: str, path: Path, reader: Reader, ids: np.ndarray, pixels: Pixels = "uint8"
) -> ExportCheck:
    """Write a model, load the file again and compare it with the original. The file appears only if they agree.

    Args:
        trained: on the CPU.
        name: of the format, a key of FORMATS.
        reader: of real images.
        ids: of those to compare the outputs on.
        pixels: type of the pixels that the exported model takes, 0 to 255 in both.

    Raises:
        InputError: the libraries for this format are missing, or the images cannot be read.
        ExportFailed: the model cannot be written in this format, or the outputs of the loaded file differ too much.
    """
    missing = [library for library in _ONNX_NEEDS if name == "onnx" and util.find_spec(library) is None]
    if missing:
        raise InputError(f"--format=onnx needs {', '.join(missing)}: pip install 'shardstep[export]'")
    partial = path.with_name(f".{path.stem}.{os.getpid()}.partial{path.suffix}")  # two exports may run side by side
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # exporters warn about their internals
            FORMATS[name].write(trained, partial, pixels)
            found = compare(trained, FORMATS[name].load(partial), reader, ids, pixels)
        if not found.largest <= found.allowed:  # also for NaN
            raise ExportFailed(
                f"{name}: loaded again, the outputs differ by up to {found.largest:.3g} on {count(found.images, 'image')}; "
                f"{found.allowed:.3g} is allowed. No file was written"
            )
        partial.replace(path)
    except (InputError, ExportFailed):
        raise
    except (RuntimeError, ValueError, TypeError) as error:
        reason = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
        raise ExportFailed(f"{trained.recipe.model['name']} cannot be exported to {name}: {reason}") from error
    finally:
        partial.unlink(missing_ok=True)
    return found


@torch.inference_mode()
def compare(
    trained: TrainedModel, loaded: Loaded, reader: Reader, ids: np.ndarray, pixels: Pixels = "uint8"
) -> ExportCheck:
    """Compare a loaded file with the original on the first images of a set, in batches of several sizes."""
    start, compared, largest, scale = 0, 0, 0.0, 1.0
    for size in _COMPARED_BATCHES:
        batch = ids[start : start + size]
        start += len(batch)
        images, _ = reader.read(batch)
        images = images[~np.isin(batch, list(reader.bad))]
        if not len(images):
            continue
        compared += len(images)
        expected = trained.module(trained.normalize(images)).float()
        inputs = images.permute(0, 3, 1, 2).contiguous()  # (B, H, W, C) -> (B, C, H, W)
        outputs = loaded(inputs.to(getattr(torch, pixels)))
        if outputs.shape != expected.shape:
            raise ExportFailed(f"the outputs have shape {tuple(outputs.shape)}, not {tuple(expected.shape)}")
        difference = float((outputs - expected).abs().max())
        largest = max(largest, difference) if difference == difference else difference
        scale = max(scale, float(expected.abs().max()))
    if not compared:
        raise ExportFailed(f"none of the first {start:,} images to compare on can be decoded")
    return ExportCheck(largest, TOLERANCE * scale, compared)


def _described(trained: TrainedModel, name: str, pixels: Pixels) -> str:
    return json.dumps(describe(trained, pixels, FORMATS[name].checked_with))


def _write_safetensors(trained: TrainedModel, path: Path, pixels: Pixels) -> None:
    metadata = {KEY: _described(trained, "safetensors", pixels)}
    path.write_bytes(safetensors.torch.save(weights(trained.module), metadata=metadata))


def _load_safetensors(path: Path) -> Loaded:
    with safe_open(path, framework="pt") as file:
        described = json.loads(file.metadata()[KEY])
    channels, height, width = described["input"]["shape"][1:]
    module = build_model(described["model"], (channels, height, width), len(described["classes"]))
    module.load_state_dict(safetensors.torch.load_file(path))
    return WithNormalize(module, described["normalize"]["mean"], described["normalize"]["std"]).eval()


def _program(trained: TrainedModel, pixels: Pixels) -> torch.export.ExportedProgram:
    height, width, channels = trained.image_shape
    module = WithNormalize(copy.deepcopy(trained.module), *mean_and_std(trained.recipe.data, trained.manifest)).eval()
    example = torch.zeros(2, channels, height, width, dtype=getattr(torch, pixels))
    return torch.export.export(module, (example,), dynamic_shapes={"pixels": {0: torch.export.Dim(BATCH, min=1)}})


def _write_torch_export(trained: TrainedModel, path: Path, pixels: Pixels) -> None:
    described = _described(trained, "torch_export", pixels)
    torch.export.save(_program(trained, pixels), path, extra_files={f"{KEY}.json": described})


def _write_onnx(trained: TrainedModel, path: Path, pixels: Pixels) -> None:
    program = torch.onnx.export(
        _program(trained, pixels),
        dynamo=True,
        input_names=["pixels"],
        output_names=["outputs"],
        dynamic_shapes={"pixels": {0: BATCH}},  # the name for those who fix the size; the exporter's own is like s81
        verbose=False,
    )
    assert program is not None
    program.model.metadata_props[KEY] = _described(trained, "onnx", pixels)
    program.save(path, external_data=False)


def _load_onnx(path: Path) -> Loaded:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda pixels: torch.from_numpy(session.run(["outputs"], {"pixels": pixels.numpy()})[0])


FORMATS = {
    "safetensors": Format(".safetensors", "torch", _write_safetensors, _load_safetensors),
    "torch_export": Format(".pt2", "torch", _write_torch_export, lambda path: torch.export.load(path).module()),
    "onnx": Format(".onnx", "onnxruntime", _write_onnx, _load_onnx),
}
