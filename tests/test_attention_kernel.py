"""The attention kernel: every way to hide keys x dtype x lengths against float64, bounds, layouts, text, and what compilers make of it."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.attention import WIDEST
from paretorch.codegen.kernel import Kernel
from paretorch.codegen.regions import covers, region_of
from paretorch.codegen.triton_runtime import with_kernels
from paretorch.codegen.triton_text import render
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph
from tests.attention_cases import HIDING, LENGTHS, Hiding, Lengths, inputs_of
from tests.kernel_cases import (
    DTYPES,
    TOLERANCE,
    assert_close,
    check_compiled,
    graph_of,
    in_f64,
    kernel,
    launched_between_guards,
    read_by,
    run_alone,
)

pytest.importorskip("triton")

MATRIX = [(hiding, dtype, lengths) for hiding in HIDING for dtype in DTYPES for lengths in LENGTHS]
TENTH = sorted(random.Random(1).sample(MATRIX, len(MATRIX) // 10))


def check(hiding: Hiding, dtype: str, lengths: Lengths, seed: int = 0) -> None:
    graph = hiding.graph(dtype, lengths)
    inputs = inputs_of(graph, seed)
    found = kernel(graph).launch(*read_by(graph, inputs))
    assert found.dtype == graph.outputs[0].meta["val"].dtype
    assert_close([found], in_f64(hiding.function, hiding.types(dtype, lengths), inputs), TOLERANCE[dtype])


@pytest.mark.parametrize(("hiding", "dtype", "lengths"), TENTH)
def test_numbers(hiding: str, dtype: str, lengths: str) -> None:
    check(HIDING[hiding], dtype, LENGTHS[lengths])


@pytest.mark.slow
@pytest.mark.parametrize(("hiding", "dtype", "lengths"), MATRIX)
def test_numbers_of_all(hiding: str, dtype: str, lengths: str) -> None:
    check(HIDING[hiding], dtype, LENGTHS[lengths])


SIZES = st.sampled_from([1, 2, 3, 16, 17, 31, 64, 67])


@settings(max_examples=15, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    hiding=st.sampled_from(sorted(HIDING)),
    lengths=st.builds(
        Lengths,
        st.integers(1, 2),
        st.integers(1, 2),
        st.integers(1, 3),
        SIZES,
        SIZES,
        st.sampled_from([1, 3, 16, 17]),
        st.sampled_from([1, 8, 19]),
    ),
    left=st.sampled_from([-1, 0, 1, 5, 40]),
    right=st.sampled_from([-1, 0, 2, 33]),
    offset=st.integers(-30, 30),
    sinks=st.sampled_from([0, 1, 20]),
    seed=st.integers(0, 99),
)
def test_any_lengths(hiding: str, lengths: Lengths, left: int, right: int, offset: int, sinks: int, seed: int) -> None:
    options = {**HIDING[hiding].options, "left": left, "right": right, "offset": offset, "sinks": sinks}
    check(replace(HIDING[hiding], options=options), "f32", lengths, seed)


FEW = {"one": Lengths(1, 1, 4, 1, 530, 12, 20), "three": Lengths(1, 2, 1, 3, 515, 16, 16)}


@pytest.mark.parametrize(("hiding", "lengths"), [("nothing", "one"), ("sinks", "three"), ("key_bias", "one"), ("later", "three")])
def test_few_queries_to_many_keys(hiding: str, lengths: str) -> None:
    """The keys are divided; shares beyond what a window lets a query see have no weight."""
    graph = HIDING[hiding].graph("f32", FEW[lengths])
    made, inputs = kernel(graph), inputs_of(graph)
    assert [part.name for part in made.parts] == ["kernel_00_attention_combine"]
    expected = in_f64(HIDING[hiding].function, HIDING[hiding].types("f32", FEW[lengths]), inputs)
    assert_close(launched_between_guards(made, read_by(graph, inputs)), expected, TOLERANCE["f32"])


@pytest.mark.slow
@pytest.mark.parametrize("hiding", HIDING)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("lengths", FEW)
def test_few_queries_of_all(hiding: str, dtype: str, lengths: str) -> None:
    check(HIDING[hiding], dtype, FEW[lengths])


def test_keys_are_divided_where_programs_are_few() -> None:
    def parts(**sizes: int) -> int:
        return len(kernel(HIDING["nothing"].graph("bf16", Lengths(**sizes))).parts)

    assert parts(queries=1, keys=4096) == 1
    assert parts(queries=1, keys=256) == 0
    assert parts(queries=512, keys=4096) == 0
    assert parts(batch=64, heads=8, queries=1, keys=4096) == 0
    varies = graph_of(HIDING["nothing"].function, query="f16[b,4,1,64]", key="f16[b,2,n,64]", value="f16[b,2,n,64]")
    assert len(kernel(varies).parts) == 1


@pytest.mark.parametrize("hiding", HIDING)
def test_nothing_outside_is_touched(hiding: str) -> None:
    graph = HIDING[hiding].graph("f32", Lengths(1, 2, 2, 19, 23, 12, 20))
    inputs = inputs_of(graph)
    assert_close(launched_between_guards(kernel(graph), read_by(graph, inputs)), graph.run(*inputs), TOLERANCE["f32"])


def run_in_graph(graph: Graph, inputs: list[Tensor]) -> tuple[tuple[Any, ...], Kernel]:
    """The graph with its one attention as a kernel."""
    (node,) = [node for node in graph.calls if "attention" in str(node.target)]
    module, kernels = with_kernels(graph, [(region_of([node]), None)])
    return tuple(module(*inputs)), kernels[0]


def test_packed_heads_are_read_where_they_lie() -> None:
    """Queries, keys and values as parts of one projection, and a mask of one row that is shared by strides of zero."""

    def packed(b: Any, x: Any, mask: Any) -> Any:
        parts = [b.select(b.permute(x, [2, 0, 3, 1, 4]), 0, place) for place in range(3)]
        mixed = b.attention(*parts, b.expand(mask, [2, 3, 21, 21]), scale=0.3)
        return b.permute(mixed, [0, 2, 1, 3])

    graph = graph_of(packed, x="f32[2,21,3,3,8]", mask="f32[2,1,1,21]")
    inputs = inputs_of(graph)
    found, made = run_in_graph(graph, inputs)
    assert_close(found, graph.run(*inputs), TOLERANCE["f32"])
    assert found[0].is_contiguous(), "heads of a token lie beside each other"
    assert "key.stride(1)" in made.source
    turned = graph_of(
        lambda b, q, k, v: b.attention(b.permute(q, [0, 1, 3, 2]), k, v, scale=0.3), q="f32[1,2,8,5]", k="f32[1,2,6,8]", v="f32[1,2,6,8]"
    )
    inputs = inputs_of(turned)
    assert_close(run_in_graph(turned, inputs)[0], turned.run(*inputs), TOLERANCE["f32"])


def test_one_value_in_two_roles() -> None:
    graph = graph_of(lambda b, x: b.attention(x, x, x, scale=0.3), x="f32[1,2,9,8]")
    inputs = inputs_of(graph)
    found, made = run_in_graph(graph, inputs)
    assert_close(found, graph.run(*inputs), TOLERANCE["f32"])
    assert "def launch(query):" in made.source


def test_lengths_that_vary_are_arguments() -> None:
    types = {"query": "f32[b,2,n,8]", "key": "f32[b,2,m,8]", "value": "f32[b,2,m,8]", "key_bias": "f32[b,m]"}
    graph = graph_of(HIDING["key_bias"].function, **types)
    made = kernel(graph)
    for batch, queries, keys in ((1, 1, 1), (3, 40, 70)):
        at = Lengths(batch, 2, 1, queries, keys, 8, 8)
        inputs = inputs_of(HIDING["key_bias"].graph("f32", at))
        assert_close([made.launch(*inputs)], graph.run(*inputs), TOLERANCE["f32"])


def test_local_attention_is_attention_with_a_window() -> None:
    def local(b: Any, query: Any, key: Any, value: Any, key_bias: Any) -> Any:
        return b.local_attention(query, key, value, key_bias, scale=0.3, left=6, right=2, sinks=3, block=8)

    types = {"query": "f32[1,4,50,8]", "key": "f32[1,2,50,8]", "value": "f32[1,2,50,8]", "key_bias": "f32[1,50]"}
    graph = graph_of(local, **types)
    inputs = inputs_of(graph)
    assert_close([kernel(graph).launch(*inputs)], in_f64(local, types, inputs), TOLERANCE["f32"])


def test_rows_that_see_nothing() -> None:
    """Zeros where every key is hidden; the mean of the values where all have the same bias, as low as a type goes."""
    graph = HIDING["padding"].graph("f32", Lengths(queries=3, keys=5))
    query, key, value, mask = inputs_of(graph)
    mask[0] = False
    found = kernel(graph).launch(query, key, value, mask)
    assert torch.equal(found[0], torch.zeros_like(found[0]))
    assert_close([found], graph.run(query, key, value, mask), TOLERANCE["f32"])
    lowest = torch.finfo(torch.float32).min
    for low, name in ((-1e30, "key_bias"), (lowest, "key_bias"), (float("-inf"), "key_bias"), (lowest, "added")):
        graph = HIDING[name].graph("f32", Lengths(queries=3, keys=5))
        query, key, value, hidden = inputs_of(graph)
        hidden[0] = low
        assert_close([kernel(graph).launch(query, key, value, hidden)], graph.run(query, key, value, hidden), TOLERANCE["f32"])


def test_no_queries_and_no_keys() -> None:
    graph = HIDING["nothing"].graph("f32", Lengths(queries=4, keys=3))
    query, key, value = inputs_of(graph)
    made = kernel(graph)
    assert made.launch(query[:, :, :0], key, value).shape == (2, 2, 0, 16)
    assert torch.equal(made.launch(query, key[:, :, :0], value[:, :, :0]), torch.zeros(2, 2, 4, 16))


@pytest.mark.parametrize("hiding", ["causal", "key_bias", "all"])
def test_text(hiding: str, golden: Callable[[str], None]) -> None:
    graph = HIDING[hiding].graph("bf16", Lengths(2, 2, 2 if hiding != "key_bias" else 1, 197, 197, 80 if hiding == "all" else 64, 64))
    golden(kernel(graph, 3).source)


def test_text_of_few_queries(golden: Callable[[str], None]) -> None:
    golden(kernel(HIDING["sinks"].graph("f16", Lengths(1, 8, 4, 1, 8192, 128, 128)), 7).source)


def test_a_file_runs_alone(tmp_path: Path) -> None:
    run_alone(kernel(HIDING["all"].graph("bf16", Lengths(1, 2, 2, 5, 9, 8, 12))), tmp_path)


def test_refusals() -> None:
    def refused(query: str, key: str, value: str, **more: str) -> str:
        graph = graph_of(HIDING["nothing"].function, query=query, key=key, value=value, **more)
        found = covers(region_of(graph.calls))
        assert isinstance(found, str)
        with pytest.raises(LoweringError, match="template attention cannot take"):
            render(region_of(graph.calls))
        return found

    same = "f64[1,2,4,8]"
    assert refused(same, same, same) == "attention is of f64; the template takes one of f32, f16, bf16"
    same = "f32[1,2,4,300]"
    assert refused(same, same, same) == "attention has heads of width 300; in f32 the template holds 128"
    same = "f32[1,2,4,8]"
    assert "has a key bias of [1, 1]; the template takes [1, 4]" in refused(same, same, same, key_bias="f32[1,1]")


# compilers


def compiled(dtype: str, hiding: str, group: int, width: int, number: int) -> Kernel:
    return kernel(HIDING[hiding].graph(dtype, Lengths(2, 2, group, 1024, 1024, width, width)), number)


def few_rows() -> Kernel:
    return kernel(HIDING["key_bias"].graph("f16", Lengths(1, 8, 4, 1, 8192, 128, 128)), 1)


def test_no_spills() -> None:
    """A few at a size that models have, without a GPU."""
    check_compiled([compiled("bf16", "causal", 2, 64, 0), few_rows()])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [16, 64, 80, 128, 256])
def test_no_spills_at_any_width(dtype: str, width: int) -> None:
    width = min(width, WIDEST[dtype])
    check_compiled([compiled(dtype, hiding, group, width, 2 * place + group) for place, hiding in enumerate(HIDING) for group in (1, 2)])
