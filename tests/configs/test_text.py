"""Formatting of counts, durations and tables."""

from shardstep.configs.text import count, duration, table


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
