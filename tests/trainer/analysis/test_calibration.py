"""Calibration by hand."""

import numpy as np
import pytest

from shardstep.trainer.analysis.calibration import expected_calibration_error, reliability


def test_by_hand() -> None:
    confidence = np.array([0.55, 0.65, 0.9, 0.95, 1.0], dtype=np.float32)
    correct = np.array([True, False, True, True, False])
    low, high = reliability(confidence, correct, num_bins=4)  # (0.5, 0.75] and (0.75, 1]; the others are empty
    assert (low.lower, low.upper, low.samples) == (0.5, 0.75, 2)
    assert (low.accuracy, low.confidence) == pytest.approx((1 / 2, 0.6))
    assert (high.lower, high.upper, high.samples) == (0.75, 1.0, 3)
    assert (high.accuracy, high.confidence) == pytest.approx((2 / 3, 0.95))
    # (2 |1/2 - 0.6| + 3 |2/3 - 0.95|) / 5 = (0.2 + 0.85) / 5
    assert expected_calibration_error([low, high]) == pytest.approx(0.21)


def test_a_limit_belongs_to_the_bin_below() -> None:
    bins = reliability(np.array([0.5, 1.0, 0.0]), np.array([True, True, True]), num_bins=2)
    assert [(part.upper, part.samples) for part in bins] == [(0.5, 2), (1.0, 1)]


def test_a_model_that_is_as_sure_as_it_is_right_has_no_error() -> None:
    bins = reliability(np.full(4, 0.75), np.array([True, True, True, False]))
    assert expected_calibration_error(bins) == 0
