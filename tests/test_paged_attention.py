"""Attention to pages: the kernel against float64 at every way to hide keys, bounds, text, and what of a captured gather is read through its table."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from paretorch.capture import capture
from paretorch.codegen.kernel import Kernel
from paretorch.codegen.regions import covers, region_of
from paretorch.codegen.triton_runtime import with_kernels
from paretorch.cost_model.calibrate import analytic
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.price import Prices
from paretorch.fusion import Fusion
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import is_op
from paretorch.ir.ops.attention import attention
from paretorch.ir.ops.paged_attention import paged_attention
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.normalize.count_keys import count_keys
from paretorch.rewrites.normalize.read_pages import page_refusals, read_pages
from tests.attention_cases import HIDING, Hiding, Lengths
from tests.kernel_cases import (
    DTYPES,
    TOLERANCE,
    assert_close,
    check_compiled,
    graph_of,
    in_f64,
    inputs_of,
    kernel,
    launched_between_guards,
    read_by,
    run_alone,
    vector,
)

pytest.importorskip("triton")

POOL = 11
SIZES = {  # queries, slots of a page, pages of a sample
    "one": (1, 1, 1),
    "prime": (7, 5, 3),
    "power": (4, 16, 4),
    "more than a block": (3, 24, 8),
    "few to many": (1, 16, 33),
}


def lengths_at(size: str) -> Lengths:
    queries, slots, pages = SIZES[size]
    many = 1 if size == "few to many" else 2
    return Lengths(many, many, 2, queries, slots * pages, 12, 20)


def types(hiding: Hiding, dtype: str, size: str, table: str = "i64") -> dict[str, str]:
    """Those of the same attention to whole keys, with pools and a table in their place."""
    at, (_, slots, pages) = lengths_at(size), SIZES[size]
    whole = hiding.types(dtype, at)
    return {
        **whole,
        "key": vector(dtype, POOL, at.heads, slots, at.width),
        "value": vector(dtype, POOL, at.heads, slots, at.value_width),
        "pages": vector(table, at.batch, pages),
    }


def paged(hiding: Hiding) -> Callable[..., Any]:
    def function(b: Any, query: Any, key: Any, value: Any, pages: Any, **more: Any) -> Any:
        options = {"scale": 0.3, **hiding.options, **({"lengths": more["lengths"]} if "lengths" in more else {})}
        return b.paged_attention(query, key, value, pages, more.get("mask"), more.get("key_bias"), **options)

    return lambda b, query, key, value, **more: function(b, query, key, value, more.pop("pages"), **more)


def inputs_for(graph: Graph, size: str, seed: int = 0) -> list[Tensor]:
    generator, found = torch.Generator().manual_seed(seed), inputs_of(graph, seed)
    for place, node in enumerate(graph.inputs):
        if node.name == "pages":
            found[place] = torch.randint(-POOL, POOL, found[place].shape, generator=generator, dtype=found[place].dtype)
        elif node.name == "lengths":
            most = lengths_at(size).keys + 2
            found[place] = torch.randint(-1, most, found[place].shape, generator=generator, dtype=found[place].dtype)
    return found


def check(hiding: str, dtype: str, size: str) -> None:
    given, function = types(HIDING[hiding], dtype, size), paged(HIDING[hiding])
    graph = graph_of(function, **given)
    inputs = inputs_for(graph, size)
    found = kernel(graph).launch(*read_by(graph, inputs))
    assert_close([found], in_f64(function, given, inputs), TOLERANCE[dtype])


MATRIX = [(hiding, dtype, size) for hiding in HIDING for dtype in DTYPES for size in SIZES]


@pytest.mark.parametrize(("hiding", "dtype", "size"), sorted(random.Random(2).sample(MATRIX, len(MATRIX) // 20)))
def test_numbers(hiding: str, dtype: str, size: str) -> None:
    check(hiding, dtype, size)


@pytest.mark.slow
@pytest.mark.parametrize(("hiding", "dtype", "size"), MATRIX)
def test_numbers_of_all(hiding: str, dtype: str, size: str) -> None:
    check(hiding, dtype, size)


@pytest.mark.parametrize(("hiding", "size"), [("nothing", "prime"), ("lengths", "few to many"), ("lengths of queries", "prime")])
def test_nothing_outside_is_touched(hiding: str, size: str) -> None:
    graph = graph_of(paged(HIDING[hiding]), **types(HIDING[hiding], "f32", size, "i32"))
    inputs = inputs_for(graph, size)
    assert_close(launched_between_guards(kernel(graph), read_by(graph, inputs)), graph.run(*inputs), TOLERANCE["f32"])


def test_pages_that_the_pool_lacks_are_not_read() -> None:
    """What a table says behind a sample's last key does not matter."""
    graph = graph_of(paged(HIDING["lengths"]), **types(HIDING["lengths"], "f32", "prime"))
    named = dict(zip((node.name for node in graph.inputs), inputs_for(graph, "prime"), strict=True))
    named["lengths"] = torch.tensor([[4], [0]])
    found = graph.run(*named.values())
    named["pages"] = named["pages"].clone()
    named["pages"][0, 1:], named["pages"][1] = 10**9, -(10**9)
    ours = launched_between_guards(kernel(graph), read_by(graph, list(named.values())))
    assert_close(ours, found, TOLERANCE["f32"])
    assert torch.equal(ours[0][1], torch.zeros_like(ours[0][1]))


