"""Residual streams: chains, kinds, layouts, layers, by dataflow alone."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.ir.analyze import Stream, residual_streams
from paretorch.ir.graph import Graph
from tests.graphs import SIZES, exported, zoo_graph
from tests.test_axes import Scrambled
from tests.zoo import NAMES, Block, make

PAIR = ["attention", "feed_forward"]
# name -> for each stream: kinds of blocks, layout, blocks in a layer
EXPECTED = {
    **{name: [(PAIR * 2, "pre", 2)] for name in ("vit_class", "vit_mean", "vit_registers", "vit_dense", "layer_scale", "gpt", "llama", "whisper")},
    **{name: [(PAIR * 2, "post", 2)] for name in ("bert", "bert_spelled")},
    "sandwich": [(PAIR * 2, "sandwich", 2)], "parallel": [(["attention"] * 2, "parallel", 1)], "swin": [(PAIR * 2, "pre", 2)],
    "encoder_decoder": [(PAIR * 2, "pre", 2), (["attention", *PAIR] * 2, "pre", 3)],
    "mixer": [(["feed_forward"] * 4, "pre", 1)], "convnext": [(["other"] * 2, "pre", 1)] * 2,
}  # fmt: skip


def found(name: str, sizes: str = "plain") -> tuple[Graph, tuple[Stream, ...]]:
    graph = zoo_graph(name, sizes)
    return graph, residual_streams(graph)


@pytest.mark.parametrize("name", NAMES)
def test_streams_of_the_zoo(name: str) -> None:
    _, streams = found(name)
    described = [([block.kind for block in stream.blocks], stream.blocks[0].layout, len(stream.layers[0])) for stream in streams]
    assert described == EXPECTED[name]
    for stream in streams:
        assert len({block.layout for block in stream.blocks}) == 1
        assert stream.values == (stream.blocks[0].before, *(block.after for block in stream.blocks))
        assert [name for layer in stream.layers for name in layer] == [block.name for block in stream.blocks]


@pytest.mark.parametrize("name", NAMES)
def test_a_block_can_be_taken_out(name: str) -> None:
    """What is computed only for the value after is gone, nothing else is, and the graph still runs."""
    graph, streams = found(name)
    _, inputs = make(name)
    for stream in streams:
        for block in (stream.blocks[0], stream.blocks[-1]):
            without = graph.copy()
            without.replace(without.node(block.after), without.node(block.before))
            left = {node.name for node in without.clean().calls}
            assert {node.name for node in graph.calls} - left == set(block.nodes)
            before, after = graph.run(*inputs), without.run(*inputs)
            assert [value.shape for value in before] == [value.shape for value in after]


@pytest.mark.parametrize("name", ["vit_class", "llama", "layer_scale", "sandwich", "convnext"])
def test_branch_plus_before_is_after(name: str) -> None:
    graph, streams = found(name)
    for block in (block for stream in streams for block in stream.blocks):
        assert {argument.name for argument in graph.node(block.after).all_input_nodes} == {block.before, block.branch}


@pytest.mark.parametrize("name", ["bert", "parallel"])
def test_no_branch_where_it_is_not_simply_added(name: str) -> None:
    assert all(block.branch is None for stream in found(name)[1] for block in stream.blocks)


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("name", ["bert", "llama", "swin", "encoder_decoder"])
def test_sizes_do_not_matter(name: str, sizes: str) -> None:
    assert found(name, sizes)[1] == found(name)[1]


@pytest.mark.parametrize("name", ["vit_class", "bert", "convnext"])
def test_names_do_not_matter(name: str) -> None:
    model, inputs = make(name)
    ours = residual_streams(exported(Scrambled(model), inputs))
    assert ours == found(name)[1]


class ResNet(nn.Module):
    """Two stages of post-activation blocks with a projection between them."""

    def __init__(self) -> None:
        super().__init__()
        self.convolutions = nn.ModuleList(nn.Conv2d(4, 4, 3, padding=1) for _ in range(6))

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.convolutions[0](x))
        for number in (1, 3):
            x = F.relu(x + self.convolutions[number + 1](F.relu(self.convolutions[number](x))))
        return x.mean((2, 3))


def test_post_activation_blocks() -> None:
    (stream,) = residual_streams(exported(ResNet().eval(), (torch.randn(2, 4, 6, 6),)))
    assert [(block.kind, block.layout) for block in stream.blocks] == [("other", "post")] * 2
    assert stream.values == ("relu", "relu_2", "relu_4")


class States(nn.Module):
    """A pre-norm model that returns every value of its stream, and keys of its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks, self.norm = nn.ModuleList([Block(8, 2), Block(8, 2)]), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        states = [x]
        for block in self.blocks:
            states.append(block(states[-1]))
        return (self.norm(states[-1]), *states[1:], self.blocks[1].mix.key(self.blocks[1].norms[0](states[1])))


def test_returned_states_do_not_break_the_stream() -> None:
    (stream,) = residual_streams(exported(States().eval(), (torch.randn(2, 5, 8),)))
    assert [block.kind for block in stream.blocks] == PAIR * 2


class Spelled(nn.Module):
    """Sums that are no residual blocks: a spelled GELU, a gate, a sum of two branches; then a scaled post-norm block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third, self.norm = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        y = self.first(x)
        y = 0.5 * y * (1 + torch.tanh(0.8 * (y + 0.04 * y * y * y)))
        y = self.second(y) + self.third(x)
        return self.norm(y * 1.5 + self.second(F.relu(self.third(y))))


def test_what_is_no_residual_block() -> None:
    (stream,) = residual_streams(exported(Spelled().eval(), (torch.randn(2, 5, 8),)))
    assert len(stream.blocks) == 1
    assert stream.blocks[0].branch is None


class ScaledStart(nn.Module):
    """The stream begins with a multiplication, as where embeddings are scaled."""

    def __init__(self) -> None:
        super().__init__()
        self.word, self.block = nn.Embedding(9, 8), Block(8, 2)

    def forward(self, ids: Tensor) -> Tensor:
        return self.block(self.word(ids) * 2.5)


def test_a_scaled_embedding_is_the_first_value() -> None:
    (stream,) = residual_streams(exported(ScaledStart().eval(), (torch.zeros(2, 5, dtype=torch.long),)))
    assert stream.values[0] == "mul"
    assert all(block.branch for block in stream.blocks)
