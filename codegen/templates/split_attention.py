"""Attention of few queries to many keys: what `attention` does, with the keys of a block of rows divided between programs.

Each program writes the average of its share of the keys and, for each row, the logarithm of its sum; the second kernel weighs the shares by these.
Types, reads, writes and masks as in `attention`; beside them f32 T[B,Hk,rows,splits,Dv] and T[B,Hk,rows,splits] are written and read once. The
number of shares is an argument, so that the programs fill a chip at any length; a share in which nothing is seen has no weight. Where samples have
numbers of keys of their own it is these that are divided: every program has a share of what its sample holds, and one without keys reads none.
Source: Dao et al. 2023, "Flash-Decoding for long-context inference".
"""

MOST_SPLITS = 64
PROGRAMS = 256  # that fill a chip: about twice the 132 units of an H100
FEW_ROWS = 64  # of a key head; with more there are programs enough, or each uses its keys often enough
LONG = 512  # keys from which they are divided

COMBINE = """\


@triton.jit
def ${kernel}_combine(
${parameters}
):
    row = tl.program_id(0).to(tl.int64)
    split, value_column = tl.arange(0, BLOCK_SPLITS), tl.arange(0, BLOCK_VALUE)
    inside = split < splits
    level = tl.load(level_ptr + row * splits + split, mask=inside, other=float("-inf"))
    peak = tl.max(level, 0)
    share = ${exp}(level - tl.where(peak == float("-inf"), 0.0, peak))
    total = tl.sum(share, 0)
    part_at = part_ptr + (row * splits + split)[:, None] * ${width} + value_column[None, :]
    part = tl.load(part_at, mask=inside[:, None]${wide}, other=0.0)
    mixed = tl.sum(part * share[:, None], 0) / tl.where(total == 0.0, 1.0, total)
    rows = ${rows}
    of_head, head, sample = row % rows, row // rows % heads, row // (rows * heads)
    out_at = out_ptr + sample * out_s0 + ${query_head} * out_s1 + ${token} * out_s2
    tl.store(out_at + value_column, mixed, mask=value_column < ${width})
"""
