"""Frames of a video joined in an image encoder: which graphs show them, who may read what is left, and what every rule that merges promises."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from paretorch.capture import capture
from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.conflicts import Conflicts
from paretorch.ir.analyze import analyze
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, arguments, shape_of, tensor_type
from paretorch.ir.ops import aten, is_op
from paretorch.ir.ops.clips import fold_frames, unfold_frames
from paretorch.ir.ops.tokens import is_match, source_map
from paretorch.ir.types import TensorType
from paretorch.ir.verify import verify
from paretorch.plan import Choice
from paretorch.rewrites import RULES, rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, layers, transformer
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.token_merging.place import Place, find_place
from paretorch.rewrites.token_merging.tempme import RULE, example
from tests.frame_models import CLASSES, FRAMES, READS, Adapters, Chunks, Deep, FlatFrames, FrameEncoder, Library, video
from tests.zoo import make

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
WIDTH = 8


@cache
def encoder(read: str, depth: int = 2, frames: int = FRAMES, flat: bool = False) -> Graph:
    model = (FlatFrames if flat else FrameEncoder)(read, depth).double().eval()
    x = video(frames=frames)
    return normalize(capture(model, (x.flatten(0, 1) if flat else x,)).graph)


def joined(graph: Graph, *sites: str, share: float = 0.3) -> Graph:
    for site in sites:
        graph = apply_choice(RULE, graph, site, share)
        verify(graph, RULE.name)
    return graph


def rows_and_tokens(graph: Graph) -> list[tuple[Any, Any]]:
    """Of every attention."""
    return [(shape_of(node)[0], shape_of(node)[2]) for node in graph.calls if is_op(node, "attention")]


def names(graph: Graph) -> set[str]:
    return {node.target._schema.name.split("::")[1] for node in graph.calls if hasattr(node.target, "_schema")}


def watched(graph: Graph, number: int = 0) -> Graph:
    """The graph with the three outputs of one match and the sizes behind it in place of its outputs."""
    graph = graph.copy()
    match = [node for node in graph.calls if is_match(node)][number]
    merge = next(node for node in graph.calls if is_op(node, "merge_tokens") and node.args[1].args[0] is match)  # type: ignore[union-attr]
    b = Builder(graph, graph.output_node)
    graph.set_outputs([*(b.item(match, place) for place in range(3)), b.item(merge, 1)])
    return graph


def without(graph: Graph, name: str) -> Graph:
    """A broken twin: attention forgets the sizes, or the mean does."""
    graph = graph.copy()
    for node in graph.calls:
        if is_op(node, "attention") and name == "key_bias":
            node.kwargs = {key: value for key, value in node.kwargs.items() if key != "key_bias"}
        elif is_op(node, "weigh_tokens") and name == "weigh_tokens":
            graph.replace(node, node.args[0])  # type: ignore[arg-type]
    return graph.clean()


def differ(left: Graph, right: Graph, x: Tensor) -> float:
    return max(float((one - two).abs().max()) for one, two in zip(left.run(x), right.run(x), strict=True))


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 3), st.integers(2, 4), st.integers(1, 5), st.integers(1, 3))
def test_folding_deals_the_tokens_place_by_place(batch: int, count: int, tokens: int, width: int) -> None:
    x = torch.arange(batch * count * tokens * width).reshape(batch * count, tokens, width)
    folded = fold_frames(x, count)
    for row in range(batch):
        for place in range(tokens):
            for frame in range(count):
                assert torch.equal(folded[row, place * count + frame], x[row * count + frame, place])
    assert torch.equal(unfold_frames(folded, count), x)


def place_of(graph: Graph, site: str = "attention") -> Place | str:
    facts = analyze(graph)
    axis = next(axis for axis in facts.axes.tokens if site in axis.mixers)
    return find_place(graph, facts, axis, site, folds=True)


def test_frames_are_read_off_the_batch() -> None:
    for graph in (encoder("mean of means"), encoder("mean of classes"), encoder("mean of classes", flat=True), example()):
        place = place_of(graph)
        assert isinstance(place, Place)
        assert place.clips is not None
        assert (place.clips.frames, place.fold) == (4, 2)
    alone = normalize(capture(FrameEncoder().double().eval(), (video(1),)).graph)
    assert rows_and_tokens(joined(alone, "attention")) == [(4, 6), (2, 9)]
    thirds = joined(example(frames=9, places=6), "attention")
    assert rows_and_tokens(thirds) == [(18, 6), (6, 13)]


def test_the_low_end_is_the_graph_itself() -> None:
    graph = encoder("mean of means")
    assert apply_choice(RULE, graph, "attention", 0.0) is graph


def test_golden(golden: Callable[[str], None]) -> None:
    """Two layers of an encoder whose class tokens are read, frame by frame."""
    sizes = Sizes(8, 5)

    def model(b: Builder, x: Node) -> Node:
        rows = layers(b, b.call(aten("reshape.default"), (x, [8, 5, WIDTH])), sizes)
        return b.mean(b.call(aten("reshape.default"), (b.select(rows, 1, 0), [2, 4, WIDTH])), [1])

    before = build("frames", model, x=TensorType("f32", (2, 4, 5, WIDTH)))
    golden(
        f"{before}\n# tempme at attention = 0.3, at attention_1 = 0.24\n{joined(joined(before, 'attention'), 'attention_1', share=0.24)}"
    )


@pytest.mark.parametrize(("read", "flat"), [*((read, False) for read in READS), ("mean of classes", True), ("mean of means", True)])
def test_equal_frames_merge_exactly(read: str, flat: bool) -> None:
    graph, still, moving = encoder(read, flat=flat), video(still=True), video()
    still, moving = (still.flatten(0, 1), moving.flatten(0, 1)) if flat else (still, moving)
    after = joined(graph, "attention")
    assert rows_and_tokens(after)[:2] == [(8, 6 + (read in CLASSES)), (4, 9 + 2 * (read in CLASSES))]
    assert [tensor_type(node) for node in after.outputs] == [tensor_type(node) for node in graph.outputs]
    assert differ(after, graph, still) < EXACT["atol"]
    assert differ(without(after, "key_bias"), graph, still) > 1e-6
    assert differ(after, graph, moving) > 1e-6
    if flat or read == "watch":
        assert differ(joined(graph, "attention", "attention_1"), graph, still) < EXACT["atol"]


def test_the_mean_counts_sizes() -> None:
    """An affine map may stand before the mean over tokens or behind it: it is the same on clips, also where frames differ."""
    graph, still = encoder("mean of means"), video(still=True)
    after = joined(graph, "attention")
    assert differ(without(after, "weigh_tokens"), graph, still) > 1e-6

    def model(b: Builder, x: Node, pooled: bool) -> Node:
        rows = layers(b, b.call(aten("reshape.default"), (x, [8, 5, WIDTH])), Sizes(8, 5))
        weight = b.constant("last", torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(9), dtype=torch.float64))
        mean = b.mean(b.linear(rows, weight), [1]) if not pooled else b.linear(b.mean(rows, [1]), weight)
        return b.mean(b.call(aten("reshape.default"), (mean, [2, 4, WIDTH])), [1])

    x = torch.randn(2, 4, 5, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    first, second = (
        joined(build("means", lambda b, x, p=p: model(b, x, p), x=TensorType("f64", (2, 4, 5, WIDTH))), "attention") for p in (False, True)
    )
    torch.testing.assert_close(first.run(x)[0], second.run(x)[0], **EXACT)


# What is left of the frames in the graph, by what is read: the mean of the clips, class tokens, or all tokens by the map.
FORMS = {
    "mean of means": {"weigh_tokens"},
    "mean of all": {"weigh_tokens"},
    "mean of classes": {"unfold_frames"},
    "flow": {"unfold_frames"},
    "watch": {"unfold_frames"},
    "classes and patches": {"unfold_frames", "unmerge_tokens"},
    "all tokens": {"unfold_frames", "unmerge_tokens", "weigh_tokens"},
    "volume": {"unfold_frames", "unmerge_tokens"},
    "means of frames": {"unfold_frames", "unmerge_tokens"},
    "sum of means": {"unfold_frames", "unmerge_tokens"},
    "largest of means": {"unfold_frames", "unmerge_tokens"},
    "mean of sums": {"unfold_frames", "unmerge_tokens"},
    "mean of gates": {"unfold_frames", "unmerge_tokens"},
    "mean of squares": {"unfold_frames", "unmerge_tokens"},
    "mean of directions": {"unfold_frames", "unmerge_tokens"},
}


def test_who_reads_what() -> None:
    assert set(FORMS) == set(READS)
    for read, wanted in FORMS.items():
        assert names(joined(encoder(read), "attention")) & {"weigh_tokens", "unfold_frames", "unmerge_tokens"} == wanted, read


def test_every_token_of_every_frame_comes_back() -> None:
    """In the order of frames and places, each as the row that it is part of."""
    graph = encoder("all tokens", depth=1)
    after = joined(graph, "attention").copy()
    merge = next(node for node in after.calls if is_op(node, "merge_tokens"))
    value = merge.args[0].args[0]  # type: ignore[union-attr]
    unfolded = next(node for node in after.calls if is_op(node, "unfold_frames"))
    match = watched(after)
    places = source_map(*match.run(video())[:3])
    after.set_outputs([value, unfolded])
    whole, back = after.run(video())
    assert whole.shape == back.shape
    folded = fold_frames(back, 2)
    for row in range(4):  # tokens of one row of a clip are equal once they are back
        for place in range(9):
            group = folded[row, places[row] == place]
            assert torch.equal(group, group[:1].expand_as(group))


def test_samples_do_not_meet() -> None:
    for read in ("mean of classes", "all tokens"):
        graph = joined(encoder(read), "attention", "attention_1")
        x, other = video(), video()
        other[1] = torch.randn(other[1].shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
        for one, two in zip(graph.run(x), graph.run(other), strict=True):
            torch.testing.assert_close(one[0], two[0], **EXACT)


def test_leading_tokens_stay_and_the_map_reconstructs() -> None:
    graph = joined(encoder("mean of classes"), "attention")
    kept, source, target, size = watched(graph).run(video())
    assert torch.equal(kept[:, :2], torch.arange(2).expand(4, -1))  # the class tokens of both frames
    places = source_map(kept, source, target)
    assert torch.equal(places.gather(1, kept), torch.arange(kept.shape[1]).expand(4, -1))
    counts = torch.nn.functional.one_hot(places, kept.shape[1]).sum(1)
    assert torch.equal(size, counts.double())
    assert (counts.sum(1) == 2 * 7).all()
    kept, source, target, _ = watched(graph).run(video(still=True))
    paired = source_map(kept, source, target)
    assert all(paired[row, token] == paired[row, (token & ~1) + 1] for row in range(4) for token in source[row].tolist())  # its own double


def test_any_batch() -> None:
    size = torch.export.Dim("batch", min=1, max=64)
    for model, shape in ((FrameEncoder("all tokens"), {0: size}), (FlatFrames("mean of classes"), {0: FRAMES * size})):
        flat = isinstance(model, FlatFrames)
        x = video().flatten(0, 1) if flat else video()
        graph = normalize(capture(model.double().eval(), (x,), (shape,)).graph)
        after = joined(graph, "attention", "attention_1")
        for batch in (1, 3, 7):
            still = video(batch, still=True)
            assert differ(after, graph, still.flatten(0, 1) if flat else still) < EXACT["atol"]


def test_clips_fold_again() -> None:
    """Twelve frames by two, two and three, as the paper has it."""
    for read in ("mean of classes", "all tokens"):
        graph = encoder(read, 4, 12)
        after = joined(graph, "attention", "attention_1", "attention_2", share=0.24)
        assert [rows for rows, _ in rows_and_tokens(after)] == [24, 12, 6, 2]
        assert differ(after, graph, video(frames=12, still=True)) < EXACT["atol"]
        assert differ(without(after, "key_bias"), graph, video(frames=12, still=True)) > 1e-6
        assert not any(site.name == "attention_3" for site in sites_of(RULE, after)[0])  # no frames are left


@pytest.mark.parametrize("other", ["pitome", "visionzip"])
def test_with_other_steps(other: str) -> None:
    """Before it and behind it, in whichever order they are put in, each finds the leading tokens that must stay."""
    graph, (rule,) = encoder("mean of classes", 3), rules_named([other])
    for first, second, steps in ((rule, RULE, "first"), (RULE, rule, "last")):
        for order in (0, 1):
            pairs = [(first, "attention"), (second, "attention_1")]
            after = graph
            for step, site in pairs[::-1] if order else pairs:
                after = apply_choice(step, after, site, 0.16 if step is RULE else 0.24)
                verify(after, step.name)
            matches = {node.meta["rule"]: arguments(node)["protected"] for node in after.calls if is_match(node)}
            behind = steps == "last" and not order
            assert matches == {RULE.name: 2, other: 2 if behind else 1}
            assert after.run(video())[0].isfinite().all()


def test_sizes_of_an_earlier_step_are_folded_along() -> None:
    """Patches that are equal in a frame merge there, then equal frames merge."""
    graph, (tome,) = encoder_of_tokens(), rules_named(["tome"])
    pairs = torch.randn(2, 1, 5, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    x = pairs.repeat_interleave(2, 2).expand(-1, FRAMES, -1, -1).contiguous()
    after = joined(apply_choice(tome, graph, "attention", 4), "attention_1")
    assert rows_and_tokens(after) == [(8, 10), (8, 6), (4, 6)]
    torch.testing.assert_close(after.run(x)[0], graph.run(x)[0], **EXACT)
    assert differ(without(after, "key_bias"), graph, x) > 1e-6
    later = apply_choice(tome, joined(graph, "attention"), "attention_1", 4)
    assert rows_and_tokens(later) == [(8, 10), (4, 14), (4, 10)]
    torch.testing.assert_close(later.run(x)[0], graph.run(x)[0], **EXACT)


@cache
def encoder_of_tokens(tokens: int = 10) -> Graph:
    """Three layers over ready tokens of each frame, and the mean of all."""

    def model(b: Builder, x: Node) -> Node:
        rows = layers(b, b.call(aten("reshape.default"), (x, [8, tokens, WIDTH])), Sizes(8, tokens, layers=3))
        return b.mean(b.call(aten("reshape.default"), (rows, [2, FRAMES, tokens, WIDTH])), [1, 2])

    return build("tokens", model, x=TensorType("f64", (2, FRAMES, tokens, WIDTH)))


def refusals(model: nn.Module, *inputs: Tensor) -> list[str]:
    found, refused = sites_of(RULE, normalize(capture(model.eval(), inputs).graph))
    assert not found
    return [refusal.reason for refusal in refused]


def test_refused_with_a_sentence() -> None:
    plain, inputs = make("vit_class", T=17)
    assert "nothing in the graph tells that the 3 rows of the batch of attention" in refusals(plain, *inputs)[0]
    assert "nothing in the graph tells" in sites_of(RULE, transformer(Sizes(2, 13)))[1][0].reason
    alone = refusals(FrameEncoder("frames alone").double(), video())[0]
    assert "nothing behind attention (blocks.0.mix" in alone
    assert "over the 4 rows that each sample has in its batch, so they are samples of their own" in alone
    x = torch.randn(2, 4, 6, WIDTH)
    assert "hides later tokens from earlier ones" in refusals(Adapters(causal=True), x)[0]
    sliding = refusals(Adapters(causal=False), x)
    assert all("no product between" in reason for reason in sliding)
    assert "runs a window over the axis of 4" in sliding[0]


def test_one_place_takes_one_step() -> None:
    graph = encoder("mean of means")
    pair = Choice("tempme", "attention", 0.3), Choice("pitome", "attention", 0.24)
    assert "one place takes one rule" in str(Conflicts(graph, RULES).between(*pair))


def test_a_stream_with_frames_in_a_dimension_of_their_own() -> None:
    x = torch.randn(2, FRAMES, 6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    graph = normalize(capture(Deep().double().eval(), (x,)).graph)
    after = joined(graph, "attention", "attention_1")
    assert [tensor_type(node) for node in after.outputs] == [tensor_type(node) for node in graph.outputs]
    assert differ(after, graph, x[:, :1].expand_as(x).contiguous()) < EXACT["atol"]


def test_padding_is_a_size_of_none_in_clips_too() -> None:
    """Chunks of a text whose tokens are hidden by a mask; what they hold changes nothing."""
    x = torch.randn(2, FRAMES, 6, WIDTH, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    seen = (torch.arange(6) < torch.tensor([[6], [3]])).long()[:, None].expand(2, FRAMES, 6).contiguous()
    graph = normalize(capture(Chunks().double().eval(), (x, seen)).graph)
    after, still = joined(graph, "attention", "attention_1"), x[:, :1].expand_as(x).contiguous()
    torch.testing.assert_close(after.run(still, seen)[0], graph.run(still, seen)[0], **EXACT)
    other = torch.where(seen[..., None] == 1, x, x + 3)
    torch.testing.assert_close(after.run(other, seen)[0], after.run(x, seen)[0], **EXACT)


@pytest.mark.parametrize("read", ["mean of classes", "all tokens"])
def test_onnx_agrees(read: str) -> None:
    size = torch.export.Dim("batch", min=1, max=64)
    graph = normalize(capture(FrameEncoder(read).eval(), (video().float(),), ({0: size},)).graph)
    after = joined(graph, "attention")
    model = to_onnx(after)
    for batch in (1, 3):
        assert check_onnx(model, after, (video(batch).float(),), 1e-4) <= 1e-4


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "read"),
    [("CLIPVisionModel", "pooler_output"), ("CLIPVisionModel", "last_hidden_state"), ("SiglipVisionModel", "pooler_output")],
)
def test_library_models_over_frames(name: str, read: str) -> None:
    transformers = pytest.importorskip("transformers")
    kind = getattr(transformers, name)
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 2}
    model = Library(kind(kind.config_class(**small)), read).double().eval()
    x = torch.randn(2, 4, 3, 8, 8, dtype=torch.float64)
    graph = normalize(capture(model, (x,)).graph)
    after = joined(graph, "attention", "attention_1")
    still = x[:, :1].expand(-1, 4, -1, -1, -1).contiguous()
    assert differ(after, graph, still) < EXACT["atol"]
    assert [rows for rows, _ in rows_and_tokens(after)][:2] == [8, 4]


@pytest.mark.slow
def test_a_library_model_that_mixes_frames_inside_is_refused() -> None:
    transformers = pytest.importorskip("transformers")
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "image_size": 8, "patch_size": 4}
    mixed = {"num_frames": 4, "mit_hidden_size": 16, "mit_intermediate_size": 32, "mit_num_hidden_layers": 1, "mit_num_attention_heads": 2}
    model = transformers.XCLIPVisionModel(transformers.XCLIPVisionConfig(**small, **mixed))
    assert any("no product between" in reason for reason in refusals(model, torch.randn(8, 3, 8, 8)))
