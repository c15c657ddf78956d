"""Tokens chosen by the attention that they receive and by the frame before: the ops against plain loops, and the two rules that use them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.fx import Node

from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.ir.analyze import analyze
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.token_context import match_to_context, match_to_frame_before, places_among, received_weights
from paretorch.ir.ops.tokens import log_size, merge_tokens, source_map
from paretorch.ir.types import TensorType
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, layers
from paretorch.rewrites.token_merging import merge_frames, visionzip
from paretorch.rewrites.token_merging.frames import Frames, frames_of
from paretorch.rewrites.token_merging.progressive import shorten
from tests.test_token_choice import check_match

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
DRAWN = settings(max_examples=25, deadline=None, derandomize=True)
WIDTH = 8


def cosines(metric: Tensor) -> Tensor:
    unit = F.normalize(metric, dim=-1)
    return unit @ unit.T


# ---- ops


@pytest.mark.parametrize(("kv_heads", "softcap"), [(4, 0.0), (2, 0.0), (1, 3.0)])
def test_received_weights_are_the_mean_of_all_rows(kv_heads: int, softcap: float) -> None:
    query, key = torch.randn(2, 4, 7, 6, dtype=torch.float64), torch.randn(2, kv_heads, 7, 6, dtype=torch.float64)
    size = torch.randint(0, 3, (2, 7)).double()
    size[:, 0] = 1.0
    value = torch.eye(7, dtype=torch.float64).expand(2, kv_heads, 7, 7)
    rows = attention(query, key, value, None, log_size(size), scale=0.4, softcap=softcap).mean(1)
    wanted = (rows * size[..., None]).sum(1) / size.sum(1, keepdim=True)
    torch.testing.assert_close(received_weights(query, key, size, 0.4, softcap), wanted)
    plain = attention(query, key, value, None, None, scale=0.4, softcap=softcap).mean((1, 2))
    torch.testing.assert_close(received_weights(query, key, None, 0.4, softcap), plain)
    assert received_weights(query, key, size * 0, 0.4).isfinite().all()


def in_context(weight: Tensor, size: Tensor, count: int, protected: int, metric: Tensor, contextual: int) -> dict[int, int]:
    """Each token that goes, and the one that takes it in."""
    near = cosines(metric)
    ranked = sorted(range(protected, len(weight)), key=lambda i: (-float(weight[i]) if size[i] > 0 else 1.0, i))
    rest = sorted(ranked[len(ranked) - count - contextual :], key=lambda i: (not size[i] > 0, i))
    real = max(contextual, sum(bool(size[i] > 0) for i in rest))
    targets = [rest[number * real // contextual] for number in range(contextual)]
    return {i: max(targets, key=lambda j: float(near[i, j]) if size[j] > 0 else -9.0) for i in rest if i not in targets}


@DRAWN
@given(st.integers(3, 20), st.integers(0, 3), st.integers(1, 12), st.integers(1, 4), st.integers(0, 10**6))
def test_the_least_seen_join_the_likest_at_even_steps(tokens: int, protected: int, count: int, contextual: int, seed: int) -> None:
    if count + contextual > tokens - protected:
        return
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(0, 4, (2, tokens), generator=generator).double()
    weight = torch.rand(2, tokens, generator=generator, dtype=torch.float64)
    joins = [in_context(weight[b], size[b], count, protected, metric[b], contextual) for b in range(2)]
    check_match(match_to_context(weight, size, count, protected, metric, contextual), tokens, joins, protected)
    ones = torch.ones(2, tokens, dtype=torch.float64)
    for one, other in zip(*(match_to_context(weight, s, count, protected, metric, contextual) for s in (None, ones)), strict=True):
        assert torch.equal(one, other)


def still(metric: Tensor, size: Tensor, count: int, protected: int, frames: int) -> dict[int, int]:
    """Each token that goes, and the last at its place before it that stays."""
    near, places = cosines(metric), (len(metric) - protected) // frames
    later = range(protected + places, len(metric))
    like = {i: torch.inf if size[i] == 0 else -torch.inf if size[i - places] == 0 else float(near[i, i - places]) for i in later}
    goes = set(sorted(later, key=lambda i: (-like[i], i))[:count])

    def stays(i: int) -> int:
        return stays(i - places) if i in goes else i

    return {i: stays(i) for i in goes}


@DRAWN
@given(st.integers(2, 6), st.integers(1, 4), st.integers(0, 2), st.integers(1, 20), st.integers(0, 10**6))
def test_what_stands_still_joins_the_last_that_stays(frames: int, places: int, protected: int, count: int, seed: int) -> None:
    tokens, count = protected + frames * places, min(count, (frames - 1) * places)
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, tokens, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(0, 4, (2, tokens), generator=generator).double()
    joins = [still(metric[b], size[b], count, protected, frames) for b in range(2)]
    match = match_to_frame_before(metric, size, count, protected, frames)
    check_match(match, tokens, joins, protected + places)
    _, new_size = merge_tokens(metric, *match, size)
    torch.testing.assert_close(new_size.sum(1), size.sum(1))


def test_ties_go_to_the_lowest_place() -> None:
    alike = torch.ones(1, 9, 4)
    assert match_to_context(alike[..., 0], None, 4, 1, alike, 2)[1].tolist() == [[4, 5, 7, 8]]  # 3 and 6 are the targets
    assert match_to_frame_before(alike, None, 3, 1, 4)[1].tolist() == [[3, 4, 5]]


def test_padding_goes_first_out_of_the_context() -> None:
    torch.manual_seed(0)
    metric, weight = torch.randn(3, 14, 5), torch.rand(3, 14)
    size = (torch.arange(14) < torch.tensor([[8], [8], [0]])).float()
    kept, source, _ = match_to_context(weight, size, 5, 1, metric, 1)
    assert (source[:2] >= 8).all()
    assert torch.equal(kept[:2, :8], torch.arange(8).expand(2, -1))


def test_places_among_others() -> None:
    assert places_among(torch.tensor([[0, 2], [1, 3]]), 2, 1, 4).tolist() == [[0, 1, 2, 4, 6], [0, 1, 3, 5, 6]]


def test_onnx() -> None:
    """Every op, exported by its definition, on a batch with padding."""

    def outputs(b: Builder, query: Node, key: Node, size: Node) -> tuple[Node, ...]:
        metric, weight = b.mean(key, [1]), b.received_weights(query, key, size, 0.5)
        context = b.match_to_context(weight, size, 6, 1, metric, 3)
        plain = b.match_to_context(weight, None, 6, 1, metric, 3)
        before = b.match_to_frame_before(metric, size, 6, 1, 4)
        indices = [b.item(match, number) for match in (context, plain, before) for number in range(3)]
        return (weight, *indices, b.places_among(indices[0], 2, 3, 17))

    shapes = {"query": (2, 2, 17, 4), "key": (2, 2, 17, 4), "size": (2, 17)}
    graph = build("choices", outputs, **{name: TensorType("f32", shape) for name, shape in shapes.items()})  # type: ignore[arg-type]
    torch.manual_seed(0)
    size = (torch.arange(17) < torch.tensor([[17], [11]])).float()
    check_onnx(to_onnx(graph), graph, (torch.randn(2, 2, 17, 4), torch.randn(2, 2, 17, 4), size), 1e-5)


# ---- visionzip


def encoder(read: Callable[[Builder, Node], Node], tokens: int = 13) -> Graph:
    sizes = Sizes(2, tokens)
    return build("encoder", lambda b, x: read(b, layers(b, x, sizes)), x=TensorType("f64", (2, tokens, WIDTH)))


READ: dict[str, tuple[Callable[[Builder, Node], Node], list[int] | None]] = {  # and whose rows of attention count; None for all
    "class token": (lambda b, x: b.select(x, 1, 0), [0]),
    "second token": (lambda b, x: b.select(x, 1, 1), [1]),
    "all but a class token": (lambda b, x: b.mean(b.slice(x, 1, 1, 2**63 - 1), [1]), [0]),
    "mean": (lambda b, x: b.mean(x, [1]), None),
}


@pytest.mark.parametrize("read", READ)
def test_tokens_are_ranked_by_the_class_token_where_there_is_one(read: str) -> None:
    make_read, places = READ[read]
    graph = apply_choice(visionzip.RULE, encoder(make_read), "attention", 0.48)
    ranks = [node for node in graph.calls if is_op(node, "class_weights", "received_weights")]
    assert [node.args[3] if is_op(node, "class_weights") else None for node in ranks] == [places]
    assert graph.run(torch.randn(2, 13, WIDTH, dtype=torch.float64))[0].isfinite().all()


def test_nearly_all_tokens_may_go() -> None:
    graph = encoder(READ["mean"][0], 37)
    found, _ = sites_of(visionzip.RULE, graph)
    assert [site.values[-1] for site in found] == [0.8889, 0.8889]  # type: ignore[index]
    fewer = apply_choice(visionzip.RULE, graph, "attention", 0.8889)
    (match,) = [node for node in fewer.calls if is_op(node, "match_to_context")]
    assert match.args[2:4] == (32, 0)
    assert shape_of(next(node for node in fewer.calls if is_op(node, "merge_tokens")).users.__iter__().__next__()) == (2, 5, WIDTH)


# ---- prompts


def assistant(read: str, causal: bool = True, classes: int = 0) -> Graph:
    """Nine tokens of a picture between two words and four, positions added to all, and what is read of them. classes: tokens in front of the
    picture's that are cut off behind the tower."""

    def model(b: Builder, picture: Node, words: Node) -> Node:
        seen = layers(b, picture, Sizes(2, 9 + classes))
        seen = b.slice(seen, 1, classes, 2**63 - 1) if classes else seen
        weight = torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
        bridged = b.gelu(b.linear(seen, b.constant("bridge", weight)))
        joined = b.call(aten("cat.default"), ([b.slice(words, 1, 0, 2), bridged, b.slice(words, 1, 2, 6)], 1))
        places = torch.randn(15, WIDTH, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        x = layers(b, b.add(joined, b.constant("places", places)), Sizes(2, 15, causal=causal))
        made = {
            "last": lambda: b.select(x, 1, -1), "last by place": lambda: b.select(x, 1, 14), "answer": lambda: b.slice(x, 1, 11, 2**63 - 1),
            "first": lambda: b.select(x, 1, 1), "picture": lambda: b.select(x, 1, 4), "all": lambda: x, "mean": lambda: b.mean(x, [1]),
        }  # fmt: skip
        return made[read]()

    return build("assistant", model, picture=TensorType("f64", (2, 9 + classes, WIDTH)), words=TensorType("f64", (2, 6, WIDTH)))


def asked(classes: int = 0) -> tuple[Tensor, Tensor]:
    torch.manual_seed(4)
    return torch.randn(2, 9 + classes, WIDTH, dtype=torch.float64), torch.randn(2, 6, WIDTH, dtype=torch.float64)


def lengths(graph: Graph) -> list[int]:
    return [int(shape_of(node)[2]) for node in graph.calls if is_op(node, "attention")]


def hidden(graph: Graph, kept: Tensor) -> Graph:
    """The prompt at full length, with all but the kept tokens of the picture hidden from its attention."""
    stays = torch.ones(2, 15, dtype=torch.bool)
    stays[:, 2:11] = torch.zeros(2, 9, dtype=torch.bool).scatter(1, kept, True)
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "attention") and shape_of(node)[2] == 15:
            mask = Builder(graph, node).constant("stays", stays[:, None, None, :])
            node.kwargs = {**node.kwargs, "mask": mask}
    return graph


