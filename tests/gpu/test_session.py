"""A session on a GPU, with small parts in place of the real ones; and its rehearsal on a CPU from end to end."""

import json
import subprocess
import sys
import time
from importlib import metadata
from pathlib import Path

import psutil
import pytest
import torch

from tests.conftest import ROOT
from tests.distributed import HANG_S
from tests.gpu.__main__ import missing_packages
from tests.gpu.parts import Found, Part, parts, read_record, read_same, read_tables, read_tests
from tests.gpu.session import Session

HANGING = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"], start_new_session=True)
print(child.pid, flush=True)
time.sleep(600)
"""


def part(name: str, code: str, limit_s: float = 300) -> Part:
    return Part(name, "something", limit_s, ["-c", code], lambda printed: Found(1, printed.strip(), {"is": name}))


def run(folder: Path, *given: Part, total_s: float = 600, is_rehearsal: bool = False) -> tuple[int, dict, str]:
    """The exit code, the JSON and the page of a session."""
    code = Session(folder, folder, time.monotonic(), total_s, is_rehearsal).run(given)
    return code, json.loads((folder / "gpu.json").read_text()), (folder / "gpu.md").read_text()


def test_a_part_that_fails_does_not_stop_the_others(tmp_path: Path) -> None:
    code, found, page = run(tmp_path, part("bad", "print('oh'); raise SystemExit(3)"), part("good", "print('a | b')"))
    assert code == 1
    assert [(one["status"], one["n"], one["figures"]) for one in found["parts"]] == [
        ("failed", 1, {"is": "bad"}), ("passed", 1, {"is": "good"}),
    ]  # fmt: skip
    assert found["parts"][0]["output"] == "oh"
    assert "| good | something | passed | 1 | " in page
    assert "a \\| b" in page
    assert {"cards", "driver and limits", "cuda", "hardware", "versions"} <= found.keys()
    assert "rehearsal" not in page


def test_a_part_that_takes_too_long_is_ended_with_all_it_has_started(tmp_path: Path) -> None:
    code, found, _ = run(tmp_path, part("slow", HANGING, limit_s=20), part("next", "print(1)"))
    assert code == 0
    assert [one["status"] for one in found["parts"]] == ["out of time", "passed"]
    child = int(found["parts"][0]["summary"])  # what it had printed is kept
    assert not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE


def test_what_was_not_reached_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    began = time.monotonic()
    code, found, page = run(tmp_path, part("first", "import time; time.sleep(600)"), part("second", ""), total_s=17)
    assert code == 0
    assert time.monotonic() - began < 120
    assert [one["status"] for one in found["parts"]] == ["out of time", "not reached"]
    assert "| second | something | not reached | 0 | 0 |  |" in page
    assert "not reached in 17 s: second" in capsys.readouterr().out


def test_results_are_written_after_every_part(tmp_path: Path) -> None:
    look = f"import json; print([p['status'] for p in json.load(open({str(tmp_path / 'gpu.json')!r}))['parts']])"
    _, found, _ = run(tmp_path, part("one", look), part("two", look))
    assert [one["summary"] for one in found["parts"]] == [
        "['not reached', 'not reached']", "['passed', 'not reached']"
    ]  # fmt: skip


def test_a_rehearsal_says_that_it_shows_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _, found, page = run(tmp_path, part("one", ""), is_rehearsal=True)
    assert found["parts"][0]["status"] == "rehearsed"
    for text in (page, found["shows"], capsys.readouterr().out):
        assert "This is a rehearsal on a CPU: it shows that the parts run, and nothing about a GPU." in text


def test_a_rehearsal_has_the_parts_of_a_gpu() -> None:
    on_gpu, on_cpu = (parts(Path("scratch"), is_rehearsal) for is_rehearsal in (False, True))
    assert [one.name for one in on_gpu] == [one.name for one in on_cpu]
    assert {"tests", "record", "step", "loader"} <= {one.name for one in on_gpu}


def test_missing_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    assert missing_packages() == []
    needed = ["nowhere-to-be-found>=1", "pillow>=11.3", "wandb>=0.31", 'another-one; extra == "dev"']
    monkeypatch.setattr(metadata, "requires", lambda name: needed)
    assert missing_packages() == ["nowhere-to-be-found"]


def test_figures_are_read_from_what_was_printed() -> None:
    lines = [
        "tests/gpu/test_a.py::test_one[a b] PASSED [ 1%]",
        "tests/gpu/test_a.py::test_two FAILED [ 2%]",
        "tests/gpu/test_a.py::test_three SKIPPED (a CPU has no CUDA graphs)",
        "tests/gpu/test_a.py::test_four ",  # in which it was ended
        "FAILED tests/gpu/test_a.py::test_two - assert 1 == 2",
    ]
    found = read_tests("\n".join(lines))
    assert found.n == 3
    assert found.summary == "1 passed, 1 failed, 1 skipped: test_two"
    assert found.figures == {"test_one[a b]": "PASSED", "test_two": "FAILED", "test_three": "SKIPPED"}

    lines = [
        "speedrun94, seed 0: 94.00 %, 3.1 s", "a script, seed 0: 94.10 %, 3.5 s", "speedrun94, seed 1: 94.20 %, 3.3 s",
    ]  # fmt: skip
    found = read_record("\n".join(lines), Path("nowhere"))
    assert found.n == 1  # complete pairs
    assert found.summary == (  # deviations of 0.1: s = 0.1414, divided by the root of 2
        "speedrun94: 94.10 ± 0.10 % in 3.2 s (3.1 to 3.3), n = 2; a script: 94.10 % in 3.5 s (3.5 to 3.5), n = 1"
    )

    head = "device  loss     gradient norm  weights  differs at step"
    found = read_same(
        "\n".join([head, "------  ----", "cuda    1.1e-07  inf            2.0e-07  3", "the same on cpu, cuda"])
    )
    assert (found.n, found.figures["cuda"]["weights"], found.figures["cuda"]["differs at step"]) == (1, 2e-7, "3")

    for ended_early in (read_tests(""), read_record("", Path("nowhere")), read_same(""), read_tables(Path("nowhere"))):
        assert (ended_early.n, ended_early.summary) == (0, "the part was ended before it had figures")


@pytest.mark.drill
@pytest.mark.skipif(torch.cuda.is_available(), reason="a rehearsal is for where there is no GPU")
def test_the_rehearsal(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.gpu", "--out", str(tmp_path), "--total-s", str(2 * HANG_S)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=3 * HANG_S)
    found = json.loads((tmp_path / "gpu.json").read_text())
    assert {one["name"]: one["status"] for one in found["parts"]} == {
        one.name: "rehearsed" for one in parts(tmp_path, is_rehearsal=True)
    }, done.stdout
    assert done.returncode == 0
    assert all(one["n"] for one in found["parts"])
    assert "nothing about a GPU" in done.stdout
