"""Triton kernels of the SSD backward: dx with the gradient of C·Bᵀ, and dB and dC in two roles.

The pass over the state gradients is :func:`.triton_forward.state_pass_kernel`, reversed; :mod:`.triton_decay` turns the
exponents' gradients into those of the arguments. They are row sums minus column sums of one float32 tile (Polylepis'
kernel study, section 5.3): what must cancel, cancels. Notation and layouts are those of :mod:`.triton_forward`.
"""

# mypy: disable-error-code="no-untyped-def, assignment"

import triton
import triton.language as tl

from .triton_forward import chunk_segments, token_codes, token_columns, token_rows


@triton.jit
def visible(code, b, first, j, i, L, HAS_CODE: tl.constexpr):
    """Whether output i (columns) sees input j (rows). An output at padding is a constant: its dy joins no sum."""
    seen = i[None, :] >= j[:, None]
    if HAS_CODE:
        j_segment, _ = token_codes(code, b, first + j, L)
        i_segment, i_real = token_codes(code, b, first + i, L)
        seen = seen & (i_segment[None, :] == j_segment[:, None]) & i_real[None, :]
    return seen


@triton.jit
def near_block(x_rows, dy_rows, similarity, dsimilarity, own, skip, since, until, scales, DOT: tl.constexpr):
    """Inputs j against outputs i of their tile: (weights, dsimilarity, diagonal, column sums, row sums), the diagonal
    x_j·dy_i, the sums without it."""
    dweights = tl.dot(x_rows, tl.trans(dy_rows), input_precision="tf32x3")
    diagonal = tl.sum(tl.where(own, dweights, 0.0), axis=1)
    # similarity is zero where i does not see j, and dsimilarity is masked once, behind the loop
    decay = tl.exp2(tl.minimum(until[None, :] - since[:, None], 0.0))
    weights = similarity * decay
    product = dweights * weights
    columns = tl.sum(product, axis=1)
    rows = tl.sum(product * scales[:, None], axis=0)
    dsimilarity += dweights * decay * scales[:, None]
    weights = weights * scales[:, None] + tl.where(own, skip[:, None], 0.0)
    return weights.to(DOT), dsimilarity, diagonal, columns, rows


@triton.jit
def far_block(x_rows, dy_rows, similarity, dsimilarity, further, passed, DOT: tl.constexpr):
    """Inputs j against outputs i of the next tile: (weights, dsimilarity, column sums, row sums); weights (but in
    float16, whose range needs the whole product) and column sums lack what belongs to j."""
    dweights = tl.dot(x_rows, tl.trans(dy_rows), input_precision="tf32x3") * further[None, :]
    product = dweights * similarity
    dsimilarity += dweights * passed[:, None]
    rows = tl.sum(product * passed[:, None], axis=0)
    weights = similarity * further[None, :]
    if DOT == tl.float16:
        weights *= passed[:, None]
    return weights.to(DOT), dsimilarity, tl.sum(product, axis=1), rows


