"""Which differences between groups of runs are real: numbers in, intervals, tests and sentences out. Pure functions.

Intervals are Student's, tests Welch's (variances may differ), and over all pairs Holm's correction keeps the chance that any
difference is called real by luck below 5 %.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance

CONFIDENCE = 0.95


@dataclass(frozen=True)
class Interval:
    """A mean of n values with the half width of its confidence interval; None where one value cannot tell."""

    mean: float
    half_width: float | None
    n: int


@dataclass(frozen=True)
class Difference:
    """How far the mean of one group is above another's: p of Welch's test, alone and after Holm's correction."""

    better: str
    worse: str
    difference: float
    half_width: float | None
    p: float
    adjusted_p: float = 1.0

    @property
    def is_real(self) -> bool:
        """Whether chance is a poor explanation, given how many pairs were looked at."""
        return self.adjusted_p < 1 - CONFIDENCE


# --- distributions ----------------------------------------------------------------------------------------------------


def student_cdf(t: float, freedom: float) -> float:
    """The probability that Student's t with so many degrees of freedom is at most t."""
    if math.isinf(t):
        return float(t > 0)
    tail = 0.5 * incomplete_beta(freedom / 2, 0.5, freedom / (freedom + t * t))
    return 1 - tail if t > 0 else tail


def student_quantile(probability: float, freedom: float) -> float:
    """The t that Student's t with so many degrees of freedom stays below with a probability from 0.5 to 1."""
    low, high = 0.0, 1.0
    while student_cdf(high, freedom) < probability:
        high *= 2
    for _ in range(200):  # halving: each step gives a bit, a float has 53
        middle = (low + high) / 2
        low, high = (middle, high) if student_cdf(middle, freedom) < probability else (low, middle)
    return (low + high) / 2


def incomplete_beta(a: float, b: float, x: float) -> float:
    """The regularised incomplete beta function I_x(a, b), by its continued fraction.

    Numerical Recipes, third edition, section 6.4; DLMF 8.17.22. Good to about 14 digits.
    """
    if x <= 0 or x >= 1:
        return float(x >= 1)
    if x > (a + 1) / (a + b + 2):  # where the fraction converges slowly, its mirror image does not
        return 1 - incomplete_beta(b, a, 1 - x)
    factor = math.exp(
        math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b) + a * math.log(x) + b * math.log1p(-x) - math.log(a)
    )
    # Lentz's method for 1 / (1 + d1 / (1 + d2 / (1 + ...)))
    tiny = 1e-300
    fraction, c, d = 1.0, 1.0, 0.0
    for place in range(1000):
        m = place // 2
        if place == 0:
            numerator = 1.0
        elif place % 2 == 0:
            numerator = m * (b - m) * x / ((a + 2 * m - 1) * (a + 2 * m))
        else:
            numerator = -(a + m) * (a + b + m) * x / ((a + 2 * m) * (a + 2 * m + 1))
        d = 1 / (1 + numerator * d or tiny)
        c = 1 + numerator / c or tiny
        fraction *= c * d
        if abs(c * d - 1) < 1e-15:
            break
    return factor * (fraction - 1)


# --- intervals and tests ----------------------------------------------------------------------------------------------


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval:
    """The mean of some values and its confidence interval by Student's t: t s / sqrt(n), with n - 1 degrees of freedom."""
    n = len(values)
    if n < 2:
        return Interval(fmean(values), None, n)
    t = student_quantile((1 + confidence) / 2, n - 1)
    return Interval(fmean(values), t * math.sqrt(variance(values) / n), n)


