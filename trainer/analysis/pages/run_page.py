"""The page of one or more runs: results, curves, predictions for the test set, hardware, and how to repeat them."""

import shlex
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from typing import Any

from shardstep.configs.held_out import NO_TEST_SET
from shardstep.configs.load import recipe_text
from shardstep.configs.text import duration
from shardstep.trainer.analysis.calibration import expected_calibration_error
from shardstep.trainer.analysis.pages import chart
from shardstep.trainer.analysis.pages.chart import NUM_COLORS, Point, Series, line_chart
from shardstep.trainer.analysis.pages.html import Child, Html, join, page, picture, table, tag
from shardstep.trainer.analysis.run_analysis import RunAnalysis
from shardstep.trainer.analysis.run_record import Line, RunRecord, differing_keys, number
from shardstep.trainer.monitoring.pictures import training_extras
from shardstep.trainer.monitoring.status import length

_MOST_CLASSES_IN_MATRIX = 40
_MOST_BARS = 30
_MOST_PAIRS = 8
_UNKNOWN = "-"


# --- how values are written -------------------------------------------------------------------------------------------


def _percent(share: float) -> str:
    return _unbroken(f"{100 * share:.2f} %")


def _time(seconds: float) -> str:
    if seconds < 100:
        return _unbroken(f"{seconds:.1f} s")
    rounded = round(seconds)
    return _unbroken(f"{rounded // 60} min {rounded % 60} s" if rounded < 3600 else duration(seconds))


def _unbroken(figure: str) -> str:
    """Replace spaces by those at which no line breaks."""
    return figure.replace(" ", "\N{NO-BREAK SPACE}")


def _value(value: Any) -> Child:
    return _UNKNOWN if value is None else tag("code", str(value))


def _bytes(count: float) -> str:
    return f"{count / 2**30:.0f} GiB"


def _labels(records: list[RunRecord]) -> list[str]:
    """Name each run, as shortly as the names are unique."""
    for name_of in (lambda record: record.recipe.run.name, lambda record: record.folder.resolve().name):
        names = [name_of(record) or record.folder.resolve().name for record in records]
        if len(set(names)) == len(names):
            return names
    return [str(record.folder) for record in records]


def _dot(color: int, label: str) -> Html:
    return tag("span", tag("i", class_=f"key c{color % NUM_COLORS}"), label)


def report_page(analyses: list[RunAnalysis], made: datetime) -> str:
    """Make the page of one run, or of several side by side.

    Args:
        analyses: at least one; all of one task.
        made: the time, for the foot of the page.
    """
    labels = _labels([one.record for one in analyses])
    title = labels[0] if len(analyses) == 1 else f"{len(analyses)} runs side by side"
    version = metadata.version("shardstep")
    return page(
        f"{title} · shardstep",
        tag("h1", title),
        _head(analyses[0]) if len(analyses) == 1 else tag("p", ", ".join(labels), class_="lead"),
        _tiles(analyses[0]) if len(analyses) == 1 else _comparison(analyses, labels),
        _left_out(analyses, labels),
        _curves(analyses, labels),
        _classes(analyses, labels),
        _confidence(analyses, labels),
        _reconstructions(analyses, labels),
        _filters(analyses, labels),
        _time_and_hardware(analyses, labels),
        _recipes(analyses, labels),
        tag("footer", f"Made by shardstep {version}, {made.isoformat(' ', 'minutes')}. All in this one file."),
    )


# --- the top ----------------------------------------------------------------------------------------------------------


def _head(one: RunAnalysis) -> Html:
    recipe, manifest = one.record.recipe, one.record.manifest
    parts = [
        recipe.model.get("name"),
        f"{recipe.optimizer.get('name')}, lr {recipe.optimizer.get('lr')}",
        f"batch {recipe.train.global_batch_size}",
        length(recipe.train),
        f"{manifest.samples:,} training images ({manifest.made.get('source', 'unknown source')})" if manifest else None,
    ]
    return tag("p", _status(one.record), *(f" · {part}" for part in parts if part), class_="lead")


