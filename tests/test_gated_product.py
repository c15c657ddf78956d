"""Gates (SwiGLU, GeGLU) as one kernel with a sum for each half: which graphs are taken, rows that vary, plans and prices.

Numbers, bounds and what compilers make of them stand with all products, in test_product_kernel.py and test_split_product.py;
a model's gates in test_fusion.py.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from paretorch.codegen.product import Fused
from paretorch.codegen.regions import covers, region_of
from paretorch.ir.graph import Graph
from tests.kernel_cases import TOLERANCE, assert_close, graph_of, inputs_of, kernel, region, vector
from tests.test_fusion import fusion, regions

pytest.importorskip("triton")


def gate(rows: int | str, width: int, middle: int, dtype: str = "bf16") -> Graph:
    def one(b: Any, x: Any, w: Any) -> Any:
        packed = b.linear(x, w)
        return b.mul(b.silu(b.slice(packed, -1, 0, middle)), b.slice(packed, -1, middle))

    return graph_of(one, x=f"{dtype}[{rows},{width}]", w=vector(dtype, 2 * middle, width))


def test_rows_that_vary() -> None:
    of = gate("n", 32, 7, "f32")
    made = kernel(of)
    for hint in (1, 5, 37):
        inputs = inputs_of(of, hint=hint)
        assert_close([made.launch(*inputs)], of.run(*inputs), TOLERANCE["f32"])


def test_half_of_a_product_is_computed_alone() -> None:
    """What nobody uses has no sum."""
    of = graph_of(lambda b, x, w: b.relu(b.slice(b.linear(x, w), -1, 3, 8)), x="f32[4,24]", w="f32[8,24]")
    (one,) = Fused(region(of)).sums
    assert one.column == "column + 3"
    inputs = inputs_of(of)
    assert_close([kernel(of).launch(*inputs)], of.run(*inputs), TOLERANCE["f32"])


def test_refusals_of_gates() -> None:
    """Parts of different widths, more than two of them, parts that are joined with others or needed in other rows; products that do not go together."""

    def reason(function: Any, **types: str) -> str:
        found = covers(region_of(graph_of(function, x="f32[4,8]", **types).calls))
        assert isinstance(found, str)
        return found

    def thirds(b: Any, x: Any, w: Any) -> Any:
        parts = b.split(b.linear(x, w), 4, -1)
        return b.mul(b.mul(b.item(parts, 0), b.item(parts, 1)), b.item(parts, 2))

    def joined(b: Any, x: Any, w: Any) -> Any:
        halves = b.split(b.linear(x, w), 4, -1)
        return b.relu(b.cat([b.item(halves, 1), b.slice(x, -1, 0, 4)], -1))

    def turned(b: Any, x: Any, w: Any) -> Any:
        halves = b.split(b.linear(x, w), 4, -1)
        return b.mul(b.item(halves, 0), b.permute(b.item(halves, 1), [1, 0]))

    def groups(b: Any, x: Any, w: Any, s: Any, t: Any) -> Any:
        return b.mul(b.int8_linear(x, w, s), b.int8_linear(x, w, t))

    assert reason(thirds, w="f32[12,8]") == "linear would be a program's sum 3; the template holds 2"
    assert reason(joined, w="f32[8,8]") == "linear is joined with other parts; the template computes it whole"
    assert reason(turned, w="f32[8,8]") == "linear is needed at other places than those where a program computes it"
    unlike = reason(groups, w="i8[8,8]", s="f32[8,1]", t="f32[8,2]")
    assert unlike == "int8_linear_1 has 2 scales a row and int8_linear 1, or none; a kernel goes along groups of one kind"


def test_a_gate_is_planned_by_price() -> None:
    """Where the chip waits for memory, or one launch counts, it is one kernel; where the vendor's rate counts it is not, and the plan says so."""
    whole = "product(linear, slice_1, silu, slice_2, mul)"
    assert regions(gate(1, 4096, 11008)) == regions(gate(512, 1024, 2816)) == [whole]
    of = gate(8192, 4096, 11008)
    assert regions(of) == ["elementwise(slice_1, silu, slice_2, mul)"]
    (left,) = fusion().plan(of).unjoined
    assert str(left.region) == whole
    assert left.cost.seconds > left.apart
    assert str(left) == f"not joined: {whole}: {left.cost.seconds * 1e6:.1f} us, {left.apart * 1e6:.1f} us apart"

    def two(b: Any, x: Any, w: Any, v: Any) -> Any:
        return b.mul(b.gelu(b.linear(x, w)), b.linear(x, v))

    apart = graph_of(two, x="bf16[1,4096]", w="bf16[11008,4096]", v="bf16[11008,4096]")
    assert regions(apart) == ["product(linear, gelu, linear_1, mul)"]


def test_price_of_a_gate() -> None:
    """The weight of both halves and what is written of one; the value as wide as both is not."""
    (fused,) = fusion().plan(gate(1, 4096, 11008)).regions
    assert fused.cost.bytes_moved == 2 * (4096 + 2 * 11008 * 4096 + 11008)
    assert fused.cost.flops == 2 * 4096 * 2 * 11008 + fusion().cost(gate(1, 8, 11008).calls[1:]).flops
    assert fused.cost.launches == 1


@pytest.mark.parametrize("device", ["fake-bandwidth", "fake-compute"])
def test_plan_of_a_gate(device: str, golden: Callable[[str], None]) -> None:
    """Where bytes are dear it is one kernel, where operations are the product is the vendor's."""
    golden(f"{fusion(device).plan(gate(64, 32, 48, 'f32'))}\n")
