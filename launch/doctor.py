"""Check, before a run, this machine or every rank of a launch.

    shardstep doctor [RECIPE] [section.key=value ...] [--json] [--timeout S] [--measure]
    torchrun --nproc-per-node 2 launch/doctor.py [RECIPE] [section.key=value ...]
    accelerate launch --multi_gpu --num_processes 2 launch/doctor.py [RECIPE] [section.key=value ...]

Start it in the same way as the run, with the same recipe: it takes one step of it. It writes nothing to the run's folder.
It exits with 1 if something would break a run. Each finding comes with a fix.
"""

if __name__ == "__main__":
    from shardstep.launch.entry import end_at_interrupt

    end_at_interrupt()

import argparse
import contextlib
import dataclasses
import json
import sys
import textwrap
from typing import TYPE_CHECKING, Any

from shardstep.configs.cores import Cores
from shardstep.configs.errors import InputError
from shardstep.configs.load import LoadedRecipe, is_override, load_recipe, recipe_names
from shardstep.configs.text import count, table
from shardstep.launch.cli import FAILED, run_script
from shardstep.trainer.distributed import launch_env

if TYPE_CHECKING:
    from shardstep.trainer.doctor.session import DoctorReport

_DEFAULT = "quickstart"
_MOST_ROWS = 32  # of the table of ranks
_INDENT = 13  # columns for labels


def main(arguments: list[str]) -> int:
    """Run the checks and print the report; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep doctor",
        description="Check this machine, or every rank of a launch. Start it in the same way as the run.",
        epilog=f"With a recipe, it takes one step. Recipes: {', '.join(recipe_names())}.",
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for `shardstep train`")
    parser.add_argument("--json", action="store_true", help="print one JSON object: facts, ranks, findings")
    longest = "seconds that each wait may take (default: 60)"
    parser.add_argument("--timeout", type=_seconds, default=60.0, metavar="S", help=longest)
    anew = "measure again which precision, layout and convolutions of this recipe are fastest here, and keep the answer"
    parser.add_argument("--measure", action="store_true", help=anew)
    args = parser.parse_intermixed_args(arguments)
    if args.recipe and is_override(args.recipe):
        args.overrides.insert(0, args.recipe)
        args.recipe = _DEFAULT
    if args.measure and not args.recipe:
        raise InputError("--measure measures steps of a recipe: give one")
    loaded = _load(args.recipe or _DEFAULT, args.overrides)

    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
            from shardstep.trainer.doctor.session import run_preflight

            report = stack.enter_context(run_preflight(loaded, args.recipe is not None, args.timeout, args.measure))
        if report.prints == "report":
            print(_as_json(report), flush=True) if args.json else _print(report)
        elif report.prints == "findings":
            for finding in report.findings:
                print(f"{finding.severity}: {finding.what}\n  fix: {finding.remedy}", file=sys.stderr, flush=True)
    return FAILED if report.errors else 0


def _load(name: str, overrides: list[str]) -> LoadedRecipe | InputError:
    """Read the recipe. If it does not exist: raises for a single process, but in a launch it may be missing on one host."""
    try:
        return load_recipe(name, overrides)
    except InputError as error:
        if not launch_env.is_launched():
            raise
        return error


def _seconds(text: str) -> float:
    with contextlib.suppress(ValueError):
        if 0 < float(text) < 10**6:
            return float(text)
    raise argparse.ArgumentTypeError(f"{text!r} is not a number of seconds above 0")


def _as_json(report: "DoctorReport") -> str:
    """Return the report as one object; a rank's entry includes its speed."""
    ranks = [dataclasses.asdict(rank) for rank in report.ranks]
    for row in ranks:
        del row["findings"]
        if row["rank"] in report.speeds:
            row |= dataclasses.asdict(report.speeds[row["rank"]])
    findings = [
        {"severity": finding.severity, "check": finding.check, "what": finding.what, "cure": finding.remedy}
        for finding in report.findings
    ]
    return json.dumps({"errors": report.errors, "facts": report.facts, "ranks": ranks, "findings": findings})


def _print(report: "DoctorReport") -> None:
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def line(label: str, text: str, style: str = "") -> None:
        """Print a label and, beside it, wrapped text."""
        wrapped = textwrap.wrap(text, max(console.width - _INDENT, 20), break_on_hyphens=False) or [""]
        for number, part in enumerate(wrapped):
            start = "" if number else f"  {label}"
            console.print(Text(f"{start:<{_INDENT}}", style) + Text(part, ""), soft_wrap=True)

    console.print(Text(f"shardstep {report.facts['versions']['shardstep']} doctor on {report.facts['host']}"))
    for label, text in _fact_lines(report):
        line(label, text)
    for row in ["", *_rank_table(report)]:
        console.print(Text(row), soft_wrap=True)
    for finding in report.findings:
        console.print()
        style = "bold red" if finding.severity == "error" else "yellow"
        line(finding.severity, f"{finding.check}: {finding.what}", style)
        line("fix", finding.remedy)
    console.print()
    warnings = len(report.findings) - report.errors
    also = f"; {count(warnings, 'warning')}" if warnings else ""
    verdict = f"{count(report.errors, 'error') if report.errors else 'nothing'} would break a run{also}"
    console.print(Text(verdict, "bold red" if report.errors else "bold green"))


