"""Windowed attention as a rewrite: the same as attention with a window, refused where places mean nothing."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache

import pytest
import torch
from torch import Tensor

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.builder import build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Refusal, Rule, Site
from paretorch.rewrites.sparse_attention import RULES
from paretorch.rewrites.sparse_attention.window import WIDTHS, block_of
from paretorch.rewrites.token_merging import tome
from tests.zoo import make

SLIDING, SINKS = RULES
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)


def offered(rule: Rule, graph: Graph) -> tuple[list[Site], list[Refusal]]:
    assert rule.sites is not None
    found = list(rule.sites(graph, analyze(graph)))
    return [site for site in found if isinstance(site, Site)], [refusal for refusal in found if isinstance(refusal, Refusal)]


def apply(rule: Rule, graph: Graph, site: Site, knob: int | str) -> Graph:
    assert rule.rewrite is not None
    return rule.rewrite(graph, site, knob)


def masked(graph: Graph, name: str, width: int, sinks: int) -> Graph:
    """The dense twin: the same attention with the window as a mask."""
    graph = graph.copy()
    node = graph.node(name)
    assert node is not None
    causal = node.kwargs.get("right", -1) == 0
    node.kwargs = {**node.kwargs, "left": width - 1, "right": 0 if causal else width - 1, "sinks": sinks}
    return graph


@cache
def captured(name: str, T: int = 41) -> tuple[Graph, tuple[Tensor, ...]]:
    model, inputs = make(name, T=T, B=2) if name != "swin" else make(name, T=40, B=2)
    inputs = tuple(x.double() if x.is_floating_point() else x for x in inputs)
    return normalize(capture(model.double(), inputs).graph), inputs


@every_rule
def test_full_is_the_identity(rule: Rule) -> None:
    graph = rule.example()
    site = offered(rule, graph)[0][0]
    assert rule.knobs[0] == "full"
    assert apply(rule, graph, site, "full") is graph


@pytest.mark.parametrize("name", ["gpt", "llama", "parallel", "vit_class", "bert", "bert_spelled", "whisper", "encoder_decoder"])
def test_the_same_as_a_mask(name: str) -> None:
    graph, inputs = captured(name)
    found = [(rule, site) for rule in RULES for site in offered(rule, graph)[0]]
    assert len(found) == (8 if name == "encoder_decoder" else 4)
    for rule, site in found:
        assert site.values == ("full", 16)
        after = apply(rule, graph, site, 16)
        assert after.node(site.name) is None
        twin = masked(graph, site.name, 16, 4 if rule is SINKS else 0)
        for got, wanted, dense in zip(after.run(*inputs), twin.run(*inputs), graph.run(*inputs), strict=True):
            torch.testing.assert_close(got, wanted, rtol=0, atol=1e-9)
            assert (got - dense).abs().max() > 1e-9


def test_all_layers_and_a_dynamic_batch() -> None:
    model, inputs = make("bert", T=40, B=2)
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = normalize(capture(model, inputs, ({0: batch}, {0: batch})).graph)
    for rule, site in zip(RULES, offered(SLIDING, graph)[0], strict=True):
        graph = apply(rule, graph, site, 16)
    assert not any(is_op(node, "attention") for node in graph.calls)
    assert not isinstance(graph.outputs[0].meta["val"].shape[0], int), "the batch stays a symbol"
    one = tuple(x[:1].repeat(5, 1) for x in inputs)
    torch.testing.assert_close(graph.run(*one)[0][:1], graph.run(*(x[:1] for x in inputs))[0])


def test_a_model_that_is_windowed_already_gets_a_smaller_window_or_none() -> None:
    def model(b: object, x: object) -> object:
        heads = b.permute(b.view(x, [1, 80, 2, 4]), [0, 2, 1, 3])  # type: ignore[attr-defined]
        return b.attention(heads, heads, heads, scale=0.5, left=39, right=0, sinks=2)  # type: ignore[attr-defined]

    graph = build("windowed", model, x=TensorType("f32", (1, 80, 8)))
    (site,), _ = offered(SLIDING, graph)
    assert site.values == ("full", 16)
    (node,) = [node for node in apply(SLIDING, graph, site, 16).calls if is_op(node, "local_attention")]
    assert (node.kwargs["left"], node.kwargs["right"], node.kwargs["sinks"]) == (15, 0, 2)


def test_softcap_and_key_bias_are_kept() -> None:
    def model(b: object, x: object, bias: object) -> object:
        heads = b.permute(b.view(x, [1, 40, 2, 4]), [0, 2, 1, 3])  # type: ignore[attr-defined]
        return b.attention(heads, heads, heads, None, bias, scale=0.5, softcap=2.0)  # type: ignore[attr-defined]

    graph = build("capped", model, x=TensorType("f64", (1, 40, 8)), bias=TensorType("f64", (1, 40)))
    (site,), _ = offered(SLIDING, graph)
    inputs = torch.randn(1, 40, 8, dtype=torch.float64), torch.randn(1, 40, dtype=torch.float64)
    wanted = masked(graph, site.name, 16, 0).run(*inputs)[0]
    torch.testing.assert_close(apply(SLIDING, graph, site, 16).run(*inputs)[0], wanted, rtol=0, atol=1e-9)


@pytest.mark.parametrize(("C", "H", "B", "T"), [(40, 40, 40, 40)])
def test_equal_lengths_change_nothing(C: int, H: int, B: int, T: int) -> None:
    model, inputs = make("vit_class", T=T, C=C, H=H, B=B)
    graph = normalize(capture(model, inputs).graph)
    found, refusals = offered(SLIDING, graph)
    assert [site.values for site in found] == [("full", 16)] * 2
    assert not refusals


REFUSED = {
    "short": (lambda: captured("gpt", T=32)[0], "already local: it sees 32 of 32 tokens, so no window of 16"),
    "pairs": (lambda: captured("swin")[0], "says something about pairs of places"),
    "local": (lambda: apply(SLIDING, SLIDING.example(), Site("attention"), 16), "local_attention .* is local already"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name: str) -> None:
    make_graph, sentence = REFUSED[name]
    graph = make_graph()
    refusals = [refusal for rule in RULES for refusal in offered(rule, graph)[1]]
    assert len(refusals) >= 2
    assert any(re.search(sentence, refusal.reason) for refusal in refusals), refusals


def test_merged_tokens_have_no_distance() -> None:
    graph, _ = captured("vit_class", T=80)
    merged = tome.rewrite(graph, Site("attention"), 4)
    found, refusals = offered(SLIDING, merged)
    assert [site.name for site in found] == ["attention"]  # the one before the merge
    assert "were merged by match_tokens" in refusals[0].reason
    local = apply(SLIDING, graph, Site("attention_1"), 16)
    found, refusals = offered(tome.RULE, local)
    assert [site.name for site in found] == ["attention"]  # its tokens are brought back before the window
    assert "local_attention (blocks.1.mix, zoo.py" in refusals[0].reason
    assert "is local already" in refusals[0].reason
    assert "positions" in tome.RULE.invalidates & SLIDING.reads


@every_rule
def test_a_site_that_is_gone(rule: Rule) -> None:
    graph = rule.example()
    with pytest.raises(PlanError, match="no self-attention is named nothing here"):
        apply(rule, graph, Site("nothing"), 16)
    with pytest.raises(PlanError, match="a window of 512 is not among"):
        apply(rule, graph, Site("attention"), 512)


def test_blocks_are_about_the_window() -> None:
    assert [block_of(width) for width in WIDTHS] == [128, 128, 128, 128, 64, 32, 32]


@every_rule
def test_golden(rule: Rule, golden: Callable[[str], None]) -> None:
    before = after = rule.example()
    for site in offered(rule, before)[0]:
        after = apply(rule, after, site, 16)
    golden(f"{before}\n# {rule.name} window=16\n{after}")
