"""Generated kernels: their text, what they cover, their numbers in triton's interpreter, and what compilers make of them."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.expressions import not_expressible
from paretorch.codegen.kernel import ARCHITECTURES, compile_kernels
from paretorch.codegen.regions import candidate_regions, covers, is_schedulable, region_of, resources
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.codegen.templates import TEMPLATES
from paretorch.codegen.triton_runtime import chosen_regions, with_kernels
from paretorch.codegen.triton_text import render
from paretorch.ir.builder import build
from paretorch.ir.errors import LoweringError, TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import OPS, aten
from paretorch.ir.types import TensorType, parse_type
from tests.graphs import zoo_graph
from tests.zoo import make

pytest.importorskip("triton")

# What computing in f32 and rounding once leaves against f64 rounded once: a few units in the last place of each type.
TOLERANCE = {"f64": 1e-12, "f32": 2e-6, "f16": 2e-3, "bf16": 1.6e-2}


def graph_of(function: Any, **types: str) -> Graph:
    return build("one", function, **{name: parse_type(text) for name, text in types.items()})


def inputs_of(graph: Graph, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = []
    for node in graph.inputs:
        fake = node.meta["val"]
        x = torch.randn([int(size) for size in fake.shape], generator=generator, dtype=torch.float64)
        inputs.append(x > 0 if fake.dtype == torch.bool else (x * 3).to(fake.dtype))
    return inputs


def in_f64(function: Any, types: dict[str, str], inputs: list[Tensor]) -> tuple[Any, ...]:
    """The same function with every floating input in f64."""
    wide = {name: f"f64{text[text.index('[') :]}" if text.split("[")[0] in TOLERANCE else text for name, text in types.items()}
    return graph_of(function, **wide).run(*(x.double() if x.is_floating_point() else x for x in inputs))


def check(function: Any, types: dict[str, str], tolerance: float, seed: int = 0) -> None:
    """One kernel for the whole graph, against torch in f64."""
    graph = graph_of(function, **types)
    inputs = inputs_of(graph, seed)
    regions = chosen_regions(graph)
    assert [len(region.nodes) for region in regions] == [len(graph.calls)]
    found = with_kernels(graph, regions)[0](*inputs)
    for a, b, node in zip(in_f64(function, types, inputs), found, graph.outputs, strict=True):
        assert b.dtype == node.meta["val"].dtype
        assert b.shape == node.meta["val"].shape
        torch.testing.assert_close(b.double() if b.is_floating_point() else b, a, rtol=tolerance, atol=tolerance)


def add_layer_norm(b: Any, x: Any, residual: Any, weight: Any, bias: Any) -> tuple[Any, Any]:
    total = b.add(x, residual)
    return total, b.gelu(b.layer_norm(total, [weight.meta["val"].shape[0]], weight, bias, 1e-5))


def scaled_rms_norm(b: Any, x: Any, weight: Any, scale: Any, gate: Any) -> Any:
    normed = b.rms_norm(b.mul(x, scale), [weight.meta["val"].shape[0]], weight, 1e-6)
    return b.mul(b.silu(gate), b.call(aten("_to_copy.default"), (normed,), {"dtype": gate.meta["val"].dtype}))


def chain(b: Any, x: Any, channel: Any, number: Any, mask: Any) -> tuple[Any, Any]:
    y = b.mul(b.add(x, channel), number)
    return b.tanh(b.where(mask, b.gelu(y, approximate="tanh"), y)), b.call(aten("gt.Scalar"), (y, 0.5))


EXAMPLES: dict[str, tuple[Callable[..., Any], dict[str, str]]] = {
    "layer_norm": (add_layer_norm, {"x": "bf16[3,4,64]", "residual": "bf16[3,4,64]", "weight": "f32[64]", "bias": "f32[64]"}),
    "rms_norm": (scaled_rms_norm, {"x": "f32[2,5,96]", "weight": "f32[96]", "scale": "f32[2,1,96]", "gate": "f32[2,5,96]"}),
    "elementwise": (chain, {"x": "f32[5,4,7,3]", "channel": "f32[4,1,3]", "number": "f32[]", "mask": "bool[5,1,7,1]"}),
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_text(name: str, golden: Callable[[str], None]) -> None:
    function, types = EXAMPLES[name]
    graph = graph_of(function, **types)
    kernel = render(next(region for region in candidate_regions(graph) if region.template == name), 3)
    assert (
        kernel.source
        == render(next(region for region in candidate_regions(graph_of(function, **types)) if region.template == name), 3).source
    )
    golden(kernel.source)


def test_regions_around_a_norm() -> None:
    """A sum that others use is written too; what only the norm's users need comes along; other users end the chain."""
    graph = graph_of(scaled_rms_norm, **EXAMPLES["rms_norm"][1])
    assert [str(region) for region in candidate_regions(graph)] == [
        "rms_norm(mul, rms_norm, silu, _to_copy, mul_1)",
        "rms_norm(rms_norm)",
        "elementwise(silu, _to_copy, mul_1)",
    ]

    def shared(b: Any, x: Any, y: Any) -> tuple[Any, ...]:
        total = b.add(x, y)
        normed = b.layer_norm(total, [8])
        return b.relu(normed), b.tanh(normed), total

    (region, *_) = candidate_regions(graph_of(shared, x="f32[4,8]", y="f32[4,8]"))
    assert str(region) == "layer_norm(add, layer_norm)"
    assert [node.name for node in region.writes] == ["add", "layer_norm"]


