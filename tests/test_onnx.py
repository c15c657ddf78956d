"""ONNX models: each attention form, the token ops, names, varying sizes, weights in and beside the file."""

from __future__ import annotations

from contextlib import nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any

import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from paretorch.codegen.onnx import EMITTERS, OnnxModel, check_onnx, to_onnx
from paretorch.codegen.onnx import export as export_module
from paretorch.codegen.onnx.session import OnnxSession
from paretorch.ir.builder import build
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import OPS, aten
from paretorch.ir.types import TensorType, parse_type
from tests.graphs import exported, zoo_graph
from tests.zoo import make

ATTENTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "causal": {"right": 0},
    "window": {"left": 2, "right": 1},
    "sinks": {"left": 1, "right": 0, "sinks": 2},
    "offset": {"left": 3, "right": 0, "offset": 2},
    "softcap": {"softcap": 2.0},
    "capped window": {"softcap": 2.0, "left": 2, "right": 0},
    "negative scale": {"scale": -0.5},
    "bool mask": {"mask": "bool[2,1,5,7]"},
    "bool mask of one row": {"mask": "bool[2,1,1,7]", "right": 2},
    "added mask": {"mask": "f32[5,7]"},
    "added mask, causal": {"mask": "f32[2,4,5,7]", "right": 0},
    "key bias": {"key_bias": "f32[2,7]"},
    "key bias and bool mask": {"key_bias": "f32[2,7]", "mask": "bool[1,4,5,7]"},
    "key bias and added mask": {"key_bias": "f32[2,7]", "mask": "f32[5,7]", "left": 1},
    "lengths": {"lengths": "i64[2,1]"},
    "lengths of rows and key bias": {"lengths": "i32[2,5]", "key_bias": "f32[2,7]", "right": 3},
}


def attention_graph(heads: int, kv_heads: int, *cases: str) -> Graph:
    """These attentions of B=2, Tq=5, Tk=7, D=6, Dv=3, an output each; masks and biases are inputs."""
    types = {"query": f"f32[2,{heads},5,6]", "key": f"f32[2,{kv_heads},7,6]", "value": f"f32[2,{kv_heads},7,3]"}
    extra = {
        f"{name}_{place}": text for place, case in enumerate(cases) for name, text in ATTENTIONS[case].items() if isinstance(text, str)
    }

    def outputs(b: Any, query: Any, key: Any, value: Any, **values: Any) -> tuple[Any, ...]:
        made = []
        for place, case in enumerate(cases):
            given = {name: values.get(f"{name}_{place}", found) for name, found in ATTENTIONS[case].items()}
            made.append(b.attention(query, key, value, **({"scale": 0.4} | given)))
        return tuple(made)

    return build("attentions", outputs, **{name: parse_type(text) for name, text in (types | extra).items()})  # type: ignore[arg-type]


def inputs_of(graph: Graph, seed: int = 0) -> list[Tensor]:
    """Random inputs; of a mask or key bias some entries hide, and one whole row of each."""
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for node in graph.inputs:
        fake = node.meta["val"]
        x = torch.randn([int(size) for size in fake.shape], generator=generator)
        if node.name.startswith("lengths"):
            x = torch.randint(-1, 9, x.shape, generator=generator, dtype=fake.dtype)
        if fake.dtype == torch.bool:
            x = x > -0.5
            x[..., -1, :] = False
        elif node.name.startswith(("mask", "key_bias")):
            x = x.masked_fill(torch.rand(x.shape, generator=generator) < 0.3, -torch.inf)
            x[-1, ...] = -torch.inf
        inputs.append(x)
    return inputs


