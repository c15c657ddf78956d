"""From which size a rewrite pays, solved on one graph whose size may vary."""

import pytest
import sympy
from torch.fx import Node

from paretorch.cost_model.break_even import break_evens, sentence
from paretorch.cost_model.calibrate import analytic
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.price import Prices
from paretorch.cost_model.work import at_sizes, work_of
from paretorch.ir.builder import Builder, build
from paretorch.ir.graph import Graph
from paretorch.ir.types import TensorType

DEVICE = DEVICES["fake-bandwidth"]
TOKENS = sympy.Symbol("tokens", integer=True, positive=True)
WHOLE = TensorType("f32", (TOKENS, 64))


def seconds(graph: Graph) -> float:
    return Prices(analytic(DEVICE), DEVICE).graph_cost(graph, "eager").seconds


def thrice(b: Builder, x: Node) -> Node:
    return b.neg(b.neg(b.neg(x)))


def test_equal_graphs_pay_at_no_size():
    graph = build("g", thrice, x=WHOLE)
    found = break_evens(graph, graph.copy(), seconds)
    assert list(found.values()) == [None]
    assert sentence(found, graph).startswith("pays at no size of axis 0 of x up to ")


def test_sizes_are_put_in_for_a_while():
    graph = build("g", lambda b, x: b.neg(x), x=WHOLE)
    with at_sizes({next(iter(graph.inputs[0].meta["val"].shape[0].node.expr.free_symbols)): 100}):
        assert work_of(graph.calls[-1]).bytes_moved == 2 * 4 * 64 * 100
    assert work_of(graph.calls[-1]).bytes_moved != 2 * 4 * 64 * 100


@pytest.mark.parametrize("extra", [1, 3])
def test_a_launch_more_and_a_pass_less(extra):
    """Three passes become one pass and `extra` launches over one row: it pays from launches / (bytes of two passes)."""

    def fewer(b: Builder, x: Node) -> Node:
        row = b.slice(x, 0, 0, 1)
        for _ in range(extra + 2):
            row = b.neg(row)
        return b.add(b.neg(x), row)

    before, after = build("g", lambda b, x: b.add(thrice(b, x), x), x=WHOLE), build("g", fewer, x=WHOLE)
    found = break_evens(before, after, seconds)
    (size,) = found.values()
    assert size is not None
    symbol = next(iter(found))
    for at, pays in ((size, True), (size - 1, False)):
        with at_sizes({symbol: at}):
            assert (seconds(after) < seconds(before)) is pays
    assert sentence(found, before) == f"pays from {size} along axis 0 of x"
