"""Token axes: what is found on every model of the zoo, whatever the sizes and names are, and lengths after a rewrite."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from paretorch.ir.analyze import Atom, AxisFacts, rederive_lengths, residual_streams, token_axes
from paretorch.ir.analyze.atoms import Atoms
from paretorch.ir.analyze.view_axes import view_dims
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType, from_fake
from tests.graphs import SIZES, exported, zoo_graph
from tests.zoo import NAMES, Block, Whisper, make

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


class Opaque(nn.Module):
    """An op that the table does not know between two blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Block(8, 2), Block(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.second(x + torch.digamma(x)).mean(1)


def test_an_opaque_op_stops_it_with_its_sentence() -> None:
    graph = exported(Opaque().eval(), (torch.randn(2, 5, 8),))
    facts = token_axes(graph)
    opaque = [use for use in facts.tokens[0].uses if use.kind == "opaque"]
    assert [use.node for use in opaque] == ["digamma"]
    assert "digamma" in opaque[0].reason
    assert "nothing is known" in opaque[0].reason
    add = next(node for node in graph.nodes if node.name == "add_1")
    with pytest.raises(PlanError, match="digamma"):
        shorten(graph, facts, facts.tokens[0].atom, [add.name], 3)


class Bag(nn.Module):
    """Blocks without positions, then the mean: any number of tokens will do."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block(8, 2, packed=True) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x.mean(1)


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


def test_symbolic_sizes() -> None:
    batch, tokens = torch.export.Dim("batch", min=2, max=64), torch.export.Dim("tokens", min=4, max=64)
    model, x = Bag().eval(), torch.randn(3, 10, 8)
    graph = exported(model, (x,), ({0: batch, 1: tokens},))
    facts = token_axes(graph)
    (axis,) = facts.tokens
    assert not isinstance(axis.atom.size, int)
    assert len(axis.mixers) == 2
    assert not any(use.reason for use in axis.uses)
    shorter = graph.copy()
    node = shorter.node(stream_value(graph))
    cut = Builder(shorter, before=node.next).slice(node, 1, 0, -2)
    shorter.replace(node, cut)
    size = from_fake(cut.meta["val"]).shape[1]
    rederive_lengths(shorter, facts, {cut.name: (axis.atom, size)})
    for shape in ((3, 10, 8), (5, 7, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(shorter.run(x)[0], model.blocks[1](model.blocks[0](x)[:, :-2]).mean(1))


# lengths after a rewrite


def shorten(graph: Graph, facts: AxisFacts, atom: Atom, values: list[str], keep: int, *, may_return: bool = False) -> Graph:
    """Keep the first tokens of these values for all that reads them later, then repair the lengths."""
    shorter, changed = graph.copy(), {}
    for name in values:
        node = shorter.node(name)
        dim = facts.dim(name, atom)
        cut = Builder(shorter, before=node.next).slice(node, dim, 0, keep)
        shorter.replace(node, cut)
        changed[cut.name] = (atom, keep)
    return rederive_lengths(shorter, facts, changed, may_return=may_return)


def reference(model: nn.Module, inputs: tuple[Tensor, ...], keep: int) -> object:
    """The model with all but the first tokens dropped before its second block, by hand."""

    def cut(_: nn.Module, arguments: tuple[Tensor | None, ...]) -> tuple[Tensor | None, ...]:
        x, *rest = arguments
        return (x[:, :keep], *(extra[..., :keep] if isinstance(extra, Tensor) else extra for extra in rest))

    hook = model.blocks[1].register_forward_pre_hook(cut)
    with torch.no_grad():
        result = model(*inputs)
    hook.remove()
    return result


def stream_value(graph: Graph) -> str:
    """The last value [B, T, C] before the second block's attention that its residual sum reads too."""
    return residual_streams(graph)[0].values[2]


WITH_SIZES = [(name, sizes) for name in ("vit_class", "vit_registers", "whisper") for sizes in SIZES]


@pytest.mark.parametrize(("name", "sizes"), [*WITH_SIZES, ("vit_mean", "plain"), ("layer_scale", "plain"), ("gpt", "plain")])
def test_lengths_after_dropping_tokens(name: str, sizes: str) -> None:
    graph, facts = found(name, sizes)
    axis = facts.tokens[0]
    model, inputs = make(name, **SIZES[sizes])
    shorter = shorten(graph, facts, axis.atom, [stream_value(graph)], 5, may_return=name in ("whisper", "gpt"))
    expected = reference(model, inputs, 5)
    for ours, theirs in zip(shorter.run(*inputs), expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize(("name", "sizes"), [*(("bert", sizes) for sizes in SIZES), ("bert_spelled", "plain")])
def test_a_padding_mask_must_be_shortened_too(name: str, sizes: str) -> None:
    graph, facts = found(name, sizes)
    axis = facts.tokens[0]
    value = stream_value(graph)
    with pytest.raises(PlanError, match="old and of the new length meet"):
        shorten(graph, facts, axis.atom, [value], 5)
    model, inputs = make(name, **SIZES[sizes])
    shorter, node = graph.copy(), graph.node(value)
    masks = (n for n in shorter.calls if n.name in facts.maps and [len(atoms) for atoms in facts.maps[n.name]] == [1, 0, 0, 1])
    mask = next(n for n in masks if len(n.users) == 2)
    later = [user for user in mask.users if shorter.nodes.index(user) > graph.nodes.index(node)]
    cut_mask = Builder(shorter, before=later[0]).slice(mask, 3, 0, 5)
    later[0].replace_input_with(mask, cut_mask)
    x = shorter.node(value)
    cut = Builder(shorter, before=x.next).slice(x, 1, 0, 5)
    shorter.replace(x, cut)
    rederive_lengths(shorter, facts, {cut.name: (axis.atom, 5), cut_mask.name: (axis.atom, 5)})
    torch.testing.assert_close(shorter.run(*inputs)[0], reference(model, inputs, 5))


def test_positions_grids_windows_and_outputs_refuse() -> None:
    for name, sentence in (("llama", "constant of shape"), ("vit_dense", "output 0 of the model")):
        graph, facts = found(name)
        axis = facts.tokens[0]
        with pytest.raises(PlanError, match=sentence):
            shorten(graph, facts, axis.atom, [stream_value(graph)], 5)
    graph = exported(Grid(True).eval(), (torch.randn(2, 3, 8, 12),))
    facts = token_axes(graph)
    with pytest.raises(PlanError, match="splits or blends the axis of 24"):
        shorten(graph, facts, facts.tokens[0].atom, ["add_1"], 12)


def test_a_length_of_one_does_not_broadcast_silently() -> None:
    graph, facts = found("bert_spelled")
    axis = facts.tokens[0]
    with pytest.raises(PlanError, match="old and of the new length meet"):
        shorten(graph, facts, axis.atom, [stream_value(graph)], 1)


class Slices(nn.Module):
    """Prefix and rest of the tokens, by slices and by split."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2)])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        for block in self.blocks:
            x = block(x)
        first, rest = x.split([2, 8], 1)
        return first.sum(1) + x[:, :2].mean(1), rest.mean(1) + x[:, 2:10].amax(1)


def test_slices_and_splits_follow() -> None:
    model, inputs = Slices().eval(), (torch.randn(3, 10, 8),)
    graph = exported(model, inputs)
    facts = token_axes(graph)
    shorter = shorten(graph, facts, facts.tokens[0].atom, ["add_1"], 6)
    x = model.blocks[1](model.blocks[0](inputs[0])[:, :6])
    first, rest = shorter.run(*inputs)
    torch.testing.assert_close(first, x[:, :2].sum(1) + x[:, :2].mean(1))
    torch.testing.assert_close(rest, x[:, 2:].mean(1) + x[:, 2:].amax(1))
    with pytest.raises(PlanError):
        shorten(graph, facts, facts.tokens[0].atom, ["add_1"], 1)


def test_two_cuts_in_one_walk() -> None:
    model, inputs = Whisper(10, 24, 4).eval(), (torch.randn(3, 8, 20),)
    graph = exported(model, inputs)
    facts = token_axes(graph)
    axis, shorter, changed = facts.tokens[0], graph.copy(), {}
    for name, keep in (("add_1", 8), ("add_3", 6)):
        node = shorter.node(name)
        cut = Builder(shorter, before=node.next).slice(node, 1, 0, keep)
        shorter.replace(node, cut)
        changed[cut.name] = (axis.atom, keep)
    rederive_lengths(shorter, facts, changed, may_return=True)
    assert shorter.run(*inputs)[0].shape == (3, 6, 24)


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