@pytest.mark.parametrize(("read", "classes"), [("last", 0), ("last by place", 0), ("answer", 0), ("first", 0), ("answer", 2)])
def test_a_prompt_is_as_if_the_others_had_been_hidden(read: str, classes: int) -> None:
    graph, inputs = assistant(read, classes=classes), asked(classes)
    shorter = apply_choice(visionzip.RULE, graph, "attention", 0.6667)
    assert lengths(shorter) == [9 + classes, 3 + classes, 9, 9]
    assert not any(is_op(node, "unmerge_tokens") for node in shorter.calls)
    back = shorten(visionzip.TECHNIQUE, graph, next(site for site in sites_of(visionzip.RULE, graph)[0]), 0.6667)
    assert lengths(back) == [9 + classes, 3 + classes, 15, 15]
    chosen = back.copy()
    match = next(node for node in chosen.calls if is_op(node, "match_to_context"))
    chosen.set_outputs([Builder(chosen, chosen.output_node).item(match, 0)])
    kept = chosen.run(*inputs)[0][:, classes:] - classes
    found, wanted = shorter.run(*inputs)[0], hidden(back, kept).run(*inputs)[0]
    torch.testing.assert_close(found, wanted, **EXACT)
    if read != "first":  # words in front of the picture do not see it
        assert (found - graph.run(*inputs)[0]).abs().max() > 1e-6


