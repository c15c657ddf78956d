"""VisionZip: whose attention ranks tokens, how many may go, and prompts that become shorter behind it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.fx import Node

from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph, shape_of
from paretorch.ir.ops import aten, is_op
from paretorch.ir.types import TensorType
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.example_models import Sizes, layers
from paretorch.rewrites.token_merging import visionzip
from paretorch.rewrites.token_merging.progressive import shorten

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
WIDTH = 8


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


def test_golden_prompt(golden: Callable[[str], None]) -> None:
    before = assistant("last by place")
    golden(f"{before}\n# visionzip at attention = 0.6667\n{apply_choice(visionzip.RULE, before, 'attention', 0.6667)}")
