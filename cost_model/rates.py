"""From measured samples, or from a device row, to rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from paretorch.cost_model.context import in_context
from paretorch.cost_model.curves import Calibration, Curve, Rates, Sample
from paretorch.cost_model.device_rows import Device
from paretorch.cost_model.probes import (
    BATCH,
    CONVOLUTION,
    CONVOLVED,
    CONVOLVED_POSITIONS,
    HEADS,
    NARROW,
    NARROW_COUNT,
    NARROW_ROWS,
    NORMED_COUNT,
    PROBES,
    TOKENS,
)
from paretorch.cost_model.work import RATED_BY_FLOPS
from paretorch.ir.types import DTYPES

NOT_CURVES = (
    "dispatch",
    "packed",
    "chain",
    "linear_add",
    "add_norm",
    "add_out",
    "cold",
    "convolution_norm",
    "block",
    "residual",
    "separable",
)  # each sets a share or an overhead
WHOLE = {probe.curve for probe in PROBES if not probe.narrowed}  # curves whose samples hold the handing out of a whole result
CONVOLUTIONS = {probe.curve for probe in CONVOLUTION}
SERVES = {probe.curve: (probe.curve, *probe.serves) for probe in PROBES}
UNFUSED = 0.8  # a share of a pass above this is noise around one
FREE = 1e30  # bytes per second of what is not executed
LEAST = 0.1  # what is left at least when an overhead is taken off a sample
STRIDED = 0.2  # where permuting costs less than this share of copying, views are not executed


def derive(samples: Iterable[Sample], derived: Mapping[str, str]) -> dict[tuple[str, str], Rates]:
    """Rates by (runtime, dtype). derived: runtimes that were not measured, with the one that their rates follow from."""
    groups: dict[tuple[str, str], list[Sample]] = {}
    for sample in samples:
        groups.setdefault((sample.runtime, sample.dtype), []).append(sample)
    groups = {key: _no_longer_than_more(group) for key, group in groups.items()}
    found = {}
    for (runtime, dtype), group in groups.items():
        curves = _curves(_without_output(group, groups.get((runtime, "f32"), group)))
        if "matrix" not in curves and dtype != "f32":
            curves = _as_base_changes(groups, runtime, dtype)
        if "matrix" in curves and "elementwise" in curves:
            plain = groups.get((runtime, "f32"), group)
            alone = replace(_traits(plain), curves=curves, fixed_s=_fixed(group) or _fixed(plain))  # as the curves, from f32 where need be
            found[runtime, dtype] = in_context(alone, group)
    for name, base in derived.items():
        for (runtime, dtype), rates in list(found.items()):
            if runtime == base:
                found[name, dtype] = _compiled(rates)
    return found


def _no_longer_than_more(group: list[Sample]) -> list[Sample]:
    """The samples, each taking no longer than one of the same curve that is as large or larger in every size: where it did, it was disturbed."""
    found = []
    for sample in group:
        more = [s.seconds for s in group if s.curve == sample.curve and s.amount >= sample.amount and _covers(s.at, sample.at)]
        found.append(replace(sample, seconds=min(more)) if sample.curve not in NOT_CURVES else sample)
    return found


def _covers(larger: tuple[float, ...], smaller: tuple[float, ...]) -> bool:
    return len(larger) == len(smaller) and all(a >= b for a, b in zip(larger, smaller, strict=True))


def _as_base_changes(groups: dict[tuple[str, str], list[Sample]], runtime: str, dtype: str) -> dict[str, Curve]:
    """A runtime's curves at f32, changed as another's change from f32 to this dtype; for one of which only blocks were measured at it."""
    measured = [name for name, kind in groups if kind == dtype and any(s.curve == "matrix" for s in groups[name, kind])]
    if not measured or (runtime, "f32") not in groups:
        return {}
    above, below = (_curves(_without_output(groups[measured[0], kind], groups[measured[0], "f32"])) for kind in (dtype, "f32"))
    own = _curves(_without_output(groups[runtime, "f32"], groups[runtime, "f32"]))
    return {name: curve.times(above[name], below[name]) if name in above and name in below else curve for name, curve in own.items()}


def _traits(plain: list[Sample]) -> Rates:
    """What a runtime does at every dtype, from its samples at f32: overheads, and what it fuses."""
    group = _without_output(plain, plain)
    curves = _curves(group)
    launch = next((s.seconds for s in plain if s.curve == "dispatch"), 0.0)
    strided = _is_strided(plain)
    further: dict[str, Any]
    shares = _shares(group, curves, strided) if "elementwise" in curves else {}
    further = {f"{name}_s_per_byte": _further(plain, name) for name in ("cold", "warm")}
    return replace(Rates({}, launch, strided=strided, view_s=launch, output_s_per_byte=_output_s_per_byte(plain)), **further, **shares)


def _without_output(group: list[Sample], plain: list[Sample]) -> list[Sample]:
    """The samples without the handing out of whole results; those of copies without the permutation that a runtime without strides executes."""
    out, strided = _output_s_per_byte(plain), _is_strided(plain)
    kept = [s for s in group if strided or s.curve != "clone"]
    return [replace(s, seconds=max(s.seconds - out * s.amount / 2, LEAST * s.seconds)) if s.curve in WHOLE else s for s in kept]


def _compiled(eager: Rates) -> Rates:
    """Inductor's rates from those of the kernels that eager has too: assumptions, corrected for a model by its first race."""
    return replace(eager, launch_s=1.5e-6, view_s=0.0, call_s=20e-6, chained=0.1, epilogue=0.6, into_row=0.1, filtered=0.3)