def _fact_lines(report: "DoctorReport") -> list[tuple[str, str]]:
    facts = report.facts
    cpu, gpus = facts["cpu"], facts["gpus"]
    versions = ", ".join(f"{name} {number}" for name, number in facts["versions"].items() if name != "shardstep")
    bf16 = f"bf16 units ({cpu['bf16_units']})" if cpu["bf16_units"] else "no bf16 units: fp32 is faster than bf16"
    shm = "none" if facts["shm_bytes"] is None else _size(facts["shm_bytes"])
    kinds = ", ".join(f"{gpus.count(name)} x {name}" for name in dict.fromkeys(gpus)) or "no GPU"
    recipe = facts.get("recipe")
    lines = [
        ("versions", versions),
        ("processor", ", ".join(filter(None, (cpu["name"], cpu["vectors"], bf16)))),
        ("cores", str(Cores(**facts["cores"]))),
        ("threads", _threads(facts["threads"])),
        ("memory", f"{_size(facts['memory_bytes'])}, /dev/shm {shm}"),
        ("devices", f"{kinds}; {', '.join(facts['backends'])}"),
        ("world", _world(report)),
        ("recipe", f"{recipe['name']}, sha256 {recipe['sha256'][:12]}" if recipe else ""),
        ("data", _data(facts)),
        ("disk", _disk(facts["disk"]) if "disk" in facts else ""),
        ("step", _step(facts["step"]) if "step" in facts else facts.get("no_step", "")),
        ("formats", facts.get("step", {}).get("measured") or ""),
    ]
    return [(label, text) for label, text in lines if text]


def _threads(threads: dict[str, Any]) -> str:
    limit = f": {threads['limit']}" if threads["limit"] else ""
    return f"{threads['count']} a rank{limit}"


def _data(facts: dict[str, Any]) -> str:
    if "data" in facts:
        sets = [facts["data"][split] for split in ("train", "validation", "test") if split in facts["data"]]
        train, images = sets[0], " + ".join(f"{one['samples']:,}" for one in sets)
        shape = "x".join(map(str, train["image_shape"][::-1])) if train["image_shape"] else "of several sizes"
        return (
            f"{images} images {shape} in {count(train['classes'], 'class', 'classes')}, {facts['data']['mode']}; "
            f"{', '.join(one['folder'] for one in sets)}"
        )
    if "no_data" in facts:
        missing, source = ", ".join(facts["no_data"]["missing"]), facts["no_data"]["source"]
        return f"missing: {missing}; training writes them from {source}" if source else f"missing: {missing}"
    return ""


def _disk(disk: dict[str, Any]) -> str:
    files = "" if disk["inodes"] is None else f" and {disk['inodes']:,} files"
    needs = f"; {disk['checkpoints']} checkpoints of {_size(disk['checkpoint_bytes'])}"
    return f"{_size(disk['bytes'])}{files} free for {disk['folder']}{needs if disk['checkpoint_bytes'] else ''}"


def _step(step: dict[str, Any]) -> str:
    peak = f", {_size(step['gpu_peak_bytes'])} of GPU memory" if step["gpu_peak_bytes"] else ""
    return (
        f"{step['samples']:,} samples in {step['seconds']:.2g} s, the first, after {step['setup_s']:.2g} s of setup; "
        f"{step['precision']}, {step['memory_format']}, {step['parameters']:,} parameters{peak}"
    )


def _world(report: "DoctorReport") -> str:
    first = report.ranks[0]
    hosts = len({rank.host for rank in report.ranks})
    if first.world_size == 1:
        return "1 rank"
    size = f"{len(report.ranks)} of {count(first.world_size, 'rank')} on {count(hosts, 'host')}"
    way = f" through {first.interface}" if first.interface else ""
    return f"{size}, meeting at {first.launch['MASTER_ADDR']}:{first.launch['MASTER_PORT']}{way}"


def _rank_table(report: "DoctorReport") -> list[str]:
    rows = []
    for rank in report.ranks[:_MOST_ROWS]:
        speed = report.speeds.get(rank.rank)
        figures = [_figure(speed.fp32_gflops), _figure(speed.bf16_gflops)] if speed else ["-", "-"]
        moved = f"{_figure(speed.all_reduce_mb_s)} MB/s" if speed and speed.all_reduce_mb_s else "-"
        rows.append([str(rank.rank), rank.host, rank.device, str(rank.cores), str(rank.threads), *figures, moved])
    columns = ("rank", "host", "device", "cores", "threads", "GFLOP/s fp32", "bf16", "all-reduce")
    lines = [f"  {line}" for line in table(columns, rows, gap="  ")]
    left = len(report.ranks) - _MOST_ROWS
    return [*lines, f"  and {left:,} more; --json has all"] if left > 0 else lines


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


if __name__ == "__main__":
    run_script(main)
