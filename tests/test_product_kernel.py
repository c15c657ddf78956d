"""Products with what goes along with them: every kind x dtype x sizes against float64, bounds, layouts, text, plans, compiled."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.kernel import Kernel
from paretorch.codegen.product import Fused
from paretorch.codegen.regions import can_compute, covers, region_of
from paretorch.codegen.schedules import FEW_ROWS, LEAST_BLOCK
from paretorch.codegen.triton_runtime import each_alone, with_kernels
from paretorch.codegen.triton_text import render
from paretorch.ir.graph import Graph
from paretorch.ir.ops import aten, is_op
from paretorch.rewrites.apply import apply_choice
from paretorch.rewrites.example_models import Sizes as ModelSizes
from paretorch.rewrites.example_models import transformer
from paretorch.rewrites.precision import int4, int8
from paretorch.rewrites.rule import MODEL, Knob, Rule
from tests.kernel_cases import (
    DTYPES,
    TOLERANCE,
    assert_close,
    check_compiled,
    graph_of,
    in_f64,
    inputs_of,
    kernel,
    launched_between_guards,
    read_by,
    run_alone,
    vector,
)
from tests.test_fusion import fusion, regions

pytest.importorskip("triton")


@dataclass(frozen=True)
class Sizes:
    """Rows, length of what is summed, columns, groups of scales."""

    rows: int
    inner: int
    columns: int
    groups: int = 1

    def types(self, dtype: str) -> dict[str, str]:
        return {
            "x": vector(dtype, self.rows, self.inner), "weight": vector("i8", self.columns, self.inner),
            "scale": vector("f32", self.columns, self.groups), "bias": vector(dtype, self.columns),
        }  # fmt: skip

    def packed(self, dtype: str) -> dict[str, str]:
        """With weights of four bits."""
        return {**self.types(dtype), "weight": vector("u8", self.columns, self.groups, self.inner // self.groups // 2)}

    @property
    def evened(self) -> Sizes:
        """With groups of the next length that the template takes of four bits."""
        return replace(self, inner=-(-self.inner // self.groups // LEAST_BLOCK) * LEAST_BLOCK * self.groups)

    @property
    def doubled(self) -> Sizes:
        """Of a gate: two columns of the weight for each of the result."""
        return replace(self, columns=2 * self.columns)

    def plain(self, dtype: str) -> dict[str, str]:
        return plain(self.types(dtype), dtype)

    def block(self, dtype: str) -> str:
        return vector(dtype, self.rows, self.columns)


def plain(types: dict[str, str], dtype: str) -> dict[str, str]:
    return {name: text.replace("i8", dtype) for name, text in types.items() if name != "scale"}


def alone(b: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    return b.int8_linear(x, weight, scale, bias)


def without_bias(b: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    return b.mul(b.int8_linear(x, weight, scale, None), bias)


def activated(b: Any, x: Any, weight: Any, scale: Any, bias: Any, residual: Any, factor: Any) -> tuple[Any, Any]:
    """Two results: the sum with a residual in f32, and what follows in the type of x."""
    total = b.add(b.int8_linear(x, weight, scale, bias), residual)
    return total, b.mul(b.gelu(b.call(aten("_to_copy.default"), (total,), {"dtype": x.meta["val"].dtype})), factor)


def gated(b: Any, x: Any, weight: Any, scale: Any, bias: Any, gate: Any) -> Any:
    return b.int8_linear(b.mul(b.silu(gate), x), weight, scale, bias)


def packed(b: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    return b.int4_linear(x, weight, scale, bias)


def packed_activated(b: Any, x: Any, weight: Any, scale: Any, bias: Any, residual: Any, gate: Any) -> Any:
    return b.gelu(b.add(b.int4_linear(b.mul(b.silu(gate), x), weight, scale, bias), residual))


def linear(b: Any, x: Any, weight: Any, bias: Any) -> Any:
    return b.relu(b.linear(x, weight, bias))


def matmul(b: Any, x: Any, weight: Any, bias: Any) -> Any:
    return b.sigmoid(b.add(b.matmul(b.neg(x), weight), bias))


def packed_gate(b: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """SwiGLU of the halves of one product, made smaller so that f16 holds it."""
    halves = b.split(b.int8_linear(x, weight, scale, bias), bias.meta["val"].shape[0] // 2, -1)
    return b.mul(b.mul(b.silu(b.item(halves, 0)), 0.01), b.item(halves, 1))


def gate_of_four_bits(b: Any, x: Any, weight: Any, scale: Any, bias: Any) -> Any:
    """SwiGLU of the halves of one product with packed weights."""
    halves = b.split(b.int4_linear(x, weight, scale, bias), bias.meta["val"].shape[0] // 2, -1)
    return b.mul(b.mul(b.silu(b.item(halves, 0)), 0.01), b.item(halves, 1))


def sliced_gate(b: Any, x: Any, weight: Any, bias: Any, residual: Any) -> tuple[Any, Any]:
    """GeGLU with the gate last; what the gate lets pass is a result too."""
    packed, half = b.linear(x, weight, bias), bias.meta["val"].shape[0] // 2
    gate = b.gelu(b.mul(b.slice(packed, -1, half), 0.01), approximate="tanh")
    return gate, b.add(b.mul(b.slice(packed, -1, 0, half), gate), residual)


def mixed_gate(b: Any, x: Any, weight: Any, bias: Any) -> Any:
    """Gate and value in turns, of a weight that lies turned, as two axes of a view and as steps."""
    packed = b.matmul(b.neg(x), weight)
    pairs = b.view(packed, [*x.meta["val"].shape[:-1], bias.meta["val"].shape[0], 2])
    gate = b.mul(b.select(pairs, -1, 0), 0.01)
    return b.mul(b.mul(gate, b.sigmoid(gate)), b.add(b.slice(packed, -1, 1, None, 2), bias))


def two_products(b: Any, x: Any, weight: Any, scale: Any, bias: Any, other: Any, factor: Any) -> Any:
    """Of one x that is computed before; one of them without a bias."""
    scaled = b.mul(x, factor)
    return b.mul(b.sigmoid(b.mul(b.int8_linear(scaled, weight, scale, bias), 0.01)), b.int8_linear(scaled, other, scale, None))


KINDS: dict[str, tuple[Callable[..., Any], Callable[[str, Sizes], dict[str, str]]]] = {
    "alone": (alone, lambda dtype, at: at.types(dtype)),
    "without bias": (without_bias, lambda dtype, at: at.types(dtype)),
    "activated": (activated, lambda dtype, at: {**at.types(dtype), "residual": at.block("f32"), "factor": vector(dtype, at.rows, 1)}),
    "gated": (gated, lambda dtype, at: {**at.types(dtype), "gate": vector(dtype, at.rows, at.inner)}),
    "packed": (packed, lambda dtype, at: at.evened.packed(dtype)),
    "packed activated": (
        packed_activated,
        lambda dtype, at: {**at.evened.packed(dtype), "residual": at.block(dtype), "gate": vector(dtype, at.rows, at.evened.inner)},
    ),
    "linear": (linear, lambda dtype, at: at.plain(dtype)),
    "matmul": (matmul, lambda dtype, at: {**at.plain(dtype), "weight": vector(dtype, at.inner, at.columns)}),
    "packed gate": (packed_gate, lambda dtype, at: at.doubled.types(dtype)),
    "gate of four bits": (gate_of_four_bits, lambda dtype, at: at.evened.doubled.packed(dtype)),
    "sliced gate": (sliced_gate, lambda dtype, at: {**plain(at.doubled.types(dtype), dtype), "residual": at.block("f32")}),
    "mixed gate": (mixed_gate, lambda dtype, at: {**at.plain(dtype), "weight": vector(dtype, at.inner, 2 * at.columns)}),
    "two products": (
        two_products, lambda dtype, at: {**at.types(dtype), "other": vector("i8", at.columns, at.inner), "factor": vector(dtype, at.inner)},
    ),
}  # fmt: skip
SIZES = {
    "one": Sizes(1, 1, 1),
    "one row": Sizes(1, 128, 67, 2),
    "odd": Sizes(3, 33, 5),
    "prime": Sizes(37, 97, 41),
    "power": Sizes(32, 128, 64, 4),
    "groups that no block divides": Sizes(5, 72, 23, 3),
    "more than a block": Sizes(131, 192, 70, 3),
}
MATRIX = [(kind, dtype, sizes) for kind in KINDS for dtype in DTYPES for sizes in SIZES]
TENTH = sorted(random.Random(2).sample(MATRIX, len(MATRIX) // 10))


def graph(kind: str, dtype: str, at: Sizes) -> Graph:
    function, types = KINDS[kind]
    return graph_of(function, **types(dtype, at))


def values(of: Graph, seed: int = 0, hint: int = 5) -> list[Tensor]:
    """Random inputs: whole weights of every size, and scales that keep results within f16."""
    generator, found = torch.Generator().manual_seed(seed), inputs_of(of, seed, hint)
    for place, node in enumerate(of.inputs):
        if found[place].dtype == torch.int8:
            found[place] = torch.randint(-128, 128, found[place].shape, generator=generator).to(torch.int8)
        elif found[place].dtype == torch.uint8:
            found[place] = torch.randint(0, 256, found[place].shape, generator=generator).to(torch.uint8)
        elif node.name == "scale":
            found[place] = found[place] / (10 if "u8[" in str(of) else 100)
    return found


def launched(of: Graph, inputs: list[Tensor]) -> Any:
    found = kernel(of).launch(*read_by(of, inputs))
    return found if isinstance(found, tuple) else (found,)


def check(kind: str, dtype: str, at: Sizes, seed: int = 0) -> None:
    of = graph(kind, dtype, at)
    inputs = values(of, seed)
    found = launched(of, inputs)
    assert [output.dtype for output in found] == [node.meta["val"].dtype for node in of.outputs]
    function, types = KINDS[kind]
    assert_close(found, in_f64(function, types(dtype, at), inputs), TOLERANCE[dtype])


@pytest.mark.parametrize(("kind", "dtype", "sizes"), TENTH)
def test_numbers(kind: str, dtype: str, sizes: str) -> None:
    check(kind, dtype, SIZES[sizes])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "sizes"), MATRIX)
def test_numbers_of_all(kind: str, dtype: str, sizes: str) -> None:
    check(kind, dtype, SIZES[sizes])


@settings(max_examples=10, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.sampled_from([1, 2, 16, 17, 53]),
    length=st.sampled_from([1, 7, 16, 64, 70]),
    groups=st.integers(1, 3),
    columns=st.sampled_from([1, 2, 16, 31, 70]),
    seed=st.integers(0, 99),
)
def test_any_sizes(kind: str, rows: int, length: int, groups: int, columns: int, seed: int) -> None:
    check(kind, "f32", Sizes(rows, length * groups, columns, groups), seed)


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_is_touched(kind: str) -> None:
    of = graph(kind, "f32", Sizes(19, 34, 37, 2))
    inputs = values(of)
    assert_close(launched_between_guards(kernel(of), read_by(of, inputs)), of.run(*inputs), TOLERANCE["f32"])


def run_in_graph(of: Graph, inputs: list[Tensor]) -> Kernel:
    """What a kernel can compute of this graph as one; the same as the graph."""
    module, kernels = with_kernels(of, [(region_of([node for node in of.calls if can_compute(node)]), None)])
    assert_close(module(*inputs), of.run(*inputs), TOLERANCE["f32"])
    return kernels[0]


def test_inputs_of_any_layout() -> None:
    """Axes that are turned before the product are read where they lie, in the residual too; weights may lie turned; a vector is one row."""

    def turned(b: Any, x: Any, residual: Any, w: Any, s: Any) -> Any:
        return b.add(b.int8_linear(b.permute(x, [0, 2, 1]), b.permute(w, [1, 0]), s), b.permute(residual, [1, 0, 2]))

    of = graph_of(turned, x="f32[2,20,3]", residual="f32[3,2,7]", w="i8[20,7]", s="f32[7,1]")
    made = run_in_graph(of, values(of))
    assert "at_0 = row // 3" in made.source
    assert "x.stride(1)" in made.source
    of = graph_of(lambda b, x, w, s: b.relu(b.int8_linear(b.expand(x, [4, 3, 20]), w, s)), x="f32[1,1,20]", w="i8[7,20]", s="f32[7,2]")
    run_in_graph(of, values(of))
    of = graph_of(lambda b, x, w: b.relu(b.linear(x, w)), x="f32[20]", w="f32[7,20]")
    run_in_graph(of, values(of))


def test_one_value_before_and_after() -> None:
    """A value that is multiplied and added is computed twice, not read."""
    of = graph_of(lambda b, x, w: b.add(y := b.exp(x), b.linear(y, w)), x="f32[9,8]", w="f32[8,8]")
    assert run_in_graph(of, values(of)).source.count("tl.exp(x)") == 2


def test_parts_before_a_product() -> None:
    """Halves of a packed value and joined ones are found by coordinates; what lies outside of a part is not read."""

    def parts(b: Any, packed: Any, other: Any, w: Any) -> Any:
        halves = b.split(packed, 12, -1)
        gated = b.mul(b.silu(b.item(halves, 0)), b.item(halves, 1))
        return b.relu(b.linear(b.cat([gated, b.neg(other)], -1), w))

    of = graph_of(parts, packed="f32[3,7,24]", other="f32[3,7,5]", w="f32[9,17]")
    inputs = values(of)
    made = run_in_graph(of, inputs)
    assert made.region.count("cat(") == 1
    assert_close(launched_between_guards(made, inputs), of.run(*inputs), TOLERANCE["f32"])


def test_rows_that_vary_are_arguments() -> None:
    of = graph_of(lambda b, x, w, s: b.relu(b.int8_linear(x, w, s)), x="f32[n,m,32]", w="i8[7,32]", s="f32[7,2]")
    made = kernel(of)
    for hint in (1, 3, 6):
        inputs = values(of, hint=hint)
        assert_close([made.launch(*inputs)], of.run(*inputs), TOLERANCE["f32"])
    assert f"schedule = SCHEDULE if rows > {FEW_ROWS} else few" in made.source
    assert made.launch(torch.zeros(0, 3, 32), *inputs[1:]).shape == (0, 3, 7)


def test_offsets_have_64_bits_where_needed() -> None:
    small, large = (kernel(graph("alone", "bf16", Sizes(16, 4096, columns))).source for columns in (4096, 2**20))
    assert "(place // high) * BLOCK_COLUMNS" in small
    assert "(place // high).to(tl.int64) * BLOCK_COLUMNS" in large


@pytest.mark.parametrize("kind", ["alone", "activated", "gated", "packed", "matmul", "packed gate", "sliced gate"])
def test_text(kind: str, golden: Callable[[str], None]) -> None:
    chosen = {"alone": Sizes(1, 4096, 14336, 64), "packed": Sizes(1, 4096, 14336, 32), "matmul": Sizes(197, 770, 768)}
    golden(kernel(graph(kind, "bf16", chosen.get(kind, Sizes(2048, 1024, 4096, 16))), 3).source)


@pytest.mark.parametrize("kind", ["activated", "packed"])
def test_a_file_runs_alone(kind: str, tmp_path: Path) -> None:
    run_alone(kernel(graph(kind, "bf16", Sizes(5, 48, 20, 3))), tmp_path)


def test_refusals() -> None:
    def reason(function: Any, **types: str) -> str:
        found = covers(region_of(graph_of(function, **types).calls))
        assert isinstance(found, str)
        return found

    def two(b: Any, x: Any, w: Any) -> Any:
        return b.linear(b.linear(x, w), w)

    many = {"x": "f32[4,8]", "w": "f32[8,8]"}
    assert reason(two, **many) == "linear_1 multiplies linear and linear x; a kernel goes along one of them"
    assert reason(lambda b, x, w: b.softmax(b.linear(x, w), -1), **many) == "softmax takes whole rows; a program has a part of them"
    turned = reason(lambda b, x, w: b.relu(b.permute(b.linear(x, w), [1, 0])), x="f32[8,8]", w="f32[8,8]")
    assert turned == "linear is needed at other places than those where a program computes it"
    halves = reason(lambda b, x, w: (b.relu(y := b.linear(x, w)), b.neg(b.slice(y, -1, 0, 4))), **many)
    assert halves == "neg is [4, 4]; what goes along with linear is [4, 8]"
    assert reason(lambda b, x, w: b.linear(x, b.relu(w)), **many) == "relu is computed beside linear, which reads it whole"
    assert reason(lambda b, x, w: b.linear(x, w), x="f64[4,8]", w="f64[8,8]").startswith(
        "linear is of f64 and f64; the template takes one of"
    )
    uneven = reason(lambda b, x, w, s: b.int4_linear(x, w, s), x="f32[4,72]", w="u8[8,3,12]", s="f32[8,3]")
    assert uneven == "int4_linear has packed groups of 24; the template takes multiples of 16"
    turned = reason(lambda b, x, w, s: b.int4_linear(x, b.transpose(w, 0, 1), s), x="f32[4,64]", w="u8[2,8,16]", s="f32[8,2]")
    assert turned == "int4_linear reads packed weights that do not lie in order"
    batched = reason(lambda b, x, w: b.matmul(x, w), x="f32[2,4,8]", w="f32[2,8,8]")
    assert batched == "matmul multiplies [2, 4, 8] by [2, 8, 8]; the template takes rows by a matrix of known sizes"


# plans


def test_it_is_planned_by_price() -> None:
    """Weights of eight bits are not widened in memory; plain products stay the vendor's where they keep it busy, and are never alone."""
    few, many = Sizes(1, 4096, 4096, 64), Sizes(8192, 4096, 4096, 64)
    assert regions(graph("alone", "bf16", few)) == ["product(int8_linear)"]
    assert regions(graph("packed", "bf16", few)) == ["product(int4_linear)"]
    assert regions(graph("activated", "bf16", few)) == ["product(int8_linear, add, _to_copy, gelu, mul)"]
    assert regions(graph("gated", "bf16", few)) == ["product(silu, mul, int8_linear)"]
    assert regions(graph("linear", "bf16", few)) == ["product(linear, relu)"]
    assert regions(graph("linear", "bf16", many)) == []
    only = graph_of(lambda b, x, w: b.linear(x, w), x="bf16[1,4096]", w="bf16[4096,4096]")
    assert regions(only) == []
    assert each_alone(only) == []