def _status(record: RunRecord) -> Html:
    """Write the state of a run: with the failure, if it failed, and its step, unless it is finished."""
    state, failure = record.state, record.summary.get("failure")
    text: str = f"{state} ({str(failure).replace('_', ' ')})" if failure and state == "failed" else state
    step, total = record.last.get("step"), record.last_start.get("total_steps")
    if step is not None and state != "finished":
        text += f" at step {step:,}{f' of {total:,}' if total else ''}"
    return tag("span", text, class_=f"status {state}")


def _tiles(one: RunAnalysis) -> Html:
    known = [(figure, value) for figure in _FIGURES if (value := figure.value(one)) is not None]
    tiles = (tag("div", tag("b", one.text(value)), tag("span", one.name), class_="tile") for one, value in known)
    return tag("div", *tiles, class_="tiles")


def _comparison(analyses: list[RunAnalysis], labels: list[str]) -> Html:
    records = [one.record for one in analyses]
    differing = differing_keys([record.recipe for record in records])
    rows: list[list[Child]] = [[tag("code", key), *map(_value, values)] for key, values in differing.items()]
    prints = [record.manifest.fingerprint[:12] if record.manifest else _UNKNOWN for record in records]
    if len(set(prints)) > 1:
        rows.append(["training data", *(tag("code", text) for text in prints)])
    head: list[Child] = ["", *(_dot(number, label) for number, label in enumerate(labels))]
    results: list[list[Child]] = [["", *(_status(record) for record in records)]]
    known = [figure for figure in _FIGURES if any(figure.value(one) is not None for one in analyses)]
    results += [[figure.name, *_marked(figure, analyses)] for figure in known]
    return join(
        tag("h2", "What differs"),
        tag("div", table(head, rows), class_="card") if rows else tag("p", "Their recipes and data are the same."),
        tag("h2", "What came out"),
        tag("div", table(head, results), class_="card"),
    )


def _marked(figure: "_Figure", analyses: list[RunAnalysis]) -> list[Child]:
    """Write a figure of each run, the best in bold."""
    values = [figure.value(one) for one in analyses]
    known = [value for value in values if value is not None]
    best = [figure.best(known)] if figure.best and len(known) > 1 else []
    texts = [_UNKNOWN if value is None else figure.text(value) for value in values]
    return [tag("b", text) if value in best else text for text, value in zip(texts, values, strict=True)]


@dataclass(frozen=True)
class _Figure:
    """A result of a run: its value and how it is written; `best` chooses the best of several."""

    name: str
    value: Callable[[RunAnalysis], float | None]
    text: Callable[[float], str]
    best: Callable[[list[float]], float] | None = None


def _calibration_error(one: RunAnalysis) -> float | None:
    return expected_calibration_error(one.bins) if one.bins else None


def _seconds(one: RunAnalysis) -> float | None:
    return number(one.record.summary, "wall_s") or number(one.record.last_evaluation, "wall_s")


def _rate(one: RunAnalysis) -> float | None:
    rates = [rate for line in one.record.train if (rate := number(line, "samples_per_s"))]
    return statistics.median(rates) if rates else None


def _on_validation(key: str) -> Callable[[RunAnalysis], float | None]:
    def value(one: RunAnalysis) -> float | None:
        return number(one.record.last_evaluation, key) if one.record.evaluated_on == "validation" else None

    return value


def _on_test(key: str) -> Callable[[RunAnalysis], float | None]:
    def value(one: RunAnalysis) -> float | None:
        has_test_set = one.record.recipe.data.test != NO_TEST_SET
        is_over = one.record.evaluated_on == "test" or one.record.state == "finished"
        return number(one.record.final, key) if has_test_set and is_over else None

    return value


