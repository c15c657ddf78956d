"""Bipartite token matching as a kernel of two launches: what the template takes, how much it does, and its file."""

from __future__ import annotations

from string import Template

from torch.fx import Node

from paretorch.codegen.attention_text import lines
from paretorch.codegen.expressions import TRITON_TYPES, dtype_of
from paretorch.codegen.kernel import Part, Region, Schedule
from paretorch.codegen.kernel_file import wrapped
from paretorch.codegen.schedules import power_of_two
from paretorch.codegen.templates.match_tokens import MATCH
from paretorch.codegen.whole_op import Built, Effort, WholeOp, signature_text, stride_kinds
from paretorch.ir.graph import arguments, shape_of
from paretorch.ir.ops import op_of

HELD = ("f32", "f16", "bf16")
MOST_ROWS = 4096  # of a half: what the program that chooses holds; 8192 spilled on every architecture
TYPICAL_ROWS = 512  # where the length varies
RESULTS = ("kept", "source", "target")


def refuses(node: Node) -> str | None:
    """None, or why the template does not take it."""
    given = arguments(node)
    metric, size = given["metric"], given["size"]
    tokens, width = shape_of(metric)[1:]
    if dtype_of(metric) not in HELD or (size is not None and dtype_of(size) not in HELD):
        return f"{node.name} is of {dtype_of(metric)}; the template takes {', '.join(HELD)}"
    if not isinstance(given["count"], int) or not isinstance(width, int):
        return f"{node.name} merges {given['count']} tokens of width {width}; the template takes known numbers"
    if isinstance(tokens, int) and tokens - given["protected"] > 2 * MOST_ROWS:
        return f"{node.name} matches {tokens} tokens; the template holds {2 * MOST_ROWS}"
    return None


def effort(region: Region) -> Effort:
    """The op's own work in two launches; the metric is read for each block of rows, mostly from a cache."""
    node = region.nodes[0]
    op = op_of(node)
    assert op is not None  # a node of a row of the table
    return Effort(op.flops(node), op.bytes(node), 2, is_rated_alike=False)


