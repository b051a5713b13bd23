"""summary.json: how a run ended, in one small file."""

import json
from typing import Any

from shardstep.configs.files import file_sha256, write_atomically
from shardstep.trainer.distributed.ddp import exposed_communication_s
from shardstep.trainer.evaluation import Evaluation
from shardstep.trainer.run import Run
from shardstep.trainer.run_dir import Failure, Status

_SCORES = ("loss", "accuracy", "top5", "map", "f1", "f1_micro")


def write_summary(
    run: Run, status: Status, evaluation: Evaluation | None = None, failure: Failure | None = None, reason: str = ""
) -> dict[str, Any]:
    """Write summary.json, and return its content. Called on rank 0; `evaluation` is the final one of a finished run."""
    recipe, state, manifest = run.recipe, run.state, run.data.train.manifest
    train, last_evaluation = run.metrics.last_train, run.metrics.last_evaluation
    by_person = run.requests.by_person or run.requests.interrupted
    # DDP does not answer while it waits for a rank that hangs.
    exposed_s = None if failure == "hang" else exposed_communication_s(run.state.model)
    validation = None
    if run.data.held_out_name == "validation" and last_evaluation:
        validation = {key: last_evaluation[key] for key in _SCORES if key in last_evaluation}
    summary = {
        "status": status,
        **({"failure": failure, "reason": reason} if failure else {}),
        **({"stopped_by": "person" if by_person else "signal"} if status == "preempted" else {}),
        **({"ended_by": _ended_by(run)} if status == "finished" else {}),
        "step": state.progress.step,
        "samples": state.progress.samples,
        "world_size": run.plan.world_size,
        "device": recipe.train.device,
        "precision": recipe.train.precision,
        "train": {
            **{key: train.get(key) for key in ("loss", "accuracy", "samples_per_s", "data_wait_share")},
            "epoch_loss": last_evaluation.get("train_loss"),
            "epoch_accuracy": last_evaluation.get("train_accuracy"),
        },
        "eval": evaluation.scores if evaluation else None,
        **({"weights_sha256": file_sha256(run.dir.weights_path)} if status == "finished" else {}),
        **(_bad_images(run, evaluation) if recipe.data.on_bad_image == "skip" else {}),
        "wall_s": round(state.wall_s, 3),
        "train_s": round(state.train_s, 3),
        "time_s": run.timer.time_s(run.batches.to_device_s, run.batches.augment_s, exposed_s),
        **({"validation": validation} if validation else {}),
        "restarts": max(len(state.starts) - 1, 0),
        "best": state.best,
        "data": {
            "mode": recipe.data.mode,
            "source": manifest.made.get("source"),
            "train_samples": run.data.train.samples,
            **{f"{name}_samples": part.samples for name, part in run.data.evaluated.items()},
            "fingerprint": manifest.fingerprint,
        },
    }
    write_atomically(run.dir.summary_path, (json.dumps(summary, indent=1) + "\n").encode())
    return summary


def _ended_by(run: Run) -> dict[str, str]:
    """Return the key of the recipe that ended a finished run, and what it says."""
    config, reason = run.recipe.train, run.patience.reason(run.state)
    if run.plan.is_over(run.state.progress):
        return {"key": "train.duration", "reason": config.duration}
    if reason:
        return {"key": "train.stop_when", "reason": reason}
    return {"key": "train.max_wall_s", "reason": f"{config.max_wall_s:g} s of training"}


def _bad_images(run: Run, evaluation: Evaluation | None) -> dict[str, Any]:
    """Return how often training met an image that cannot be decoded, how many the last evaluation left out, and the first."""
    counts, first = {"train": run.state.bad_images}, {"train": run.state.first_bad_images}
    if evaluation:
        counts[run.data.final_name], first[run.data.final_name] = evaluation.bad_images, evaluation.first_bad_images
    return {"bad_images": counts, "first_bad_images": {name: of for name, of in first.items() if of}}
