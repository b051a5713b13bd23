"""The folders of checkpoints: their names and files, checks that they are intact, and which of them to keep.

A checkpoint is a folder checkpoints/step-NNNNNNNN with the files below and a manifest with the size and sha256 of each.
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
WEIGHTS, AVERAGE, OPTIMIZER = "model.safetensors", "average.safetensors", "optimizer.pt"
STATE, RECIPE, BUFFERS = "state.json", "recipe.yaml", "rank_buffers.safetensors"
MANIFEST = "manifest.json"


def step_name(step: int) -> str:
    """Return the name of a step's checkpoint."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int:
    """Return the step of a checkpoint, from its name."""
    return int(path.name.removeprefix("step-"))


def list_checkpoints(folder: Path) -> list[Path]:
    """Return the checkpoints below a folder, intact or damaged, oldest first."""
    found = [path for path in folder.glob("step-*") if path.is_dir() and path.name.removeprefix("step-").isdigit()]
    return sorted(found, key=step_of)


def write_manifest(path: Path, step: int, world_size: int, files: dict[str, dict[str, Any]]) -> None:
    """Write the manifest, the last file of a checkpoint; `files` has the `bytes` and `sha256` of the others."""
    manifest = {"format": FORMAT, "step": step, "world_size": world_size, "files": files}
    (path / MANIFEST).write_text(json.dumps(manifest | {"sha256": _digest(manifest)}, indent=1) + "\n")


def read_manifest(path: Path) -> dict[str, Any]:
    """Read the manifest of a checkpoint.

    Raises:
        ValueError: it is missing, damaged, or from another step or format.
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
        raise ValueError(f"{MANIFEST} is damaged: its sha256 does not match")
    if manifest["format"] != FORMAT:
        raise ValueError(f"it has format {manifest['format']}, but this version of shardstep reads format {FORMAT}")
    if step_name(manifest["step"]) != path.name:
        raise ValueError(f"{MANIFEST} belongs to step {manifest['step']}")
    return manifest | {"files": files}


def problems_of(path: Path, only: Collection[str] | None = None) -> list[str]:
    """Read every byte of a checkpoint, or of some of its files, and return the problems; empty if it is intact."""
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
                problems.append(f"{name} has {found:,} bytes instead of {size:,}")
                continue
            if file_sha256(path / name) != digest:
                problems.append(f"{name} is damaged: its sha256 does not match")
        except FileNotFoundError:
            problems.append(f"{name} is missing")
        except OSError as error:
            problems.append(f"{name} cannot be read: {error.strerror}")
    return problems


def newest_intact(folder: Path) -> tuple[Path | None, list[str]]:
    """Return the newest intact checkpoint, and the problems of newer, damaged ones."""
    damaged: list[str] = []
    for path in reversed(list_checkpoints(folder)):
        problems = problems_of(path)
        if not problems:
            return path, damaged
        damaged.append(f"{path}: {'; '.join(problems)}")
    return None, damaged


def set_aside(folder: Path, step: int) -> None:
    """Rename the damaged checkpoints after `step`, from which a run now resumes."""
    for path in list_checkpoints(folder):
        if step_of(path) > step:
            path.replace(path.with_name(f".{path.name}.damaged"))


def prune(folder: Path, keep: int, best_step: int | None) -> None:
    """Delete all checkpoints except the newest `keep` and the best."""
    for path in list_checkpoints(folder)[:-keep]:
        if step_of(path) != best_step:
            # Rename it first: a half-deleted folder must not look like a checkpoint.
            doomed = path.replace(path.with_name(f".{path.name}.deleted"))
            shutil.rmtree(doomed)


def sweep(folder: Path) -> None:
    """Remove what a killed run left half-written or half-deleted."""
    for path in [*folder.glob(".step-*.partial"), *folder.glob(".step-*.deleted"), *folder.glob(".step-*.damaged")]:
        shutil.rmtree(path, ignore_errors=True)


def _digest(manifest: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()
