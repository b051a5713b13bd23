"""Intervals and tests against published tables and values worked out by hand."""

import math
import subprocess
import sys
from statistics import variance

import pytest

from shardstep.launch.comparison.significance import (
    compare_groups,
    holm,
    mean_interval,
    sentences,
    welch,
)


# Table of Student's t, as in any textbook (NIST/SEMATECH e-Handbook, section 1.3.6.7.2)
@pytest.mark.parametrize(
    ("freedom", "probability", "t"),
    [
        (1, 0.975, 12.706), (2, 0.975, 4.303), (4, 0.975, 2.776), (10, 0.95, 1.812), (30, 0.995, 2.750), (100, 0.975, 1.984),
        (1, 0.75, 1.0), (2, 0.999, 22.327),
    ],
)  # fmt: skip
def test_interval_widths_are_those_of_the_table(freedom: int, probability: float, t: float) -> None:
    values = list(range(freedom + 1))
    error = math.sqrt(variance(values) / len(values))
    interval = mean_interval(values, confidence=2 * probability - 1)  # two-sided: a tail is left on each side
    assert interval.half_width == pytest.approx(t * error, abs=5.1e-4 * error)


def test_p_where_student_has_a_closed_form() -> None:
    for d in (-30.0, -1.5, -1e-3, 0.0, 0.2, 3.0, 1e4):
        # variances 2 and 2, n 2 and 2: error sqrt(2), t = d / sqrt(2), two degrees of freedom: p = 1 - t / sqrt(2 + t^2)
        t = abs(d) / math.sqrt(2)
        assert welch([d - 1, d + 1], [-1, 1])[2] == pytest.approx(1 - t / math.sqrt(2 + t * t), abs=1e-13)
        # variances 2 and 0: error 1, t = d, one degree of freedom, which is Cauchy's distribution
        assert welch([d - 1, d + 1], [0, 0])[2] == pytest.approx(1 - 2 * math.atan(abs(d)) / math.pi, abs=1e-13)


def test_interval() -> None:
    # mean 3, variance 2.5, t(4) = 2.776: 2.776 sqrt(2.5 / 5) = 1.963
    interval = mean_interval([1, 2, 3, 4, 5])
    assert (interval.mean, interval.n) == (3, 5)
    assert interval.half_width == pytest.approx(1.9632, abs=1e-3)
    assert mean_interval([0.5]).half_width is None


def test_welch() -> None:
    # The third example of Wikipedia's "Welch's t-test", whose variances differ: t = 2.225 in size, p = 0.036
    one = [19.8, 20.4, 19.6, 17.8, 18.5, 18.9, 18.3, 18.9, 19.5, 22.0]
    other = [28.2, 26.6, 20.1, 23.3, 25.2, 22.1, 17.7, 27.6, 20.6, 13.7, 23.2, 17.5, 20.6, 18.0, 23.9, 21.6, 24.3, 20.4,
             24.0, 13.2]  # fmt: skip
    difference, half_width, p = welch(one, other)
    assert difference == pytest.approx(19.37 - 21.59)
    assert p == pytest.approx(0.0355, abs=1e-3)
    assert half_width < abs(difference)  # as p is below 0.05
    # by hand: variances 1 and 1, n 3 and 3: error sqrt(2/3), t = 3 / 0.8165 = 3.674, freedom 4: p = 0.0213
    assert welch([4, 5, 6], [1, 2, 3])[2] == pytest.approx(0.0213, abs=1e-4)
    assert welch([1, 2, 3], [1, 2, 3])[2] == pytest.approx(1)
    assert welch([0.1, 0.1], [0.1, 0.1]) == (0, None, 1)  # nothing varies
    assert welch([0.2, 0.2], [0.1, 0.1])[1:] == (None, 1)  # two ties are no proof


def test_holm() -> None:
    # 0.01 x 4, 0.02 x 3, 0.03 x 2 (0.06 as before), 0.04 x 1 (not below 0.06)
    assert holm([0.01, 0.04, 0.03, 0.02]) == pytest.approx([0.04, 0.06, 0.06, 0.06])
    # R: p.adjust(c(0.01, 0.02, 0.5), "holm")
    assert holm([0.5, 0.01, 0.02]) == pytest.approx([0.5, 0.03, 0.04])
    assert holm([0.9, 0.8]) == [1, 1]
    assert holm([]) == []


GROUPS = {"a": [0.70, 0.71, 0.72], "b": [0.70, 0.72, 0.71], "c": [0.30, 0.31, 0.32], "d": [0.9]}


def test_words_say_what_is_real_and_what_is_not() -> None:
    differences = compare_groups(GROUPS)
    assert {(pair.better, pair.worse) for pair in differences if pair.is_real} == {("a", "c"), ("b", "c")}
    assert len(differences) == 3
    text = "\n".join(sentences(GROUPS))
    assert "2 of 3 pairs differ significantly" in text
    # difference 0.40, error sqrt(2 x 0.0001 / 3), t(4) = 2.776: 2.3 points
    assert "a is better than c by 40.0 ± 2.3 points." in text
    assert "a has the highest mean, but these runs cannot tell it apart from b." in text
    assert "d cannot be compared" in text
    assert "comparisons use" not in text
    said = sentences(GROUPS, {"a": 4, "b": 3, "c": 3, "d": 3})
    assert "Only 3 of 4 runs of a finished; its comparisons use those." in said


def test_one_seed_says_nothing() -> None:
    assert sentences({"a": [0.9], "b": [0.1]}) == [
        "No difference can be called real: that needs at least two variants with two seeds each."
    ]


def test_scipy_is_imported_only_for_a_report() -> None:
    code = "import sys, shardstep.launch.compare; print('scipy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout == "False\n"
