"""Generated kernels: every family x dtype x shape class against float64 in triton's interpreter, bounds, and what compilers make of them."""

from __future__ import annotations

import random
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.kernel import ARCHITECTURES, Kernel, compile_kernels
from paretorch.ir.errors import TargetError
from tests.kernel_cases import DTYPES, FAMILIES, LONG, SHAPES, TOLERANCE, assert_close, in_f64, inputs_of, kernel, read_by, region

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


# nothing is read or written outside


GUARD = 4096
MARK = {torch.bool: True}


def between_guards(x: Tensor, mark: float) -> tuple[Tensor, Tensor]:
    """(the tensor in the middle of a longer one, that one)."""
    whole = torch.full((x.numel() + 2 * GUARD,), MARK.get(x.dtype, mark), dtype=x.dtype)
    whole[GUARD : GUARD + x.numel()] = x.reshape(-1)
    return whole[GUARD : GUARD + x.numel()].view(x.shape), whole


def launched_between_guards(made: Kernel, inputs: list[Tensor]) -> Any:
    """Runs the kernel with guards of NaN around what it reads; guards around what it writes must stay."""
    guards: list[Tensor] = []

    def empty(shape: tuple[int, ...], **options: Any) -> Tensor:
        inner, whole = between_guards(torch.zeros(shape, **options), 7.0)
        guards.append(whole)
        return inner

    module = made.module
    module.torch = SimpleNamespace(**{**vars(torch), "empty": empty})  # type: ignore[attr-defined]
    try:
        found = module.launch(*(between_guards(x, float("nan"))[0] for x in inputs))
    finally:
        module.torch = torch  # type: ignore[attr-defined]
    for whole in guards:
        edges = torch.cat([whole[:GUARD], whole[-GUARD:]])
        assert torch.equal(edges, torch.full_like(edges, MARK.get(edges.dtype, 7.0)))
    return found if isinstance(found, tuple) else (found,)


@pytest.mark.parametrize("family", FAMILIES)
def test_nothing_outside_is_touched(family: str) -> None:
    graph = FAMILIES[family].graph("f32", 3, 37)
    inputs = inputs_of(graph)
    assert_close(launched_between_guards(kernel(graph), read_by(graph, inputs)), graph.run(*inputs), TOLERANCE["f32"])


# compilers


def check_compiled(kernels: list[Kernel]) -> None:
    try:
        found = compile_kernels(kernels)
    except TargetError as error:
        pytest.skip(str(error))
    assert set(found) == {(made.name, arch) for made in kernels for arch in ARCHITECTURES}
    for (name, arch), binary in found.items():
        assert binary.spills == 0, (name, arch)
        assert 0 < binary.registers <= (512 if arch == "gfx942" else 255)
        assert binary.shared_bytes <= 48 * 1024
        assert binary.binary


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
