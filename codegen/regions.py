"""Regions: sets of nodes that one kernel can compute. The compiler's planner chooses among them by price.

region_of(nodes)            -> the region of these nodes, with the views between them
forms_of(region)            -> the same region, and it by other templates that may take it
covers(region)              -> the template that takes it, or the reason why none does
can_compute(node)           -> whether a kernel may hold this node
schedules_of(region)        -> the schedules that its template offers, the default first
resources(kernel, arch)     -> registers, spills and shared bytes of the compiled kernel

A view between two nodes of a region is followed by coordinates and never made; where someone outside uses it too, it is a view of what is written.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from graphlib import CycleError, TopologicalSorter

from torch.fx import Node

from paretorch.codegen.coordinates import source_of
from paretorch.codegen.emission import Emitter, emitter_for
from paretorch.codegen.expressions import TRITON_TYPES, dtype_of, not_expressible, row_text, unique_names
from paretorch.codegen.kernel import Binary, Kernel, KernelTemplate, Region, Schedule
from paretorch.codegen.product import PLAIN, SPLIT
from paretorch.codegen.symbols import symbols_of
from paretorch.codegen.templates import TEMPLATES
from paretorch.codegen.templates.row import LONGEST_ROW, MOST_WARPS
from paretorch.codegen.whole_op import WholeOp, region_of_op, template_name
from paretorch.codegen.whole_ops import WHOLE_OPS, not_taken
from paretorch.ir.errors import LoweringError
from paretorch.ir.graph import Graph, arguments, shape_of
from paretorch.ir.ops import is_op

MOST_READS = 16  # operands of one kernel
MOST_NODES = 96
MOST_REGISTERS = 160  # f32 layer norm with a residual spilled at 192 on sm_80, RMS norm did not at 160 (cross-compiled with triton 3.7)
FORMS = {PLAIN: (SPLIT,)}
STEPS_OF_A_NODE = 6  # at most: a layer norm with weight and bias


def can_compute(node: Node) -> bool:
    """Whether a kernel may compute this node: it has Triton text, is no mere view, and nobody reads its storage, which a kernel lays out anew."""
    if node.op != "call_function" or any(is_op(user, "as_strided") for user in node.users):
        return False
    own = template_name(node)
    if own is not None:
        return WHOLE_OPS[own].refuses(node) is None
    return not_expressible(node) is None and source_of(node) is None


def region_of(members: Iterable[Node]) -> Region:
    """The region that computes these nodes, given in graph order."""
    chosen = list(members)
    if len(chosen) == 1 and template_name(chosen[0]) is not None:
        return region_of_op(chosen[0])
    inside = dict.fromkeys(chosen)
    for node in chosen:
        for operand in node.all_input_nodes:
            inside |= dict.fromkeys(_views_to(operand, inside))
    inside |= dict.fromkeys(_views_of_one(chosen, inside))
    nodes = tuple(sorted(inside))
    reads = dict.fromkeys(operand for node in nodes for operand in node.all_input_nodes if operand not in inside and is_tensor(operand))
    writes = tuple(node for node in chosen if _is_used_outside(node, inside))
    region = Region(_template(chosen), nodes, tuple(reads), writes, _space(chosen, writes))
    return replace(region, template="long_row") if region.template == "row" and _overflows(region) else region


def _overflows(region: Region) -> bool:
    """Whether a row is too long to be held whole by one program's threads, all of its values counted."""
    width = region.shape[-1]
    if not isinstance(width, int):
        return False
    per_thread = width // (32 * MOST_WARPS)
    if per_thread * (len(region.reads) + STEPS_OF_A_NODE * len(region.nodes)) <= MOST_REGISTERS:
        return False
    try:
        emitter = _emitter(region)
    except LoweringError:
        return False  # `covers` says why
    return _registers(region, emitter) > MOST_REGISTERS


def forms_of(region: Region) -> list[Region]:
    """This region, and where its template has another form, it in that form; which of them are taken `covers` says, which is faster their prices."""
    return [region, *(replace(region, template=other) for other in FORMS.get(region.template, ()))]


def is_tensor(node: Node) -> bool:
    return dtype_of(node) != ""


def covers(region: Region) -> KernelTemplate | WholeOp | str:
    """The template that takes this region, or a sentence."""
    if region.template in WHOLE_OPS:
        return not_taken(region) or WHOLE_OPS[region.template]
    try:
        emitted(region)
    except LoweringError as error:
        return str(error)
    return TEMPLATES[region.template]


def emitted(region: Region) -> Emitter:
    """The lines that compute what the region writes. Raises LoweringError with the reason if no template takes it."""
    emitter = _emitter(region)
    if region.template == "long_row" and emitter.conditions:
        raise LoweringError("it joins parts in rows of several blocks; the template takes them as they are")
    registers = _registers(region, emitter)
    if registers > MOST_REGISTERS:
        raise LoweringError(f"a thread would hold {registers} values at once; it has registers for {MOST_REGISTERS}")
    return emitter


def _emitter(region: Region) -> Emitter:
    """Every line, whatever it takes. Raises LoweringError."""
    reason = _refusal(region)
    if reason is not None:
        raise LoweringError(reason)
    names = unique_names([*region.reads, *region.nodes])
    emitter = emitter_for(region.nodes, region.reads, names, region.shape, is_rows=region.is_rows)
    for node in region.writes:
        emitter.write(node)
    symbols_of(region)
    return emitter


def _registers(region: Region, emitter: Emitter) -> int:
    """How many values a thread holds at once, at the default schedule."""
    options = default_schedule(region, emitter)
    return emitter.held(region.writes) * options["BLOCK"] // (32 * options["num_warps"])


