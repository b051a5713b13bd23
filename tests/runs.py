"""Train a recipe inside a test, and read what it wrote."""

import json
from pathlib import Path
from typing import Any

from tests.distributed import run_ranks


def write_recipe(folder: Path, shards: Path, **sections: dict[str, Any]) -> Path:
    """A small recipe on a test's shards: an mlp with SGD unless `sections` say otherwise."""
    import yaml

    recipe: dict[str, Any] = {
        "run": {"dir": str(folder / "run")},
        "data": {"train": str(shards / "train"), "test": str(shards / "test")},
        "model": {"name": "mlp", "hidden": [16]},
        "optimizer": {"name": "sgd", "lr": 0.05},
        "train": {
            "global_batch_size": 30,
            "duration": "2 epochs",
            "device": "cpu",
            "precision": "fp32",
            "memory_format": "contiguous",
        },
        "log": {"every": "1 steps"},
    }
    for section, content in sections.items():
        replaced = section in ("model", "optimizer", "loss", "schedule")
        recipe[section] = content if replaced else recipe.get(section, {}) | content
    path = folder / "recipe.yaml"
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(recipe))
    return path


def train_ranks(world_size: int, recipe: Path, *overrides: str, pictures: bool = False) -> None:
    """Train on N gloo processes, as the command does."""
    run_ranks(world_size, _train, [str(recipe), *overrides], pictures=pictures)


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects of a .jsonl file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def train_lines(folder: Path) -> list[dict[str, Any]]:
    """The train lines of a run's metrics.jsonl."""
    return [line for line in read_lines(folder / "metrics.jsonl") if line["kind"] == "train"]


def spoil_weights(run: Path, name: str) -> None:
    """Make a tensor of a finished run's weights NaN, as if training had."""
    from safetensors.torch import load_file, save_file

    from shardstep.configs.files import file_sha256

    path, summary = run / "model.safetensors", json.loads((run / "summary.json").read_text())
    weights = load_file(path)
    save_file(weights | {name: weights[name] * float("nan")}, path)
    (run / "summary.json").write_text(json.dumps(summary | {"weights_sha256": file_sha256(path)}))


def _train(arguments: list[str]) -> None:
    from shardstep.launch.train import main

    assert main(arguments) == 0


def failure_of(recipe: str, *overrides: str) -> tuple[int, str, str]:
    """Runs in a rank: exit code, stdout and stderr of the command."""
    import contextlib
    import io

    from shardstep.launch.cli import run
    from shardstep.launch.train import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = run(main, [recipe, *overrides])
    return code, out.getvalue(), err.getvalue()


def train_until(recipe: str, last_step: int, *overrides: str) -> None:
    """Runs in a rank: trains and breaks off after a step, as a killed run does."""
    from shardstep.launch.train import main
    from shardstep.trainer import loop

    class Killed(Exception):
        pass

    step_function = loop.train_step

    def step(run, batch):  # type: ignore[no-untyped-def]
        if run.state.progress.step == last_step:
            raise Killed
        return step_function(run, batch)

    loop.train_step = step
    try:
        main([recipe, *overrides])
    except Killed:
        return
    finally:
        loop.train_step = step_function
    raise AssertionError(f"{recipe} was over before step {last_step}")
