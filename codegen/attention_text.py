"""The text of an attention kernel: which lines of its template a mask, a bias, a window, grouped heads or a soft cap need.

Scores are held times log2(e), so that a power of two is taken; where a mask or a bias is added they are not, since it may be as low as its
type goes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import Template
from typing import Any

from torch.fx import Node

from paretorch.codegen.expressions import dtype_of
from paretorch.codegen.layouts import layout_of
from paretorch.codegen.templates.attention import ATTENTION, STEP
from paretorch.codegen.templates.split_attention import COMBINE, FEW_ROWS, LONG, PROGRAMS
from paretorch.codegen.whole_op import signature_text
from paretorch.ir.graph import shape_of

LOG2E = 1.4426950408889634
HIDDEN = 'float("-inf")'
PER_KEY = (("key_bias", 1), ("pages", 1))  # axes that are read along, whatever their size


@dataclass(frozen=True)
class Facts:
    """The arguments of an attention, as its op's card names them."""

    query: Node
    key: Node
    value: Node
    scale: float
    mask: Node | None = None
    key_bias: Node | None = None
    lengths: Node | None = None
    pages: Node | None = None
    left: int = -1
    right: int = -1
    sinks: int = 0
    offset: int = 0
    softcap: float = 0.0

    @property
    def is_split(self) -> bool:
        """Whether the keys are divided between programs: few rows, many keys, and too few heads to fill a chip."""
        rows, keys = shape_of(self.query)[2] * self.group, self.keys
        programs = shape_of(self.query)[0] * shape_of(self.key)[1]
        few = isinstance(rows, int) and rows <= FEW_ROWS and not (isinstance(programs, int) and programs >= PROGRAMS)
        return few and not (isinstance(keys, int) and keys < LONG)

    @property
    def keys(self) -> Any:
        """How many keys there are: those of the pages that the table names, if there is one."""
        slots = shape_of(self.key)[2]
        return slots if self.pages is None else slots * shape_of(self.pages)[1]

    @property
    def roles(self) -> dict[str, Node]:
        """What is read, by the name of its argument."""
        found = {"query": self.query, "key": self.key, "value": self.value, "mask": self.mask, "key_bias": self.key_bias}
        found |= {"lengths": self.lengths, "pages": self.pages}
        return {name: node for name, node in found.items() if node is not None}

    @property
    def group(self) -> int:
        """Query heads to a key head."""
        return int(shape_of(self.query)[1] // shape_of(self.key)[1])

    @property
    def axes(self) -> dict[str, tuple[int, ...]]:
        """The axes along which a mask, a bias, lengths and pages differ."""
        given = {name: node for name, node in self.roles.items() if name not in ("query", "key", "value")}
        return {
            name: tuple(axis for axis, size in enumerate(shape_of(node)) if size != 1 or (name, axis) in PER_KEY)
            for name, node in given.items()
        }

    @property
    def beside(self) -> dict[str, int]:
        """The last axis of each of them, where it lies in memory one element after another; blocks are then read along it."""
        last = {name: axes[-1] for name, axes in self.axes.items() if axes}
        whole = {name: axis for name, axis in last.items() if axis == len(shape_of(self.roles[name])) - 1}
        return {name: axis for name, axis in whole.items() if layout_of(self.roles[name], name).known[axis] == 1}

    def stride(self, name: str, axis: int) -> str:
        """ " * mask_s2", or nothing for a stride of one."""
        return "" if self.beside.get(name) == axis else f" * {name}_s{axis}"

    @property
    def counts_rows(self) -> bool:
        """Whether each query has a number of keys of its own."""
        return 1 in self.axes.get("lengths", ())

    @property
    def ends_rows(self) -> bool:
        """Whether rows of a block may end at different keys."""
        return self.right >= 0 or self.counts_rows

    @property
    def adds_mask(self) -> bool:
        return self.mask is not None and dtype_of(self.mask) != "bool"

    @property
    def adds(self) -> bool:
        """Whether numbers are added to the scores."""
        return self.adds_mask or self.key_bias is not None

    @property
    def unit(self) -> float:
        """What scores are multiplied by beside their scale."""
        return 1.0 if self.adds else LOG2E

    @property
    def exp(self) -> str:
        """The power of a score in its unit."""
        return "tl.exp" if self.adds else "tl.exp2"

    @property
    def form(self) -> str:
        """How much is held for each score beside itself: a number of its key, or the page that its key lies on, is somewhat more."""
        if self.mask is not None or self.left >= 0 or self.softcap != 0.0:
            return "heavy"
        return "light" if self.key_bias is None and self.pages is None else "biased"

    @property
    def is_plain(self) -> bool:
        """Whether scores need nothing but their factor, which is then applied together with the subtraction of the peak."""
        return not self.adds and self.softcap == 0.0 and self.scale > 0


def device_text(facts: Facts, kernel: str, parameters: Sequence[tuple[str, str]], constants: Sequence[str]) -> str:
    """The kernel. parameters: (name, type); constants: names of block sizes."""
    rows = "queries" if facts.group == 1 else f"queries * {facts.group}"
    width, value_width = shape_of(facts.query)[3], shape_of(facts.value)[3]
    sizes = {"wide": narrow(width, "[None, :]"), "value_wide": narrow(value_width, "[None, :]")}
    clear, edges = _ranges(facts)
    text = Template(ATTENTION).substitute(
        kernel=kernel,
        parameters=signature_text(parameters, constants),
        place=lines(_place(facts, rows)),
        rows=rows,
        rows_of=lines([*_rows_of(facts), *_lengths(facts)]),
        wide=sizes["wide"],
        key_sample="sample * key_s0 + " if facts.pages is None else "",
        value_sample="sample * value_s0 + " if facts.pages is None else "",
        bounds=lines(_bounds(facts, rows)),
        clear=clear,
        clear_step=_step(facts, width, value_width, is_edge=False),
        edges=edges,
        edge_step=_step(facts, width, value_width, is_edge=True),
        stores=lines(_stores(facts, rows, sizes["value_wide"])),
    )
    return "\n".join(line for line in text.splitlines() if line.strip()) + "\n"


def lines(texts: Sequence[str], by: int = 1) -> str:
    return "\n".join(f"{'    ' * by}{text}" for text in texts)


def narrow(width: int, at: str) -> str:
    """ " & (column < 80)[None, :]" where a head is narrower than its block."""
    return "" if width >= 16 and width & (width - 1) == 0 else f" & (column < {width}){at}"


def combine_text(facts: Facts, kernel: str, parameters: Sequence[tuple[str, str]], constants: Sequence[str]) -> str:
    """The second kernel of an attention whose keys are divided."""
    width = shape_of(facts.value)[3]
    return Template(COMBINE).substitute(
        kernel=kernel,
        parameters=signature_text(parameters, constants),
        exp=facts.exp,
        width=width,
        wide=narrow(width, "[None, :]").replace("column", "value_column"),
        rows="queries" if facts.group == 1 else f"queries * {facts.group}",
        query_head="head" if facts.group == 1 else f"(head * {facts.group} + of_head % {facts.group})",
        token="of_head" if facts.group == 1 else f"(of_head // {facts.group})",
    )


def _place(facts: Facts, rows: str) -> list[str]:
    block = "program % blocks" if facts.right < 0 else "blocks - 1 - program % blocks  # those with most keys begin"
    return [
        *(["split, program = program % splits, program // splits"] if facts.is_split else []),
        f"blocks = tl.cdiv({rows}, BLOCK_ROWS)",
        f"block = {block}",
        "head = (program // blocks % heads).to(tl.int64)",
        "sample = (program // (blocks * heads)).to(tl.int64)",
    ]


def _rows_of(facts: Facts) -> list[str]:
    if facts.group == 1:
        return ["token, query_head = row, head"]
    return [f"token, query_head = row // {facts.group}, head * {facts.group} + row % {facts.group}"]


def _lengths(facts: Facts) -> list[str]:
    """`keys` becomes the number of those that a row of this block sees, `count` that of each row where these differ."""
    if facts.lengths is None:
        return []
    terms = {0: f"sample{facts.stride('lengths', 0)}", 1: f"token{facts.stride('lengths', 1)}"}
    found = f"tl.load({' + '.join(['lengths_ptr', *(terms[axis] for axis in facts.axes['lengths'])])}"
    if not facts.counts_rows:
        return [f"keys = tl.minimum(tl.maximum({found}), 0), keys).to(tl.int32)"]
    return [
        f"count = tl.minimum(tl.maximum({found}, mask=inside, other=0), 0), keys).to(tl.int32)",
        "keys = tl.max(count, 0)",
    ]


def _bounds(facts: Facts, rows: str) -> list[str]:
    """The numbers of blocks of keys: those from `begin` to `end` are seen by a row, those from `clear_begin` to `clear_end` by every row."""
    clear = "tl.min(tl.where(inside, count, keys), 0)" if facts.counts_rows else "keys"
    found = [f"end, clear_end = tl.cdiv(keys, BLOCK_KEYS), {clear} // BLOCK_KEYS"]
    if facts.counts_rows:
        found.append("last_key = count - 1")
    if facts.left >= 0 or facts.right >= 0:
        group = "" if facts.group == 1 else f" // {facts.group}"
        first, last = "block * BLOCK_ROWS", f"tl.minimum((block + 1) * BLOCK_ROWS, {rows}) - 1"
        found.append(f"first, last = {first}{group}, {f'({last}){group}' if group else last}")
    if facts.right >= 0:
        own = "last_key" if facts.counts_rows else "keys - 1"
        found.append(f"last_key = tl.minimum(token{_signed(facts.offset + facts.right)}, {own})")
        after = _signed(facts.offset + facts.right + 1)
        found.append(f"end = tl.cdiv(tl.minimum(tl.maximum(last{after}, 0), keys), BLOCK_KEYS)")
        seen_by_all = f"tl.minimum(tl.maximum(first{after}, 0), keys) // BLOCK_KEYS"
        found.append(f"clear_end = {f'tl.minimum(clear_end, {seen_by_all})' if facts.counts_rows else seen_by_all}")
    if facts.left >= 0:
        first_key = f"token{_signed(facts.offset - facts.left)}"
        found.append(f"first_key = {f'tl.minimum({first_key}, keys)' if facts.sinks > 0 else first_key}")
        before = _signed(facts.offset - facts.left)
        found.append(f"begin = tl.minimum(tl.maximum(first{before}, 0) // BLOCK_KEYS, end)")
        found.append(f"clear_begin = tl.minimum(tl.cdiv(tl.maximum(last{before}, 0), BLOCK_KEYS), end)")
        found.append("clear_end = tl.maximum(clear_end, clear_begin)")
    if facts.left >= 0 and facts.sinks > 0:
        found.append(f"lead = tl.minimum(tl.cdiv(tl.minimum({facts.sinks}, keys), BLOCK_KEYS), begin)")
    return [*found, *_shares(facts)] if facts.is_split else found


def _shares(facts: Facts) -> list[str]:
    """The same numbers for this program's share of the blocks; the first share has the sinks before the window."""
    begin, clear_begin = ("begin", "clear_begin") if facts.left >= 0 else ("0", "0")
    found = [
        f"whole, share = {begin}, tl.cdiv(tl.maximum(end - {begin}, 0), splits)",
        "begin = tl.minimum(whole + split * share, end)",
        "end = tl.minimum(begin + share, end)",
        f"clear_begin = tl.minimum(tl.maximum({clear_begin}, begin), end)",
        "clear_end = tl.minimum(tl.maximum(clear_end, clear_begin), end)",
    ]
    return [*found, "lead = tl.where(split == 0, lead, 0)"] if facts.left >= 0 and facts.sinks > 0 else found


def _ranges(facts: Facts) -> tuple[str, str]:
    if facts.left < 0 and facts.is_split:
        return "clear_begin, clear_end", "0, clear_begin - begin + end - clear_end"
    if facts.left < 0:
        return "0, clear_end", "clear_end, end"
    lead = "lead + " if facts.sinks > 0 else ""
    return "clear_begin, clear_end", f"{lead}clear_begin - begin + end - clear_end"


def _signed(number: int) -> str:
    return f" {'+' if number > 0 else '-'} {abs(number)}" if number else ""


def _step(facts: Facts, width: int, value_width: int, *, is_edge: bool) -> str:
    block = []
    if is_edge and (facts.left >= 0 or facts.is_split):
        skipped = "tl.where(step < lead, step, step + begin - lead)" if facts.left >= 0 and facts.sinks > 0 else "step + begin"
        block = [f"at = {skipped}", "at = tl.where(at < clear_begin, at, at + clear_end - clear_begin)"]
    start = "at * BLOCK_KEYS" if block else "step * BLOCK_KEYS"
    return Template(STEP).substitute(
        block=lines(block, 2),
        start=start,
        at=lines(_slots(facts, is_edge=is_edge), 2),
        key_mask=_masked("(place < keys)[None, :]" if is_edge else "", narrow(width, "[:, None]")),
        scores=lines(_scores(facts, is_edge=is_edge), 2),
        scaled=f" * {facts.scale * LOG2E!r}" if facts.is_plain else "",
        exp=facts.exp,
        value_mask=_masked(
            "(place < keys)[:, None]" if is_edge else "", narrow(value_width, "[None, :]").replace("column", "value_column")
        ),
    )


def _slots(facts: Facts, *, is_edge: bool) -> list[str]:
    """Where the keys and values of a block lie behind the start of their head."""
    if facts.pages is None:
        return ["key_at, value_at = place.to(tl.int64) * key_s2, place.to(tl.int64) * value_s2"]
    sample = "sample * pages_s0 + " if 0 in facts.axes["pages"] else ""
    slots = shape_of(facts.key)[2]
    number = f"(place // {slots})" if "pages" in facts.beside else f"(place // {slots}).to(tl.int64)"
    mask = ", mask=place < keys, other=0" if is_edge else ""
    return [
        f"page = tl.load(pages_ptr + {sample}{number}{facts.stride('pages', 1)}{mask}).to(tl.int64)",
        "page = tl.minimum(tl.maximum(tl.where(page < 0, page + pool, page), 0), pool - 1)",
        f"slot = (place % {slots}).to(tl.int64)",
        "key_at, value_at = page * key_s0 + slot * key_s2, page * value_s0 + slot * value_s2",
    ]


def _masked(first: str, second: str) -> str:
    both = f"{first}{second}" if first else second.removeprefix(" & ")
    return f", mask={both}, other=0.0" if both else ""


def _scores(facts: Facts, *, is_edge: bool) -> list[str]:
    """What is done to the scores before their peak is taken."""
    found = []
    if facts.softcap:
        inner, outer = 2.0 * facts.scale / facts.softcap, facts.softcap * facts.unit
        found.append(f"scores = {2.0 * outer!r} * tl.sigmoid(scores * {inner!r}) - {outer!r}  # the cap times tanh")
    elif not facts.is_plain:
        found.append(f"scores = scores * {facts.scale * facts.unit!r}")
    if facts.key_bias is not None:
        found += _bias(facts, is_edge=is_edge)
    if facts.mask is not None:
        loaded = _mask_load(facts, is_edge=is_edge)
        found.append(f"scores = scores + {loaded}.to(tl.float32)" if facts.adds_mask else f"scores = tl.where({loaded}, scores, {HIDDEN})")
    return [*found, *_seen(facts)] if is_edge else found


def _seen(facts: Facts) -> list[str]:
    """The keys of an edge that a row sees: one comparison for each side."""
    last = "place[None, :] <= last_key[:, None]" if facts.ends_rows else "(place < keys)[None, :]"
    found = [f"scores = tl.where({last}, scores, {HIDDEN})"]
    if facts.left >= 0:
        back = "place"
        if facts.sinks > 0:
            found.append(f"back = tl.where(place < {facts.sinks}, keys, place)  # as near as can be")
            back = "back"
        found.append(f"scores = tl.where({back}[None, :] >= first_key[:, None], scores, {HIDDEN})")
    return found


def _bias(facts: Facts, *, is_edge: bool) -> list[str]:
    sample = "sample * key_bias_s0 + " if 0 in facts.axes["key_bias"] else ""
    place = "place" if "key_bias" in facts.beside else "place.to(tl.int64)"
    mask = ", mask=place < keys, other=0.0" if is_edge else ""
    found = [f"bias = tl.load(key_bias_ptr + {sample}{place}{facts.stride('key_bias', 1)}{mask}).to(tl.float32)"]
    return [*found, "scores = scores + bias[None, :]"]


def _mask_load(facts: Facts, *, is_edge: bool) -> str:
    """The load of a mask's block, along the axes that it has."""
    assert facts.mask is not None  # asked by the caller
    shift = 4 - len(shape_of(facts.mask))
    heads = "query_head" if facts.group == 1 else "query_head[:, None]"
    wide = "place" if facts.beside.get("mask") is not None else "place.to(tl.int64)"
    places = ("sample", heads, "token.to(tl.int64)[:, None]", f"{wide}[None, :]")
    axes = {axis + shift: axis for axis in facts.axes["mask"]}
    terms = [f"{places[axis]}{facts.stride('mask', own)}" for axis, own in axes.items()]
    by_row = 2 in axes or (1 in axes and facts.group > 1)
    conditions = (["inside[:, None]"] if by_row else []) + (["(place < keys)[None, :]"] if is_edge and 3 in axes else [])
    masked = f", mask={' & '.join(conditions)}, other=0" if conditions else ""
    return f"tl.load({' + '.join(['mask_ptr', *terms])}{masked})"


def _stores(facts: Facts, rows: str, wide: str) -> list[str]:
    mask = f"inside[:, None]{wide.replace('column', 'value_column')}"
    if not facts.is_split:
        return [
            "out_at = out_ptr + sample * out_s0 + (query_head * out_s1 + token.to(tl.int64) * out_s2)[:, None]",
            f"tl.store(out_at + value_column[None, :], mixed, mask={mask})",
        ]
    log = "tl.log" if facts.adds else "tl.log2"
    return [
        f"at = ((sample * heads + head) * ({rows}) + row) * splits + split",
        f"tl.store(part_ptr + at[:, None] * {shape_of(facts.value)[3]} + value_column[None, :], mixed, mask={mask})",
        f"tl.store(level_ptr + at, peak + {log}(tl.where(total == 0.0, 1.0, total)), mask=inside)",
    ]
