"""The answer of a comparison: a table for the terminal, results.json, plots, a page, and a document, from its runs."""

import json
import math
import textwrap
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from statistics import fmean
from typing import Any

from shardstep.configs.files import write_atomically
from shardstep.configs.text import table
from shardstep.launch.comparison.comparison_page import ComparisonReport, document, page
from shardstep.launch.comparison.comparison_plots import PLOTS
from shardstep.launch.comparison.planned_runs import Comparison
from shardstep.launch.comparison.results import EXPLODED, RunResult, Variant, final_accuracy, record
from shardstep.launch.comparison.significance import CONFIDENCE, compare_groups, mean_interval, sentences

_WIDTH = 80  # of a terminal
_TARGET_SHARE = 0.9  # of the best mean accuracy, where no target is given


def write_report(comparison: Comparison, variants: list[Variant], doc: Path | None) -> list[Path]:
    """Print the table and what it says; write table.txt, results.json, report.html and the plots, and the document."""
    target = comparison.target if comparison.target is not None else default_target(variants)
    answer = make_report(comparison, variants, target)
    folder = comparison.folder
    if doc:
        doc.parent.mkdir(parents=True, exist_ok=True)
    said = [textwrap.fill(sentence, _WIDTH) for sentence in [*answer.words, "", *answer.notes]]
    text = "\n".join([*table(answer.columns, answer.rows), "", *said])
    print(f"\n{text}\n")
    written = [folder / "table.txt", folder / "results.json", folder / "report.html"]
    write_atomically(written[0], f"{text}\n".encode())
    content = results(comparison, variants, target, answer)
    write_atomically(written[1], (json.dumps(content, indent=1) + "\n").encode())
    drawn: dict[str, str] = {}
    for name in answer.plots:
        stem = f"{doc.stem}-{name}" if doc else ""
        places = [folder / f"{name}.png", *([doc.with_name(f"{stem}.png")] if doc else [])]
        drawn[name] = PLOTS[name].draw(variants, target, places)  # PNG files, and SVG as text
        written += places
    write_atomically(written[2], page(answer, drawn).encode())
    if doc:
        pictures = {name: f"{doc.stem}-{name}.png" for name in answer.plots}
        write_atomically(doc, document(answer, pictures).encode())
        written.append(doc)
    return written


def make_report(comparison: Comparison, variants: list[Variant], target: float | None) -> ComparisonReport:
    """Put into words and cells what the runs have shown."""
    groups = {variant.name: variant.accuracies for variant in variants if variant.accuracies}
    ranked = sorted(variants, key=lambda v: -fmean(v.accuracies) if v.accuracies else math.inf)  # failed ones last
    rows = [_row(variant, target) for variant in ranked]
    used = [place for place in range(len(rows[0])) if any(row[place] for row in rows)]
    return ComparisonReport(
        title=f"{comparison.arguments[0]}: {', '.join(variant.name for variant in variants)}",
        command=comparison.command,
        facts=_facts(comparison, variants),
        columns=[_columns(target)[place] for place in used],
        rows=[[row[place] for place in used] for row in rows],
        search=_search_rows(variants, comparison.tune),
        variants=[[variant.name, ", ".join(variant.overrides)] for variant in variants],
        words=sentences(groups, {variant.name: len(variant.seeds) for variant in variants}),
        notes=[*_notes(comparison, target), *_complaints(variants)],
        plots={name: plot.shows for name, plot in PLOTS.items() if plot.has_content(variants)},
    )


def results(
    comparison: Comparison, variants: list[Variant], target: float | None, answer: ComparisonReport
) -> dict[str, Any]:
    """Everything as JSON: settings, each run's curve, intervals, and all pairs with their tests."""
    groups = {variant.name: variant.accuracies for variant in variants if variant.accuracies}
    return {
        "comparison": comparison.record(),
        "facts": answer.facts,
        "target": target,
        "confidence": CONFIDENCE,
        "variants": [
            record(variant)
            | {"accuracy": asdict(mean_interval(variant.accuracies)) if variant.accuracies else None}
            | {"to_target": [_cost(outcome, target) for outcome in variant.seeds.values()]}
            for variant in variants
        ],
        "pairs": [asdict(pair) | {"is_real": pair.is_real} for pair in compare_groups(groups)],
        "words": answer.words,
    }


def default_target(variants: list[Variant]) -> float | None:
    """Nine tenths of the best mean accuracy, in whole per cent; None where no run has finished."""
    means = [fmean(variant.accuracies) for variant in variants if variant.accuracies]
    return math.floor(100 * _TARGET_SHARE * max(means)) / 100 if means else None


def _columns(target: float | None) -> list[str]:
    reaching = "target" if target is None else f"{100 * target:.4g} %"
    return ["variant", "n", "accuracy %", "s/epoch", "epochs", f"s to {reaching}", "steps", "B/param", "rate"]


def _row(variant: Variant, target: float | None) -> list[str]:
    rate = "" if variant.rate is None else f"{variant.rate:g}"
    memory = "" if variant.bytes_per_parameter is None else f"{variant.bytes_per_parameter:.1f}"
    costs = [_cost(outcome, target) for outcome in variant.finished]
    return [
        variant.name,
        str(len(variant.accuracies)),
        final_accuracy(variant),
        _mean([outcome.seconds_per_epoch for outcome in variant.finished], _three_digits),
        _mean([outcome.last.epoch for outcome in variant.finished if outcome.last], _three_digits),
        _mean([cost["train_s"] if cost else None for cost in costs], _three_digits),
        _mean([cost["step"] if cost else None for cost in costs], lambda value: f"{value:.0f}"),
        memory,
        rate,
    ]