@settings(max_examples=15, deadline=None)
@given(
    rows=st.sampled_from([1, 2, 7, 13]),
    width=st.sampled_from([1, 2, 3, 17, 64, 127, 1030]),
    dtype=st.sampled_from(["f32", "f16", "bf16", "f64"]),
    seed=st.integers(0, 99),
)
def test_layer_norm(rows: int, width: int, dtype: str, seed: int) -> None:
    types = {"x": f"{dtype}[{rows},{width}]", "residual": f"{dtype}[{rows},{width}]", "weight": f"f32[{width}]", "bias": f"f32[{width}]"}
    if dtype == "f64":
        types |= {"weight": f"f64[{width}]", "bias": f"f64[{width}]"}
    if dtype in ("f16", "bf16"):
        types |= {"weight": f"{dtype}[{width}]", "bias": f"{dtype}[{width}]"}
    check(add_layer_norm, types, TOLERANCE[dtype] * 4, seed)


@settings(max_examples=10, deadline=None)
@given(rows=st.sampled_from([1, 5, 11]), width=st.sampled_from([1, 5, 61, 256, 1030]), dtype=st.sampled_from(["f32", "bf16"]))
def test_rms_norm(rows: int, width: int, dtype: str) -> None:
    def norm(b: Any, x: Any, weight: Any, shift: Any) -> Any:
        return b.add(b.rms_norm(x, [width], weight, 1e-6), shift)

    check(norm, {"x": f"{dtype}[2,{rows},{width}]", "weight": f"{dtype}[{width}]", "shift": f"{dtype}[2,1,{width}]"}, TOLERANCE[dtype] * 4)
    check(lambda b, x: b.rms_norm(x, [width], None, 1e-6), {"x": f"{dtype}[{rows},{width}]"}, TOLERANCE[dtype] * 4)


@settings(max_examples=15, deadline=None)
@given(shape=st.lists(st.sampled_from([1, 2, 3, 5, 11]), min_size=0, max_size=4), data=st.data())
def test_chain_of_any_shapes(shape: list[int], data: st.DataObject) -> None:
    def part(lead: int) -> str:
        kept = [size if data.draw(st.booleans()) else 1 for size in shape[lead:]]
        return ",".join(map(str, kept))

    lead = data.draw(st.integers(0, len(shape)))
    whole = ",".join(map(str, shape))
    check(chain, {"x": f"f32[{whole}]", "channel": f"f32[{part(lead)}]", "number": "f32[]", "mask": f"bool[{part(0)}]"}, 4e-6)


