"""Metrics: what the loop measures, written to metrics.jsonl and to listeners. Sums stay on the device between log steps."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from shardstep.configs.durations import Duration
from shardstep.configs.errors import NonFiniteError
from shardstep.configs.files import write_atomically
from shardstep.datasets.parts import PartName
from shardstep.trainer.distributed.collectives import gather_rows, reduce_sums
from shardstep.trainer.evaluation import Evaluation
from shardstep.trainer.machine import resident_bytes
from shardstep.trainer.monitoring.status import samples_text
from shardstep.trainer.optim.clip import Clip
from shardstep.trainer.optim.plan import Plan
from shardstep.trainer.state import TrainState

_RECENT = 0.3  # weight of the newest log step in the pace that the time left is estimated from
_REMEDY = "Try a lower optimizer.lr, a schedule.warmup, train.clip_norm=1.0, or train.precision=fp32"


class Metrics:
    """The record of a run. All ranks call it; rank 0 writes."""

    def __init__(
        self,
        accelerator: Accelerator,
        path: Path,
        state: TrainState,
        plan: Plan,
        evaluate_every: Duration,
        listeners: list[Callable[[dict[str, Any]], None]],
        warn: Callable[[str], None],
        has_accuracy: bool = True,
        clip: Clip | None = None,
        evaluated_on: PartName = "test",
        count_bad_images: Callable[[], None] | None = None,
    ):
        """Rank 0 calls `listeners` with every line. `path` and `state` hold the lines and sums from before a resume;
        `has_accuracy` is False where outputs are neither correct nor wrong, being images or several labels; `evaluated_on` is
        the set of the evaluations; `count_bad_images` adds to the state what all ranks' training has skipped since its last
        call; it is None where images are not skipped.
        """
        self._count_skipped, self._warn, self._told_bad = count_bad_images, warn, False
        self._evaluated_on = evaluated_on
        self._accelerator = accelerator
        self._has_accuracy, self._clip = has_accuracy, clip
        self._plan, self._evaluate_every, self._pace = plan, evaluate_every, 0.0  # samples per second
        self._lines = LineFile(path, warn) if accelerator.is_main_process else None
        self._listeners = listeners
        own = state.sums[accelerator.process_index] if state.sums else [0.0, 0.0]
        self._since_evaluation = torch.tensor(own, dtype=torch.float64, device=accelerator.device)
        self._samples_since_evaluation = state.samples_in_sums
        self._window_samples, self._window_s, self._window_wait_s = 0, 0.0, 0.0
        self._skipped_updates = 0
        self._mark = time.perf_counter()
        self.last_train, self.last_evaluation = _last_lines(path)

    def add(self, sums: Tensor | None, size: int, wait_s: float, scaler_skipped: bool) -> None:
        """Count one step.

        Args:
            sums: this rank's loss and correct predictions; None if the step was skipped.
            scaler_skipped: whether fp16's scaler skipped the update, because the gradient overflowed.
        """
        if sums is not None:
            self._skipped_updates += scaler_skipped
            self._since_evaluation += sums
            self._samples_since_evaluation += size
        now = time.perf_counter()
        self._window_s += now - self._mark
        self._window_samples += size
        self._window_wait_s += wait_s
        self._mark = now

    def gather_sums(self, state: TrainState) -> None:
        """Gather all ranks' sums since the last evaluation into a state that is about to be saved. All ranks.

        Raises:
            NonFiniteError: a loss since the last evaluation was NaN or infinite: the state is not worth saving.
        """
        state.sums = gather_rows(self._accelerator, self._since_evaluation)
        state.samples_in_sums = self._samples_since_evaluation
        self._count_bad_images(state)
        if not all(math.isfinite(loss) for loss, _ in state.sums):
            raise NonFiniteError(f"the loss of a step up to step {state.progress.step} was NaN or infinite. {_REMEDY}")

    def _count_bad_images(self, state: TrainState) -> None:
        """Add what all ranks have skipped since the last call. All ranks reduce."""
        if self._count_skipped is not None:
            self._count_skipped()
            self._tell_of_bad(state.first_bad_images)

    def _tell_of_bad(self, first: list[dict[str, Any]]) -> None:
        if first and not self._told_bad:
            self._told_bad = True
            self._warn(
                f"there are images that cannot be decoded, such as {samples_text(first[:1])}: training takes the next one in "
                f"their place, evaluation leaves them out, metrics.jsonl counts both as bad_images, and summary.json names "
                f"the first. `shardstep shards verify` lists all"
            )

    def restart_clock(self) -> None:
        """Exclude the time since the last step from the training speed."""
        self._mark = time.perf_counter()

    def write_train(self, state: TrainState, epoch: float, sums: Tensor | None, size: int) -> None:
        """Write the train line of the step that was just added. All ranks reduce.

        Raises:
            NonFiniteError: the loss of the step is NaN or infinite.
        """
        loss, accuracy = None, None
        if sums is not None:
            (total,) = reduce_sums(self._accelerator, [sums])
            loss, accuracy = (total / size).tolist()  # waits for the device: only on log steps
        self._count_bad_images(state)
        self._window_s += time.perf_counter() - self._mark
        self.restart_clock()
        samples_per_s = self._window_samples / self._window_s
        self._pace = _RECENT * samples_per_s + (1 - _RECENT) * (self._pace or samples_per_s)
        left_s = self._plan.left_s(state.progress, state.train_s, self._pace, self._evaluate_every, state.evaluation_s)
        device = self._accelerator.device
        memory = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else resident_bytes()
        line: dict[str, Any] = {
            "kind": "train",
            "step": state.progress.step,
            "epoch": round(epoch, 6),
            "samples": state.progress.samples,
            "loss": loss,
            "accuracy": accuracy if self._has_accuracy else None,
            "lr": state.lr,
            "samples_per_s": round(samples_per_s, 1),
            "data_wait_share": round(self._window_wait_s / self._window_s, 4),
            "memory_mb": round(memory / 1e6),  # of rank 0: the GPU's peak, or the process's current memory
            "total_steps": self._plan.total_steps,
            "share_done": round(self._plan.share_done(state.progress, state.train_s), 6),
            "left_s": round(left_s, 1),
            "time": round(time.time(), 3),
        }
        self._window_samples, self._window_s, self._window_wait_s = 0, 0.0, 0.0
        if self._clip and self._clip.norm_before is not None:
            line["grad_norm"] = None if sums is None else self._clip.norm_before.item()
        if self._skipped_updates:
            line["skipped_updates"] = self._skipped_updates  # by fp16's scaler, since this process started
        if state.skipped_steps:
            line["skipped_steps"] = state.skipped_steps  # with a NaN or infinite loss, since the start of the run
        if state.bad_images:
            line["bad_images"] = state.bad_images  # that others took the place of, since the start of the run
        if loss is not None and not math.isfinite(loss):
            self._record(line)
            raise NonFiniteError(
                f"the loss is {loss} at step {state.progress.step} (epoch {epoch:.2f}, lr {state.lr:g}). {_REMEDY}"
            )
        self.last_train = line
        self._write(line)

    def write_evaluation(self, state: TrainState, epoch: float, evaluation: Evaluation) -> None:
        """Write an evaluation line, with the training means since the last evaluation. All ranks reduce.

        Raises:
            NonFiniteError: the test or validation loss, or the training loss since the last evaluation, is NaN or infinite.
        """
        (total,) = reduce_sums(self._accelerator, [self._since_evaluation])
        train_loss, train_accuracy = (total / max(self._samples_since_evaluation, 1)).tolist()
        self._since_evaluation.zero_()
        self._samples_since_evaluation = 0
        line = {
            "kind": "eval",
            "set": self._evaluated_on,
            "step": state.progress.step,
            "epoch": round(epoch, 6),
            "samples": state.progress.samples,
            **evaluation.scores,
            "lr": state.lr,
            "train_loss": train_loss,
            "train_accuracy": train_accuracy if self._has_accuracy else None,
            # A line for very many classes would be long.
            "per_class_accuracy": None if evaluation.confusion is None else evaluation.per_class_accuracy,
            **({"bad_images": evaluation.bad_images} if evaluation.bad_images else {}),
            **({"per_class_ap": evaluation.labels.average_precision} if evaluation.labels else {}),
            "wall_s": round(state.wall_s, 3),
            "train_s": round(state.train_s, 3),
            "total_steps": self._plan.total_steps,
            "share_done": round(self._plan.share_done(state.progress, state.train_s), 6),
            "time": round(time.time(), 3),
        }
        losses = {f"{self._evaluated_on} loss": evaluation.loss, "training loss since the last evaluation": train_loss}
        nonfinite = [f"the {name} is {loss}" for name, loss in losses.items() if not math.isfinite(loss)]
        if nonfinite:
            self._record(line)
            raise NonFiniteError(
                f"NaN or infinite at step {state.progress.step} (lr {state.lr:g}): {', '.join(nonfinite)}. {_REMEDY}"
            )
        self.last_evaluation = line
        self._write(line)
        self._tell_of_bad(evaluation.first_bad_images)

    def sync(self) -> None:
        """Sync all lines to disk, before a checkpoint that relies on them is written."""
        if self._lines:
            self._lines.sync()

    def close(self) -> None:
        """Close the file."""
        if self._lines:
            self._lines.close()

    def _write(self, line: dict[str, Any]) -> None:
        self._record(line)
        if self._accelerator.is_main_process:
            for listener in self._listeners:
                listener(line)

    def _record(self, line: dict[str, Any]) -> None:
        if self._lines:
            self._lines.append(json.dumps(_finite(line)))


class LineFile:
    """Lines appended to a file. While it cannot be written, as on a full disk, they wait in memory for the next write."""

    def __init__(self, path: Path, warn: Callable[[str], None]):
        self._path, self._warn = path, warn
        self._file = path.open("ab", buffering=0)
        self._pending, self._fails = b"", False

    def append(self, line: str) -> None:
        """Write a line, after the pending ones."""
        self._pending += line.encode() + b"\n"
        self._flush()

    def _flush(self) -> None:
        try:
            while self._pending:  # a write may end in the middle of a line; the next one continues there
                self._pending = self._pending[self._file.write(self._pending) :]
            self._fails = False
        except OSError as error:
            if not self._fails:
                self._warn(f"{self._path} cannot be written, so its lines stay in memory for now: {error.strerror}")
            self._fails = True

    def sync(self) -> None:
        """Sync all lines to disk."""
        self._flush()
        with contextlib.suppress(OSError):
            os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close the file."""
        if not self._file.closed:
            self._flush()
            self._file.close()


