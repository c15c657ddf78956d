"""Bipartite token matching in two launches: for each token of the first half the most like one of the second, then who goes and where to.

The first kernel normalises blocks of both halves, takes their products on matrix units and keeps the largest of each row with its place, so that
cosines never leave the chip; the second one, a program for each sample, counts for each row how many come before it and writes the three results.
Types: f32, f16, bf16; cosines in f32. Reads metric T[B,T,D] of any strides but a last one of one, and sizes T[B or 1,T]; writes kept i64[B,T-r],
source and target i64[B,r]. Ties go to the lowest place. At most 4,096 rows of a half. Shared memory: the blocks of both halves.
Source: Bolya et al. 2023, arXiv:2210.09461.
"""

MATCH = """\
@triton.jit
def ${kernel}(
${parameters}
):
    program = tl.program_id(0)
    blocks = tl.cdiv(first, BLOCK_ROWS)
    sample = (program // blocks).to(tl.int64)
    row = program % blocks * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    inside = row < first
    start = metric_ptr + sample * metric_s0
    row_at = (${protected} + 2 * row).to(tl.int64) * metric_s1
    best = tl.full([BLOCK_ROWS], float("-inf"), tl.float32)
    partner = tl.zeros([BLOCK_ROWS], tl.int32)
    for block in range(0, tl.cdiv(second, BLOCK_TOKENS)):
        token = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        token_at = (${protected} + 1 + 2 * token).to(tl.int64) * metric_s1
        product = tl.zeros([BLOCK_ROWS, BLOCK_TOKENS], tl.float32)
        row_square = tl.zeros([BLOCK_ROWS], tl.float32)
        token_square = tl.zeros([BLOCK_TOKENS], tl.float32)
        for part in range(0, ${parts}):
            column = part * BLOCK_WIDTH + tl.arange(0, BLOCK_WIDTH)
            x = tl.load(start + row_at[:, None] + column[None, :], mask=inside[:, None]${wide_row}, other=0.0)
            y = tl.load(start + token_at[None, :] + column[:, None], mask=(token < second)[None, :]${wide_token}, other=0.0)
            product = tl.dot(x, y, product, input_precision="ieee")
            row_square += tl.sum(x.to(tl.float32) * x.to(tl.float32), 1)
            token_square += tl.sum(y.to(tl.float32) * y.to(tl.float32), 0)
        length = tl.maximum(tl.sqrt(row_square), 1e-6)[:, None] * tl.maximum(tl.sqrt(token_square), 1e-6)[None, :]
        cosine = tl.where((token < second)[None, :], product / length, float("-inf"))
${padding}
        highest = tl.max(cosine, 1)
        place = tl.min(tl.where(cosine == highest[:, None], token[None, :], second), 1)
        partner = tl.where(highest > best, place, partner)
        best = tl.maximum(best, highest)
    best = tl.where(best == best, best, float("-inf"))  # an order needs numbers
${first_goes}
    tl.store(best_ptr + sample * first + row, best, mask=inside)
    tl.store(partner_ptr + sample * first + row, partner, mask=inside)


@triton.jit
def ${kernel}_select(
${select_parameters}
):
    sample = tl.program_id(0).to(tl.int64)
    row = tl.arange(0, BLOCK_ROWS)
    inside = row < first
    best = tl.load(best_ptr + sample * first + row, mask=inside, other=float("-inf"))
    partner = tl.load(partner_ptr + sample * first + row, mask=inside, other=0)
    earlier = tl.zeros([BLOCK_ROWS], tl.int32)  # rows that go before this one
    for block in range(0, tl.cdiv(first, BLOCK_TOKENS)):
        other = block * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        value = tl.load(best_ptr + sample * first + other, mask=other < first, other=float("-inf"))
        above = (value[None, :] > best[:, None]) | ((value[None, :] == best[:, None]) & (other[None, :] < row[:, None]))
        earlier += tl.sum((above & (other < first)[None, :]).to(tl.int32), 1)
    goes = (inside & (earlier < count)).to(tl.int32)
    gone = tl.cumsum(goes, 0)  # sources up to and with this row
    tokens = first + second + ${protected} - count
    tl.store(source_ptr + sample * count + gone - 1, (${protected} + 2 * row).to(tl.int64), mask=goes == 1)
    tl.store(kept_ptr + sample * tokens + ${protected} + 2 * row - gone, (${protected} + 2 * row).to(tl.int64), mask=inside & (goes == 0))
    after = ${protected} + 1 + 2 * row
    tl.store(kept_ptr + sample * tokens + after - gone, after.to(tl.int64), mask=row < second)
${leading}
    tl.store(gone_ptr + sample * first + row, gone, mask=inside)
    tl.debug_barrier()  # the other threads' stores are seen from here on
    before = tl.load(gone_ptr + sample * first + partner, mask=inside, other=0)  # sources before the partner
    tl.store(target_ptr + sample * count + gone - 1, (${protected} + 1 + 2 * partner - before).to(tl.int64), mask=goes == 1)
"""
