"""The ops on tokens and local attention, against plain loops."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.local_attention import local_attention
from paretorch.ir.ops.tokens import log_size, match_tokens, merge_tokens, source_map, weigh_tokens


def merged_by_hand(metric: Tensor, size: Tensor, count: int, protected: int) -> dict[int, int]:
    """Who joins whom in one sample: source -> partner. Padding goes first, then the largest cosine; ties to the lowest place."""
    unit = F.normalize(metric.double(), dim=-1)
    partners = range(protected + 1, len(metric), 2)
    edges = []
    for source in range(protected, len(metric), 2):
        cosines = [float(unit[source] @ unit[partner]) if size[partner] > 0 else -2.0 for partner in partners]
        best = max(range(len(cosines)), key=lambda i: (cosines[i], -i))
        edges.append((2.0 if size[source] == 0 else cosines[best], source, partners[best]))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    return {source: partner for _, source, partner in edges[:count]}


@settings(max_examples=40, deadline=None)
@given(st.integers(2, 20), st.integers(0, 3), st.integers(1, 10), st.integers(0, 10**6))
def test_merging_is_bipartite_soft_matching(tokens: int, protected: int, count: int, seed: int) -> None:
    count = min(count, (tokens - protected) // 2)
    if count < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(0, 3, (2, tokens), generator=generator).double()
    x = torch.randn(2, tokens, 7, generator=generator, dtype=torch.float64)
    kept, source, target = match_tokens(metric, size, count, protected)
    merged, new_size = merge_tokens(x, kept, source, target, size)
    places = source_map(kept, source, target)
    for b in range(2):
        joins = merged_by_hand(metric[b], size[b], count, protected)
        stay = [token for token in range(tokens) if token not in joins]
        assert kept[b].tolist() == stay
        assert stay[:protected] == list(range(protected))
        assert places[b].tolist() == [stay.index(joins.get(token, token)) for token in range(tokens)]
        for row in range(len(stay)):
            group = [token for token in range(tokens) if places[b, token] == row]
            weight = size[b, group]
            torch.testing.assert_close(new_size[b, row], weight.sum())
            if len(group) == 1:
                assert torch.equal(merged[b, row], x[b, group[0]])  # to the bit
            elif weight.sum() > 0:
                torch.testing.assert_close(merged[b, row], (weight[:, None] * x[b, group]).sum(0) / weight.sum())
    assert torch.isfinite(merged).all()


def test_ties_go_to_the_lowest_place() -> None:
    kept, source, target = match_tokens(torch.ones(1, 9, 4), None, 2, 1)
    assert source.tolist() == [[1, 3]]
    assert target.tolist() == [[1, 1]]
    assert kept.tolist() == [[0, 2, 4, 5, 6, 7, 8]]


def test_padding_pulls_nothing_and_goes_first() -> None:
    torch.manual_seed(0)
    metric, x, size = torch.randn(1, 8, 4), torch.randn(1, 8, 3), torch.tensor([[1.0, 1, 1, 1, 1, 0, 0, 0]])
    kept, source, target = match_tokens(metric, size, 2, 0)
    assert source[0, -1] == 6  # the only padding that may join another
    merged, new_size = merge_tokens(x, kept, source, target, size)
    swapped = x.clone()
    swapped[:, 5:] = 100.0
    assert torch.equal(merge_tokens(swapped, kept, source, target, size)[0][new_size > 0], merged[new_size > 0])


def test_nothing_but_padding_stays_finite() -> None:
    size = torch.zeros(1, 6)
    match = match_tokens(torch.randn(1, 6, 4), size, 2, 0)
    merged, new_size = merge_tokens(torch.randn(1, 6, 3), *match, size)
    assert torch.isfinite(merged).all()
    assert torch.isfinite(log_size(new_size)).all()


def test_composed_maps_reconstruct_every_index() -> None:
    torch.manual_seed(0)
    x = torch.randn(3, 21, 6, dtype=torch.float64)
    total, places, size = x, None, None
    for count in (6, 4, 2):
        match = match_tokens(total, size, count, 1)
        places = source_map(*match, places)
        total, size = merge_tokens(total, *match, size)
    assert places is not None
    assert size is not None
    assert places.shape == (3, 21)
    assert size.sum() == 63
    for b in range(3):
        groups = [(places[b] == row).nonzero()[:, 0] for row in range(9)]
        torch.testing.assert_close(total[b], torch.stack([x[b, group].mean(0) for group in groups]))
        assert [len(group) for group in groups] == size[b].tolist()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(2, 9, 4).to(dtype)
    merged, size = merge_tokens(x, *match_tokens(x, None, 3, 1))
    assert merged.dtype == dtype
    assert size.dtype == torch.promote_types(dtype, torch.float32)


@pytest.mark.parametrize(
    ("shape", "token", "batch"), [((2, 5, 3), 1, [0]), ((5, 2, 3), 0, [1]), ((2, 3, 4, 5), 3, [1, 0]), ((5, 3), 0, [])]
)
def test_weighing_in_any_layout(shape: tuple[int, ...], token: int, batch: list[int]) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    rows = torch.Size([shape[dim] for dim in batch]).numel()
    size = torch.randint(1, 4, (rows, 5)).double()
    order = [*batch, token, *(dim for dim in range(len(shape)) if dim != token and dim not in batch)]
    flat = x.permute(order).reshape(rows, 5, -1)
    mean = weigh_tokens(x, size, token, batch, True).permute(order).reshape(rows, 5, -1).mean(1)
    torch.testing.assert_close(mean, (flat * size[..., None]).sum(1) / size.sum(1, keepdim=True))
    total = weigh_tokens(x, size, token, batch, False).permute(order).reshape(rows, 5, -1).sum(1)
    torch.testing.assert_close(total, (flat * size[..., None]).sum(1))


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 30), st.integers(0, 40), st.sampled_from([0, 1, 3, 40]), st.integers(0, 6), st.integers(1, 9), st.sampled_from([1, 2]),
    st.sampled_from(["none", "bias", "padding"]), st.sampled_from([0.0, 3.0]),
)  # fmt: skip
def test_local_attention_is_attention(
    tokens: int, left: int, right: int, sinks: int, block: int, group: int, bias: str, softcap: float
) -> None:
    query = torch.randn(2, 4, tokens, 6, dtype=torch.float64)
    key, value = (torch.randn(2, 4 // group, tokens, width, dtype=torch.float64) for width in (6, 3))
    key_bias = None if bias == "none" else torch.randn(2, tokens, dtype=torch.float64)
    if bias == "padding":
        key_bias = torch.zeros(2, tokens, dtype=torch.float64).masked_fill(torch.arange(tokens) >= tokens // 2, float("-inf"))
    wanted = attention(query, key, value, None, key_bias, scale=0.3, left=left, right=right, sinks=sinks, softcap=softcap)
    found = local_attention(query, key, value, key_bias, scale=0.3, left=left, right=right, sinks=sinks, block=block, softcap=softcap)
    torch.testing.assert_close(found, wanted, rtol=0, atol=1e-9)


def test_a_window_of_all_tokens_is_dense() -> None:
    query, key, value = (torch.randn(2, 2, 11, 4, dtype=torch.float64) for _ in range(3))
    dense = attention(query, key, value, scale=0.5)
    torch.testing.assert_close(local_attention(query, key, value, scale=0.5, left=10, right=10, block=4), dense, rtol=0, atol=1e-12)
    causal = attention(query, key, value, scale=0.5, right=0)
    torch.testing.assert_close(local_attention(query, key, value, scale=0.5, left=10, right=0, block=4), causal, rtol=0, atol=1e-12)