def test_more_than_a_block_and_none() -> None:
    types = {"x": "f32[3,1031]", "channel": "f32[1031]", "number": "f32[]", "mask": "bool[3,1]"}
    check(chain, types, 4e-6)
    check(chain, {name: text.replace("3,", "0,") for name, text in types.items()}, 4e-6)


def test_inputs_of_any_layout() -> None:
    graph = graph_of(add_layer_norm, x="f32[6,8]", residual="f32[6,8]", weight="f32[8]", bias="f32[8]")
    x, residual, weight, bias = inputs_of(graph)
    found = with_kernels(graph)[0](x.t().contiguous().t(), residual[:1].expand(6, 8), weight, bias)
    torch.testing.assert_close(found, graph.run(x, residual[:1].expand(6, 8), weight, bias), rtol=1e-5, atol=1e-5)


def one_op(target: Any) -> tuple[Graph, list[Tensor]]:
    """A graph of one node of this overload, of positive values and numbers; truths where it takes truths."""
    truths = any(word in str(target) for word in ("logical", "bitwise", "and__", "or__"))
    conditions = [argument.name in ("condition", "mask") for argument in target._schema.arguments]
    types, places = {}, []
    for argument, condition in zip(target._schema.arguments, conditions, strict=True):
        if argument.has_default_value():
            continue
        if str(argument.type) == "Tensor":
            types[argument.name.replace("self", "x")] = TensorType(
                "bool" if truths or condition else "f32", () if argument.name == "value" else (4, 5)
            )
        places.append(str(argument.type) == "Tensor")

    def call(b: Any, **values: Any) -> Any:
        given = iter(values.values())
        return b.call(target, [next(given) if place else 0.75 for place in places])

    graph = build("one", call, **types)  # type: ignore[arg-type]
    return graph, [x.abs() + 0.1 if x.is_floating_point() else x for x in inputs_of(graph)]


WITH_TEXT = [target for op in OPS.values() for target in op.targets if isinstance(op.triton, (str, dict))]


@pytest.mark.parametrize("target", WITH_TEXT, ids=str)
def test_every_text_is_its_op(target: Any) -> None:
    graph, inputs = one_op(target)
    (node,) = graph.calls
    assert not_expressible(node) is None
    (found,) = with_kernels(graph, [region_of("elementwise", [node])])[0](*inputs)
    torch.testing.assert_close(found, graph.run(*inputs)[0], rtol=2e-6, atol=2e-6)


