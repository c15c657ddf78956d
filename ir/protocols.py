"""What the rooms promise to each other where they must not import each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from paretorch.ir.graph import Graph

Executable = Callable[..., tuple[Any, ...]]  # flat tensors in, flat tuple out; ready to be called and timed


class Runtime(Protocol):
    """What executes a lowered graph: eager, inductor, onnxruntime, openvino."""

    name: str

    def refuses(self, graph: Graph | None = None) -> str | None:
        """None if this runtime can run here (and run this graph); otherwise a sentence that says why not."""

    def compile(self, graph: Graph, example_inputs: Sequence[Tensor]) -> Executable:
        """Lower and load. example_inputs: flat, as the graph's inputs. Raises LoweringError."""


@dataclass(frozen=True)
class Cost:
    """Predicted seconds with their parts; plain floats, at the example's sizes."""

    seconds: float
    flops: float = 0.0
    bytes_moved: float = 0.0
    launches: float = 0.0

    def __add__(self, other: Cost) -> Cost:
        return Cost(
            self.seconds + other.seconds,
            self.flops + other.flops,
            self.bytes_moved + other.bytes_moved,
            self.launches + other.launches,
        )


class KernelCost(Protocol):
    """Prices graphs for one device."""

    def graph_cost(self, graph: Graph, runtime: str) -> Cost:
        """Predicted cost of one call of the whole graph on that runtime."""


@dataclass(frozen=True)
class Measurement:
    """One measured figure, kept as evidence. seconds: the median over rounds; spread: interquartile range over median."""

    name: str
    seconds: float
    spread: float
    rounds: int
    samples: tuple[float, ...] = field(default=(), repr=False)


class Measure(Protocol):
    """Times callables side by side: shuffled rounds, an untimed call before each timed one."""

    def __call__(self, contenders: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Measurement]: ...
