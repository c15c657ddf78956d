"""Products of few rows with K divided between programs: against float64, bounds, the same bits each run, text, refusals, prices, compiled."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from paretorch.codegen.kernel import Kernel, Region
from paretorch.codegen.product import Fused
from paretorch.codegen.regions import can_compute, covers, forms_of, region_of
from paretorch.codegen.schedules import FEW_ROWS, LEAST_STEPS, MOST_SPLITS
from paretorch.codegen.triton_runtime import with_kernels
from paretorch.codegen.triton_text import render
from paretorch.generated import Generated
from paretorch.ir.graph import Graph
from tests.kernel_cases import (
    DTYPES,
    TOLERANCE,
    assert_close,
    check_compiled,
    graph_of,
    in_f64,
    launched_between_guards,
    read_by,
    run_alone,
)
from tests.test_fusion import fusion, regions
from tests.test_product_kernel import KINDS, Sizes, graph, values

pytest.importorskip("triton")

SIZES = {
    "one column": Sizes(1, 640, 1),
    "one row": Sizes(1, 2048, 67, 32),
    "prime": Sizes(7, 1031, 41),
    "power": Sizes(16, 1024, 64, 8),
    "groups that no block divides": Sizes(5, 8 * 72, 23, 8),
}
MATRIX = [(kind, dtype, sizes) for kind in KINDS for dtype in DTYPES for sizes in SIZES]
TENTH = sorted(random.Random(3).sample(MATRIX, len(MATRIX) // 10))


def split(of: Graph) -> Region:
    (_, found) = forms_of(region_of([node for node in of.calls if can_compute(node)]))
    return found


def check(kind: str, dtype: str, at: Sizes, seed: int = 0) -> Kernel:
    """With x so small that a sigmoid of sums over a long K is not one of their rounding."""
    of = graph(kind, dtype, at)
    inputs = [value / 16 if node.name == "x" else value for node, value in zip(of.inputs, values(of, seed), strict=True)]
    made = render(split(of))
    found = made.launch(*read_by(of, inputs))
    function, types = KINDS[kind]
    assert_close(found if isinstance(found, tuple) else (found,), in_f64(function, types(dtype, at), inputs), TOLERANCE[dtype])
    return made


@pytest.mark.parametrize(("kind", "dtype", "sizes"), TENTH)
def test_numbers(kind: str, dtype: str, sizes: str) -> None:
    check(kind, dtype, SIZES[sizes])


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "dtype", "sizes"), MATRIX)
def test_numbers_of_all(kind: str, dtype: str, sizes: str) -> None:
    check(kind, dtype, SIZES[sizes])


@settings(max_examples=8, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    kind=st.sampled_from(sorted(KINDS)),
    rows=st.sampled_from([1, 2, 7, 16]),
    length=st.sampled_from([257, 320, 1000]),
    groups=st.integers(1, 3),
    columns=st.sampled_from([1, 2, 16, 31]),
    seed=st.integers(0, 99),
)
def test_any_sizes(kind: str, rows: int, length: int, groups: int, columns: int, seed: int) -> None:
    made = check(kind, "f32", Sizes(rows, length * groups, columns, groups), seed)
    assert 1 < made.schedule["SPLITS"] <= MOST_SPLITS


@pytest.mark.parametrize("kind", KINDS)
def test_nothing_outside_is_touched(kind: str) -> None:
    of = graph(kind, "f32", Sizes(3, 2 * 290, 37, 2))
    inputs, made = values(of), render(split(of))
    assert_close(launched_between_guards(made, read_by(of, inputs)), of.run(*inputs), TOLERANCE["f32"])


def test_the_same_bits_each_time() -> None:
    """Parts are added in the order of K, whichever program is done first; nothing is added in memory."""
    of = graph("packed gate", "f16", Sizes(3, 1024, 40, 4))
    inputs, made = read_by(of, values(of)), render(split(of))
    assert torch.equal(made.launch(*inputs), made.launch(*inputs))
    assert "for split in tl.static_range(SPLITS):" in made.source
    assert "atomic" not in made.source


def test_no_part_is_empty() -> None:
    """A division that would leave programs at the end without blocks along K is one of fewer parts."""
    steps = 37
    for options in Fused(split(graph("linear", "f32", Sizes(1, 32 * steps, 16)))).schedules:
        share = -(-steps // options["SPLITS"])
        assert share >= LEAST_STEPS
        assert (options["SPLITS"] - 1) * share < steps


@pytest.mark.parametrize("kind", ["activated", "sliced gate"])
def test_text(kind: str, golden: Callable[[str], None]) -> None:
    golden(render(split(graph(kind, "bf16", Sizes(4, 8192, 1024, 128))), 3).source)


def test_a_file_runs_alone(tmp_path: Path) -> None:
    run_alone(render(split(graph("packed gate", "bf16", Sizes(5, 960, 20, 3)))), tmp_path)


def test_refusals() -> None:
    def reason(rows: str, inner: int, columns: int) -> str:
        of = graph_of(lambda b, x, w: b.relu(b.linear(x, w)), x=f"bf16[{rows},{inner}]", w=f"bf16[{columns},{inner}]")
        found = covers(split(of))
        assert isinstance(found, str)
        return found

    assert reason("17", 4096, 512) == f"it has 17 rows; K is divided where there are at most {FEW_ROWS}"
    assert reason("n", 4096, 512) == f"it has any number of rows; K is divided where there are at most {FEW_ROWS}"
    fills = "its programs fill a chip, or a part of the {} that they go along would be too short"
    assert reason("1", 4096, 8192) == fills.format(4096)
    assert reason("1", 448, 16) == fills.format(448)


# plans


def decode(inner: int, columns: int) -> Graph:
    return graph("alone", "bf16", Sizes(1, inner, columns, inner // 64))


def test_it_is_planned_by_price() -> None:
    """Where blocks of columns are few for the chip and K is long enough to pay for a second launch. The plan prints both prices."""
    assert regions(decode(16384, 1024)) == ["split_product(int8_linear)"]
    assert regions(decode(1024, 1024)) == regions(decode(16384, 8192)) == ["product(int8_linear)"]
    assert regions(decode(28672, 2048), "h100-sxm") == ["split_product(int8_linear)"]
    assert regions(decode(28672, 2048), "l4") == ["product(int8_linear)"]  # whose units 128 programs fill
    for of, chosen, other in ((decode(16384, 1024), "split_product", "product"), (decode(1024, 1024), "product", "split_product")):
        (fused,) = fusion().plan(of).regions
        ((name, cost),) = fused.others
        assert (fused.region.template, name) == (chosen, other)
        assert fused.cost.seconds < cost.seconds
        assert f"{chosen}(int8_linear): {fused.cost.seconds * 1e6:.1f} us (as {other} {cost.seconds * 1e6:.1f} us), saves" in str(fused)


def test_the_vendor_s_product_has_one_launch_less() -> None:
    """With one op behind it there is nothing to gain beside a second launch: the plan says what was priced."""
    of = graph("linear", "bf16", Sizes(1, 16384, 1024))
    assert regions(of) == []
    assert "not joined: split_product(linear, relu): 21." in str(fusion().plan(of))
    assert regions(graph("gated", "bf16", Sizes(1, 16384, 1024, 256))) == ["split_product(silu, mul, int8_linear)"]


def test_price() -> None:
    """64 programs, where 264 keep the chip busy, take so much longer; the parts of the sums are written and read; a second launch."""
    prices, of = fusion(), decode(16384, 1024)
    device = prices.prices.device
    (chosen,) = prices.plan(of).regions
    ((_, plain),) = chosen.others
    weight = 1024 * 16384 + 4 * 1024 * 256 + 2 * (16384 + 2 * 1024)
    splits = Fused(chosen.region).schedules[0]["SPLITS"]
    assert splits == 5  # 320 programs
    bandwidth = device.bandwidth_bytes_per_s * 0.896
    assert plain.bytes_moved == weight
    assert chosen.cost.bytes_moved == weight + 2 * 4 * splits * 1024
    assert plain.seconds == pytest.approx(weight / bandwidth * 2 * 132 / 64 + device.launch_s, rel=1e-3)
    assert chosen.cost.seconds == pytest.approx(chosen.cost.bytes_moved / bandwidth + 2 * device.launch_s, rel=1e-3)
    assert (plain.launches, chosen.cost.launches) == (1, 2)


def test_saved_and_read_again() -> None:
    """A result that is read runs what was planned, not the other form."""
    of = decode(16384, 1024)
    made = Generated.of(fusion().plan(of).priced)
    assert [(kernel.template, len(kernel.parts)) for kernel in made.kernels] == [("split_product", 1)]
    read = Generated.from_members(made.members(of), of)
    assert read.kernels == made.kernels
    assert [region.template for region, _ in read.regions] == ["split_product"]
    small = graph("alone", "f32", Sizes(1, 2048, 32, 32))
    inputs = values(small)
    module = with_kernels(small, [(split(small), None)])[0]
    assert_close(module(*inputs), small.run(*inputs), TOLERANCE["f32"])


# compilers


def test_no_spills() -> None:
    kinds: list[Any] = ["activated", "sliced gate", "packed gate"]
    check_compiled([render(split(graph(kind, "bf16", Sizes(4, 8192, 1024, 128))), place) for place, kind in enumerate(kinds)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_spills_at_any_block(dtype: str) -> None:
    kernels: list[Kernel] = []
    for kind in KINDS:
        found = split(graph(kind, dtype, Sizes(16, 8192, 1024, 128)))
        kernels += [render(found, len(kernels) + place, schedule=schedule) for place, schedule in enumerate(Fused(found).schedules)]
    check_compiled(kernels)