@pytest.mark.parametrize(("opset", "kv_heads"), [(20, 2), (23, 4), (23, 1)])
def test_attention(opset: int, kv_heads: int) -> None:
    graph = attention_graph(4, kv_heads, *ATTENTIONS)
    inputs, model = inputs_of(graph), to_onnx(graph, opset=opset)
    kinds = [node.op_type for node in model.skeleton.graph.node]
    assert kinds.count("Attention") == (2 if opset == 23 else 0)  # plain and causal: where the op says all there is to say
    for case, a, b in zip(ATTENTIONS, graph.run(*inputs), OnnxSession(model)(inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=1e-5, atol=1e-6, msg=case)


def test_torch_attention_of_three_and_four_dimensions() -> None:
    """Ordinary graphs that nobody normalised: one head without its axis, a mask, grouped heads, a varying batch."""
    form = aten("scaled_dot_product_attention.default")

    def outputs(b: Any, x: Any, mask: Any, query: Any, key: Any) -> tuple[Any, ...]:
        return (
            b.call(form, (x, x, x)),
            b.call(form, (x, x, x, mask)),
            b.call(form, (x, x, x, None, 0.0, True)),
            b.call(form, (query, key, key), {"scale": 0.3, "enable_gqa": True}),
        )

    graph = build(
        "torch",
        outputs,
        x=parse_type("f32[s0,5,6]"),
        mask=parse_type("bool[s0,1,5]"),
        query=parse_type("f32[2,4,5,6]"),
        key=parse_type("f32[2,2,7,6]"),
    )
    model = to_onnx(graph)
    for batch in (1, 3):
        inputs = (torch.randn(batch, 5, 6), torch.rand(batch, 1, 5) > 0.3, torch.randn(2, 4, 5, 6), torch.randn(2, 2, 7, 6))
        assert check_onnx(model, graph, inputs, 1e-5) <= 1e-5


def test_emitters_are_those_that_the_op_table_names() -> None:
    known = {schema.name for schema in onnx.defs.get_all_schemas() if schema.domain == ""}
    named = {op.name: op.onnx for op in OPS.values() if isinstance(op.onnx, str)}
    assert set(EMITTERS) == {name for name in named.values() if name not in known}


def tokens_graph(batch: str) -> Graph:
    def merge(b: Any, x: Any, size: Any) -> tuple[Any, ...]:
        match = b.match_tokens(x, size, 4, 1)
        kept, source, target = (b.item(match, place) for place in range(3))
        merged = b.merge_tokens(x, kept, source, target, size)
        x, size = b.item(merged, 0), b.item(merged, 1)
        return x, size, b.source_map(kept, source, target), b.log_size(size), b.weigh_tokens(x, size, 1, [0], True)

    return build("tokens", merge, x=parse_type(f"f32[{batch},17,8]"), size=parse_type(f"f32[{batch},17]"))


def test_token_ops_with_a_varying_batch() -> None:
    graph = tokens_graph("s0")
    model = to_onnx(graph, names={str(symbol_names(graph)[0]): "batch"})
    assert [info.type.tensor_type.shape.dim[0].dim_param for info in (*model.skeleton.graph.input, *model.skeleton.graph.output)] == [
        "batch"
    ] * 7
    for batch in (1, 2, 5):
        size = torch.ones(batch, 17).index_fill(1, torch.tensor([7]), 3.0)
        assert check_onnx(model, graph, (torch.randn(batch, 17, 8), size), 1e-5) <= 1e-5


def symbol_names(graph: Graph) -> list[str]:
    return sorted({str(size) for node in graph.inputs for size in node.meta["val"].shape if isinstance(size, torch.SymInt)})


@pytest.mark.parametrize("name", ["swin"])
def test_models(name: str) -> None:
    graph, (_, inputs) = zoo_graph(name), make(name)
    assert check_onnx(to_onnx(graph), graph, inputs, 1e-5) <= 1e-5


class Returns(nn.Module):
    """Outputs of every kind: an input, a value twice, a truth, a number that is fixed, a count of truths."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Buffer(torch.arange(6.0).reshape(2, 3))

    def forward(self, x: Tensor, unused: Tensor) -> tuple[Any, ...]:
        y = x * 2 + self.table
        return x, y, y, y > 0, None, 3, self.table, (y > 0).sum(-1) + torch.arange(2), x.double().sum()


def test_outputs_of_every_kind() -> None:
    graph = exported(Returns(), (torch.randn(2, 3), torch.randn(4)))
    model = to_onnx(graph)
    assert [info.name for info in model.skeleton.graph.input] == ["x", "unused"]
    assert len(model.skeleton.graph.output) == 7
    assert check_onnx(model, graph, (torch.randn(2, 3), torch.randn(4)), 1e-6) <= 1e-6


@pytest.fixture(scope="module")
def linears() -> tuple[Graph, OnnxModel]:
    graph = exported(nn.Sequential(nn.Linear(40, 60), nn.Linear(60, 40)), (torch.randn(3, 40),))
    return graph, to_onnx(graph)


def test_weights_stay_apart_under_their_names(linears: tuple[Graph, OnnxModel]) -> None:
    graph, model = linears
    assert model.weight_bytes == 2 * 40 * 60 * 4
    assert model.skeleton.ByteSize() < 4000
    assert set(model.weights) <= {initializer.name for initializer in model.skeleton.graph.initializer}
    assert set(graph.constants) & {initializer.name for initializer in model.skeleton.graph.initializer}


@pytest.mark.parametrize("limit", [0, 10**9])
def test_saved_models_load(linears: tuple[Graph, OnnxModel], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int) -> None:
    monkeypatch.setattr(export_module, "LARGEST_INLINE", limit)
    (graph, model), x = linears, torch.randn(3, 40)
    model.save(tmp_path / "model.onnx")
    assert (tmp_path / "model.onnx.weights").exists() == (limit == 0)
    onnx.checker.check_model(str(tmp_path / "model.onnx"))
    (found,) = onnxruntime.InferenceSession(str(tmp_path / "model.onnx")).run(None, {str(graph.inputs[0].target): x.numpy()})
    torch.testing.assert_close(torch.from_numpy(found), graph.run(x)[0], rtol=1e-5, atol=1e-5)
    if limit == 0:
        with pytest.raises(LoweringError, match="more than one ONNX file holds"):
            model.proto()


def test_refusals(linears: tuple[Graph, OnnxModel]) -> None:
    graph, model = linears
    with pytest.raises(LoweringError, match=r"opset 7 is not offered; known: 20, 23"):
        to_onnx(graph, opset=7)
    wrong = OnnxModel(model.skeleton, {name: array + 1 for name, array in model.weights.items()})
    with pytest.raises(LoweringError, match=r"output 0 of the ONNX model differs from torch by .* \(relative\); 1e-04 is allowed"):
        check_onnx(wrong, graph, (torch.randn(3, 40),))
    odd = build("odd", lambda b, x: b.call(torch.ops.aten.digamma.default, (x,)), x=TensorType("f32", (2, 3)))
    with pytest.raises(LoweringError, match=r"torch.onnx cannot export this graph: .*digamma"):
        to_onnx(odd)


def test_the_exporters_translations_are_parsed_once(linears: tuple[Graph, OnnxModel], monkeypatch: pytest.MonkeyPatch) -> None:
    reader = import_module("torch.onnx._internal._lazy_import").onnxscript_apis
    real = reader.get_torchlib_ops
    calls: list[None] = []
    monkeypatch.setattr(export_module, "_LIBRARY", [])
    monkeypatch.setattr(import_module(reader._name), "get_torchlib_ops", lambda: [calls.append(None), *real()][1:])
    models = [to_onnx(linears[0]) for _ in range(3)]
    assert len(calls) == 1
    assert len({model.skeleton.SerializeToString() for model in models}) == 1
    assert "get_torchlib_ops" not in vars(reader), "the exporter is left as it was"


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("opset", [20, 23])
def test_batch_norm(affine: bool, opset: int) -> None:
    norm, x = nn.BatchNorm2d(3, affine=affine).eval(), torch.randn(2, 3, 4, 5)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    norm.running_mean.normal_()
    norm.running_var.uniform_(0.5, 2.0)
    session = OnnxSession(to_onnx(exported(norm, (x,)), opset=opset))
    torch.testing.assert_close(session([x])[0], norm(x).detach(), rtol=1e-5, atol=1e-5)


def test_a_spared_export_is_the_whole_one(monkeypatch: pytest.MonkeyPatch) -> None:
    """The exporter is kept from tracing and reading what this program does not need; the model is the same."""
    graph = zoo_graph("vit_class")
    spared = to_onnx(graph)
    monkeypatch.setattr(export_module, "_spared", lambda _: nullcontext())
    whole = to_onnx(graph)
    assert [node.op_type for node in spared.skeleton.graph.node] == [node.op_type for node in whole.skeleton.graph.node]
    assert spared.weights.keys() == whole.weights.keys()
