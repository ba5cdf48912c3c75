"""Metrics of predicted motions: against the golden arrays and against hand-made routes."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from worldvln_edge.action_windows import LabelStats, average_windows
from worldvln_edge.training.stages.motion_loss import average_deltas, endpoint_loss
from worldvln_edge.training.stages.motion_metrics import (
    column_errors,
    route_error,
    route_metrics,
)

Golden = Callable[[str], Path]
STATS = LabelStats(mean_angles=(0.1, 0, 0), std_angles=(0.2, 1e-6, 1e-6), mean_t=(0.3, 0, 0), std_t=(0.1, 0.1, 0.1))


def _routes(count: int = 3, motions: int = 5, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    routes = rng.normal(0, 0.2, (count, motions, 6))
    routes[..., 1:3] = 0
    return list(routes)


@pytest.mark.golden
def test_averaged_windows_are_the_golden_ones_also_where_they_are_differentiated(golden: Golden):
    arrays = np.load(golden("training") / "se3_endpoint.npz")
    windows = arrays["window_deltas"].astype(np.float64)
    starts, frames = list(range(len(windows))), len(arrays["aggregated_deltas"])
    deltas = average_windows(windows, starts, frames)
    np.testing.assert_allclose(deltas, arrays["aggregated_deltas"], rtol=1e-9, atol=1e-12)
    differentiable = average_deltas(torch.from_numpy(windows), starts, frames)
    np.testing.assert_allclose(differentiable, arrays["aggregated_deltas"][1:], rtol=1e-9, atol=1e-12)


@pytest.mark.golden
def test_yaw_errors_of_routes_go_the_short_way_round(golden: Golden):
    for predicted, true, expected in np.load(golden("training") / "se3_endpoint.npz")["geo_pairs"]:
        routes = [np.array([[np.radians(yaw), 0, 0, 0, 0, 0]]) for yaw in (predicted, true)]
        assert route_error(*routes).yaw_deg == pytest.approx(expected, abs=1e-9)


def test_a_right_route_has_no_error_and_is_qualified():
    routes = _routes()
    metrics = route_metrics(routes, routes, STATS)
    assert metrics["endpoint_m"] == 0
    assert metrics["angle_deg"] < 1e-4
    assert metrics["qualified"] == 1
    assert metrics["mean_endpoint_m"] > 0


def test_a_route_is_qualified_within_three_metres_and_ten_degrees():
    true = np.zeros((1, 6))
    for yaw_deg, x, expected in ((9.9, 2.9, True), (10.1, 0, False), (0, 3.1, False)):
        assert route_error(np.array([[np.radians(yaw_deg), 0, 0, x, 0, 0]]), true).is_qualified == expected


def test_endpoints_turn_with_the_route():
    """A wrong first turn moves the end by what is flown behind it."""
    true = np.array([[0, 0, 0, 0, 0, 0], [0, 0, 0, 2.0, 0, 0]])
    turned = true.copy()
    turned[0, 0] = np.pi / 2
    error = route_error(turned, true)
    assert error.distance_m == pytest.approx(2 * np.sqrt(2))
    assert error.yaw_deg == pytest.approx(90)


def test_saying_the_mean_has_an_nmse_of_one_in_every_column_that_moves():
    routes = _routes()
    errors = column_errors([np.tile(STATS.mean, (len(route), 1)) for route in routes], routes, STATS)
    assert {name for name in errors if name.startswith("nmse")} == {"nmse_yaw", "nmse_x", "nmse_y", "nmse_z"}
    assert all(errors[name] == pytest.approx(1) for name in errors if name.startswith("nmse"))
    assert errors["mae_x"] == pytest.approx(np.abs(np.concatenate(routes)[:, 3] - 0.3).mean(), rel=1e-5)


def test_endpoint_loss_is_squared_distance_and_yaw():
    predicted, true = (torch.tensor(route) for route in _routes(2))
    error = route_error(predicted.numpy(), true.numpy())
    expected = error.distance_m**2 + np.radians(error.yaw_deg) ** 2
    assert float(endpoint_loss(predicted, true)) == pytest.approx(expected, rel=1e-9)
    predicted.requires_grad_()
    assert torch.autograd.gradcheck(lambda x: endpoint_loss(x, true), predicted)


def test_routes_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="same N >= 1 rows"):
        route_error(np.zeros((2, 6)), np.zeros((3, 6)))
    with pytest.raises(ValueError, match="at least one"):
        route_metrics([], [], STATS)
