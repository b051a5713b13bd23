"""A session on a GPU: runs parts one after the other within a total of seconds, and writes what came out after each."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import psutil
import torch

from shardstep.configs.files import write_atomically
from shardstep.launch.benchmarks.bench_tables import hardware
from tests.gpu.parts import Part

Status = Literal["passed", "rehearsed", "failed", "out of time", "not reached"]

_END_S = 5.0  # to end a part and to write the page
_WORTH_S = 10.0  # a part that has less would only start
_LAST_LINES = {"passed": 60, "rehearsed": 60}  # of what a part printed; of others 600
_REHEARSED = "This is a rehearsal on a CPU: it shows that the parts run, and nothing about a GPU."


@dataclass
class Outcome:
    """What came of a part; `output` has its last lines."""

    name: str
    shows: str
    status: Status
    n: int = 0
    seconds: float = 0.0
    limit_s: float = 0.0
    summary: str = ""
    command: str = ""
    figures: Any = None
    output: str = ""


class Session:
    """Runs parts and keeps their outcomes."""

    def __init__(self, out: Path, scratch: Path, began: float, total_s: float, is_rehearsal: bool):
        """`out`: for results; `scratch`: for everything else; `began`: by time.monotonic()."""
        self._out, self._scratch, self._began, self._total_s = out, scratch, began, total_s
        self._is_rehearsal = is_rehearsal
        self._facts = facts()
        self._outcomes: list[Outcome] = []

    def run(self, parts: Iterable[Part]) -> int:
        """Run the parts in turn; return 1 if one of them failed, else 0."""
        parts = list(parts)
        self._outcomes = [Outcome(part.name, part.shows, "not reached") for part in parts]
        self._write()
        for number, part in enumerate(parts):
            left_s = self._total_s - (time.monotonic() - self._began) - _END_S
            if left_s >= min(_WORTH_S, part.limit_s):
                print(f"{part.name}: {part.shows} ...", flush=True)
                limit_s = left_s if self._is_rehearsal else min(part.limit_s, left_s)  # a part's limit is for a GPU
                outcome = self._outcomes[number] = self._run_part(part, limit_s)
                print(
                    f"  {outcome.status} after {outcome.seconds:.0f} s, n = {outcome.n}: {outcome.summary}", flush=True
                )
                if outcome.status == "failed":
                    print(outcome.output, flush=True)
                self._write()
        unreached = [outcome.name for outcome in self._outcomes if outcome.status == "not reached"]
        if unreached:
            print(f"not reached in {self._total_s:g} s: {', '.join(unreached)}")
        if self._is_rehearsal:
            print(_REHEARSED)
        print(f"{self._json_path} and {self._page_path} have everything")
        return int(any(outcome.status == "failed" for outcome in self._outcomes))

    @property
    def _json_path(self) -> Path:
        return self._out / "gpu.json"

    @property
    def _page_path(self) -> Path:
        return self._out / "gpu.md"

    def _run_part(self, part: Part, limit_s: float) -> Outcome:
        log, began = self._scratch / "printed", time.monotonic()
        own = {"TMPDIR": str(self._scratch), "SHARDSTEP_CACHE": str(self._scratch / "cache"), "WANDB_MODE": "disabled"}
        code: int | None = None
        with log.open("wb") as file:
            process = subprocess.Popen(
                [sys.executable, "-u", *part.command],
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, cwd=part.folder,
                env=os.environ | own | part.environment, start_new_session=True,
            )  # fmt: skip
            try:
                code = process.wait(limit_s)
            except subprocess.TimeoutExpired:
                pass
            finally:
                end_with_children(process)
        printed = log.read_text(errors="replace")
        done: Status = "rehearsed" if self._is_rehearsal else "passed"
        status: Status = "out of time" if code is None else "failed" if code else done
        found, lines = part.read(printed), printed.splitlines()[-_LAST_LINES.get(status, 600) :]
        seconds, command = round(time.monotonic() - began, 1), " ".join(["python", *part.command])
        return Outcome(
            part.name, part.shows, status, found.n, seconds, limit_s, found.summary, command, found.figures,
            "\n".join(lines),
        )  # fmt: skip

    def _write(self) -> None:
        seconds = round(time.monotonic() - self._began, 1)
        head = {"rehearsal": self._is_rehearsal, "shows": _REHEARSED if self._is_rehearsal else "", "seconds": seconds}
        found = head | {"total_s": self._total_s, **self._facts, "parts": [asdict(one) for one in self._outcomes]}
        write_atomically(self._json_path, (json.dumps(found, indent=1) + "\n").encode())
        write_atomically(self._page_path, self._page(seconds).encode())

    def _page(self, seconds: float) -> str:
        """Return the page: what was there, a table of the parts, and the last lines of each."""
        title = "A rehearsal of what only a GPU can show" if self._is_rehearsal else "What only a GPU can show"
        lines = [f"# {title}", "", *([f"**{_REHEARSED}**", ""] if self._is_rehearsal else [])]
        lines += [f"{seconds:.0f} of {self._total_s:g} s.", "", "| the machine | |", "|---|---|"]
        lines += [f"| {name} | {_text(value)} |" for name, value in self._facts.items()]
        lines += ["", "| part | shows | came out | n | s | figures |", "|---|---|---|---|---|---|"]
        for one in self._outcomes:
            cells = [one.name, one.shows, one.status, str(one.n), f"{one.seconds:.0f}", one.summary.replace("|", "\\|")]
            lines.append(f"| {' | '.join(cells)} |")
        for one in self._outcomes:
            if one.output:
                lines += [
                    "",
                    f"## {one.name}",
                    "",
                    f"`{one.command}`",
                    "",
                    "```",
                    one.output.replace("```", "'''"),
                    "```",
                ]
        return "\n".join(lines) + "\n"


def facts() -> dict[str, Any]:
    """Describe the cards, their driver, the processor, and the versions of everything that computes."""
    on_gpu = torch.cuda.is_available()
    return {
        "cards": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        "driver and limits": _nvidia_smi(),
        "cuda": torch.version.cuda if on_gpu else None,
        "cudnn": torch.backends.cudnn.version() if on_gpu else None,
        "nccl": ".".join(map(str, torch.cuda.nccl.version())) if on_gpu else None,
        "time": time.strftime("%Y-%m-%d %H:%M:%S %z"),
        **hardware(),
    }


def _nvidia_smi() -> list[str]:
    """Return the driver's version, memory, clock and power limit of each card, as nvidia-smi prints them."""
    program = shutil.which("nvidia-smi")
    if not program:
        return []
    query = "--query-gpu=driver_version,memory.total,clocks.max.sm,power.limit"
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        answer = subprocess.run([program, query, "--format=csv,noheader"], capture_output=True, text=True, timeout=20)
        return answer.stdout.splitlines()
    return []


def end_with_children(process: "subprocess.Popen[bytes]") -> None:
    """Kill a process and all that it has started, ranks in sessions of their own, too; wait for it."""
    started: list[psutil.Process] = []
    with contextlib.suppress(psutil.NoSuchProcess):
        started = psutil.Process(process.pid).children(recursive=True)
    for one in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.kill()
    process.wait()


def _text(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {part}" for name, part in value.items() if part not in ("", None, []))
    return "; ".join(map(str, value)) if isinstance(value, list) else str(value if value is not None else "-")
