"""Train a model from a recipe.

shardstep train [RECIPE] [section.key=value ...] [--nproc N] [--show-config]
torchrun --nproc-per-node 2 launch/train.py [RECIPE] [section.key=value ...]
mpirun -n 2 shardstep train [RECIPE] [section.key=value ...]
accelerate launch --multi_gpu --num_processes 2 launch/train.py [RECIPE] [section.key=value ...]
"""

if __name__ == "__main__":
    from shardstep.launch.entry import end_at_interrupt

    end_at_interrupt()

import argparse
import sys

from shardstep.configs.errors import InputError
from shardstep.configs.load import LoadedRecipe, is_override, load_recipe, recipe_names
from shardstep.launch.cli import FAILED, run_script
from shardstep.launch.entry import STOPPED, ending_at_signals, raise_if_interrupted
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.launchers import adopt_launch
from shardstep.trainer.stopping.stop_requests import STOP_FILE, StopSignal


def main(arguments: list[str]) -> int:
    """Train; returns the exit code."""
    adopt_launch()  # here too, for functions that submitit or Ray call
    parser = argparse.ArgumentParser(
        prog="shardstep train",
        description="Train a model from a recipe.",
        epilog=f"Recipes: {', '.join(recipe_names())}. See also `shardstep recipes`, and `shardstep keys` for all keys.",
    )
    add = parser.add_argument
    add("recipe", nargs="?", default="quickstart", help="a YAML file, or the name of a recipe (default: quickstart)")
    add("overrides", nargs="*", metavar="section.key=value", help="such as train.duration='2 epochs'")
    add("--nproc", type=int, help="ranks to start on this machine, without torchrun (default: 1)")
    add("--show-config", action="store_true", help="print the resolved recipe and batch arithmetic, start nothing")
    args = parser.parse_intermixed_args(arguments)
    if is_override(args.recipe):
        args.overrides.insert(0, args.recipe)
        args.recipe = "quickstart"

    loaded = load_recipe(args.recipe, args.overrides)
    if args.nproc is not None and args.nproc < 1:
        raise InputError(f"--nproc={args.nproc} is not a number of ranks: give 1 or more")
    if args.show_config:
        from shardstep.launch.show_config import show_config

        if launch_env.is_first_rank():
            show_config(loaded, args.nproc or launch_env.world_size() or loaded.recipe.train.world_size or 1)
        return 0
    if args.nproc not in (None, 1):
        from shardstep.launch.ranks import start_ranks

        if launch_env.is_launched():
            raise InputError(
                "--nproc starts ranks itself: do not use it under torchrun, accelerate launch, mpirun or srun"
            )
        return start_ranks(args.nproc, [sys.executable, __file__, args.recipe, *args.overrides])
    return _train(loaded, arguments)


def _train(loaded: LoadedRecipe, arguments: list[str]) -> int:
    """Train on this rank; returns the exit code."""
    launch_env.check_own_launch(loaded.recipe.train.world_size)  # before anything is written
    request = StopSignal()
    request.install()  # before torch is imported, so that no signal is lost

    # Imported here, so that a typo in the recipe or its keys is reported at once.
    from shardstep.configs.resolve import with_keys
    from shardstep.trainer import data, resume, setup
    from shardstep.trainer.description import INDENT, describe, warnings_about
    from shardstep.trainer.distributed.world import start_world
    from shardstep.trainer.finish import train_to_end
    from shardstep.trainer.monitoring.display import Display
    from shardstep.trainer.monitoring.display_events import EventDisplay
    from shardstep.trainer.validate_recipe import validate_recipe

    raise_if_interrupted()
    kind = EventDisplay if launch_env.is_called() else Display
    display = kind(enabled=launch_env.is_first_rank(), drops_output=True)
    recipe = validate_recipe(loaded)
    for note in loaded.notes:
        display.note(note)
    if recipe.run.resume == "never" and launch_env.is_restarted():
        recipe = with_keys(recipe, run={"resume": "if_available"})
        display.note(
            "run.resume=never holds for the first attempt only; this one was restarted and resumes where that one ended"
        )
    recipe = resume.with_earlier_choices(recipe)
    data.check_given_folders(loaded)
    data.make_missing_data(recipe.data)
    with ending_at_signals(request):
        world = start_world(recipe.train)
    run = setup.build(world, recipe, display, request)
    for text in describe(run):
        display.note(text, indent=INDENT)
    for text in warnings_about(run):
        display.warn(text)
    if not request.is_listening:
        display.warn(
            f"called outside the main thread, where Python handles no signals: only the file {run.dir.path / STOP_FILE} "
            f"stops this run"
        )
    request.note_interrupts()
    raise_if_interrupted()
    ending = train_to_end(run, arguments)
    if ending == "stopped":
        return 0 if launch_env.has_agent() else STOPPED  # an agent turns any other code into a failure
    return 0 if ending == "finished" else FAILED


if __name__ == "__main__":
    run_script(main)
