"""Tokens chosen by the attention that they receive and by the frame before: the ops against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.ir.builder import Builder, build
from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.token_context import match_to_context, match_to_frame_before, places_among, received_weights
from paretorch.ir.ops.tokens import log_size, merge_tokens
from paretorch.ir.types import TensorType
from tests.test_token_choice import check_match

DRAWN = settings(max_examples=25, deadline=None, derandomize=True)


def cosines(metric: Tensor) -> Tensor:
    unit = F.normalize(metric, dim=-1)
    return unit @ unit.T


@pytest.mark.parametrize(("kv_heads", "softcap"), [(4, 0.0), (2, 0.0), (1, 3.0)])
def test_received_weights_are_the_mean_of_all_rows(kv_heads: int, softcap: float) -> None:
    query, key = torch.randn(2, 4, 7, 6, dtype=torch.float64), torch.randn(2, kv_heads, 7, 6, dtype=torch.float64)
    size = torch.randint(0, 3, (2, 7)).double()
    size[:, 0] = 1.0
    value = torch.eye(7, dtype=torch.float64).expand(2, kv_heads, 7, 7)
    rows = attention(query, key, value, None, log_size(size), scale=0.4, softcap=softcap).mean(1)
    wanted = (rows * size[..., None]).sum(1) / size.sum(1, keepdim=True)
    torch.testing.assert_close(received_weights(query, key, size, 0.4, softcap), wanted)
    plain = attention(query, key, value, None, None, scale=0.4, softcap=softcap).mean((1, 2))
    torch.testing.assert_close(received_weights(query, key, None, 0.4, softcap), plain)
    assert received_weights(query, key, size * 0, 0.4).isfinite().all()


def in_context(weight: Tensor, size: Tensor, count: int, protected: int, metric: Tensor, contextual: int) -> dict[int, int]:
    """Each token that goes, and the one that takes it in."""
    near = cosines(metric)
    ranked = sorted(range(protected, len(weight)), key=lambda i: (-float(weight[i]) if size[i] > 0 else 1.0, i))
    rest = sorted(ranked[len(ranked) - count - contextual :], key=lambda i: (not size[i] > 0, i))
    real = max(contextual, sum(bool(size[i] > 0) for i in rest))
    targets = [rest[number * real // contextual] for number in range(contextual)]
    return {i: max(targets, key=lambda j: float(near[i, j]) if size[j] > 0 else -9.0) for i in rest if i not in targets}


@DRAWN
@given(st.integers(3, 20), st.integers(0, 3), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_the_least_seen_join_the_likest_at_even_steps(tokens: int, protected: int, count: int, contextual: int, seed: int) -> None:
    if count + contextual > tokens - protected:
        return
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(0, 4, (2, tokens), generator=generator).double()
    weight = torch.rand(2, tokens, generator=generator, dtype=torch.float64)
    joins = [in_context(weight[b], size[b], count, protected, metric[b], contextual) for b in range(2)]
    check_match(match_to_context(weight, size, count, protected, metric, contextual), tokens, joins, protected)
    ones = torch.ones(2, tokens, dtype=torch.float64)
    for one, other in zip(*(match_to_context(weight, s, count, protected, metric, contextual) for s in (None, ones)), strict=True):
        assert torch.equal(one, other)


def still(metric: Tensor, size: Tensor, count: int, protected: int, frames: int) -> dict[int, int]:
    """Each token that goes, and the last at its place before it that stays."""
    near, places = cosines(metric), (len(metric) - protected) // frames
    later = range(protected + places, len(metric))
    like = {i: torch.inf if size[i] == 0 else -torch.inf if size[i - places] == 0 else float(near[i, i - places]) for i in later}
    goes = set(sorted(later, key=lambda i: (-like[i], i))[:count])

    def stays(i: int) -> int:
        return stays(i - places) if i in goes else i

    return {i: stays(i) for i in goes}


@DRAWN
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2), st.integers(1, 20), st.integers(0, 10**6))
def test_what_stands_still_joins_the_last_that_stays(frames: int, places: int, protected: int, count: int, seed: int) -> None:
    tokens, count = protected + frames * places, min(count, (frames - 1) * places)
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(0, 4, (2, tokens), generator=generator).double()
    joins = [still(metric[b], size[b], count, protected, frames) for b in range(2)]
    match = match_to_frame_before(metric, size, count, protected, frames)
    check_match(match, tokens, joins, protected + places)
    _, new_size = merge_tokens(metric, *match, size)
    torch.testing.assert_close(new_size.sum(1), size.sum(1))


def test_ties_go_to_the_lowest_place() -> None:
    alike = torch.ones(1, 9, 4)
    assert match_to_context(alike[..., 0], None, 4, 1, alike, 2)[1].tolist() == [[4, 5, 7, 8]]  # 3 and 6 are the targets
    assert match_to_frame_before(alike, None, 3, 1, 4)[1].tolist() == [[3, 4, 5]]


def test_padding_goes_first_out_of_the_context() -> None:
    torch.manual_seed(0)
    metric, weight = torch.randn(3, 14, 5), torch.rand(3, 14)
    size = (torch.arange(14) < torch.tensor([[8], [8], [0]])).float()
    kept, source, _ = match_to_context(weight, size, 5, 1, metric, 1)
    assert (source[:2] >= 8).all()
    assert torch.equal(kept[:2, :8], torch.arange(8).expand(2, -1))


def test_places_among_others() -> None:
    assert places_among(torch.tensor([[0, 2], [1, 3]]), 2, 1, 4).tolist() == [[0, 1, 2, 4, 6], [0, 1, 3, 5, 6]]


def test_onnx() -> None:
    """Every op, exported by its definition, on a batch with padding."""

    def outputs(b: Builder, query: Node, key: Node, size: Node) -> tuple[Node, ...]:
        metric, weight = b.mean(key, [1]), b.received_weights(query, key, size, 0.5)
        context = b.match_to_context(weight, size, 6, 1, metric, 3)
        plain = b.match_to_context(weight, None, 6, 1, metric, 3)
        before = b.match_to_frame_before(metric, size, 6, 1, 4)
        indices = [b.item(match, number) for match in (context, plain, before) for number in range(3)]
        return (weight, *indices, b.places_among(indices[0], 2, 3, 17))

    shapes = {"query": (2, 2, 17, 4), "key": (2, 2, 17, 4), "size": (2, 17)}
    graph = build("choices", outputs, **{name: TensorType("f32", shape) for name, shape in shapes.items()})  # type: ignore[arg-type]
    torch.manual_seed(0)
    size = (torch.arange(17) < torch.tensor([[17], [11]])).float()
    check_onnx(to_onnx(graph), graph, (torch.randn(2, 2, 17, 4), torch.randn(2, 2, 17, 4), size), 1e-5)
