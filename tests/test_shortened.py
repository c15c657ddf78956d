"""Graphs with fewer of their equal layers."""

import pytest

from paretorch.capture import capture
from paretorch.ir.analyze import analyze
from paretorch.ir.verify import verify
from paretorch.rewrites.normalize import normalize
from paretorch.shortened import KEPT, _longest_run, shortened
from tests import tiny_transformers


@pytest.mark.parametrize(
    ("classes", "run"),
    [
        ([0, 1] * 6, (0, 2, 6)),
        ([9, 0, 1, 0, 1, 0, 1, 8], (1, 2, 3)),
        ([0] * 5, (0, 1, 5)),
        ([0, 0, 1] * 4, (0, 3, 4)),
        ([0, 1, 2], (0, 1, 0)),
        ([], (0, 1, 0)),
    ],
)
def test_runs(classes, run):
    assert _longest_run(classes) == run


def deep(layers):
    import transformers

    config = transformers.BertConfig(**{**tiny_transformers.TEXT, "num_hidden_layers": layers})
    return normalize(capture(transformers.BertModel(config).eval(), tiny_transformers.ids()).graph)


def test_a_deep_model_becomes_short():
    graph, expected = deep(KEPT + 5), deep(KEPT)
    short = shortened(graph, analyze(graph))
    verify(short)
    assert len(short.calls) == len(expected.calls)
    assert {node.name for node in short.nodes} < {node.name for node in graph.nodes}
    assert [str(node.meta["val"].shape) for node in short.outputs] == [str(node.meta["val"].shape) for node in graph.outputs]


def test_a_shallow_one_stays():
    graph = deep(3)
    assert shortened(graph, analyze(graph)) is graph