def test_price() -> None:
    """The weight and its scales are what moves; an activation adds its operations at the rate of light ops and nothing to what moves."""
    at = Sizes(1, 4096, 4096, 64)
    (plain,) = fusion().plan(graph("alone", "bf16", at)).regions
    assert plain.cost.bytes_moved == 4096 * 4096 + 4096 * 64 * 4 + 2 * 4096 * 3
    assert (plain.cost.flops, plain.cost.launches) == (2 * 4096 * 4096, 1)
    (packed,) = fusion().plan(graph("packed", "bf16", at)).regions
    assert plain.cost.bytes_moved - packed.cost.bytes_moved == 4096 * 4096 // 2
    assert packed.cost.seconds < plain.cost.seconds
    (fused,) = fusion().plan(graph("without bias", "bf16", at)).regions
    assert (fused.cost.bytes_moved, fused.cost.flops - plain.cost.flops) == (plain.cost.bytes_moved, 4096)
    assert 0 < fused.cost.seconds - plain.cost.seconds < 1e-9


@pytest.mark.parametrize(("rule", "knob"), [(int8.RULE, "int8"), (int4.RULE, 32)])
def test_a_model_with_rounded_weights(rule: Rule, knob: Knob) -> None:
    """Every product whose weights have eight or four bits is a kernel, with the activation and the residual that follow it."""
    after = apply_choice(rule, transformer(ModelSizes(2, 9, width=32)), MODEL, knob)
    plan = fusion().plan(after)
    rounded = [node for node in after.calls if is_op(node, f"{rule.name}_linear")]
    inside = [node for fused in plan.regions for node in fused.region.nodes if node in rounded]
    assert sorted(inside) == rounded
    assert any(len(fused.region.nodes) > 1 for fused in plan.regions if fused.region.template == "product")
    x = torch.randn(2, 9, 32, generator=torch.Generator().manual_seed(1))
    assert_close(with_kernels(after, plan.priced)[0](x), after.run(x), 1e-4)


# compilers


def test_no_spills() -> None:
    """A few at a size that models have, without a GPU."""
    many, one = Sizes(2048, 1024, 4096, 16), Sizes(1, 1024, 4096, 16)
    chosen = (
        *(("activated", many), ("gated", one), ("packed gate", many), ("sliced gate", many), ("packed gate", one)),
        *(("packed activated", Sizes(2048, 1024, 4096, 8)), ("gate of four bits", Sizes(1, 1024, 4096, 8))),
    )
    check_compiled([kernel(graph(kind, "bf16", at), place) for place, (kind, at) in enumerate(chosen)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [1, 2048])
def test_no_spills_at_any_block(dtype: str, rows: int) -> None:
    kernels: list[Kernel] = []
    for kind in KINDS:
        region = region_of(graph(kind, dtype, Sizes(rows, 1024, 4096, 16)).calls)
        kernels += [render(region, len(kernels) + place, schedule=schedule) for place, schedule in enumerate(Fused(region).schedules)]
    check_compiled(kernels)
