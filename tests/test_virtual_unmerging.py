"""Attention that reads places, on merged tokens: it runs on all of them, and its results are brought down to the merged rows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import lowered_by
from paretorch.ir.verify import verify
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.normalize import normalize
from tests.zoo import Block

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
TOKENS, PAIRS = 9, 4  # the first token is read by place; those behind it are equal in pairs
KINDS = ("turned", "biased", "near", "added")
RULES = {"tome": PAIRS, "pitome": 0.5, "tofu": 0.5, "dymu": "0.5 above 0.9999"}  # what takes four of eight


class Placed(nn.Module):
    """Blocks whose attention reads places, from the block `first` on: turns queries and keys by them, adds a bias by distance to scores, sees a
    window, or adds a table to what is projected.

    places: of each token; read: what of the tokens [B, T, C] is returned; seen: i64[B, T] hides keys; averaged: average the results of
    attention over the equal pairs, in all blocks but the first.
    """

    def __init__(
        self, kind: str, depth: int = 2, first: int = 1, read: Callable[[Tensor], Any] = lambda x: x[:, 0], places: Tensor | None = None,
        averaged: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.kind, self.first, self.read, self.averaged = (
            nn.ModuleList(Block(8, 2) for _ in range(depth)),
            kind,
            first,
            read,
            averaged,
        )
        self.packed = nn.ModuleList(nn.Linear(8, 24) for _ in range(depth))
        places = torch.arange(TOKENS) if places is None else places
        angles, apart = places[:, None] * torch.tensor([0.7, 0.3]), (places[:, None] - places).abs()
        self.register_buffer("cos", angles.cos().repeat(1, 2))
        self.register_buffer("sin", angles.sin().repeat(1, 2))
        self.register_buffer("bias", torch.randn(2, TOKENS)[:, apart])
        self.register_buffer("near", apart <= 3)
        self.register_buffer("table", torch.randn(TOKENS, 2, 4)[places].transpose(0, 1).contiguous())

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Any:
        for number, block in enumerate(self.blocks):
            mixed = self.attend(block.norms[0](x), number, seen)
            x = x + block.mix.project(means_of_pairs(mixed) if self.averaged and number else mixed)
            x = x + block.feed(block.norms[1](x))
        return self.read(x)

    def attend(self, y: Tensor, number: int, seen: Tensor | None) -> Tensor:
        query, key, value = self.packed[number](y).unflatten(-1, (3, 2, 4)).permute(2, 0, 3, 1, 4)
        kind = self.kind if number >= self.first else ""
        mask = self.bias if kind == "biased" else self.near if kind == "near" else None
        if kind == "turned":
            query, key = (t * self.cos + torch.cat([-t[..., 2:], t[..., :2]], -1) * self.sin for t in (query, key))
        if kind == "added":
            query, key = query + self.table, key + self.table
        if seen is not None:
            hidden = torch.where(seen[:, None, None, :] > 0, 0.0, -1e30).to(y.dtype)
            mask = hidden if mask is None else mask + hidden
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask).transpose(1, 2).flatten(2)


def means_of_pairs(x: Tensor) -> Tensor:
    return torch.cat([x[:, :1], x[:, 1:].unflatten(1, (PAIRS, 2)).mean(2).repeat_interleave(2, 1)], 1)


def rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """All tokens, and one by its place, which stays."""
    return x, x[:, 0]


def equal_pairs(batch: int = 2) -> Tensor:
    return means_of_pairs(torch.randn(batch, TOKENS, 8, generator=torch.Generator().manual_seed(3), dtype=torch.float64))


def graph_of(model: nn.Module, *inputs: Tensor, any_batch: bool = False) -> Graph:
    batch = torch.export.Dim("batch", min=1, max=64)
    return normalize(capture(model.double().eval(), inputs, tuple({0: batch} for _ in inputs) if any_batch else None).graph)


def merged(graph: Graph, *sites: str, rule: str = "tome", knob: Any = PAIRS) -> Graph:
    for site in sites:
        graph = apply_choice(rules_named([rule])[0], graph, site, knob)
        verify(graph, rule)
    return graph


def mixers(graph: Graph) -> list[str]:
    return [node.name for node in graph.calls if is_op(node, "attention")]


def of_length(graph: Graph, *names: str) -> list[Any]:
    """How many rows each of these ops makes."""
    return [tensor_type(node).shape[-2] for node in graph.calls if is_op(node, *names)]


def with_wrong_map(graph: Graph) -> Graph:
    """A broken twin: copies get the places of other tokens."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "unmerge_tokens"):
            with graph.fx.inserting_before(node):
                moved = graph.fx.call_function(torch.ops.aten.roll.default, (node.args[1], [1], [1]))
            node.args = (node.args[0], moved)
    return graph


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("kind", KINDS)
def test_equal_tokens_merge_exactly(kind: str, rule: str) -> None:
    """A token alone in its row gets what it got; a merged row the average of what its tokens got."""
    x = equal_pairs()
    graph = graph_of(Placed(kind), x)
    after = merged(graph, "attention", rule=rule, knob=RULES[rule])
    assert of_length(after, "attention") == [TOKENS, TOKENS]
    assert (
        of_length(after, "linear")[2:7] == [TOKENS - PAIRS] * 5
    )  # feed-forward, the packed projection, the one behind attention, feed-forward
    assert sum(is_op(node, "unmerge_tokens") for node in after.calls) == 1
    torch.testing.assert_close(after.run(x), graph.run(x), **EXACT)
    assert (with_wrong_map(after).run(x)[0] - graph.run(x)[0]).abs().max() > 1e-6
    deep = graph_of(Placed(kind, 3, read=rows), x)
    twin = Placed(kind, 3, read=rows, averaged=True).double()
    with torch.no_grad():
        torch.testing.assert_close(merged(deep, "attention", rule=rule, knob=RULES[rule]).run(x), twin(x), **EXACT)


