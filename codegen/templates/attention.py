"""Attention forward in one pass over the keys: scores never leave the chip, the softmax is corrected as higher scores are met.

Types: f16, bf16 (products on matrix units, everything else in f32) and f32 (products in f32 proper). Reads query T[B,H,Tq,D], key T[B,Hk,Tk,D],
value T[B,Hk,Tk,Dv] of any strides but a last one of one, a mask that is broadcast to [B,H,Tq,Tk] by the strides it has, a key bias T[B,Tk], and
numbers of keys i64 or i32 [B or 1, Tq or 1]; writes T[B,H,Tq,Dv], laid out as [B,Tq,H,Dv]. Lengths, batch and key heads are arguments. A row in
which nothing is seen gives zeros. With a table of pages, i64 or i32 [B or 1, n], keys and values are T[P,Hk,S,D] and T[P,Hk,S,Dv], read through it;
a page that the pool does not have is never read.

A program takes BLOCK_ROWS rows of one key head: the queries of all heads that share it, token by token, so that keys are read once for a group.
Blocks of keys that positions, or the number of keys of a sample or a row, hide from all rows are neither visited nor read; those hidden from some,
and the last one, are taken in a second loop, so that the first one tests nothing. Shared memory: the blocks of keys and values, one per stage, and
that of the queries.
Sources: Dao 2023, arXiv:2307.08691; Milakov & Gimelshein 2018, arXiv:1805.02867.
"""

ATTENTION = """\
@triton.jit
def ${kernel}(
${parameters}
):
    program = tl.program_id(0)
${place}
    row = block * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < ${rows}
${rows_of}
    column, value_column = tl.arange(0, BLOCK_WIDTH), tl.arange(0, BLOCK_VALUE)
    query_at = query_ptr + sample * query_s0 + (query_head * query_s1 + token.to(tl.int64) * query_s2)[:, None]
    query = tl.load(query_at + column[None, :], mask=inside[:, None]${wide}, other=0.0)
    key_start = key_ptr + ${key_sample}head * key_s1
    value_start = value_ptr + ${value_sample}head * value_s1
${bounds}
    peak = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    mixed = tl.zeros([BLOCK_ROWS, BLOCK_VALUE], tl.float32)
    for step in range(${clear}):  # every row sees every key of the block
${clear_step}
    for step in range(${edges}):  # some keys are hidden
${edge_step}
    mixed = mixed / tl.where(total == 0.0, 1.0, total)[:, None]
${stores}
"""

STEP = """\
${block}
        place = ${start} + tl.arange(0, BLOCK_KEYS)
${at}
        key = tl.load(key_start + key_at[None, :] + column[:, None]${key_mask})
        scores = tl.dot(query, key, input_precision="ieee")
${scores}
        highest = tl.maximum(peak, tl.max(scores, 1)${scaled})
        base = tl.where(highest == float("-inf"), 0.0, highest)
        power = ${exp}(scores${scaled} - base[:, None])
        shrink = ${exp}(peak - base)
        total = total * shrink + tl.sum(power, 1)
        value = tl.load(value_start + value_at[:, None] + value_column[None, :]${value_mask})
        mixed = tl.dot(power.to(value.dtype), value, mixed * shrink[:, None], input_precision="ieee")
        peak = highest
"""
