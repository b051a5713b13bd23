"""Evaluate the weights of a run, or of one of its checkpoints, on a test set.

    shardstep evaluate RUN_DIR_OR_CHECKPOINT [--data DIR]
    torchrun --nproc-per-node 2 launch/evaluate.py RUN_DIR_OR_CHECKPOINT [--data DIR]

The last line of stdout is one JSON object: loss, accuracy, top5, samples, world_size.
"""

import argparse
import json
import sys
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.configs.load import load_recipe
from shardstep.launch.cli import run as run_command


def main(arguments: list[str]) -> int:
    """Evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep evaluate", description="Evaluate a run's weights on a test set.")
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--data", help="test shards; by default those of the run")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    given = parser.parse_args(arguments)
    weights, config = find_weights(given.run)

    from shardstep.trainer import data, runtime, setup
    from shardstep.trainer.check import check_recipe
    from shardstep.trainer.checkpoint import load_weights
    from shardstep.trainer.evaluate import evaluate
    from shardstep.trainer.losses import evaluation_loss

    recipe = check_recipe(load_recipe(str(config)))
    recipe.train.device, recipe.train.world_size = given.device, None
    recipe.data.test = given.data or recipe.data.test
    world = runtime.start(recipe.train)
    loaded = setup.together(world, lambda: data.load_for_evaluation(recipe, world.device))
    module = setup.together(world, lambda: setup.initial_model(recipe, loaded, world.device))
    setup.together(world, lambda: load_weights(module, weights))
    accelerator, state = setup.prepare(recipe, module)
    result = evaluate(
        accelerator,
        state.module,
        setup.make_test_batches(recipe, accelerator, loaded),
        evaluation_loss(recipe.loss),
        loaded.test.manifest.samples,
        loaded.num_classes,
    )
    if accelerator.is_main_process:
        print(
            json.dumps(
                {
                    "loss": result.loss,
                    "accuracy": result.accuracy,
                    "top5": result.top5,
                    "samples": result.samples,
                    "world_size": accelerator.num_processes,
                }
            )
        )
    runtime.stop(accelerator)
    return 0


def find_weights(path: Path) -> tuple[Path, Path]:
    """The weights and the recipe of a run's folder or of one of its checkpoints.

    Raises:
        InputError: there are none.
    """
    weights = path / "model.safetensors"
    config = next(
        (folder / "config.yaml" for folder in (path, path.parent.parent) if (folder / "config.yaml").is_file()), None
    )
    if config is None:
        raise InputError(f"{path} is neither a run's folder nor a checkpoint of one: no config.yaml")
    if not weights.is_file():
        raise InputError(
            f"{path} has no model.safetensors yet: the run has not finished. Its checkpoints are in "
            f"{config.parent / 'checkpoints'}"
        )
    return weights, config


if __name__ == "__main__":
    sys.exit(run_command(main, sys.argv[1:]))
