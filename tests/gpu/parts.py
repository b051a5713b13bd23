"""What is run on a GPU, ordered by worth, and how the figures are read from what each part prints and writes."""

import json
import re
import statistics
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.conftest import ROOT
from tests.gpu.conftest import REHEARSAL

_CUT = "the part was ended before it had figures"


@dataclass(frozen=True)
class Found:
    """The figures of a part: how many of what was measured, one line for the table, and everything for the JSON file."""

    n: int
    summary: str
    figures: Any = None


@dataclass(frozen=True)
class Part:
    """Something to run.

    Attributes:
        shows: what it shows, as a phrase.
        limit_s: the most that it may take.
        command: after the interpreter.
        read: takes what it printed, also if it was ended early.
        environment: variables beside those of this process.
        folder: where it runs.
    """

    name: str
    shows: str
    limit_s: float
    command: list[str]
    read: Callable[[str], Found]
    environment: dict[str, str] = field(default_factory=dict)
    folder: Path = ROOT


def parts(scratch: Path, is_rehearsal: bool) -> list[Part]:
    """Return the parts for a GPU, or the same as small as they can be for a rehearsal on a CPU."""

    def sized(on_gpu: list[str], on_cpu: list[str]) -> list[str]:
        return on_cpu if is_rehearsal else on_gpu

    def bench(name: str, on_gpu: list[str], on_cpu: list[str]) -> list[str]:
        return [*shardstep, "bench", name, *sized(on_gpu, on_cpu), "--json", str(scratch / f"{name}.json")]

    def same(name: str, shows: str, limit: str, *overrides: str, **environment: str) -> Part:
        options = sized(["--devices", "cpu,cuda", "--tolerance", limit], ["--ranks", "1,2", "--steps", "2"])
        command = [*shardstep, "same", "smoke", *overrides, "train.device=auto", *options]
        return Part(name, f"{shows}, to {limit}", 60, command, read_same, environment, scratch)

    shardstep = ["-c", "import sys; from shardstep.launch.cli import main; sys.exit(main())"]
    pytest = ["-m", "pytest", "-v", "-m", "gpu", "-W", "default", "-p", "no:cacheprovider", str(ROOT / "tests" / "gpu")]
    # Libraries of other versions than those of the lock file may warn.
    quiet = {"PYTHONWARNINGS": "default"} | ({REHEARSAL: "1"} if is_rehearsal else {})
    sgd = ("optimizer.name=sgd", "optimizer.lr=0.05")
    convolutions = ("model.name=article_cnn", "model.dropout=0", *sgd)
    tiny_record = ["smoke", "train.duration=2 steps", "train.global_batch_size=50"]
    return [
        Part("tests", "every test marked gpu passes", 200, pytest, read_tests, quiet),
        Part(
            "record", "CIFAR-10 to 94 % by speedrun94, beside a script of the published method", 300,
            bench("record", ["speedrun94", "--script", "--runs", "20"], [*tiny_record, "--script", "--runs", "1"]),
            lambda printed: read_record(printed, scratch / "record.json"), folder=scratch if is_rehearsal else ROOT,
        ),
        same("same: mlp", "fp32 on a GPU trains as on a CPU", "1e-5", "model.name=mlp", *sgd),
        same("same: convolutions", "so do convolutions without TF32", "1e-4", *convolutions, NVIDIA_TF32_OVERRIDE="0"),
        Part(
            "step", "the article's net beside a bare PyTorch loop", 90,
            bench("step", ["--batches", "16", "256", "--images", "20000", "--repeats", "5"],
                  ["--batches", "8", "--images", "16", "--precision", "fp32", "--repeats", "1"]),
            lambda printed: read_tables(scratch / "step.json"), folder=scratch,
        ),
        same("same: TF32", "convolutions in TF32, torch's default, stay near", "2e-2", *convolutions),
        Part(
            "loader", "the loaders on a core of this machine", 60,
            bench("loader", ["--samples", "2000", "--jpegs", "100", "--repeats", "3"],
                  ["--samples", "40", "--jpegs", "4", "--repeats", "1"]),
            lambda printed: read_tables(scratch / "loader.json"), folder=scratch,
        ),
    ]  # fmt: skip


def read_tests(printed: str) -> Found:
    """Read the outcome of each test that pytest -v has reached."""
    outcomes = dict(
        re.findall(r"^tests/gpu/\w+\.py::(.+) (PASSED|FAILED|ERROR|SKIPPED)\b", printed, flags=re.MULTILINE)
    )
    counts = {kind: list(outcomes.values()).count(kind) for kind in dict.fromkeys(outcomes.values())}
    bad = [name for name, outcome in outcomes.items() if outcome in ("FAILED", "ERROR")]
    summary = ", ".join(f"{number} {kind.lower()}" for kind, number in counts.items())
    return Found(len(outcomes), (summary or _CUT) + (f": {'; '.join(bad)}" if bad else ""), outcomes)


def read_record(printed: str, path: Path) -> Found:
    """Read accuracy and seconds of each run, those of a benchmark that was ended early, too."""
    runs: dict[str, list[dict[str, float]]] = {}
    for name, seed, accuracy, seconds in re.findall(
        r"^(.+), seed (\d+): ([\d.]+) %, ([\d.]+) s$", printed, re.MULTILINE
    ):
        runs.setdefault(name, []).append({"seed": int(seed), "accuracy": float(accuracy), "seconds": float(seconds)})
    texts = []
    for name, of in runs.items():
        accuracies, times = ([run[key] for run in of] for key in ("accuracy", "seconds"))
        spread = f" ± {statistics.stdev(accuracies) / len(of) ** 0.5:.2f}" if len(of) > 1 else ""
        times_s = f"{statistics.median(times):.1f} s ({min(times):.1f} to {max(times):.1f})"
        texts.append(f"{name}: {statistics.mean(accuracies):.2f}{spread} % in {times_s}, n = {len(of)}")
    tables = read_tables(path).figures
    return Found(min(map(len, runs.values()), default=0), "; ".join(texts) or _CUT, {"runs": runs, "bench": tables})


def read_same(printed: str) -> Found:
    """Read the largest relative differences."""
    rows = re.findall(r"^(\S+) +([\d.e+-]+|inf) +([\d.e+-]+|inf) +([\d.e+-]+|inf) +(\S+)$", printed, flags=re.MULTILINE)
    gaps = {
        name: {"loss": float(loss), "gradient norm": float(norm), "weights": float(weights), "differs at step": step}
        for name, loss, norm, weights, step in rows
    }
    texts = [f"{name}: loss {gap['loss']:g}, weights {gap['weights']:g}" for name, gap in gaps.items()]
    return Found(len(gaps), "; ".join(texts) or _CUT, gaps)


def read_tables(path: Path) -> Found:
    """Read the tables that a benchmark has written so far."""
    if not path.exists():
        return Found(0, _CUT)
    found = json.loads(path.read_text())
    rows = [row for table in found["tables"] for row in table["rows"]]
    best = [
        f"{row['name']}: {row['median']:,.4g} {table['unit']}, {row['ratio']:.2f} of {table['reference']}"
        for table in found["tables"][:2] for row in table["rows"] if row["name"] == "shardstep"
    ]  # fmt: skip
    return Found(len(rows[0]["values"]), "; ".join(best) or f"{len(rows)} rows in {len(found['tables'])} tables", found)
