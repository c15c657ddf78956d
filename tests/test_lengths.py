"""Lengths of token axes after a rewrite: what follows, and what refuses with a sentence."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from paretorch.ir.analyze import Atom, AxisFacts, rederive_lengths, residual_streams, token_axes
from paretorch.ir.builder import Builder
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.types import from_fake
from tests.graphs import SIZES, exported
from tests.test_axes import Grid, found
from tests.zoo import Block, Whisper, make


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
