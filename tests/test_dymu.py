"""Merging all pairs that are alike enough: a number of tokens of its own for each sample, in rows of one fixed number."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx import Node

from paretorch.capture import capture
from paretorch.codegen.onnx import check_onnx, to_onnx
from paretorch.cost_model.calibrate import analytic
from paretorch.cost_model.devices import DEVICES
from paretorch.cost_model.price import Prices
from paretorch.fusion import Fusion
from paretorch.ir.builder import Builder, build
from paretorch.ir.errors import PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.ir.ops.token_ragged import match_above, merge_ragged
from paretorch.ir.ops.tokens import is_reduction, match_tokens, merge_tokens, source_map
from paretorch.ir.types import TensorType
from paretorch.ir.verify import verify
from paretorch.rewrites import rules_named
from paretorch.rewrites.apply import apply_choice, sites_of
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.normalize.count_rows import count_rows
from paretorch.rewrites.rule import Knob
from paretorch.rewrites.token_merging.dymu import RULE
from tests.test_count_keys import run_with_kernels
from tests.zoo import Block

EXACT = {"rtol": 0.0, "atol": 1e-10}  # float64: the same function, other orders of summation
NEVER = 2.0  # a threshold that no cosine reaches
T, C = 17, 8


class Reader(nn.Module):
    """Blocks on [B, T, C], a norm, and what `read` makes of its rows."""

    def __init__(self, read: Callable[[Tensor], Any], depth: int = 3) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks, self.norm, self.read = nn.ModuleList(Block(C, 2) for _ in range(depth)), nn.LayerNorm(C), read

    def forward(self, x: Tensor) -> Any:
        for block in self.blocks:
            x = block(x)
        return self.read(self.norm(x))


READS: dict[str, Callable[[Tensor], Any]] = {
    "class": lambda x: x[:, 0], "mean": lambda x: x.mean(1), "rest": lambda x: x[:, 1:].mean(1), "sum": lambda x: x.sum(1),
    "dense": lambda x: (x, x[:, 0]), "softly": lambda x: (torch.softmax(x[..., :1], 1) * x).sum(1), "largest": lambda x: x.amax(1),
}  # fmt: skip


@cache
def graph_of(read: str = "class", depth: int = 3, batch: int = 3) -> Graph:
    """For any batch, in float64."""
    x = torch.randn(batch, T, C, dtype=torch.float64)
    sizes = ({0: torch.export.Dim("batch", min=1, max=64)},)
    return normalize(capture(Reader(READS[read], depth).double().eval(), (x,), sizes).graph)


def alike() -> Tensor:
    """Three samples: equal tokens, pairs of equal ones, and tokens that are all different."""
    torch.manual_seed(1)
    x = torch.randn(3, T, C, dtype=torch.float64)
    return torch.stack([x[0, :1].expand(T, -1), torch.cat([x[1, :1], x[1, 1:9].repeat_interleave(2, 0)]), x[2]])


def taken(graph: Graph, *steps: tuple[str, Knob], rule: str = "dymu") -> Graph:
    for site, knob in steps:
        graph = apply_choice(rules_named([rule])[0], graph, site, knob)
    return graph


def looked_at(graph: Graph, find: Callable[[Graph, Builder], Sequence[Node]], *inputs: Tensor) -> list[Tensor]:
    """What these nodes of a graph are."""
    graph = graph.copy()
    graph.set_outputs(find(graph, Builder(graph, graph.output_node)))
    return list(graph.run(*inputs))


def sizes_behind(graph: Graph, *inputs: Tensor) -> list[Tensor]:
    return looked_at(graph, lambda g, b: [b.item(node, 1) for node in g.calls if is_reduction(node)], *inputs)


# the ops


def by_hand(metric: Tensor, size: Tensor, count: int, protected: int, threshold: float) -> tuple[dict[int, int], list[int]]:
    """Who joins whom in one sample, and the order in which the others stand: real ones, then padding as far as there is room."""
    unit, tokens = F.normalize(metric, dim=-1), len(metric)
    second = range(protected + 1, tokens, 2)
    edges = []
    for source in range(protected, tokens, 2):
        if size[source] > 0 and any(size[b] > 0 for b in second):
            cosine, partner = max((float(unit[source] @ unit[b]), -b) for b in second if size[b] > 0)
            edges.append((cosine, -source, -partner))
    edges.sort(reverse=True)
    real = sum(size[protected:] > 0)
    needed = int(real) - (tokens - count - protected)
    joins = {-source: partner for place, (cosine, source, partner) in enumerate(edges) if place < needed or cosine > threshold}
    order = [token for token in range(tokens) if token not in joins and (token < protected or size[token] > 0)]
    return joins, order


@settings(max_examples=40, deadline=None, derandomize=True)
@given(st.integers(2, 20), st.integers(0, 3), st.integers(1, 10), st.sampled_from([-1.0, 0.3, 0.7, NEVER]), st.integers(0, 10**6))
def test_all_pairs_above_a_threshold_merge(tokens: int, protected: int, count: int, threshold: float, seed: int) -> None:
    count = min(count, (tokens - protected) // 2)
    if count < 1:
        return
    generator = torch.Generator().manual_seed(seed)
    metric, x = (torch.randn(2, tokens, width, generator=generator, dtype=torch.float64) for width in (5, 7))
    size = torch.randint(0, 3, (2, tokens), generator=generator).double()
    kept, source, target, places = match_above(metric, size, count, protected, threshold)
    merged, new_size = merge_ragged(x, kept, source, target, size)
    assert merged.shape == (2, tokens - count, 7)
    for b in range(2):
        joins, order = by_hand(metric[b], size[b], count, protected, threshold)
        assert len(order) <= tokens - count
        assert kept[b, : len(order)].tolist() == order
        assert int((new_size[b] > 0).sum()) == sum(size[b, token] > 0 for token in order)
        for token in range(tokens):
            if size[b, token] > 0 or token < protected:
                assert places[b, token] == order.index(joins.get(token, token))
        for row, token in enumerate(order):
            group = [token, *(source for source, partner in joins.items() if partner == token)]
            weight = size[b, group]
            torch.testing.assert_close(new_size[b, row], weight.sum())
            if len(group) == 1:
                assert torch.equal(merged[b, row], x[b, token])  # to the bit
            else:
                torch.testing.assert_close(merged[b, row], (weight[:, None] * x[b, group]).sum(0) / weight.sum())
    assert torch.isfinite(merged).all()
    torch.testing.assert_close(new_size.sum(1), size.sum(1))


def test_a_threshold_that_nothing_reaches_is_bipartite_soft_matching() -> None:
    torch.manual_seed(0)
    metric, x = torch.randn(3, 13, 4), torch.randn(3, 13, 5, dtype=torch.float64)
    plain, ragged = match_tokens(metric, None, 5, 1), match_above(metric, None, 5, 1, NEVER)
    assert torch.equal(plain[0], ragged[0])
    assert torch.equal(source_map(*plain), ragged[3])
    for one, other in zip(merge_tokens(x, *plain), merge_ragged(x, *ragged[:3]), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-14)


def test_ties_and_nothing_but_padding() -> None:
    kept, _, target, places = match_above(torch.ones(1, 9, 4), None, 2, 1, 1.5)
    assert kept.tolist() == [[0, 2, 4, 5, 6, 7, 8]]
    assert target.tolist() == [[1, 1, 7, 7]]
    assert places.tolist() == [[0, 1, 1, 1, 2, 3, 4, 5, 6]]
    empty = torch.zeros(2, 9)
    match = match_above(torch.randn(2, 9, 4), empty, 3, 0, 0.5)
    merged, size = merge_ragged(torch.randn(2, 9, 3), *match[:3], empty)
    assert torch.isfinite(merged).all()
    assert not size.any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_dtypes(dtype: torch.dtype) -> None:
    x = torch.randn(3, 9, 4).to(dtype)
    merged, size = merge_ragged(x, *match_above(x, None, 3, 1, 0.2)[:3])
    assert merged.dtype == dtype
    assert size.dtype == torch.promote_types(dtype, torch.float32)


def test_onnx() -> None:
    def outputs(b: Builder, x: Node, size: Node) -> tuple[Node, ...]:
        found = []
        for known in (None, size):
            match = b.match_above(x, known, 4, 1, 0.3)
            items = [b.item(match, number) for number in range(4)]
            merge = b.merge_ragged(x, *items[:3], known)
            found += [*items, b.item(merge, 0), b.item(merge, 1), b.follow_map(items[3], items[2])]
        return tuple(found)

    graph = build("ragged", outputs, x=TensorType("f32", (2, 13, 4)), size=TensorType("f32", (2, 13)))
    torch.manual_seed(0)
    size = (torch.arange(13) < torch.tensor([[13], [8]])).float()
    check_onnx(to_onnx(graph), graph, (torch.randn(2, 13, 4), size), 1e-5)


# the rule


@pytest.mark.parametrize("read", [read for read in READS if read != "largest"])
def test_each_sample_keeps_its_own_number_of_tokens(read: str) -> None:
    """Each gives what it gives alone, and what merging that number of tokens gives without rows to spare."""
    graph, x = graph_of(read), alike()
    after = taken(graph, ("attention", "0.125 above 0.9999"))
    (size,) = sizes_behind(after, x)
    rows = [1 + 8, 1 + 8, T - 2] if read in ("class", "rest", "dense") else [8, 9, T - 2]
    assert (size > 0).sum(1).tolist() == rows
    assert size.shape[1] == T - 2
    assert size.sum(1).tolist() == [T] * 3
    together = after.run(x)
    for sample, left in enumerate(rows):
        own = x[sample : sample + 1]
        plain = taken(graph, ("attention", T - left), rule="tome") if left >= T - 8 else graph
        for one, alone, wanted, original in zip(together, after.run(own), plain.run(own), graph.run(own), strict=True):
            torch.testing.assert_close(one[sample : sample + 1], alone, **EXACT)
            if left >= T - 8:
                torch.testing.assert_close(alone, wanted, **EXACT)
            if sample < 2:
                torch.testing.assert_close(alone, original, **EXACT)  # what was merged was equal


def spoiled(graph: Graph) -> Graph:
    """A twin in which every row of size 0 behind the first step holds something else."""
    graph = graph.copy()
    step = next(node for node in graph.calls if is_op(node, "merge_ragged"))
    rows, size = (next(user for user in step.users if user.args[1] == number) for number in range(2))
    b = Builder(graph, rows.next if rows.args[1] == 0 and rows.next is not size else size.next)
    empty = b.call(torch.ops.aten.eq.Scalar, (size, 0.0))
    other = b.add(rows, b.mul(b.unsqueeze(b.call(torch.ops.aten._to_copy.default, (empty,), {"dtype": torch.float64}), -1), 7.0))
    for user in [user for user in rows.users if user is not other]:
        user.replace_input_with(rows, other)
    return graph


AFTER = {"tome": 3, "pitome": 0.2, "tofu": -0.2, "evit": 0.2, "divprune": 0.2, "visionzip": 0.2, "dymu": "0.2 above 0.9", "tomesd": None}


@pytest.mark.parametrize("later", AFTER)
@pytest.mark.parametrize("read", ["class", "mean", "dense", "softly"])
def test_rows_without_a_token_reach_nothing(read: str, later: str) -> None:
    graph = taken(graph_of(read), ("attention", "0.125 above 0.9999"))
    found, _ = sites_of(rules_named([later])[0], graph)
    chosen = [site for site in found if site.name.startswith("attention_1")]
    if later == "evit" and read not in ("class", "rest", "dense"):
        assert not chosen  # there is no class token
    for site in chosen[:1]:
        knob = AFTER[later] if AFTER[later] is not None else (site.values or rules_named([later])[0].knobs)[-1]
        graph = taken(graph, (site.name, knob), rule=later)
    x = alike()
    assert int((sizes_behind(graph, x)[0] == 0).sum()) >= 12
    for one, other in zip(graph.run(x), spoiled(graph).run(x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)


def test_a_later_step_takes_empty_rows_before_it_merges() -> None:
    """The first step has merged all that the second would have to."""
    graph, x = graph_of(), alike()[:2]
    one, two = (taken(graph, ("attention", "0.125 above 0.9999"), *more) for more in ((), (("attention_1", f"0.3 above {NEVER}"),)))
    torch.testing.assert_close(one.run(x), two.run(x), **EXACT)
    assert sizes_behind(two, x)[1].shape == (2, T - 6)
    plain = taken(graph, ("attention", 2), ("attention_1", 4), rule="tome")
    assert not torch.equal(plain.run(x)[0][1], one.run(x)[0][1])


def test_maps_follow_each_other_in_whichever_order_steps_are_put_in() -> None:
    """Each token gets the row that it is part of after steps that take other numbers from each sample."""
    torch.manual_seed(5)
    steps, x = [("attention", "0.125 above 0.7"), ("attention_1", "0.125 above 0.9")], torch.cat([alike(), torch.randn(2, T, C).double()])
    forward, backward = taken(graph_of("dense"), *steps), taken(graph_of("dense"), *steps[::-1])
    for one, other in zip(forward.run(x), backward.run(x), strict=True):
        torch.testing.assert_close(one, other, **EXACT)
    first, last = sizes_behind(forward, x)
    left = (last > 0).sum(1).tolist()
    assert ((first > 0).sum(1) > (last > 0).sum(1)).any()
    assert len(set(left)) > 2
    assert [len(rows.round(decimals=9).unique(dim=0)) for rows in forward.run(x)[0][2:]] == left[2:]  # the first two hold equal tokens
    for sample in range(len(x)):
        for one, other in zip(forward.run(x[sample : sample + 1]), forward.run(x), strict=True):
            torch.testing.assert_close(one[0], other[sample], **EXACT)


def test_the_largest_of_all_rows_is_refused() -> None:
    found, refusals = sites_of(RULE, graph_of("largest"))
    assert not found
    assert "is aten.amax.default over all rows, and one that stands for no token could be it" in refusals[0].reason
    later = taken(graph_of("largest"), ("attention_1", 3), rule="tome")
    assert "over all rows" in sites_of(RULE, later)[1][0].reason


@pytest.mark.parametrize("knob", [0.08, "0.08", "much above 0.9", "0.08 above it"])
def test_a_knob_of_another_rule_is_refused(knob: Knob) -> None:
    with pytest.raises(PlanError, match=r"dymu takes a share and a threshold, as in '0.02 above 0.9', not "):
        taken(graph_of(), ("attention", knob))


# for kernels


def test_packed_rows_are_counted_for_kernels() -> None:
    graph, x = graph_of(), alike()
    after = taken(graph, ("attention", "0.125 above 0.9999"), ("attention_2", "0.2 above 0.9999"))
    form = Fusion(Prices(analytic(DEVICES["h100-sxm"]), DEVICES["h100-sxm"])).form(after)
    lengths = [node.kwargs.get("lengths") for node in form.calls if is_op(node, "attention")]
    assert lengths[0] is None
    assert lengths[1] is not None
    assert lengths[1] is lengths[2]
    (found,) = looked_at(form, lambda g, _: [g.node(lengths[1].name)], x)  # type: ignore[list-item]
    assert found.tolist() == [[9], [9], [T - 2]]
    verify(form)
    assert count_rows(form) is form
    assert all(node.kwargs.get("lengths") is None for node in after.calls if is_op(node, "attention"))
    torch.testing.assert_close(form.run(x), after.run(x), **EXACT)
    behind = taken(taken(graph, ("attention", "0.125 above 0.9999")), ("attention_1", 3), rule="tome")  # attention_2 reads what that leaves
    counted = [node.kwargs.get("lengths") is not None for node in count_rows(behind).calls if is_op(node, "attention")]
    assert counted == [False, True, False]  # rows that a later step left are not packed


def test_a_kernel_reads_the_numbers() -> None:
    pytest.importorskip("triton")
    x = alike().float()
    graph = normalize(capture(Reader(READS["mean"], 2).eval(), (x,)).graph)
    after = taken(graph, ("attention", "0.125 above 0.9999"))
    form = count_rows(after)
    torch.testing.assert_close(run_with_kernels(form, [x])[0], after.run(x)[0], rtol=0, atol=1e-5)
