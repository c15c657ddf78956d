"""Generated kernels in their graphs: regions, their text, strides and sizes that vary, and the runtime."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.expressions import not_expressible
from paretorch.codegen.kernel import ARCHITECTURES
from paretorch.codegen.regions import can_compute, covers, is_schedulable, region_of, resources
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.codegen.templates import TEMPLATES
from paretorch.codegen.triton_runtime import each_alone, kernels_of, with_kernels
from paretorch.codegen.triton_text import render
from paretorch.cost_model.device_rows import GPUS
from paretorch.ir.builder import build
from paretorch.ir.errors import LoweringError, TargetError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import OPS, RowText, aten
from paretorch.ir.types import TensorType
from tests.graphs import zoo_graph
from tests.kernel_cases import (
    FAMILIES,
    LONG,
    add_layer_norm,
    assert_close,
    chain,
    graph_of,
    in_f64,
    inputs_of,
    kernel,
    packed_gate,
    read_by,
    region,
    rotary,
    run_alone,
)
from tests.zoo import make

pytest.importorskip("triton")

SIZES = {"layer_norm": ("bf16", 12, 64), "chain": ("f32", 5, 7), "rotary": ("bf16", 6, 32), "packed_gate": ("bf16", 6, 48)}


@pytest.mark.parametrize("name", FAMILIES)
def test_text(name: str, golden: Callable[[str], None]) -> None:
    made = kernel(FAMILIES[name].graph(*SIZES.get(name, ("f32", 6, 96))), 3)
    assert made.source == kernel(FAMILIES[name].graph(*SIZES.get(name, ("f32", 6, 96))), 3).source
    golden(made.source)


def test_text_of_a_long_row(golden: Callable[[str], None]) -> None:
    golden(kernel(FAMILIES["layer_norm"].graph("f32", *LONG)).source)


def test_every_template_has_a_golden_text() -> None:
    found = {region(family.graph("f32", 2, 8)).template for family in FAMILIES.values()} | {"long_row"}
    assert found == set(TEMPLATES)


def test_what_a_region_writes() -> None:
    """A sum that others use is written too; a view that others use is one of what is written; one that is seen inside only is followed."""

    def shared(b: Any, x: Any, y: Any) -> tuple[Any, ...]:
        total = b.add(x, y)
        turned = b.permute(total, [1, 0])
        return b.relu(turned), b.tanh(turned)

    graph = graph_of(shared, x="f32[4,8]", y="f32[4,8]")
    add, permute, relu, tanh = graph.calls
    assert str(region_of([add, relu])) == "elementwise(add, permute, relu)"
    assert [node.name for node in region_of([add, relu]).writes] == ["add", "relu"]
    assert covers(region_of([add, relu])) == "its values have several shapes: [4, 8], [8, 4]"
    both = region_of([add, relu, tanh])
    assert both.writes == (relu, tanh)
    assert permute in both.nodes
    x, y = inputs_of(graph)
    for a, b in zip(with_kernels(graph, [(both, None)])[0](x, y), graph.run(x, y), strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6)


@settings(max_examples=10, deadline=None)
@given(shape=st.lists(st.sampled_from([1, 2, 3, 5, 11]), min_size=0, max_size=4), data=st.data())
def test_chain_of_any_shapes(shape: list[int], data: st.DataObject) -> None:
    def part(lead: int) -> str:
        kept = [size if data.draw(st.booleans()) else 1 for size in shape[lead:]]
        return ",".join(map(str, kept))

    lead = data.draw(st.integers(0, len(shape)))
    whole = ",".join(map(str, shape))
    types = {"x": f"f32[{whole}]", "channel": f"f32[{part(lead)}]", "number": "f32[]", "mask": f"bool[{part(0)}]"}
    graph = graph_of(chain, **types)
    inputs = inputs_of(graph)
    assert_close(kernel(graph).launch(*read_by(graph, inputs)), in_f64(chain, types, inputs), 4e-6)


def test_no_elements() -> None:
    graph = FAMILIES["chain"].graph("f32", 0, 7)
    assert [x.shape for x in kernel(graph).launch(*read_by(graph, inputs_of(graph)))] == [(0, 3, 7)] * 2


def test_sizes_that_vary_are_arguments() -> None:
    graph = graph_of(add_layer_norm, x="f32[n,m,64]", residual="f32[n,m,64]", weight="f32[64]", bias="f32[64]")
    made = kernel(graph)
    for hint in (1, 7):
        inputs = inputs_of(graph, hint=hint)
        assert_close(made.launch(*inputs), graph.run(*inputs), 1e-5)
    graph = graph_of(rotary, x="f32[n,m,2,16]", cos="f32[m,16]", sin="f32[m,16]")
    made = kernel(graph)
    assert "tl.int64" in made.source
    for hint in (1, 6):
        inputs = inputs_of(graph, hint=hint)
        assert_close([made.launch(*inputs)], graph.run(*inputs), 1e-5)


def test_offsets_have_64_bits_where_needed() -> None:
    small, large = (kernel(FAMILIES["packed_gate"].graph("bf16", rows, 2048)).source for rows in (64, 2**20))
    assert "tl.program_id(0) * BLOCK" in small
    assert "tl.program_id(0).to(tl.int64) * BLOCK" in large


def test_inputs_of_any_layout() -> None:
    graph = graph_of(add_layer_norm, x="f32[6,8]", residual="f32[6,8]", weight="f32[8]", bias="f32[8]")
    x, residual, weight, bias = inputs_of(graph)
    made = kernel(graph)
    assert_close(
        made.launch(x.t().contiguous().t(), residual[:1].expand(6, 8), weight, bias),
        graph.run(x, residual[:1].expand(6, 8), weight, bias),
        1e-5,
    )


def test_strides_are_arguments() -> None:
    """A value that was captured as a view is read where it lies; one that lies otherwise at run time is read rightly all the same."""

    def half(b: Any, x: Any, y: Any) -> Any:
        return b.add(b.slice(b.permute(x, [1, 0, 2]), -1, 0, 3), y)

    graph = graph_of(half, x="f32[4,5,6]", y="f32[5,4,3]")
    made = render(region_of([graph.calls[-1]]))
    x, y = inputs_of(graph)
    views = [
        x.permute(1, 0, 2)[..., :3],
        x.permute(1, 0, 2)[..., :3].contiguous(),
        x.permute(2, 0, 1).contiguous().permute(2, 1, 0)[..., :3],
    ]
    for view in views:
        assert_close([made.launch(view, y)], [view + y], 1e-6)
    turned = graph_of(lambda b, x, y: b.add(b.permute(x, [1, 0]), y), x="f32[4,5]", y="f32[5,4]")
    made = render(region_of([turned.calls[-1]]))
    x, y = inputs_of(turned)
    for view in (x.t(), x.t().contiguous()):
        assert_close([made.launch(view, y)], [view + y], 1e-6)


@pytest.mark.parametrize("axis", [0, 1])
def test_parts_of_one_element(axis: int) -> None:
    """What a concatenation puts beside others is read within its bounds, where one element or one row of it is a part, too."""

    def joined(b: Any, one: Any, x: Any) -> Any:
        return b.softmax(b.mul(b.cat([one, x], axis), 2.0), -1), b.neg(b.cat([one, x], axis))

    graph = graph_of(joined, one="f32[1,1]" if axis == 1 else "f32[1,5]", x="f32[1,4]" if axis == 1 else "f32[3,5]")
    inputs = inputs_of(graph)
    first, mul, softmax, second, neg = graph.calls
    regions = [region_of([first, mul, softmax]), region_of([second, neg])]
    assert_close(with_kernels(graph, [(one, None) for one in regions])[0](*inputs), graph.run(*inputs), 1e-5)


def test_equal_regions_share_a_kernel() -> None:
    def twice(b: Any, p: Any, q: Any) -> Any:
        return packed_gate(b, p), packed_gate(b, q)

    graph = graph_of(twice, p="f32[3,16]", q="f32[3,16]")
    split = [node for node in graph.calls if can_compute(node)]
    regions = [region_of(split[:2]), region_of(split[2:])]
    kernels, serving = kernels_of([(one, None) for one in regions])
    assert serving == [0, 0]
    assert kernels[0].uses == 2
    inputs = inputs_of(graph)
    assert_close(with_kernels(graph, [(one, None) for one in regions])[0](*inputs), graph.run(*inputs), 1e-5)


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


WITH_TEXT = [target for op in OPS.values() for target in op.targets if isinstance(op.triton, (str, dict)) and op.name != "clamp"]
ROWS = [name for name, op in OPS.items() if isinstance(op.triton, RowText)]


@pytest.mark.parametrize("target", WITH_TEXT, ids=str)
def test_every_text_is_its_op(target: Any) -> None:
    graph, inputs = one_op(target)
    (node,) = graph.calls
    assert not_expressible(node) is None
    (found,) = with_kernels(graph, [(region_of([node]), None)])[0](*inputs)
    torch.testing.assert_close(found, graph.run(*inputs)[0], rtol=2e-6, atol=2e-6)


EDGES = [-2.5, -1.5, -0.5, -0.49999997, 0.0, 0.49999997, 0.5, 1.5, 2.5, 8388607.5, 1e9, float("inf"), -float("inf"), float("nan")]


@pytest.mark.parametrize("limits", [(-1.0, 2.0), (None, 2.0), (-1.0, None), (2.0, -1.0)], ids=str)
def test_rounding_and_limits(limits: Any) -> None:
    """Halves go to even, NaN stays, and of limits in the wrong order the upper one holds: to the bit."""

    def both(b: Any, x: Any) -> Any:
        return b.call(aten("round.default"), (x,)), b.call(aten("clamp.default"), (x, *limits))

    graph, x = graph_of(both, x=f"f32[{len(EDGES)}]"), torch.tensor(EDGES)
    found = with_kernels(graph, [(region_of([node]), None) for node in graph.calls])[0](x)
    for one, other in zip(found, graph.run(x), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def test_a_product_that_is_quantised() -> None:
    """With its bias, its activation, its scale and its limits it is one kernel, and at most a step of what lies between two numbers away."""

    def quantised(b: Any, x: Any, weight: Any, bias: Any) -> Any:
        steps = b.call(aten("round.default"), (b.div(b.gelu(b.linear(x, weight, bias)), 0.05),))
        return b.call(aten("_to_copy.default"), (b.call(aten("clamp.default"), (steps, -128, 127)),), {"dtype": torch.int8})

    graph = graph_of(quantised, x="f32[20,32]", weight="f32[48,32]", bias="f32[48]")
    inputs = inputs_of(graph)
    region = region_of(graph.calls)
    assert (region.template, [node.name for node in region.writes]) == ("product", [graph.calls[-1].name])
    found, expected = render(region).launch(*inputs), graph.run(*inputs)[0]
    assert found.dtype == torch.int8
    apart = (found.int() - expected.int()).abs()
    assert int(apart.max()) <= 1
    assert float((apart > 0).float().mean()) < 0.01
    assert len(expected.unique()) > 30


@pytest.mark.parametrize("name", ROWS)
def test_every_row_text_is_its_op(name: str) -> None:
    """With the numbers that its text is fixed to, and all operands that it may have."""
    target, text = OPS[name].targets[0], OPS[name].triton
    assert isinstance(text, RowText)
    fixed = dict(text.fixed)

    def call(b: Any, x: Any, weight: Any, bias: Any) -> Any:
        values = {
            text.row: x,
            "weight": weight,
            "bias": bias,
            text.axis: [7] if text.axis == "normalized_shape" else -1,
            "eps": 1e-3,
            **fixed,
        }
        values[text.axis] = (
            [-1] if name not in ("softmax", "log_softmax", "safe_softmax") and values[text.axis] == -1 else values[text.axis]
        )
        names = [argument.name for argument in target._schema.arguments]
        return b.call(target, (), {key: value for key, value in values.items() if key in names})

    graph = graph_of(call, x="f32[2,5,7]", weight="f32[7]", bias="f32[7]")
    inputs = inputs_of(graph)
    assert not_expressible(graph.calls[0]) is None
    assert_close(with_kernels(graph, [(region_of(graph.calls), None)])[0](*inputs), graph.run(*inputs), 1e-5)


def test_promotion_is_torch_s() -> None:
    def mixed(b: Any, i: Any, h: Any, t: Any, x: Any) -> tuple[Any, ...]:
        total = b.add(b.mul(i, h), x)
        return total, b.add(b.mul(i, i), t), b.lt(i, x), b.div(i, i)

    graph = graph_of(mixed, i="i64[6]", h="f16[6]", t="bool[6]", x="f32[6]")
    inputs = [torch.arange(1, 7), torch.randn(6).half(), torch.tensor([True, False] * 3), torch.randn(6)]
    module, kernels = with_kernels(graph, each_alone(graph))
    assert len(kernels) >= 2
    for a, b in zip(graph.run(*inputs), module(*inputs), strict=True):
        torch.testing.assert_close(b, a, rtol=2e-3, atol=1e-3)


def test_refusals() -> None:
    def reason(function: Any, **types: str) -> str:
        found = covers(region_of(graph_of(function, **types).calls))
        assert isinstance(found, str)
        return found

    assert (
        reason(lambda b, x: b.call(aten("add.Tensor"), (x, x), {"alpha": 2}), x="f32[4]")
        == "add has alpha=2, which its Triton text leaves out"
    )
    assert reason(lambda b, x: b.round(x), x="i64[4]") == "round_1 (round) is of whole numbers; its Triton text is for real ones"
    assert reason(lambda b, x: b.softplus(x), x="f32[4]") == "softplus has no Triton text: has a threshold"
    assert reason(lambda b, x: b.add(x, x), x="c64[4]") == "add computes with a type that the templates do not hold"
    assert (
        reason(lambda b, x: b.call(aten("lgamma.default"), (x,)), x="f32[4]") == "lgamma (aten.lgamma.default) has no row in the op table"
    )
    assert reason(lambda b, x, y: (b.add(x, 1), b.add(y, 1)), x="f32[4]", y="f32[5]") == "its values have several shapes: [4], [5]"
    assert (
        reason(lambda b, x: b.layer_norm(x, [2, 3]), x="f32[4,2,3]")
        == "layer_norm normalises the last 2 axes; the template takes the last one"
    )
    assert reason(lambda b, x: b.softmax(x, 0), x="f32[4,5]") == "softmax goes along dim=0 of 2 axes; the template takes the last one"
    assert reason(lambda b, x: b.rms_norm(x, [5]), x="f32[4,5]") == "rms_norm has eps=None; its Triton text takes a value or a number there"
    assert (
        reason(lambda b, x: b.call(aten("linalg_vector_norm.default"), (x, 1, [-1])), x="f32[4,5]")
        == "linalg_vector_norm has ord=1; its Triton text is for 2"
    )
    assert reason(lambda b, x: b.cat([x] * 5), x="f32[4]") == "cat joins 5 parts; the templates choose among 4"
    assert (
        reason(lambda b, x: b.mul(b.permute(b.softmax(x, -1), [1, 0]), 2.0), x="f32[4,4]")
        == "the rows of [4, 4] that softmax takes are not those of [4, 4] that this kernel goes along"
    )
    with pytest.raises(LoweringError, match=r"template row cannot take row\(layer_norm\): layer_norm normalises the last 2 axes"):
        render(region_of(graph_of(lambda b, x: b.layer_norm(x, [2, 3]), x="f32[4,2,3]").calls))


def test_a_statistic_of_another_row_is_no_part_of_a_row() -> None:
    """Every column takes the sum of the row of its own number, which a square does not show in its shape."""
    graph = graph_of(lambda b, x: b.sub(x, b.call(aten("sum.dim_IntList"), (x, [-1]))), x="f32[4,4]")
    assert covers(region_of(graph.calls)) == "the rows of [4, 4] that sum_1 takes are not those of [4, 4] that this kernel goes along"


def test_a_size_that_no_operand_has_is_refused() -> None:
    graph = graph_of(lambda b, x, y: b.relu(b.cat([x, y])), x="f32[n,8]", y="f32[m,8]")
    assert "is no axis of what is read" in str(covers(region_of(graph.calls[1:])))
    assert not isinstance(covers(region_of(graph.calls)), str)


def test_numbers_that_are_none_stay_so() -> None:
    graph = graph_of(lambda b, x: b.neg(b.relu(x)), x="f32[3]")
    (found,) = with_kernels(graph, [(region(graph), None)])[0](torch.tensor([float("nan"), -1.0, 2.0]))
    torch.testing.assert_close(found, torch.tensor([float("nan"), -0.0, -2.0]), equal_nan=True)


def test_regions_that_need_each_other() -> None:
    """exp -> sum, and sum -> add: both pairs can be one kernel, but either one alone leaves the other waiting for half of it."""

    def crossed(b: Any, x: Any) -> tuple[Any, ...]:
        a1, b2 = b.exp(x), b.neg(x)
        b1 = b.relu(a1)
        return b.add(a1, b2), b.mul(b1, b2)

    graph = graph_of(crossed, x="f32[4]")
    exp, neg, relu, add, mul = graph.calls
    first, second = region_of([exp, add]), region_of([neg, relu, mul])
    assert not is_schedulable(graph, [first, second])
    with pytest.raises(LoweringError, match="need values of each other"):
        with_kernels(graph, [(first, None), (second, None)])


@pytest.mark.parametrize("name", ["llama", "bert_spelled"])
def test_models(name: str) -> None:
    graph, (_, inputs) = zoo_graph(name), make(name)
    module, kernels = with_kernels(graph, each_alone(graph))
    assert kernels
    torch.testing.assert_close(module(*inputs), graph.run(*inputs), rtol=1e-4, atol=1e-5)


def test_an_architecture_that_is_not_known() -> None:
    with pytest.raises(TargetError, match=r"no architecture named 'sm_1'; known: sm_80, sm_89, sm_90, gfx942"):
        resources(kernel(FAMILIES["chain"].graph("f32", 2, 3)), "sm_1")


def test_kernels_are_made_for_every_gpu_that_has_a_row() -> None:
    assert {device.arch for device in GPUS} == set(ARCHITECTURES)
    binary = resources(kernel(FAMILIES["chain"].graph("f32", 2, 3)), "sm_89")
    assert (binary.arch, binary.spills) == ("sm_89", 0)


@pytest.mark.parametrize("name", ["layer_norm", "rotary"])
def test_a_file_runs_alone(name: str, tmp_path: Path) -> None:
    run_alone(kernel(FAMILIES[name].graph("bf16", 4, 32)), tmp_path)


def test_runtime_needs_a_gpu() -> None:
    assert RUNTIMES["triton"].refuses() == (None if torch.cuda.is_available() else "there is no CUDA device here")
    graph = FAMILIES["layer_norm"].graph("bf16", 3, 64)
    inputs = inputs_of(graph)
    torch.testing.assert_close(RUNTIMES["triton"].compile(graph, inputs)(*inputs), graph.run(*inputs), rtol=2e-2, atol=4e-2)
