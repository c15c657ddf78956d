"""The token matching kernel against the op's definition in float64: lengths, sizes, ties, bounds, text, and what compilers make of it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.kernel import Kernel
from paretorch.codegen.regions import covers, region_of
from paretorch.ir.graph import Graph
from tests.kernel_cases import DTYPES, check_compiled, graph_of, kernel, launched_between_guards, run_alone
from tests.test_fusion import regions

pytest.importorskip("triton")


def graph(metric: str, size: str = "", count: int = 3, protected: int = 1) -> Graph:
    def match(b: Any, metric: Any, size: Any = None) -> tuple[Any, ...]:
        found = b.match_tokens(metric, size, count, protected)
        return tuple(b.item(found, place) for place in range(3))

    return graph_of(match, metric=metric, **({"size": size} if size else {}))


def check(made: Kernel, inputs: list[Tensor], count: int, protected: int) -> None:
    """Between guards; the same places as the op finds in f64."""
    found = launched_between_guards(made, inputs)
    metric, size = inputs[0].double(), inputs[1].double() if len(inputs) > 1 else None
    expected = torch.ops.paretorch.match_tokens(metric, size, count, protected)
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == torch.int64
        assert torch.equal(a, b)


def sizes(batch: int, tokens: int, generator: torch.Generator) -> Tensor:
    """Whole numbers, some of them zero."""
    return torch.randint(0, 4, (batch, tokens), generator=generator).float()


@settings(max_examples=12, deadline=None, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    batch=st.integers(1, 3),
    free=st.sampled_from([2, 3, 7, 16, 37, 70, 131]),
    protected=st.integers(0, 2),
    width=st.sampled_from([1, 3, 16, 33, 70]),
    share=st.floats(0.01, 1.0),
    has_size=st.sampled_from(["", "each", "all"]),
    seed=st.integers(0, 99),
)
def test_any_lengths(batch: int, free: int, protected: int, width: int, share: float, has_size: str, seed: int) -> None:
    tokens, count = free + protected, max(1, int(share * (free // 2)))
    generator = torch.Generator().manual_seed(seed)
    inputs = [torch.randn(batch, tokens, width, generator=generator)]
    rows = batch if has_size == "each" else 1
    if width == 1:  # cosines are 1 and -1: everything is a tie
        inputs[0] = inputs[0].sign()
    if has_size:
        inputs.append(sizes(rows, tokens, generator))
    made = kernel(graph(f"f32[{batch},{tokens},{width}]", f"f32[{rows},{tokens}]" if has_size else "", count, protected))
    check(made, inputs, count, protected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_types_and_ties(dtype: str) -> None:
    """Every token stands there three times, so that all partners and all orders are ties."""
    made = kernel(graph(f"{dtype}[2,49,8]", count=10))
    first = torch.eye(8).repeat(6, 1)[torch.randperm(48, generator=torch.Generator().manual_seed(0))]
    metric = torch.cat([torch.ones(1, 8), first])[None].repeat(2, 1, 1)
    check(made, [metric.to(made.module.EXAMPLES[0][2])], 10, 1)


def test_padding_goes_first_and_numbers_that_are_none_stay_inside() -> None:
    made = kernel(graph("f32[1,21,8]", "f32[1,21]", 4))
    metric, size = torch.randn(1, 21, 8), torch.ones(1, 21)
    size[:, 10:] = 0
    check(made, [metric, size], 4, 1)
    size[:] = 0
    check(made, [metric, size], 4, 1)
    metric[:, 3:7] = float("nan")
    kept, source, target = launched_between_guards(made, [metric, size])
    assert torch.equal(torch.cat([kept, source], 1).sort(1)[0], torch.arange(21)[None])
    assert 0 <= int(target.min()) <= int(target.max()) < 17


def test_lengths_that_vary_are_arguments() -> None:
    made = kernel(graph("f32[b,n,16]", "f32[b,n]"))
    for batch, tokens in ((1, 9), (3, 71)):
        generator = torch.Generator().manual_seed(tokens)
        check(made, [torch.randn(batch, tokens, 16, generator=generator), sizes(batch, tokens, generator)], 3, 1)


def test_text(golden: Callable[[str], None]) -> None:
    golden(kernel(graph("bf16[64,197,64]", "f32[64,197]", 13), 5).source)


def test_a_file_runs_alone(tmp_path: Path) -> None:
    run_alone(kernel(graph("bf16[2,19,8]", "f32[1,19]")), tmp_path)


def test_refusals() -> None:
    def reason(metric: str) -> str:
        found = covers(region_of(graph(metric).calls[:1]))
        assert isinstance(found, str)
        return found

    assert reason("f64[1,9,4]") == "match_tokens is of f64; the template takes f32, f16, bf16"
    assert reason("f32[1,20001,4]") == "match_tokens matches 20001 tokens; the template holds 8192"


def test_it_is_planned() -> None:
    (name,) = regions(graph("bf16[64,197,64]", "f32[64,197]", 13))
    assert name.startswith("match_tokens(match_tokens, ")


def test_no_spills() -> None:
    check_compiled([kernel(graph("bf16[64,197,64]", "f32[64,197]", 13))])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "width"), [(50, 64), (577, 1024), (4097, 80), (8193, 64)])
def test_no_spills_at_any_length(dtype: str, tokens: int, width: int) -> None:
    check_compiled([kernel(graph(f"{dtype}[2,{tokens},{width}]", f"f32[2,{tokens}]"))])
