"""Weights & Biases on rank 0: a copy of what metrics.jsonl holds. A tracker that fails is left behind, never the run."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

from shardstep.configs.schema import Recipe


class WandbTracker:
    """One run in Weights & Biases, online or as files below the run's folder."""

    def __init__(self, recipe: Recipe, folder: Path, warn: Callable[[str], None]):
        """`warn` is told once if wandb fails; after that, nothing more is sent."""
        self._warn = warn
        self._run: Any = None
        self._guard(lambda: self._start(recipe, folder))

    def log(self, line: dict[str, Any]) -> None:
        """Send a line of metrics.jsonl as <kind>/<name> at its step."""
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

        self._guard(close)

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
        )

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
