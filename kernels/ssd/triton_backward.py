"""Triton kernels of the SSD backward: dx with the gradient of C·Bᵀ, dB and dC in two roles, and the decays.

The pass over the state gradients is :func:`.triton_forward.state_pass_kernel`, reversed. Notation and layouts are those
of :mod:`.triton_forward`. The exponents' gradients are row sums minus column sums of one float32 tile (Polylepis'
kernel study, section 5.3): what must cancel, cancels.
"""

# mypy: disable-error-code="no-untyped-def"

import triton
import triton.language as tl

from .triton_forward import chunk_segments, softplus


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
    dsim,  # (SPLITS, b, G, Lp, Q): gradient of B_j·C_i, row j, column i
    drow,  # (Q // ROWS, b, H, Lp) float32: row sums, a partial per tile of j
    dcol,  # (b, H, Lp) float32: column sums
    dscale,  # (b, H, Lp) float32: column sums with the diagonal, per unit of scale
    dskip,  # (b, C · Q // ROWS, H) float32: partials of dD
    L,
    H,
    R,
    P,
    N,
    C,
    Lp,
    x_b,
    x_l,
    x_h,
    B_b,
    B_l,
    B_g,
    C_b,
    C_l,
    C_g,
    dy_b,
    dy_l,
    dy_h,
    HEADS,
    HAS_D: tl.constexpr,
    HAS_CODE: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """ROWS tokens j of one chunk against the chunk's outputs i: B·Cᵀ once, then the heads of the group in a loop."""
    tiles = Q // ROWS
    tile = tl.program_id(0) % tiles
    c, b = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    h_first = tl.program_id(1) * HEADS
    g = (h_first // R).to(tl.int64)
    split = (h_first % R) // HEADS
    j = tile * ROWS + tl.arange(0, ROWS)
    i = tl.arange(0, Q)
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    first = c * Q
    i_in, j_in = first + i < L, first + j < L
    B += b * B_b + g * B_g + first * B_l
    C_ += b * C_b + g * C_g + first * C_l
    b_rows = tl.load(B + j[:, None] * B_l + n[None, :], mask=j_in[:, None] & (n < N)[None, :], other=0.0).to(DOT)
    c_cols = tl.load(C_ + i[None, :] * C_l + n[:, None], mask=i_in[None, :] & (n < N)[:, None], other=0.0).to(DOT)
    seen = i[None, :] >= j[:, None]
    kept = j_in
    own = i[None, :] == j[:, None]
    j_real = j_in
    if HAS_CODE:
        _, last = chunk_segments(code, b, c, L, Q)
        i_code = tl.load(code + b * L + first + i, mask=i_in, other=1)
        j_code = tl.load(code + b * L + first + j, mask=j_in, other=1)
        # an output at padding is a constant: whatever its dy holds joins no sum
        seen = seen & ((i_code >> 1)[None, :] == (j_code >> 1)[:, None]) & ((i_code & 1) == 0)[None, :]
        j_real = (j_code & 1) == 0
        kept = (j_code >> 1) == last
    similarity = tl.where(seen, tl.dot(b_rows, c_cols, input_precision="tf32x3"), 0.0)
    dsimilarity = tl.zeros((ROWS, Q), dtype=tl.float32)
    for r in range(HEADS):
        h = (h_first + r).to(tl.int64)
        line = (b * H + h) * Lp + first
        cs_i, cs_j = tl.load(cs + line + i), tl.load(cs + line + j)
        scale_j = tl.load(scale + line + j)
        total = tl.load(cs + line + Q - 1)
        x_tile = x + b * x_b + h * x_h + first * x_l + j[:, None] * x_l + p[None, :]
        values = tl.load(x_tile, mask=j_in[:, None] & (p < P)[None, :], other=0.0).to(DOT)
        out = dy + b * dy_b + h * dy_h + first * dy_l + i[:, None] * dy_l + p[None, :]
        out = tl.load(out, mask=i_in[:, None] & (p < P)[None, :], other=0.0).to(DOT)
        dweights = tl.dot(values, tl.trans(out), input_precision="tf32x3")
        # similarity is zero where i does not see j, and dsimilarity is masked once, behind the loop
        decay = tl.exp2(tl.minimum(cs_i[None, :] - cs_j[:, None], 0.0))
        weights = similarity * (decay * scale_j[:, None])
        if HAS_D:
            # D joins the diagonal of the weights, and dD is the trace of the products x_j·dy_i
            skip = tl.where(j_real, tl.load(D + h).to(tl.float32), 0.0)
            weights += tl.where(own, skip[:, None], 0.0)
            trace = tl.sum(tl.where(j_real, tl.sum(tl.where(own, dweights, 0.0), axis=1), 0.0), axis=0)
            tl.store(dskip + (b * tl.num_programs(0) + tl.program_id(0)) * H + h, trace)
        dweights = dweights * decay
        dsimilarity += dweights * scale_j[:, None]
        product = dweights * similarity
        tl.store(dscale + line + j, tl.sum(product, axis=1))
        # the diagonal, often the largest entry, cancels by itself; leaving it in would leave its rounding error
        product = tl.where(own, 0.0, product * scale_j[:, None])
        tl.store(dcol + line + j, tl.sum(product, axis=1))
        tl.store(drow + (tile * batch + b) * H * Lp + h * Lp + first + i, tl.sum(product, axis=0))
        cell = p[None, :] * N + n[:, None]
        in_state = (p < P)[None, :] & (n < N)[:, None]
        left = tl.load(dleft + ((b * C + c) * H + h) * P * N + cell, mask=in_state, other=0.0).to(DOT)
        leave = tl.where(kept, tl.exp2(tl.minimum(total - cs_j, 0.0)) * scale_j, 0.0)
        du = tl.dot(b_rows, left, input_precision="tf32x3") * leave[:, None]
        du = tl.dot(weights.to(DOT), out, du, input_precision="tf32x3")
        place = ((b * L + first) * H + h) * P + j[:, None] * (H * P) + p[None, :]
        tl.store(dx + place, du.to(dx.dtype.element_ty), mask=j_in[:, None] & (p < P)[None, :])
    groups = H // R
    place = (((split * batch + b) * groups + g) * Lp + first) * Q
    tl.store(dsim + place + j[:, None] * Q + i[None, :], tl.where(seen, dsimilarity, 0.0).to(dsim.dtype.element_ty))


@triton.jit
def dbc_kernel(
    tokens,  # role C: dy; role B: x
    others,  # role C: B; role B: C
    mine,  # role C: C; role B: B
    states,  # role C: the states that enter each chunk; role B: the gradients of those that leave it
    reach,  # with HAS_REACH (role C) states is H_in (b, H, P, N), and only what reach·H_in gave to y counts
    cs,
    scale,
    code,
    dsim,
    grad,  # (SPLITS, b, L, G, N), contiguous
    dlink,  # (b, H, Lp) float32: what the entering state gave to y_i; per unit of scale, what x_i gave to the state
    L,
    H,
    R,
    P,
    N,
    C,
    Lp,
    tokens_b,
    tokens_l,
    tokens_h,
    others_b,
    others_l,
    others_g,
    mine_b,
    mine_l,
    mine_g,
    HEADS,
    ROLE_C: tl.constexpr,
    HAS_CODE: tl.constexpr,
    HAS_REACH: tl.constexpr,
    Q: tl.constexpr,
    ROWS: tl.constexpr,
    BP: tl.constexpr,
    BN: tl.constexpr,
    DOT: tl.constexpr,
):
    """dC_i = Σ_h exp(cs_i) dy_i·H + Σ_j dsim_ji B_j, or dB_j = Σ_h factor_j x_j·G + Σ_i dsim_ji C_i; ROWS tokens."""
    tiles = Q // ROWS
    c, b = (tl.program_id(0) // tiles).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    h_first = tl.program_id(1) * HEADS
    g = (h_first // R).to(tl.int64)
    split = (h_first % R) // HEADS
    groups = H // R
    i = (tl.program_id(0) % tiles) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, Q)
    p = tl.arange(0, BP)
    n = tl.arange(0, BN)
    first = c * Q
    i_in, k_in = first + i < L, first + k < L
    place = (((split * batch + b) * groups + g) * Lp + first) * Q
    total = tl.zeros((ROWS, BN), dtype=tl.float32)
    if not HAS_REACH:
        if ROLE_C:
            weights = tl.load(dsim + place + k[None, :] * Q + i[:, None])
        else:
            weights = tl.load(dsim + place + i[:, None] * Q + k[None, :])
        others += b * others_b + g * others_g + first * others_l
        tile = tl.load(others + k[:, None] * others_l + n[None, :], mask=k_in[:, None] & (n < N)[None, :], other=0.0)
        total = tl.dot(weights.to(DOT), tile.to(DOT), input_precision="tf32x3")
    linked = i_in
    if HAS_CODE:
        entering, last = chunk_segments(code, b, c, L, Q)
        i_code = tl.load(code + b * L + first + i, mask=i_in, other=1)
        linked = ((i_code & 1) == 0) & ((i_code >> 1) == (entering if ROLE_C else last))
    mine += b * mine_b + g * mine_g + first * mine_l
    own = tl.load(mine + i[:, None] * mine_l + n[None, :], mask=i_in[:, None] & (n < N)[None, :], other=0.0)
    for r in range(HEADS):
        h = (h_first + r).to(tl.int64)
        line = (b * H + h) * Lp + first
        exponent = tl.load(cs + line + i)
        if not ROLE_C:
            exponent = tl.load(cs + line + Q - 1) - exponent
        factor = tl.where(linked, tl.exp2(tl.minimum(exponent, 0.0)), 0.0)
        head = tokens + b * tokens_b + h * tokens_h + first * tokens_l
        rows = tl.load(head + i[:, None] * tokens_l + p[None, :], mask=i_in[:, None] & (p < P)[None, :], other=0.0)
        cell = p[:, None] * N + n[None, :]
        in_state = (p < P)[:, None] & (n < N)[None, :]
        if HAS_REACH:
            far = tl.load(states + (b * H + h) * P * N + cell, mask=in_state, other=0.0).to(tl.float32)
            state = far * tl.load(reach + (b * H + h) * C + c)
        else:
            state = tl.load(states + ((b * C + c) * H + h) * P * N + cell, mask=in_state, other=0.0)
        part = tl.dot(rows.to(DOT), state.to(DOT), input_precision="tf32x3") * factor[:, None]
        tl.store(dlink + line + i, tl.sum(part * own.to(tl.float32), axis=1))
        if not ROLE_C:
            part *= tl.load(scale + line + i)[:, None]
        total += part
    place = ((split * batch + b) * L + first) * groups * N + g * N
    mask = i_in[:, None] & (n < N)[None, :]
    tl.store(grad + place + i[:, None] * (groups * N) + n[None, :], total.to(grad.dtype.element_ty), mask=mask)


@triton.jit
def decay_kernel(
    drow,
    dcol,
    dopen,  # dlink of role C
    dgiven,  # dlink of role B
    dots,
    dscale,
    code,
    first_in,  # DISCRETISE: dt by its strides
    A,
    bias,
    scale,
    dfirst,  # (b, L, H) by its strides, heads contiguous: ddt or dlog_decay
    dsecond,  # (b, L, H): dscale, unless DISCRETISE
    dA,  # (b, C, H) float32: partials
    dbias,  # (b, C, H) float32: partials
    L,
    H,
    C,
    Lp,
    first_b,
    first_l,
    first_h,
    dfirst_b,
    dfirst_l,
    low,
    high,
    TILES: tl.constexpr,
    BLOCKS: tl.constexpr,
    DISCRETISE: tl.constexpr,
    SOFTPLUS: tl.constexpr,
    CLAMP: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_CODE: tl.constexpr,
    Q: tl.constexpr,
):
    """From the gradient of cs to those of log_decay and scale, or of dt, A and dt_bias; one chunk of one head."""
    c, h, b = tl.program_id(0).to(tl.int64), tl.program_id(1).to(tl.int64), tl.program_id(2).to(tl.int64)
    batch = tl.num_programs(2)
    i = tl.arange(0, Q)
    t = c * Q + i
    line = (b * H + h) * Lp + c * Q
    per_scale = tl.load(dgiven + line + i)
    given = per_scale * tl.load(scale + line + i)
    dcs = tl.load(dopen + line + i) - tl.load(dcol + line + i) - given
    last = tl.sum(given, axis=0)
    for tile in tl.static_range(TILES):
        # a tile of j holds row sums for every i of the chunk; those before the tile are zeros
        dcs += tl.load(drow + (tile * batch + b) * H * Lp + h * Lp + c * Q + i)
    for block in tl.static_range(BLOCKS):
        last += tl.load(dots + ((block * batch + b) * H + h) * C + c)
    dcs += tl.where(i == Q - 1, last, 0.0)
    # cs_i holds log_decay_t for every t <= i of its segment; the mask keeps documents exactly apart
    same = i[None, :] >= i[:, None]
    if HAS_CODE:
        _, ending = chunk_segments(code, b, c, L, Q)
        codes = tl.load(code + b * L + t, mask=t < L, other=1)
        segment = tl.where(t < L, codes >> 1, ending)
        same = same & (segment[None, :] == segment[:, None])
    dlog = tl.sum(tl.where(same, dcs[None, :], 0.0), axis=1)
    if HAS_CODE:
        earlier = tl.load(code + b * L + t - 1, mask=(t > 0) & (t < L), other=0) >> 1
        dlog = tl.where((segment == earlier) & ((codes & 1) == 0), dlog, 0.0)
    ds = tl.load(dscale + line + i) + per_scale
    if HAS_CODE:
        ds = tl.where((codes & 1) == 0, ds, 0.0)
    place = b * dfirst_b + t * dfirst_l + h
    if DISCRETISE:
        v = tl.load(first_in + b * first_b + t * first_l + h * first_h, mask=t < L, other=0.0).to(tl.float32)
        if HAS_BIAS:
            v += tl.load(bias + h).to(tl.float32)
        slope = tl.full((Q,), 1.0, dtype=tl.float32)
        step = v
        if SOFTPLUS:
            slope = tl.where(v > 20.0, 1.0, 1.0 / (1.0 + tl.exp(-v)))
            step = softplus(v)
        if CLAMP:
            slope = tl.where((step >= low) & (step <= high), slope, 0.0)
        if HAS_CODE:
            slope = tl.where((codes & 1) == 0, slope, 0.0)
        tl.store(dA + (b * C + c) * H + h, tl.sum(dlog * tl.load(scale + line + i), axis=0))
        ddt = tl.where(t < L, (dlog * tl.load(A + h).to(tl.float32) + ds) * slope, 0.0)
        tl.store(dbias + (b * C + c) * H + h, tl.sum(ddt, axis=0))
        tl.store(dfirst + place, ddt.to(dfirst.dtype.element_ty), mask=t < L)
    else:
        tl.store(dfirst + place, dlog.to(dfirst.dtype.element_ty), mask=t < L)
        tl.store(dsecond + (b * L + t) * H + h, ds.to(dsecond.dtype.element_ty), mask=t < L)
