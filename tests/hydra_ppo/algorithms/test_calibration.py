"""The calibration error of preferences: by hand, and where it has to be 0."""

from __future__ import annotations

import math

import pytest
import torch

from hydra_ppo.algorithms.calibration import expected_calibration_error, share_right


def margin(p: float) -> float:
    """Return the margin whose sigmoid is p."""
    return math.log(p / (1 - p))


def test_by_hand():
    # Bins of width 0.05 over [0.5, 1]: 0.72 and 0.74 share one, of which one hits; 0.93 is alone and hits.
    margins = torch.tensor([margin(0.72), -margin(0.74), margin(0.93)], dtype=torch.float64)
    # (|1 - 1.46| + |1 - 0.93|) / 3
    assert expected_calibration_error(margins).item() == pytest.approx((0.46 + 0.07) / 3)


def test_fewer_bins_average_first():
    margins = torch.tensor([margin(0.6), -margin(0.9)], dtype=torch.float64)
    assert expected_calibration_error(margins, bins=1).item() == pytest.approx(abs(1 - 1.5) / 2)
    assert expected_calibration_error(margins, bins=10).item() == pytest.approx((0.4 + 0.9) / 2)


def test_pairs_that_hold_as_often_as_they_say_are_calibrated():
    sure = [margin(0.8)] * 8 + [-margin(0.8)] * 2
    assert expected_calibration_error(torch.tensor(sure, dtype=torch.float64)).item() == pytest.approx(0.0, abs=1e-12)


def test_a_margin_of_0_is_half_a_hit_and_half_sure():
    assert share_right(torch.tensor([2.0, 0.0, -0.0, -3.0])).tolist() == [1.0, 0.5, 0.5, 0.0]
    assert expected_calibration_error(torch.zeros(4)).item() == 0.0


def test_the_surest_fall_into_the_last_bin():
    """p = 1 has no bin of its own."""
    assert expected_calibration_error(torch.tensor([1e4, 1e4])).item() == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error(torch.tensor([-1e4, 1e4])).item() == pytest.approx(0.5)


def test_what_is_no_number_stays_none():
    assert math.isnan(expected_calibration_error(torch.tensor([1.0, float("nan")])).item())
    assert expected_calibration_error(torch.tensor([math.inf])).item() == 0.0
