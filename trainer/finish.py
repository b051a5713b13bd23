"""Train to the end: finished, stopped on request, or failed; write the run's last files, and print on rank 0 how it ended."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from shardstep.configs.components import first_line
from shardstep.configs.errors import InputError, NonFiniteError, TrainingFailed, is_out_of_memory
from shardstep.configs.files import write_atomically
from shardstep.configs.text import count, listed
from shardstep.trainer import loop
from shardstep.trainer.checkpoints.checkpoint import write_weights
from shardstep.trainer.checkpoints.checkpoint_files import newest_intact
from shardstep.trainer.distributed import launch_env
from shardstep.trainer.distributed.collectives import broadcast_object, is_lost_rank
from shardstep.trainer.distributed.world import leave_world
from shardstep.trainer.evaluation import MOST_CLASSES_IN_CONFUSION, Evaluation
from shardstep.trainer.monitoring import pictures
from shardstep.trainer.monitoring.status import bad_images_texts
from shardstep.trainer.monitoring.timing import time_table
from shardstep.trainer.optim.average import averaged
from shardstep.trainer.optim.label_scores import HOLDS
from shardstep.trainer.optim.losses import one_label
from shardstep.trainer.run import Run
from shardstep.trainer.run_dir import Failure, Status
from shardstep.trainer.starts import write_start
from shardstep.trainer.summary import write_summary

Ending = Literal["finished", "stopped", "unsaved"]
"""How a run ended: by its duration; on request, with its state saved; on request, without a saved state."""


def train_to_end(run: Run, arguments: list[str]) -> Ending:
    """Train, and write what belongs to the way the run ends. All ranks.

    Raises:
        TrainingFailed: see loop.train. The run's summary then has this or any other error.
    """
    world, before, earlier = run.accelerator.state, run.state.progress, run.dir.summary
    if world.is_main_process:
        run.watchdog.on_hang = partial(_write_summary, run, "failed", "hang")
    was_finished = earlier.get("status") == "finished" and earlier.get("step") == before.step  # rank 0's answer counts
    if world.is_main_process and not (was_finished and run.is_over):
        write_start(run, arguments)
    run.display.start(run.plan.total_steps, before.step, run.plan.share_done(before, run.state.train_s))
    try:
        run.requests.check()
        result = loop.train(run)
        run.profiler.end()
        run.display.stop()
        is_safe = run.saver.wait(lambda: run.watchdog.beat(run.state.progress.step, "saving"))  # rank 0 writes
        run.timer.mark("checkpoint")
        if result.stopped:
            return _stop(run, is_safe)
        has_trained = result.evaluation is not None and run.state.progress.step != before.step
        if broadcast_object(world, was_finished and not has_trained):
            run.display.note(
                f"nothing to do: {run.dir.path} holds a finished run of {run.state.progress.step} steps. To start another "
                f"one, give run.dir or run.name, or run.resume=never to set this one aside"
            )
        else:
            # There is none if the last start ended between its checkpoint and its summary.
            evaluation = result.evaluation or run.evaluate()
            if evaluation and run.data.final is not run.data.held_out:
                evaluation = run.evaluate(at_the_end=True)
            if evaluation is None:
                return _stop(run, is_safe)
            run.watchdog.stop()
            if world.is_main_process:
                _finish(run, evaluation, is_safe)
            broadcast_object(world, None)  # all ranks leave together: srun kills the last ones a while after the first
    except BaseException as error:
        run.display.stop()
        fail(run, error)
        raise
    finally:
        run.watchdog.stop()
    leave_world(run.accelerator)
    return "finished"


def _finish(run: Run, evaluation: Evaluation, is_safe: bool) -> None:
    """Write the weights, pictures and summary of a finished run, and print its results. Rank 0."""
    folder = run.dir.path
    run.metrics.close()
    run.dir.summary_path.unlink(missing_ok=True)  # an older one would describe other weights
    with averaged(run.state):
        write_weights(run.state.module, run.dir.weights_path)
        drawn = draw_pictures(run, evaluation)
    summary = write_summary(run, "finished", evaluation)  # last: it promises that everything else is there
    _close_trackers(run, summary)

    for text in time_table(summary["time_s"]):
        run.display.note(text)
    shares = "" if evaluation.accuracy is None else f"accuracy {evaluation.accuracy:.2%}, top-5 {evaluation.top5:.2%}, "
    if labels := evaluation.labels:
        shares = f"mAP {labels.mean_average_precision:.2%}, F1 {labels.f1_macro:.2%} (micro {labels.f1_micro:.2%}), "
    run.display.note(
        f"done: {run.data.final_name} {shares}loss {evaluation.loss:.4f} on {count(evaluation.samples, 'image')} after "
        f"{run.state.wall_s:.0f} s"
    )
    scores = evaluation.labels.average_precision if evaluation.labels else evaluation.per_class_accuracy or []
    per_class = zip(scores, run.data.train.manifest.classes, strict=False)
    known = [(accuracy, name) for accuracy, name in per_class if accuracy is not None]
    if known and min(known)[0] < max(known)[0]:
        (best, best_name), (worst, worst_name) = max(known), min(known)
        run.display.note(f"best class: {listed([best_name])} {best:.1%}, worst: {listed([worst_name])} {worst:.1%}")
    if evaluation.accuracy is not None and evaluation.confusion is None:
        run.display.note(f"confusion.png is not drawn for more than {MOST_CLASSES_IN_CONFUSION:,} classes")
    for text in bad_images_texts(summary):
        run.display.note(f"left out: {text}")
    if ended := run.patience.reason(run.state):
        run.display.note(f"ended early: {ended}; the weights are those of the last step")
    run.display.note(f"{', '.join([*drawn, run.dir.weights_path.name])} are in {folder}")
    if not is_safe:
        run.display.warn(
            "the last checkpoint could not be saved: the same command would repeat the steps since the one before"
        )


def _stop(run: Run, is_safe: bool) -> Ending:
    """End a run on request: the state is saved, then the summary says so, then the trackers are closed."""
    step, reason = run.state.progress.step, run.requests.reason
    if run.accelerator.is_main_process:
        run.metrics.close()
        run.requests.remove_files()
        if is_safe:
            summary = _write_summary(run, "preempted")
            _tell_job_script(run)
        else:
            summary = _write_summary(run, "failed", "checkpoint", f"step {step} could not be saved")
        if not step:
            run.display.note(f"stopped by {reason}, before the first step")
        elif is_safe:
            run.display.note(f"stopped by {reason}: step {step} is saved, the same command resumes from it")
        else:
            saved, _ = newest_intact(run.dir.checkpoints_path)
            rest = f"the same command resumes from {saved.name}" if saved else "there is no checkpoint to resume from"
            run.display.note(f"stopped by {reason}, but step {step} could not be saved: {rest}")
        outlook = run.time_limit.outlook()
        if outlook:
            run.display.note(outlook)
        run.watchdog.stop()
        _close_trackers(run, summary, failed=not is_safe)
    # No rank leaves before the state is safe: under srun, its exit would end the others.
    is_safe = broadcast_object(run.accelerator.state, is_safe)
    leave_world(run.accelerator)
    return "stopped" if is_safe else "unsaved"


def fail(run: Run, error: BaseException) -> None:
    """Write the summary of a run that failed. Calls no collective: the other ranks may never come."""
    run.watchdog.exit_if_hung()  # the error may only be that ranks have left a run that hangs
    if isinstance(error, InputError):  # only the rank that read the sample has found it
        error.everywhere = False
    run.metrics.close()
    if run.accelerator.is_main_process:
        is_ours = isinstance(error, (InputError, TrainingFailed))
        reason = str(error) if is_ours else f"{type(error).__name__}: {error}"
        summary = _write_summary(run, "failed", failure_of(error), reason)
        run.watchdog.stop()
        _close_trackers(run, summary, failed=True)


def failure_of(error: BaseException) -> Failure:
    """Return the kind of failure that an error is, for summary.json."""
    if isinstance(error, NonFiniteError):
        return "nonfinite"
    if isinstance(error, InputError):
        return "input"
    if is_out_of_memory(error):
        return "memory"
    return "lost_rank" if is_lost_rank(error) else "error"


def _write_summary(run: Run, status: Status, failure: Failure | None = None, reason: str = "") -> dict[str, Any]:
    """Write the summary of an unfinished run; only warn if that fails, because the user must see why the run ended."""
    try:
        return write_summary(run, status, failure=failure, reason=reason)
    except OSError as error:
        run.display.warn(f"{run.dir.summary_path.name} could not be written: {error}")
        return {"status": status}


def _tell_job_script(run: Run) -> None:
    """Write for the job script, which may requeue the job, how many steps this process took and who asked it to stop."""
    path = launch_env.stopped_file()
    if path is None:
        return
    steps = run.state.progress.step - run.state.starts[-1]["step"]
    try:
        write_atomically(path, f"{steps} {'person' if run.requests.by_person else 'signal'}\n".encode())
    except OSError as error:
        run.display.warn(f"{path} could not be written, so the job will not be requeued: {error}")


def _close_trackers(run: Run, summary: dict[str, Any], failed: bool = False) -> None:
    for note in run.trackers.finish(summary, failed):
        run.display.note(note)


def draw_pictures(run: Run, evaluation: Evaluation) -> list[str]:
    """Draw the pictures of a finished run; return the names of those drawn. One that fails is a warning."""
    confusion, classes = evaluation.confusion, run.data.train.manifest.classes
    extras = pictures.training_extras(run.recipe)
    draw: dict[str, Callable[[Path], None]] = {
        "curves.png": lambda path: pictures.draw_curves(run.dir.metrics_path, path, extras)
    }
    if evaluation.labels:
        draw["predictions.png"] = lambda path: pictures.draw_found_labels(*first_found_labels(run), classes, path)
    elif evaluation.accuracy is None:
        draw["reconstructions.png"] = lambda path: pictures.draw_reconstructions(*first_reconstructions(run), path)
    else:
        if confusion is not None:
            draw["confusion.png"] = lambda path: pictures.draw_confusion(confusion, classes, path)
        draw["predictions.png"] = lambda path: pictures.draw_predictions(*first_predictions(run), classes, path)
    drawn, problems = [], []
    for name, draw_into in draw.items():
        try:
            draw_into(run.dir.path / name)
            drawn.append(name)
        except Exception as error:  # a full disk, or whatever matplotlib raises: the weights are safe
            problems.append(f"{name} ({first_line(error)})")
    if problems:
        run.display.warn(f"not all pictures could be drawn: {', '.join(problems)}")
    return drawn


def first_predictions(run: Run) -> tuple[Tensor, list[int], list[int], list[float]]:
    """Return the first test images with labels, predictions and their probabilities, computed on this rank alone."""
    chosen = run.data.final.first(pictures.GRID_ROWS * pictures.GRID_COLUMNS)
    pixels, labels = run.data.final_reader.read(chosen)
    confidence, prediction = _outputs(run, pixels).softmax(dim=1).max(dim=1)
    return pixels.cpu(), one_label(labels).tolist(), prediction.tolist(), confidence.tolist()


def first_found_labels(run: Run) -> tuple[Tensor, list[list[int]], list[list[int]]]:
    """Return the first test images, the labels that hold, and those found at eval.threshold, computed on this rank alone."""
    chosen = run.data.final.first(pictures.GRID_ROWS * pictures.GRID_COLUMNS)
    pixels, shares = run.data.final_reader.read(chosen)
    found = _outputs(run, pixels).sigmoid() >= run.recipe.eval.threshold
    return pixels.cpu(), _places(shares > HOLDS), _places(found)


def _places(rows: Tensor) -> list[list[int]]:
    return [row.nonzero()[:, 0].tolist() for row in rows]


def first_reconstructions(run: Run) -> tuple[Tensor, Tensor]:
    """Return the first test images and their reconstructions: uint8 (N, H, W, C), computed on this rank alone."""
    pixels, _ = run.data.final_reader.read(run.data.final.first(pictures.GRID_ROWS * pictures.GRID_COLUMNS // 2))
    return pixels.cpu(), run.data.normalize.undo(_outputs(run, pixels)).cpu()


@torch.no_grad()
def _outputs(run: Run, pixels: Tensor) -> Tensor:
    images = run.data.normalize(pixels.to(run.accelerator.device))
    return run.state.module.eval()(images).float()