def test_meaning() -> None:
    """Pages one after another are keys one after another."""
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, tokens, 8, generator=generator) for heads, tokens in ((4, 3), (2, 12), (2, 12)))
    pools = [whole.unflatten(2, (3, 4)).transpose(1, 2).flatten(0, 1) for whole in (key, value)]
    found = paged_attention(query, *pools, torch.arange(6).view(2, 3), scale=0.3, right=4)
    assert_close([found], [attention(query, key, value, scale=0.3, right=4)], 1e-6)


def test_text(golden: Callable[[str], None]) -> None:
    golden(kernel(serving("bf16", 1), 2).source)


def test_a_file_runs_alone(tmp_path: Path) -> None:
    run_alone(kernel(graph_of(paged(HIDING["lengths"]), **types(HIDING["lengths"], "f32", "prime"))), tmp_path)


def test_refusals() -> None:
    given = {**types(HIDING["nothing"], "f32", "prime"), "pages": "i64[3,3]"}
    graph = graph_of(
        lambda b, query, key, value, pages: b.paged_attention(query, key, value, pages, scale=1.0), **{**given, "query": "f32[3,4,7,12]"}
    )
    node = next(node for node in graph.calls)
    assert not isinstance(covers(region_of([node])), str)
    node.args[3].meta["val"] = node.args[3].meta["val"].new_empty((2, 3))  # type: ignore[union-attr]
    assert covers(region_of([node])) == "paged_attention has a table of pages i64[2, 3]; the template takes i64 or i32 [3, 'n']"


# captured models


class Serving(nn.Module):
    """One step of a layer whose cache is a pool of pages. order: the axes of the pool, of pages P, slots S, heads H and width D."""

    def __init__(self, order: str = "PSHD", flat: bool = False) -> None:
        super().__init__()
        self.order, self.flat = order, flat

    def whole(self, pool: Tensor, table: Tensor) -> Tensor:
        """[B, Hk, n * S, D]."""
        batch, count = table.shape
        place = self.order.index("P")
        rows = pool.index_select(place, table.flatten()).unflatten(place, (batch, count)) if self.flat else None
        found = pool[(*[slice(None)] * place, table)] if rows is None else rows
        names = [*self.order[:place], "B", "n", *self.order[place + 1 :]]
        found = found.permute([names.index(name) for name in "BHnSD"])
        return found.flatten(2, 3)

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key, value = self.whole(keys, table), self.whole(values, table)
        seen = torch.arange(key.shape[2]) < lengths[:, None]
        return F.scaled_dot_product_attention(query, key, value, attn_mask=seen[:, None, None], enable_gqa=True)


