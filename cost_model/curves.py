"""Price curves: measured rates over shapes, interpolated on logarithms; and what they are gathered in, one `Rates` per runtime and dtype."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from statistics import geometric_mean, median

Point = tuple[tuple[float, ...], float]  # where, and the rate there


@dataclass(frozen=True)
class Curve:
    """A rate over one or two axes, linear in the logarithms between measured places and constant beyond the outermost ones.

    columns: for a curve of one axis one column of (place, rate); for two axes a column per place on the second axis.
    A curve without axes is a constant.
    """

    columns: tuple[tuple[float, tuple[tuple[float, float], ...]], ...]

    @classmethod
    def of(cls, points: Iterable[Point]) -> Curve:
        """From measured points; equal places are averaged."""
        columns: dict[float, dict[float, list[float]]] = {}
        for at, rate in points:
            second = at[1] if len(at) > 1 else 1.0
            columns.setdefault(math.log(second), {}).setdefault(math.log(at[0]), []).append(rate)
        return cls(
            tuple(
                (second, tuple((first, math.log(geometric_mean(rates))) for first, rates in sorted(column.items())))
                for second, column in sorted(columns.items())
            )
        )

    def times(self, above: Curve, below: Curve) -> Curve:
        """This curve with each of its rates multiplied by above / below at the same place."""
        has_two = len(self.columns) > 1 or self.columns[0][0] != 0.0
        points = []
        for second, column in self.columns:
            for first, rate in column:
                at = (math.exp(first), math.exp(second)) if has_two else (math.exp(first),)
                points.append((at, math.exp(rate) * above(at) / below(at)))
        return Curve.of(points)

    @classmethod
    def constant(cls, rate: float) -> Curve:
        return cls.of([((1.0,), rate)])

    def __call__(self, at: tuple[float, ...]) -> float:
        """The rate there."""
        first = math.log(at[0])
        second = math.log(at[1]) if len(at) > 1 else self.columns[0][0]
        return math.exp(_between([(place, _between(column, first)) for place, column in self.columns], second))


def _between(points: Iterable[tuple[float, float]], place: float) -> float:
    """Linear between the points, which are in order; constant outside."""
    known = list(points)
    right = bisect_right(known, (place, math.inf))
    if right == 0:
        return known[0][1]
    if right == len(known):
        return known[-1][1]
    (x0, y0), (x1, y1) = known[right - 1], known[right]
    return y0 + (y1 - y0) * (place - x0) / (x1 - x0)


@dataclass(frozen=True)
class Rates:
    """What one runtime does at one dtype.

    curves: by op name or kind; flops per second for kinds that are rated by flops, else bytes per second. fixed_s: what each node takes beside
    its flops, for some of these names. launch_s: of one node of any kind; call_s: of one call of the whole graph, whatever is in it;
    output_s_per_byte: of handing out results.
    Shares of its own pass over memory that a light op still costs where a runtime may fuse it. chained: after another pointwise op; epilogue:
    after a matrix product; filtered: after a convolution; into_row: before a reduction along rows; beside_attention: a view that is executed,
    between attention and the products around it.
    strided: views are not executed and cost view_s, and a copy is made only where a reshape needs it. cold_s_per_byte: further seconds for each
    byte of weights that no cache holds; warm_s_per_byte: of those that only the shared cache holds.
    scale, convolved, separated: how much longer nodes, full convolutions, and pointwise and depthwise ones take among others than in a chain of
    their own.
    flops_per_s: bounds the kinds that are rated by bytes, on devices that are known by their row only; measured curves contain it.
    """

    curves: Mapping[str, Curve]
    launch_s: float
    call_s: float = 0.0
    chained: float = 1.0
    epilogue: float = 1.0
    into_row: float = 1.0
    filtered: float = 1.0
    beside_attention: float = 1.0
    strided: bool = True
    view_s: float = 0.0
    cold_s_per_byte: float = 0.0
    warm_s_per_byte: float = 0.0
    flops_per_s: float = math.inf
    output_s_per_byte: float = 0.0
    scale: float = 1.0
    convolved: float = 1.0
    separated: float = 1.0
    fixed_s: Mapping[str, float] = field(default_factory=dict)

    def curve(self, names: Iterable[str]) -> Curve | None:
        """The first of these curves that there is."""
        return next((self.curves[name] for name in names if name in self.curves), None)

    def fixed(self, names: Iterable[str]) -> float:
        """What a node takes beside its flops at the first of these curves that there is."""
        return next((self.fixed_s.get(name, 0.0) for name in names if name in self.curves), 0.0)


@dataclass(frozen=True)
class Sample:
    """One measured figure. seconds: of one node without its dispatch, a low percentile over repeats; spread: interquartile range over median.

    amount: the flops or bytes that those seconds did.
    """

    runtime: str
    dtype: str
    curve: str
    at: tuple[float, ...]
    amount: float
    seconds: float
    spread: float


@dataclass(frozen=True)
class Calibration:
    """Rates by (runtime, dtype) of a device, with the samples they were made from. cache_bytes: what caches hold of weights;
    near_cache_bytes: what a core's own cache does.
    """

    name: str
    rates: Mapping[tuple[str, str], Rates]
    cache_bytes: float
    samples: tuple[Sample, ...] = ()
    facts: Mapping[str, str] = field(default_factory=dict)
    bandwidth_bytes_per_s: float = 0.0
    near_cache_bytes: float = math.inf

    def __str__(self) -> str:
        lines = [f"calibration of {self.name}", *(f"  {name}: {value}" for name, value in self.facts.items())]
        for (runtime, dtype), rates in sorted(self.rates.items()):
            best = {
                name: max((s.amount / s.seconds for s in self.of(runtime, dtype) if s.curve == name), default=0.0) for name in rates.curves
            }
            unit = {name: "GFLOP/s" if len(curve.columns) > 1 or name == "matrix" else "GB/s" for name, curve in rates.curves.items()}
            parts = [f"{name} {rate / 1e9:.1f} {unit[name]}" for name, rate in sorted(best.items()) if rate]
            parts += [f"launch {rates.launch_s * 1e6:.1f} us", f"call {rates.call_s * 1e6:.0f} us"]
            parts += [f"in models {rates.scale:.2f} times as long, convolutions {rates.convolved:.2f} times"]
            spreads = [s.spread for s in self.of(runtime, dtype)]
            spread = f", spread {median(spreads):.0%}" if spreads else ""
            lines.append(f"  {runtime} {dtype}{spread}: {', '.join(parts)}")
        return "\n".join(lines)

    def of(self, runtime: str, dtype: str) -> list[Sample]:
        """The samples of one runtime and dtype."""
        return [sample for sample in self.samples if (sample.runtime, sample.dtype) == (runtime, dtype)]
