"""Einsums of two computed values become products: the same numbers, in any order of the indices, and axes that can be followed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.analyze import token_axes
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op, op_of
from paretorch.rewrites.normalize import normalize

SIZES = {letter: size for size, letter in enumerate("abcdefgh", 2)}


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return torch.einsum(self.equation, x, y)


def graph_of(equation: str, x: Tensor, y: Tensor, sizes: Any = None) -> Graph:
    return normalize(capture(Einsum(equation).eval(), (x, y), sizes).graph)


def ops(graph: Graph) -> list[str]:
    return [op.name for node in graph.calls if (op := op_of(node)) is not None]


@st.composite
def equations(draw: st.DrawFn) -> tuple[str, bool]:
    """(an equation of two operands that is a product for each place of a batch, whether something is summed)."""
    letters = draw(st.permutations("abcdefgh"))
    counts = [draw(st.integers(0, 2)) for _ in range(4)]
    batch, rows, columns, summed = (letters[sum(counts[:place]) : sum(counts[: place + 1])] for place in range(4))
    left, right, out = (draw(st.permutations([*batch, *own])) for own in ([*rows, *summed], [*summed, *columns], [*rows, *columns]))
    return f"{''.join(left)},{''.join(right)}->{''.join(out)}", bool(summed)


@settings(max_examples=12, deadline=None)
@given(equations())
def test_any_product(drawn: tuple[str, bool]) -> None:
    equation, is_summed = drawn
    left, right = equation.split("->")[0].split(",")
    if not left or not right:
        return
    x, y = (torch.randn([SIZES[letter] for letter in term], dtype=torch.float64) for term in (left, right))
    graph = graph_of(equation, x, y)
    assert ("matmul" in ops(graph), "mul" in ops(graph)) == (is_summed, not is_summed), ops(graph)
    torch.testing.assert_close(graph.run(x, y)[0], torch.einsum(equation, x, y), rtol=1e-12, atol=1e-12)
    assert str(normalize(graph)) == str(graph)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("...id,...jd->...ij", (2, 3, 4, 5), (2, 3, 6, 5)),
        ("b...d,bd->b...", (2, 3, 4, 5), (2, 5)),
        ("ibnd,jbnd->bnij", (7, 2, 3, 5), (6, 2, 3, 5)),
        ("bi,bj->bij", (2, 3), (2, 4)),
    ],
)
def test_products(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = torch.randn(left, dtype=torch.float64), torch.randn(right, dtype=torch.float64)
    graph = graph_of(equation, x, y)
    assert "einsum" not in ops(graph)
    torch.testing.assert_close(graph.run(x, y)[0], torch.einsum(equation, x, y), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("equation", "left", "right"),
    [
        ("bii,bi->bi", (2, 3, 3), (2, 3)),  # a diagonal
        ("bij,bk->bik", (2, 3, 4), (2, 5)),  # j is summed over in one alone
        ("bij,bjk->bik", (1, 3, 4), (2, 4, 5)),  # the batch of one operand is spread
    ],
)
def test_what_is_no_product_stays(equation: str, left: tuple[int, ...], right: tuple[int, ...]) -> None:
    x, y = torch.randn(left), torch.randn(right)
    graph = graph_of(equation, x, y)
    assert ops(graph) == ["einsum"]
    assert torch.equal(graph.run(x, y)[0], torch.einsum(equation, x, y))


def test_sizes_that_vary() -> None:
    """One unknown length is left to the view, two are not."""
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=2, max=64)
    x, y = torch.randn(3, 7, 4, 5), torch.randn(3, 7, 5, 6)
    graph = graph_of("bhic,bhcj->bhij", x, y, ({0: batch, 1: length}, {0: batch, 1: length}))
    assert ops(graph) == ["matmul"]
    both = graph_of("bthc,cbd->bthd", torch.randn(3, 7, 4, 5), torch.randn(5, 3, 6), ({0: batch, 1: length}, {1: batch}))
    assert "einsum" in ops(both)
    for count, rows in ((3, 7), (5, 4)):
        x, y, z = torch.randn(count, rows, 4, 5), torch.randn(count, rows, 5, 6), torch.randn(5, count, 6)
        torch.testing.assert_close(graph.run(x, y)[0], x @ y)
        torch.testing.assert_close(both.run(x, z)[0], torch.einsum("bthc,cbd->bthd", x, z))


class Linear(nn.Module):
    """Linear attention, as many libraries spell it."""

    def forward(self, x: Tensor) -> Tensor:
        keys = torch.einsum("bnd,bne->bde", x.softmax(1), x)
        return x + torch.einsum("bnd,bde->bne", x.softmax(2), keys)


def test_axes_are_followed() -> None:
    graph = normalize(capture(Linear().eval(), (torch.randn(2, 9, 4),)).graph)
    products_, facts = [node for node in graph.calls if is_op(node, "matmul")], token_axes(graph)
    assert len(products_) == 2
    assert all(node.name in facts.maps for node in graph.calls)
    (out,) = graph.output_node.args[0]  # type: ignore[misc]
    (x,) = graph.inputs
    assert facts.maps[out.name][0] == facts.maps[x.name][0]  # type: ignore[union-attr]