def example(order: str) -> tuple[Tensor, ...]:
    generator = torch.Generator().manual_seed(0)
    sizes = {"P": 9, "S": 4, "H": 2, "D": 8}
    pools = [torch.randn([sizes[axis] for axis in order], generator=generator) for _ in range(2)]
    return (
        torch.randn(3, 4, 1, 8, generator=generator),
        *pools,
        torch.randint(0, 9, (3, 5), generator=generator),
        torch.tensor([0, 7, 20]),
    )


def form(graph: Graph) -> Graph:
    return read_pages(count_keys(graph))


@pytest.mark.parametrize(
    ("order", "flat"), [("PSHD", False), ("PSHD", True), ("PHSD", False), ("HPSD", False), ("HPSD", True), ("PHDS", False)]
)
def test_a_gather_is_read_through_its_table(order: str, flat: bool) -> None:
    inputs = example(order)
    model = Serving(order, flat).eval()
    found = form(normalize(capture(model, inputs).graph))
    (node,) = [node for node in found.calls if is_op(node, "paged_attention")]
    assert shape_of(arguments(node)["key"]) == (9, 2, 4, 8)
    assert shape_of(arguments(node)["pages"]) == (3, 5)
    assert not any(is_op(call, "index", "index_select") for call in found.calls)
    assert form(found) is found
    module = with_kernels(found, [(region_of([node]), None)])[0]
    for result in (found.run(*inputs), module(*inputs)):
        assert_close(result, [model(*inputs)], 1e-5)


def test_a_plan_reads_pages() -> None:
    prices = Prices(analytic(DEVICES["h100-sxm"]), DEVICES["h100-sxm"])
    planner = Fusion(prices)
    graph = normalize(capture(Serving().eval(), example("PSHD")).graph)
    assert [str(fused.region) for fused in planner.plan(planner.form(graph)).regions] == ["attention(paged_attention)"]


class Otherwise(Serving):
    """Gathers that are no pages."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind

    def forward(self, query: Tensor, keys: Tensor, values: Tensor, table: Tensor, lengths: Tensor) -> Tensor:
        key = self.whole(keys, table)
        value = self.whole(values, table + 1 if self.kind == "two tables" else table)
        if self.kind == "keys alone":
            value = values.flatten(0, 1)[None, :20].transpose(1, 2).expand(3, -1, -1, -1)
        if self.kind == "slots first":
            key, value = (x.unflatten(2, (5, 4)).transpose(2, 3).flatten(2, 3) for x in (key, value))
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("two tables", "looks its key up by table and its value by add"),
        ("keys alone", "looks its key up in keys, but not its value"),
        ("slots first", "the table table of .* does not say which pages of slots its keys are, one after another"),
    ],
)
def test_other_gathers_are_refused(kind: str, reason: str) -> None:
    inputs = example("PSHD")
    inputs = (*inputs[:3], inputs[3].clamp(max=7), inputs[4])
    graph = normalize(capture(Otherwise(kind).eval(), inputs).graph)
    assert read_pages(graph) is graph
    (refusal,) = page_refusals(graph)
    assert re.search(reason, refusal.reason), refusal.reason


# compilers


def serving(dtype: str, queries: int, width: int = 128) -> Graph:
    """A step of a model with grouped heads and a long cache."""
    at = {
        "query": vector(dtype, 4, 32, queries, width),
        "key": vector(dtype, 4096, 8, 16, width),
        "value": vector(dtype, 4096, 8, 16, width),
    }
    return graph_of(paged(HIDING["lengths"]), **at, lengths="i32[4,1]", pages="i32[4,512]")


def compiled(dtype: str, queries: int, width: int, number: int) -> Kernel:
    return kernel(serving(dtype, queries, width), number)


def test_no_spills() -> None:
    check_compiled([compiled("f16", 1, 128, 0)])


@pytest.mark.slow
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_spills_at_any_width(dtype: str) -> None:
    widths = [width for width in (16, 64, 80, 128, 256) if dtype != "f32" or width <= 128]
    check_compiled(
        [compiled(dtype, queries, width, place) for place, (width, queries) in enumerate((w, q) for w in widths for q in (1, 128))]
    )
