"""Weights & Biases on rank 0: a copy of what metrics.jsonl holds. A tracker that fails is left behind, never the run."""

import dataclasses
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardstep.configs.schema import Recipe
from shardstep.trainer.wandb_file import logged_steps

_FINISH_S = 30.0  # to send what is left


class WandbTracker:
    """One run in Weights & Biases, online or as files below the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path, warn: Callable[[str], None], run_id: str | None = None):
        """
        Args:
            recipe: with the settings of its log section, and as the run's config.
            folder: of the run, whose metrics.jsonl is cut at the step from which it goes on.
            warn: told once if wandb fails; after that, nothing more is sent.
            run_id: of the run in Weights & Biases that this one continues.
        """
        self._warn = warn
        self._run: Any = None
        self.run_id = run_id
        self._sent: dict[str, int] = {}  # by kind of line, the last step of the offline files from before
        self._guard(lambda: self._start(recipe, folder))
        if run_id and recipe.log.wandb == "offline":
            self._guard(lambda: self._catch_up(folder))

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl as <kind>/<name> at its step, unless it was sent before."""
        if line["step"] <= self._sent.get(line["kind"], -1):
            return
        numbers = {
            f"{line['kind']}/{key}": value
            for key, value in line.items()
            if isinstance(value, (int, float)) and key != "step"
        }
        self._guard(lambda: self._run.log(numbers, step=line["step"]))

    def finish(self, summary: dict[str, Any], failed: bool = False) -> None:
        """Close the run with its summary."""

        def close() -> None:
            self._run.summary.update(summary)
            self._run.finish(exit_code=int(failed))

        # The service may have been ended by the signal that ends the run, and an answer may never come.
        closing = threading.Thread(target=self._guard, args=(close,), name="wandb-finish", daemon=True)
        closing.start()
        closing.join(_FINISH_S)
        if closing.is_alive():
            self._warn(
                f"wandb has not finished after {_FINISH_S:.0f} s and is left behind; metrics.jsonl has everything"
            )

    def _start(self, recipe: Recipe, folder: Path) -> None:
        import wandb  # half a second, and opentelemetry with it: only where it is wanted

        self._run = wandb.init(
            project=recipe.log.wandb_project,
            entity=recipe.log.wandb_entity,
            name=recipe.run.name,
            tags=recipe.log.wandb_tags,
            config=dataclasses.asdict(recipe),
            dir=str(folder),
            mode="offline" if recipe.log.wandb == "offline" else "online",
            id=self.run_id,
            # offline, pieces with one id become one run when they are synced
            resume="allow" if self.run_id and recipe.log.wandb == "online" else None,
        )
        self.run_id = self._run.id

    def _catch_up(self, folder: Path) -> None:
        """Send what a killed process had not yet flushed, and nothing twice. Online, the server sees to that."""
        own = sorted((folder / "wandb").glob(f"offline-run-*-{self.run_id}/run-{self.run_id}.wandb"))
        before = [path for path in own if path.parent != Path(self._run.dir).parent]
        for path in before:
            for kind, step in logged_steps(path).items():
                self._sent[kind] = max(step, self._sent.get(kind, -1))
        lines = folder / "metrics.jsonl"
        if before and lines.is_file():  # files that are not here any more are in Weights & Biases already
            for line in lines.read_text().splitlines():
                self.log(json.loads(line))

    def _guard(self, action: Callable[[], None]) -> None:
        """Run an action unless an earlier one failed."""
        if self._warn is _ignore:
            return
        try:
            action()
        except Exception as error:  # whatever a tracker raises, training goes on
            self._warn(f"wandb failed and is left out from here on ({error}); metrics.jsonl has everything")
            self._warn = _ignore


def _ignore(message: str) -> None:
    pass
