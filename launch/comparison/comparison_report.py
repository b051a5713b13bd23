"""The report of a comparison: a table for the terminal, results.json, plots, a page, and a document."""

import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from shardstep.configs.files import write_atomically
from shardstep.configs.text import count, table
from shardstep.launch.comparison.comparison_page import ComparisonReport, document, page
from shardstep.launch.comparison.comparison_plots import PLOTS
from shardstep.launch.comparison.planned_runs import Comparison
from shardstep.launch.comparison.results import EXPLODED, RunResult, Variant, final_accuracy, measure_of
from shardstep.launch.comparison.significance import CONFIDENCE, compare_groups, mean_interval, sentences

_WIDTH = 80  # of a terminal
_TARGET_SHARE = 0.9  # of the best mean accuracy, where no target is given


def write_report(comparison: Comparison, variants: list[Variant], doc: Path | None) -> list[Path]:
    """Print the table with its notes; write table.txt, results.json, report.html, the plots, and the document."""
    target = comparison.target if comparison.target is not None else default_target(variants)
    report = make_report(comparison, variants, target)
    folder = comparison.folder
    if doc:
        doc.parent.mkdir(parents=True, exist_ok=True)
    notes = [textwrap.fill(sentence, _WIDTH) for sentence in [*report.words, "", *report.notes]]
    text = "\n".join([*table(report.columns, report.rows), "", *notes])
    print(f"\n{text}\n")
    written = [folder / "table.txt", folder / "results.json", folder / "report.html"]
    write_atomically(written[0], f"{text}\n".encode())
    content = as_json(comparison, variants, target, report)
    write_atomically(written[1], (json.dumps(content, indent=1) + "\n").encode())
    svgs: dict[str, str] = {}
    for name in report.plots:
        stem = f"{doc.stem}-{name}" if doc else ""
        places = [folder / f"{name}.png", *([doc.with_name(f"{stem}.png")] if doc else [])]
        svgs[name] = PLOTS[name].draw(variants, target, report.tune, places)
        written += places
    write_atomically(written[2], page(report, svgs).encode())
    if doc:
        pictures = {name: f"{doc.stem}-{name}.png" for name in report.plots}
        write_atomically(doc, document(report, pictures).encode())
        written.append(doc)
    return written


def make_report(comparison: Comparison, variants: list[Variant], target: float | None) -> ComparisonReport:
    """Turn the results into the texts and tables of the report."""
    groups = {variant.name: variant.accuracies for variant in variants if variant.accuracies}
    ranked = sorted(variants, key=lambda v: -fmean(v.accuracies) if v.accuracies else math.inf)  # failures last
    rows = [_row(variant, target) for variant in ranked]
    used = [place for place in range(len(rows[0])) if any(row[place] for row in rows)]
    columns = _columns(target, comparison.tune, measure_of(variants))
    return ComparisonReport(
        title=f"{comparison.arguments[0]}: {', '.join(variant.name for variant in variants)}",
        command=comparison.command,
        facts=_facts(comparison, variants),
        columns=[columns[place] for place in used],
        rows=[[row[place] for place in used] for row in rows],
        tune=comparison.tune,
        search=_search_rows(variants) if comparison.tune else [],
        variants=[[variant.name, ", ".join(variant.overrides)] for variant in variants],
        words=sentences(groups, {variant.name: len(variant.seeds) for variant in variants}),
        notes=[*_notes(comparison, target, measure_of(variants)), *_complaints(variants)],
        plots={name: plot.caption for name, plot in PLOTS.items() if plot.has_content(variants)},
    )


def as_json(
    comparison: Comparison, variants: list[Variant], target: float | None, report: ComparisonReport
) -> dict[str, Any]:
    """Return results.json: settings, each run's curve, intervals, and all pairs with their tests."""
    groups = {variant.name: variant.accuracies for variant in variants if variant.accuracies}
    return {
        "comparison": comparison.as_json(),
        "facts": report.facts,
        "target": target,
        "confidence": CONFIDENCE,
        "variants": [
            variant.as_json()
            | {"accuracy": asdict(mean_interval(variant.accuracies)) if variant.accuracies else None}
            | {"to_target": [_cost(run, target) for run in variant.seeds.values()]}
            for variant in variants
        ],
        "pairs": [asdict(pair) | {"is_real": pair.is_real} for pair in compare_groups(groups)],
        "words": report.words,
    }


def default_target(variants: list[Variant]) -> float | None:
    """Return nine tenths of the best mean accuracy, rounded down to a per cent; None if no run has finished."""
    means = [fmean(variant.accuracies) for variant in variants if variant.accuracies]
    return math.floor(100 * _TARGET_SHARE * max(means)) / 100 if means else None


def _columns(target: float | None, tune: str, measure: str) -> list[str]:
    reaching, key = "target" if target is None else f"{100 * target:.4g} %", tune.rpartition(".")[2]
    return ["variant", "n", f"{measure} %", "s/epoch", "epochs", f"s to {reaching}", "steps", "B/param", key]


def _row(variant: Variant, target: float | None) -> list[str]:
    costs = [_cost(run, target) for run in variant.finished]
    return [
        variant.name,
        str(len(variant.accuracies)),
        final_accuracy(variant),
        _mean([run.seconds_per_epoch for run in variant.finished], _three_digits),
        _mean([run.last.epoch for run in variant.finished if run.last], _three_digits),
        _mean([cost["train_s"] if cost else None for cost in costs], _three_digits),
        _mean([cost["step"] if cost else None for cost in costs], lambda value: f"{value:.0f}"),
        "" if variant.bytes_per_parameter is None else f"{variant.bytes_per_parameter:.1f}",
        "" if variant.rate is None else f"{variant.rate:g}",
    ]


