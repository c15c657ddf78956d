"""What every rule that makes tokens fewer promises, one test for all of them, so that a new one is tested the day it is added."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.fx import Node

from paretorch.capture import capture
from paretorch.conflicts import Conflicts
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, tensor_type
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import is_match, is_reduction
from paretorch.offers import offers
from paretorch.plan import Choice
from paretorch.rewrites import RULES, rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Rule, level
from paretorch.rewrites.token_merging import RULES as TOKEN_RULES
from paretorch.session import Session
from tests.zoo import Block, make

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
OWN = (
    "drop_masked_tokens",
    "merge_frames",
    "tempme",
)  # legal only on models that bring what they need; their contracts stand in tests of their own
FEWER = tuple(
    rule for rule in TOKEN_RULES if "token_count" in rule.invalidates and rule.name not in OWN
)  # those that stay fewer to the end
VARIANTS: dict[str, tuple[str, Callable[[int, int], Any]]] = {  # what the knob is that takes so many of so many tokens
    "tome": ("tome", lambda count, tokens: count),
    "pitome": ("pitome", lambda count, tokens: count / tokens),
    "tofu, dropped": ("tofu", lambda count, tokens: -count / tokens),
    "tofu, merged": ("tofu", lambda count, tokens: count / tokens),
    "dymu": ("dymu", lambda count, tokens: f"{count / tokens} above 0.9999"),
    "evit": ("evit", lambda count, tokens: count / tokens),
    "divprune": ("divprune", lambda count, tokens: count / tokens),
    "visionzip": ("visionzip", lambda count, tokens: count / tokens),
}
MERGING = [name for name in VARIANTS if name not in ("tofu, dropped", "divprune")]
every_variant = pytest.mark.parametrize("variant", VARIANTS)
every_rule = pytest.mark.parametrize("rule", FEWER, ids=lambda rule: rule.name)


def rule_of(variant: str) -> Rule:
    return rules_named([VARIANTS[variant][0]])[0]


def after(graph: Graph, variant: str, *sites: str, count: int = 4, free: int = 16) -> Graph:
    """The graph with so many of its free tokens gone at each of the sites."""
    for site in sites:
        graph = apply_choice(rule_of(variant), graph, site, VARIANTS[variant][1](count, free))
    return graph


class Reader(nn.Module):
    """Two blocks on [B, T, C] and a norm. read: what is made of it; seen: i64[B, T] hides keys; weight: T[B, T] weighs a sum at the end."""

    def __init__(self, read: str = "class") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm, self.read = nn.ModuleList(Block(8, 2) for _ in range(2)), nn.LayerNorm(8), read

    def forward(self, x: Tensor, seen: Tensor | None = None, weight: Tensor | None = None) -> Tensor | tuple[Tensor, ...]:
        mask = None if seen is None else (1.0 - seen[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, mask)
        x = self.norm(x)
        if weight is not None:
            return x[:, 0] + (x * weight[..., None]).sum(1)
        if self.read == "dense":
            return x, x[:, 0]
        return x[:, 0] if self.read == "class" else x[:, 0] + x.mean(1)


@cache
def captured(name: str, T: int = 17) -> tuple[Graph, tuple[Tensor, ...]]:
    """A graph in float64 with inputs of a batch of 3: of the zoo, or a Reader that is plain, masked or masked and weighted."""
    torch.manual_seed(1)
    if name in ("class", "class and mean", "dense", "masked", "weighted"):
        inputs: tuple[Tensor, ...] = (torch.randn(3, T, 8, dtype=torch.float64),)
        seen = (torch.arange(T) < torch.tensor([[T], [T - 5], [T - 9]])).long()
        if name == "weighted":
            inputs = (*inputs, seen, torch.rand(3, T, dtype=torch.float64) * seen)
        model: nn.Module = Reader("dense" if name == "masked" else name)
        inputs = (*inputs, seen) if name == "masked" else inputs
    else:
        model, inputs = make(name, T=T)
        inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return normalize(capture(model.double().eval(), inputs).graph), inputs


@cache
def padded() -> tuple[nn.Module, Graph, tuple[Tensor, Tensor]]:
    """A text encoder in float64 that reads its first token, its graph for any batch, and four rows of 17, 8, 12 and 3 real tokens."""
    model, _ = make("bert", T=17, B=4)
    torch.manual_seed(2)
    ids, seen = torch.randint(0, 31, (4, 17)), (torch.arange(17) < torch.tensor([[17], [8], [12], [3]])).long()
    batch = torch.export.Dim("batch", min=1, max=64)
    return model, normalize(capture(model.double(), (ids, seen), ({0: batch}, {0: batch})).graph), (ids, seen)


def without_size_bias(graph: Graph) -> Graph:
    """A broken twin: attention forgets the sizes."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "attention"):
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "key_bias"}
    return graph.clean()


