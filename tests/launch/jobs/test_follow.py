"""Follow a submitted job: its states in Slurm, the metrics of its run, and the state of the run at the end."""

from pathlib import Path

import pytest

from shardstep.launch.jobs import follow as module
from shardstep.launch.jobs.follow import follow
from shardstep.trainer.run_dir import RunDir


def test_a_job_is_followed_to_the_state_of_its_run(
    finished_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run, lines = RunDir(tmp_path), RunDir(finished_run).metrics_path.read_text().splitlines(keepends=True)
    answers = [
        [{"JobState": "PENDING", "Reason": "Resources"}],
        [{"JobState": "RUNNING", "NodeList": "n1"}],
        [{"JobState": "COMPLETED"}],
    ]

    def ask(job_id: str) -> list[dict[str, str]]:
        if len(answers) == 1:  # the run trains while the job is running
            run.config_path.write_text(RunDir(finished_run).config_path.read_text())
            run.metrics_path.write_text("".join(lines))
            run.summary_path.write_text(RunDir(finished_run).summary_path.read_text())
        return answers.pop(0)

    monkeypatch.setattr(module, "_tasks", ask)
    monkeypatch.setattr(module, "_POLL_S", 0.0)
    assert follow("7", tmp_path) == 0
    shown = [line[10:] for line in capsys.readouterr().out.splitlines()]  # without the time
    assert shown[:3] == ["PENDING (Resources)", "RUNNING on n1", "COMPLETED"]
    assert sum("test loss" in line for line in shown) == 2
    assert shown[-1] == f"the run in {tmp_path}: finished"