def test_promotion_is_torch_s() -> None:
    def mixed(b: Any, i: Any, h: Any, t: Any, x: Any) -> tuple[Any, ...]:
        total = b.add(b.mul(i, h), x)
        return total, b.add(b.mul(i, i), t), b.lt(i, x), b.div(i, i)

    graph = graph_of(mixed, i="i64[6]", h="f16[6]", t="bool[6]", x="f32[6]")
    inputs = [torch.arange(1, 7), torch.randn(6).half(), torch.tensor([True, False] * 3), torch.randn(6)]
    module, kernels = with_kernels(graph)
    assert len(kernels) >= 2
    for a, b in zip(graph.run(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=1e-3)


def test_refusals() -> None:
    def reason(function: Any, **types: str) -> str:
        graph = graph_of(function, **types)
        norm = any(OPS[name].targets[0] in [node.target for node in graph.calls] for name in ("layer_norm", "rms_norm"))
        found = covers(region_of("layer_norm" if norm else "elementwise", graph.calls))
        assert isinstance(found, str)
        return found

    assert (
        reason(lambda b, x: b.call(aten("add.Tensor"), (x, x), {"alpha": 2}), x="f32[4]")
        == "add has alpha=2, which its Triton text leaves out"
    )
    assert reason(lambda b, x: b.round(x), x="f32[4]") == "round has no Triton text: triton has no round to even"
    assert reason(lambda b, x: b.softmax(x, -1), x="f32[4]") == "softmax (softmax) is not elementwise"
    assert reason(lambda b, x: b.add(x, x), x="c64[4]") == "add computes with a type that the templates do not hold"
    assert (
        reason(lambda b, x: b.call(aten("lgamma.default"), (x,)), x="f32[4]") == "lgamma (aten.lgamma.default) has no row in the op table"
    )
    assert reason(lambda b, x, y: (b.add(x, 1), b.add(y, 1)), x="f32[4]", y="f32[5]") == "its values have several shapes: [4], [5]"
    assert (
        reason(lambda b, x: b.layer_norm(x, [2, 3]), x="f32[4,2,3]")
        == "layer_norm normalises the last 2 axes; the template takes the last one"
    )
    assert reason(lambda b, x: b.layer_norm(x, [20000]), x="f32[2,20000]") == "a row of 20000 is longer than one block (16384)"
    graph = graph_of(lambda b, x: b.softmax(x, -1), x="f32[4]")
    with pytest.raises(LoweringError, match="a row of 20000 is longer"):
        render(region_of("layer_norm", graph_of(lambda b, x: b.layer_norm(x, [20000]), x="f32[2,20000]").calls))
    assert candidate_regions(graph) == []


def test_regions_that_need_each_other() -> None:
    """exp -> sum, and sum -> add: both pairs are convex, but either one alone leaves the other waiting for half of it."""

    def crossed(b: Any, x: Any) -> tuple[Any, ...]:
        a1, b2 = b.exp(x), b.neg(x)
        b1 = b.relu(a1)
        return b.add(a1, b2), b.mul(b1, b2)

    graph = graph_of(crossed, x="f32[4]")
    exp, neg, relu, add, mul = graph.calls
    first, second = region_of("elementwise", [exp, add]), region_of("elementwise", [neg, relu, mul])
    assert not is_schedulable(graph, [first, second])
    with pytest.raises(LoweringError, match="need values of each other"):
        with_kernels(graph, [first, second])
    assert is_schedulable(graph, chosen_regions(graph))


@pytest.mark.parametrize("name", ["llama", "bert_spelled"])
def test_models(name: str) -> None:
    graph, (_, inputs) = zoo_graph(name), make(name)
    module, kernels = with_kernels(graph)
    assert kernels
    torch.testing.assert_close(module(*inputs), graph.run(*inputs), rtol=1e-4, atol=1e-5)


def test_compiled_without_a_gpu() -> None:
    types = {"x": "bf16[8,1024]", "residual": "bf16[8,1024]", "weight": "bf16[1024]", "bias": "bf16[1024]"}
    regions = [
        candidate_regions(graph_of(add_layer_norm, **types))[0],
        candidate_regions(graph_of(*EXAMPLES["elementwise"][:1], **EXAMPLES["elementwise"][1]))[0],
    ]
    kernels = [render(region, place) for place, region in enumerate(regions)]
    try:
        found = compile_kernels(kernels)
    except TargetError as error:
        pytest.skip(str(error))
    assert set(found) == {(kernel.name, arch) for kernel in kernels for arch in ARCHITECTURES}
    for binary in found.values():
        assert binary.spills == 0
        assert 0 < binary.registers <= 255
        assert binary.shared_bytes <= 48 * 1024
        assert binary.binary
    with pytest.raises(TargetError, match=r"no architecture named 'sm_1'; known: sm_80, sm_90, gfx942"):
        resources(kernels[0], "sm_1")


def test_a_file_runs_alone(tmp_path: Path) -> None:
    function, types = EXAMPLES["layer_norm"]
    kernel = render(candidate_regions(graph_of(function, **types))[0])
    path = tmp_path / f"{kernel.name}.py"
    path.write_text(kernel.source)
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, env=environment)
    assert f"{kernel.name}: " in done.stdout or "no GPU here" in done.stderr


def test_runtime_needs_a_gpu() -> None:
    assert RUNTIMES["triton"].refuses() == (None if torch.cuda.is_available() else "there is no CUDA device here")
    graph = graph_of(EXAMPLES["layer_norm"][0], **EXAMPLES["layer_norm"][1])
    inputs = inputs_of(graph)
    torch.testing.assert_close(RUNTIMES["triton"].compile(graph, inputs)(*inputs), graph.run(*inputs), rtol=2e-2, atol=4e-2)
