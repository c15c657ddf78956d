"""Every spelling of attention becomes one attention node that computes the same; what is not attention stays as it is."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.graph import Graph
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.normalize.attention import attention_refusals, raise_attention
from paretorch.rewrites.normalize.heads import spelled
from paretorch.rewrites.normalize.masks_join import Band, band_of
from tests import spellings
from tests.graphs import exported
from tests.spelling_misses import NEAR_MISSES, MaskChain, chain_inputs
from tests.spellings import CASTS, LAYOUTS, Generated, Plain, Spelling, all_spellings, chosen_spellings, generated_inputs, handwritten
from tests.tiny_transformers import make

CHOSEN = chosen_spellings()
TENTH = len(CHOSEN) // 10
GENERATED = [pytest.param(s, id=s.name, marks=() if place < TENTH else pytest.mark.slow) for place, s in enumerate(CHOSEN)]
HANDWRITTEN = handwritten()


def attentions(graph: Graph) -> list[torch.fx.Node]:
    return [node for node in graph.calls if node.target is torch.ops.paretorch.attention.default]


def left_over(graph: Graph) -> list[str]:
    return [node.name for node in graph.calls if spelled(node) in ("softmax", "_softmax", "exp", "scaled_dot_product_attention")]


def assert_same(found: Tensor, wanted: Tensor, tolerance: float = 1e-9) -> None:
    """Equal relative to the largest value; zeros where the original gave NaN, a row in which -inf hides everything."""
    lost = wanted.isnan()
    assert bool((found[lost] == 0).all())
    if not bool(lost.all()):
        error = (found - wanted)[~lost].abs().max() / wanted[~lost].abs().max()
        assert error <= tolerance, f"relative error {error:.2g}"


@pytest.mark.parametrize("spelling", GENERATED)
def test_generated(spelling: Spelling) -> None:
    """In float64, also for rows in which everything is padding. Softmax in float32 is compared with softmax in float64: the attention
    node has no cast.
    """
    inputs = generated_inputs(spelling)
    graph = raise_attention(exported(Generated(spelling).eval(), inputs))
    assert len(attentions(graph)) == 1, [str(refusal) for refusal in attention_refusals(graph)]
    assert left_over(graph) == []
    if spelling.key_heads != "equal":
        assert attentions(graph)[0].args[1].meta["val"].shape[1] == inputs[1].shape[2]
    for seed in (0, 1):
        inputs = generated_inputs(spelling, seed)
        assert_same(graph.run(*inputs)[0], Generated(spelling, casts=False)(*inputs))


@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_equal_lengths(layout: str, batch: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens, heads and head width are all 4 and the batch is 4 or 1: axes are told apart by what happens to them."""
    for name, size in (("B", batch), ("T", 4), ("H", 4), ("D", 4)):
        monkeypatch.setattr(spellings, name, size)
    spelling = Spelling("query", "added_left", layout, "expand", "by_hand")
    inputs = generated_inputs(spelling)
    graph = raise_attention(exported(Generated(spelling).eval(), inputs))
    (node,) = attentions(graph)
    assert [tuple(argument.meta["val"].shape) for argument in node.args[:2]] == [(batch, 4, 4, 4), (batch, 2, 4, 4)]
    assert node.kwargs["right"] == 0
    assert_same(graph.run(*inputs)[0], Generated(spelling)(*inputs))


def test_there_are_enough() -> None:
    assert len(CHOSEN) >= 300
    assert len(list(all_spellings())) > len(set(CHOSEN)) == len(CHOSEN)
    assert {spelling.casts for spelling in CHOSEN[:TENTH]} == set(CASTS)
    assert chosen_spellings() == CHOSEN
    assert len(HANDWRITTEN) >= 24


@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten(name: str) -> None:
    case = HANDWRITTEN[name]
    graph = normalize(capture(case.module.eval(), case.inputs, case.dynamic).graph)
    assert len(attentions(graph)) == 1, [str(refusal) for refusal in attention_refusals(graph)]
    assert left_over(graph) == []
    assert_same(graph.run(*case.inputs)[0], case.module(*case.inputs))


