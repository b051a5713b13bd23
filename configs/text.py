"""Formatting of counts, durations and tables for people. Pure; every module uses it, so that output looks alike."""

from collections.abc import Sequence


def count(number: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun: "1 rank", "2 ranks", "1,000 images", "3 boxes" with plural="boxes"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Format seconds: "45 s", "12 min", "4 h 0 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], gap: str = " ") -> list[str]:
    """Format a table as lines, with the first column left-aligned and the others right-aligned."""
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    lines = [
        gap.join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [columns, *rows]
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