def test_every_rule_has_its_variants() -> None:
    assert {rule.name for rule in FEWER} == {name for name, _ in VARIANTS.values()}
    assert [rule for rule in RULES if rule in FEWER] == list(FEWER)


@every_rule
def test_the_knobs_low_end_is_the_graph_itself(rule: Rule) -> None:
    graph = rule.example()
    assert rule.knobs[0] == 0
    assert all(apply_choice(rule, graph, site.name, rule.knobs[0]) is graph for site in sites_of(rule, graph)[0])


@every_rule
def test_golden(rule: Rule, golden: Callable[[str], None]) -> None:
    before = rule.example()
    forms: dict[str, list[Any]] = {}
    for site in sites_of(rule, before)[0]:
        forms.setdefault(site.name, []).append(max(value for value in site.values or () if value and abs(level(value)) <= 4))
    text, graph = str(before), before
    for number, (site, knobs) in enumerate(forms.items()):
        knob = knobs[number % len(knobs)]  # each form once
        graph = apply_choice(rule, graph, site, knob)
        text += f"\n# {rule.name} at {site} = {knob}"
    golden(f"{text}\n{graph}")


@pytest.mark.parametrize("variant", MERGING)
@pytest.mark.parametrize("read", ["class", "class and mean", "dense"])
def test_equal_tokens_merge_exactly(variant: str, read: str) -> None:
    graph, _ = captured(read, 9)
    first, pairs = torch.randn(3, 1, 8, dtype=torch.float64), torch.randn(3, 4, 8, dtype=torch.float64)
    if variant in ("evit", "visionzip"):  # makes one of all that go, so these must be equal
        pairs = pairs[:, :1].expand(-1, 4, -1)
    x = torch.cat([first, pairs.repeat_interleave(2, 1)], 1)
    merged = after(graph, variant, "attention", free=8)
    for found, forgetful, wanted in zip(merged.run(x), without_size_bias(merged).run(x), graph.run(x), strict=True):
        torch.testing.assert_close(found, wanted, **EXACT)
        assert (forgetful - wanted).abs().max() > 1e-6


@every_variant
def test_dense_outputs_give_each_token_the_row_that_stands_for_it(variant: str) -> None:
    graph, inputs = captured("dense")
    fewer = after(graph, variant, "attention", "attention_1")
    assert [is_op(node, "unmerge_tokens") for node in fewer.calls].count(True) == 1
    assert [tensor_type(node) for node in fewer.outputs] == [tensor_type(node) for node in graph.outputs]
    tokens, first = fewer.run(*inputs)
    assert torch.equal(tokens[:, 0], first)
    assert [len(rows.unique(dim=0)) for rows in tokens] == [17 - 8] * 3


@every_variant
def test_rows_of_a_batch_do_not_meet(variant: str) -> None:
    _, graph, (ids, seen) = padded()
    graph = after(graph, variant, "attention", "attention_1")
    together = graph.run(ids, seen)[0]
    for row in range(4):
        torch.testing.assert_close(graph.run(ids[row : row + 1], seen[row : row + 1])[0][0], together[row], **EXACT)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(graph.run(ids[order], seen[order])[0], together[order], **EXACT)
    assert torch.isfinite(graph.run(ids, seen * 0)[0]).all()


