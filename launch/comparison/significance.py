"""Tests of which differences between groups of runs are real: numbers in, intervals, tests and sentences out. Pure.

Intervals use Student's t, tests are Welch's (variances may differ), and Holm's correction over all pairs keeps the chance of
calling any difference real by luck below 5 %.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """The mean of n values and the half width of its confidence interval; None for a single value."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How far the mean of one group is above another's, with p of Welch's test before and after Holm's correction."""

    better: str
    worse: str
    difference: float
    half_width: float | None
    p: float
    adjusted_p: float = 1.0

    @property
    def is_real(self) -> bool:
        """Whether chance is an unlikely explanation, given the number of pairs tested."""
        return self.adjusted_p < 1 - CONFIDENCE


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """Return the mean and its confidence interval by Student's t: t s / sqrt(n), with n - 1 degrees of freedom."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), None, n)
    from scipy import stats

    t = float(stats.t.ppf((1 + confidence) / 2, n - 1))
    return Interval(fmean(values), t * math.sqrt(variance(values) / n), n)


def welch(
    one: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float | None, float]:
    """Run Welch's t test on two groups of at least two values. Welch 1947, Biometrika 34.

    scipy.stats.ttest_ind gives the same, but warns where the values of one group are equal, as accuracies (counts) can be.

    Returns:
        The difference of the means, the half width of its confidence interval, and the two-sided p. If no value varies within
        its group, chance cannot be estimated: no width, and p is 1.
    """
    from scipy import stats

    difference = fmean(one) - fmean(other)
    parts = [variance(values) / len(values) for values in (one, other)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return difference, None, 1.0
    squares = sum(part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True))
    student = stats.t(sum(parts) ** 2 / squares)  # by its degrees of freedom
    half_width = float(student.ppf((1 + confidence) / 2)) * error
    return difference, half_width, 2 * float(student.sf(abs(difference) / error))


def holm(p_values: Sequence[float]) -> list[float]:
    """Correct p values for multiple tests, so that a bound holds for all together. Holm 1979, Scand. J. Stat. 6.

    The smallest of m is multiplied by m, the next by m - 1, ..., and none may become smaller than the one before.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def compare_groups(groups: Mapping[str, Sequence[float]]) -> list[Difference]:
    """Compare each pair of groups of at least two values, larger mean first; return the surest differences first."""
    names = sorted((name for name, values in groups.items() if len(values) > 1), key=lambda name: -fmean(groups[name]))
    found = [(one, other, *welch(groups[one], groups[other])) for one, other in itertools.combinations(names, 2)]
    adjusted = holm([p for *_, p in found])
    differences = [Difference(*parts, q) for parts, q in zip(found, adjusted, strict=True)]
    return sorted(differences, key=lambda pair: (pair.adjusted_p, -pair.difference))


def sentences(groups: Mapping[str, Sequence[float]], runs: Mapping[str, int] | None = None) -> list[str]:
    """Describe which differences between the groups' accuracies (0 to 1) are real, and which groups cannot be told apart.

    Args:
        groups: accuracies of the finished runs, by name.
        runs: number of planned runs, by name.
    """
    several = {name: values for name, values in groups.items() if len(values) > 1}
    if len(several) < 2:
        return ["No difference can be called real: that needs at least two variants with two seeds each."]
    differences = compare_groups(several)
    real = [pair for pair in differences if pair.is_real]
    seeds = sorted({len(values) for values in several.values()})
    counts = " to ".join(map(str, seeds[:: max(len(seeds) - 1, 1)]))
    lines = [
        f"{len(real)} of {len(differences)} pairs differ significantly on this test set at {CONFIDENCE:.0%} confidence "
        f"(Welch's t test over {counts} seeds each, Holm's correction over all pairs)."
    ]
    ranked = sorted(several, key=lambda name: -fmean(several[name]))
    for name in ranked:
        beaten = sorted((pair for pair in real if pair.better == name), key=lambda pair: pair.difference)
        if beaten:
            others = ", ".join(f"{pair.worse} by {_points(pair)}" for pair in beaten)
            lines.append(f"{name} is better than {others}.")
    best = ranked[0]
    equals = [pair.worse for pair in differences if pair.better == best and not pair.is_real]
    if equals:
        equals.sort(key=ranked.index)
        lines.append(f"{best} has the highest mean, but these runs cannot tell it apart from {_and(equals)}.")
    for name, total in (runs or {}).items():
        if name in several and len(several[name]) < total:
            lines.append(f"Only {len(several[name])} of {total} runs of {name} finished; its comparisons use those.")
    if single := [name for name in groups if name not in several]:
        lines.append(f"{_and(single)} cannot be compared: fewer than two runs finished.")
    return lines


def _points(pair: Difference) -> str:
    assert pair.half_width is not None  # it has one if the difference is real
    return f"{100 * pair.difference:.1f} ± {100 * pair.half_width:.1f} points"


def _and(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])
