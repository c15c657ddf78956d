"""A product of few rows along a long K: what `product` does, with K divided between programs that fill a chip where blocks of columns do not.

Each program writes its part of the sums, f32[sums, splits, rows, N], as it is; the second kernel adds the parts of an element, always in the same
order, so that results are the same in each run, and computes what stands behind the product. Types, reads, writes and masks as in `product`.
Source: Osama et al. 2023, arXiv:2301.03598, section 3 ("fixed-split").
"""

SUM = """\


@triton.jit
def ${kernel}_sum(
${parameters}
):
    program, column_blocks = tl.program_id(0), tl.cdiv(${columns}, BLOCK_COLUMNS)
    row = (program // column_blocks)${wide} * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (program % column_blocks)${wide} * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    in_rows, in_columns = row < rows, column < ${columns}
${coordinates}
${totals}
    for split in tl.static_range(SPLITS):
${parts}
${rest}
"""
