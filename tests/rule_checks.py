"""What tests of single rules share: random constants, and checks that a rule applies or refuses."""

import torch

from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType
from paretorch.rewrites.apply import apply_rule, sites_of
from tests.test_rules import EXACT_ERROR, doubled, error

CHANCE = torch.Generator().manual_seed(0)


def draw(*shape):
    return torch.randn(shape, generator=CHANCE)


def f32(*shape):
    return TensorType("f32", shape)


def constants(b, **tensors):
    return [b.constant(name, tensor) for name, tensor in tensors.items()]


def applies(rule, graph, times=1) -> Graph:
    """The rewritten graph, after it was held against the original in float64."""
    after, applied, _ = apply_rule(rule, graph)
    assert len(applied) == times
    twice = doubled(graph)
    assert error(twice, apply_rule(rule, twice)[0]) <= EXACT_ERROR
    return after


def refused(rule, graph, sentence):
    sites, refusals = sites_of(rule, graph)
    assert sites == []
    assert [sentence in refusal.reason for refusal in refusals] == [True], [refusal.reason for refusal in refusals]