@pytest.mark.slow
@pytest.mark.parametrize("name", HANDWRITTEN)
def test_handwritten_without_other_passes(name: str) -> None:
    case = HANDWRITTEN[name]
    graph = raise_attention(exported(case.module.eval(), case.inputs, case.dynamic))
    assert len(attentions(graph)) == 1
    assert raise_attention(graph).run(*case.inputs)[0].equal(graph.run(*case.inputs)[0])


@pytest.mark.parametrize("name", NEAR_MISSES)
def test_near_miss(name: str) -> None:
    function, word = NEAR_MISSES[name]
    inputs = HANDWRITTEN["no scale"].inputs
    before = exported(Plain(function), inputs)
    graph = raise_attention(before)
    assert attentions(graph) == []
    assert torch.equal(graph.run(*inputs)[0], before.run(*inputs)[0])
    if word:
        assert any(word in refusal.reason for refusal in attention_refusals(graph)), attention_refusals(graph)


@pytest.mark.parametrize("seed", [pytest.param(seed, marks=() if seed < 12 else pytest.mark.slow) for seed in range(300)])
def test_any_chain_of_masks(seed: int) -> None:
    """Raised or refused, never another function. The tolerance is the rounding of scores near -1e9 in float64, 1e-7."""
    module = MaskChain(seed).eval()
    graph = raise_attention(exported(module, chain_inputs(seed)))
    for inputs in (chain_inputs(seed), chain_inputs(seed + 1), chain_inputs(seed + 2)):
        wanted = module(*inputs)
        found = graph.run(*inputs)[0]
        if attentions(graph):
            assert_same(found, wanted, 1e-6)
        else:
            assert torch.equal(found.nan_to_num(7.0), wanted.nan_to_num(7.0))


# name, attention, attention nodes
MODELS = (
    ("bert", "eager", 2), ("bert", "sdpa", 2), ("gpt2", "eager", 2), ("gpt2", "sdpa", 2), ("llama", "eager", 2), ("llama", "sdpa", 2),
    ("gemma3", "eager", 2), ("gemma3", "sdpa", 2), ("whisper", "eager", 6), ("whisper", "sdpa", 6), ("t5", "eager", 6), ("t5", "sdpa", 6),
    ("swin", "eager", 4), ("swin", "sdpa", 4), ("dinov2", "eager", 2), ("dinov2", "sdpa", 2), ("clip_text", "eager", 2),
    ("clip_text", "sdpa", 2), ("vit", "eager", 2), ("modernbert", "sdpa", 2), ("distilbert", "eager", 2), ("qwen3", "eager", 2),
)  # fmt: skip
QUICK = {("bert", "eager"), ("gemma3", "sdpa"), ("t5", "eager"), ("swin", "sdpa"), ("gpt2", "eager")}


@pytest.mark.parametrize(
    ("name", "attention", "count"), [pytest.param(*model, marks=() if model[:2] in QUICK else pytest.mark.slow) for model in MODELS]
)
def test_transformers(name: str, attention: str, count: int) -> None:
    """Every attention of tiny models, in float64; softmaxes that are written in float32 lose their cast, hence 1e-6 there."""
    pytest.importorskip("transformers")
    model, inputs = make(name, attention)
    model = model.double()
    inputs = {key: value.double() if isinstance(value, Tensor) and value.is_floating_point() else value for key, value in inputs.items()}
    program = capture(model, inputs)
    graph = normalize(program.graph)
    assert len(attentions(graph)) == count, [str(refusal) for refusal in attention_refusals(graph)]
    assert left_over(graph) == []
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    assert_same(graph.run(*tensors)[0], program.graph.run(*tensors)[0], 1e-6 if attention == "eager" else 1e-9)


