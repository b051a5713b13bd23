"""Formatting of counts, durations and tables."""

import pytest

from shardstep.configs.text import count, duration, listed, printable, table


def test_nouns_are_counted() -> None:
    assert [count(number, "rank") for number in (0, 1, 2, 1000)] == ["0 ranks", "1 rank", "2 ranks", "1,000 ranks"]
    assert count(2, "box", "boxes") == "2 boxes"


def test_durations() -> None:
    # 100 s are 1.67 minutes; an hour is 60 minutes
    assert [duration(s) for s in (0.4, 45, 99, 100, 3540, 3600, 14_400)] == [
        "0 s", "45 s", "99 s", "2 min", "59 min", "1 h 0 min", "4 h 0 min",
    ]  # fmt: skip


def test_a_table_is_as_wide_as_its_cells() -> None:
    assert table(["name", "s"], [["one", "1.5"], ["another", "12"]]) == [
        "name      s",
        "-----------",
        "one     1.5",
        "another  12",
    ]


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb\tc", r"a\nb\tc"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("\x7f\x85", r"\x7f\x85"),
        ("\udcff", r"\udcff"),  # a byte that is not UTF-8, in the name of a file
        ("\u202egnp.exe", r"\u202egnp.exe"),  # reads as exe.png
        ("\u2028", r"\u2028"),
        ("caf\u00e9 \u732b \U0001f408\u200d\u2b1b \u05d7\u05ea", None),  # letters, emoji and their joiner are shown
        ("\u3000\u00a0", None),  # spaces, too
    ],
)
def test_only_what_cannot_be_shown_is_escaped(text: str, shown: str | None) -> None:
    assert printable(text) == (text if shown is None else shown)


def test_names_are_quoted_where_it_is_not_clear_what_is_one() -> None:
    assert listed(["a", "b, c", " d", "", "e\n", "f", "g"]) == 'a, "b, c", " d", "", e\\n and 2 more'
