"""Generated kernels: every family x dtype x shape class against float64 in triton's interpreter, bounds, and what compilers make of them."""

from __future__ import annotations

import random

import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from tests.kernel_cases import (
    DTYPES,
    FAMILIES,
    LONG,
    SHAPES,
    TOLERANCE,
    assert_close,
    check_compiled,
    in_f64,
    inputs_of,
    kernel,
    launched_between_guards,
    read_by,
    region,
)

pytest.importorskip("triton")

MATRIX = [(family, dtype, shape) for family in FAMILIES for dtype in DTYPES for shape in SHAPES]
TENTH = sorted(random.Random(0).sample(MATRIX, len(MATRIX) // 10))
LONG_ROWS = ("layer_norm", "softmax", "statistics")


def check(family: str, dtype: str, rows: int, width: int, seed: int = 0) -> None:
    """One kernel for the whole graph, against torch in f64."""
    graph = FAMILIES[family].graph(dtype, rows, width)
    inputs = inputs_of(graph, seed)
    found = kernel(graph).launch(*read_by(graph, inputs))
    found = found if isinstance(found, tuple) else (found,)
    for output, node in zip(found, graph.outputs, strict=True):
        assert output.dtype == node.meta["val"].dtype
    expected = in_f64(FAMILIES[family].function, FAMILIES[family].types(dtype, rows, width), inputs)
    assert_close(found, expected, TOLERANCE[dtype])


@pytest.mark.parametrize(("family", "dtype", "shape"), TENTH)
def test_numbers(family: str, dtype: str, shape: str) -> None:
    check(family, dtype, *SHAPES[shape])


@pytest.mark.slow
@pytest.mark.parametrize(("family", "dtype", "shape"), MATRIX)
def test_numbers_of_all(family: str, dtype: str, shape: str) -> None:
    check(family, dtype, *SHAPES[shape])


@pytest.mark.parametrize("family", LONG_ROWS)
def test_rows_of_several_blocks(family: str) -> None:
    graph = FAMILIES[family].graph("f32", *LONG)
    assert region(graph).template == "long_row"
    check(family, "f32", *LONG)


@settings(
    max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate]
)  # shrinking runs for minutes in the interpreter
@given(
    family=st.sampled_from(sorted(FAMILIES)),
    rows=st.sampled_from([1, 2, 7, 13]),
    width=st.sampled_from([1, 2, 3, 5, 61, 64, 127, 1030]),
    dtype=st.sampled_from([*DTYPES, "f64"]),
    seed=st.integers(0, 99),
)
def test_any_shape(family: str, rows: int, width: int, dtype: str, seed: int) -> None:
    check(family, dtype, rows, width, seed)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_outside_is_touched(family: str) -> None:
    graph = FAMILIES[family].graph("f32", 3, 37)
    inputs = inputs_of(graph)
    assert_close(launched_between_guards(kernel(graph), read_by(graph, inputs)), graph.run(*inputs), TOLERANCE["f32"])


def test_no_spills() -> None:
    """Each family at bf16 and at a size that models have, without a GPU."""
    graphs = [family.graph("bf16", 64, 1024) for family in FAMILIES.values()]
    check_compiled([kernel(graph, place) for place, graph in enumerate(graphs)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [64, 4096, 16384, 50257])
def test_no_spills_at_any_width(dtype: str, width: int) -> None:
    graphs = [family.graph(dtype, 16, width) for family in FAMILIES.values()]
    check_compiled([kernel(graph, place) for place, graph in enumerate(graphs)])
