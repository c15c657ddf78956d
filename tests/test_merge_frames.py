"""Tokens merged across frames: which graphs show frames, and what every rule that merges promises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.tokens import source_map
from paretorch.ir.types import TensorType
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, layers, transformer
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.token_merging import merge_frames
from paretorch.rewrites.token_merging.frames import Frames, frames_of

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
WIDTH = 8


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


def cells(b: Builder, x: Node) -> Node:
    """[2, 8, 6, 8] as 3 x 4 cells, with the four places in a cell as samples of their own."""
    reshape = aten("reshape.default")
    cut = b.call(reshape, (b.permute(b.call(reshape, (x, [48, 2, 4, 2])), [0, 2, 1, 3]), [2, 8, 12, 4]))
    return b.call(reshape, (b.permute(cut, [0, 3, 2, 1]), [8, 12, 8]))


def test_rows_and_columns_of_a_picture_are_no_frames() -> None:
    assert frames_in(build("cells", lambda b, x: b.mean(layers(b, cells(b, x), Sizes(8, 12)), [1]), x=TensorType("f64", (2, 8, 6, 8)))) == [
        None
    ]
    assert frames_in(folded((2, 3, 6, 8), lambda b, x: convolved(b, x, 2), 12)) == [None]
    assert frames_in(folded((2, 2, 6, 8), patches, 12)) == [None]
    assert frames_in(transformer(Sizes(2, 13))) == [None]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "tubelet", "found"), [("VideoMAEModel", 2, Frames(0, 2, 4)), ("VivitModel", [1, 4, 4], Frames(1, 4, 4))])
def test_frames_of_library_models(name: str, tubelet: Any, found: Frames) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "num_frames": 4}
    small |= {"tubelet_size": tubelet} | ({"patch_size": 4} if name == "VideoMAEModel" else {})
    model, x = kind(kind.config_class(**small)).double().eval(), torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    graph = normalize(capture(model, (x,)).graph)
    assert frames_in(graph) == [found]
    (site, *_), _ = sites_of(merge_frames.RULE, graph)
    merged = apply_choice(merge_frames.RULE, graph, site.name, 0.48)
    assert [one.shape for one in merged.run(x) if isinstance(one, Tensor)] == [one.shape for one in graph.run(x) if isinstance(one, Tensor)]


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
    found, refusals = sites_of(merge_frames.RULE, transformer(Sizes(2, 13)))
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
    assert [shape_of(node)[2] for node in both.calls if is_op(node, "attention")] == [12, 8]
    assert both.run(x)[0].isfinite().all()
    x = torch.randn(2, 1, 1, WIDTH, dtype=torch.float64).expand(2, 4, 3, WIDTH)
    torch.testing.assert_close(both.run(x)[0], video().run(x)[0], **EXACT)
