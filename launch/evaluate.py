"""Evaluate the weights of a run, or of one of its checkpoints, on a test set.

    shardstep evaluate RUN_DIR_OR_CHECKPOINT [--data DIR]
    torchrun --nproc-per-node 2 launch/evaluate.py RUN_DIR_OR_CHECKPOINT [--data DIR]

Of a run that has not finished it takes the newest whole checkpoint, and says so. The last line of stdout is one JSON object:
loss, accuracy, top5, samples, world_size; a loss that is no number is null.
"""

import argparse
import json
import math
import sys
from pathlib import Path

from shardstep.configs.load import load_recipe
from shardstep.launch.cli import leave
from shardstep.launch.cli import run as run_command


def main(arguments: list[str]) -> int:
    """Evaluate; returns the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep evaluate", description="Evaluate a run's weights on a test set.")
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--data", help="test shards; by default those of the run")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    given = parser.parse_args(arguments)

    from shardstep.datasets.manifest import parse_manifest
    from shardstep.trainer import data, launcher, runtime, setup
    from shardstep.trainer.check import check_recipe
    from shardstep.trainer.checkpoint import load_weights
    from shardstep.trainer.evaluate import evaluate
    from shardstep.trainer.folder import CONFIG_NAME, MANIFEST_NAME
    from shardstep.trainer.losses import build_objective
    from shardstep.trainer.models import build_model
    from shardstep.trainer.precision import MEMORY_FORMATS
    from shardstep.trainer.trained import find_device, find_weights, unfinished_note

    weights, folder = find_weights(given.run)
    note = unfinished_note(given.run, weights)
    if note and launcher.is_first_rank():
        print(note)
    recipe = check_recipe(load_recipe(str(folder / CONFIG_NAME)))
    find_device(given.device)
    recipe.train.device, recipe.train.world_size = given.device, None
    recipe.data.test = given.data or recipe.data.test
    train = parse_manifest((folder / MANIFEST_NAME).read_text(), str(folder / MANIFEST_NAME))
    world = runtime.start(recipe.train)
    test, reader, normalize = setup.together(world, lambda: data.load_for_evaluation(recipe.data, train, world.device))
    height, width, channels = reader.image_shape
    module = setup.together(world, lambda: build_model(recipe.model, (channels, height, width), len(train.classes)))
    setup.together(world, lambda: load_weights(module, weights))
    memory_format = MEMORY_FORMATS[recipe.train.memory_format]
    accelerator = runtime.build_accelerator(recipe.train.precision)
    model = runtime.wrap_for_evaluation(accelerator, module.to(memory_format=memory_format))
    batches = setup.make_test_batches(
        recipe, accelerator, reader, test.manifest.samples, normalize, recipe.data.workers
    )
    objective = build_objective(recipe.loss, recipe.model)
    result = evaluate(accelerator, model, batches, objective, test.manifest.samples, len(train.classes), recipe.eval)
    assert result is not None  # nothing asks it to stop
    if accelerator.is_main_process:
        print(
            json.dumps(
                {
                    "loss": result.loss if math.isfinite(result.loss) else None,
                    "accuracy": result.accuracy,
                    "top5": result.top5,
                    "samples": result.samples,
                    "world_size": accelerator.num_processes,
                }
            )
        )
    runtime.stop(accelerator)
    return 0


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