class Stopwatch:
    """Seconds since its creation, plus those from before a resume."""

    def __init__(self, already_s: float = 0.0):
        self._start = time.perf_counter() - already_s

    def seconds(self) -> float:
        """Return the seconds so far."""
        return time.perf_counter() - self._start


def cut_lines(path: Path, step: int, evaluation_due: bool) -> None:
    """Remove the lines of a .jsonl file, which need not exist, that a run resumed from `step` will write again.

    `evaluation_due`: whether the evaluation at `step` is removed, too.
    """
    if not path.is_file():
        return
    kept = []
    for line in path.read_text().splitlines():
        content = _parse(line)
        again = evaluation_due and content.get("kind") == "eval" and content["step"] == step
        if content.get("step", math.inf) <= step and not again:
            kept.append(line + "\n")
    write_atomically(path, "".join(kept).encode())


def _last_lines(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the last train and the last evaluation line; empty where there is none."""
    found: dict[str, dict[str, Any]] = {"train": {}, "eval": {}}
    if path.is_file():
        for line in path.read_text().splitlines():
            content = _parse(line)
            if content.get("kind") in found:
                found[content["kind"]] = content
    return found["train"], found["eval"]


def _parse(line: str) -> dict[str, Any]:
    try:
        content = json.loads(line)
    except json.JSONDecodeError:  # the last line of a killed run may be cut
        return {}
    return content if isinstance(content, dict) else {}


def _finite(line: dict[str, Any]) -> dict[str, Any]:
    # NaN and Infinity are not JSON: readers in other languages would fail
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value for key, value in line.items()
    }
