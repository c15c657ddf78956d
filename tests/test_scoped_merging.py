"""Merging for one sublayer (tomesd, toma): what the rules promise, where they are refused, and their ops against plain loops."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.ir.ops.scoped import assign_tokens, match_to_places, merge_by_map, unmerge_by_map
from paretorch.ir.ops.tokens import merge_tokens, source_map
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Rule
from paretorch.rewrites.token_merging import toma, tome, tomesd
from paretorch.rewrites.token_merging.grid import Grid, grid_of
from tests.test_dense_outputs import EXACT, Biased, Padded, Turned, count, graph_of
from tests.zoo import Block, make

RULES = (tomesd.RULE, toma.RULE)
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def merged(rule: Rule, graph: Graph, ratio: float = 0.5, hard: bool = False) -> Graph:
    """The rule at every site. hard: with the map's softmax at a temperature of nearly 0."""
    sites, _ = sites_of(rule, graph)
    for site in sites:
        graph = apply_choice(rule, graph, site.name, ratio)
    for node in graph.calls:
        if hard and is_op(node, "assign_tokens"):
            node.args = (*node.args[:-1], 1e-4)
    return graph


def four_equal(batch: int = 2, groups: int = 4, width: int = 8) -> Tensor:
    """Tokens that are equal in fours, as the cells of a line."""
    x = torch.randn(batch, groups, width, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.repeat_interleave(4, 1)


class Blocks(nn.Module):
    """x: [B, T, C] through blocks; all tokens come out."""

    def __init__(self, depth: int = 2, **block: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block(8, 2, **block) for _ in range(depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


# contracts


@every_rule
@pytest.mark.parametrize("layout", ["pre", "post", "parallel"])
def test_equal_tokens_merge_exactly_and_need_their_sizes(rule: Rule, layout: str) -> None:
    x = four_equal()
    x[:, 1:4] = x[:, 4:5]  # groups of one, seven, four and four
    graph = graph_of(Blocks(layout=layout), (x,))
    after = merged(rule, graph, 0.5, hard=True)
    assert count(after, "unmerge_tokens") + count(after, "unmerge_by_map") == 4
    torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)
    for node in after.calls:
        if is_op(node, "attention"):
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "key_bias"}
    assert (after.run(x)[0] - graph.run(x)[0]).abs().max() > 1e-6


@every_rule
def test_rows_of_a_batch_do_not_meet(rule: Rule) -> None:
    size = torch.export.Dim("batch", min=1, max=64)
    x = torch.randn(7, 13, 8, dtype=torch.float64)
    graph = merged(rule, graph_of(Blocks(), (x[:3],), ({0: size},)))
    together = graph.run(x)[0]
    for row in (0, 6):
        torch.testing.assert_close(graph.run(x[row : row + 1])[0][0], together[row], **EXACT)


@every_rule
def test_what_padding_holds_changes_nothing(rule: Rule) -> None:
    x, seen = torch.randn(3, 12, 8, dtype=torch.float64), (torch.arange(12) < torch.tensor([[12], [8], [5]])).long()
    graph = merged(rule, graph_of(Padded(), (x, seen)))
    other = torch.where(seen[..., None] == 1, x, x + 3)
    for one, two in zip(graph.run(x, seen), graph.run(other, seen), strict=True):
        real = seen.bool() if one.dim() == 3 else slice(None)
        torch.testing.assert_close(one[real], two[real], **EXACT)
    assert all(torch.isfinite(value).all() for value in graph.run(x, seen)[1:])
    assert torch.isfinite(merged(rule, graph).run(x, seen * 0)[0]).all()


@every_rule
@pytest.mark.parametrize("name", ["vit_registers", "bert"])
def test_models_of_the_zoo(rule: Rule, name: str) -> None:
    model, inputs = make(name, T=14)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    graph = graph_of(model, inputs)
    sites, _ = sites_of(rule, graph)
    assert len(sites) == 4
    after = merged(rule, graph)
    pairs = list(zip(graph.run(*inputs), after.run(*inputs), strict=True))
    assert all(old.shape == new.shape for old, new in pairs)
    assert 0 < max(float((old - new).norm() / old.norm()) for old, new in pairs) < 0.9
    backward = graph
    for site in sites[::-1]:
        backward = apply_choice(rule, backward, site.name, 0.5)
    for old, new in zip(after.run(*inputs), backward.run(*inputs), strict=True):
        torch.testing.assert_close(old, new, **EXACT)


class BiasedAndPadded(Biased):
    """Its mask says for each pair of places what it adds to a score, and hides padding."""

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        mask = self.bias + (1.0 - seen[:, None, None, :].to(x.dtype)) * -1e30
        for block in self.blocks:
            x = block(x, mask)
        return x


@every_rule
def test_masks_for_pairs_of_places_tell_no_sizes(rule: Rule) -> None:
    x = four_equal()[:, :13]
    graph = graph_of(Biased(), (x,))
    after = merged(rule, graph, 0.5, hard=True)
    assert count(after, "merge_tokens") + count(after, "merge_by_map") == 3  # not the attention that has the bias
    assert count(after, "exp") == 0
    assert torch.isfinite(after.run(x)[0]).all()


@every_rule
def test_masks_for_pairs_of_places_still_tell_padding(rule: Rule) -> None:
    """Beside the attention that has the mask, a feed-forward is merged, and padding stands for nothing in it."""
    x, seen = four_equal()[:, :13].clone(), torch.ones(2, 13)
    seen[:, 9:] = 0
    graph = graph_of(BiasedAndPadded(), (x, seen))
    found, refusals = sites_of(rule, graph)
    assert found
    assert all("says something about pairs of places" in refusal.reason for refusal in refusals)
    after = merged(rule, graph, 0.5, hard=True)
    other = x.clone()
    other[:, 9:] = torch.randn(2, 4, x.shape[-1], dtype=x.dtype)
    torch.testing.assert_close(after.run(x, seen)[0][:, :9], after.run(other, seen)[0][:, :9], **EXACT)
    assert not torch.equal(after.run(x, seen)[0][:, 9:], after.run(other, seen)[0][:, 9:])


def test_one_map_serves_three_layers() -> None:
    model = nn.Sequential(*(Block(8, 2) for _ in range(4)))
    after = merged(toma.RULE, graph_of(model, (torch.randn(2, 16, 8, dtype=torch.float64),)))
    assert count(after, "assign_tokens") == 2
    assert count(after, "merge_by_map") == 8


def test_sites_with_positions_keep_their_feed_forward() -> None:
    """Attention that adds positions to queries is no function of its own tokens; the feed-forward is."""
    graph = graph_of(Turned(True), (torch.randn(2, 13, 8, dtype=torch.float64),))
    for rule in RULES:
        sites, refusals = sites_of(rule, graph)
        assert len(sites) == len(refusals) == 3
        assert all("combines the axis with a constant of shape [13, 8]" in refusal.reason for refusal in refusals)


@every_rule
def test_refused_with_a_sentence(rule: Rule) -> None:
    for name, sentence in (("gpt", "hides later tokens"), ("swin", "no axis that attention mixes is one dimension")):
        sites, refusals = sites_of(rule, graph_of(*_doubled(*make(name, T=8))))
        assert not sites
        assert sentence in refusals[0].reason
    graph = rule.example()
    with pytest.raises(PlanError, match="no sublayer ends in nothing"):
        apply_choice(rule, graph, "nothing", 0.5)


def _doubled(model: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[nn.Module, tuple[Tensor, ...]]:
    return model.double(), tuple(x.double() if x.is_floating_point() else x for x in inputs)


# grids


class Patches(nn.Module):
    """Patches of a 4 x 6 grid, with or without a class token in front."""

    def __init__(self, special: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.patch, self.block = nn.Conv2d(3, 8, 2, stride=2), Block(8, 2)
        self.special, self.position = nn.Parameter(torch.randn(1, special, 8)) if special else None, nn.Parameter(torch.randn(24, 8))

    def forward(self, images: Tensor) -> Tensor:
        x = self.patch(images).flatten(2).transpose(1, 2) + self.position
        if self.special is not None:
            x = torch.cat([self.special.expand(x.shape[0], -1, -1), x], 1)
        return self.block(x)


@pytest.mark.parametrize("special", [0, 1])
def test_destinations_stand_on_the_grid(special: int) -> None:
    graph = graph_of(Patches(special), (torch.randn(2, 3, 8, 12, dtype=torch.float64),))
    facts = analyze(graph)
    assert grid_of(graph, facts.axes, facts.axes.tokens[0]) == Grid(special, 4, 6)
    site = sites_of(tomesd.RULE, graph)[0][0]
    after = apply_choice(tomesd.RULE, graph, site.name, 0.75)
    constants = {name: tensor.tolist() for name, tensor in after.constants.items() if name in ("destinations", "sources")}
    assert constants["destinations"] == [special + token for token in (0, 2, 4, 12, 14, 16)]
    assert len(constants["sources"]) == 18
    windows = apply_choice(toma.RULE, graph, site.name, 0.5).constants["windows"] - special
    tiles = [{(int(token) % 6 // 4, int(token) // 6) for token in window if token >= 0} for window in windows]
    assert [len({column for column, _ in tile}) for tile in tiles] == [1, 2]  # the first half lies in one tile


# ops


def test_matching_to_places_by_hand() -> None:
    torch.manual_seed(0)
    metric, x = torch.randn(2, 11, 5, dtype=torch.float64), torch.randn(2, 11, 3, dtype=torch.float64)
    size = torch.randint(0, 3, (2, 11)).double()
    to, away = torch.tensor([1, 5, 9]), torch.tensor([2, 3, 4, 6, 7, 8, 10])
    kept, source, target = match_to_places(metric, size, to, away, 4)
    _, sizes = merge_tokens(x, kept, source, target, size)
    places = source_map(kept, source, target)
    unit = F.normalize(metric, dim=-1)
    for b in range(2):
        edges = []
        for token in away.tolist():
            cosines = [float(unit[b, token] @ unit[b, other]) if size[b, other] > 0 else -2.0 for other in to.tolist()]
            best = max(range(3), key=lambda i: (cosines[i], -i))
            edges.append((2.0 if size[b, token] == 0 else cosines[best], token, int(to[best])))
        edges.sort(key=lambda edge: (-edge[0], edge[1]))
        joins = {token: other for _, token, other in edges[:4]}
        stay = [token for token in range(11) if token not in joins]
        assert kept[b].tolist() == stay
        assert places[b].tolist() == [stay.index(joins.get(token, token)) for token in range(11)]
    torch.testing.assert_close(sizes.sum(1), size.sum(1))


def facilities(cosine: Tensor, weight: Tensor, n: int) -> list[int]:
    chosen: list[int] = []
    for _ in range(n):
        covered = cosine[chosen].amax(0) if chosen else torch.full_like(weight, -1.0)
        gains = [(float(((cosine[i] - covered).clamp_min(0) * weight).sum()) if weight[i] > 0 else -1.0, -i) for i in range(len(weight))]
        chosen.append(-max(gain for gain in gains if -gain[1] not in chosen)[1])
    return chosen


def test_maps_by_hand() -> None:
    torch.manual_seed(0)
    metric, x = torch.randn(2, 12, 5, dtype=torch.float64), torch.randn(2, 12, 3, dtype=torch.float64)
    size = torch.ones(2, 12, dtype=torch.float64).index_fill(1, torch.tensor([4]), 0.0)
    windows = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 11]])
    shares = assign_tokens(metric, size, windows, 2, 1, 0.2)
    assert shares.shape == (2, 5, 12)
    torch.testing.assert_close(shares.sum(1), torch.ones(2, 12, dtype=torch.float64))
    unit = F.normalize(metric, dim=-1)
    rows, sizes = merge_by_map(x, shares, size)
    for b in range(2):
        places = [0]
        for window in ([1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11]):
            near = unit[b, window]
            places += [window[i] for i in facilities(near @ near.T, size[b, window], 2)]
        share = torch.zeros(5, 12, dtype=torch.float64)
        share[0, 0] = 1.0
        share[1:, 1:] = (unit[b, places[1:]] @ unit[b, 1:].T / 0.2).softmax(0)
        torch.testing.assert_close(shares[b], share)
        torch.testing.assert_close(sizes[b], share @ size[b])
        torch.testing.assert_close(rows[b], (share * size[b]) @ x[b] / sizes[b][:, None])
        torch.testing.assert_close(unmerge_by_map(rows, shares)[b], share.T @ rows[b])


@pytest.mark.parametrize("rule", [*RULES, tome.RULE], ids=lambda rule: rule.name)
def test_onnx_agrees(rule: Rule) -> None:
    """Also of tokens that a progressive merge brings back."""
    size = torch.export.Dim("batch", min=1, max=64)
    graph = normalize(capture(Blocks(1).eval(), (torch.randn(3, 13, 8),), ({0: size},)).graph)
    after = merged(rule, graph, 4 if rule is tome.RULE else 0.5)
    model = to_onnx(after)
    for batch in (1, 4):
        assert check_onnx(model, after, (torch.randn(batch, 13, 8),), 1e-4) <= 1e-4


@every_rule
def test_golden(rule: Rule, golden: Callable[[str], None]) -> None:
    before = rule.example()
    site = sites_of(rule, before)[0]
    after = before
    for one in site:
        after = apply_choice(rule, after, one.name, 0.5)
    golden(f"{before}\n# {rule.name} 0.5 at {', '.join(one.name for one in site)}\n{after}")
