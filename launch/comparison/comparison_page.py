"""The report of a comparison as a self-contained page and as Markdown. Text in, text out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardstep.trainer.analysis.pages.html import Html, join, tag
from shardstep.trainer.analysis.pages.html import page as html_page
from shardstep.trainer.analysis.pages.html import table as html_table


@dataclass(frozen=True)
class ComparisonReport:
    """The results of a comparison as text.

    Attributes:
        facts: budget, data, hardware and versions, by name.
        tune: the key that was searched; empty without a search.
        search: the rows of the search's table.
        variants: names, and what each changes.
        words: sentences on which differences are real.
        notes: how to read the table, and which runs did not finish.
        plots: captions by name.
    """

    title: str
    command: str
    facts: dict[str, str]
    columns: list[str]
    rows: list[list[str]]
    tune: str
    search: list[list[str]]
    variants: list[list[str]]
    words: list[str]
    notes: list[str]
    plots: dict[str, str]


def page(report: ComparisonReport, plots: Mapping[str, str]) -> str:
    """Return the report as one HTML page that contains everything; `plots` has SVG by name."""
    figures = (
        tag("figure", tag("div", Html(plots[name]), class_="wide plot"), tag("figcaption", caption))
        for name, caption in report.plots.items()
    )
    return html_page(
        report.title,
        tag("h1", report.title),
        tag("h2", "Which differences are real"),
        *(tag("p", sentence) for sentence in report.words),
        tag("h2", "Results"),
        _table(report.columns, report.rows),
        *(tag("p", note, class_="quiet") for note in report.notes),
        *figures,
        join(tag("h2", f"Sensitivity to {report.tune}"), _table(_search_columns(report), report.search))
        if report.tune
        else None,
        tag("h2", "How it was made"),
        tag("pre", report.command),
        _table([], [[key, value] for key, value in report.facts.items()]),
        _table(_VARIANT_COLUMNS, report.variants),
    )


def document(report: ComparisonReport, pictures: Mapping[str, str]) -> str:
    """Return the report as Markdown; `pictures` has the files by plot, which lie beside the document."""
    parts = [
        f"# {report.title}",
        f"Written by this command:\n\n```\n{report.command}\n```",
        _markdown_table(["", ""], [[key, value] for key, value in report.facts.items()]),
        "## Which differences are real",
        "\n".join(f"- {sentence}" for sentence in report.words),
        "## Results",
        _markdown_table(report.columns, report.rows),
        "\n".join(f"- {note}" for note in report.notes),
        *(f"![{caption}]({pictures[name]})" for name, caption in report.plots.items()),
    ]
    if report.tune:
        parts += [f"## Sensitivity to {report.tune}", _markdown_table(_search_columns(report), report.search)]
    parts += ["## The variants", _markdown_table(_VARIANT_COLUMNS, report.variants)]
    return "\n\n".join(parts) + "\n"


_VARIANT_COLUMNS = ["variant", "changes in the recipe"]


def _search_columns(report: ComparisonReport) -> list[str]:
    return ["variant", f"{report.tune}: loss", "loss at the worse neighbour"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    return tag("div", html_table([*columns], [[*row] for row in rows]), class_="card")


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
