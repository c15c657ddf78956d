"""Token axes: what is found on every model of the zoo, whatever the sizes and names are; views split and join them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from paretorch.ir.analyze import AxisFacts, token_axes
from paretorch.ir.analyze.atoms import Atoms
from paretorch.ir.analyze.view_axes import view_dims
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType, from_fake
from tests.graphs import SIZES, exported, zoo_graph
from tests.zoo import NAMES, Block, make

every_size = pytest.mark.parametrize("sizes", SIZES)

# name -> for each token axis: where it is born, how many mixers, causal
EXPECTED = {
    "vit_class": [("cat", 2, False)], "vit_mean": [("conv2d", 2, False)], "vit_registers": [("cat", 2, False)],
    "vit_dense": [("conv2d", 2, False)], "layer_scale": [("cat", 2, False)], "bert": [("ids", 2, False)], "bert_spelled": [("ids", 2, False)],
    "gpt": [("ids", 2, True)], "llama": [("ids", 2, True)], "parallel": [("ids", 2, True)], "sandwich": [("ids", 2, True)],
    "whisper": [("conv1d_1", 2, False)], "encoder_decoder": [("ids", 2, True), ("conv1d_1", 2, False)], "mixer": [], "convnext": [],
    "swin": [("_unsafe_view", 2, False)],
}  # fmt: skip
# name -> kinds of uses of the first axis, besides pointwise ones
KINDS = {
    "vit_class": {"mixes", "selects", "bakes_length", "positions"}, "vit_mean": {"mixes", "pools", "bakes_length", "positions"},
    "vit_registers": {"mixes", "selects", "bakes_length", "positions"}, "vit_dense": {"mixes", "returns", "bakes_length", "positions"},
    "layer_scale": {"mixes", "selects", "bakes_length", "positions"}, "bert": {"mixes", "selects", "bakes_length", "positions"},
    "bert_spelled": {"mixes", "selects", "bakes_length", "positions"}, "gpt": {"mixes", "returns", "bakes_length", "positions"},
    "llama": {"mixes", "returns", "bakes_length", "positions"}, "parallel": {"mixes", "returns", "bakes_length", "positions"},
    "sandwich": {"mixes", "returns", "bakes_length", "positions"}, "whisper": {"mixes", "returns", "bakes_length", "positions"},
    "encoder_decoder": {"mixes", "returns", "bakes_length", "positions"}, "swin": {"mixes", "bakes_length", "positions"},
}  # fmt: skip


def found(name: str, sizes: str = "plain") -> tuple[Graph, AxisFacts]:
    graph = zoo_graph(name, sizes)
    return graph, token_axes(graph)


def outline(facts: AxisFacts) -> list[object]:
    return [
        (axis.atom.born, axis.mixers, axis.causal, [(use.node, use.kind, bool(use.reason)) for use in axis.uses]) for axis in facts.tokens
    ]


@pytest.mark.parametrize("name", NAMES)
def test_token_axes_of_the_zoo(name: str) -> None:
    _, facts = found(name)
    assert [(axis.atom.born, len(axis.mixers), axis.causal) for axis in facts.tokens] == EXPECTED[name]
    if facts.tokens:
        axis = facts.tokens[0]
        wanted = 8 if name == "encoder_decoder" else 10
        assert axis.atom.size == wanted
        assert {use.kind for use in axis.uses if use.kind != "pointwise"} - {"appends"} == KINDS[name]
        assert all(use.reason for use in axis.uses if use.kind in ("positions", "returns", "opaque"))


@every_size
@pytest.mark.parametrize("name", ["vit_class", "vit_registers", "bert", "llama", "encoder_decoder", "swin"])
def test_sizes_do_not_matter(name: str, sizes: str) -> None:
    assert outline(found(name, sizes)[1]) == outline(found(name)[1])


@pytest.mark.parametrize("name", NAMES)
def test_maps_agree_with_types(name: str) -> None:
    graph, facts = found(name)
    for node in graph.nodes:
        if node.name in facts.maps:
            products = [1 for _ in facts.maps[node.name]]
            for place, atoms in enumerate(facts.maps[node.name]):
                for atom in atoms:
                    products[place] *= atom.size
            assert tuple(products) == from_fake(node.meta["val"]).shape, node.name


class Scrambled(nn.Module):
    """The model inside modules with misleading names."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.attention = nn.Sequential()
        self.attention.add_module("patch_embed", model)

    def forward(self, *inputs: Tensor) -> object:
        return self.attention.patch_embed(*inputs)


@pytest.mark.parametrize("name", ["vit_class", "llama"])
def test_names_do_not_matter(name: str) -> None:
    model, inputs = make(name)
    scrambled = token_axes(exported(Scrambled(model), inputs)).tokens
    for ours, theirs in zip(scrambled, found(name)[1].tokens, strict=True):
        assert ours.mixers == theirs.mixers
        assert [(use.node, use.kind) for use in ours.uses][1:] == [(use.node, use.kind) for use in theirs.uses][1:]


def test_cross_attention_mixes_the_encoders_axis() -> None:
    _, facts = found("encoder_decoder")
    encoder = facts.tokens[1]
    mixes = [use.node for use in encoder.uses if use.kind == "mixes"]
    assert len(mixes) == 4
    assert set(encoder.mixers) < set(mixes)
    assert not any(use.kind == "returns" for use in encoder.uses)


