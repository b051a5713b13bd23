"""Benchmark works to tables: measured in turn in one session, medians with ranges, ratios of pairs, as text and JSON.

Machines differ and are noisy. Works that are measured in turn see the same load, so the ratio of two that ran side by side
says more than either figure.
"""

import argparse
import json
import resource
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import import_module, metadata
from pathlib import Path
from textwrap import fill
from typing import Any, TextIO

from shardstep.configs.cores import usable_cores
from shardstep.configs.files import write_atomically
from shardstep.configs.text import table as text_table

_OTHER_LIBRARIES = ("lightning", "litdata", "mosaicml-streaming", "numpy", "opencv-python-headless", "pillow")
_LONG_REPEAT_S = 3  # from here on, progress is printed


@dataclass(frozen=True)
class Table:
    """The result of a benchmark.

    Attributes:
        rows: name of a work -> its values, one per repeat, in the order of the repeats.
        reference: the row that the others are divided by.
        notes: lines to print below, such as what was left out and why.
    """

    title: str
    unit: str
    rows: dict[str, list[float]]
    reference: str
    notes: list[str] = field(default_factory=list)


def whole_number(text: str) -> int:
    """Parse an option's value as a whole number from 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number from 1")
    return int(text)


def importable(library: str) -> bool:
    """Check whether a library is installed and can be imported."""
    try:
        import_module(library)
    except ImportError:
        return False
    return True


def in_turn(works: Mapping[str, Callable[[], float]], repeats: int) -> dict[str, list[float]]:
    """Measure works: call each once to warm up, then all in turn `repeats` times. Return the values by name."""
    values: dict[str, list[float]] = {name: [] for name in works}
    for repeat in range(repeats + 1):
        began = time.perf_counter()
        found = {name: work() for name, work in works.items()}
        took = time.perf_counter() - began
        if took >= _LONG_REPEAT_S:
            which = f"repeat {repeat} of {repeats}" if repeat else "warm-up repeat"
            print(f"{which}: {took:.0f} s", file=sys.stderr, flush=True)
        if repeat:
            for name, value in found.items():
                values[name].append(value)
    return values


def cpu_seconds() -> float:
    """Return the CPU time of this process and of those it has waited for: a clock for a core that others use too."""
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


CLOCKS: dict[str, Callable[[], float]] = {"wall": time.perf_counter, "cpu": cpu_seconds}


def add_clock_option(parser: argparse.ArgumentParser) -> None:
    """Add --clock, which lets a benchmark on one core count CPU time, not the time when others have the core."""
    text = "cpu: for a busy machine (default: %(default)s)"
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help=text)


def per_second(work: Callable[[], int], clock: str = "wall") -> Callable[[], float]:
    """Turn a work that returns a count into one that returns the count per second."""
    now = CLOCKS[clock]

    def measured() -> float:
        began = now()
        done = work()
        return done / (now() - began)

    return measured


def seconds(work: Callable[[], object], clock: str = "wall") -> Callable[[], float]:
    """Turn a work into one that returns its seconds."""
    now = CLOCKS[clock]

    def measured() -> float:
        began = now()
        work()
        return now() - began

    return measured


def paired_ratios(table: Table, row: str) -> list[float]:
    """Divide each value of a row by the reference's value of the same repeat."""
    return [value / base for value, base in zip(table.rows[row], table.rows[table.reference], strict=True)]


def standard_error(values: list[float]) -> float | None:
    """Return the standard error of the mean; None for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None


def print_table(table: Table, out: TextIO) -> None:
    """Print a table: median, range, and the median ratio of pairs with its range.

    On a narrow terminal figures are below their names.
    """
    columns = shutil.get_terminal_size().columns if out.isatty() else None
    cells = [[f"  {name}", *_cells(values), *_cells(paired_ratios(table, name))] for name, values in table.rows.items()]
    heads = ["", table.unit, "range", "ratio", "range"]
    lines = text_table(heads, cells, gap="  ")
    if columns is not None and columns < len(lines[0]):
        head, rule, *figures = text_table(["  ", *heads[1:]], [["  ", *row[1:]] for row in cells])
        lines = [head, rule, *(line for row, line in zip(cells, figures, strict=True) for line in (row[0], line))]
    lines += [f"  ratio: to {table.reference!r}; n = {len(table.rows[table.reference])}"]
    lines += [f"  {note}" for note in table.notes]
    for line in ["", table.title, *lines]:
        print(fill(line, columns, subsequent_indent="    ") if columns and line.strip() else line, file=out)


def _cells(values: list[float]) -> list[str]:
    """Format the median and the range."""
    return [_figure(statistics.median(values)), f"{_figure(min(values))} to {_figure(max(values))}"]


def report(command: str, tables: Iterable[Table], json_path: str | None) -> None:
    """Print each table once it is measured, and write all as JSON to a file, or to stdout for `-`.

    The file is written from the first table on. With `-` the text goes to stderr, so that stdout has only JSON.
    """
    found: dict[str, Any] = {}
    out = sys.stderr if json_path == "-" else sys.stdout
    for table in tables:
        if not found:
            found = {"command": command, **hardware(), "tables": []}
            print(_machine_line(found), file=out)
        found["tables"].append(as_json(table))
        if json_path not in (None, "-"):
            write_atomically(Path(json_path), (json.dumps(found, indent=1) + "\n").encode())
        print_table(table, out)
        out.flush()
    if json_path == "-":
        print(json.dumps(found, indent=1))


def as_json(table: Table) -> dict[str, Any]:
    """Return a table as JSON."""
    rows = []
    for name, values in table.rows.items():
        ratios = paired_ratios(table, name)
        rows.append({
            "name": name,
            "values": values, "median": statistics.median(values), "lowest": min(values), "highest": max(values),
            "mean": statistics.mean(values), "standard_error": standard_error(values),
            "ratio": statistics.median(ratios), "ratio_lowest": min(ratios), "ratio_highest": max(ratios),
        })  # fmt: skip
    return asdict(table) | {"repeats": len(table.rows[table.reference]), "rows": rows}


def hardware() -> dict[str, Any]:
    """Describe the machine of the figures: `hardware` and `versions`."""
    import torch

    from shardstep.trainer import machine

    cpu = machine.read_cpu()
    found = machine.versions()
    for name in _OTHER_LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return {
        "hardware": {
            "cpu": cpu.name,
            "vectors": cpu.vectors,
            "bf16_units": cpu.bf16_units,
            "cores": usable_cores().count,
            "threads": torch.get_num_threads(),
            "memory_gb": round(machine.memory_bytes() / 1e9),
            "gpus": [torch.cuda.get_device_name(number) for number in range(torch.cuda.device_count())],
        },
        "versions": found,
    }


def _machine_line(machine: dict[str, Any]) -> str:
    has, versions = machine["hardware"], machine["versions"]
    units = f", bf16 units: {has['bf16_units']}" if has["bf16_units"] else ", no bf16 units"
    return (
        f"{has['cpu']} ({has['vectors']}{units}), {has['cores']} cores, {has['threads']} threads, "
        f"GPUs: {', '.join(has['gpus']) or 'none'}; Python {versions['python']}, torch {versions['torch']}"
    )


def _figure(value: float) -> str:
    if value >= 100:
        return f"{value:,.0f}"
    return f"{value:.2f}" if value >= 1 else f"{value:.3f}"
