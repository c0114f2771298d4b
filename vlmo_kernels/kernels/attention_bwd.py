"""Device code of the attention backward (Dao et al. 2022, algorithm 2). Conventions: attention_fwd.py.

With P = exp(S - lse), dP = dO V^T and delta = rowsum(dO * O):
    dS = P * (dP - delta),   dQ = scale * dS K,   dK = scale * dS^T Q,   dV = P^T dO,
    dbias = sum of dS over samples.

Two routes, both free of atomics. Long: dq (which also leaves delta), then dk and dv. Short, for samples
of at most 256 tokens: one program per (sample, head) keeps dq in registers and needs 5 matmuls, not 7.
"""

import triton
import triton.language as tl

from .attention_fwd import (
    LOG2E,
    SCAN,
    bias_row_offsets,
    exp_of,
    head_tile,
    keys_in_reach,
    load_bias,
    load_head,
    locate_tile,
    scores,
    store_head,
    token_rows,
)

STRIDES = ["q_t", "q_h", "k_t", "k_h", "v_t", "v_h", "dq_t", "dq_h", "dk_t", "dk_h", "dv_t", "dv_h"]
BWD_DYNAMIC = ["B", "T", "tiles_per_sample", *STRIDES, "bias_h", "bias_q"]


@triton.jit
def zero_dead_rows(
    X, CU, B, T, tile, tiles, head, stride_t, stride_h, d, DH: tl.constexpr, BLOCK: tl.constexpr
):
    """This program's share of the rows past the live ones: gradients are zero there."""
    for r0 in range(tl.load(CU + B) + tile * BLOCK, T, tiles * BLOCK):
        r = r0 + tl.arange(0, BLOCK)
        at = head_tile(X, r, head, stride_t, stride_h, d)
        zero = tl.zeros((BLOCK, d.shape[0]), X.dtype.element_ty)
        tl.store(at, zero, mask=(r < T)[:, None] & (d < DH)[None, :])


@triton.jit
def load_lse(LSE, rows, live, NATURAL: tl.constexpr):
    """The log-sum-exp in the units of `scores`.

    +inf for queries past the end, whose P must be 0; 0 for queries without a visible key, whose scores
    are all -inf.
    """
    lse = tl.load(LSE + rows)
    lse = tl.where(lse == float("-inf"), 0.0, lse)
    if not NATURAL:
        lse *= LOG2E
    return tl.where(live, lse, float("inf"))


@triton.jit
def first_query_in_reach(ROWS, POSITIONS, base, n, position):
    """The first token index whose position is at least `position`."""
    first = n - 1
    for j0 in range(0, n, SCAN):
        j = j0 + tl.arange(0, SCAN)
        at = tl.load(POSITIONS + token_rows(ROWS, base, j, n))
        first = tl.minimum(first, tl.min(tl.where((j < n) & (at >= position), j, n - 1), 0))
    return first