def test_class_token_is_selected_from_the_joined_axis() -> None:
    graph, facts = found("vit_class")
    axis = facts.tokens[0]
    selected = [use.node for use in axis.uses if use.kind == "selects"]
    assert [graph.node(node).args[1:] for node in selected] == [(1, 0)]
    assert facts.dim(graph.node(selected[0]).args[0].name, axis.atom) == 1


class Grid(nn.Module):
    """Patches of a 4 x 6 grid through attention and back to the grid, where a convolution reads them."""

    def __init__(self, back: bool) -> None:
        super().__init__()
        self.back, self.patch, self.block, self.last = back, nn.Conv2d(3, 8, 2, stride=2), Block(8, 2), nn.Conv2d(8, 4, 3, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        x = self.block(self.patch(images).flatten(2).transpose(1, 2))
        return self.last(x.transpose(1, 2).unflatten(2, (4, 6))) if self.back else x.mean(1)


def test_a_grid_is_one_axis_and_its_splitting_forbids_shortening() -> None:
    graph = exported(Grid(True).eval(), (torch.randn(2, 3, 8, 12),))
    axis = token_axes(graph).tokens[0]
    assert axis.atom.size == 24
    reasons = [use.reason for use in axis.uses if use.reason]
    assert any("splits or blends the axis of 24" in reason for reason in reasons)
    assert any("runs a window over the axis of" in reason for reason in reasons)
    pooled = token_axes(exported(Grid(False).eval(), (torch.randn(2, 3, 8, 12),))).tokens[0]
    assert [use.reason for use in pooled.uses if use.reason] == []


def attend(b: Builder, x: Node, mask: Node | None = None, **attributes: int) -> Node:
    """One head of our attention op over x: T[B, T, C]."""
    heads = b.unsqueeze(x, 1)
    return b.squeeze(b.attention(heads, heads, heads, mask, None, scale=0.5, **attributes), 1)


def test_our_attention_op_and_its_band() -> None:
    shape = TensorType("f32", (2, 6, 4))
    for attributes, causal in (({}, False), ({"right": 0}, True), ({"left": 2, "right": 2}, True)):
        graph = build("band", lambda b, x, attributes=attributes: attend(b, x, **attributes), x=shape)
        (axis,) = token_axes(graph).tokens
        assert (axis.atom.born, axis.causal) == ("x", causal)
    masked = build("masked", lambda b, x, mask: attend(b, x, mask), x=shape, mask=TensorType("bool", (2, 1, 1, 6)))
    (axis,) = token_axes(masked).tokens
    assert axis.causal is False
    assert token_axes(masked).maps["mask"][3] == (axis.atom,)


class Axial(nn.Module):
    """Attention along the rows of a grid, then along its columns."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns = Block(8, 2), Block(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        batch, height, width, channels = x.shape
        x = self.rows(x.reshape(batch * height, width, channels)).view(batch, height, width, channels)
        return self.columns(x.transpose(1, 2).reshape(batch * width, height, channels)).mean(1)


def test_axes_that_another_attention_keeps_aligned() -> None:
    axes = token_axes(exported(Axial().eval(), (torch.randn(2, 4, 4, 8),))).tokens
    assert [len(axis.mixers) for axis in axes] == [1, 1]
    for axis in axes:
        assert any("stay aligned" in use.reason for use in axis.uses)


# atoms and views


@settings(max_examples=60, deadline=None)
@given(st.lists(st.sampled_from([1, 2, 3, 4, 6]), min_size=1, max_size=4), st.data())
def test_a_view_and_back_gives_the_same_atoms(shape: list[int], data: st.DataObject) -> None:
    atoms = Atoms()
    dims = [atoms.dim(size, "x") for size in shape]
    cuts = sorted(data.draw(st.sets(st.integers(1, len(shape)))) | {len(shape)})
    merged, start = [], 0
    for cut in cuts:
        product = 1
        for size in shape[start:cut]:
            product *= size
        merged.append(product)
        start = cut
    there = view_dims(atoms, dims, merged, "v")
    assert view_dims(atoms, there, shape, "w") == dims


def test_views_split_collapse_and_mangle() -> None:
    atoms = Atoms()
    (width,) = atoms.dim(24, "x")
    heads = view_dims(atoms, [(width,)], (4, 6), "v")
    assert view_dims(atoms, heads, (24,), "w") == [(width,)]
    assert view_dims(atoms, [(width,)], (4, 6), "u") == heads
    packed = view_dims(atoms, [(width,)], (2, 3, 4), "p")
    assert view_dims(atoms, packed, (6, 4), "q")[1] == packed[2]
    blended = view_dims(atoms, heads, (6, 4), "m")
    assert all(dim not in heads for dim in blended)


def test_a_constant_does_not_join_two_axes() -> None:
    atoms = Atoms()
    one, other, table = atoms.dim(8, "x"), atoms.dim(8, "y"), atoms.dim(8, "w", weak=True)
    assert atoms.meet(one, table) == one
    assert atoms.meet(table, other) == other
    assert atoms.resolve(one) != atoms.resolve(other)
    assert atoms.meet(one, other) == atoms.resolve(one) == atoms.resolve(other)
