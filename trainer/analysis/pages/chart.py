"""SVG charts: lines, a reliability diagram, a confusion matrix.

Not matplotlib's SVG: here the page's style sheet gives the colors, also in the dark and on paper, each value has a title on
hover, and a chart takes 6 to 20 kB instead of 35 to 49 kB.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from shardstep.trainer.analysis.calibration import Bin
from shardstep.trainer.analysis.pages.html import Html, tag

Point = tuple[float, float | None]
"""x and y; a y of None breaks the line."""
Scale = Callable[[float], float]
"""Maps a value to its place in the picture."""

# Small enough for text to be readable where a page is 390 pixels wide.
_WIDTH, _HEIGHT = 440, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 10, 10, 36  # at least, to the left
_MOST_POINTS = 500  # of a line; more are not visible
NUM_COLORS = 8  # in style.css
_LOG_FROM = 30.0  # highest by lowest value: a linear scale would hide the low ones
_LOG_MARGIN = 1.15
_CHARACTER = 6.6  # width at the font size of the style sheet


@dataclass(frozen=True)
class Series:
    """A line of a chart."""

    label: str  # for the legend and on hover; empty keeps it out of the legend
    points: list[Point]  # by x
    color: int = 0
    kind: Literal["strong", "dashed", "plain", "faint"] = "strong"
    """strong or dashed, with a dot at each point; plain, without; or faint, for noisy values."""


def line_chart(
    series: Sequence[Series], x_name: str, title: str, percent: bool = False, from_zero: bool = False
) -> Html | None:
    """Draw a chart of lines, or None without any value. Its y axis is logarithmic where values differ more than 30 times.

    Args:
        series: those without a value are left out.
        x_name, title: of the x and y axis, with their units.
        percent: whether values are shares, to be shown in per cent.
    """
    series = [one for one in series if any(y is not None for _, y in one.points)]
    if not series:
        return None
    drawn = [Series(one.label, _thin(one.points), one.color, one.kind) for one in series]
    values = [y for one in drawn for _, y in one.points if y is not None]
    right = max(x for one in drawn for x, _ in one.points) or 1.0
    logarithmic = not percent and not from_zero and min(values) > 0 and max(values) / min(values) > _LOG_FROM
    if logarithmic:
        low, high = min(values) / _LOG_MARGIN, max(values) * _LOG_MARGIN
        ticks = _log_ticks(low, high)
    else:
        ticks = _ticks(min([0.0] if from_zero else values), max(values))
        low, high = ticks[0], ticks[-1]
    labels = [_tick_label(tick, percent) for tick in ticks]
    left = max(_LEFT, 14 + _CHARACTER * max(map(len, labels)))

    def place_x(x: float) -> float:
        return left + (_WIDTH - left - _RIGHT) * x / right

    def place_y(y: float) -> float:
        share = math.log(y / low) / math.log(high / low) if logarithmic else (y - low) / (high - low)
        return _HEIGHT - _BOTTOM - (_HEIGHT - _TOP - _BOTTOM) * share

    grid = [
        tag(
            "g",
            tag("line", x1=left, x2=_WIDTH - _RIGHT, y1=place_y(tick), y2=place_y(tick), class_="grid"),
            tag("text", label, x=left - 6, y=place_y(tick) + 4, class_="end"),
        )
        for tick, label in zip(ticks, labels, strict=True)
    ]
    grid += [
        tag("text", _tick_label(tick), x=place_x(tick), y=_HEIGHT - _BOTTOM + 16, class_="middle")
        for tick in _ticks(0.0, right)
        if tick <= right * 1.001
    ]
    grid.append(tag("text", x_name, x=(left + _WIDTH - _RIGHT) / 2, y=_HEIGHT - 4, class_="middle name"))
    order = {"faint": 0, "plain": 1, "dashed": 2, "strong": 3}
    lines = [_line(one, place_x, place_y, percent) for one in sorted(drawn, key=lambda one: order[one.kind])]
    scale = " · logarithmic" if logarithmic else ""
    return tag(
        "figure",
        tag("figcaption", tag("b", title), scale),
        _svg(_WIDTH, _HEIGHT, f"{title} by {x_name}", *grid, *lines),
        legend(series) if len(series) > 1 else None,
        class_="chart",
    )


def legend(series: Sequence[Series]) -> Html:
    """Draw the legend: the label of each line."""
    keys = (
        tag("span", tag("i", class_=f"key {one.kind} c{one.color % NUM_COLORS}"), one.label, class_="entry")
        for one in series
        if one.label
    )
    return tag("div", *keys, class_="legend")


def reliability_chart(bins: list[Bin], color: int = 0) -> Html:
    """Draw accuracy by confidence: a bar per bin, the diagonal of a calibrated model, and the number of samples below."""
    size, left, top, strip = 300.0, 44.0, 8.0, 44.0
    total = sum(part.samples for part in bins)
    largest = max(part.samples for part in bins)
    bottom = top + size

    def x(value: float) -> float:
        return left + size * value

    drawn: list[Html] = []
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        height = bottom - size * tick
        drawn.append(tag("line", x1=left, x2=left + size, y1=height, y2=height, class_="grid"))
        drawn.append(tag("text", _tick_label(tick, percent=True), x=left - 6, y=height + 4, class_="end"))
        label_y = bottom + strip + 26
        drawn.append(tag("text", _tick_label(tick, percent=True), x=x(tick), y=label_y, class_="middle"))
    for part in bins:
        said = (
            f"confidence {part.lower:.0%} to {part.upper:.0%}: {part.samples:,} samples, accuracy {part.accuracy:.1%}, "
            f"mean confidence {part.confidence:.1%}"
        )
        width, height = size * (part.upper - part.lower) - 2, size * part.accuracy
        bar = tag("rect", x=x(part.lower) + 1, y=bottom - height, width=width, height=height, class_="bar")
        gap_top, gap = bottom - size * max(part.confidence, part.accuracy), size * abs(part.confidence - part.accuracy)
        kind = "gap over" if part.confidence > part.accuracy else "gap under"
        missed = tag("rect", x=x(part.lower) + 1, y=gap_top, width=width, height=gap, class_=kind)
        share = strip * math.sqrt(part.samples / largest)
        samples = tag("rect", x=x(part.lower) + 1, y=bottom + 8, width=width, height=share, class_="samples")
        drawn.append(tag("g", tag("title", said), bar, missed, samples, class_=f"c{color % NUM_COLORS}"))
    drawn.append(tag("line", x1=left, y1=bottom, x2=left + size, y2=top, class_="diagonal"))
    drawn.append(tag("text", "confidence", x=left + size / 2, y=bottom + strip + 44, class_="middle name"))
    return _svg(370, int(bottom + strip + 50), f"accuracy by confidence of {total:,} samples", *drawn)


def confusion_chart(confusion: np.ndarray, classes: Sequence[str]) -> Html:
    """Draw a confusion matrix in per cent of each row's label; mistakes have their own scale: rare ones are visible."""
    count = len(classes)
    share = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    wrong = share - np.diag(np.diag(share))
    worst = float(wrong.max()) or 1.0
    cell = 30.0 if count <= 12 else max(8.0, 360.0 / count)
    longest = min(max(len(name) for name in classes), 12)
    left = 10 + _CHARACTER * longest
    top = 18 + 0.75 * _CHARACTER * longest
    shown = [name if len(name) <= 12 else name[:11] + "…" for name in classes]
    cells: list[Html] = []
    for row in range(count):
        center = top + cell * (row + 0.5)
        cells.append(tag("text", shown[row], x=left - 6, y=center + 4, class_="end"))
        slanted = f"rotate(-45 {left + cell * (row + 0.5):.6g} {top - 6:.6g})"
        cells.append(tag("text", shown[row], x=left + cell * (row + 0.5), y=top - 6, transform=slanted))
        for column in range(count):
            value = float(share[row, column])
            if not value:
                continue
            right = row == column
            strength = value if right else 0.15 + 0.85 * value / worst
            said = f"{classes[row]} predicted as {classes[column]}: {confusion[row, column]:,} ({value:.1%})"
            x, kind = left + cell * column, "hit" if right else "miss"
            size = {"width": cell - 1, "height": cell - 1, "fill_opacity": round(strength, 3)}
            cells.append(tag("rect", tag("title", said), x=x, y=top + cell * row, **size, class_=kind))
            if cell >= 30 and value >= 0.005:
                kind = "middle on" if strength > 0.6 else "middle"
                cells.append(tag("text", f"{100 * value:.0f}", x=x + cell / 2 - 0.5, y=center + 4, class_=kind))
    width, height = left + cell * count + 0.5 * left, top + cell * count + 4
    return _svg(int(width), int(height), "confusion matrix", *cells)


