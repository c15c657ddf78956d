"""ToMe as a rewrite: what it promises, where it is refused, and a hand-written model to agree with."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import match_tokens, merge_tokens
from paretorch.ir.types import TensorType
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Refusal, Site
from paretorch.rewrites.token_merging.tome import RULE, example, rewrite, sites
from tests.zoo import Block, ViT, make

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation


def graph_of(model: nn.Module, inputs: tuple[Tensor, ...], dynamic_shapes: Any = None) -> Graph:
    return normalize(capture(model.eval(), inputs, dynamic_shapes).graph)


def offered(graph: Graph) -> tuple[list[Site], list[Refusal]]:
    found = list(sites(graph, analyze(graph)))
    return [site for site in found if isinstance(site, Site)], [refusal for refusal in found if isinstance(refusal, Refusal)]


def merged(graph: Graph, knob: int = 4, order: Callable[[list[Site]], list[Site]] = list) -> Graph:
    """The rule at every site."""
    found, refusals = offered(graph)
    assert not refusals, refusals
    for site in order(found):
        graph = rewrite(graph, site, knob)
    return graph


def without_size_bias(graph: Graph) -> Graph:
    """A broken twin: attention forgets the sizes."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "attention"):
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "key_bias"}
    return graph.clean()


class Plain(nn.Module):
    """x: [B, T, C] through blocks, then `read`."""

    def __init__(self, C: int = 8, H: int = 2, read: Callable[..., Any] = lambda x: x.mean(1), depth: int = 2, **block: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm, self.read = nn.ModuleList(Block(C, H, **block) for _ in range(depth)), nn.LayerNorm(C), read

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.read(self.norm(x))


# contracts


def test_r_0_is_the_identity() -> None:
    graph = example()
    site = offered(graph)[0][0]
    assert RULE.knobs[0] == 0
    assert rewrite(graph, site, 0) is graph


READS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda x: x.mean(1), "class": lambda x: x[:, 0], "sum": lambda x: x.sum(1), "rest": lambda x: x[:, 1:].mean(1),
    "max": lambda x: x.max(1)[0],
}  # fmt: skip


@pytest.mark.parametrize(
    ("read", "layout"), [*((read, "pre") for read in READS), *(("mean", layout) for layout in ("post", "sandwich", "parallel"))]
)
def test_equal_tokens_merge_exactly(read: str, layout: str) -> None:
    model = Plain(read=READS[read], layout=layout).double()
    first, pairs = torch.randn(2, 1, 8, dtype=torch.float64), torch.randn(2, 4, 8, dtype=torch.float64)
    twice = pairs.repeat_interleave(2, 1)  # alternate dealing puts one of each pair into either half
    x = torch.cat([first, twice] if read in ("class", "rest") else [twice, first], 1)  # these two protect the first token
    graph = graph_of(model, (x,))
    after = rewrite(graph, offered(graph)[0][0], 4)
    torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)
    wrong = without_size_bias(after).run(x)[0]
    assert (wrong - graph.run(x)[0]).abs().max() > 1e-6


def test_rows_of_a_batch_do_not_meet() -> None:
    model, _ = make("bert", T=16, B=4)
    ids, seen = torch.randint(0, 31, (4, 16)), (torch.arange(16) < torch.tensor([[16], [9], [12], [3]])).long()
    batch = torch.export.Dim("batch", min=1, max=64)
    graph = merged(graph_of(model.double(), (ids, seen), ({0: batch}, {0: batch})))
    together = graph.run(ids, seen)[0]
    for row in range(4):
        alone = graph.run(ids[row : row + 1], seen[row : row + 1])[0]
        torch.testing.assert_close(alone[0], together[row], **EXACT)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(graph.run(ids[order], seen[order])[0], together[order], **EXACT)


def test_what_padding_holds_changes_nothing() -> None:
    model, _ = make("bert", T=16, B=2)
    ids, seen = torch.randint(0, 31, (2, 16)), (torch.arange(16) < torch.tensor([[16], [7]])).long()
    graph = merged(graph_of(model.double(), (ids, seen)))
    other = torch.where(seen == 1, ids, (ids + 7) % 31)
    torch.testing.assert_close(graph.run(ids, seen)[0], graph.run(other, seen)[0], **EXACT)
    torch.testing.assert_close(
        graph.run(ids, seen)[0][1], model(ids, seen)[1], **EXACT
    )  # 4 of its 9 padding tokens a layer: nothing is lost
    assert torch.isfinite(graph.run(ids, seen * 0)[0]).all()


