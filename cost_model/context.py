"""What nodes cost among others: rates from chains of one op, corrected by blocks of models that were measured whole.

A chain of one op keeps its code, its weights and its activations in the nearest caches, and its threads awake; a model does not. Two sizes of one
block give two figures: T = scale * work + launches * launch_s. Summed isolated timings missed whole models by -35 % without such a correction.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from paretorch.cost_model.curves import Calibration, Rates, Sample
from paretorch.cost_model.device_rows import FAKES
from paretorch.cost_model.price import Prices
from paretorch.cost_model.probes import WHOLES, Probe, static_graph
from paretorch.cost_model.work import work_of

MOST_SCALE = 1.8  # a correction beyond this, or below one over it, is a disturbance and no property of the runtime
MOST_LAUNCH = 4.0  # times the dispatch of a chain


def in_context(rates: Rates, group: Sequence[Sample]) -> Rates:
    """The rates of one runtime and dtype with launch_s and scales from its samples of whole blocks, where there are any."""
    block, residual, separable = WHOLES
    dtype = group[0].dtype
    large, small = _seconds(group, block, block.rows[-1], dtype), _seconds(group, block, block.rows[0], dtype)
    if large is not None:
        rates = _scaled(rates, large, *_parts(rates, block, block.rows[-1], dtype))
    if large is not None and small is not None:
        work, launches = _parts(rates, block, block.rows[0], dtype)
        launch = min(max((small - rates.scale * work) / launches, rates.launch_s), MOST_LAUNCH * rates.launch_s)
        rates = replace(rates, launch_s=launch, view_s=launch if rates.view_s else 0.0)
        rates = _scaled(rates, large, *_parts(rates, block, block.rows[-1], dtype))
    for probe, name in ((residual, "convolved"), (separable, "separated")):
        whole = _seconds(group, probe, probe.rows[-1], dtype)
        if whole is not None:
            without = _cost(replace(rates, **{name: 0.0}), probe, probe.rows[-1], dtype)  # type: ignore[arg-type]
            alone = _cost(replace(rates, **{name: 1.0}), probe, probe.rows[-1], dtype) - without  # type: ignore[arg-type]
            rates = replace(rates, **{name: _within((whole - without) / alone)})  # type: ignore[arg-type]
    return rates


def _scaled(rates: Rates, seconds: float, work: float, launches: float) -> Rates:
    scale = _within((seconds - rates.call_s - launches * rates.launch_s) / work)
    return replace(rates, scale=scale, convolved=scale, separated=scale)


def _seconds(group: Sequence[Sample], probe: Probe, rows: int, dtype: str) -> float | None:
    """The measured seconds of a probe at one of its sizes."""
    amount = sum(work_of(node).bytes_moved for node in static_graph(probe, rows, dtype).calls)
    return next((sample.seconds for sample in group if sample.curve == probe.curve and abs(sample.amount - amount) < 1), None)


def _parts(rates: Rates, probe: Probe, rows: int, dtype: str) -> tuple[float, float]:
    """Seconds of a probe's work, and how many launches are paid for."""
    views = 1.0 if rates.view_s else 0.0
    work = _cost(replace(rates, launch_s=0.0, view_s=0.0, scale=1.0), probe, rows, dtype)
    return work, _cost(replace(rates, launch_s=1.0, view_s=views, scale=1.0), probe, rows, dtype) - work


def _cost(rates: Rates, probe: Probe, rows: int, dtype: str) -> float:
    """Predicted seconds of a probe by these rates, with weights in a cache and nothing handed out."""
    lone = replace(rates, call_s=0.0, output_s_per_byte=0.0)
    calibration = Calibration("block", {("here", dtype): lone, ("here", "f32"): lone}, float("inf"), (), {}, 1.0)
    return Prices(calibration, FAKES[0]).graph_cost(static_graph(probe, rows, dtype), "here").seconds


def _within(scale: float) -> float:
    return min(max(scale, 1 / MOST_SCALE), MOST_SCALE)