def _svg(width: int, height: int, description: str, *children: Html) -> Html:
    return tag("svg", *children, viewBox=f"0 0 {width} {height}", role="img", aria_label=description)


def _line(one: Series, place_x: Scale, place_y: Scale, percent: bool) -> Html:
    path, pen_is_down = "", False
    for x, y in one.points:
        if y is not None:
            path += f"{'L' if pen_is_down else 'M'}{place_x(x):.1f} {place_y(y):.1f}"
        pen_is_down = y is not None
    known = [(x, y) for x, y in one.points if y is not None]
    dots = [
        tag(
            "circle",
            tag("title", f"{one.label}: {_value(y, percent)} at {_value(x)}"),
            cx=round(place_x(x), 1),
            cy=round(place_y(y), 1),
            r=3 if len(known) <= 40 else 1.5,
        )
        for x, y in (known if one.kind in ("strong", "dashed") or len(known) == 1 else [])
    ]
    return tag("g", tag("path", d=path) if path else None, *dots, class_=f"line {one.kind} c{one.color % NUM_COLORS}")


def _thin(points: list[Point]) -> list[Point]:
    """Keep fewer points that look the same: of each stretch of a line, its lowest and highest, and every break."""
    size = -(-2 * len(points) // _MOST_POINTS)
    if size <= 2:
        return points
    kept: list[Point] = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        known = [point for point in part if point[1] is not None]
        chosen = {id(min(known, key=_y)), id(max(known, key=_y))} if known else set()
        kept += [point for point in part if id(point) in chosen or point[1] is None]
    return kept if kept[-1] is points[-1] else [*kept, points[-1]]


def _y(point: Point) -> float:
    return point[1] or 0.0


def _ticks(low: float, high: float) -> list[float]:
    """Return about five round numbers from at most `low` to at least `high`."""
    if high <= low:
        low, high = (low - abs(low) * 0.1, high + abs(high) * 0.1) if low else (0.0, 1.0)
    rough = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first = math.floor(low / step + 1e-9)
    last = math.ceil(high / step - 1e-9)
    return [float(f"{step * count:.12g}") for count in range(first, last + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    """Return 1, 2 and 5 times powers of ten between two values; only powers, or some of them, where there are many."""
    powers = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    factors = (1, 2, 5) if len(powers) <= 4 else (1,)
    every = -(-len(powers) // 7)
    return [tick for power in powers[::every] for factor in factors if low <= (tick := factor * 10.0**power) <= high]


def _tick_label(tick: float, percent: bool = False) -> str:
    """Write all digits of a round number."""
    if percent:
        return f"{100 * tick:.10g} %"
    if tick and (abs(tick) >= 1e5 or abs(tick) < 1e-3):
        digits, exponent = f"{tick:.9e}".split("e")
        return f"{digits.rstrip('0').rstrip('.')}e{int(exponent)}"
    return f"{tick:,.10g}"


def _value(value: float, percent: bool = False) -> str:
    if percent:
        return f"{100 * value:.4g} %"
    return f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}"