def test_tokens_read_by_place_are_protected() -> None:
    graph = merged(graph_of(*make("vit_registers", T=16)))
    assert {node.args[3] for node in graph.calls if is_op(node, "match_tokens")} == {4}


@pytest.mark.parametrize(
    ("read", "protected"), [(lambda x: x[:, 1:][:, 0], 2), (lambda x: x[:, :3][:, 1], 3), (lambda x: x[:, 1:][:, :3][:, 1], 4)]
)
def test_a_place_in_a_slice_is_counted_from_the_first_token(read: Callable[[Tensor], Tensor], protected: int) -> None:
    graph = merged(graph_of(Plain(read=read), (torch.randn(2, 20, 8),)))
    assert {node.args[3] for node in graph.calls if is_op(node, "match_tokens")} == {protected}


@pytest.mark.parametrize("places", [[-1], [0, 5]], ids=str)
def test_a_token_that_is_looked_up_has_its_own_row(places: list[int]) -> None:
    """Places in a list protect nothing: all tokens come back before they are looked up."""
    model = Plain(read=lambda x: x[:, places]).double()
    x = torch.randn(2, 5, 8, dtype=torch.float64).repeat_interleave(2, 1)
    graph = graph_of(model, (x,))
    after = merged(graph, 2)
    assert any(is_op(node, "unmerge_tokens") for node in after.calls)
    torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)


def test_the_order_of_choices_does_not_matter() -> None:
    model, inputs = make("vit_mean", T=40)
    graph = graph_of(model.double(), tuple(x.double() for x in inputs))
    inputs = tuple(x.double() for x in inputs)
    forward, backward = merged(graph, 8), merged(graph, 8, lambda found: found[::-1])
    assert not torch.allclose(forward.run(*inputs)[0], graph.run(*inputs)[0])
    torch.testing.assert_close(forward.run(*inputs)[0], backward.run(*inputs)[0], **EXACT)


def test_r_is_cut_to_what_is_left_and_one_place_merges_once() -> None:
    model, inputs = make("vit_mean", T=18)
    graph = graph_of(model, inputs)
    first, second = offered(graph)[0]
    after = rewrite(rewrite(graph, first, 8), second, 8)
    assert [node.args[2] for node in after.calls if is_op(node, "match_tokens")] == [8, 5]
    with pytest.raises(PlanError, match=r"merged after attention .* already"):
        rewrite(after, first, 4)
    with pytest.raises(PlanError, match="no self-attention is named nothing"):
        rewrite(graph, Site("nothing"), 4)


# parity


def vit_by_hand(model: ViT, images: Tensor, r: int, protected: int) -> Tensor:
    """ToMe written into a ViT: as its authors describe it, tokens that stay in their order."""
    x = model.patch(images).flatten(2).transpose(1, 2)
    x = torch.cat([model.special.expand(len(x), -1, -1), x], 1) + model.position
    size = torch.ones(x.shape[:2], dtype=x.dtype)
    for block in model.blocks:
        query, key, value = block.mix.project_in(block.norms[0](x), x)
        scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5 + size.log()[:, None, None, :]
        x = x + block.mix.project((scores.softmax(-1) @ value).transpose(1, 2).flatten(2))
        rows, sizes = [], []
        for one, metric, weight in zip(x, key.mean(1), size, strict=True):
            unit = F.normalize(metric[protected:], dim=-1)
            best, partner = (unit[::2] @ unit[1::2].T).max(-1)
            group = torch.arange(len(one))
            for source in best.argsort(descending=True)[:r].tolist():
                group[protected + 2 * source] = protected + 1 + 2 * partner[source]
            stay = group.unique()
            sizes.append(torch.stack([weight[group == token].sum() for token in stay]))
            rows.append(torch.stack([(one * weight[:, None])[group == token].sum(0) for token in stay]) / sizes[-1][:, None])
        x, size = torch.stack(rows), torch.stack(sizes)
        x = x + block.feed(block.norms[1](x))
    return model.head(model.norm(x)[:, 0])