@triton.jit
def dx_tile(
    x, B, C_, D, dy, cs, scale, code, dleft, dx, dsim, drow, dfar, dcol, dscale, dskip, start, L, H, R,
    P: tl.constexpr, N: tl.constexpr, C, Lp, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, HEADS,
    FAR: tl.constexpr, HAS_D: tl.constexpr, HAS_CODE: tl.constexpr, STAGES: tl.constexpr, Q: tl.constexpr,
    ROWS: tl.constexpr, BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """The ROWS tokens j from ``start`` on against the outputs i of their tile; with FAR those of the next one as well.

    What passes from one tile to the next is factorised at the last token of the first, as in the forward. The outputs
    come in blocks of half a tile, which leaves registers.
    """
    BLOCK: tl.constexpr = ROWS // 2 if ROWS > 16 else ROWS
    NEAR: tl.constexpr = ROWS // BLOCK
    BLOCKS: tl.constexpr = 2 * NEAR if FAR else NEAR
    c, b = (tl.program_id(0) // (Q // ROWS)).to(tl.int64), tl.program_id(2).to(tl.int64)
    h_first = tl.program_id(1) * HEADS
    g = (h_first // R).to(tl.int64)
    j, i = start + tl.arange(0, ROWS), start + tl.arange(0, BLOCK)
    p, n = tl.arange(0, BP), tl.arange(0, BN)
    first = c * Q
    B += b * B_b + g * B_g + first * B_l
    C_ += b * C_b + g * C_g + first * C_l
    j_in = first + j < L
    j_real, kept = j_in, j_in
    if HAS_CODE:
        _, last = chunk_segments(code, b, c, L, Q)
        segment, j_real = token_codes(code, b, first + j, L)
        kept = segment == last
    b_rows = token_rows(B, j, j_in, n, B_l, N, DOT)
    # The diagonal, often the largest entry, cancels in d(cs) by itself; leaving it in would leave its rounding error.
    unit = tl.zeros((ROWS,), dtype=tl.float32)
    sims, dsims = (), ()
    for k in tl.static_range(BLOCKS):
        columns = token_columns(C_, i + k * BLOCK, first + i + k * BLOCK < L, n, C_l, N, DOT)
        similarity = tl.dot(b_rows, columns, input_precision="tf32x3")
        similarity = tl.where(visible(code, b, first, j, i + k * BLOCK, L, HAS_CODE), similarity, 0.0)
        if k < NEAR:
            own = i[None, :] + k * BLOCK == j[:, None]
            unit += tl.sum(tl.where(own, similarity, 0.0), axis=1)
            similarity = tl.where(own, 0.0, similarity)
        sims, dsims = sims + (similarity,), dsims + (tl.zeros((ROWS, BLOCK), dtype=tl.float32),)
    for r in tl.range(0, HEADS, num_stages=STAGES):
        h = (h_first + r).to(tl.int64)
        line = (b * H + h) * Lp + first
        scales, since = tl.load(scale + line + j), tl.load(cs + line + j)
        until = tl.load(cs + line + Q - 1)
        dy_head = dy + b * dy_b + h * dy_h + first * dy_l
        x_rows = token_rows(x + b * x_b + h * x_h + first * x_l, j, j_in, p, x_l, P, DOT)
        cell = p[None, :] * N + n[:, None]
        in_state = (p < P)[None, :] & (n < N)[:, None]
        left = tl.load(dleft + ((b * C + c) * H + h) * P * N + cell, mask=in_state, other=0.0).to(DOT)
        du = tl.dot(b_rows, left, input_precision="tf32x3")
        sums, traces = tl.zeros((ROWS,), dtype=tl.float32), tl.zeros((ROWS,), dtype=tl.float32)
        near, far = (), ()
        if FAR:
            middle = tl.load(cs + line + ROWS - 1)
            reach = tl.exp2(tl.minimum(middle - since, 0.0))
            du = du * tl.where(kept, tl.exp2(tl.minimum(until - middle, 0.0)), 0.0)[:, None]
            if DOT == tl.float16:
                du = du * (reach * scales)[:, None]
            for k in tl.static_range(NEAR, BLOCKS):
                dy_rows = token_rows(dy_head, i + k * BLOCK, first + i + k * BLOCK < L, p, dy_l, P, DOT)
                further = tl.exp2(tl.minimum(tl.load(cs + line + i + k * BLOCK) - middle, 0.0))
                weights, dsimilarity, shares, rows = far_block(
                    x_rows, dy_rows, sims[k], dsims[k], further, reach * scales, DOT
                )
                tl.store(dfar + line + i + k * BLOCK, rows)
                du = tl.dot(weights, dy_rows, du, input_precision="tf32x3")
                far, sums = far + (dsimilarity,), sums + shares
            sums = sums * reach
            if DOT != tl.float16:
                du = du * (reach * scales)[:, None]
        else:
            du = du * tl.where(kept, tl.exp2(tl.minimum(until - since, 0.0)) * scales, 0.0)[:, None]
        skip = unit * scales
        if HAS_D:
            # D joins the diagonal of the weights, and dD sums the diagonal of the products x_j·dy_i
            skip += tl.where(j_real, tl.load(D + h).to(tl.float32), 0.0)
        for k in tl.static_range(NEAR):
            dy_rows = token_rows(dy_head, i + k * BLOCK, first + i + k * BLOCK < L, p, dy_l, P, DOT)
            weights, dsimilarity, trace, shares, rows = near_block(
                x_rows, dy_rows, sims[k], dsims[k], i[None, :] + k * BLOCK == j[:, None], skip, since,
                tl.load(cs + line + i + k * BLOCK), scales, DOT,
            )  # fmt: skip
            tl.store(drow + line + i + k * BLOCK, rows)
            du = tl.dot(weights, dy_rows, du, input_precision="tf32x3")
            near, sums, traces = near + (dsimilarity,), sums + shares, traces + trace
        dsims = near + far
        tl.store(dcol + line + j, sums * scales)
        tl.store(dscale + line + j, sums + traces * unit)
        if HAS_D:
            tl.store(dskip + line + j, traces)
        place = ((b * L + first) * H + h) * P + j[:, None] * (H * P) + p[None, :]
        tl.store(dx + place, du.to(dx.dtype.element_ty), mask=j_in[:, None] & (p < P)[None, :])
    split = (h_first % R) // HEADS
    table = dsim + (((split * tl.num_programs(2) + b) * (H // R) + g) * Lp + first) * Q + j[:, None] * Q
    for k in tl.static_range(BLOCKS):
        seen = visible(code, b, first, j, i + k * BLOCK, L, HAS_CODE)
        tl.store(table + i[None, :] + k * BLOCK, tl.where(seen, dsims[k], 0.0).to(dsim.dtype.element_ty))


@triton.jit
def dx_kernel(
    x,
    B,
    C_,
    D,
    dy,
    cs,
    scale,
    code,
    dleft,  # (b, C, H, P, N): gradients of the states that leave each chunk
    dx,  # (b, L, H, P), contiguous
    dsim,  # (SPLITS, b, G, Lp, Q): gradient of B_j·C_i, row j, column i; tiles below a chunk's diagonal stay unwritten
    drow,  # (b, H, Lp) float32: row sums over the j of the own tile
    dfar,  # (b, H, Lp) float32: row sums over the j of the tile before, for the second tile of a chunk
    dcol,  # (b, H, Lp) float32: column sums
    dscale,  # (b, H, Lp) float32: column sums with the diagonal, per unit of scale
    dskip,  # (b, H, Lp) float32: x_j·dy_j, what each token gives to dD
    L,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    C,
    Lp,
    x_b,
    x_l: tl.constexpr,
    x_h,
    B_b,
    B_l: tl.constexpr,
    B_g,
    C_b,
    C_l: tl.constexpr,
    C_g,
    dy_b,
    dy_l: tl.constexpr,
    dy_h,
    HEADS,
    HAS_D: tl.constexpr,
    HAS_CODE: tl.constexpr,
    STAGES: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """dx of one tile of a chunk, the whole of it or a half: B·Cᵀ once, then a loop over heads of the group."""
    if Q == ROWS or tl.program_id(0) % 2 == 1:
        dx_tile(
            x, B, C_, D, dy, cs, scale, code, dleft, dx, dsim, drow, dfar, dcol, dscale, dskip, Q - ROWS, L, H, R, P,
            N, C, Lp, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, HEADS, False, HAS_D, HAS_CODE,
            STAGES, Q, ROWS, BP, BN, DOT,
        )  # fmt: skip
    else:
        dx_tile(
            x, B, C_, D, dy, cs, scale, code, dleft, dx, dsim, drow, dfar, dcol, dscale, dskip, 0, L, H, R, P, N, C,
            Lp, x_b, x_l, x_h, B_b, B_l, B_g, C_b, C_l, C_g, dy_b, dy_l, dy_h, HEADS, True, HAS_D, HAS_CODE, STAGES, Q,
            ROWS, BP, BN, DOT,
        )  # fmt: skip


@triton.jit
def dbc_tile(
    tokens, others, mine, states, dleft, reach, cs, scale, code, dsim, grad, dlink, dots, L, H, R, P, N, C, Lp,
    tokens_b, tokens_l, tokens_h, others_b, others_l, others_g, mine_b, mine_l, mine_g, HEADS, ROLE_C: tl.constexpr,
    HAS_CODE: tl.constexpr, HAS_REACH: tl.constexpr, STAGES: tl.constexpr, Q: tl.constexpr, ROWS: tl.constexpr,
    BP: tl.constexpr, BN: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """Role C: from dy, B, C and the entering states to dC; role B: from x, C, B and the leaving gradients to dB."""
    tiles = Q // ROWS
    number = tl.program_id(0) if HAS_REACH else tl.program_id(0) // 2
    tile = number % tiles
    c, b = (number // tiles).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    h_first = tl.program_id(1) * HEADS
    g = (h_first // R).to(tl.int64)
    split = (h_first % R) // HEADS
    groups = H // R
    i = tile * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, Q)
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    first = c * Q
    i_in, k_in = first + i < L, first + k < L
    total = tl.zeros((ROWS, BN), dtype=tl.float32)
    if not HAS_REACH:
        table = dsim + (((split * batch + b) * groups + g) * Lp + first) * Q
        if ROLE_C:
            weights = tl.load(table + k[None, :] * Q + i[:, None], mask=k[None, :] <= i[:, None], other=0.0)
        else:
            weights = tl.load(table + i[:, None] * Q + k[None, :], mask=i[:, None] <= k[None, :], other=0.0)
        far = token_rows(others + b * others_b + g * others_g + first * others_l, k, k_in, n, others_l, N, DOT)
        total = tl.dot(weights.to(DOT), far, input_precision="tf32x3")
    linked = i_in
    if HAS_CODE:
        entering, last = chunk_segments(code, b, c, L, Q)
        segment, real = token_codes(code, b, first + i, L)
        linked = real & (segment == (entering if ROLE_C else last))
    own = token_rows(mine + b * mine_b + g * mine_g + first * mine_l, i, i_in, n, mine_l, N, DOT)
    cell = p[:, None] * N + n[None, :]
    in_state = (p < P)[:, None] & (n < N)[None, :]
    for r in tl.range(0, HEADS, num_stages=STAGES):
        h = (h_first + r).to(tl.int64)
        line = (b * H + h) * Lp + first
        place = ((b * C + c) * H + h) * P * N
        rows = token_rows(tokens + b * tokens_b + h * tokens_h + first * tokens_l, i, i_in, p, tokens_l, P, DOT)
        exponent = tl.load(cs + line + i)
        until = tl.load(cs + line + Q - 1)
        if HAS_REACH:
            state = tl.load(states + (b * H + h) * P * N + cell, mask=in_state, other=0.0).to(tl.float32)
            state = (state * tl.load(reach + (b * H + h) * C + c)).to(DOT)
        elif ROLE_C:
            state = tl.load(states + place + cell, mask=in_state, other=0.0).to(DOT)
        else:
            state = tl.load(dleft + place + cell, mask=in_state, other=0.0).to(DOT)
        if not ROLE_C:
            exponent = until - exponent
        factor = tl.where(linked, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
        part = tl.dot(rows, state, input_precision="tf32x3") * factor[:, None]
        tl.store(dlink + line + i, tl.sum(part * own.to(tl.float32), axis=1))
        if not ROLE_C:
            part *= tl.load(scale + line + i)[:, None]
        total += part
        if ROLE_C and not HAS_REACH:
            left = tl.load(dleft + place + cell, mask=in_state, other=0.0).to(tl.float32)
            dot = tl.sum(tl.sum(state.to(tl.float32) * left, axis=1), axis=0) * tl.exp2(tl.minimum(until, 0.0))
            if HAS_CODE:
                dot = tl.where(entering == last, dot, 0.0)
            tl.store(dots + (b * H + h) * C + c, dot, mask=tile == 0)
    place = ((split * batch + b) * L + first) * groups * N + g * N
    mask = i_in[:, None] & (n < N)[None, :]
    tl.store(grad + place + i[:, None] * (groups * N) + n[None, :], total.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def dbc_kernel(
    x,
    dy,
    B,
    C_,
    states,  # the states that enter each chunk; with HAS_REACH H_in (b, H, P, N), and only what reach·H_in gave counts
    dleft,  # the gradients of those that leave it
    reach,
    cs,
    scale,
    code,
    dsim,
    dB,  # (SPLITS, b, L, G, N), contiguous, as dC
    dC,
    dopen,  # (b, H, Lp) float32: what the entering state gave to y_i
    dgiven,  # (b, H, Lp) float32: per unit of scale, what x_j gave to the leaving state
    dots,  # (b, H, C) float32: carry·<state that enters, gradient of the one that leaves>
    L,
    H: tl.constexpr,
    R: tl.constexpr,
    P: tl.constexpr,
    N: tl.constexpr,
    C,
    Lp,
    x_b,
    x_l: tl.constexpr,
    x_h,
    dy_b,
    dy_l: tl.constexpr,
    dy_h,
    B_b,
    B_l: tl.constexpr,
    B_g,
    C_b,
    C_l: tl.constexpr,
    C_g,
    HEADS,
    HAS_CODE: tl.constexpr,
    HAS_REACH: tl.constexpr,
    STAGES: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """dC_i = Σ_h exp(cs_i) dy_i·H + Σ_j dsim_ji B_j and dB_j = Σ_h factor_j x_j·G + Σ_i dsim_ji C_i, by turns: what one
    reads of the states' gradients, the other finds in the second-level cache. With HAS_REACH only the former."""
    if HAS_REACH or tl.program_id(0) % 2 == 0:
        dbc_tile(
            dy, B, C_, states, dleft, reach, cs, scale, code, dsim, dC, dopen, dots, L, H, R, P, N, C, Lp, dy_b, dy_l,
            dy_h, B_b, B_l, B_g, C_b, C_l, C_g, HEADS, True, HAS_CODE, HAS_REACH, STAGES, Q, ROWS, BP, BN, DOT,
        )  # fmt: skip
    else:
        dbc_tile(
            x, C_, B, states, dleft, reach, cs, scale, code, dsim, dB, dgiven, dots, L, H, R, P, N, C, Lp, x_b, x_l,
            x_h, C_b, C_l, C_g, B_b, B_l, B_g, HEADS, False, HAS_CODE, HAS_REACH, STAGES, Q, ROWS, BP, BN, DOT,
        )  # fmt: skip