def _three_digits(value: float) -> str:
    """At least as many, and never an exponent for what is large."""
    return f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _mean(values: list[float | None], text: Callable[[float], str]) -> str:
    """The mean as text; of those that have a value, with how many these are, if not all have."""
    known = [value for value in values if value is not None]
    if not known:
        return "-"
    return text(fmean(known)) + ("" if len(known) == len(values) else f" ({len(known)}/{len(values)})")


def _cost(outcome: RunResult, target: float | None) -> dict[str, float] | None:
    """Seconds of training and steps to the target; None if it was not reached."""
    point = outcome.reached(target) if target is not None and outcome.last else None
    return None if point is None else {"train_s": point.train_s, "step": point.step}


def _search_rows(variants: list[Variant], key: str) -> list[list[str]]:
    if not key:
        return []
    rows = []
    for variant in variants:
        cells = []
        for rate, outcome in variant.search.items():
            loss = outcome.state if outcome.train_loss is None else f"{outcome.train_loss:#.5g}"
            cells.append(f"{rate:g}: {loss}{' (taken)' if rate == variant.rate else ''}")
        rows.append([variant.name, ", ".join(cells), _sensitivity(variant)])
    return rows


def _sensitivity(variant: Variant) -> str:
    """How much the training loss grows at the worse neighbour of the best rate."""
    losses = [outcome.train_loss for outcome in variant.search.values()]
    known = [loss for loss in losses if loss is not None]
    if not known:
        return "no rate has worked"
    best = losses.index(min(known))
    around = [losses[place] for place in (best - 1, best + 1) if 0 <= place < len(losses)]
    if any(loss is None for loss in around):
        return "fails at the next rate"
    if any((loss or 0) > EXPLODED * min(known) for loss in around):
        return "explodes at the next rate"
    if not around or not min(known):  # nothing to compare with, or all learnt
        return ""
    worse = f"+{max((loss or 0) / min(known) - 1 for loss in around):.0%}"
    return worse if len(around) == 2 else f"{worse}; the best is at the edge"


def _notes(comparison: Comparison, target: float | None) -> list[str]:
    notes = [
        f"accuracy: on the test set at the end of each run; mean over seeds, ± its {CONFIDENCE:.0%} confidence interval "
        f"(Student's t); one seed has none.",
        "s/epoch, epochs, s to: of training alone, without evaluations. B/param: bytes of the optimizer's state in a "
        "checkpoint, per parameter of the model.",
    ]
    if target is not None:
        notes.append(
            f"s to {100 * target:.4g} %, steps: at the first evaluation that reaches it (eval.every apart); (k/n) if only k "
            "of n runs did."
        )
    if "s of training" in comparison.budget.text:
        notes.append("A run ends with the step in which its time is up: long steps take more than the budget.")
    if comparison.tune:
        notes.append(
            f"{comparison.tune}: the rate of lowest training loss over the last fifth of a run's samples, under the same "
            f"budget, with a seed that no other run has. Not of best test accuracy: the test set must not choose what it "
            f"is to judge."
        )
    return notes


def _complaints(variants: list[Variant]) -> list[str]:
    """Which runs did not end well, those of a variant together that say the same."""
    found: dict[tuple[str, str], list[str]] = {}
    for variant in variants:
        for seed, outcome in variant.seeds.items():
            if outcome.state != "finished":
                found.setdefault((variant.name, outcome.reason or outcome.state), []).append(str(seed))
    return [
        f"{name}, seed{'s' * (len(seeds) > 1)} {', '.join(seeds)}: {reason}" for (name, reason), seeds in found.items()
    ]


def _facts(comparison: Comparison, variants: list[Variant]) -> dict[str, str]:
    """Of the runs, as they have written them down: what several differ in is said of each."""
    finished = [outcome for variant in variants for outcome in variant.finished]
    facts = {
        "budget": f"{comparison.budget.text} for each run",
        "seeds": str(comparison.seeds),
        "recipe": " ".join(comparison.arguments),
    }
    found = {
        "data": [_data(outcome.data) for outcome in finished],
        "hardware": [_hardware(outcome.start.get("hardware", {})) for outcome in finished],
        "ranks, device, precision": [
            f"{outcome.world['world_size']} x {outcome.world['device']}, {outcome.world['precision']}"
            for outcome in finished
        ],
        "versions": [
            ", ".join(f"{name} {version}" for name, version in outcome.start.get("versions", {}).items())
            for outcome in finished
        ],
    }
    return facts | {what: "; ".join(sorted(set(said) - {""})) for what, said in found.items() if any(said)}


def _data(data: dict[str, Any]) -> str:
    return f"{data['train_samples']:,} + {data['test_samples']:,} images, {data['fingerprint'][:12]}" if data else ""


def _hardware(hardware: dict[str, Any]) -> str:
    if "gpu" in hardware:
        return str(hardware["gpu"])
    if not hardware:
        return ""
    vectors = f" ({hardware['vectors']})" if hardware.get("vectors") else ""
    threads = hardware["threads"]
    return f"{hardware['cpu']}{vectors}, {threads} thread{'s' * (threads > 1)} a rank"