@pytest.mark.parametrize("r", [4, 8])
def test_the_graph_agrees_with_a_vit_that_merges_by_hand(r: int) -> None:
    torch.manual_seed(1)
    model, images = ViT(33, 16, 4, depth=3).double().eval(), torch.randn(3, 3, 2, 64, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(merged(graph_of(model, (images,)), r).run(images)[0], vit_by_hand(model, images, r, 1), **EXACT)


# dataflow only


@pytest.mark.parametrize(("T", "C", "H", "B"), [(12, 12, 12, 12), (12, 24, 4, 1), (13, 12, 2, 12)])
def test_equal_lengths_and_other_names_change_nothing(T: int, C: int, H: int, B: int) -> None:
    def twin(scrambled: bool) -> tuple[Graph, Tensor]:
        torch.manual_seed(0)
        model = ViT(T, C, H)
        if scrambled:
            model = nn.ModuleDict({"zz": nn.Sequential(model)})["zz"]
        images = torch.randn(B, 3, 2, 2 * (T - 1), generator=torch.Generator().manual_seed(1))
        return merged(graph_of(model, (images,))), images

    graph, images = twin(False)
    other, _ = twin(True)
    tokens = [node.meta["val"].shape[2] for node in graph.calls if is_op(node, "attention")]
    assert tokens == [T, T - 4]
    assert torch.equal(graph.run(images)[0], other.run(images)[0])


class SequenceFirst(nn.Module):
    """torch's own encoder layer on [T, B, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.TransformerEncoderLayer(8, 2, 16, batch_first=False) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.mean(0)


class Frames(nn.Module):
    """Attention in each frame of [B, F, T, C]."""

    def __init__(self) -> None:
        super().__init__()
        self.space = nn.ModuleList(Block(8, 2) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        batch, frames, tokens, width = x.shape
        for block in self.space:
            x = block(x.reshape(batch * frames, tokens, width)).reshape(batch, frames, tokens, width)
        return x.mean((1, 2))


@pytest.mark.parametrize("model", [SequenceFirst(), Frames()])
def test_other_layouts(model: nn.Module) -> None:
    torch.manual_seed(0)
    half = torch.randn(2, 3, 5, 8, dtype=torch.float64).repeat_interleave(2, 2)
    x = half[:, 0].transpose(0, 1) if isinstance(model, SequenceFirst) else half
    graph = graph_of(model.double(), (x,))
    after = rewrite(graph, offered(graph)[0][0], 4)
    torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)
    assert (without_size_bias(after).run(x)[0] - graph.run(x)[0]).abs().max() > 1e-6


class MaskedMean(nn.Module):
    """A sentence encoder: padding masks its attention and its mean. expanded: the mask has the width of the tokens."""

    def __init__(self, expanded: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.expanded = nn.ModuleList(Block(8, 2, layout="post") for _ in range(2)), expanded

    def forward(self, x: Tensor, seen: Tensor) -> Tensor:
        mask = (1.0 - seen[:, None, None, :].to(x.dtype)) * torch.finfo(x.dtype).min
        for block in self.blocks:
            x = block(x, mask)
        weight = seen.unsqueeze(-1).expand(x.size()).to(x.dtype) if self.expanded else seen[..., None].to(x.dtype)
        return (x * weight).sum(1) / weight.sum(1).clamp(min=1e-9)


@pytest.mark.parametrize("expanded", [True, False])
def test_a_masked_mean_weighs_by_size(expanded: bool) -> None:
    model = MaskedMean(expanded).double()
    x = torch.randn(2, 6, 8, dtype=torch.float64).repeat_interleave(2, 1)
    seen = (torch.arange(12) < torch.tensor([[12], [8]])).long()
    graph = graph_of(model, (x, seen))
    after = rewrite(graph, offered(graph)[0][0], 4)
    torch.testing.assert_close(after.run(x, seen)[0], graph.run(x, seen)[0], **EXACT)


def test_cross_attention_sees_sizes() -> None:
    model, (spectrum, ids) = make("encoder_decoder", T=16)
    graph = graph_of(model, (spectrum, ids))
    after = graph
    for site in offered(graph)[0]:
        after = rewrite(after, site, 4)
    biased = [node for node in after.calls if is_op(node, "attention") and node.kwargs.get("key_bias") is not None]
    assert len(biased) == 3  # the encoder's second attention and both looks at its memory
    assert after.run(spectrum, ids)[0].shape == graph.run(spectrum, ids)[0].shape


# refusals


REFUSED: dict[str, tuple[Callable[[], tuple[nn.Module, tuple[Tensor, ...]]], str]] = {
    "causal": (lambda: make("gpt", T=12), "hides later tokens from earlier ones; merging tokens, or choosing which to drop, leaks"),
    "windows": (lambda: make("swin", T=8), "not one dimension beside its batch"),
    "few": (lambda: make("vit_registers", T=10), "10 tokens, 4 of them read by place, leave at most 3"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_sentence(name: str) -> None:
    make_model, sentence = REFUSED[name]
    found, refusals = offered(graph_of(*make_model()))
    assert not found
    assert any(re.search(sentence, refusal.reason) for refusal in refusals), refusals


def rotary(b: Builder, x: Any) -> Any:
    """One block whose keys are turned by their positions, then another."""
    table = b.constant("table", torch.randn(12, 4))
    for _ in range(2):
        heads = b.permute(b.view(x, [2, 12, 2, 4]), [0, 2, 1, 3])
        turned = b.mul(heads, table)
        mixed = b.permute(b.attention(turned, turned, heads, scale=0.5), [0, 2, 1, 3])
        x = b.add(x, b.call(torch.ops.aten.reshape.default, (mixed, [2, 12, 8])))
    return b.mean(x, [1])


def test_rotary_positions_downstream_are_refused() -> None:
    graph = build("rotary", rotary, x=TensorType("f32", (2, 12, 8)))
    found, refusals = offered(graph)
    assert [site.name for site in found] == ["attention_1"]  # after the last attention no position matters
    assert "combines the axis with a constant of shape [12, 4]" in refusals[0].reason


def test_an_unknown_number_of_tokens_is_refused() -> None:
    tokens = torch.export.Dim("tokens", min=4, max=64)
    _, refusals = offered(graph_of(Plain(), (torch.randn(2, 12, 8),), ({1: tokens},)))
    assert "tokens, a number not known before it runs" in refusals[0].reason


@pytest.mark.parametrize(
    ("tokens", "weakest", "strongest", "most"), [(17, 4, 8, 2), (197, 4, 96, 15), (1_501, 24, 640, 19), (6_000, 96, 2_560, 20)]
)
def test_steps_suit_the_number_of_tokens(tokens: int, weakest: int, strongest: int, most: int) -> None:
    """Up to half of them, and none so small that it could not be told from another."""
    for site in offered(example(1, tokens))[0]:
        assert site.values is not None
        assert (site.values[0], site.values[1], site.values[-1]) == (0, weakest, strongest)
        assert len(site.values) - 1 <= most


def test_types_and_stamps() -> None:
    model, inputs = make("vit_class", T=12)
    graph = merged(graph_of(model.bfloat16(), tuple(x.bfloat16() for x in inputs)))
    assert torch.isfinite(graph.run(*(x.bfloat16() for x in inputs))[0]).all()
    made = [node for node in graph.calls if node.meta.get("rule") == "tome"]
    assert {node.meta["site"] for node in made} == {"attention", "attention_1"}
    match, merge = (next(node for node in graph.calls if is_op(node, name)) for name in ("match_tokens", "merge_tokens"))
    assert [str(value.dtype) for value in merge.meta["val"]] == ["torch.bfloat16", "torch.float32"]
    metric = torch.randn(3, 12, 6).bfloat16()
    assert [a.shape for a in match_tokens(metric, None, 4, 1)] == [value.shape for value in match.meta["val"]]
    assert merge_tokens(metric, *match_tokens(metric, None, 4, 1))[0].shape == (3, 8, 6)


def test_golden(golden: Callable[[str], None]) -> None:
    before = example()
    first, second = offered(before)[0]
    golden(f"{before}\n# {RULE.name} r=4 at {first.name}, {second.name}\n{rewrite(rewrite(before, first, 4), second, 4)}")