_FIGURES = [
    _Figure("validation accuracy", _on_validation("accuracy"), _percent, max),
    _Figure("validation mAP", _on_validation("map"), _percent, max),
    _Figure("validation loss", _on_validation("loss"), "{:.4f}".format, min),
    _Figure("test accuracy", _on_test("accuracy"), _percent, max),
    _Figure("top-5 accuracy", lambda one: number(one.record.final, "top5"), _percent, max),
    _Figure("test mAP", _on_test("map"), _percent, max),
    _Figure("test F1, mean of classes", _on_test("f1"), _percent, max),
    _Figure("test F1 of all decisions", _on_test("f1_micro"), _percent, max),
    _Figure("test loss", _on_test("loss"), "{:.4f}".format, min),
    _Figure("calibration error", _calibration_error, _percent, min),
    _Figure("training and evaluation", _seconds, _time),
    _Figure("training images/s", _rate, "{:,.0f}".format),
    _Figure("parameters", lambda one: number(one.record.last_start, "parameters"), "{:,.0f}".format),
]


def _left_out(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    items = [
        tag("li", tag("b", f"{label}: ") if len(analyses) > 1 else None, reason)
        for one, label in zip(analyses, labels, strict=True)
        for reason in one.left_out
    ]
    return tag("div", tag("b", "Left out"), tag("ul", *items), class_="note") if items else None


# --- curves -----------------------------------------------------------------------------------------------------------


def _curves(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    alone = len(analyses) == 1
    charts = [
        line_chart(_pairs(analyses, labels, "loss"), "epoch", "loss"),
        line_chart(_pairs(analyses, labels, "accuracy"), "epoch", "accuracy", percent=True),
        line_chart(_of_evaluations(analyses, labels, "map"), "epoch", "mean average precision", percent=True),
        line_chart(_of(analyses, labels, "lr"), "epoch", "learning rate", from_zero=True),
        line_chart(_of(analyses, labels, "samples_per_s"), "epoch", "training images/s", from_zero=True),
        None if alone else line_chart(_by_time(analyses, labels, "accuracy"), "seconds", "accuracy", percent=True),
        None if alone else line_chart(_by_time(analyses, labels, "loss"), "seconds", "loss"),
    ]
    drawn = [one for one in charts if one]
    if not drawn:
        return None
    sets = sorted({one.record.evaluated_on for one in analyses})
    said = f"Bold: {' or '.join(sets)} set. Thin: single training batches."
    said += " Dashed: mean over the training samples since the last evaluation." if alone else ""
    for one, label in zip(analyses, labels, strict=True):
        extras = training_extras(one.record.recipe)
        if extras:
            whose = "" if alone else f" of {label}"
            said += f" The training loss{whose} includes {extras}, the {one.record.evaluated_on} loss does not."
        said += _best_evaluation(one.record, "" if alone else f" of {label}")
    return join(tag("h2", "Curves"), tag("p", said, class_="quiet"), tag("div", *drawn, class_="grid two"))


def _best_evaluation(record: RunRecord, of_which: str) -> str:
    """Say which evaluation was the best, and that its score is too good if it was chosen on the test set."""
    best = record.best
    step, score = number(best, "step"), number(best, "map" if record.finds_several else "accuracy")
    if step is None or score is None:
        return ""
    measure = "mAP " if record.finds_several else ""
    said = f" The best evaluation{of_which}: {measure}{_percent(score)} at step {step:,.0f}"
    if record.evaluated_on == "validation":
        return f"{said}, on the validation set."
    return f"{said}. It was chosen on the test set, so expect less on new images; data.validation holds images out for that."


def _pairs(analyses: list[RunAnalysis], labels: list[str], key: str) -> list[Series]:
    """Return the training and test curves of each run; of a single run also the training mean between evaluations."""
    series = []
    for color, (one, label) in enumerate(zip(analyses, labels, strict=True)):
        batches, test = _points(one.record.train, key), _points(one.record.evaluations, key)
        if len(analyses) == 1:
            means = Series("training mean", _points(one.record.evaluations, f"train_{key}"), 1, "dashed")
            series += [
                Series("training batch", batches, 7, "faint"),
                means,
                Series(f"{one.record.evaluated_on} set", test, 0),
            ]
        else:
            series += [Series("" if test else label, batches, color, "faint"), Series(label, test, color)]
    return series


def _of(analyses: list[RunAnalysis], labels: list[str], key: str) -> list[Series]:
    return [
        Series(label, _points(one.record.train, key), color, "plain")
        for color, (one, label) in enumerate(zip(analyses, labels, strict=True))
    ]


def _of_evaluations(analyses: list[RunAnalysis], labels: list[str], key: str) -> list[Series]:
    return [
        Series(label, _points(one.record.evaluations, key), color)
        for color, (one, label) in enumerate(zip(analyses, labels, strict=True))
    ]


def _by_time(analyses: list[RunAnalysis], labels: list[str], key: str) -> list[Series]:
    return [
        Series(label, [(number(line, "wall_s") or 0.0, number(line, key)) for line in one.record.evaluations], color)
        for color, (one, label) in enumerate(zip(analyses, labels, strict=True))
    ]


def _points(lines: list[Line], key: str) -> list[Point]:
    return [(line["epoch"], number(line, key)) for line in lines]


# --- predictions for the test set -------------------------------------------------------------------------------------


def _classes(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    drawn = [card for card in (_bars(analyses, labels), *_side_by_side(analyses, labels, _confusion)) if card]
    return join(tag("h2", "Classes"), tag("div", *drawn, class_="grid")) if drawn else None


def _bars(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    """Draw the accuracy of each class; where there are many, of the worst."""
    known = [(color, one.per_class_accuracy) for color, one in enumerate(analyses) if one.per_class_accuracy]
    if not known:
        return None
    classes = analyses[known[0][0]].classes
    chosen = list(range(len(classes)))
    if len(classes) > _MOST_BARS:
        means = [statistics.fmean(row[label] or 0.0 for _, row in known) for label in chosen]
        chosen = sorted(chosen, key=means.__getitem__)[:_MOST_BARS]
    cells: list[Html] = []
    for label in chosen:
        shares = [row[label] for _, row in known]
        bars = [
            tag("i", class_=f"c{color % NUM_COLORS}", style=f"width:{100 * (share or 0):.1f}%", title=labels[color])
            for (color, _), share in zip(known, shares, strict=True)
        ]
        values = [tag("div", _UNKNOWN if share is None else f"{100 * share:.1f}") for share in shares]
        cells += [
            tag("div", classes[label], class_="name", title=classes[label]),
            tag("div", *bars, class_="track"),
            tag("div", *values, class_="value"),
        ]
    which = f"the {len(chosen)} worst of {len(classes):,} classes" if len(chosen) < len(classes) else "each class"
    what = "Average precision" if analyses[known[0][0]].record.finds_several else "Accuracy"
    return tag("div", tag("h3", f"{what} of {which}, per cent"), tag("div", *cells, class_="bars"), class_="card")


def _confusion(one: RunAnalysis) -> Html | None:
    predictions, classes = one.predictions, one.classes
    if predictions is None or one.record.reconstructs:
        return None
    # Each name is isolated, so that one in Arabic or Hebrew does not reorder the figures beside it.
    pairs = [
        join(tag("bdi", classes[label]), " for ", tag("bdi", classes[predicted]), f" ({times:,})")
        for label, predicted, times in predictions.most_frequent_mistakes(_MOST_PAIRS)
    ]
    said = Html(", ".join(pairs))
    drawn = None
    if len(classes) <= _MOST_CLASSES_IN_MATRIX:
        caption = "Rows: label, columns: prediction, per cent of the label. Mistakes have their own color scale."
        matrix = chart.confusion_chart(predictions.confusion(len(classes)), classes)
        drawn = join(tag("figcaption", caption), matrix)
    return join(
        drawn,
        tag("p", "Most frequent mistakes: ", said, ".", class_="quiet") if said else tag("p", "No mistakes."),
    )


def _confidence(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    drawn = [*_side_by_side(analyses, labels, _reliability), *_side_by_side(analyses, labels, _mistakes)]
    said = (
        "A calibrated model is on the diagonal: of its predictions with 80 % confidence, 80 % are correct. The calibration "
        "error is the mean distance from the diagonal over all samples; the grey bars show how many samples are where."
    )
    return _section("Confidence", said, drawn)


def _reliability(one: RunAnalysis) -> Html | None:
    predictions = one.predictions
    if predictions is None or not one.bins:
        return None
    claimed = float(predictions.confidence.mean(dtype=float))
    said = (
        f"Calibration error {_percent(expected_calibration_error(one.bins))}: mean confidence {_percent(claimed)}, "
        f"accuracy {_percent(predictions.accuracy)} on {len(predictions.labels):,} samples."
    )
    return join(tag("figcaption", said), chart.reliability_chart(one.bins))


def _mistakes(one: RunAnalysis) -> Html | None:
    if not one.mistakes:
        return None
    figures = []
    for mistake in one.mistakes:
        label, predicted = one.classes[mistake.label], one.classes[mistake.predicted]
        said = f"{label}, predicted as {predicted}"
        caption = join(
            tag("b", tag("bdi", predicted)), f" {mistake.confidence:.0%}", tag("br"), "is ", tag("bdi", label)
        )
        figures.append(tag("figure", picture(mistake.pixels, said), caption))
    said = "The mistakes with the highest confidence, as the model sees the images."
    return join(tag("figcaption", said), tag("div", *figures, class_="gallery"))


def _reconstructions(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    drawn = _side_by_side(analyses, labels, _reconstruction_gallery)
    said = "The test images with the largest errors, each followed by its reconstruction."
    return _section("Worst reconstructions", said, drawn)


def _reconstruction_gallery(one: RunAnalysis) -> Html | None:
    figures: list[Html] = []
    for pair in one.reconstructions:
        figures.append(tag("figure", picture(pair.original, "a test image"), "original"))
        figures.append(tag("figure", picture(pair.reconstruction, "its reconstruction"), f"error {pair.error:.3f}"))
    return tag("div", *figures, class_="gallery") if figures else None


def _filters(analyses: list[RunAnalysis], labels: list[str]) -> Html | None:
    drawn = _side_by_side(analyses, labels, _filter_gallery)
    said = "The weights of the units of the first layer: grey is 0, each unit has its own scale."
    return _section("First layer", said, drawn)


def _filter_gallery(one: RunAnalysis) -> Html | None:
    if one.filters is None:
        return None
    pictures = (picture(pixels, f"filter {place}") for place, pixels in enumerate(one.filters))
    return tag("div", *pictures, class_="filters")


def _side_by_side(
    analyses: list[RunAnalysis], labels: list[str], draw: Callable[[RunAnalysis], Html | None]
) -> list[Html]:
    """Draw a card for each run that has something to show, with the run's name where there are several."""
    cards = []
    for color, (one, label) in enumerate(zip(analyses, labels, strict=True)):
        content = draw(one)
        if content:
            title = tag("h3", _dot(color, label)) if len(analyses) > 1 else None
            cards.append(tag("div", title, content, class_="card"))
    return cards


def _section(title: str, said: str, cards: list[Html]) -> Html | None:
    if not cards:
        return None
    return join(tag("h2", title), tag("p", said, class_="quiet"), tag("div", *cards, class_="grid two"))


# --- hardware, and how to repeat the run ------------------------------------------------------------------------------


def _time_and_hardware(analyses: list[RunAnalysis], labels: list[str]) -> Html:
    columns = [_facts(one) for one in analyses]
    names = {name: None for facts in columns for name in facts}
    rows: list[list[Child]] = [[name, *(facts.get(name, _UNKNOWN) for facts in columns)] for name in names]
    head: list[Child] = ["", *(_dot(color, label) for color, label in enumerate(labels))] if len(analyses) > 1 else []
    return join(tag("h2", "Time and hardware"), tag("div", table(head, rows), class_="card"))


def _facts(one: RunAnalysis) -> dict[str, Child]:
    record, manifest = one.record, one.record.manifest
    hardware, versions, seconds = record.hardware, record.versions, _seconds(one)
    epochs = number(record.last, "epoch")
    waits = [wait for line in record.train if (wait := number(line, "data_wait_share")) is not None]
    ranks = _ranks(record)
    vectors = f", {hardware['vectors']}" if hardware.get("vectors") else ""
    method = record.recipe.train.convolutions
    facts: dict[str, Child] = {
        "steps": f"{record.last['step']:,} ({epochs:.4g} epochs)" if record.last and epochs is not None else None,
        "training and evaluation": _time(seconds) if seconds else None,
        "per epoch": _time(seconds / epochs) if seconds and epochs else None,
        "training images/s": f"{rate:,.0f} (median)" if (rate := _rate(one)) else None,
        "waiting for data": f"{_percent(statistics.fmean(waits))} of training" if waits else None,
        "starts": _starts(record),
        "ranks": f"{ranks}, {record.recipe.train.device}" if ranks else None,
        "precision": f"{record.recipe.train.precision}, {record.recipe.train.memory_format}",
        "convolutions": f"by {method}" if method not in ("auto", "direct") else None,
        "GPU": f"{hardware['gpu']}, {_bytes(hardware['gpu_memory_bytes'])}, CUDA {hardware.get('cuda')}"
        if "gpu" in hardware
        else None,
        "processor": f"{hardware['cpu']}{vectors}, {hardware.get('cores')} cores, {hardware.get('threads')} threads a rank"
        if "cpu" in hardware
        else None,
        "memory": _bytes(hardware["memory_bytes"]) if "memory_bytes" in hardware else None,
        "system": hardware.get("system"),
        "versions": ", ".join(f"{name} {version}" for name, version in versions.items()) or None,
        "code": record.last_start.get("code"),
        "data": f"{record.recipe.data.mode}; training set {manifest.fingerprint[:12]}" if manifest else None,
        "model shown": one.weights or None,
    }
    return {name: text for name, text in facts.items() if text is not None}


def _ranks(record: RunRecord) -> int | None:
    return record.summary.get("world_size") or record.last_start.get("world_size")


def _starts(record: RunRecord) -> str | None:
    if not record.starts:
        return None
    times = [str(start.get("time", "unknown time")).replace("T", " ") for start in record.starts]
    written = [f"{time} at step {start.get('step', '?')}" for time, start in zip(times, record.starts, strict=True)]
    shown = written if len(written) <= 4 else [written[0], "…", *written[-2:]]
    return "; ".join(shown) if len(written) == 1 else f"{len(written)}: {'; '.join(shown)}"


def _recipes(analyses: list[RunAnalysis], labels: list[str]) -> Html:
    cards = _side_by_side(analyses, labels, _recipe)
    said = "The recipe has every option as it was used, and determines the order of samples and all random numbers."
    return _section("How to repeat it", said, cards) or Html()


def _recipe(one: RunAnalysis) -> Html:
    record = one.record
    ranks = _ranks(record) or 1
    again = f"runs/{record.folder.resolve().name}-again"
    nproc = f" --nproc {ranks}" if ranks > 1 else ""
    command = f"shardstep train config.yaml run.dir={shlex.quote(again)} run.resume=never{nproc}"
    typed = record.last_start.get("command")
    source = record.manifest.made.get("source") if record.manifest else None
    return join(
        tag("p", "With the recipe below as config.yaml", f" and data made from {source}" if source else None, ":"),
        tag("pre", command),
        join(tag("p", "The original command:"), tag("pre", str(typed))) if typed else None,
        tag("details", tag("summary", "config.yaml"), tag("pre", recipe_text(record.recipe))),
    )