def _output_s_per_byte(plain: Iterable[Sample]) -> float:
    """What handing out a result costs beside making it: an add whose sum is returned, less one of whose sum a column is."""
    whole = next((s for s in plain if s.curve == "add_out"), None)
    kept = next((s for s in plain if s.curve == "elementwise" and whole is not None and s.amount == whole.amount), None)
    return max(whole.seconds - kept.seconds, 0.0) / (whole.amount / 2) if whole is not None and kept is not None else 0.0


def _curves(group: Iterable[Sample]) -> dict[str, Curve]:
    points: dict[str, list[tuple[tuple[float, ...], float]]] = {}
    samples = list(group)
    fixed = _fixed(samples)
    for sample in samples:
        if sample.curve not in NOT_CURVES and sample.amount > 0:
            seconds = max(sample.seconds - fixed.get(sample.curve, 0.0), LEAST * sample.seconds)
            for name in SERVES.get(sample.curve, (sample.curve,)):
                points.setdefault(name, []).append((sample.at, sample.amount / seconds))
    return {"view": Curve.constant(FREE), **{name: Curve.of(found) for name, found in points.items()}}


def _fixed(group: Sequence[Sample]) -> dict[str, float]:
    """What convolutions take beside their flops, by curve: what the shortest takes longer than at the best rate of its curve.

    Eager torch sets up and reorders weights for 55 us in each; between rates that contain that, what lies between is 30 % off.
    """
    found = {}
    for name in sorted({sample.curve for sample in group if sample.curve in CONVOLUTIONS}):
        own = [sample for sample in group if sample.curve == name]
        shortest, best = min(own, key=lambda s: s.amount), max(s.amount / s.seconds for s in own)
        found[name] = max(shortest.seconds - shortest.amount / best, 0.0)
    return found


def _is_strided(group: Iterable[Sample]) -> bool:
    """Whether the largest permutation cost much less than the copy of one."""
    slowest = {name: max((s.seconds for s in group if s.curve == name), default=0.0) for name in ("permute", "clone")}
    return slowest["permute"] <= STRIDED * slowest["clone"]


def _shares(group: list[Sample], curves: dict[str, Curve], strided: bool) -> dict[str, Any]:
    """The shares of `Rates` by name, each from a chain with and without its pointwise ops; 1 where the chain was not measured."""
    total = {s.curve: s for s in group}
    passes, norm = curves["elementwise"], curves.get("batch_norm", curves["elementwise"])

    def seconds(nbytes: float) -> float:
        return nbytes / passes((nbytes,))

    def share(extra: float, expected: float) -> float:
        found = min(max(extra / expected, 0.0), 1.0)
        return found if found < UNFUSED else 1.0

    chained = epilogue = into_row = filtered = 1.0
    if "chain" in total:
        one = total["chain"].amount / 14  # add(x, x) moves two tensors, each of the four others three
        chained = share(total["chain"].seconds - seconds(2 * one), 4 * seconds(3 * one))
    narrow = next((s for s in group if s.curve == "matrix" and s.at == (NARROW_ROWS, NARROW)), None)
    if "linear_add" in total and narrow is not None:
        one = NARROW_ROWS * NARROW * DTYPES[narrow.dtype].itemsize
        extra = total["linear_add"].seconds - NARROW_COUNT * narrow.seconds
        epilogue = share(extra, NARROW_COUNT * (seconds(2 * one) + seconds(3 * one)))
    norms = [s for s in group if s.curve == "layer_norm"]
    if "add_norm" in total and norms:
        largest = max(norms, key=lambda s: s.amount)
        into_row = share(total["add_norm"].seconds / 3 - largest.seconds, seconds(largest.amount))
    plain = next((s for s in group if s.curve == "convolution.pointwise" and s.at == (CONVOLVED_POSITIONS, CONVOLVED)), None)
    if "convolution_norm" in total and plain is not None:
        one = CONVOLVED_POSITIONS * CONVOLVED * DTYPES[plain.dtype].itemsize
        extra = total["convolution_norm"].seconds - NORMED_COUNT * plain.seconds
        filtered = share(extra, NORMED_COUNT * (2 * one / norm((2 * one,)) + seconds(3 * one) + seconds(2 * one)))
    beside = 1.0 if strided else _beside_attention(group)
    # what a runtime fuses behind a product it fuses behind a convolution, too
    return {"chained": chained, "epilogue": epilogue, "into_row": into_row, "filtered": min(filtered, epilogue), "beside_attention": beside}


