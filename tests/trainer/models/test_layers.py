"""Activations against their formulas, pooling against values computed by hand."""

import math
from collections.abc import Callable
from typing import get_args

import pytest
import torch

from shardstep.trainer.models.layers import Activation, GlobalPool, Pool, activation_layer

FORMULAS: dict[str, Callable[[float], float]] = {
    "sigmoid": lambda x: 1 / (1 + math.exp(-x)),
    "tanh": lambda x: (math.exp(x) - math.exp(-x)) / (math.exp(x) + math.exp(-x)),
    "relu": lambda x: max(0.0, x),
    "leaky_relu": lambda x: x if x > 0 else 0.01 * x,
    "elu": lambda x: x if x > 0 else math.exp(x) - 1,
    "gelu": lambda x: x * (1 + math.erf(x / math.sqrt(2))) / 2,
    "silu": lambda x: x / (1 + math.exp(-x)),
}
FEATURES = torch.tensor([[[[1.0, 2.0, 5.0], [3.0, 6.0, -1.0], [0.0, 4.0, 7.0]]]])


@pytest.mark.parametrize("name", get_args(Activation))
def test_activation_formula(name: Activation) -> None:
    points = [-30.0, -2.0, -0.5, 0.0, 0.5, 2.0, 30.0]
    found = activation_layer(name)(torch.tensor(points, dtype=torch.float64)).tolist()
    assert found == pytest.approx([FORMULAS[name](x) for x in points], rel=1e-12, abs=1e-12)


def test_leaky_relu_slope() -> None:
    assert activation_layer("leaky_relu", 0.2)(torch.tensor([-1.0, 1.0])).tolist() == pytest.approx([-0.2, 1.0])


def test_negative_slope_without_leaky_relu_is_an_error() -> None:
    with pytest.raises(ValueError, match="negative_slope belongs to activation=leaky_relu"):
        activation_layer("tanh", 0.2)


@pytest.mark.parametrize(("kind", "expected"), [("max", 6.0), ("min", 1.0), ("avg", 3.0)])
def test_pooling_by_hand(kind: str, expected: float) -> None:
    # the window of 2x2 holds 1 2 3 6; what does not fill a window is left out
    assert Pool(kind, 2)(FEATURES).tolist() == [[[[expected]]]]  # type: ignore[arg-type]


def test_pooling_with_stride_and_padding_by_hand() -> None:
    # windows of 3 that step by 2, one pixel of padding: corners see 1 2 3 6, 2 5 6 -1, 3 6 0 4, 6 -1 4 7
    assert Pool("max", 3, 2, 1)(FEATURES).flatten().tolist() == [6, 6, 6, 7]
    assert Pool("min", 3, 2, 1)(FEATURES).flatten().tolist() == [1, -1, 0, -1]
    assert Pool("avg", 3, 2, 1)(FEATURES).flatten().tolist() == pytest.approx([12 / 9, 12 / 9, 13 / 9, 16 / 9])


@pytest.mark.parametrize(("kind", "expected"), [("max", 7.0), ("min", -1.0), ("avg", 3.0)])
def test_global_pooling_by_hand(kind: str, expected: float) -> None:
    assert GlobalPool(kind)(FEATURES).tolist() == [[expected]]  # type: ignore[arg-type]