def default_schedule(region: Region, emitter: Emitter) -> Schedule:
    """The template's first choice for this region."""
    return _schedules(region, emitter)[0]


def schedules_of(region: Region) -> tuple[Schedule, ...]:
    """What its template offers for this region, the default first. Raises LoweringError if no template takes it."""
    if region.template in WHOLE_OPS:
        return WHOLE_OPS[region.template].schedules(region)
    return _schedules(region, emitted(region))


def _schedules(region: Region, emitter: Emitter) -> tuple[Schedule, ...]:
    width = region.shape[-1] if region.is_rows else None
    return TEMPLATES[region.template].schedules(width, emitter.held(region.writes))


def _refusal(region: Region) -> str | None:
    for node in region.nodes:
        reason = not_expressible(node)
        if reason is not None and is_tensor(node):
            return reason
    odd = next((node for node in region.reads if dtype_of(node) not in TRITON_TYPES), None)
    if odd is not None:
        return f"{odd.name} is {odd.meta.get('val')}; the templates read tensors of real numbers"
    if not region.reads or len(region.reads) > MOST_READS:
        return f"it reads {len(region.reads)} values; the templates take 1 to {MOST_READS}"
    if len(region.nodes) > MOST_NODES:
        return f"it has {len(region.nodes)} nodes; the templates take {MOST_NODES}"
    if not region.writes:
        return "nobody uses its values"
    return _unlike(region)


def _unlike(region: Region) -> str | None:
    """Why its values do not go with one space, if so."""
    per_row = {region.shape[:-1], (*region.shape[:-1], 1)} if region.is_rows else set()
    shapes = dict.fromkeys(shape_of(node) for node in region.writes)
    if any(shape != region.shape and shape not in per_row for shape in shapes):
        return f"its values have several shapes: {', '.join(str(list(shape)) for shape in dict.fromkeys([*shapes, region.shape]))}"
    return None


def _template(nodes: Sequence[Node]) -> str:
    own = _joining(nodes)
    if own is not None:
        return template_name(own) or ""
    rows = [node for node in nodes if row_text(node) is not None]
    if not rows:
        return "elementwise"
    width = _row_shape(rows[0])[-1]
    return "long_row" if isinstance(width, int) and width > LONGEST_ROW else "row"


def _joining(nodes: Sequence[Node]) -> Node | None:
    """The node of a whole op whose template takes others beside it."""
    return next((node for node in nodes if (name := template_name(node)) is not None and WHOLE_OPS[name].joins is not None), None)


def _row_shape(node: Node) -> tuple[object, ...]:
    """The shape of what an op over rows takes."""
    text = row_text(node)
    assert text is not None  # asked by the callers
    return shape_of(arguments(node)[text.row])


def _space(nodes: Sequence[Node], writes: Sequence[Node]) -> tuple[object, ...]:
    own, rows = _joining(nodes), [node for node in nodes if row_text(node) is not None]
    if own is not None:
        return _part_of(shape_of(own), writes)
    return _row_shape(rows[0]) if rows else shape_of((writes or nodes)[0])


def _part_of(shape: tuple[object, ...], writes: Sequence[Node]) -> tuple[object, ...]:
    """The shape of a product, or of what is made of parts of its last axis, if that is what is written."""
    found = shape_of(writes[0]) if writes else shape
    if not shape or found[:-1] != shape[:-1] or not all(isinstance(sizes[-1], int) for sizes in (found, shape)):
        return shape
    return min(found, shape, key=lambda sizes: sizes[-1])


def _views_to(operand: Node, inside: Collection[Node]) -> list[Node]:
    """The views between an operand and the value inside that it looks at; none if that value stands outside."""
    chain, node = [], operand
    while node not in inside and (source := source_of(node)) is not None:
        chain.append(node)
        if is_op(node, "getitem"):
            chain.append(node.all_input_nodes[0])
        node = source
    return chain if node in inside else []


def _views_of_one(chosen: Sequence[Node], inside: Collection[Node]) -> list[Node]:
    """The views through which several operands look at one value, so that this value alone is read."""
    reads = dict.fromkeys(operand for node in chosen for operand in node.all_input_nodes if operand not in inside and is_tensor(operand))
    roots: dict[Node, list[Node]] = {}
    for read in reads:
        roots.setdefault(_root(read), []).append(read)
    return [view for root, looking in roots.items() if len(looking) > 1 for read in looking for view in _views_to(read, {root})]


def _root(node: Node) -> Node:
    """The value that a view of views looks at."""
    while (source := source_of(node)) is not None:
        node = source
    return node


def _is_used_outside(node: Node, inside: Collection[Node]) -> bool:
    """Whether someone outside uses the value, itself or through a view that is followed inside."""
    for user in node.users:
        if user not in inside:
            return True
        is_view = source_of(user) is not None or not is_tensor(user)
        if is_view and _is_used_outside(user, inside):
            return True
    return False


def resources(kernel: Kernel, arch: str) -> Binary:
    """What the compiled kernel takes on an architecture; needs no GPU."""
    return kernel.compile(arch)


def is_schedulable(graph: Graph, regions: Sequence[Region]) -> bool:
    """Whether these regions can run one after another: each may need values of the others, but not they of it in turn."""
    home = {node: -1 - number for number, region in enumerate(regions) for node in region.writes}
    needs: dict[Node | int, set[Node | int]] = {}
    for number, region in enumerate(regions):
        needs[-1 - number] = {home.get(node, node) for node in region.reads}
    for node in graph.nodes:
        if node not in home:
            needs[node] = {home.get(operand, operand) for operand in node.all_input_nodes}
    ready = TopologicalSorter(needs)
    try:
        ready.prepare()
    except CycleError:
        return False
    return True
