"""Repetition: isomorphic blocks, place by place; and that the analyses stay quick on deep graphs."""

from __future__ import annotations

import time

import pytest
import torch
from torch import nn

from paretorch.ir.analyze import analyze
from tests.graphs import exported, zoo_graph
from tests.zoo import Block, ViT


@pytest.mark.parametrize("name", ["vit_class", "bert", "llama", "parallel", "sandwich", "encoder_decoder"])
def test_every_layer_is_isomorphic_to_the_next(name: str) -> None:
    graph = zoo_graph(name, "plain")
    facts = analyze(graph)
    blocks = [block for stream in facts.streams for block in stream.blocks]
    regions = [region for regions in facts.repetition.classes for region in regions]
    assert sorted(map(sorted, regions)) == sorted(sorted(block.nodes) for block in blocks)
    for regions in facts.repetition.classes:
        for region in regions:
            assert [graph.node(node).target for node in region] == [graph.node(node).target for node in regions[0]]


def test_types_and_attributes_matter() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList([Block(8, 2), Block(8, 2, causal=True), Block(8, 4), Block(8, 2)])

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    facts = analyze(exported(Two().eval(), (torch.randn(2, 5, 8),)))
    assert sorted(len(regions) for regions in facts.repetition.classes) == [2, 4]


def test_deep_graphs_are_quick() -> None:
    graph = exported(ViT(10, 24, 4, depth=24).eval(), (torch.randn(2, 3, 2, 18),))
    start = time.perf_counter()
    facts = analyze(graph)
    assert time.perf_counter() - start < 1.0  # 0.03 s on the machine that this was written on
    assert len(facts.streams[0].layers) == 24
    assert [len(regions) for regions in facts.repetition.classes] == [24, 24]
    assert len(facts.axes.tokens[0].mixers) == 24
