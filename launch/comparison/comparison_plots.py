"""Plots of a comparison: curves by epochs and seconds, final accuracies with intervals, losses by learning rate."""

import io
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Any

from shardstep.configs.files import write_atomically
from shardstep.launch.comparison.results import EXPLODED, Variant, measure_of
from shardstep.launch.comparison.significance import mean_interval

_GREY = "#808080"  # axes and text: readable on white and on black
_STYLES = ("-", "--", ":")  # colours repeat after ten variants, in the next style


@dataclass(frozen=True)
class Plot:
    """A plot: its caption, whether there is anything to show, and the function that draws it on a new figure."""

    caption: str
    has_content: Callable[[Sequence[Variant]], bool]
    _draw: Callable[[Any, Sequence[Variant], float | None, str], Any]

    def draw(self, variants: Sequence[Variant], target: float | None, tune: str, pngs: Sequence[Path]) -> str:
        """Draw it into PNG files on white, and return it as SVG on a transparent ground."""
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot as plt

        settings: dict[Any, Any] = {
            **dict.fromkeys(("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), _GREY),
            "svg.fonttype": "none",  # text stays text
            "svg.hashsalt": self.caption,  # ids that are the same at each drawing, and differ between plots
            "axes.spines.top": False,
            "axes.spines.right": False,
            "font.family": "sans-serif",
        }
        with plt.rc_context(settings):
            figure = self._draw(plt, variants, target, tune)
            content = io.StringIO()
            figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
            for path in pngs:
                picture = io.BytesIO()
                figure.savefig(picture, format="png", dpi=110, facecolor="white")
                write_atomically(path, picture.getvalue())
            plt.close(figure)
        text = content.getvalue()
        return text[text.index("<svg") :]  # without the XML declaration, which is invalid inside a page


def _draw_curves(plt: Any, variants: Sequence[Variant], target: float | None, tune: str) -> Any:
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), sharey=True, layout="constrained")
    for axis, name, label in zip(axes, ("epoch", "train_s"), ("epochs", "seconds of training"), strict=True):
        for place, variant in enumerate(variants):
            for number, run in enumerate(variant.finished):
                points = [point for point in run.curve if point.accuracy is not None]
                axis.plot(
                    [getattr(point, name) for point in points],
                    [100 * (point.accuracy or 0) for point in points],
                    color=f"C{place % 10}",
                    linestyle=_STYLES[place // 10 % len(_STYLES)],
                    marker="." if len(points) < 15 else None,
                    linewidth=1.3,
                    alpha=0.85,
                    label=variant.name if number == 0 else None,
                )
        if target is not None:
            axis.axhline(100 * target, color=_GREY, linewidth=0.8, linestyle=(0, (4, 4)))
        axis.set(xlabel=label)
        axis.grid(alpha=0.2)
    axes[0].set(ylabel=f"{measure_of(variants)}, %")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


def _draw_final(plt: Any, variants: Sequence[Variant], target: float | None, tune: str) -> Any:
    finished = sorted((v for v in variants if v.accuracies), key=lambda variant: fmean(variant.accuracies))
    figure, axis = plt.subplots(figsize=(8, 0.8 + 0.38 * len(finished)), layout="constrained")
    for row, variant in enumerate(finished):
        interval = mean_interval([100 * value for value in variant.accuracies])
        color = f"C{list(variants).index(variant) % 10}"
        axis.errorbar(interval.mean, row, xerr=interval.half_width, fmt="none", ecolor=color, capsize=4)
        marks = {"color": color, "clip_on": False}  # not cut at 0 and 100
        axis.plot(interval.mean, row, "o", **marks)
        axis.plot([100 * value for value in variant.accuracies], [row] * len(variant.accuracies), "|", ms=11, **marks)
    axis.set_yticks(range(len(finished)), [variant.name for variant in finished])
    axis.set(xlabel=f"final {measure_of(variants)}, %: each run, mean and 95 % confidence interval")
    low, high = axis.get_xlim()
    axis.set_xlim(max(low, 0), min(high, 100))  # an interval of few seeds can exceed the scale
    axis.margins(y=0.5 / max(len(finished), 1))
    axis.grid(axis="x", alpha=0.2)
    return figure


def _draw_rates(plt: Any, variants: Sequence[Variant], target: float | None, tune: str) -> Any:
    figure, axis = plt.subplots(figsize=(8, 4.2), layout="constrained")
    losses = []
    for place, variant in enumerate(variants):
        known = {rate: run.search_loss for rate, run in variant.search.items() if run.search_loss is not None}
        losses.append(list(known.values()))
        style = {"color": f"C{place % 10}", "linestyle": _STYLES[place // 10 % len(_STYLES)]}
        axis.plot(list(known), losses[-1], marker="o", markersize=4, label=variant.name, **style)
    on_validation = any(run.validation_loss is not None for variant in variants for run in variant.search.values())
    by = "validation loss at the end" if on_validation else "training loss, last fifth of the samples"
    axis.set(xscale="log", xlabel=tune, ylabel=by)
    shown = [loss for found in losses for loss in found if loss <= EXPLODED * min(found)]
    if len(shown) < sum(map(len, losses)):  # exploded ones may leave the picture at its top
        margin = 0.05 * (max(shown) - min(shown))
        axis.set_ylim(min(shown) - margin, max(shown) + margin)
    axis.grid(alpha=0.2)
    figure.legend(*axis.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    return figure


PLOTS = {
    "curves": Plot(
        "Accuracy against epochs and against seconds of training, one line per run.",
        lambda variants: any(variant.finished for variant in variants),
        _draw_curves,
    ),
    "final": Plot(
        "Final score of each run, with the mean and its confidence interval.",
        lambda variants: any(variant.accuracies for variant in variants),
        _draw_final,
    ),
    "rates": Plot(
        "Loss against the learning rates of the search: how much the choice matters.",
        lambda variants: any(run.search_loss is not None for variant in variants for run in variant.search.values()),
        _draw_rates,
    ),
}
