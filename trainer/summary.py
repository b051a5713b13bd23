"""summary.json: how a run ended, in one small file."""

import json
from typing import Any

from shardstep.trainer.evaluate import Evaluation
from shardstep.trainer.setup import Run


def write_summary(run: Run, status: str, evaluation: Evaluation | None) -> dict[str, Any]:
    """Write summary.json; status is finished, preempted or failed. Called on rank 0."""
    recipe, state, manifest = run.recipe, run.state, run.data.train.manifest
    summary = {
        "status": status,
        "step": state.progress.step,
        "samples": state.progress.samples,
        "world_size": run.plan.world_size,
        "device": recipe.train.device,
        "precision": recipe.train.precision,
        "train": {
            key: run.metrics.last_train.get(key) for key in ("loss", "accuracy", "samples_per_s", "data_wait_share")
        }
        | run.metrics.last_epoch,
        "eval": {"loss": evaluation.loss, "accuracy": evaluation.accuracy, "top5": evaluation.top5}
        if evaluation
        else None,
        "wall_s": round(state.wall_s, 3),
        "restarts": state.restarts,
        "data": {
            "mode": recipe.data.mode,
            "source": manifest.made.get("source"),
            "train_samples": manifest.samples,
            "test_samples": run.data.test.manifest.samples,
            "fingerprint": manifest.fingerprint,
        },
    }
    partial = run.folder / "summary.json.partial"
    partial.write_text(json.dumps(summary, indent=1) + "\n")
    partial.replace(run.folder / "summary.json")
    return summary
