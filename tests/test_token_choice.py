"""The ops that choose which tokens go, against plain loops; merging to a length, dropping, and one row of attention."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.ir.builder import Builder, build
from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.token_choice import (
    ROUNDS,
    class_weights,
    match_by_diversity,
    match_by_energy,
    match_by_weight,
    rounds,
)
from paretorch.ir.ops.tokens import keep_tokens, log_size, match_tokens, merge_to_norm, merge_tokens, source_map
from paretorch.ir.types import TensorType

Match = tuple[Tensor, Tensor, Tensor]
DRAWN = settings(max_examples=25, deadline=None, derandomize=True)
draw = given(st.integers(3, 24), st.integers(0, 3), st.integers(1, 12), st.integers(0, 10**6))


def drawn(tokens: int, protected: int, count: int, seed: int) -> tuple[Tensor, Tensor, int]:
    """Metric, sizes of which some are 0, and a count that is legal."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    return metric, torch.randint(0, 4, (2, tokens), generator=generator).double(), max(0, min(count, (tokens - protected) // 2))


def check_match(match: Match, tokens: int, joins: list[dict[int, int]], protected: int) -> None:
    """The match says what the plain loops found: source -> the token it goes to, for each sample."""
    kept, source, target = match
    for b, wanted in enumerate(joins):
        stay = [token for token in range(tokens) if token not in wanted]
        assert kept[b].tolist() == stay
        assert stay[:protected] == list(range(protected))
        assert source[b].tolist() == sorted(wanted)
        assert [stay[row] for row in target[b].tolist()] == [wanted[token] for token in sorted(wanted)]
        assert source_map(*match)[b].tolist() == [stay.index(wanted.get(token, token)) for token in range(tokens)]


def by_energy(metric: Tensor, size: Tensor, count: int, protected: int, margin: float) -> dict[int, int] | None:
    """None where two energies are so near that rounding decides, such as those of the only two real tokens."""
    unit, free = F.normalize(metric, dim=-1), range(protected, len(metric))
    energy = {i: sum(float(F.elu(unit[i] @ unit[j] - margin)) for j in free if size[j] > 0) if size[i] > 0 else torch.inf for i in free}
    real = sorted(energy[i] for i in free if size[i] > 0)
    if any(above - below < 1e-9 for below, above in pairwise(real)):
        return None
    ranked = sorted(free, key=lambda i: (-energy[i], i))[: 2 * count]
    second = sorted(ranked[1::2])
    return {a: max(second, key=lambda b: (float(unit[a] @ unit[b]) if size[b] > 0 else -9.0, -b)) for a in ranked[0::2]}


@DRAWN
@draw
def test_energy_protects_what_stands_apart(tokens: int, protected: int, count: int, seed: int) -> None:
    metric, size, count = drawn(tokens, protected, count, seed)
    joins = [by_energy(metric[b], size[b], count, protected, 0.45) for b in range(2)] if count else [None]
    if None not in joins:
        check_match(match_by_energy(metric, size, count, protected, 0.45), tokens, joins, protected)  # type: ignore[arg-type]


def test_a_token_unlike_all_others_stays() -> None:
    torch.manual_seed(0)
    metric = torch.randn(1, 1, 8).repeat(1, 9, 1) + 0.1 * torch.randn(1, 9, 8)
    metric[:, 4] *= -1
    _, source, target = match_by_energy(metric, None, 4, 0, 0.5)
    assert 4 not in source[0].tolist()
    assert 4 - int((source[0] < 4).sum()) not in target[0].tolist()


@DRAWN
@draw
def test_weights_fuse_the_least_into_one(tokens: int, protected: int, count: int, seed: int) -> None:
    metric, size, count = drawn(tokens, protected, count, seed)
    if not count or count >= tokens - protected:
        return
    weight = metric[..., 0].softmax(-1)
    ranked = [sorted(range(protected, tokens), key=lambda i: (-float(weight[b, i]) if size[b, i] > 0 else 1.0, i)) for b in range(2)]
    joins = [dict.fromkeys(order[len(order) - count :], order[len(order) - count - 1]) for order in ranked]
    match = match_by_weight(weight, size, count, protected)
    check_match(match, tokens, joins, protected)
    merged, new_size = merge_tokens(metric, *match, size, weight * (size > 0))
    torch.testing.assert_close(new_size.sum(1), size.sum(1))
    for b in range(2):
        group = [next(iter(joins[b].values())), *joins[b]]
        share = (weight * (size > 0))[b, group]
        row = int(match[2][b, 0])
        if share.sum() > 0:
            torch.testing.assert_close(merged[b, row], (share[:, None] * metric[b, group]).sum(0) / share.sum())
        assert new_size[b, row] == size[b, group].sum()


