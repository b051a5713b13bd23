"""Look whether a run would go well here: on this machine, or on every rank of a launch.

    shardstep doctor [RECIPE] [section.key=value ...] [--json] [--timeout S]
    torchrun --nproc-per-node 2 launch/doctor.py [RECIPE] [section.key=value ...]
    accelerate launch --multi_gpu --num_processes 2 launch/doctor.py [RECIPE] [section.key=value ...]

Start it as the run is to be started, with the same recipe: one step of it is taken. Nothing is written to the run's folder.
Ends with 1 if something would break a run; each such finding comes with its cure.
"""

import argparse
import contextlib
import dataclasses
import json
import sys
import textwrap
from typing import Any

from shardstep.configs.errors import InputError
from shardstep.configs.load import LoadedRecipe, is_override, load_recipe, recipe_names
from shardstep.launch.cli import FAILED, leave
from shardstep.launch.cli import run as run_command
from shardstep.trainer.distributed import launch_env

_DEFAULT = "quickstart"
_MOST_ROWS = 32  # of the table of ranks
_INDENT = 13  # of texts beside their labels


def main(arguments: list[str]) -> int:
    """Look, and print what was found; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="shardstep doctor",
        description="Look whether a run would go well here. Start it as the run is to be started.",
        epilog=f"recipes: {', '.join(recipe_names())}. With one, a step of it is taken.",
    )
    parser.add_argument("recipe", nargs="?", help="a YAML file, or the name of a recipe")
    parser.add_argument("overrides", nargs="*", metavar="section.key=value", help="as for `shardstep train`")
    parser.add_argument("--json", action="store_true", help="print one JSON object: facts, ranks, findings")
    parser.add_argument(
        "--timeout", type=_seconds, default=60.0, metavar="S", help="seconds that each wait may take (default: 60)"
    )
    args = parser.parse_intermixed_args(arguments)
    if args.recipe and is_override(args.recipe):
        args.overrides.insert(0, args.recipe)
        args.recipe = _DEFAULT
    loaded = _load(args.recipe or _DEFAULT, args.overrides)

    with contextlib.ExitStack() as stack:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for the report alone
            from shardstep.trainer.doctor.session import check_up

            report = stack.enter_context(check_up(loaded, args.recipe is not None, args.timeout))
        if report.voice == "report":
            print(_as_json(report), flush=True) if args.json else _print(report)
        elif report.voice == "findings":
            for finding in report.findings:
                print(f"{finding.severity}: {finding.what}\n  cure: {finding.cure}", file=sys.stderr, flush=True)
    return FAILED if report.errors else 0


def _load(name: str, overrides: list[str]) -> LoadedRecipe | InputError:
    """The recipe. That there is none is bad input where one process asks; in a launch it may be the trouble of one host."""
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


def _as_json(report: "DoctorReport") -> str:  # type: ignore[name-defined] # noqa: F821
    """The report as one object; a rank's row has what it measured, too."""
    ranks = [dataclasses.asdict(record) for record in report.records]
    for row in ranks:
        row |= dataclasses.asdict(report.speeds[row["rank"]]) if row["rank"] in report.speeds else {}
        del row["findings"]
    findings = [dataclasses.asdict(finding) for finding in report.findings]
    return json.dumps({"errors": report.errors, "facts": report.facts, "ranks": ranks, "findings": findings})


# --- for people -------------------------------------------------------------------------------------------------------


def _print(report: "DoctorReport") -> None:  # type: ignore[name-defined] # noqa: F821
    from rich.console import Console
    from rich.text import Text

    console = Console(highlight=False)

    def line(label: str, text: str, style: str = "") -> None:
        """A label and, beside it, text of as many lines as it needs."""
        wrapped = textwrap.wrap(text, max(console.width - _INDENT, 20), break_on_hyphens=False) or [""]
        for number, part in enumerate(wrapped):
            start = "" if number else f"  {label}"
            console.print(Text(f"{start:<{_INDENT}}", style) + Text(part, ""), soft_wrap=True)

    console.print(Text(f"shardstep {report.facts['versions']['shardstep']} doctor on {report.facts['host']}"))
    for label, text in _fact_lines(report):
        line(label, text)
    console.print()
    console.print(_rank_table(report))
    for finding in report.findings:
        console.print()
        line(
            finding.severity,
            f"{finding.check}: {finding.what}",
            "bold red" if finding.severity == "error" else "yellow",
        )
        line("cure", finding.cure)
    console.print()
    console.print(Text(_verdict(report), "bold red" if report.errors else "bold green"))