@every_variant
def test_rows_whose_choices_are_no_near_ties_do_not_meet_in_f32(variant: str) -> None:
    """A choice that a change of the inputs by 1e-5 leaves as it is hangs on no smaller gap; other rows then change no more than roundings."""
    x = torch.randn(24, 17, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)

    def shorter(dtype: torch.dtype) -> Graph:
        model = Reader("class and mean").to(dtype).eval()
        return after(normalize(capture(model, (x[:2].to(dtype),), sizes).graph), variant, "attention", "attention_1")

    choosing, single = shorter(torch.float64).copy(), shorter(torch.float32)
    b, matches = Builder(choosing, choosing.fx.output_node()), [node for node in choosing.calls if is_match(node)]
    choosing.set_outputs([b.item(match, number) for match in matches for number in range(3)])
    chosen, steady = choosing.run(x), torch.ones(24, dtype=torch.bool)
    for seed in range(4):
        noise = torch.randn(x.shape, dtype=x.dtype, generator=torch.Generator().manual_seed(seed))
        for one, other in zip(chosen, choosing.run(x + 1e-5 * noise), strict=True):
            steady &= (one == other).flatten(1).all(1)
    assert steady.float().mean() > 0.8
    together = single.run(x.float())[0]
    for row in steady.nonzero()[:, 0].tolist():
        torch.testing.assert_close(single.run(x[row : row + 1].float())[0][0], together[row], rtol=0, atol=1e-5)


@every_variant
def test_padding_goes_first_so_that_a_padded_row_is_what_it_was(variant: str) -> None:
    model, graph, (ids, seen) = padded()
    fewer = after(graph, variant, "attention")
    found = fewer.run(ids, seen)[0]
    with torch.no_grad():
        torch.testing.assert_close(found[1:2], model(ids[1:2, :8], seen[1:2, :8]), **EXACT)
    other = torch.where(seen == 1, ids, (ids + 7) % 31)
    torch.testing.assert_close(fewer.run(other, seen)[0], found, **EXACT)
    assert (found - graph.run(ids, seen)[0])[0].abs().max() > 1e-6


@every_variant
def test_what_padding_holds_changes_no_dense_output(variant: str) -> None:
    graph, (x, seen) = captured("masked")
    graph = after(graph, variant, "attention", "attention_1")
    real = seen.bool()
    one, two = (graph.run(given, seen)[0] for given in (x, torch.where(real[..., None], x, x + 3)))
    torch.testing.assert_close(one[real], two[real], **EXACT)


@every_variant
def test_tokens_read_by_place_stay(variant: str) -> None:
    graph, inputs = captured("vit_registers", 20)
    graph = after(graph, variant, "attention", "attention_1").copy()
    matches = [node for node in graph.calls if is_match(node)]
    assert {node.args[3] for node in matches} == {4}
    graph.set_outputs([Builder(graph, graph.fx.output_node()).item(node, 0) for node in matches])
    for kept in graph.run(*inputs):
        assert torch.equal(kept[:, :4], torch.arange(4).expand(3, -1))


def map_of(b: Builder, match: Node, previous: Node | None = None) -> Node:
    """The row that each token is part of behind a match, and behind an earlier map."""
    if not is_op(match, "match_above"):
        return b.source_map(*(b.item(match, number) for number in range(3)), previous)
    return b.item(match, 3) if previous is None else b.follow_map(b.item(match, 3), previous)


