"""The legality matrix: every rule on every architecture, each cell found by doing it.

A cell says at how many places the rule is legal and why it is not at the others. What it finds legal it applies, and holds against the
contract: an exact rule keeps the function; a lossy one at the low end of its knob is bit-identical, and at a real knob gives a graph that
verifies, returns the same shapes and types, finite numbers, and rows that do not depend on the other rows of the batch; where it merges
tokens, equal ones are merged without a change.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from paretorch.capture import Program, capture
from paretorch.ir.analyze import analyze
from paretorch.ir.errors import CaptureError, InputError, ParetorchError, PlanError
from paretorch.ir.graph import Graph
from paretorch.ir.ops import is_op
from paretorch.ir.ops.tokens import lowered_by
from paretorch.rewrites import RULES
from paretorch.rewrites.apply import Candidate, apply_choice, apply_rule, propose
from paretorch.rewrites.normalize import normalize
from paretorch.rewrites.rule import Refusal, Rule
from tests.architectures import NAMES, make, rows_of

BATCH = 2
OTHER_BATCHES = (1, 7)
TOGETHER = 6  # sites of one rule that are taken at once
EXACT = 1e-4  # relative, in f32: rounding of sums in another order, through two layers
PARITY = 1e-6  # relative, in f64: equal tokens merged
MATCHES, MERGES = ("match_tokens", "match_above"), ("merge_tokens", "merge_ragged")
ALONE = 1e-9  # relative, in f64: a row of a batch against the same row beside others


@dataclass
class Cell:
    """One rule on one architecture. faults: broken promises; there must be none."""

    rule: Rule
    places: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if not self.places and not self.refused:
            return "·"
        return f"{self.places}/{self.places + sum(self.refused.values())}"


@dataclass
class Row:
    """One architecture. missing: why it was not captured."""

    name: str
    missing: str = ""
    batches: str = "fixed"
    cells: list[Cell] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)

    @property
    def all_faults(self) -> list[str]:
        return [*self.faults, *(f"{cell.rule.name}: {fault}" for cell in self.cells for fault in cell.faults)]


def row(name: str, rules: Sequence[Rule] = RULES, any_batch: bool | None = None) -> Row:
    """All cells of an architecture. any_batch: whether to try to capture it so; every fifth one if None, since that takes thrice as long."""
    found = Row(name)
    try:
        model, inputs = make(name, BATCH)
        program = captured(model, inputs, NAMES.index(name) % 5 == 0 if any_batch is None else any_batch)
    except (CaptureError, InputError) as error:
        found.missing = str(error)
        return found
    found.batches = "any" if program.is_dynamic else "fixed"
    subject = Subject(name, program, normalize(program.graph))
    found.faults += subject.differs(program.graph, EXACT, "capture")
    found.faults += subject.differs(subject.graph, EXACT, "normalize")
    lossy = [rule for rule in rules if not rule.is_exact]
    facts = analyze(subject.graph) if lossy else None
    for rule in rules:
        cell = Cell(rule)
        found.cells.append(cell)
        if rule.is_exact:
            exact(subject, cell)
        else:
            candidates, refusals = propose(subject.graph, facts, [rule])  # type: ignore[arg-type]
            inexact(subject, cell, candidates, refusals)
    return found


def captured(model: torch.nn.Module, inputs: Any, any_batch: bool) -> Program:
    """For any batch where that is asked and the model can be captured so, else for this one."""
    names = list(inputs) if isinstance(inputs, dict) else list(inspect.signature(model.forward).parameters)
    values = list(inputs.values()) if isinstance(inputs, dict) else list(inputs)
    batched = {name: {0: "batch"} for name, x in zip(names, values, strict=False) if isinstance(x, Tensor) and x.dim() and len(x) == BATCH}
    if any_batch and len(batched) == sum(isinstance(value, Tensor) for value in values):
        try:
            return capture(model, inputs, batched)
        except (CaptureError, InputError):
            pass  # its code makes a choice by the batch
    return capture(model, inputs)


class Subject:
    """One captured model with what its original gives on several inputs."""

    def __init__(self, name: str, program: Program, graph: Graph) -> None:
        self.name, self.program, self.graph = name, program, graph
        self.inputs = program.example
        self.expected = program.run_original(*self.inputs)
        self.names = {node.name for node in graph.nodes}

    @cached_property
    def plain(self) -> tuple[Any, ...]:
        """What the normalized graph gives."""
        return self.graph.run(*self.inputs)

    @cached_property
    def others(self) -> list[tuple[int, tuple[Tensor, ...], tuple[Any, ...]]]:
        """Inputs of other batches, with the graph's results."""
        if not self.program.is_dynamic:
            return []
        given = [(batch, self.program.flatten(*_call(make(self.name, batch)[1]))) for batch in OTHER_BATCHES]
        return [(batch, inputs, self.graph.run(*inputs)) for batch, inputs in given]

    @cached_property
    def mixed(self) -> tuple[Tensor, ...]:
        """The inputs with every row but the first replaced by another one."""
        chance = torch.Generator().manual_seed(7)

        def pick(x: Tensor) -> Tensor:
            if not x.dim() or len(x) != BATCH:
                return x
            rest = torch.randn(x[1:].shape, generator=chance).to(x.dtype) if x.is_floating_point() else x[1:].flip(-1)
            return torch.cat([x[:1], rest])

        return tuple(rows_of(self.inputs, pick))

    @cached_property
    def unpadded(self) -> tuple[Tensor, ...]:
        """The inputs without padding, which goes before any token is merged, and whose own outputs nobody reads."""
        named = zip(self.graph.inputs, self.inputs, strict=True)
        return tuple(torch.ones_like(x) if "mask" in str(node.target) else x for node, x in named)

    @cached_property
    def independent(self) -> list[int]:
        """The outputs whose first row does not depend on the other rows, in the graph as it was."""
        first, second = self.alone(self.graph)
        return [
            place for place, (a, b) in enumerate(zip(first, second, strict=True))
            if isinstance(a, Tensor) and a.dim() and len(a) == BATCH and a.is_floating_point() and distance(a[0], b[0]) <= ALONE
        ]  # fmt: skip

    def alone(self, graph: Graph) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
        """Results of a graph in float64 on the inputs, and on those with the same first row."""
        module = doubled(graph).module()
        with torch.no_grad():
            return module(*map(double, self.inputs)), module(*map(double, self.mixed))

    def differs(self, graph: Graph, limit: float, what: str) -> list[str]:
        """A sentence if a graph does not give what the original gives."""
        try:
            found = graph.run(*self.inputs)
        except Exception as error:  # what a broken graph raises is not known
            return [f"{what} does not run: {type(error).__name__}: {error}"]
        return [f"{what}: output {i} {reason}" for i, reason in differences(self.expected, found, limit)]

    def breaks(self, graph: Graph) -> list[str]:
        """What a lossy graph must keep and does not."""
        try:
            faults = [f"output {i} {reason}" for i, reason in differences(self.plain, graph.run(*self.inputs), None)]
            for batch, inputs, expected in self.others:
                faults += [f"batch {batch}: output {i} {reason}" for i, reason in differences(expected, graph.run(*inputs), None)]
            first, second = self.alone(graph) if self.independent else ((), ())
        except Exception as error:  # what a broken graph raises is not known
            return [f"does not run: {type(error).__name__}: {error}"]
        for place in self.independent:
            apart = distance(first[place][0], second[place][0])
            if not apart <= ALONE:
                faults.append(f"the first row of output {place} moves by {apart:.1e} with the other rows of the batch")
        return faults


