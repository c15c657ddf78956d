"""Blocks that are left out: the same as the model written without them, refused where a part of them is needed."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.rewrites.layer_skipping import RULES
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Refusal, Rule, Site
from tests.zoo import Attention, FeedForward, make

BLOCK, ATTENTION, FEED = RULES
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
TRANSFORMERS = ["vit_class", "layer_scale", "bert", "gpt", "llama", "sandwich", "whisper"]


def offered(rule: Rule, graph: Graph) -> tuple[list[Site], list[Refusal]]:
    assert rule.sites is not None
    found = list(rule.sites(graph, analyze(graph)))
    return [site for site in found if isinstance(site, Site)], [refusal for refusal in found if isinstance(refusal, Refusal)]


def apply(rule: Rule, graph: Graph, site: Site, knob: int = 1) -> Graph:
    assert rule.rewrite is not None
    return rule.rewrite(graph, site, knob)


def captured(model: nn.Module, inputs: tuple[Tensor, ...]) -> Graph:
    return normalize(capture(model, inputs).graph)


class Identity(nn.Module):
    def forward(self, x: Tensor, *_: object) -> Tensor:
        return x


class Nothing(nn.Module):
    """A branch that adds nothing."""

    def forward(self, x: Tensor, *_: object) -> Tensor:
        return torch.zeros_like(x)


def without(model: nn.Module, rule: Rule, layer: int) -> nn.Module:
    """The zoo's model, edited by hand."""
    blocks = model.blocks
    block = blocks[layer]
    if rule is BLOCK:
        blocks[layer] = Identity()
        return model
    half = 0 if rule is ATTENTION else 1
    setattr(block, ("mix", "feed")[half], Nothing())
    if block.layout == "post":
        block.norms[half] = Identity()
    if block.layout == "sandwich":
        block.norms[2 * half + 1] = Identity()
    return model


@every_rule
def test_0_is_the_identity(rule: Rule) -> None:
    graph = rule.example()
    assert apply(rule, graph, offered(rule, graph)[0][0], 0) is graph


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_the_same_as_a_model_written_without_it(name: str) -> None:
    model, inputs = make(name)
    graph = captured(model, inputs)
    for rule in RULES:
        found, refusals = offered(rule, graph)
        assert len(found) == 2
        assert not refusals
        after = apply(rule, graph, found[1])
        with torch.no_grad():
            wanted = without(make(name)[0], rule, 1)(*inputs)
        for got, value in zip(after.run(*inputs), wanted if isinstance(wanted, tuple) else (wanted,), strict=True):
            torch.testing.assert_close(got, value, rtol=1e-4, atol=1e-5)
        lost = {BLOCK.name: ("attention", "gelu", "silu"), ATTENTION.name: ("attention",), FEED.name: ("gelu", "silu")}[rule.name]
        assert sum(is_op(node, *lost) for node in after.calls) < sum(is_op(node, *lost) for node in graph.calls)
        assert len(after.constants) < len(graph.constants)  # its weights are gone


@pytest.mark.parametrize("name", ["parallel", "encoder_decoder", "mixer", "convnext", "swin"])
def test_every_site_of_every_model_runs(name: str) -> None:
    model, inputs = make(name)
    graph = captured(model, inputs)
    before = graph.run(*inputs)
    for rule in RULES:
        for site in offered(rule, graph)[0]:
            after = apply(rule, graph, site).run(*inputs)
            assert [value.shape for value in after] == [value.shape for value in before]
            assert not torch.equal(after[0], before[0])


def test_all_layers_may_go_in_any_order() -> None:
    model, inputs = make("vit_class")
    graph = captured(model, inputs)
    first, second = offered(BLOCK, graph)[0]
    one = apply(BLOCK, apply(BLOCK, graph, first), second)
    other = apply(BLOCK, apply(BLOCK, graph, second), first)
    assert torch.equal(one.run(*inputs)[0], other.run(*inputs)[0])
    assert not any(is_op(node, "attention") for node in one.calls)


def test_a_layer_without_its_attention_may_go_whole() -> None:
    graph = BLOCK.example()
    halved = apply(ATTENTION, graph, offered(ATTENTION, graph)[0][0])
    site = offered(BLOCK, graph)[0][0]
    x = torch.randn(2, 9, 8)
    assert torch.equal(apply(BLOCK, halved, site).run(x)[0], apply(BLOCK, graph, site).run(x)[0])
    with pytest.raises(PlanError, match="no block of the residual stream ends there"):
        apply(ATTENTION, halved, offered(ATTENTION, graph)[0][0])