def greedy(metric: Tensor, size: Tensor, keep: int, protected: int) -> list[int]:
    """Farthest point after farthest point; padding last, ties to the lowest place."""
    unit, free = F.normalize(metric, dim=-1), range(protected, len(metric))
    apart = {(i, j): 1 - float(unit[i] @ unit[j]) for i in free for j in free}
    real = [i for i in free if size[i] > 0]
    far = {i: min((apart[i, j] for j in real if j != i), default=torch.inf) if i in real else -1.0 for i in free}
    taken: list[int] = []
    while len(taken) < keep:
        best = max((i for i in free if i not in taken), key=lambda i: (far[i], -i))
        far = {i: -1.0 if i not in real else min(apart[best, i], far[i] if taken else torch.inf) for i in free}
        taken.append(best)
    return taken


@DRAWN
@draw
def test_diversity_is_farthest_point_after_farthest_point(tokens: int, protected: int, count: int, seed: int) -> None:
    metric, size, count = drawn(min(tokens, ROUNDS), protected, count, seed)
    tokens = metric.shape[1]
    if not count:
        return
    joins = []
    for b in range(2):
        stay = greedy(metric[b], size[b], tokens - protected - count, protected)
        unit, sizes = F.normalize(metric[b], dim=-1), size[b]
        nearest = {
            i: max(sorted(stay), key=lambda j: (float(unit[i] @ unit[j]) if sizes[j] > 0 else -2.0, -j))
            for i in range(protected, tokens)
            if i not in stay
        }
        joins.append(nearest)
    check_match(match_by_diversity(metric, size, count, protected), tokens, joins, protected)


def least_distance(metric: Tensor, places: list[int]) -> float:
    unit = F.normalize(metric[places], dim=-1)
    return float((1 - unit @ unit.T).fill_diagonal_(9.0).min())


def cover(metric: Tensor, places: list[int]) -> float:
    """How far the farthest token is from the nearest of these."""
    unit = F.normalize(metric, dim=-1)
    return float((1 - unit @ unit[places].T).min(1)[0].max())