def _verdict(report: "DoctorReport") -> str:  # type: ignore[name-defined] # noqa: F821
    warnings = len(report.findings) - report.errors
    beside = f"; {_count(warnings, 'warning')}" if warnings else ""
    return f"{_count(report.errors, 'error') if report.errors else 'nothing'} would break a run{beside}"


def _fact_lines(report: "DoctorReport") -> list[tuple[str, str]]:  # type: ignore[name-defined] # noqa: F821
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
        ("memory", f"{_size(facts['memory_bytes'])}, /dev/shm {shm}"),
        ("devices", f"{kinds}; {', '.join(facts['backends'])}"),
        ("world", _world(report)),
        ("recipe", f"{recipe['name']}, sha256 {recipe['sha256'][:12]}" if recipe else ""),
        ("data", _data(facts)),
        ("disk", _disk(facts["disk"]) if "disk" in facts else ""),
        ("step", _step(facts["step"]) if "step" in facts else facts.get("no_step", "")),
    ]
    return [(label, text) for label, text in lines if text]


def _data(facts: dict[str, Any]) -> str:
    if "data" in facts:
        train, test = facts["data"]["train"], facts["data"]["test"]
        shape = "x".join(map(str, train["image_shape"][::-1])) if train["image_shape"] else "of several sizes"
        return (
            f"{train['samples']:,} + {test['samples']:,} images {shape} in {_count(train['classes'], 'class')}, "
            f"{facts['data']['mode']}; {train['folder']}, {test['folder']}"
        )
    if "no_data" in facts:
        source = facts["no_data"]["source"]
        return (
            f"not there yet: {', '.join(facts['no_data']['missing'])}{f', to be made from {source}' if source else ''}"
        )
    return ""


def _disk(disk: dict[str, Any]) -> str:
    files = "" if disk["inodes"] is None else f" and {disk['inodes']:,} files"
    needs = f"; {disk['checkpoints']} checkpoints of {_size(disk['checkpoint_bytes'])}"
    return f"{_size(disk['bytes'])}{files} free for {disk['folder']}{needs if disk['checkpoint_bytes'] else ''}"


def _step(step: dict[str, Any]) -> str:
    peak = f", {_size(step['gpu_peak_bytes'])} of GPU memory" if step["gpu_peak_bytes"] else ""
    return (
        f"{step['samples']:,} samples in {step['seconds']:.2g} s, the first, after {step['setup_s']:.2g} s of setting up; "
        f"{step['precision']}, {step['memory_format']}, {step['parameters']:,} parameters{peak}"
    )


def _world(report: "DoctorReport") -> str:  # type: ignore[name-defined] # noqa: F821
    first = report.records[0]
    hosts = len({record.host for record in report.records})
    size = f"{len(report.records)} of {_count(first.world_size, 'rank')} on {_count(hosts, 'host')}"
    if first.world_size == 1:
        return "1 rank"
    way = f" through {first.interface}" if first.interface else ""
    return f"{size}; they meet at {first.launch['MASTER_ADDR']}:{first.launch['MASTER_PORT']}{way}"


def _rank_table(report: "DoctorReport") -> Any:  # type: ignore[name-defined] # noqa: F821
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for name in ("  rank", "host", "device", "cores", "threads", "GFLOP/s fp32", "bf16", "all-reduce"):
        table.add_column(name, justify="left" if name in ("host", "device") else "right", overflow="fold")
    for record in report.records[:_MOST_ROWS]:
        speed = report.speeds.get(record.rank)
        figures = [_figure(speed.fp32_gflops), _figure(speed.bf16_gflops)] if speed else ["-", "-"]
        moved = f"{_figure(speed.all_reduce_mb_s)} MB/s" if speed and speed.all_reduce_mb_s else "-"
        row = (str(record.rank), record.host, record.device, str(record.cores), str(record.threads), *figures, moved)
        table.add_row(*map(Text, row))
    if len(report.records) > _MOST_ROWS:
        table.add_row("", Text(f"and {len(report.records) - _MOST_ROWS} more; --json has all"))
    return table


def _figure(value: float) -> str:
    return f"{value:,.0f}" if value >= 10 else f"{value:.1f}"


def _size(num_bytes: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if num_bytes < 1000:
            return f"{num_bytes:.3g} {unit}"
        num_bytes /= 1000
    return f"{num_bytes:,.3g} TB"


def _count(number: int, noun: str) -> str:
    if number == 1:
        return f"1 {noun}"
    return f"{number:,} {noun}{'es' if noun.endswith('s') else 's'}"


if __name__ == "__main__":
    leave(run_command(main, sys.argv[1:]))
