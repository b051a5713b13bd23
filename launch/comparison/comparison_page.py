"""The answer of a comparison as a page that needs no network, and as Markdown. Text in, text out."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shardstep.trainer.analysis.pages.html import Html, join, tag
from shardstep.trainer.analysis.pages.html import page as whole_page
from shardstep.trainer.analysis.pages.html import table as shown_table


@dataclass(frozen=True)
class ComparisonReport:
    """What a comparison has found, ready to be shown.

    Attributes:
        title, command: what was compared.
        facts: of budget, data, hardware and versions, by what they are.
        columns, rows: the table.
        search: the table of the search for rates; empty without one.
        variants: names, and what each changes in the recipe.
        words: which differences are real.
        notes: how to read the table, and which runs did not end well.
        plots: file names, with what each shows.
    """

    title: str
    command: str
    facts: dict[str, str]
    columns: list[str]
    rows: list[list[str]]
    search: list[list[str]]
    variants: list[list[str]]
    words: list[str]
    notes: list[str]
    plots: dict[str, str]


def page(answer: ComparisonReport, plots: Mapping[str, str]) -> str:
    """One HTML page, everything inside it.

    Args:
        answer: of the comparison.
        plots: SVG by name.
    """
    figures = (
        tag("figure", tag("div", Html(plots[name]), class_="wide plot"), tag("figcaption", shows))
        for name, shows in answer.plots.items()
    )
    return whole_page(
        answer.title,
        tag("h1", answer.title),
        tag("h2", "Which differences are real"),
        *(tag("p", sentence) for sentence in answer.words),
        tag("h2", "Results"),
        _table(answer.columns, answer.rows),
        *(tag("p", note, class_="quiet") for note in answer.notes),
        *figures,
        join(tag("h2", "Sensitivity to the rate"), _table(_SEARCH_COLUMNS, answer.search)) if answer.search else None,
        tag("h2", "How it was made"),
        tag("pre", answer.command),
        _table([], [[key, value] for key, value in answer.facts.items()]),
        _table(_VARIANT_COLUMNS, answer.variants),
    )


def document(answer: ComparisonReport, pictures: Mapping[str, str]) -> str:
    """The same as Markdown, for docs/.

    Args:
        answer: of the comparison.
        pictures: file names by plot, beside the document.
    """
    parts = [
        f"# {answer.title}",
        f"Written by this command, not by hand:\n\n```\n{answer.command}\n```",
        _markdown_table(["", ""], [[key, value] for key, value in answer.facts.items()]),
        "## Which differences are real",
        "\n".join(f"- {sentence}" for sentence in answer.words),
        "## Results",
        _markdown_table(answer.columns, answer.rows),
        "\n".join(f"- {note}" for note in answer.notes),
        *(f"![{shows}]({pictures[name]})" for name, shows in answer.plots.items()),
    ]
    if answer.search:
        parts += ["## Sensitivity to the rate", _markdown_table(_SEARCH_COLUMNS, answer.search)]
    parts += ["## The variants", _markdown_table(_VARIANT_COLUMNS, answer.variants)]
    return "\n\n".join(parts) + "\n"


_VARIANT_COLUMNS = ["variant", "changes in the recipe"]
_SEARCH_COLUMNS = ["variant", "rate: training loss", "the worse neighbour's loss"]


def _table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Html:
    return tag("div", shown_table([*columns], [[*row] for row in rows]), class_="card")


def _markdown_table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
