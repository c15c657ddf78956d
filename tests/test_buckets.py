"""Numbers of rows that share a recording: which graphs allow it, and that no row's result changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.codegen.buckets import Rows, bucket, rows_of
from paretorch.codegen.cuda_graphs import Graphed
from paretorch.codegen.runtimes import RUNTIMES
from paretorch.ir.graph import Graph
from paretorch.rewrites.normalize import normalize
from tests.test_cuda_graphs import Fake
from tests.zoo import make

MOST = 64
BATCHED = ("vit_class", "bert")
Function = Callable[..., Any]


class Of(nn.Module):
    def __init__(self, function: Function) -> None:
        super().__init__()
        self.function, self.weight = function, nn.Parameter(torch.randn(4, 4, generator=torch.Generator().manual_seed(0)))

    def forward(self, x: Tensor) -> Any:
        return self.function(x, self.weight)


def graph_of(function: Function, x: Tensor | None = None, dim: int = 0) -> Graph:
    """Of x: f32[n, 4, 4], n from 1 to MOST, unless another tensor and dimension are given."""
    x = torch.randn(5, 4, 4) if x is None else x
    return normalize(capture(Of(function).eval(), (x,), ({dim: torch.export.Dim("n", min=1, max=MOST)},)).graph)


def test_buckets() -> None:
    assert [bucket(count) for count in (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 13, 17, 25, 33)] == [1, 2, 3, 4, 6, 6, 8, 8, 12, 12, 16, 24, 32, 48]
    assert [bucket(count, 20) for count in (16, 17, 20)] == [16, 20, 20]
    assert all(count <= bucket(count) <= max(1.5 * (count - 1), count) for count in range(1, 500))


ALONE: dict[str, Function] = {
    "linear": lambda x, w: torch.relu(x @ w),
    "attention inside": lambda x, w: F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0],
    "blended and split again": lambda x, w: (x.reshape(-1, 4) @ w).view(x.shape[0], 4, 4).softmax(-1),
    "two outputs, one turned": lambda x, w: (x.mean(2), x.permute(2, 0, 1), w * 2),
    "made from the size": lambda x, w: x + torch.ones(x.shape[0], 1, 4),
    "repeated": lambda x, w: x * w[0].repeat(x.shape[0], 4, 1),
    "a place of each row": lambda x, w: x[torch.arange(x.shape[0]), x[:, :, 0].argmax(1)],
    "expanded": lambda x, w: torch.cat([w[:1].expand(x.shape[0], 1, 4), x], 1),
}


@pytest.mark.parametrize("kind", ALONE)
def test_rows_that_know_nothing_of_each_other(kind: str) -> None:
    graph = graph_of(ALONE[kind])
    rows = rows_of(graph)
    assert isinstance(rows, Rows), rows
    assert (rows.inputs, rows.most) == ((0,), MOST)
    assert rows.outputs == {"two outputs, one turned": (0, 1, None)}.get(kind, (0,))
    for count in (1, 3, 5, 7, 63):
        x = torch.randn(count, 4, 4)
        (raised,) = rows.raised([x])
        assert len(raised) == bucket(count)
        for found, expected, dim in zip(graph.run(raised), graph.run(x), rows.outputs, strict=True):
            torch.testing.assert_close(found if dim is None else found.narrow(dim, 0, count), expected, rtol=1e-6, atol=1e-6)


MIXED: dict[str, Function] = {
    "mean of all": lambda x, w: x - x.mean(0),
    "mean of everything": lambda x, w: x / x.abs().max(),
    "sum": lambda x, w: x.sum(0),
    "scan": lambda x, w: x.cumsum(0),
    "softmax": lambda x, w: x.softmax(0),
    "sorted": lambda x, w: x.sort(0)[0],
    "turned round": lambda x, w: x.flip(0),
    "rolled": lambda x, w: x.roll(1, 0),
    "the first row": lambda x, w: x - x[:1],
    "the last row": lambda x, w: x[-1],
    "products of rows": lambda x, w: x.flatten(1) @ x.flatten(1).t(),
    "attention over rows": lambda x, w: F.scaled_dot_product_attention(*[x.permute(1, 0, 2)] * 3).permute(1, 0, 2),
    "twice as many": lambda x, w: torch.cat([x, x]),
    "blended for good": lambda x, w: x.reshape(-1, 4),
    "counted": lambda x, w: x / x.shape[0],
    "counted, as an output": lambda x, w: (x, x.shape[0]),
    "the largest": lambda x, w: x.argmax(0),
    "looked up backwards": lambda x, w: x[x.shape[0] - 1 - torch.arange(x.shape[0]), 0],
    "every row by place": lambda x, w: x[torch.arange(1, x.shape[0] + 1) - 1],
    "looked up": lambda x, w: x.index_select(0, torch.tensor([0, 0])),
    "neighbours": lambda x, w: F.conv1d(x.permute(1, 2, 0), w[..., None].expand(4, 4, 3), padding=1),
    "written into": lambda x, w: x.index_put((torch.tensor([0]),), w[None]),
    "a norm over all": lambda x, w: F.instance_norm(x.permute(1, 2, 0)),
    "squared": lambda x, w: x[:, None] - x[None],
}


@pytest.mark.parametrize("kind", MIXED)
def test_rows_that_do(kind: str) -> None:
    found = rows_of(graph_of(MIXED[kind]))
    assert isinstance(found, str), kind
    assert "row" in found or "n" in found


def test_reasons() -> None:
    assert rows_of(normalize(capture(Of(ALONE["linear"]).eval(), (torch.randn(2, 4, 4),)).graph)) == "no size of an input varies"
    assert rows_of(graph_of(MIXED["counted"])) == "div computes with how many rows there are"


@settings(max_examples=20, deadline=None)
@given(count=st.integers(1, 20), order=st.permutations([0, 1, 2]), axis=st.integers(0, 2), is_sparse=st.booleans())
def test_layouts(count: int, order: list[int], axis: int, is_sparse: bool) -> None:
    """Rows in any dimension of a tensor that lies in any order; one with gaps is not raised."""
    rows = Rows((axis,), (axis,))
    shape = [3, 4, 5]
    shape[axis] = count
    x = torch.empty_permuted(shape, order).normal_()
    if is_sparse:
        x = torch.randn(*shape[:2], 2 * shape[2])[..., ::2]
        assert rows.count([x]) is None
        return
    assert rows.count([x]) == count
    (raised,) = rows.raised([x])
    ((shape_of, stride, *_),) = rows.form([x])
    assert (raised.shape, raised.stride()) == (shape_of, stride)
    assert torch.equal(raised.narrow(axis, 0, count), x)
    assert torch.equal(raised.narrow(axis, count - 1, 1), raised.narrow(axis, -1, 1))
    at_the_bucket = torch.empty_permuted(list(raised.shape), order)
    assert rows.form([at_the_bucket]) == rows.form([x])


@pytest.mark.parametrize("name", BATCHED)
def test_models_are_recorded_once_a_bucket(name: str) -> None:
    model, inputs = make(name, B=4)
    given_ = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    sizes = tuple({0: torch.export.Dim("n", min=1, max=MOST)} for _ in given_)
    graph = normalize(capture(model.double(), given_, sizes).graph)
    fake, notes = Fake(), []
    execute = Graphed(RUNTIMES["eager"], notes=notes, recorder=fake).compile(graph, given_)
    for count in (5, 6, 5, 1, 1, 7, 8, 9, 5):
        batch = tuple(torch.cat([x] * 3)[:count] for x in given_)
        for found, expected in zip(execute(*batch), graph.run(*batch), strict=True):
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    assert (len(fake.records), fake.replays, notes) == (3, 5, [])  # for 6, 1 and 8 rows, when they came again
    assert not [x for x in execute(*given_) if not x.isfinite().all()]


def test_two_sizes_vary() -> None:
    """The rows are filled up, a length is not."""

    class Model(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(1)

    x = torch.randn(5, 7)
    sizes = ({0: torch.export.Dim("n", min=1, max=MOST), 1: torch.export.Dim("t", min=2, max=MOST)},)
    graph, fake = normalize(capture(Model().eval(), (x,), sizes).graph), Fake()
    assert rows_of(graph) == Rows((0,), (0,), MOST)
    execute = Graphed(RUNTIMES["eager"], recorder=fake).compile(graph, (x,))
    for count, length in ((5, 7), (6, 7), (5, 8), (6, 8), (5, 7)):
        x = torch.randn(count, length)
        torch.testing.assert_close(execute(x)[0], x.softmax(1))
    assert (len(fake.records), fake.replays) == (2, 3)
