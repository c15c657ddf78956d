"""Runtimes: the same numbers on each, sizes that vary, outputs that are the caller's, precision, refusals."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretorch.codegen.reduced import covers_products, without_reduced
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.ir.builder import build
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType, parse_type
from tests.graphs import exported, zoo_graph
from tests.zoo import make

CPU = ("eager", "inductor", "onnxruntime", "openvino")
QUICK = ("eager", "onnxruntime", "openvino")


class Small(nn.Module):
    """x: f32[B, 4, 8] -> two tensors, one of them not contiguous in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = x + self.down(torch.nn.functional.gelu(self.up(self.norm(x))))
        return y, y.transpose(1, 2).softmax(-1).mean(1)


def require(name: str, graph: Graph | None = None) -> Any:
    refusal = RUNTIMES[name].refuses(graph)
    if refusal is not None:
        pytest.skip(refusal)
    return RUNTIMES[name]


@pytest.fixture(scope="module")
def small() -> tuple[nn.Module, Graph]:
    torch.manual_seed(0)
    model = Small().eval()
    return model, exported(model, (torch.randn(3, 4, 8),), ({0: torch.export.Dim("batch")},))


@pytest.mark.parametrize("name", CPU)
def test_sizes_that_vary(name: str, small: tuple[nn.Module, Graph]) -> None:
    model, graph = small
    execute = require(name).compile(graph, (torch.randn(3, 4, 8),))
    for batch in (3, 1, 6):
        x = torch.randn(batch, 4, 8)
        found = execute(x)
        assert isinstance(found, tuple)
        for a, b in zip(model(x), found, strict=True):
            torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", CPU)
def test_outputs_belong_to_the_caller(name: str) -> None:
    graph = build("one", lambda b, x: (b.relu(x), b.mul(x, 2.0)), x=TensorType("f32", (3, 5)))
    settings = torch._inductor.config.freezing, torch.get_num_threads(), torch.is_grad_enabled()
    execute = require(name).compile(graph, (torch.randn(3, 5),))
    first, second = torch.randn(3, 5), torch.randn(5, 3).t()
    kept = execute(first)
    again = execute(second.requires_grad_())
    torch.testing.assert_close(kept, (first.relu(), first * 2))
    torch.testing.assert_close(again, (second.detach().relu(), second.detach() * 2))
    kept[0].add_(1.0)  # and may be written to
    assert not any(x.requires_grad or x.is_inference() for x in (*kept, *again))
    assert (torch._inductor.config.freezing, torch.get_num_threads(), torch.is_grad_enabled()) == settings


@pytest.mark.parametrize("name", QUICK)
def test_a_model_with_padding(name: str) -> None:
    graph, (_, inputs) = zoo_graph("bert"), make("bert")
    found = require(name, graph).compile(graph, inputs)(*inputs)
    torch.testing.assert_close(found, graph.run(*inputs), rtol=1e-4, atol=1e-5)


def test_outputs_that_are_no_tensors() -> None:
    graph = build("mixed", lambda b, x: (None, b.relu(x), 3), x=TensorType("f32", (2, 2)))
    x = torch.randn(2, 2)
    for name in QUICK:
        first, middle, last = require(name, graph).compile(graph, (x,))(x)
        assert (first, last) == (None, 3)
        assert torch.equal(middle, x.relu())


def half_graph(everywhere: bool) -> Graph:
    """Two products, the first in bf16, the second too if everywhere."""

    def products(b: Any, x: Any, first: Any, second: Any) -> Any:
        cast = torch.ops.aten._to_copy.default
        half = [b.call(cast, (value,), {"dtype": torch.bfloat16}) for value in (x, first, second)]
        y = b.linear(half[0], half[1])
        if everywhere:
            return b.call(cast, (b.linear(b.relu(y), half[2]),), {"dtype": torch.float32})
        return b.linear(b.call(cast, (y,), {"dtype": torch.float32}), second)

    weight = TensorType("f32", (8, 8))
    return build("half", products, x=TensorType("f32", (4, 8)), first=weight, second=weight)


def test_half_precision() -> None:
    whole, part = half_graph(True), half_graph(False)
    inputs = [torch.randn(4, 8), torch.randn(8, 8), torch.randn(8, 8)]
    assert covers_products(whole)
    assert not covers_products(part)
    assert not any(node.meta["val"].dtype == torch.bfloat16 for node in without_reduced(whole).nodes if node.op != "output")
    torch.testing.assert_close(without_reduced(whole).run(*inputs)[0], (inputs[0] @ inputs[1].T).relu() @ inputs[2].T, rtol=1e-5, atol=1e-5)
    assert RUNTIMES["onnxruntime"].refuses(part) == "ONNX Runtime has no products in half precision on CPU; _to_copy is bf16"
    found = require("openvino", whole).compile(whole, inputs)(*inputs)[0]
    assert found.dtype == torch.float32
    assert 0 < float((found - without_reduced(whole).run(*inputs)[0]).norm() / found.norm()) < 0.02
    assert RUNTIMES["openvino"].refuses(part) == (
        "OpenVINO takes one precision for the whole model; _to_copy is bf16 but some matrix products are f32"
    )


def test_refusals() -> None:
    def refusal(name: str, function: Any, **types: str) -> str | None:
        return RUNTIMES[name].refuses(build("one", function, **{key: parse_type(text) for key, text in types.items()}))

    assert all(RUNTIMES[name].refuses() is None for name in ("eager", "inductor"))
    assert refusal("onnxruntime", lambda b, x: b.relu(x), x="bf16[2]") is not None
    assert refusal("onnxruntime", lambda b, x: b.abs(x), x="c64[2]") == "the input x is c64, which numpy cannot hold"
    assert refusal("onnxruntime", lambda b, x: b.call(torch.ops.aten.sym_size.int, (x, 0)), x="f32[s0]") == (
        "the output sym_size is a number that is computed from sizes; an ONNX model returns tensors"
    )
    assert refusal("onnxruntime", lambda b, x: (None,), x="f32[2]") == "the graph returns no tensor"
    assert RUNTIMES["openvino"].refuses() is not None or refusal("openvino", lambda b, x: b.relu(x), x="f64[2]") == (
        "OpenVINO computes f64 in f32; x is f64"
    )
    odd = build("odd", lambda b, x: b.call(torch.ops.aten.digamma.default, (x,)), x=TensorType("f32", (2, 3)))
    with pytest.raises(LoweringError, match="digamma"):
        RUNTIMES["onnxruntime"].compile(odd, (torch.randn(2, 3),))


def test_weights_that_were_edited_in_place_are_exported_again() -> None:
    pytest.importorskip("onnxruntime")
    model = nn.Sequential(nn.Linear(8, 64), nn.Linear(64, 64), nn.Linear(64, 8)).eval()  # its weights are small, large and small
    x = torch.randn(2, 8, generator=torch.Generator().manual_seed(0))
    graph = exported(model, (x,))
    runtime = RUNTIMES["onnxruntime"]
    assert torch.allclose(runtime.compile(graph, (x,))(x)[0], model(x), atol=1e-5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1)
    again = exported(model, (x,))  # the first graph still lives, and shares its weights
    assert torch.allclose(runtime.compile(again, (x,))(x)[0], model(x), atol=1e-5)
