"""A product with a weight matrix, and the elementwise ops before and after it, in one kernel; weights of eight or four bits are widened in registers.

Types: x in f16, bf16 (matrix units, sums in f32) or f32 (products in f32 proper). Reads x T[..., K] of any strides, its leading axes as rows, a weight
T[N, K] or T[K, N], or i8[N, K] with a scale f32[N, G] for each K / G of a row, which the sums of a group are multiplied by, or u8[N, G, K / G / 2] of
four bits with such a scale, and what the ops beside it read; writes T[..., N]. The number of rows is an argument; edges are masked, and groups that no
block divides; groups of four bits are multiples of the least block, so that blocks divide them.

A program takes BLOCK_ROWS x BLOCK_COLUMNS results and goes along K by BLOCK_INNER. Programs of BAND blocks of rows run together, since they read the
same columns of the weight. Shared memory: the blocks of x and of the weight, one per stage. Few rows take narrow blocks of columns, so that the
programs that read the weight fill a chip.

A gate (SwiGLU, GeGLU: the halves of one product, or two products of the same x) has two sums, which go along K side by side: two blocks of the weight,
one of x. What is as wide as both is then never written. Shazeer 2020, arXiv:2002.05202.
"""

BAND = 8

PRODUCT = """\
@triton.jit
def ${kernel}(
${parameters}
):
    program = tl.program_id(0)
    row_blocks, column_blocks = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(${columns}, BLOCK_COLUMNS)
    first = program // (${band} * column_blocks) * ${band}
    high, place = tl.minimum(row_blocks - first, ${band}), program % (${band} * column_blocks)
    row = (first + place % high)${wide} * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)[:, None]
    column = (place // high)${wide} * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)[None, :]
    in_rows, in_columns = row < rows, column < ${columns}
${share}
${coordinates}
${totals}
    for step in range(${steps}):
${along}
        inner, depth = along[None, :], ${depth}[:, None]
${edges}
${left}
${right}
${sum}
${rest}
"""