@pytest.mark.parametrize("kind", ["turned", "biased", "added"])
def test_equal_tokens_at_equal_places_merge_exactly(kind: str) -> None:
    places = torch.cat([torch.zeros(1), torch.arange(1, 5).repeat_interleave(2)]).long()
    x, model = equal_pairs(), Placed(kind, 3, 0, rows, places)
    graph = graph_of(model, x)
    after = merged(graph, "attention")
    torch.testing.assert_close(after.run(x), graph.run(x), **EXACT)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_steps_does_not_matter(kind: str) -> None:
    x = torch.randn(3, TOKENS, 8, dtype=torch.float64)
    graph = graph_of(Placed(kind, 3, 0, lambda x: (x, x[:, 0], x.mean(1))), x)
    first, second, third = mixers(graph)
    forward, backward, mixed = (
        merged(graph, *sites, knob=2) for sites in ((first, second, third), (third, second, first), (second, third, first))
    )
    assert max(of_length(forward, "attention")) == min(of_length(forward, "attention")) == TOKENS
    assert of_length(forward, "linear")[-2:] == [TOKENS - 6] * 2
    for one, *others in zip(forward.run(x), backward.run(x), mixed.run(x), strict=True):
        for other in others:
            torch.testing.assert_close(one, other, **EXACT)
    tokens = forward.run(x)[0]
    assert [len(sample.unique(dim=0)) for sample in tokens] == [TOKENS - 6] * 3


