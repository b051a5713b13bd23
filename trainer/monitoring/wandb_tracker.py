"""Weights & Biases: one run there, online or as offline files in the run's folder, under one id over all restarts.

A killed process leaves as much of its offline file as was flushed. wandb's own command reads it: `wandb leet inspect`.
"""

import contextlib
import dataclasses
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

from shardstep.configs.schema import Recipe
from shardstep.trainer.monitoring.status import pictures_of, scalars_of

Line = dict[str, Any]
_READ_S = 120.0  # at most, to read an offline file; wandb's command takes 1.6 s to start


class WandbTracker:
    """A Tracker: train and evaluation lines, config, pictures, and by option the weights or all checkpoints."""

    name = "wandb"

    def __init__(
        self,
        recipe: Recipe,
        folder: Path,
        metrics: Path,
        model_files: list[Path],
        facts: Line,
        run_id: str | None = None,
    ):
        """
        Args:
            recipe: with the settings of its log section, and as the run's config.
            model_files: of a finished run, sent if the recipe asks for them.
            facts: of code and hardware, put into the config too.
            run_id: of the run in Weights & Biases that this one continues.
        """
        self._recipe, self._folder, self._facts, self.run_id = recipe, folder, facts, run_id
        self._metrics, self._model_files = metrics, model_files
        self.sends_files = recipe.log.wandb == "online" and recipe.log.wandb_artifacts != "none"
        self._run: Any = None
        self._sent: dict[str, int] = {}  # by kind of line, the last step in the offline files of earlier starts
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
        resumes_offline = self.run_id is not None and log.wandb == "offline"
        self.run_id = self._run.id
        if resumes_offline and self._metrics.is_file():
            self._past = self._metrics.read_text().splitlines()

    def catch_up(self) -> None:
        """Send what a killed process had not yet flushed, and nothing twice. Online, the server takes care of that."""
        ours = sorted((self._folder / "wandb").glob(f"offline-run-*-{self.run_id}/run-{self.run_id}.wandb"))
        before = [path for path in ours if path.parent != Path(self._run.dir).parent]
        for path in before:
            for kind, step in logged_steps(path).items():
                self._sent[kind] = max(step, self._sent.get(kind, -1))
        if before:  # files that are no longer here are in Weights & Biases already
            for line in self._past:
                self.log(json.loads(line))

    def log(self, line: Line) -> None:
        """Send a line of metrics.jsonl as <kind>/<name> at its step, unless it was sent before."""
        if line["step"] > self._sent.get(line["kind"], -1):
            self._run.log(scalars_of(line), step=line["step"])

    def saved(self, path: Path) -> None:
        """Send a checkpoint as a version of the artifact <run>-checkpoint, if the recipe asks for that."""
        if self._recipe.log.wandb_artifacts == "checkpoints":
            with contextlib.suppress(FileNotFoundError):  # deleted while it waited, or just now
                self._send("checkpoint", [*path.iterdir()])

    def finish(self, summary: Line, failed: bool) -> None:
        """Send the pictures, the final weights if the recipe asks for them, and the summary; close the run."""
        import wandb

        if summary["status"] == "finished":
            pictures = {f"pictures/{path.stem}": wandb.Image(str(path)) for path in pictures_of(self._folder)}
            if pictures:
                self._run.log(pictures, step=summary["step"])
            if self._recipe.log.wandb_artifacts != "none":
                self._send("model", self._model_files)
        self._run.summary.update(summary)
        self._run.finish(exit_code=int(failed))

    def note(self) -> str:
        """Say how to send the offline files."""
        return sync_note(self._folder)

    def _send(self, kind: str, files: list[Path]) -> None:
        import wandb

        # Weights & Biases takes letters, digits, - _ and . in this name, at most 128.
        owner = re.sub(r"[^A-Za-z0-9_.-]+", "-", self._recipe.run.name)[:100]
        artifact = wandb.Artifact(f"{owner}-{kind}", type=kind)
        for path in files:
            path.stat()  # wandb's own error would not say that a file is gone
            artifact.add_file(str(path))
        self._run.log_artifact(artifact)


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read the records of an offline file by wandb's own command, up to where the file is cut.

    Raises:
        subprocess.SubprocessError: it fails, or takes too long.
    """
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", str(path)]
    environment = os.environ | {"WANDB_MODE": "offline"}  # no telemetry
    # In a new session, so that Ctrl-C reaches only the run, which then closes its trackers.
    shown = subprocess.run(
        command, env=environment, check=True, capture_output=True, text=True, timeout=_READ_S, start_new_session=True
    )
    return [json.loads(line) for line in shown.stdout.splitlines()]


def logged_steps(path: Path) -> dict[str, int]:
    """Return by kind of line (train, eval) the last step in an offline file."""
    steps: dict[str, int] = {}
    for record in read_records(path):
        values = record.get("history", {}).get("item", {})
        steps |= {name.split("/")[0]: values["_step"] for name in values if "/" in name}
    return steps


def sync_note(folder: Path) -> str:
    """Say how to send a run's offline files that `wandb sync` has not sent; empty if there are none."""
    files = sorted((folder / "wandb").glob("offline-run-*/run-*.wandb"))
    pieces = [path.parent for path in files if not path.with_name(f"{path.name}.synced").exists()]
    if not pieces:
        return ""
    quoted = shlex.quote(str(folder / "wandb"))
    which = shlex.quote(str(pieces[0])) if len(pieces) == 1 else f"{quoted}/offline-run-*"
    return f"not in Weights & Biases yet; where there is a network: wandb sync {which}"
