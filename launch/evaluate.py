"""Evaluate the weights of a run, or of one of its checkpoints, on a test set.

    shardstep evaluate RUN_DIR_OR_CHECKPOINT [--data DIR]
    torchrun --nproc-per-node 2 launch/evaluate.py RUN_DIR_OR_CHECKPOINT [--data DIR]

For a run that has not finished it uses the newest intact checkpoint, and says so. The classes of another test set are matched
by name with those of the run: a line says how they differ, and images of classes that the run lacks are refused. The last
line of stdout is one JSON object: loss, accuracy, top5, samples, world_size; a loss that is NaN or infinite is null. Where
images have several labels, accuracy and top5 are null, and there are map (mean average precision), f1 (the mean over the
classes) and f1_micro.
"""

if __name__ == "__main__":
    from shardstep.launch.entry import end_at_interrupt

    end_at_interrupt()

import argparse
import json
import math
from pathlib import Path
from typing import Any

from shardstep.configs.text import printable
from shardstep.launch.cli import run_script
from shardstep.launch.trust import add_trust_option, trust_if_asked


def main(arguments: list[str]) -> int:
    """Evaluate; return the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep evaluate", description="Evaluate a run's weights on a test set.")
    parser.add_argument("run", type=Path, help="a run's folder, or one of its checkpoints")
    parser.add_argument("--data", help="test shards (default: those of the run)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add_trust_option(parser)
    args = parser.parse_args(arguments)

    from shardstep.configs.resolve import with_keys
    from shardstep.trainer import data
    from shardstep.trainer.analysis import trained_model
    from shardstep.trainer.distributed import launch_env
    from shardstep.trainer.distributed.bad_images import first_left_out
    from shardstep.trainer.distributed.collectives import raise_on_all_ranks
    from shardstep.trainer.distributed.ddp import wrap_for_evaluation
    from shardstep.trainer.distributed.world import build_accelerator, leave_world, start_world
    from shardstep.trainer.evaluation import evaluate
    from shardstep.trainer.formats.candidates import MEMORY_FORMATS
    from shardstep.trainer.monitoring.status import samples_text

    trust_if_asked(args)
    weights, run_dir = trained_model.find_weights(args.run)
    note = trained_model.unfinished_note(args.run, weights)
    if note and launch_env.is_first_rank():
        print(printable(note))
    device = trained_model.find_device(args.device).type
    recipe = with_keys(trained_model.read_recipe(run_dir), train={"device": device, "world_size": None})
    world = start_world(recipe.train)
    with raise_on_all_ranks(world):
        trained = trained_model.open_trained_model(args.run, world.device, (weights, run_dir))
        notes: list[str | None] = [trained.crop_note]
        test, reader = trained.open_test_set(args.data, notes.append)
    for note in (*notes, data.other_mode_note(trained.manifest, "test", test.manifest)):
        if note and world.is_main_process:
            print(printable(note))
    recipe = trained.recipe
    accelerator = build_accelerator(recipe.train.precision)
    module = trained.module.to(memory_format=MEMORY_FORMATS[recipe.train.memory_format])
    model = wrap_for_evaluation(accelerator, module)
    num_classes = len(trained.manifest.classes)
    batches = data.make_test_batches(recipe, accelerator, reader, test, trained.normalize)
    result = evaluate(
        accelerator,
        model,
        batches,
        trained.objective,
        test.samples,
        num_classes,
        recipe.eval,
        on_bad_image=recipe.data.on_bad_image,
    )
    assert result is not None  # no stop can be requested
    first_bad = first_left_out(accelerator, reader, test) if result.bad_images else []
    if accelerator.is_main_process:
        found: dict[str, Any] = result.scores | {"loss": result.loss if math.isfinite(result.loss) else None}
        if result.bad_images:
            left_out = f"{result.bad_images:,} of {test.samples:,} images cannot be decoded, and are left out"
            print(f"{left_out}: {samples_text(first_bad)}")
            found |= {"bad_images": result.bad_images, "first_bad_images": first_bad}
        found |= {"samples": result.samples, "world_size": accelerator.num_processes}
        print(json.dumps(found))
    leave_world(accelerator)
    return 0


if __name__ == "__main__":
    run_script(main)