@pytest.mark.parametrize("order", [(ATTENTION, FEED), (FEED, ATTENTION)], ids=lambda order: order[0].name)
def test_branches_of_a_parallel_layer_may_go_alone(order: tuple[Rule, Rule]) -> None:
    model, inputs = make("parallel")
    graph, (first, second) = captured(model, inputs), order
    sites = {rule: offered(rule, graph) for rule in order}
    assert [(len(found), refused) for found, refused in sites.values()] == [(2, []), (2, [])]
    once = apply(first, graph, sites[first][0][0])
    twice = apply(second, once, sites[second][0][0])
    for after, gone in ((once, (first,)), (twice, order)):
        twin = make("parallel")[0]
        branches = {ATTENTION: twin.blocks[0].mix.project, FEED: twin.blocks[0].feed.shrink}
        with torch.no_grad():
            for rule in gone:
                for parameter in branches[rule].parameters():
                    parameter.zero_()
            torch.testing.assert_close(after.run(*inputs)[0], twin(*inputs), rtol=1e-4, atol=1e-5)
    assert apply(BLOCK, once, offered(BLOCK, graph)[0][1]).run(*inputs)[0].shape == graph.run(*inputs)[0].shape


class Side(nn.Module):
    """A parallel layer that also returns what its attention made."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.mix, self.feed = nn.LayerNorm(8), Attention(8, 2), FeedForward(8)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = self.norm(x)
        mixed = self.mix(y)
        return x + mixed + self.feed(y), mixed


def test_a_branch_that_is_used_elsewhere_stays() -> None:
    graph = captured(Side().eval(), (torch.randn(2, 5, 8),))
    assert "the model returns it" in offered(ATTENTION, graph)[1][0].reason
    assert len(offered(FEED, graph)[0]) == 1


class Cached(nn.Module):
    """Two pre-norm layers that also return the keys of the first, as for a cache."""

    def __init__(self) -> None:
        super().__init__()
        self.norms, self.mix = nn.ModuleList(nn.LayerNorm(8) for _ in range(4)), nn.ModuleList(Attention(8, 2) for _ in range(2))
        self.feed = nn.ModuleList(FeedForward(8) for _ in range(2))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        keys = self.mix[0].key(self.norms[0](x))
        for layer in range(2):
            x = x + self.mix[layer](self.norms[2 * layer](x))
            x = x + self.feed[layer](self.norms[2 * layer + 1](x))
        return x, keys


@pytest.mark.parametrize("rule", [BLOCK, ATTENTION], ids=lambda rule: rule.name)
def test_a_block_whose_keys_are_returned_stays(rule: Rule) -> None:
    graph = captured(Cached().eval(), (torch.randn(2, 6, 8),))
    found, refusals = offered(rule, graph)
    assert len(found) == 1
    assert "computed inside of the block and used outside of it: the model returns it" in refusals[0].reason
    with pytest.raises(PlanError, match="used outside of it"):
        apply(rule, graph, Site(refusals[0].site))


class Strided(nn.Module):
    """A stream that begins transposed, so that what follows the first block cannot view what stood before it."""

    def __init__(self) -> None:
        super().__init__()
        self.feed, self.head = nn.ModuleList(FeedForward(8) for _ in range(2)), nn.Linear(48, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        for feed in self.feed:
            x = x + feed(x)
        return self.head(x.contiguous().view(len(x), 48))


def test_views_that_strides_forbid_become_reshapes() -> None:
    x = torch.randn(2, 8, 6)
    graph = captured(Strided().eval(), (x,))
    for site in offered(FEED, graph)[0]:
        graph = apply(FEED, graph, site)
    assert graph.run(x)[0].shape == (2, 3)


@pytest.mark.parametrize(("T", "C", "H", "B"), [(12, 12, 12, 12)])
def test_equal_lengths_and_other_names_change_nothing(T: int, C: int, H: int, B: int) -> None:
    model, inputs = make("bert", T=T, C=C, H=H, B=B)
    plain, hidden = captured(model, inputs), captured(Wrapped(model).eval(), inputs)
    for rule in RULES:
        sites = offered(rule, plain)[0]
        assert [site.name for site in sites] == [site.name for site in offered(rule, hidden)[0]]
        assert len(sites) == 2


class Wrapped(nn.Module):
    """The same model under another name."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.qq = model

    def forward(self, ids: Tensor, seen: Tensor) -> Tensor:
        return self.qq(ids, seen)


@every_rule
def test_golden(rule: Rule, golden: Callable[[str], None]) -> None:
    before = rule.example()
    site = offered(rule, before)[0][0]
    golden(f"{before}\n# {rule.name} skip=1 at {site.name}\n{apply(rule, before, site)}")
