"""Rates that were measured alone, corrected by blocks that were measured whole."""

from dataclasses import replace

import pytest

from paretorch.cost_model import context
from paretorch.cost_model.calibrate import analytic
from paretorch.cost_model.context import MOST_SCALE, in_context
from paretorch.cost_model.curves import Rates, Sample
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.probes import WHOLES, Probe, static_graph
from paretorch.cost_model.work import work_of

BLOCK, RESIDUAL, SEPARABLE = WHOLES
ALONE = replace(analytic(DEVICES["fake-compute"]).rates["eager", "f32"], launch_s=1e-6, view_s=1e-6)


def measured(probe: Probe, rows: int, truth: Rates) -> Sample:
    """What a runtime that is exactly as these rates say would have been measured at."""
    amount = sum(work_of(node).bytes_moved for node in static_graph(probe, rows, "f32").calls)
    return Sample("r", "f32", probe.curve, (1.0,), amount, context._cost(truth, probe, rows, "f32"), 0.1)


def test_scale_and_launch_are_found_again():
    truth = replace(ALONE, scale=1.25, launch_s=3e-6, view_s=3e-6)
    found = in_context(ALONE, [measured(BLOCK, rows, truth) for rows in BLOCK.rows])
    assert found.scale == pytest.approx(1.25, rel=1e-3)
    assert found.launch_s == pytest.approx(3e-6, rel=0.05)
    assert found.view_s == found.launch_s


def test_convolutions_have_a_scale_of_their_own():
    truth = replace(ALONE, convolved=0.7)
    found = in_context(ALONE, [measured(RESIDUAL, RESIDUAL.rows[-1], truth)])
    assert found.convolved == pytest.approx(0.7, rel=1e-3)
    assert found.scale == 1.0


def test_separable_convolutions_too():
    truth = replace(ALONE, separated=1.5)
    found = in_context(ALONE, [measured(SEPARABLE, SEPARABLE.rows[-1], truth)])
    assert found.separated == pytest.approx(1.5, rel=1e-3)
    assert found.convolved == 1.0


def test_a_disturbance_is_cut():
    found = in_context(ALONE, [measured(BLOCK, BLOCK.rows[-1], replace(ALONE, scale=5.0))])
    assert found.scale == MOST_SCALE


def test_without_blocks_nothing_changes():
    assert in_context(ALONE, [Sample("r", "f32", "matrix", (1.0, 1.0), 1.0, 1.0, 0.0)]) == ALONE
