"""Make one HTML page of a run, or of several side by side.

    shardstep report RUN ... [--out FILE] [--device auto|cpu|cuda]

The page is one file: it needs no network and runs no script. The predictions for the test set are computed once and kept in
the run's folder. Running, stopped and failed runs have a page too; it says what could not be shown, and why.
"""

import argparse
from datetime import datetime
from pathlib import Path

from shardstep.configs.errors import InputError
from shardstep.configs.files import check_output_file, write_atomically
from shardstep.configs.text import count, printable
from shardstep.launch.cli import run_script
from shardstep.launch.trust import add_trust_option, trust_if_asked


def main(arguments: list[str]) -> int:
    """Make the page; return the exit code."""
    parser = argparse.ArgumentParser(prog="shardstep report", description="Make one HTML page of runs.")
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run's folder")
    parser.add_argument("--out", type=Path, help="the page (default: report.html, in the folder of a single run)")
    parser.add_argument("--device", choices=["auto", "cpu", "cuda"], default="auto", help="(default: auto)")
    add_trust_option(parser)
    args = parser.parse_args(arguments)
    out = args.out or (args.runs[0] if len(args.runs) == 1 else Path()) / "report.html"
    check_output_file("--out", out)

    from shardstep.trainer.analysis.pages.run_page import report_page
    from shardstep.trainer.analysis.run_analysis import analyse_run
    from shardstep.trainer.analysis.run_record import check_comparable, read_record
    from shardstep.trainer.analysis.trained_model import find_device

    find_device(args.device)
    trust_if_asked(args)
    problems, records = [], []
    first_named: dict[Path, Path] = {}
    for folder in args.runs:
        first = first_named.setdefault(folder.resolve(), folder)
        try:
            if first is not folder:
                raise InputError(f"{first} and {folder} are the same folder: give each run once")
            records.append(read_record(folder))
        except InputError as error:
            problems.append(str(error))
    if problems:
        raise InputError.from_problems("no report", problems)
    check_comparable(records)
    analyses = [analyse_run(record, args.device) for record in records]
    for one in analyses:
        for reason in one.left_out:
            print(printable(f"{one.record.folder}: left out: {reason}"))
    content = report_page(analyses, datetime.now().astimezone()).encode()
    write_atomically(out, content)
    print(printable(f"{out}: {count(len(analyses), 'run')}, {len(content) / 1000:,.0f} kB in one file"))
    return 0


if __name__ == "__main__":
    run_script(main)