def schedules(region: Region) -> tuple[Schedule, ...]:
    """Square blocks; then with twice as many warps, of half the rows for more programs, of half the tokens, and with a deeper pipeline."""
    metric = arguments(region.nodes[0])["metric"]
    block = 32 if dtype_of(metric) == "f32" else 64
    width = min(power_of_two(shape_of(metric)[2]), block)
    forms = ((block, block, 4, 2), (block, block, 8, 2), (block // 2, block, 4, 2), (block, block // 2, 4, 2), (block, block, 4, 3))
    return tuple(
        {"BLOCK_ROWS": rows, "BLOCK_TOKENS": tokens, "BLOCK_WIDTH": width, "num_warps": warps, "num_stages": stages}
        for rows, tokens, warps, stages in forms
    )


def select_schedule(rows: int) -> Schedule:
    """Of the second kernel, for so many rows of the first half: at most 32 comparisons a thread."""
    block = power_of_two(rows)
    warps = min(16, max(4, block // 128))
    return {"BLOCK_ROWS": block, "BLOCK_TOKENS": max(1, min(16, 32 * 32 * warps // block)), "num_warps": warps}


def build(region: Region, kernel: str, schedule: Schedule | None = None) -> Built:
    """The file's parts for a region of one match."""
    node = region.nodes[0]
    given = arguments(node)
    metric, size = given["metric"], given["size"]
    schedule = schedule or schedules(region)[0]
    names = {metric: "metric"} if size is None else {metric: "metric", size: "size"}
    names |= {part: RESULTS[int(str(part.args[1]))] for part in region.writes}
    strides = stride_kinds(metric, "metric", (0, 1))
    pointers = [("metric_ptr", f"*{TRITON_TYPES[dtype_of(metric)]}")]
    if size is not None:
        pointers.append(("size_ptr", f"*{TRITON_TYPES[dtype_of(size)]}"))
        strides += stride_kinds(size, "size", (0, 1) if shape_of(size)[0] != 1 else (1,))
    between = [("best_ptr", "*fp32"), ("partner_ptr", "*i32")]
    parameters = (*pointers, *between, *strides, ("first", "i32"), ("second", "i32"))
    results = [(f"{name}_ptr", "*i64") for name in RESULTS]
    select = (*between, ("gone_ptr", "*i32"), *results, ("first", "i32"), ("second", "i32"), ("count", "i32"))
    text = _text(node, kernel, parameters, select, schedule)
    tokens = shape_of(metric)[1]
    rows = (tokens - given["protected"] + 1) // 2 if isinstance(tokens, int) else TYPICAL_ROWS
    part = Part(f"{kernel}_select", select, select_schedule(rows))
    return Built(text, parameters, schedule, names, _launches(node, kernel, parameters, select), _reference(node), (part,))


def _text(node: Node, kernel: str, parameters: tuple[tuple[str, str], ...], select: tuple[tuple[str, str], ...], schedule: Schedule) -> str:
    given = arguments(node)
    width, block, protected = shape_of(given["metric"])[2], schedule["BLOCK_WIDTH"], given["protected"]
    is_whole = width % block == 0
    padding, first_goes = [], []
    if given["size"] is not None:
        sample = "sample * size_s0 + " if shape_of(given["size"])[0] != 1 else ""
        padding = [
            f"token_size = tl.load(size_ptr + {sample}({protected} + 1 + 2 * token).to(tl.int64) * size_s1, mask=token < second, other=1.0)",
            'cosine = tl.where((token_size == 0.0)[None, :], float("-inf"), cosine)',
        ]
        first_goes = [
            f"row_size = tl.load(size_ptr + {sample}({protected} + 2 * row).to(tl.int64) * size_s1, mask=inside, other=1.0)",
            'best = tl.where(row_size == 0.0, float("inf"), best)  # padding goes first',
        ]
    leading = f"for place in range(0, {protected}):\n        tl.store(kept_ptr + sample * tokens + place, place)" if protected else ""
    text = Template(MATCH).substitute(
        kernel=kernel,
        parameters=signature_text(parameters, [name for name in schedule if name.isupper()]),
        select_parameters=signature_text(select, ["BLOCK_ROWS", "BLOCK_TOKENS"]),
        protected=protected,
        parts=(width + block - 1) // block,
        wide_row="" if is_whole else f" & (column < {width})[None, :]",
        wide_token="" if is_whole else f" & (column < {width})[:, None]",
        padding=lines(padding, 2),
        first_goes=lines(first_goes),
        leading=f"    {leading}" if leading else "",
    )
    first, _, second = text.partition("\n\n\n")
    kept = ("\n".join(line for line in part.splitlines() if line.strip()) for part in (first, second))
    return "\n\n\n".join(kept) + "\n"


def _launches(node: Node, kernel: str, parameters: tuple[tuple[str, str], ...], select: tuple[tuple[str, str], ...]) -> tuple[str, ...]:
    given = arguments(node)
    protected, count = given["protected"], given["count"]

    def call(name: str, programs: str, listed: tuple[tuple[str, str], ...], options: str) -> list[str]:
        shown = [name.removesuffix("_ptr") if "_s" not in name else f"{name.split('_s')[0]}.stride({name[-1]})" for name, _ in listed]
        return [f"    {name}[({programs},)](", *wrapped(", ".join([*shown, options]), 2).splitlines(), "    )"]

    return (
        "metric = laid(metric, 2, ())",
        "batch, tokens, _ = metric.shape",
        f"first, second, count = (tokens - {protected} + 1) // 2, (tokens - {protected}) // 2, {count}",
        "best = torch.empty((batch, first), dtype=torch.float32, device=metric.device)",
        "partner, gone = (torch.empty((batch, first), dtype=torch.int32, device=metric.device) for _ in range(2))",
        "kept = torch.empty((batch, tokens - count), dtype=torch.int64, device=metric.device)",
        "source, target = (torch.empty((batch, count), dtype=torch.int64, device=metric.device) for _ in range(2))",
        "if best.numel() > 0:",
        *call(kernel, 'triton.cdiv(first, SCHEDULE["BLOCK_ROWS"]) * batch', parameters, "**SCHEDULE"),
        "    block = max(16, triton.next_power_of_2(first))",
        "    warps = min(16, max(4, block // 128))",
        "    others = max(1, min(16, 1024 * warps // block))",
        *call(f"{kernel}_select", "batch", select, "BLOCK_ROWS=block, BLOCK_TOKENS=others, num_warps=warps"),
    )


def _reference(node: Node) -> tuple[str, ...]:
    """As it is defined, with cosines in memory."""
    given = arguments(node)
    protected, count, has_size = given["protected"], given["count"], given["size"] is not None
    return (
        f"unit = torch.nn.functional.normalize(metric[:, {protected}:].float(), dim=-1, eps=1e-6)",
        "cosine = unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)",
        *([f'cosine = cosine.masked_fill((size[:, {protected + 1}::2] == 0)[:, None, :], float("-inf"))'] if has_size else []),
        "best, partner = cosine.max(-1)",
        *([f'best = best.masked_fill(size[:, {protected}::2] == 0, float("inf"))'] if has_size else []),
        f"chosen = torch.sort(torch.sort(best, dim=1, descending=True, stable=True)[1][:, :{count}], dim=1)[0]",
        f"source, joined = {protected} + 2 * chosen, {protected + 1} + 2 * partner.gather(1, chosen)",
        "target = joined - (source[:, None, :] < joined[:, :, None]).sum(-1)",
        "stays = torch.ones(metric.shape[:2], dtype=torch.bool, device=metric.device).scatter(1, source, False)",
        "kept = stays.nonzero()[:, 1].reshape(metric.shape[0], -1)",
    )


MATCH_TOKENS = WholeOp("match_tokens", refuses, lambda node: True, effort, schedules, build)
