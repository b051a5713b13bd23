"""Formatting of counts, durations and tables for people. Pure; every module uses it, so that output looks alike."""

import unicodedata
from collections.abc import Sequence

# Unicode's categories of control characters, of bytes that are not UTF-8, and of breaks between lines and paragraphs.
_UNSHOWN = ("Cc", "Cs", "Zl", "Zp")
# Its classes of characters that reorder the text around them.
_TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")


def count(number: int, noun: str, plural: str = "") -> str:
    """Format a number with its noun: "1 rank", "2 ranks", "1,000 images", "3 boxes" with plural="boxes"."""
    return f"{number:,} {noun if number == 1 else plural or noun + 's'}"


def printable(text: str, keep: str = "") -> str:
    """Escape characters that a terminal or a page would obey and not show, except those to `keep`: a name stays one line."""
    return "".join(
        letter.encode("unicode_escape", "backslashreplace").decode()
        if letter not in keep
        and (unicodedata.category(letter) in _UNSHOWN or unicodedata.bidirectional(letter) in _TURNING)
        else letter
        for letter in text
    )


def listed(names: Sequence[str], most: int = 5) -> str:
    """Format names for a message: all, or the first few and how many more; quoted where it would not be clear what is one."""
    shown = [printable(name) for name in names[:most]]
    shown = [f'"{name}"' if not name or name != name.strip() or "," in name else name for name in shown]
    return ", ".join(shown) + (f" and {len(names) - most:,} more" if len(names) > most else "")


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
