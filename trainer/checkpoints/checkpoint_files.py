"""The folders of checkpoints: their names, what is in them, whether they are whole, and which are kept.

A checkpoint is a folder checkpoints/step-NNNNNNNN with the files below and a manifest that holds the size and sha256 of each.
Nothing here needs torch.
"""

import hashlib
import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

from shardstep.configs.files import file_sha256

FORMAT = 2
WEIGHTS, AVERAGE, OPTIMIZER, STATE, RECIPE, BUFFERS = (
    "model.safetensors",
    "average.safetensors",
    "optimizer.pt",
    "state.json",
    "recipe.yaml",
    "rank_buffers.safetensors",
)
MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    """The name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """The step of a checkpoint, by its name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints below a folder, whole or not, oldest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def write_manifest(path: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest of a checkpoint, the last of its files; `files` has `bytes` and `sha256` of each other one."""
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or of another step or a later format.
    """
    try:
        manifest = json.loads((path / MANIFEST).read_bytes())
        claimed = manifest.pop("sha256")
        files = {name: (int(entry["bytes"]), str(entry["sha256"])) for name, entry in manifest["files"].items()}
    except FileNotFoundError:
        raise ValueError(f"{MANIFEST} is missing") from None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{MANIFEST} cannot be read: {str(error) or type(error).__name__}") from None
    if claimed != _digest(manifest):
        raise ValueError(f"{MANIFEST} is damaged: its own sha256 is another")
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']}, this version of shardstep reads format {FORMAT}")
    if step_name(manifest["step"]) != path.name:
        raise ValueError(f"{MANIFEST} is that of step {manifest['step']}")
    return manifest | {"files": files}


def problems_of(path: Path, only: Collection[str] | None = None) -> list[str]:
    """What is wrong with a checkpoint, or with some of its files: every byte is read. Empty if it is whole."""
    try:
        manifest = read_manifest(path)
    except ValueError as error:
        return [str(error)]
    problems = []
    for name, (size, digest) in manifest["files"].items():
        if only is not None and name not in only:
            continue
        try:
            found = (path / name).stat().st_size
            if found != size:
                problems.append(f"{name} has {found:,} bytes in place of {size:,}")
                continue
            if file_sha256(path / name) != digest:
                problems.append(f"{name} is damaged: its sha256 is another")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def newest_whole(folder: Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint that is whole, and what is wrong with the newer ones."""
    passed_over: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problems = problems_of(path)
        if not problems:
            return path, passed_over
        passed_over.append(f"{path}: {'; '.join(problems)}")
    return None, passed_over


def set_aside(folder: Path, step: int) -> None:
    """Take the name of a checkpoint from the damaged ones after `step`, from which a run now goes on."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            path.replace(path.with_name(f".{path.name}.damaged"))


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints but the newest `keep` and the best."""
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) != best_step:
            # Under another name first: a folder that is deleted halfway must not look like a checkpoint.
            doomed = path.replace(path.with_name(f".{path.name}.deleted"))
            shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half written or half deleted."""
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.deleted"), *folder.glob(".step-*.damaged")]:
        shutil.rmtree(path, ignore_errors=True)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