def _beside_attention(group: list[Sample]) -> float:
    """What moves around attention still cost of what they cost alone."""
    whole = next((s for s in group if s.curve == "packed"), None)
    alone = next((s for s in group if s.curve == "attention" and s.at == (BATCH * HEADS, TOKENS)), None)
    curves = _curves(s for s in group if s.curve in ("permute", "slice"))
    if whole is None or alone is None or not {"permute", "slice"} <= curves.keys():
        return 1.0
    one = BATCH * HEADS * TOKENS * 64 * DTYPES[whole.dtype].itemsize
    permuted = [one * 2 * parts / curves["permute"]((one * 2 * parts,)) for parts in (3, 1)]
    unbound = one * 6 / curves["slice"]((one * 6,))
    return min(max((whole.seconds - alone.seconds) / (sum(permuted) + unbound), 0.0), 1.0)


def _further(plain: list[Sample], name: str) -> float:
    """Seconds per byte of weights that a chain of many linears takes beyond linears whose weights stay in place; from f32, for all dtypes."""
    matrix, extras = _curves(plain).get("matrix"), []
    for sample in plain:
        if sample.curve == name and matrix is not None:
            rows, width = sample.at
            extras.append((sample.seconds - 2 * rows * width**2 / matrix(sample.at)) / (width**2 * DTYPES[sample.dtype].itemsize))
    return max(median(extras), 0.0) if extras else 0.0


# Of a device that is not here. The GPU shares are an H200's (8192^3 bf16 products: 769 to 798 of 989 TFLOP/s on random data; copies: 4.3 of 4.8 TB/s);
# that other GPUs reach the same shares is an assumption, as are all shares of processors, until they are calibrated.
SHARES = {
    "cuda": {"matrix": 0.79, "convolution": 0.6, "attention": 0.6, "bandwidth": 0.896},
    "cpu": {"matrix": 0.7, "convolution": 0.5, "attention": 0.4, "bandwidth": 0.7},
    "fake": {"matrix": 1.0, "convolution": 1.0, "attention": 1.0, "bandwidth": 1.0},
}
SHARES["rocm"] = SHARES["cuda"]
FUSING = {  # what a fused light op still costs of its pass: by what each runtime is known to fuse
    "eager": Rates({}, 0.0),
    "inductor": Rates({}, 0.0, chained=0.0, into_row=0.0, filtered=0.5),
    "triton": Rates({}, 0.0),  # its regions are priced as the kernels that they are
    "onnxruntime": Rates({}, 0.0, filtered=0.0, strided=False),
    "openvino": Rates({}, 0.0, chained=0.0, epilogue=0.0, filtered=0.0, beside_attention=0.0, strided=False),
}
KINDS = ("elementwise", "row", "reduce", "gather", "copy")


def analytic(device: Device) -> Calibration:
    """Rates of a device that is not here, from its row and the shares of its peaks that kernels are assumed to reach."""
    rates = {(runtime, dtype): _of_row(device, runtime, dtype) for runtime in FUSING for dtype in ("f32", "f16", "bf16")}
    facts = {"source": device.source, "shares of peak": "assumed, measured on one H200" if device.kind in ("cuda", "rocm") else "assumed"}
    cache = device.cache_bytes if device.kind == "cpu" else float("inf")  # a GPU reads weights from memory: `bytes` already says so
    return Calibration(device.name, rates, cache, (), facts, device.bandwidth_bytes_per_s)


def _of_row(device: Device, runtime: str, dtype: str) -> Rates:
    share = SHARES[device.kind]
    curves = {kind: Curve.constant(device.peak(dtype) * share[kind]) for kind in RATED_BY_FLOPS}
    bandwidth = Curve.constant(device.bandwidth_bytes_per_s * share["bandwidth"])
    curves |= dict.fromkeys(KINDS, bandwidth)
    curves["view"] = Curve.constant(FREE)
    traits = FUSING[runtime]
    if not traits.strided:
        curves |= dict.fromkeys(EXECUTED_VIEWS, bandwidth)
    return replace(traits, curves=curves, launch_s=device.launch_s, flops_per_s=device.peak("f32"))


EXECUTED_VIEWS = tuple(name for probe in PROBES if probe.is_executed_view for name in (probe.curve, *probe.serves))