def exact(subject: Subject, cell: Cell) -> None:
    try:
        after, applied, refusals = apply_rule(cell.rule, subject.graph)
    except ParetorchError as error:
        cell.faults.append(f"{type(error).__name__}: {error}")
        return
    cell.places = len(applied)
    cell.refused.update(refusal.reason for refusal in refusals)
    if applied:
        cell.faults += subject.differs(after, EXACT, cell.rule.name)
        for batch, inputs, expected in subject.others:
            cell.faults += [f"batch {batch}: output {i} {reason}" for i, reason in differences(expected, after.run(*inputs), EXACT)]


def inexact(subject: Subject, cell: Cell, candidates: Sequence[Candidate], refusals: Sequence[Refusal]) -> None:
    cell.places = len(candidates)
    cell.refused.update(refusal.reason for refusal in refusals)
    if not candidates:
        return
    low = apply_choice(cell.rule, subject.graph, candidates[0].site.name, cell.rule.knobs[0]).run(*subject.inputs)
    cell.faults += [f"at its low end: output {i} {reason}" for i, reason in differences(subject.plain, low, 0.0)]
    for what, make_graph in trials(subject.graph, cell.rule, candidates):
        try:
            after = make_graph()
        except PlanError as error:
            cell.faults.append(f"{what}: offered, then refused: {error}")
            continue
        except Exception as error:  # only a refusal is expected
            cell.faults.append(f"{what}: {type(error).__name__}: {error}")
            continue
        cell.faults += [f"{what}: {reason}" for reason in (*subject.breaks(after), *parity(subject, after))]


def trials(graph: Graph, rule: Rule, candidates: Sequence[Candidate]) -> Iterator[tuple[str, Callable[[], Graph]]]:
    """The first site at the weakest knob, the last at the strongest, and several at the strongest, of which later ones may be refused."""
    for candidate, knob in dict.fromkeys(((candidates[0], candidates[0].knobs[0]), (candidates[-1], candidates[-1].knobs[-1]))):
        site = candidate.site.name
        yield f"{site} at {knob}", lambda site=site, knob=knob: apply_choice(rule, graph, site, knob)  # type: ignore[misc]

    def everywhere() -> Graph:
        after = graph
        for candidate in candidates[:TOGETHER]:
            try:
                after = apply_choice(rule, after, candidate.site.name, candidate.knobs[-1])
            except PlanError:
                continue  # an earlier one took it out
        return after

    if len(candidates) > 1:
        yield "at several sites", everywhere


