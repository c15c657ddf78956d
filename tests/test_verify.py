"""The verifier: graphs of every kind pass, broken ones are answered with the node, its place in the model, and what to do."""

from __future__ import annotations

import re
import time
from typing import Any

import pytest
import torch
from torch.fx import Node

from paretorch.capture import capture
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import VerifyError
from paretorch.ir.graph import Graph, Origin
from paretorch.ir.ops import aten
from paretorch.ir.types import parse_type
from paretorch.ir.verify import verify
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import apply_choice, apply_rule, sites_of
from paretorch.rewrites.normalize import PASSES
from tests.zoo import NAMES, make

QUICK = ("vit_class", "bert_spelled", "llama", "swin")  # of the zoo; the others with --slow


def norm(rows: str = "4") -> Graph:
    """v0 = mul, v1 = mean, v2 = add."""

    def function(b: Builder, x: Any) -> Any:
        return b.add(b.mean(b.mul(x, b.constant("weight", torch.ones(6))), [-1], True), x)

    graph = build("norm", function, x=parse_type(f"f32[{rows},6]"))
    for node in graph.calls:
        node.meta["origin"] = Origin("layers.3.norm", "model.py:112")
    return graph


@pytest.mark.parametrize("name", [name if name in QUICK else pytest.param(name, marks=pytest.mark.slow) for name in NAMES])
def test_every_pass(name):
    graph = capture(*make(name)).graph
    verify(graph, "capture")
    for step in PASSES:
        graph = step(graph)
        verify(graph, step.__name__)


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_every_rule(rule):
    graph = rule.example()
    verify(graph)
    if rule.is_exact:
        verify(apply_rule(rule, graph)[0], rule.name)
        return
    for site in sites_of(rule, graph)[0][:1]:
        for knob in (site.values or rule.knobs)[1:]:
            verify(apply_choice(rule, graph, site.name, knob), rule.name)


def wrong_type(graph: Graph, nodes: list[Node]) -> None:
    nodes[1].meta["val"] = nodes[0].meta["val"]


def wrong_dtype(graph: Graph, nodes: list[Node]) -> None:
    nodes[2].meta["val"] = graph.fake(torch.zeros(4, 6, dtype=torch.bfloat16))


def no_type(graph: Graph, nodes: list[Node]) -> None:
    del nodes[1].meta["val"]


def used_before(graph: Graph, nodes: list[Node]) -> None:
    nodes[2].append(nodes[1])


def of_another_graph(graph: Graph, nodes: list[Node]) -> None:
    nodes[2].args = (norm().calls[0], *nodes[2].args[1:])


def no_constant(graph: Graph, nodes: list[Node]) -> None:
    graph.constants.clear()


def other_constant(graph: Graph, nodes: list[Node]) -> None:
    graph.constants["weight"] = torch.ones(7)


def does_not_fit(graph: Graph, nodes: list[Node]) -> None:
    nodes[1].args = (nodes[0], [5], True)


def mutates(graph: Graph, nodes: list[Node]) -> None:
    nodes[2].target = aten("add_.Tensor")


def no_function(graph: Graph, nodes: list[Node]) -> None:
    nodes[1].op, nodes[1].target = "call_method", "mean"


def no_output(graph: Graph, nodes: list[Node]) -> None:
    graph.fx.erase_node(graph.output_node)


def after_output(graph: Graph, nodes: list[Node]) -> None:
    graph.output_node.append(nodes[2])


def nested_output(graph: Graph, nodes: list[Node]) -> None:
    graph.output_node.args = (nodes[2],)


FAULTS = {
    wrong_type: "v1 says f32[4,6] but mean gives f32[4,1]",
    wrong_dtype: "v2 says bf16[4,6] but add gives f32[4,6]",
    no_type: "v1 has no type",
    used_before: "v1 uses v2, which is defined after it",
    of_another_graph: "v2 uses mul, which is not in the graph",
    no_constant: "there is no constant weight",
    other_constant: "weight says f32[6] but the constant is f32[7]",
    does_not_fit: "v1: aten.mean.dim(f32[4,6], [5], True) does not fit: Dimension out of range",
    mutates: "writes into one of its arguments; expected a function of values",
    no_function: "mean is a call_method; expected one of placeholder, get_attr, call_function, output",
    no_output: "the graph does not end with its output",
    after_output: "the graph does not end with its output",
    nested_output: "the output does not hold one flat sequence of values",
}


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_faults(fault):
    graph = norm()
    verify(graph)
    fault(graph, graph.calls)
    with pytest.raises(VerifyError, match=f"after fuse_rms_norm, .*{re.escape(FAULTS[fault])}"):
        verify(graph, "fuse_rms_norm")


def test_message(golden):
    graph = norm()
    wrong_type(graph, graph.calls)
    with pytest.raises(VerifyError) as caught:
        verify(graph, "fuse_rms_norm")
    golden(f"{caught.value}\n")
    with pytest.raises(VerifyError, match=r"^v1 says"):
        verify(graph)


def test_symbolic_sizes():
    graph = norm("s0")
    verify(graph)
    graph.calls[1].meta["val"] = graph.calls[0].meta["val"]
    with pytest.raises(VerifyError, match=r"v1 says f32\[s\d+,6\] but mean gives f32\[s\d+,1\]"):
        verify(graph)


def test_sizes_that_depend_on_data():
    def function(b: Builder, x: Any) -> Any:
        places = b.call(aten("nonzero.default"), (x,))
        return b.mul(places, 2)

    verify(build("places", function, x=parse_type("f32[4]")))


def test_five_hundred_nodes_in_half_a_second():
    def function(b: Builder, x: Any) -> Any:
        for i in range(250):
            x = b.relu(b.linear(x, b.constant("weight", torch.ones(8 + i % 7, 8 + (i - 1) % 7 if i else 8))))
        return x

    graph = build("deep", function, x=parse_type("f32[2,8]"))
    begin = time.process_time()
    verify(graph)
    assert time.process_time() - begin < 0.5
    begin = time.process_time()
    verify(graph)
    assert time.process_time() - begin < 0.1
