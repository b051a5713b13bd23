"""Weights & Biases: a run there, online or as files below the run's folder, under one id however often it is started."""

import contextlib
import dataclasses
import json
import os
from pathlib import Path
from typing import Any

from shardstep.configs.schema import Recipe
from shardstep.trainer.monitoring.status import pictures_of, scalars_of
from shardstep.trainer.monitoring.wandb_file import logged_steps, sync_note

Line = dict[str, Any]


class WandbTracker:
    """A Tracker: train and evaluation lines, config, pictures, and by option the weights or all checkpoints."""

    name = "wandb"

    def __init__(self, recipe: Recipe, folder: Path, facts: Line, run_id: str | None = None):
        """
        Args:
            recipe: with the settings of its log section, and as the run's config.
            folder: of the run.
            facts: of code and hardware, put into the config too.
            run_id: of the run in Weights & Biases that this one continues.
        """
        self._recipe, self._folder, self._facts, self.run_id = recipe, folder, facts, run_id
        self.sends_files = recipe.log.wandb == "online" and recipe.log.wandb_artifacts != "none"
        self._run: Any = None
        self._sent: dict[str, int] = {}  # by kind of line, the last step of the offline files from before
        self._past: list[str] = []

    def start(self) -> None:
        """Open the run, with its config."""
        import wandb  # half a second, and opentelemetry with it: only where it is wanted

        log = self._recipe.log
        if log.wandb_artifacts != "none":  # files that wait to be sent stay with the run
            os.environ.setdefault("WANDB_DATA_DIR", str(self._folder / "wandb"))
        self._run = wandb.init(
            project=log.wandb_project,
            entity=log.wandb_entity,
            name=self._recipe.run.name,
            tags=log.wandb_tags,
            config=dataclasses.asdict(self._recipe) | self._facts,
            dir=str(self._folder),
            mode="offline" if log.wandb == "offline" else "online",
            id=self.run_id,
            # offline, pieces with one id become one run when they are synced
            resume="allow" if self.run_id and log.wandb == "online" else None,
        )
        goes_on = self.run_id is not None and log.wandb == "offline"
        self.run_id = self._run.id
        lines = self._folder / "metrics.jsonl"
        if goes_on and lines.is_file():
            self._past = lines.read_text().splitlines()

    def catch_up(self) -> None:
        """Send what a killed process had not yet flushed, and nothing twice. Online, the server sees to that."""
        own = sorted((self._folder / "wandb").glob(f"offline-run-*-{self.run_id}/run-{self.run_id}.wandb"))
        before = [path for path in own if path.parent != Path(self._run.dir).parent]
        for path in before:
            for kind, step in logged_steps(path).items():
                self._sent[kind] = max(step, self._sent.get(kind, -1))
        if before:  # files that are not here any more are in Weights & Biases already
            for line in self._past:
                self.log(json.loads(line))

    def log(self, line: Line) -> None:
        """Send a line of metrics.jsonl as <kind>/<name> at its step, unless it was sent before."""
        if line["step"] > self._sent.get(line["kind"], -1):
            self._run.log(scalars_of(line), step=line["step"])

    def saved(self, path: Path) -> None:
        """Send a checkpoint as a version of the artifact <run>-checkpoint, if the recipe asks for that."""
        if self._recipe.log.wandb_artifacts == "checkpoints":
            with contextlib.suppress(FileNotFoundError):  # it was deleted while it waited, or just now
                self._send("checkpoint", [*path.iterdir()])

    def finish(self, summary: Line, failed: bool) -> None:
        """Send the pictures, the final weights if the recipe asks for them, and the summary; close the run."""
        import wandb

        pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures_of(self._folder)}
        if pictures and summary["status"] == "finished":
            self._run.log(pictures, step=summary["step"])
        weights = self._folder / "model.safetensors"
        if self._recipe.log.wandb_artifacts != "none" and summary["status"] == "finished":
            self._send("model", [weights, self._folder / "config.yaml"])
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(failed))

    def note(self) -> str:
        """How to send what lies here."""
        return sync_note(self._folder)

    def _send(self, kind: str, files: list[Path]) -> None:
        import wandb

        artifact = wandb.Artifact(f"{self._recipe.run.name}-{kind}", type=kind)
        for path in files:
            path.stat()  # wandb's own error would not say that a file is gone
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)
