"""A runtime whose calls are replayed as CUDA graphs, around another runtime; a stand-in for CUDA records them."""

from __future__ import annotations

from typing import Any

import torch

from paretorch.codegen.cuda_graphs import Graphed, waits_for_values
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten
from tests.kernel_cases import graph_of, inputs_of
from tests.test_cuda_graphs import Fake


def affine(b: Any, x: Any, y: Any) -> Any:
    return b.mul(b.add(x, y), 2.0)


def test_graphed_runtime() -> None:
    fake, notes = Fake(), []
    runtime = Graphed(RUNTIMES["eager"], notes=notes, recorder=fake)
    assert (runtime.name, runtime.refuses()) == ("eager", None)
    graph = graph_of(affine, x="f32[2,3]", y="f32[3]")
    execute = runtime.compile(graph, inputs_of(graph))
    for seed in range(3):
        inputs = inputs_of(graph, seed)
        assert torch.equal(execute(*inputs)[0], graph.run(*inputs)[0])
    assert (len(fake.records), fake.replays, notes) == (1, 3, [])
    varying = graph_of(affine, x="f32[n,3]", y="f32[3]")
    execute = runtime.compile(varying, inputs_of(varying))
    for hint in (4, 5, 4, 5):
        inputs = inputs_of(varying, hint=hint)
        assert torch.equal(execute(*inputs)[0], varying.run(*inputs)[0])
    assert len(fake.records) == 3


def test_a_reason_is_noted_once() -> None:
    notes: list[str] = []
    runtime = Graphed(RUNTIMES["eager"], notes=notes, recorder=Fake(refusal="it is Sunday"))
    graph = graph_of(affine, x="f32[2]", y="f32[2]")
    for _ in range(2):
        runtime.compile(graph, inputs_of(graph))(*inputs_of(graph))
    assert notes == ["eager runs without a CUDA graph: it is Sunday"]


def counted(b: Any, x: Any) -> Any:
    return b.call(aten("nonzero.default"), (x,))


def gathered(b: Any, x: Any, place: Any) -> Any:
    return b.call(aten("index.Tensor"), (x, [place]))


def test_a_graph_that_waits_for_values_is_not_recorded() -> None:
    fake, notes = Fake(), []
    with_count: Graph = graph_of(counted, x="f32[4]")
    execute = Graphed(RUNTIMES["eager"], notes=notes, recorder=fake).compile(with_count, inputs_of(with_count))
    assert execute(torch.tensor([0.0, 1.0, 0.0, 2.0]))[0].tolist() == [[1], [3]]
    assert fake.records == []
    assert notes == ["eager runs without a CUDA graph: nonzero (aten.nonzero.default) waits for values that only the device knows"]
    assert waits_for_values(graph_of(gathered, x="f32[4,3]", place="i64[2]")) is None