@pytest.mark.parametrize(("read", "causal"), [("picture", True), ("all", True), ("mean", True), ("last", False)])
def test_a_prompt_that_is_needed_whole_stays(read: str, causal: bool) -> None:
    graph = assistant(read, causal)
    fewer = apply_choice(visionzip.RULE, graph, "attention", 0.6667)
    assert lengths(fewer) == [9, 3, 15, 15]
    assert [shape_of(node) for node in fewer.outputs] == [shape_of(node) for node in graph.outputs]
    assert fewer.run(*asked())[0].isfinite().all()


def test_a_prompt_is_shortened_twice() -> None:
    graph, inputs = assistant("last"), asked()
    for names in (("attention", "attention_1"), ("attention_1", "attention")):
        twice = graph
        for name in names:
            twice = apply_choice(visionzip.RULE, twice, name, 0.32)
        found = twice.run(*inputs)[0]
        assert found.isfinite().all()
        alone = [twice.run(*(x[[row, row]] for x in inputs))[0][0] for row in range(2)]
        torch.testing.assert_close(found, torch.stack(alone), **EXACT)
        assert lengths(twice)[2:] == ([11, 11] if names[0] == "attention" else [13, 13])


# ---- merge_frames


def video(read: str = "mean", first: int = 0, frames: int = 4, places: int = 3) -> Graph:
    """Frames of places folded into tokens, behind leading tokens; mean, first token, or all tokens of two layers."""
    tokens = first + frames * places

    def model(b: Builder, x: Node) -> Node:
        rows = b.call(aten("reshape.default"), (x, [2, frames * places, WIDTH]))
        if first:
            lead = torch.randn(2, first, WIDTH, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
            rows = b.call(aten("cat.default"), ([b.constant("lead", lead), rows], 1))
        rows = layers(b, rows, Sizes(2, tokens))
        return {"mean": lambda: b.mean(rows, [1]), "class": lambda: b.select(rows, 1, 0), "all": lambda: rows}[read]()

    return build("video", model, x=TensorType("f64", (2, frames, places, WIDTH)))


def frames_in(graph: Graph) -> list[Frames | None]:
    facts = analyze(graph)
    return [frames_of(graph, facts.axes, axis) for axis in facts.axes.tokens]


def folded(shape: tuple[int, ...], fold: Callable[[Builder, Node], Node], tokens: int) -> Graph:
    return build("folded", lambda b, x: b.mean(layers(b, fold(b, x), Sizes(2, tokens)), [1]), x=TensorType("f64", shape))


def convolved(b: Builder, x: Node, rank: int) -> Node:
    weight = b.constant("taps", torch.randn(WIDTH, 3, *[1, 2, 2][3 - rank :], dtype=torch.float64))
    found = b.call(getattr(torch.ops.aten, f"conv{rank}d").default, (x, weight, None, [1, 2, 2][3 - rank :]))
    tokens = int(torch.tensor(shape_of(found)[2:]).prod())
    return b.permute(b.call(aten("reshape.default"), (found, [shape_of(found)[0], WIDTH, tokens])), [0, 2, 1])


def test_frames_are_read_off_the_graph() -> None:
    assert frames_in(video()) == [Frames(0, 4, 3)]
    assert frames_in(video("class", 2)) == [Frames(2, 4, 3)]
    reshape = aten("reshape.default")
    assert frames_in(folded((2, 4, 3, 2, WIDTH), lambda b, x: b.call(reshape, (x, [2, 24, WIDTH])), 24)) == [Frames(0, 4, 6)]
    assert frames_in(folded((8, 3, WIDTH), lambda b, x: b.call(reshape, (x, [2, 12, WIDTH])), 12)) == [Frames(0, 4, 3)]
    assert frames_in(folded((2, 3, 4, 4, 6), lambda b, x: convolved(b, x, 3), 24)) == [Frames(0, 4, 6)]


def patches(b: Builder, x: Node) -> Node:
    """[2, 2, 6, 8] as the patches of a picture, 3 x 4 of them, without a convolution."""
    reshape = aten("reshape.default")
    cut = b.permute(b.call(reshape, (x, [2, 2, 3, 2, 4, 2])), [0, 2, 4, 1, 3, 5])
    return b.call(reshape, (b.call(reshape, (cut, [2, 3, 4, WIDTH])), [2, 12, WIDTH]))


def test_rows_and_columns_of_a_picture_are_no_frames() -> None:
    assert frames_in(folded((2, 3, 6, 8), lambda b, x: convolved(b, x, 2), 12)) == [None]
    assert frames_in(folded((2, 2, 6, 8), patches, 12)) == [None]
    assert frames_in(encoder(READ["mean"][0])) == [None]


def test_what_stands_still_merges_exactly() -> None:
    """Three frames that are equal, then a new one; sizes are what makes it exact."""
    torch.manual_seed(0)
    x = torch.randn(2, 4, 3, WIDTH, dtype=torch.float64)
    x[:, 1:3] = x[:, :1]
    for read, first in (("mean", 0), ("class", 2), ("all", 0)):
        graph = video(read, first)
        merged = apply_choice(merge_frames.RULE, graph, "attention", 0.5)  # six of twelve
        torch.testing.assert_close(merged.run(x)[0], graph.run(x)[0], **EXACT)
        forgetful = merged.copy()
        for node in forgetful.calls:
            if is_op(node, "attention"):
                node.kwargs = {key: value for key, value in node.kwargs.items() if key != "key_bias"}
        assert (forgetful.run(x)[0] - graph.run(x)[0]).abs().max() > 1e-6


def test_frames_keep_what_every_rule_promises() -> None:
    torch.manual_seed(1)
    x = torch.randn(2, 4, 3, WIDTH, dtype=torch.float64)
    graph = video("class", 2)
    assert apply_choice(merge_frames.RULE, graph, "attention", 0.0) is graph
    merged = apply_choice(merge_frames.RULE, graph, "attention", 0.5)
    other = x.clone()
    other[1] = torch.randn(4, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(merged.run(other)[0][0], merged.run(x)[0][0])
    match = next(node for node in merged.calls if is_op(node, "match_to_frame_before"))
    watched = merged.copy()
    b = Builder(watched, watched.output_node)
    node = watched.node(match.name)
    assert node is not None
    watched.set_outputs([b.item(node, number) for number in range(3)])
    kept, source, target = watched.run(x)
    assert torch.equal(kept[:, :5], torch.arange(5).expand(2, -1))  # what leads, and the first frame
    places = source_map(kept, source, target)
    assert torch.equal(places.gather(1, kept), torch.arange(8).expand(2, -1))
    assert ((source - 2) % 3 == (kept.gather(1, target) - 2) % 3).all()


def test_frames_are_refused_with_a_sentence() -> None:
    found, refusals = sites_of(merge_frames.RULE, encoder(READ["mean"][0]))
    assert not found
    assert "nothing in the graph tells that the 13 tokens of attention" in refusals[0].reason
    within = build(
        "within",
        lambda b, x: b.select(layers(b, b.call(aten("reshape.default"), (x, [2, 12, WIDTH])), Sizes(2, 12)), 1, 0),
        x=TensorType("f64", (2, 4, 3, WIDTH)),
    )
    assert "1 leading tokens are read by place, and only 0 stand" in sites_of(merge_frames.RULE, within)[1][0].reason
    (tome,) = rules_named(["tome"])
    with pytest.raises(PlanError, match="nothing in the graph tells"):
        apply_choice(merge_frames.RULE, apply_choice(tome, video(), "attention", 4), "attention_1", 0.32)


def test_a_step_put_in_before_frames_brings_its_tokens_back() -> None:
    torch.manual_seed(1)
    x: Any = torch.randn(2, 4, 3, WIDTH, dtype=torch.float64)
    (tome,) = rules_named(["tome"])
    later = apply_choice(merge_frames.RULE, video(), "attention_1", 0.32)
    both = apply_choice(tome, later, "attention", 4)
    assert lengths(both) == [12, 8]
    assert both.run(x)[0].isfinite().all()
    x = torch.randn(2, 1, 1, WIDTH, dtype=torch.float64).expand(2, 4, 3, WIDTH)
    torch.testing.assert_close(both.run(x)[0], video().run(x)[0], **EXACT)


def test_golden_prompt(golden: Callable[[str], None]) -> None:
    before = assistant("last by place")
    golden(f"{before}\n# visionzip at attention = 0.6667\n{apply_choice(visionzip.RULE, before, 'attention', 0.6667)}")