@pytest.mark.parametrize("kind", ["turned", "biased"])
def test_padding_and_batches(kind: str) -> None:
    x, seen = torch.randn(4, TOKENS, 8, dtype=torch.float64), (torch.arange(TOKENS) < torch.tensor([[9], [6], [7], [3]])).long()
    graph = graph_of(Placed(kind, 3, 0, lambda x: (x, x[:, 0])), x, seen, any_batch=True)
    assert len(sites_of(rules_named(["tome"])[0], graph)[0]) == 3
    after = merged(graph, "attention", "attention_1", knob=3)
    together = after.run(x, seen)
    other = after.run(torch.where(seen[..., None] > 0, x, x + 3), seen)
    for one, two in zip(together, other, strict=True):
        torch.testing.assert_close(one[:, 0], two[:, 0], **EXACT)
    torch.testing.assert_close(together[0][seen > 0], other[0][seen > 0], **EXACT)
    for row in range(4):
        torch.testing.assert_close(after.run(x[row : row + 1], seen[row : row + 1])[1][0], together[1][row], **EXACT)
    torch.testing.assert_close(after.run(x, seen)[1][3], graph.run(x, seen)[1][3], **EXACT)  # six paddings: they go first
    assert after.run(x.repeat(2, 1, 1)[:7], seen.repeat(2, 1)[:7])[0].shape == (7, TOKENS, 8)
    assert torch.isfinite(after.run(x, seen * 0)[0]).all()


def test_later_steps_belong_to_the_merged_rows() -> None:
    graph = graph_of(Placed("turned", 3, 0), equal_pairs())
    after = merged(graph, "attention")
    facts = analyze(after).axes
    assert {axis.atom.size: axis.mixers for axis in facts.tokens} == {9: ("attention",), 5: ("attention_1", "attention_2")}
    assert [len(lowered_by(node)) for node in after.calls if is_op(node, "attention")] == [0, 1, 1]
    assert {site.name for site in sites_of(rules_named(["pitome"])[0], after)[0]} == {"attention_1", "attention_2"}
    for rule in ("evit", "visionzip"):
        with pytest.raises(PlanError, match="runs on all tokens, copies of merged ones among them"):
            merged(after, "attention_1", rule=rule, knob=0.16)


def test_around_one_sublayer_only_what_brings_nothing_back() -> None:
    after = merged(graph_of(Placed("turned", 3, 0), equal_pairs()), "attention")
    found, refusals = sites_of(rules_named(["tomesd"])[0], after)
    assert found
    assert any("brings tokens back that an earlier step merged" in refusal.reason for refusal in refusals)
    x = equal_pairs()
    assert all(
        torch.isfinite(merged(after, site.name, rule="tomesd", knob=site.values[-1]).run(x)[0]).all() for site in found if site.values
    )


def test_masks_that_may_hide_later_keys_are_refused() -> None:
    class Ordered(nn.Module):
        def __init__(self, order: Callable[[Tensor], Tensor]) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.blocks, self.order = nn.ModuleList(Block(8, 2) for _ in range(2)), order
            self.register_buffer("bias", torch.randn(1, 2, TOKENS, TOKENS))
            self.register_buffer("causal", torch.ones(TOKENS, TOKENS).tril())

        def forward(self, x: Tensor, seen: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x, self.order(self, seen))
            return x[:, 0]

    least, x, seen = -1e9, torch.randn(2, TOKENS, 8), torch.ones(2, TOKENS)
    legal = {
        "padding by keys and queries": lambda m, s: torch.where((s[:, None, None, :] * s[:, None, :, None]).bool(), m.bias, least),
        "a sum": lambda m, s: m.bias + (1 - s[:, None, None, :]) * least,
    }
    refused = {
        "a triangle times padding": lambda m, s: m.bias + (1 - m.causal * s[:, None, None, :]) * least,
        "an order of what is given": lambda m, s: torch.where(s[:, None, None, :] <= s[:, None, :, None], m.bias, least),
        "a triangle and padding": lambda m, s: torch.where((m.causal > 0) & (s[:, None, None, :] > 0), m.bias, least),
    }
    for name, order in {**legal, **refused}.items():
        found, refusals = sites_of(rules_named(["tome"])[0], graph_of(Ordered(order), x.double(), seen.double()))
        assert bool(found) == (name in legal), name
        assert found or "pairs of places" in refusals[0].reason or "hides later" in refusals[0].reason


def test_golden(golden: Callable[[str], None]) -> None:
    before = graph_of(Placed("turned", 2, 0), equal_pairs())
    golden(f"{before}\n# tome r=4 at attention, r=2 at attention_1\n{merged(merged(before, 'attention'), 'attention_1', knob=2)}")
