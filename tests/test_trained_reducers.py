"""Models that carry a token reducer of their own: learned masks made to drop tokens, and pools by a softmax that count merged tokens."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.ir.verify import verify
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Site
from paretorch.rewrites.token_merging.drop_masked_tokens import RULE, capacity, example
from tests.reducer_models import Gated, Policy, Slimmed
from tests.zoo import make

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
SOFT = {"rtol": 0.0, "atol": 1e-6}  # what is dropped had less than exp(-15) of the largest weight
T = 16
SEEN = (torch.arange(T) < torch.tensor([[T], [T - 5], [T - 2]])).long()
MODELS: dict[str, tuple[Callable[[], nn.Module], bool]] = {  # and whether it is told what is padding
    "hard": (Gated, False),
    "positions and padding": (lambda: Gated("weighted", relative=T), True),
    "soft": (lambda: Gated(hard=False, stages=2), True),
    "stages": (lambda: Gated("weighted", relative=T, stages=2), True),
    "policy": (Policy, False),
}
every_model = pytest.mark.parametrize("name", MODELS)


@cache
def captured(name: str) -> tuple[Graph, tuple[Tensor, ...]]:
    """The graph of a model in float64, and three rows."""
    make_model, padded = MODELS[name]
    torch.manual_seed(3)
    inputs = (torch.randn(3, T, 8, dtype=torch.float64), SEEN)[: 1 + padded]
    return normalize(capture(make_model().double().eval(), inputs).graph), inputs


def offered(graph: Graph, rule: str = RULE.name) -> tuple[list[str], list[str]]:
    sites, refusals = sites_of(rules_named([rule])[0], graph)
    return [site.name for site in sites], [refusal.reason for refusal in refusals]


@cache
def dropped(name: str, less: int = 0) -> tuple[Graph, Graph, tuple[Tensor, ...]]:
    """A graph before and after each site has the capacity that the data need, or some tokens less."""
    graph, inputs = captured(name)
    after = graph
    for site in offered(graph)[0]:
        share = capacity(graph, Site(site), [inputs], 1) - less / T
        after = apply_choice(RULE, after, site, share)
    verify(after, RULE.name)
    return graph, after, inputs


@every_model
def test_the_first_attention_with_each_learned_mask_is_a_site(name: str) -> None:
    graph, _ = captured(name)
    sites, refusals = offered(graph)
    assert sites == ["attention_1", "attention_2"][: 2 if name in ("soft", "stages", "policy") else 1]
    assert not refusals
    assert apply_choice(RULE, graph, sites[0], RULE.knobs[0]) is graph


@every_model
def test_exact_where_the_capacity_is_what_the_data_need(name: str) -> None:
    graph, after, inputs = dropped(name)
    tokens = [node.meta["val"].shape[2] for node in after.calls if is_op(node, "attention")]
    assert tokens[0] == T > tokens[1]
    torch.testing.assert_close(after.run(*inputs)[0], graph.run(*inputs)[0], **(SOFT if name == "soft" else EXACT))
    _, fewer, _ = dropped(name, 1)
    assert (fewer.run(*inputs)[0] - graph.run(*inputs)[0]).abs().max() > 1e-6


@every_model
def test_rows_of_a_batch_do_not_meet(name: str) -> None:
    _, after, inputs = dropped(name, 1)
    together = after.run(*inputs)[0]
    for row in range(3):
        alone = after.run(*(torch.where(torch.arange(3).view(-1, *[1] * (x.dim() - 1)) == row, x, x.roll(1, 1)) for x in inputs))[0]
        torch.testing.assert_close(alone[row], together[row], **EXACT)
    order = torch.tensor([2, 0, 1])
    torch.testing.assert_close(after.run(*(x[order] for x in inputs))[0], together[order], **EXACT)


@every_model
def test_the_tokens_that_are_read_by_place_stay(name: str) -> None:
    _, after, inputs = dropped(name, 1)
    after = after.copy()
    matches = [node for node in after.calls if is_op(node, "match_by_weight")]
    after.set_outputs([Builder(after, after.fx.output_node()).item(node, 0) for node in matches])
    for kept in after.run(*inputs):
        assert (kept[:, 0] == 0).all() or matches[0].args[3] == 0
        assert (kept.diff(dim=1) > 0).all()


def test_two_sites_in_any_order() -> None:
    graph, inputs = captured("soft")
    forward = apply_choice(RULE, apply_choice(RULE, graph, "attention_1", 0.5), "attention_2", 0.3)
    backward = apply_choice(RULE, apply_choice(RULE, graph, "attention_2", 0.3), "attention_1", 0.5)
    assert [node.meta["val"].shape[2] for node in forward.calls if is_op(node, "attention")] == [16, 8, 5, 5]
    torch.testing.assert_close(forward.run(*inputs)[0], backward.run(*inputs)[0], **EXACT)


def test_positions_that_a_later_step_looked_up_are_not_shortened_again() -> None:
    graph, _ = captured("stages")
    with pytest.raises(PlanError, match="by the places of the tokens; put this step first"):
        apply_choice(RULE, apply_choice(RULE, graph, "attention_2", 0.3), "attention_1", 0.5)


def test_what_is_left_may_be_merged() -> None:
    inputs = captured("hard")[1]
    graph = normalize(capture(Gated(hard=False).double().eval(), inputs).graph)
    tome = rules_named(["tome"])[0]
    after = apply_choice(tome, apply_choice(RULE, graph, "attention_1", 0.6), "attention_1", 2)
    assert [node.meta["val"].shape[2] for node in after.calls if is_op(node, "attention")] == [16, 10, 8]
    assert torch.isfinite(after.run(*inputs)[0]).all()
    before = apply_choice(tome, apply_choice(RULE, graph, "attention_1", 0.6), "attention", 2)  # the step chooses among tokens brought back
    assert [node.meta["val"].shape[2] for node in before.calls if is_op(node, "attention")] == [16, 10, 10]
    assert any(is_op(node, "unmerge_tokens") for node in before.calls)
    assert torch.isfinite(before.run(*inputs)[0]).all()


def test_what_the_data_need() -> None:
    graph, inputs = captured("hard")
    exact = capacity(graph, Site("attention_1"), [inputs], 1)
    more = capacity(graph, Site("attention_1"), [inputs, tuple(-x for x in inputs)], 1)
    assert 0 < exact <= more < 1
    assert capacity(graph, Site("attention_1"), [inputs], 8) * T % 8 == 0
    with pytest.raises(PlanError, match="no node is named nothing"):
        capacity(graph, Site("nothing"), [inputs])


def test_it_exports() -> None:
    model, x = Gated("weighted", relative=T).eval(), torch.randn(2, T, 8)
    after = apply_choice(RULE, normalize(capture(model, (x, SEEN[:2])).graph), "attention_1", 0.6)
    check_onnx(to_onnx(after), after, (x, SEEN[:2]))


def test_golden(golden: Callable[[str], None]) -> None:
    before = example()
    golden(f"{before}\n# {RULE.name} capacity=0.4 at attention_1\n{apply_choice(RULE, before, 'attention_1', 0.4)}")


class Unmasked(Gated):
    """The last block sees all tokens."""

    def forward(self, x: Tensor, seen: Tensor | None = None) -> Tensor:
        return self.norm(self.blocks[2](self.blocks[1](self.blocks[0](x), self.gate(0, x))))[:, 0]


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "a mean of all": (lambda: Gated("mean"), r"aten.mean.dim over the tokens without weights made of the learned mask"),
    "a layer without": (Unmasked, "sees the tokens without the learned mask, also those that it hides"),
    "dense": (lambda: Gated("dense"), "the model returns .* with one entry for each of the 16 tokens"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name: str) -> None:
    make_model, sentence = REFUSED[name]
    graph = normalize(capture(make_model().eval(), (torch.randn(2, T, 8),)).graph)
    sites, refusals = offered(graph)
    assert not sites
    assert re.search(sentence, refusals[0]), refusals


def test_padding_is_no_learned_mask() -> None:
    assert offered(normalize(capture(*make("bert", T=T)).graph)) == ([], [])
    with pytest.raises(PlanError, match="is no score of its tokens"):
        apply_choice(RULE, normalize(capture(*make("bert", T=T)).graph), "attention", 0.5)


# weights that are multiplied and add up to one again


def test_a_policy_becomes_a_mask() -> None:
    graph, inputs = captured("policy")
    assert [is_op(node, "attention") for node in graph.calls].count(True) == 3
    assert not any(is_op(node, "softmax") and node.meta["val"].dim() == 4 for node in graph.calls)
    with torch.no_grad():
        torch.testing.assert_close(graph.run(*inputs)[0], Policy().double().eval()(*inputs), **EXACT)


def test_weights_that_may_be_negative_stay() -> None:
    class Signed(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            shares = (x @ x.transpose(1, 2)).softmax(-1) * weight
            return shares / shares.sum(-1, keepdim=True) @ x

    graph = normalize(capture(Signed().eval(), (torch.randn(2, 5, 8), torch.randn(2, 1, 5))).graph)
    assert not any(is_op(node, "attention", "log") for node in graph.calls)


# pools by a softmax over the tokens


@cache
def pooled(form: str) -> tuple[Graph, Tensor]:
    torch.manual_seed(4)
    x = torch.randn(2, T // 2, 8, dtype=torch.float64).repeat_interleave(2, 1)
    return normalize(capture(Slimmed(form).double().eval(), (x,)).graph), x


@pytest.mark.parametrize(("form", "rule"), [("slim", "tome"), ("gated", "pitome"), ("resampler", "tome")])
def test_a_pool_is_the_end_of_the_tokens_and_counts_them(form: str, rule: str) -> None:
    graph, x = pooled(form)
    knob: Any = 4 if rule == "tome" else 0.25
    assert offered(graph, rule)[0] == ["attention", "attention_1"]
    merge = rules_named([rule])[0]
    for sites in (("attention",), ("attention_1",)):
        after = graph
        for site in sites:
            after = apply_choice(merge, after, site, knob)
        torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)
        assert (unweighed(after).run(x)[0] - graph.run(x)[0]).abs().max() > 1e-6
    forward = apply_choice(merge, apply_choice(merge, graph, "attention", knob), "attention_1", knob)
    backward = apply_choice(merge, apply_choice(merge, graph, "attention_1", knob), "attention", knob)
    torch.testing.assert_close(forward.run(x)[0], backward.run(x)[0], **EXACT)


def unweighed(graph: Graph) -> Graph:
    """A broken twin: the pool forgets the sizes."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "weigh_tokens"):
            graph.replace(node, node.args[0])  # type: ignore[arg-type]
        if is_op(node, "attention") and node.meta["val"].shape[2] == 4:
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "key_bias"}
    return graph.clean()


def test_weights_that_are_no_softmax_read_tokens_brought_back() -> None:
    graph, x = pooled("sigmoid")
    assert offered(graph, "tome")[0] == ["attention", "attention_1"]
    after = apply_choice(rules_named(["tome"])[0], graph, "attention", 4)
    assert any(is_op(node, "unmerge_tokens") for node in after.calls)
    torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)