GOLDEN = (
    "divided by sqrt(d)", "expanded heads", "causal by masked_fill with -1e9", "soft-cap, causal", "packed projection cut by unbind",
    "nn.MultiheadAttention, causal and padding", "dynamic batch and length, causal and padding",
)  # fmt: skip


@pytest.mark.parametrize(
    "name", GOLDEN, ids=lambda name: name.translate(str.maketrans({" ": "_", ",": None, "(": None, ")": None, ".": None}))
)
def test_golden(name: str, golden: Any) -> None:
    case = HANDWRITTEN[name]
    before = exported(case.module.eval(), case.inputs, case.dynamic)
    golden(f"{before}\n# raise_attention\n{raise_attention(before)}\n")


class Attributes(nn.Module):
    """Attention with a mask given as a constant."""

    def __init__(self, seen: Tensor, low: float) -> None:
        super().__init__()
        self.register_buffer("seen", seen)
        self.low = low

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return torch.softmax((query @ key.mT).masked_fill(~self.get_buffer("seen"), self.low), -1) @ value


def distance(rows: int, columns: int) -> Tensor:
    return torch.arange(columns) - torch.arange(rows)[:, None]


BANDS = {
    "causal": (distance(6, 6) <= 0, Band(right=0)),
    "window": ((distance(6, 6) <= 0) & (distance(6, 6) > -3), Band(left=2, right=0)),
    "both sides": (distance(6, 6).abs() <= 2, Band(left=2, right=2)),
    "sinks": ((distance(6, 6) <= 0) & ((distance(6, 6) > -2) | (torch.arange(6) < 2)), Band(left=1, right=0, sinks=2)),
    "after a cache": (distance(2, 6) <= 4, Band(right=0, offset=4)),
    "window after a cache": ((distance(2, 6) <= 4) & (distance(2, 6) > 1), Band(left=2, right=0, offset=4)),
    "not the query itself": (distance(6, 6) <= -1, Band(right=0, offset=-1)),
    "future only": (distance(6, 6) >= 1, Band(left=0, offset=1)),
    "nothing hidden": (torch.ones(6, 6, dtype=torch.bool), Band()),
    "no band": (distance(6, 6) % 2 == 0, None),
    "nothing seen": (torch.zeros(6, 6, dtype=torch.bool), None),
}


@pytest.mark.parametrize("name", BANDS)
def test_bands(name: str) -> None:
    seen, band = BANDS[name]
    assert band_of(seen) == band
    torch.manual_seed(0)
    inputs = tuple(torch.randn(2, 3, size, 8, dtype=torch.float64) for size in (seen.shape[0], seen.shape[1], seen.shape[1]))
    keeps_a_key = bool(seen.any(-1).all())
    for low in (float("-inf"), -1e9):
        module = Attributes(seen, low)
        graph = raise_attention(exported(module, inputs))
        (node,) = attentions(graph)
        assert_same(graph.run(*inputs)[0], module(*inputs))
        if band is not None and (keeps_a_key or low == float("-inf")):
            assert len(node.args) < 4 or node.args[3] is None
            assert {key: value for key, value in node.kwargs.items() if key != "scale"} == {
                key: value for key, value in vars(band).items() if value != getattr(Band(), key)
            }


def test_padding_stays_small() -> None:
    """A condition from the input keeps the shape [B, 1, 1, Tk] beside a causal mask, with lengths that are not known."""
    case = HANDWRITTEN["dynamic batch and length, causal and padding"]
    (node,) = attentions(normalize(capture(case.module, case.inputs, case.dynamic).graph))
    assert node.kwargs["right"] == 0
    assert [str(size) for size in node.args[3].meta["val"].shape][1:3] == ["1", "1"]


def test_shared_weights_are_refused_with_their_users() -> None:
    graph = exported(Plain(NEAR_MISSES["weights used twice"][0]), HANDWRITTEN["no scale"].inputs)
    (refusal,) = attention_refusals(graph)
    assert refusal.reason == "the attention weights softmax are used by matmul_1, mean; one product with a value is expected"
    assert refusal.site == "softmax"