@every_variant
def test_composed_maps_reconstruct_every_index(variant: str) -> None:
    graph, inputs = captured("class")
    graph = after(graph, variant, "attention", "attention_1").copy()
    reductions = [node for node in graph.calls if is_reduction(node)]
    b = Builder(graph, graph.fx.output_node())
    first, second = [node for node in graph.calls if is_match(node)]
    graph.set_outputs([b.item(first, 0), b.item(second, 0), map_of(b, second, map_of(b, first)), b.item(reductions[-1], 1)])
    kept, left, places, size = graph.run(*inputs)
    kept = kept.gather(1, left)
    rows = torch.arange(9).expand(3, -1)
    assert torch.equal(places.gather(1, kept), rows)  # a token that stays is its own row
    assert torch.equal(places[:, 0], torch.zeros(3, dtype=torch.long))
    counts = torch.nn.functional.one_hot(places, 9).sum(1)
    assert counts.sum() == 3 * 17
    assert torch.equal(size, counts.double()) or variant not in MERGING


@pytest.mark.parametrize("model", ["class", "dense", "weighted"])
@every_variant
def test_the_order_in_which_steps_are_put_in_does_not_matter(variant: str, model: str) -> None:
    graph, inputs = captured(model)
    names = list(VARIANTS)
    other = names[(names.index(variant) + 1) % len(names)]
    for first, second in ((variant, variant), (variant, other)):
        forward = after(after(graph, first, "attention"), second, "attention_1")
        backward = after(after(graph, second, "attention_1"), first, "attention")
        assert [is_reduction(node) for node in forward.calls].count(True) >= 2
        for one, two in zip(forward.run(*inputs), backward.run(*inputs), strict=True):
            torch.testing.assert_close(one, two, **EXACT)


@every_variant
def test_one_place_takes_one_step(variant: str) -> None:
    graph, _ = captured("class")
    taken = after(graph, variant, "attention")
    rules = {rule.name: rule for rule in FEWER}
    for name, (_, knob) in VARIANTS.items():
        with pytest.raises(PlanError, match=rf"merged after attention .* already, by {rule_of(variant).name}"):
            after(taken, name, "attention")
        pair = Choice(rule_of(variant).name, "attention", 0.1), Choice(rule_of(name).name, "attention", knob(4, 16))
        assert "one place takes one rule" in str(Conflicts(graph, rules.values()).between(*pair))


REFUSED = {
    "gpt": "hides later tokens from earlier ones",
    "swin": "not one dimension beside its batch",
    "llama": "hides later tokens",
}


@every_rule
@pytest.mark.parametrize("model", REFUSED)
def test_refused_with_a_sentence(rule: Rule, model: str) -> None:
    found, refusals = sites_of(rule, captured(model, 16)[0])
    assert not found
    assert any(REFUSED[model] in refusal.reason for refusal in refusals), refusals


def test_class_attention_needs_a_class_token() -> None:
    found, refusals = sites_of(rule_of("evit"), captured("vit_mean", 16)[0])
    assert not found
    assert "the model reads no token by its place after attention (blocks.0" in refusals[0].reason
    assert "no class token whose attention could rank the others" in refusals[0].reason


def test_shares_suit_any_length() -> None:
    for tokens in (18, 122):
        found, _ = sites_of(rule_of("pitome"), captured("vit_class", tokens)[0])
        counts = [int(float(value or 0) * (tokens - 1)) for value in found[0].values or ()]
        assert counts[0] == 0
        assert counts[1] >= 1
        assert counts[-1] == int(0.48 * (tokens - 1))
        assert len(set(counts)) == len(counts)


def test_they_are_offered_and_take_turns_at_a_place() -> None:
    model, inputs = make("vit_class", T=18)
    names = {rule.name for rule in FEWER}
    legal = {entry.rule for entry in offers(model, inputs).entries if entry.verdict == "not taken"}
    assert names <= legal
    session: Any = SimpleNamespace(rules=RULES)
    slots = {Session._slot(session, Choice(name, "attention", 4)) for name in names}
    assert len(slots) == 1
    assert Session._slot(session, Choice("sliding_window", "attention", 16)) not in slots
