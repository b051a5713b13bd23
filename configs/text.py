"""Text for people: counted nouns, durations, tables. Pure; every module prints these in the same form."""

from collections.abc import Sequence


def count(number: int, noun: str, plural: str = "") -> str:
    """A number with its noun: "1 rank", "2 ranks", "1,000 images", "3 boxes" with plural="boxes"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def duration(seconds: float) -> str:
    """Seconds as people say them: "45 s", "12 min", "4 h 0 min"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60} min" if minutes >= 60 else f"{minutes} min"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]], gap: str = " ") -> list[str]:
    """Lines of a table under its columns: the first column to the left, the others to the right."""
    widths = [max(len(row[place]) for row in [columns, *rows]) for place in range(len(columns))]
    lines = [
        gap.join(
            cell.ljust(width) if place == 0 else cell.rjust(width)
            for place, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [columns, *rows]
    ]
    return [lines[0], "-" * len(lines[0]), *lines[1:]]