@pytest.mark.parametrize("tokens", [60, 240])
def test_few_passes_spread_tokens_nearly_as_far_apart(tokens: int) -> None:
    """Clusters of near doubles, which a pass must not take together; against one token a pass."""
    generator = torch.Generator().manual_seed(0)
    centres = torch.randn(tokens // 4, 6, generator=generator, dtype=torch.float64)
    metric = centres.repeat_interleave(4, 0) + 1e-3 * torch.randn(tokens, 6, generator=generator, dtype=torch.float64)
    keep = tokens // 5
    kept = match_by_diversity(metric[None], None, tokens - keep, 0)[0][0].tolist()
    assert len({place // 4 for place in kept}) >= 0.9 * keep  # chance would give 0.6
    assert cover(metric, kept) <= 1.5 * cover(metric, greedy(metric, torch.ones(tokens), keep, 0))


@pytest.mark.parametrize("tokens", [1, 2, 15, 16, 17, 100, 1500])
def test_rounds_take_all(tokens: int) -> None:
    taken = rounds(tokens)
    assert sum(taken) == tokens
    assert taken[0] == 1
    assert len(taken) <= ROUNDS
    assert taken == [1] * tokens or tokens > ROUNDS


MATCHES = {
    "match_tokens": lambda metric, size, count, protected: match_tokens(metric, size, count, protected),
    "match_by_energy": lambda metric, size, count, protected: match_by_energy(metric, size, count, protected, 0.5),
    "match_by_diversity": match_by_diversity,
    "match_by_weight": lambda metric, size, count, protected: match_by_weight(metric[..., 0].sigmoid(), size, count, protected),
}
TIED_OF_MANY = {
    "match_tokens": [*range(1, 15, 2)], "match_by_energy": [*range(1, 15, 2)], "match_by_diversity": [*range(34, 41)],
    "match_by_weight": [*range(34, 41)],
}  # fmt: skip
TIED = {"match_tokens": [[1, 3]], "match_by_energy": [[1, 3]], "match_by_diversity": [[7, 8]], "match_by_weight": [[7, 8]]}


@pytest.mark.parametrize("name", MATCHES)
def test_ties_go_to_the_lowest_place(name: str) -> None:
    kept, source, _ = MATCHES[name](torch.ones(1, 9, 4), None, 2, 1)
    assert source.tolist() == TIED[name]
    assert kept.tolist() == [[place for place in range(9) if place not in TIED[name][0]]]
    assert MATCHES[name](torch.ones(1, 41, 4), None, 7, 1)[1][0].tolist() == TIED_OF_MANY[name]


@pytest.mark.parametrize("name", MATCHES)
def test_padding_goes_first(name: str) -> None:
    torch.manual_seed(0)
    metric = torch.randn(3, 14, 5)
    size = (torch.arange(14) < torch.tensor([[8], [8], [0]])).float()
    _, source, _ = MATCHES[name](metric, size, 3, 1)
    assert (source[:2] >= 8).all()
    other = torch.where(size[..., None] > 0, metric, torch.randn(3, 14, 5))
    kept, _, _ = MATCHES[name](other, size, 4, 1)
    assert torch.equal(kept[:2, :8], MATCHES[name](metric, size, 4, 1)[0][:2, :8])  # whatever stands in it
    assert torch.equal(kept[:2, :8], torch.arange(8).expand(2, -1)) or name in (
        "match_tokens",
        "match_by_energy",
    )  # which need some in both halves


def test_merged_rows_are_as_long_as_the_longest() -> None:
    torch.manual_seed(0)
    x, size = torch.randn(2, 10, 6, dtype=torch.float64), torch.ones(2, 10, dtype=torch.float64)
    size[:, 3] = 0.0
    match = match_tokens(x, size, 4, 1)
    plain, new_size = merge_tokens(x, *match, size)
    scaled, same_size = merge_to_norm(x, *match, size)
    assert torch.equal(new_size, same_size)
    places = source_map(*match)
    for b in range(2):
        for row in range(6):
            group = [token for token in range(10) if places[b, token] == row]
            if len(group) == 1:
                assert torch.equal(scaled[b, row], x[b, group[0]])
                continue
            longest = max(float(x[b, token].norm()) for token in group if size[b, token] > 0)
            torch.testing.assert_close(float(scaled[b, row].norm()), longest)
            torch.testing.assert_close(F.normalize(scaled[b, row], dim=0), F.normalize(plain[b, row], dim=0))


def test_dropped_tokens_take_their_sizes_along() -> None:
    x, size, kept = torch.randn(2, 6, 3), torch.arange(6.0)[None], torch.tensor([[0, 2, 5], [1, 2, 3]])
    rows, sizes = keep_tokens(x, kept, size)
    assert torch.equal(rows[1], x[1, 1:4])
    assert sizes.tolist() == [[0, 2, 5], [1, 2, 3]]
    assert keep_tokens(x, kept)[1].tolist() == [[1, 1, 1]] * 2


@pytest.mark.parametrize(("kv_heads", "softcap"), [(4, 0.0), (2, 0.0), (1, 3.0)])
def test_class_weights_are_a_row_of_attention(kv_heads: int, softcap: float) -> None:
    query, key = torch.randn(2, 4, 7, 6, dtype=torch.float64), torch.randn(2, kv_heads, 7, 6, dtype=torch.float64)
    size = torch.randint(0, 3, (2, 7)).double()
    size[:, 0] = 1.0
    value = torch.eye(7, dtype=torch.float64).expand(2, kv_heads, 7, 7)
    probabilities = attention(query, key, value, None, log_size(size), scale=0.4, softcap=softcap)
    wanted = probabilities[:, :, [0, 2]].mean((1, 2))
    torch.testing.assert_close(class_weights(query, key, size, [0, 2], 0.4, softcap), wanted)


def test_onnx() -> None:
    """Every new op, exported by its definition, on a batch with padding."""

    def outputs(b: Builder, query: object, key: object, x: object, size: object) -> tuple[object, ...]:
        metric = b.mean(key, [1])
        weight = b.class_weights(query, key, size, [0], 0.5)
        energy, diverse = b.match_by_energy(metric, size, 4, 1, 0.5), b.match_by_diversity(metric, size, 4, 1)
        least = b.match_by_weight(weight, size, 4, 1)
        indices = [[b.item(match, number) for number in range(3)] for match in (energy, diverse, least)]
        made = [b.merge_to_norm(x, *indices[0], size), b.keep_tokens(x, indices[1][0], size), b.merge_tokens(x, *indices[2], size, weight)]
        return (weight, *(place for match in indices for place in match), *(b.item(node, number) for node in made for number in range(2)))

    shapes = {"query": (2, 2, 33, 4), "key": (2, 2, 33, 4), "x": (2, 33, 6), "size": (2, 33)}
    graph = build("choices", outputs, **{name: TensorType("f32", shape) for name, shape in shapes.items()})  # type: ignore[arg-type]
    torch.manual_seed(0)
    size = (torch.arange(33) < torch.tensor([[33], [20]])).float()
    check_onnx(to_onnx(graph), graph, (torch.randn(2, 2, 33, 4), torch.randn(2, 2, 33, 4), torch.randn(2, 33, 6), size), 1e-5)