def welch(
    one: Sequence[float], other: Sequence[float], confidence: float = CONFIDENCE
) -> tuple[float, float | None, float]:
    """Welch's t test of two groups of at least two values. Welch 1947, Biometrika 34.

    Returns:
        The difference of the means, the half width of its confidence interval, and the two-sided p. Values that do not vary
        at all within their groups say nothing of chance (accuracies are counts, and tie): no width, and p is 1.
    """
    difference = fmean(one) - fmean(other)
    parts = [variance(values) / len(values) for values in (one, other)]
    error = math.sqrt(sum(parts))
    if error == 0:
        return difference, None, 1.0
    freedom = sum(parts) ** 2 / sum(
        part**2 / (len(values) - 1) for part, values in zip(parts, (one, other), strict=True)
    )
    p = 2 * student_cdf(-abs(difference) / error, freedom)
    return difference, student_quantile((1 + confidence) / 2, freedom) * error, p


def holm(p_values: Sequence[float]) -> list[float]:
    """p values corrected for being several, so that a bound holds for all of them together. Holm 1979, Scand. J. Stat. 6.

    The smallest of m is multiplied by m, the next by m - 1, ..., and none may end below one that was smaller.
    """
    adjusted, least = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=p_values.__getitem__)):
        least = max(least, min(1.0, (len(p_values) - rank) * p_values[place]))
        adjusted[place] = least
    return adjusted


def compare_groups(groups: Mapping[str, Sequence[float]]) -> list[Difference]:
    """Every pair of groups that have at least two values each, larger mean first; the surest differences first."""
    names = sorted((name for name, values in groups.items() if len(values) > 1), key=lambda name: -fmean(groups[name]))
    found = [(one, other, *welch(groups[one], groups[other])) for one, other in itertools.combinations(names, 2)]
    adjusted = holm([p for *_, p in found])
    differences = [Difference(*parts, q) for parts, q in zip(found, adjusted, strict=True)]
    return sorted(differences, key=lambda pair: (pair.adjusted_p, -pair.difference))


# --- in words ---------------------------------------------------------------------------------------------------------


def sentences(groups: Mapping[str, Sequence[float]], runs: Mapping[str, int] | None = None) -> list[str]:
    """What may be said of the groups' accuracies (0 to 1): which differences are real, and which are not told apart.

    Args:
        groups: accuracies of the runs that came to an end, by name.
        runs: how many were to, where that is more.
    """
    several = {name: values for name, values in groups.items() if len(values) > 1}
    if len(several) < 2:
        return ["No difference here can be called real: that takes at least two variants with two seeds each."]
    differences = compare_groups(several)
    real = [pair for pair in differences if pair.is_real]
    seeds = sorted({len(values) for values in several.values()})
    counts = " to ".join(map(str, seeds[:: max(len(seeds) - 1, 1)]))
    said = [
        f"{len(real)} of {len(differences)} pairs differ for real on this test set at {CONFIDENCE:.0%} confidence (Welch's t "
        f"test over {counts} seeds each, Holm's correction over all pairs)."
    ]
    ranked = sorted(several, key=lambda name: -fmean(several[name]))
    for name in ranked:
        beaten = [pair for pair in real if pair.better == name]
        if beaten:
            beaten.sort(key=lambda pair: pair.difference)
            others = ", ".join(f"{pair.worse} by {_points(pair)}" for pair in beaten)
            said.append(f"{name} is better than {others}.")
    best = ranked[0]
    equals = [pair.worse for pair in differences if pair.better == best and not pair.is_real]
    if equals:
        equals.sort(key=ranked.index)
        said.append(f"The highest mean is {best}'s, but these runs do not tell it apart from {_and(equals)}.")
    for name, total in (runs or {}).items():
        if name in several and len(several[name]) < total:
            said.append(
                f"Only {len(several[name])} of {total} runs of {name} came to an end: what is said holds for these."
            )
    single = [name for name in groups if name not in several]
    if single:
        said.append(f"Nothing is said of {_and(single)}: fewer than two runs came to an end.")
    return said


def _points(pair: Difference) -> str:
    assert pair.half_width is not None  # of a difference that is real
    return f"{100 * pair.difference:.1f} ± {100 * pair.half_width:.1f} points"


def _and(names: Sequence[str]) -> str:
    return " and ".join([*([", ".join(names[:-1])] if len(names) > 1 else []), *names[-1:]])
