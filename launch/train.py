"""Train a model from a recipe.

shardstep train [RECIPE] [section.key=value ...] [--nproc N]
torchrun --nproc-per-node 2 launch/train.py [RECIPE] [section.key=value ...]
accelerate launch --multi_gpu --num_processes 2 launch/train.py [RECIPE] [section.key=value ...]
"""

import argparse
import sys
from typing import Any

from shardstep.configs.errors import InputError, TrainingFailed
from shardstep.configs.load import is_override, load_recipe, recipe_names
from shardstep.launch.cli import leave
from shardstep.launch.cli import run as run_command
from shardstep.trainer.preempt import StopRequest


def main(arguments: list[str]) -> int:
    """Train; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep train",
        description="Train a model from a recipe.",
        epilog=f"recipes: {', '.join(recipe_names())}. The keys are documented in configs/schema.py.",
    )
    parser.add_argument(
        "recipe", nargs="?", default="quickstart", help="a YAML file, or the name of a recipe (default: quickstart)"
    )
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="such as train.duration='2 epochs'")
    parser.add_argument("--nproc", type=int, default=1, help="ranks to start here, without torchrun (default: 1)")
    given = parser.parse_intermixed_args(arguments)
    if is_override(given.recipe):
        given.overrides.insert(0, given.recipe)
        given.recipe = "quickstart"

    loaded = load_recipe(given.recipe, given.overrides)
    if given.nproc != 1:
        return _start_ranks(given.nproc, [given.recipe, *given.overrides])
    request = StopRequest()
    request.install()  # a signal that comes while torch is imported is not lost

    # torch and all that needs it come after the first checks: a typo is answered at once
    from shardstep.trainer import data, folder, launcher, loop, runtime, setup
    from shardstep.trainer.check import check_recipe
    from shardstep.trainer.description import INDENT, describe
    from shardstep.trainer.display import Display
    from shardstep.trainer.starts import write_start

    under_agent = launcher.has_agent()
    display = Display(enabled=launcher.is_first_rank(), goes_on=True)
    recipe = check_recipe(loaded)
    for note in loaded.notes:
        display.note(note)
    if recipe.run.resume == "never" and launcher.is_restarted():
        recipe.run.resume = "if_available"
        display.note(
            "run.resume=never holds for the first attempt; this one was restarted, and goes on where that ended"
        )
    folder.settle_from(recipe)
    data.make_missing_data(recipe.data)
    world = runtime.start(recipe.train)
    run = setup.build(world, recipe, display, request)
    ignored = launcher.ignored_precision()
    if ignored and ignored != recipe.train.precision:
        display.warn(
            f"accelerate launch was given the precision {ignored}, which has no effect: train.precision decides, and is "
            f"{recipe.train.precision}"
        )
    for text in describe(run):
        display.note(text, indent=INDENT)
    passed_over = data.passed_over_source(run.recipe.data, run.data) if world.is_main_process else None
    if passed_over:
        display.warn(passed_over)

    before, earlier = run.state.progress, folder.read_summary(run.folder)
    was_finished = earlier.get("status") == "finished" and earlier.get("step") == before.step
    is_over = run.plan.is_over(before) or run.plan.is_out_of_time(run.state.train_s)
    if world.is_main_process and not (was_finished and is_over):
        write_start(run, arguments)
    request.note_interrupts()
    display.start(run.plan.total_steps, before.step, run.plan.share_done(before, run.state.train_s))
    try:
        run.requests.check()
        outcome = loop.train(run)
        run.profiler.end()
        display.stop()
        is_safe = run.saver.wait(lambda: run.watchdog.beat(run.state.progress.step, "saving"))  # rank 0 writes
        run.timer.mark("checkpoint")
        if outcome.stopped:
            return _stop(run, is_safe, under_agent)
        evaluation = outcome.evaluation
        if runtime.broadcast_object(world, was_finished) and (
            evaluation is None or run.state.progress.step == before.step
        ):
            display.note(
                f"nothing to do: {run.folder} holds a finished run of {run.state.progress.step} steps. For another one "
                f"give run.dir or run.name, or run.resume=never to put this one aside"
            )
        else:
            evaluation = evaluation or run.evaluate()  # it ended between its last checkpoint and its summary
            if evaluation is None:
                return _stop(run, is_safe, under_agent)
            run.watchdog.stop()
            if world.is_main_process:
                _finish(run, evaluation)
                if not is_safe:
                    display.warn(
                        "the last checkpoint could not be saved: the same command would take the steps since the one "
                        "before it again"
                    )
            runtime.broadcast_object(world, None)  # all leave together: srun ends the last a while after the first
    except BaseException as error:
        display.stop()
        _fail(run, error)
        raise
    finally:
        run.watchdog.stop()
    runtime.stop(run.accelerator)
    return 0


def _start_ranks(count: int, arguments: list[str]) -> int:
    """This same command on several ranks."""
    from shardstep.launch.ranks import start_ranks
    from shardstep.trainer import launcher

    if count < 1:
        raise InputError(f"--nproc={count} is no number of ranks: give 1 or more")
    if launcher.is_launched():
        raise InputError("--nproc starts ranks itself: leave it out under torchrun, accelerate launch or srun")
    return start_ranks(count, [sys.executable, __file__, *arguments])


def _stop(run: "setup.Run", is_safe: bool, under_agent: bool) -> int:  # type: ignore[name-defined] # noqa: F821
    """End a run that was asked to: the state is saved, then the summary says so, then wandb hears of it."""
    from shardstep.launch.cli import FAILED, STOPPED
    from shardstep.trainer import runtime
    from shardstep.trainer.checkpoint_files import newest_whole

    step, reason = run.state.progress.step, run.requests.reason
    if run.accelerator.is_main_process:
        run.metrics.close()
        run.requests.obeyed()
        written = _summarise(run, "preempted" if is_safe else "failed")
        if is_safe:
            _tell_job_script(run)
        if not step:
            run.display.note(f"stopped by {reason}, before the first step")
        elif is_safe:
            run.display.note(f"stopped by {reason}: step {step} is saved, the same command goes on from it")
        else:
            saved, _ = newest_whole(run.folder / "checkpoints")
            rest = f"the same command goes on from {saved.name}" if saved else "there is no checkpoint to go on from"
            run.display.note(f"stopped by {reason}, but step {step} could not be saved: {rest}")
        outlook = run.time_limit.outlook()
        if outlook:
            run.display.note(outlook)
        run.watchdog.stop()
        _close_trackers(run, written, failed=not is_safe)
    # No rank leaves before the state is safe: its exit would end the others under srun.
    is_safe = runtime.broadcast_object(run.accelerator.state, is_safe)
    runtime.stop(run.accelerator)
    if not is_safe:
        return FAILED
    return 0 if under_agent else STOPPED


def _tell_job_script(run: "setup.Run") -> None:  # type: ignore[name-defined] # noqa: F821
    """Tell the job script, which may start the job again, how many steps this process took, and who asked it to stop."""
    from shardstep.configs.files import write_whole
    from shardstep.trainer import launcher

    path = launcher.stopped_file()
    if path is None:
        return
    steps = run.state.progress.step - run.state.starts[-1]["step"]
    try:
        write_whole(path, f"{steps} {'person' if run.requests.by_person else 'signal'}\n".encode())
    except OSError as error:
        run.display.warn(f"{path} could not be written, the job will not be started again: {error}")


def _finish(run: "setup.Run", evaluation: "Evaluation") -> None:  # type: ignore[name-defined] # noqa: F821
    """Write what a finished run leaves behind, and say how it went."""
    from shardstep.trainer import report
    from shardstep.trainer.average import averaged
    from shardstep.trainer.checkpoint import write_weights
    from shardstep.trainer.summary import write_summary
    from shardstep.trainer.timing import time_table

    folder, classes = run.folder, run.data.train.manifest.classes
    run.metrics.close()
    (folder / "summary.json").unlink(missing_ok=True)  # an older one would be beside weights that it does not know
    with averaged(run.state):
        write_weights(run.state.module, folder / "model.safetensors")
        try:
            pictures = report.draw_all(run, evaluation)
        except OSError as error:  # the weights are safe: a full disk must not fail the run for a picture
            run.display.warn(f"not all pictures could be drawn: {error}")
            pictures = []
    written = write_summary(run, "finished", evaluation)  # last: it says that all the rest is there
    _close_trackers(run, written)

    for text in time_table(written["time_s"]):
        run.display.note(text)
    shares = "" if evaluation.accuracy is None else f"accuracy {evaluation.accuracy:.2%}, top-5 {evaluation.top5:.2%}, "
    run.display.note(
        f"done: test {shares}loss {evaluation.loss:.4f} on {evaluation.samples:,} images after {run.state.wall_s:.0f} s"
    )
    per_class = zip(evaluation.per_class_accuracy or [], classes, strict=False)
    known = [(accuracy, name) for accuracy, name in per_class if accuracy is not None]
    if known and min(known)[0] < max(known)[0]:
        run.display.note(f"best class: {max(known)[1]} {max(known)[0]:.1%}, worst: {min(known)[1]} {min(known)[0]:.1%}")
    run.display.note(f"{', '.join([*pictures, 'model.safetensors'])} are in {folder}")


def _fail(run: "setup.Run", error: BaseException) -> None:  # type: ignore[name-defined] # noqa: F821
    """Write down that the run failed. No collective here: the other ranks may never come."""
    if isinstance(error, InputError):  # found by the rank that read the sample, and by no other
        error.everywhere = False
    run.metrics.close()
    if run.accelerator.is_main_process:
        told = isinstance(error, (InputError, TrainingFailed))
        written = _summarise(run, "failed", str(error) if told else f"{type(error).__name__}: {error}")
        run.watchdog.stop()
        _close_trackers(run, written, failed=True)


def _close_trackers(run: "setup.Run", written: dict[str, Any], failed: bool = False) -> None:  # type: ignore[name-defined] # noqa: F821
    for note in run.trackers.finish(written, failed):
        run.display.note(note)


def _summarise(run: "setup.Run", status: str, reason: str = "") -> dict[str, Any]:  # type: ignore[name-defined] # noqa: F821
    """Write the summary of a run that has not come to its end; that it cannot be written is not what the person must know."""
    from shardstep.trainer.summary import write_summary

    try:
        return write_summary(run, status, None, reason)
    except OSError as error:
        run.display.warn(f"summary.json could not be written: {error}")
        return {"status": status}


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