def _three_digits(value: float) -> str:
    """Format with three digits, or more where a large number has more; never with an exponent."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mean(values: list[float | None], text: Callable[[float], str]) -> str:
    """Format the mean of the values that are known, with their number if some are not."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return text(fmean(known)) + ("" if len(known) == len(values) else f" ({len(known)}/{len(values)})")


def _cost(run: RunResult, target: float | None) -> dict[str, float] | None:
    """Return the seconds of training and steps to the target; None if it was not reached."""
    point = run.reached(target) if target is not None and run.last else None
    return None if point is None else {"train_s": point.train_s, "step": point.step}


def _search_rows(variants: list[Variant]) -> list[list[str]]:
    rows = []
    for variant in variants:
        cells = []
        for rate, run in variant.search.items():
            loss = run.outcome if run.search_loss is None else f"{run.search_loss:#.5g}"
            cells.append(f"{rate:g}: {loss}{' (chosen)' if rate == variant.rate else ''}")
        rows.append([variant.name, ", ".join(cells), _sensitivity(variant)])
    return rows


def _sensitivity(variant: Variant) -> str:
    """Describe how much the loss grows at the worse neighbour of the best learning rate."""
    losses = [run.search_loss for run in variant.search.values()]
    known = [loss for loss in losses if loss is not None]
    if not known:
        return "all values failed"
    best = losses.index(min(known))
    around = [losses[place] for place in (best - 1, best + 1) if 0 <= place < len(losses)]
    if any(loss is None for loss in around):
        return "fails at the next value"
    if any((loss or 0) > EXPLODED * min(known) for loss in around):
        return "explodes at the next value"
    if not around or not min(known):  # nothing to compare with, or a loss of 0
        return ""
    worse = f"+{max((loss or 0) / min(known) - 1 for loss in around):.0%}"
    return worse if len(around) == 2 else f"{worse}; the best is at the edge"


def _notes(comparison: Comparison, target: float | None, measure: str) -> list[str]:
    interval = f"± its {CONFIDENCE:.0%} confidence interval (Student's t), which needs two"
    accuracy = f"on the test set at the end of each run; mean over seeds, {interval} seeds."
    if comparison.folds:
        accuracy = (
            f"on the fold that each run held out, at its end; mean over {count(len(comparison.folds), 'fold')} and "
            f"{count(comparison.seeds, 'seed')}, {interval} runs. Runs share most of their training samples, so the interval "
            f"is narrower than that of separate training sets."
        )
    notes = [
        f"{measure}: {accuracy}",
        "s/epoch, epochs, s to: training only, without evaluations. B/param: bytes of the optimizer's state in a "
        "checkpoint, per parameter of the model.",
    ]
    if target is not None:
        notes.append(
            f"s to {100 * target:.4g} %, steps: at the first evaluation (one each eval.every) that reaches it; (k/n) if only "
            "k of n runs did."
        )
    if "s of training" in comparison.budget.text:
        notes.append("A run ends after the step during which its time runs out, so long steps exceed the budget.")
    if comparison.tune:
        notes.append(
            f"{comparison.tune}: the value with the lowest {_search_loss(comparison.has_validation)}, under the same "
            f"budget, with a seed that no other run has. Not the best test {measure}: the test set must not select what it "
            "measures."
        )
    return notes


def _search_loss(has_validation: bool) -> str:
    return (
        "validation loss at the end of a run" if has_validation else "training loss over the last fifth of its samples"
    )


def _complaints(variants: list[Variant]) -> list[str]:
    """List the runs that did not finish, grouped by variant and reason."""
    found: dict[tuple[str, str], list[str]] = {}
    for variant in variants:
        for seed, run in variant.seeds.items():
            if run.state != "finished":
                found.setdefault((variant.name, run.reason or run.outcome), []).append(str(seed))
    return [
        f"{name}, {'seed' if len(seeds) == 1 else 'seeds'} {', '.join(seeds)}: {reason}"
        for (name, reason), seeds in found.items()
    ]


def _facts(comparison: Comparison, variants: list[Variant]) -> dict[str, str]:
    """Return the facts that the finished runs recorded; where runs differ, all values."""
    finished = [run for variant in variants for run in variant.finished]
    facts = {"budget": f"{comparison.budget.text} for each run", "seeds": str(comparison.seeds)}
    facts["recipe"] = " ".join(comparison.arguments)
    versions = [run.start.get("versions", {}).items() for run in finished]
    found = {
        "data": [_data(run.data) for run in finished],
        "hardware": [_hardware(run.start.get("hardware", {})) for run in finished],
        "ranks, device, precision": ["{world_size} x {device}, {precision}".format(**run.world) for run in finished],
        "versions": [", ".join(f"{name} {version}" for name, version in of) for of in versions],
    }
    return facts | {name: "; ".join(sorted(set(values) - {""})) for name, values in found.items() if any(values)}


def _data(data: dict[str, Any]) -> str:
    sizes = [data[f"{name}_samples"] for name in ("train", "validation", "test") if f"{name}_samples" in data]
    return f"{' + '.join(f'{size:,}' for size in sizes)} images, {data['fingerprint'][:12]}" if data else ""


def _hardware(hardware: dict[str, Any]) -> str:
    if "gpu" in hardware:
        return str(hardware["gpu"])
    if not hardware:
        return ""
    vectors = f" ({hardware['vectors']})" if hardware.get("vectors") else ""
    return f"{hardware['cpu']}{vectors}, {count(hardware['threads'], 'thread')} a rank"
