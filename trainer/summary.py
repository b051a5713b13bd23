"""summary.json: how a run ended, in one small file."""

import json
from typing import Any

from shardstep.configs.files import write_whole
from shardstep.datasets.scan import file_sha256
from shardstep.trainer import runtime
from shardstep.trainer.checkpoint_files import WEIGHTS
from shardstep.trainer.evaluate import Evaluation
from shardstep.trainer.setup import Run


def write_summary(run: Run, status: str, evaluation: Evaluation | None, reason: str = "") -> dict[str, Any]:
    """Write summary.json; status is finished, preempted or failed, and `reason` why it failed. Called on rank 0."""
    recipe, state, manifest = run.recipe, run.state, run.data.train.manifest
    train, last_evaluation = run.metrics.last_train, run.metrics.last_evaluation
    summary = {
        "status": status,
        **({"reason": reason} if reason else {}),
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
        "eval": {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "top5": evaluation.top5}
        if evaluation
        else None,
        **({"weights_sha256": file_sha256(run.folder / WEIGHTS)} if status == "finished" else {}),
        "wall_s": round(state.wall_s, 3),
        "train_s": round(state.train_s, 3),
        "time_s": run.timer.time_s(
            run.batches.to_device_s, run.batches.augment_s, runtime.exposed_share_s(run.state.model)
        ),
        "restarts": max(len(state.starts) - 1, 0),
        "best": state.best,
        "data": {
            "mode": recipe.data.mode,
            "source": manifest.made.get("source"),
            "train_samples": manifest.samples,
            "test_samples": run.data.test.manifest.samples,
            "fingerprint": manifest.fingerprint,
        },
    }
    write_whole(run.folder / "summary.json", (json.dumps(summary, indent=1) + "\n").encode())
    return summary
