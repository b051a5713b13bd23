"""What the options of data.augment must fulfil, beside the types and limits that configs/components.py checks."""

from collections.abc import Callable, Sequence
from typing import Any

from shardstep.datasets.augment.mixing import MIXERS


def augment_problems(sections: Sequence[dict[str, Any]], global_batch_size: int | str, repeats: int = 1) -> list[str]:
    """Return what is wrong with the resolved entries of data.augment, alone, together and for this size of batches.

    `repeats`: how often each sample comes in a row.
    """
    problems = []
    for place, section in enumerate(sections):
        found = _CHECKS[section["name"]](section) if section["name"] in _CHECKS else []
        problems += [f"data.augment[{place}].{problem}" for problem in found]
    names = [section["name"] for section in sections]
    if "flip" in names and "alternating_flip" in names:
        problems.append("data.augment: flip undoes what alternating_flip does; keep one of them")
    mixers = [name for name in names if name in MIXERS]
    if mixers and names[-len(mixers) :] != mixers:
        problems.append(f"data.augment: {' and '.join(mixers)} must come last: what they mix are finished images")
    problems += [f"data.augment: {name} can be listed only once" for name in MIXERS if mixers.count(name) > 1]
    if mixers and isinstance(global_batch_size, int) and global_batch_size <= repeats:
        beside = "" if repeats == 1 else f" and data.repeats={repeats}"
        problems.append(
            f"data.augment: {mixers[0]} has no effect with train.global_batch_size={global_batch_size}{beside}: images "
            f"have no partners"
        )
    return problems


def smallest_side(section: dict[str, Any]) -> int:
    """Return the smallest height and width in pixels that a transform accepts."""
    match section:
        case {"name": "translate", "pixels": reflected}:
            return int(reflected) + 1
        case {"name": "random_crop", "padding": padding, "padding_mode": mode}:
            return int(padding) + (mode == "reflect")
        case {"name": "blur", "kernel_size": size}:
            return int(size) // 2 + 1
        case {"name": "shrink", "size": size}:
            return int(size)
    return 1


def _check_range(section: dict[str, Any], key: str, most: float) -> list[str]:
    low, high = section[key]
    if 0 < low <= high <= most:
        return []
    limits = "above 0" if most == float("inf") else f"above 0 and at most {most:g}"
    return [f"{key}=[{low}, {high}] must be two numbers {limits}, the smaller one first"]


def _check_erasing(section: dict[str, Any]) -> list[str]:
    return [*_check_range(section, "scale", 1), *_check_range(section, "ratio", float("inf"))]


def _check_blur(section: dict[str, Any]) -> list[str]:
    size = section["kernel_size"]
    odd = [] if size > 0 and size % 2 else [f"kernel_size={size} must be an odd number of pixels from 1"]
    return odd + _check_range(section, "sigma", float("inf"))


def _check_mixer(section: dict[str, Any]) -> list[str]:
    alpha = section["alpha"]
    return [] if 0 < alpha <= _MOST_ALPHA else [f"alpha={alpha} must be above 0 and at most {_MOST_ALPHA}"]


_MOST_ALPHA = 1000  # where w is 0.5 +- 0.01
_CHECKS: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "erasing": _check_erasing,
    "blur": _check_blur,
    **dict.fromkeys(MIXERS, _check_mixer),
}