def parity(subject: Subject, after: Graph) -> Iterator[str]:
    """Merging equal tokens must change nothing, wherever one match and one merge are all that was done.

    Both graphs run in float64 with the value that is merged, and the metric of the match, replaced: the pairs to merge are equal there. Where
    attention gives equal tokens different results, by their places, and these are brought down, the original's are averaged over each pair.
    """
    matches, merges = ([node for node in after.calls if is_op(node, *names)] for names in (MATCHES, MERGES))
    brought_down = {merge for node in after.calls if is_op(node, "attention", "local_attention") for merge in lowered_by(node)}
    streams = [
        merge for merge in merges
        if merge.args[0].name in subject.names and merge.args[0].meta["val"].shape[-1] > 1 and merge not in brought_down
    ]  # fmt: skip
    if len(matches) != 1 or len(streams) != 1:
        return
    metric, _, count, protected = matches[0].args[:4]
    value = streams[0].args[0]
    rows = Overridden(doubled(subject.graph), {}).value_of(value.name, subject.unpadded)
    near = torch.eye(rows.shape[1], dtype=torch.float64).repeat(rows.shape[0], 1, 1)  # all others are as unlike as can be
    pairs = range(protected, protected + 2 * count, 2)
    for place in pairs:
        for tokens in (rows, near):
            tokens[:, place + 1] = tokens[:, place]
    averaged = {merge.args[0].name for merge in brought_down}
    if not averaged <= subject.names:
        return  # laid out anew before they are brought down
    expected = Overridden(doubled(subject.graph), {value.name: rows}, averaged, pairs).results(subject.unpadded)
    found = Overridden(doubled(after), {value.name: rows, metric.name: near}).results(subject.unpadded)
    for place, reason in differences(expected, found, PARITY):
        yield f"merging equal tokens at {value.name}: output {place} {reason}"


class Overridden(fx.Interpreter):
    """Runs a graph with the values of some nodes given, and the rows of others averaged over pairs of neighbours that begin at these places."""

    def __init__(self, graph: Graph, given: dict[str, Tensor], averaged: Collection[str] = (), pairs: Sequence[int] = ()) -> None:
        super().__init__(graph.module(), garbage_collect_values=False)
        self.given, self.averaged, self.pairs = given, averaged, pairs

    def run_node(self, node: fx.Node) -> Any:
        if node.name in self.given:
            return self.given[node.name]
        found = super().run_node(node)
        if node.name in self.averaged:
            found = found.clone()
            for place in self.pairs:
                found[:, place : place + 2] = found[:, place : place + 2].mean(1, keepdim=True)
        return found

    def results(self, inputs: Sequence[Tensor]) -> tuple[Any, ...]:
        with torch.no_grad():
            return tuple(self.run(*map(double, inputs)))

    def value_of(self, name: str, inputs: Sequence[Tensor]) -> Tensor:
        """What one node makes."""
        self.results(inputs)
        return next(value for node, value in self.env.items() if node.name == name).clone()


def differences(expected: Sequence[Any], found: Sequence[Any], limit: float | None) -> Iterator[tuple[int, str]]:
    """Outputs that are not as expected. limit: the largest relative error; None where only types, shapes and finite numbers count."""
    for place, (one, other) in enumerate(zip(expected, found, strict=True)):
        if not isinstance(one, Tensor):
            if limit is not None and one != other:
                yield place, f"is {other}; expected {one}"
            continue
        if one.shape != other.shape or one.dtype != other.dtype:
            yield place, f"is {other.dtype} of {list(other.shape)}; expected {one.dtype} of {list(one.shape)}"
        elif limit is None:
            if one.isfinite().all() and not other.isfinite().all():
                yield place, f"has {int((~other.isfinite()).sum())} numbers that are not finite"
        elif not distance(one, other) <= limit:
            yield place, f"is {distance(one, other):.1e} away"


def distance(one: Tensor, other: Tensor) -> float:
    """Relative distance; 0 for equal ones, also where they are infinite or not numbers."""
    one, other = one.detach().double(), other.detach().double()
    if torch.equal(one.nan_to_num(nan=0.5), other.nan_to_num(nan=0.5)):
        return 0.0
    if not torch.equal(one.isfinite(), other.isfinite()):
        return float("inf")
    one, other = one[one.isfinite()], other[other.isfinite()]
    return float((one - other).norm() / one.norm().clamp(min=1e-30))


def double(value: Any) -> Any:
    """A tensor or dtype in float64 instead of float32."""
    if isinstance(value, torch.dtype):
        return torch.float64 if value == torch.float32 else value
    return value.double() if isinstance(value, Tensor) and value.dtype == torch.float32 else value


def doubled(graph: Graph) -> Graph:
    """The same graph in float64."""
    graph = graph.copy()
    graph.constants = {name: double(tensor) for name, tensor in graph.constants.items()}
    for node in graph.calls:
        node.args, node.kwargs = torch.utils._pytree.tree_map(double, (node.args, dict(node.kwargs)))
    return graph


def _call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return ((), inputs) if isinstance(inputs, dict) else (tuple(inputs), {})