@triton.jit(do_not_specialize=BWD_DYNAMIC)
def attention_dq_kernel(
    Q, K, V, O, DO, LSE, DELTA, DQ, DK, DV, CU, ROWS, POSITIONS, BIAS, PREFIX,
    scale, score_scale, B, T, tiles_per_sample,
    q_t, q_h, k_t, k_h, v_t, v_h, dq_t, dq_h, dk_t, dk_h, dv_t, dv_h, bias_h, bias_q,
    H: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, DHP: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, WIDE_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (query tile, head): dq, DELTA fp32 `[H, T]`, and zeros in dead rows of all three."""
    pid = tl.program_id(0)
    tile = pid // H
    tiles = tl.num_programs(0) // H
    h = pid % H
    hk = h // GROUP
    d = tl.arange(0, DHP)
    zero_dead_rows(DQ, CU, B, T, tile, tiles, h, dq_t * ALIGN, dq_h * ALIGN, d, DH, BM)
    if h % GROUP == 0:
        zero_dead_rows(DK, CU, B, T, tile, tiles, hk, dk_t * ALIGN, dk_h * ALIGN, d, DH, BM)
        zero_dead_rows(DV, CU, B, T, tile, tiles, hk, dv_t * ALIGN, dv_h * ALIGN, d, DH, BM)
    b, q0 = locate_tile(CU, B, tile, tiles_per_sample, BM)
    base = tl.load(CU + b)
    n = tl.load(CU + b + 1) - base
    if q0 >= n:
        return
    jq = q0 + tl.arange(0, BM)
    live = jq < n
    rq = token_rows(ROWS, base, jq, n)
    q = load_head(Q, rq, h, q_t * ALIGN, q_h * ALIGN, d, DH, DHP)
    o = load_head(O, rq, h, H * DH, DH, d, DH, DHP)
    do = load_head(DO, rq, h, H * DH, DH, d, DH, DHP)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + h.to(tl.int64) * T + rq, delta, mask=live)
    lse = load_lse(LSE + h.to(tl.int64) * T, rq, live, NATURAL)
    end = n
    if HAS_BIAS or CAUSAL:
        pq = tl.load(POSITIONS + rq)
    if CAUSAL:
        seen_by_all = 0
        if HAS_PREFIX:
            seen_by_all = tl.load(PREFIX + b)
        end = keys_in_reach(ROWS, POSITIONS, base, n, tl.maximum(tl.max(pq, 0) + 1, seen_by_all))
    if HAS_BIAS:
        bias_rows = bias_row_offsets(pq, bias_q, WIDE_BIAS)

    dq = tl.zeros((BM, DHP), tl.float32)
    rk = token_rows(ROWS, base, tl.arange(0, BN), n)  # carried, as in the forward
    if HAS_BIAS or CAUSAL:
        pk = tl.load(POSITIONS + rk)
    for i in tl.range(0, tl.maximum(tl.cdiv(end, BN), 1), num_stages=STAGES):
        jk = i * BN + tl.arange(0, BN)
        k = load_head(K, rk, hk, k_t * ALIGN, k_h * ALIGN, d, DH, DHP)
        v = load_head(V, rk, hk, v_t * ALIGN, v_h * ALIGN, d, DH, DHP)
        rk = token_rows(ROWS, base, jk + BN, n)
        bias = 0.0
        if HAS_BIAS:
            bias = load_bias(BIAS + h.to(tl.int64) * bias_h, bias_rows, pk)
        s = scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, score_scale, HAS_BIAS)
        p = exp_of(s + tl.where(jk < n, 0.0, float("-inf"))[None, :] - lse[:, None], NATURAL)
        if CAUSAL:
            p = tl.where((pk[None, :] <= pq[:, None]) | (pk < seen_by_all)[None, :], p, 0.0)
        if HAS_BIAS or CAUSAL:
            pk = tl.load(POSITIONS + rk)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        dq = tl.dot(ds.to(k.dtype), k, dq, input_precision=PRECISION)
    store_head(DQ, dq * scale, rq, live, h, dq_t * ALIGN, dq_h * ALIGN, d, DH)


@triton.jit(do_not_specialize=BWD_DYNAMIC)
def attention_dkdv_kernel(
    Q, K, V, DO, LSE, DELTA, DK, DV, CU, ROWS, POSITIONS, BIAS, PREFIX,
    scale, score_scale, B, T, tiles_per_sample,
    q_t, q_h, k_t, k_h, v_t, v_h, dk_t, dk_h, dv_t, dv_h, bias_h, bias_q,
    H: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, DHP: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, WIDE_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (key tile, key head), over the query tiles of its `GROUP` query heads.

    Scores are held transposed, `[BN keys, BM queries]`: P and dS are then left operands from registers.
    """
    pid = tl.program_id(0)
    heads: tl.constexpr = H // GROUP
    hk = pid % heads
    b, k0 = locate_tile(CU, B, pid // heads, tiles_per_sample, BN)
    base = tl.load(CU + b)
    n = tl.load(CU + b + 1) - base
    if k0 >= n:
        return
    d = tl.arange(0, DHP)
    jk = k0 + tl.arange(0, BN)
    rk = token_rows(ROWS, base, jk, n)
    k = load_head(K, rk, hk, k_t * ALIGN, k_h * ALIGN, d, DH, DHP)
    v = load_head(V, rk, hk, v_t * ALIGN, v_h * ALIGN, d, DH, DHP)
    first = 0
    if HAS_BIAS or CAUSAL:
        pk = tl.load(POSITIONS + rk)
    if CAUSAL:
        nearest = tl.min(pk, 0)
        seen_by_all = 0
        if HAS_PREFIX:
            seen_by_all = tl.load(PREFIX + b)
        reach = tl.where(nearest < seen_by_all, -1, nearest)  # a prefix key is visible from everywhere
        first = first_query_in_reach(ROWS, POSITIONS, base, n, reach) // BM * BM
    steps = tl.maximum(tl.cdiv(n - first, BM), 1)

    dk = tl.zeros((BN, DHP), tl.float32)
    dv = tl.zeros((BN, DHP), tl.float32)
    rq = token_rows(ROWS, base, first + tl.arange(0, BM), n)
    if HAS_BIAS or CAUSAL:
        pq = tl.load(POSITIONS + rq)
    for i in tl.range(0, steps * GROUP, num_stages=STAGES):
        if GROUP == 1:
            h = hk
            jq = first + i * BM + tl.arange(0, BM)
            following = jq + BM
        else:
            h = hk * GROUP + i // steps
            jq = first + i % steps * BM + tl.arange(0, BM)
            following = first + (i + 1) % steps * BM + tl.arange(0, BM)
        q = load_head(Q, rq, h, q_t * ALIGN, q_h * ALIGN, d, DH, DHP)
        do = load_head(DO, rq, h, H * DH, DH, d, DH, DHP)
        lse = load_lse(LSE + h.to(tl.int64) * T, rq, jq < n, NATURAL)
        delta = tl.load(DELTA + h.to(tl.int64) * T + rq)
        rq = token_rows(ROWS, base, following, n)
        bias = 0.0
        if HAS_BIAS:
            # Read along the keys, where the bias is contiguous, then turned in registers.
            bias_rows = bias_row_offsets(pq, bias_q, WIDE_BIAS)
            bias = tl.trans(load_bias(BIAS + h.to(tl.int64) * bias_h, bias_rows, pk))
        st = scores(tl.dot(k, tl.trans(q), input_precision=PRECISION), bias, score_scale, HAS_BIAS)
        p = exp_of(st - lse[None, :], NATURAL)
        if CAUSAL:
            p = tl.where((pk[:, None] <= pq[None, :]) | (pk < seen_by_all)[:, None], p, 0.0)
        if HAS_BIAS or CAUSAL:
            pq = tl.load(POSITIONS + rq)
        dv = tl.dot(p.to(do.dtype), do, dv, input_precision=PRECISION)
        dp = tl.dot(v, tl.trans(do), input_precision=PRECISION)
        ds = p * (dp - delta[None, :])
        dk = tl.dot(ds.to(q.dtype), q, dk, input_precision=PRECISION)
    live = jk < n
    store_head(DK, dk * scale, rk, live, hk, dk_t * ALIGN, dk_h * ALIGN, d, DH)
    store_head(DV, dv, rk, live, hk, dv_t * ALIGN, dv_h * ALIGN, d, DH)


@triton.jit(do_not_specialize=BWD_DYNAMIC)
def attention_short_bwd_kernel(
    Q, K, V, O, DO, LSE, DELTA, DQ, DK, DV, CU, ROWS, POSITIONS, BIAS, PREFIX,
    scale, score_scale, B, T,
    q_t, q_h, k_t, k_h, v_t, v_h, dq_t, dq_h, dk_t, dk_h, dv_t, dv_h, bias_h, bias_q,
    H: tl.constexpr, DH: tl.constexpr, DHP: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, WIDE_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (sample, head) of at most `BM` tokens: dq, dk, dv and DELTA in one pass over the keys.

    Equal numbers of query and key heads only. dK and dV are formed transposed, `[DHP, BN]`: the scores
    stay `[BM queries, BN keys]` for all five matmuls (with 256 x 32, the transposed scores spill).
    """
    pid = tl.program_id(0)
    b = pid // H
    h = pid % H
    d = tl.arange(0, DHP)
    zero_dead_rows(DQ, CU, B, T, b, B, h, dq_t * ALIGN, dq_h * ALIGN, d, DH, BN)
    zero_dead_rows(DK, CU, B, T, b, B, h, dk_t * ALIGN, dk_h * ALIGN, d, DH, BN)
    zero_dead_rows(DV, CU, B, T, b, B, h, dv_t * ALIGN, dv_h * ALIGN, d, DH, BN)
    base = tl.load(CU + b)
    n = tl.load(CU + b + 1) - base
    if n <= 0:
        return
    jq = tl.arange(0, BM)
    live = jq < n
    rq = token_rows(ROWS, base, jq, n)
    o = load_head(O, rq, h, H * DH, DH, d, DH, DHP)
    do = load_head(DO, rq, h, H * DH, DH, d, DH, DHP)
    delta = tl.sum(o.to(tl.float32) * do.to(tl.float32), 1)
    tl.store(DELTA + h.to(tl.int64) * T + rq, delta, mask=live)
    q = load_head(Q, rq, h, q_t * ALIGN, q_h * ALIGN, d, DH, DHP)
    lse = load_lse(LSE + h.to(tl.int64) * T, rq, live, NATURAL)
    if HAS_BIAS or CAUSAL:
        pq = tl.load(POSITIONS + rq)
    if CAUSAL:
        seen_by_all = 0
        if HAS_PREFIX:
            seen_by_all = tl.load(PREFIX + b)
    if HAS_BIAS:
        bias_rows = bias_row_offsets(pq, bias_q, WIDE_BIAS)

    dq = tl.zeros((BM, DHP), tl.float32)
    rk = token_rows(ROWS, base, tl.arange(0, BN), n)
    for i in tl.range(0, tl.maximum(tl.cdiv(n, BN), 1), num_stages=STAGES):
        jk = i * BN + tl.arange(0, BN)
        k = load_head(K, rk, h, k_t * ALIGN, k_h * ALIGN, d, DH, DHP)
        v = load_head(V, rk, h, v_t * ALIGN, v_h * ALIGN, d, DH, DHP)
        here = rk
        rk = token_rows(ROWS, base, jk + BN, n)
        if HAS_BIAS or CAUSAL:
            pk = tl.load(POSITIONS + here)
        bias = 0.0
        if HAS_BIAS:
            bias = load_bias(BIAS + h.to(tl.int64) * bias_h, bias_rows, pk)
        s = scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, score_scale, HAS_BIAS)
        key_live = jk < n
        p = exp_of(s + tl.where(key_live, 0.0, float("-inf"))[None, :] - lse[:, None], NATURAL)
        if CAUSAL:
            p = tl.where((pk[None, :] <= pq[:, None]) | (pk < seen_by_all)[None, :], p, 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        ds = (p * (dp - delta[:, None])).to(q.dtype)
        dv = tl.trans(tl.dot(tl.trans(do), p.to(do.dtype), input_precision=PRECISION))
        dk = tl.trans(tl.dot(tl.trans(q), ds, input_precision=PRECISION))
        dq = tl.dot(ds, k, dq, input_precision=PRECISION)
        store_head(DK, dk * scale, here, key_live, h, dk_t * ALIGN, dk_h * ALIGN, d, DH)
        store_head(DV, dv, here, key_live, h, dv_t * ALIGN, dv_h * ALIGN, d, DH)
    store_head(DQ, dq * scale, rq, live, h, dq_t * ALIGN, dq_h * ALIGN, d, DH)


@triton.jit(do_not_specialize=["N"])
def row_of_position_kernel(INVERSE, CU, ROWS, POSITIONS, N, BLOCK: tl.constexpr):
    """One program per sample: `INVERSE[b, positions[row]] = row`. Unset entries keep what they hold."""
    b = tl.program_id(0)
    base = tl.load(CU + b)
    n = tl.load(CU + b + 1) - base
    for j0 in range(0, n, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        row = token_rows(ROWS, base, j, n)
        tl.store(INVERSE + b.to(tl.int64) * N + tl.load(POSITIONS + row), row, mask=j < n)


@triton.jit(do_not_specialize=["B", "T", "N", "q_t", "q_h", "k_t", "k_h", "v_t", "v_h", "bias_h", "bias_q"])
def attention_dbias_kernel(
    Q, K, V, DO, LSE, DELTA, DBIAS, INVERSE, BIAS, PREFIX,
    score_scale, B, T, N, q_t, q_h, k_t, k_h, v_t, v_h, bias_h, bias_q,
    H: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, DHP: tl.constexpr, ALIGN: tl.constexpr,
    WIDE_BIAS: tl.constexpr, CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (query positions, key positions, head): DBIAS `[H, N, N]`, samples in order.

    Works in position space: INVERSE int32 `[B, N]` is the packed row at each position, -1 where the
    sample has none. Absent tokens load as zeros, so no NaN of another row can enter.
    """
    pid = tl.program_id(0)
    h = pid % H
    hk = h // GROUP
    tiles_k = tl.cdiv(N, BN)
    tile = pid // H
    d = tl.arange(0, DHP)
    d_live = (d < DH)[None, :]
    pq = tile // tiles_k * BM + tl.arange(0, BM)
    pk = tile % tiles_k * BN + tl.arange(0, BN)
    inside = (pq < N)[:, None] & (pk < N)[None, :]
    bias_at = bias_row_offsets(pq, bias_q, WIDE_BIAS) + pk[None, :]
    bias = tl.load(BIAS + h.to(tl.int64) * bias_h + bias_at, mask=inside, other=0.0).to(tl.float32)
    acc = tl.zeros((BM, BN), tl.float32)
    # int32 rows of the next sample are carried, as in the forward.
    rq = tl.load(INVERSE + pq, mask=pq < N, other=-1)
    rk = tl.load(INVERSE + pk, mask=pk < N, other=-1)
    for b in tl.range(0, tl.maximum(B, 1), num_stages=STAGES):
        here_q = rq >= 0
        here_k = rk >= 0
        q_mask = here_q[:, None] & d_live
        k_mask = here_k[:, None] & d_live
        q = tl.load(head_tile(Q, rq, h, q_t * ALIGN, q_h * ALIGN, d), mask=q_mask, other=0.0)
        do = tl.load(head_tile(DO, rq, h, H * DH, DH, d), mask=q_mask, other=0.0)
        k = tl.load(head_tile(K, rk, hk, k_t * ALIGN, k_h * ALIGN, d), mask=k_mask, other=0.0)
        v = tl.load(head_tile(V, rk, hk, v_t * ALIGN, v_h * ALIGN, d), mask=k_mask, other=0.0)
        lse = tl.load(LSE + h.to(tl.int64) * T + rq, mask=here_q, other=float("inf"))
        lse = tl.where(lse == float("-inf"), 0.0, lse)
        delta = tl.load(DELTA + h.to(tl.int64) * T + rq, mask=here_q, other=0.0)
        more = b + 1 < B
        following = INVERSE + tl.minimum(b + 1, B - 1).to(tl.int64) * N
        rq = tl.load(following + pq, mask=(pq < N) & more, other=-1)
        rk = tl.load(following + pk, mask=(pk < N) & more, other=-1)
        s = scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, score_scale, True)
        visible = here_k[None, :]
        if CAUSAL:
            seen_by_all = 0
            if HAS_PREFIX:
                seen_by_all = tl.load(PREFIX + b)
            visible &= (pk[None, :] <= pq[:, None]) | (pk < seen_by_all)[None, :]
        p = tl.where(visible, exp_of(s - lse[:, None], True), 0.0)
        dp = tl.dot(do, tl.trans(v), input_precision=PRECISION)
        acc += p * (dp - delta[:, None])
    out = DBIAS + (h.to(tl.int64) * N + pq.to(tl.int64)[:, None]) * N + pk[None, :]
    tl.store(out, acc.to(DBIAS.dtype.element_ty), mask=inside)
