"""Device code of the attention forward, and what forward and backward share.

Flash attention (Dao et al. 2022; online softmax after Milakov and Gimelshein 2018) over a packed buffer
whose rows are grouped by modality. A sample's tokens are found through the int32 row table
`ROWS[cu[b] : cu[b + 1]]`, so nothing is copied into sample order. Index names: `j` counts a sample's
tokens in table order, a *row* is a packed row, a *position* is what biases and causal masks use.

Conventions of every kernel here:
- one-dimensional grids (the y and z limits of 65,535 are within reach of B), heads fastest, so that the
  programs that share a sample's rows run together and meet in L2;
- past-the-end token indices are clamped to the sample's last token: a tile never reads another sample's
  rows, whose Inf would come back as 0 * Inf = NaN;
- masks are -inf, not a large number, so that finite biases of any size mean what they mean in eager;
- scores are held in natural units (NATURAL) or in those of log2(e), where exp2 needs no factor. With a bias
  the factor must follow the subtraction of the peak: masks of finfo.min would overflow before it. In fp32
  it must too: the lse in units of log2(e) has two roundings of size |lse| * eps, which shows in gradients;
- strides arrive divided by the constexpr ALIGN: the compiler learns their divisibility (16-byte loads at
  head_dim 40 and 88 need it), yet their value is no part of the compiled kernel's key.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# Tokens a program looks at per step when it searches tables. The scans are latency-bound: few, wide steps.
SCAN = tl.constexpr(1024)


@triton.jit
def locate_tile(CU, B, tile, tiles_per_sample, BLOCK: tl.constexpr):
    """Sample and first token index of a tile; indices past the sample's end mark a tile without work.

    `tiles_per_sample > 0`: every sample has that many tiles. 0: sample `b` owns the tiles from
    `cu[b] // BLOCK + b` on, which is increasing and leaves it at least `ceil(n / BLOCK)` of them; counting
    the starts up to `tile` finds `b` without a table, a prefix sum or a launch of its own.
    """
    if tiles_per_sample > 0:
        b = tile // tiles_per_sample
        first_tile = b * tiles_per_sample
    else:
        started = 0
        for b0 in range(0, B, SCAN):
            i = b0 + tl.arange(0, SCAN)
            start = tl.load(CU + i, mask=i < B, other=0) // BLOCK + i
            started += tl.sum(((i < B) & (start <= tile)).to(tl.int32), 0)
        b = started - 1
        first_tile = tl.load(CU + b) // BLOCK + b
    return b, (tile - first_tile) * BLOCK


@triton.jit
def token_rows(ROWS, base, j, n):
    """Packed rows of token indices `j`, those past the end replaced by the last token's."""
    return tl.load(ROWS + base + tl.minimum(j, n - 1))


@triton.jit
def head_tile(X, rows, head, stride_t, stride_h, d):
    """Pointers to `X[rows, head, d]`, in int64: T * H * Dh passes 2^31."""
    return X + rows.to(tl.int64)[:, None] * stride_t + (head.to(tl.int64) * stride_h + d[None, :])


@triton.jit
def load_head(X, rows, head, stride_t, stride_h, d, DH: tl.constexpr, DHP: tl.constexpr):
    """`X[rows, head, :]` as `[len(rows), DHP]`, zero in the padding of the head dimension."""
    at = head_tile(X, rows, head, stride_t, stride_h, d)
    if DH == DHP:
        return tl.load(at)
    else:
        return tl.load(at, mask=(d < DH)[None, :], other=0.0)


@triton.jit
def store_head(X, value, rows, live, head, stride_t, stride_h, d, DH: tl.constexpr):
    at = head_tile(X, rows, head, stride_t, stride_h, d)
    tl.store(at, value.to(X.dtype.element_ty), mask=live[:, None] & (d < DH)[None, :])


@triton.jit
def keys_in_reach(ROWS, POSITIONS, base, n, reach):
    """One past the last token index whose position is below `reach`, at least 1.

    Token order need not follow positions; where it does, this is the usual causal bound.
    """
    end = 1
    for j0 in range(0, n, SCAN):
        j = j0 + tl.arange(0, SCAN)
        at = tl.load(POSITIONS + token_rows(ROWS, base, j, n))
        end = tl.maximum(end, tl.max(tl.where((j < n) & (at < reach), j + 1, 0), 0))
    return end


@triton.jit
def bias_row_offsets(pq, bias_q, WIDE: tl.constexpr):
    """Offsets `[queries, 1]` of a head's bias rows, int32 unless N * N passes 2^31.

    int64 here costs registers on every element: the short backward with a bias then spills 16 bytes.
    """
    if WIDE:
        return (pq.to(tl.int64) * bias_q)[:, None]
    else:
        return (pq * bias_q)[:, None]


@triton.jit
def load_bias(bias_of_head, bias_rows, pk):
    """The fp32 bias `[queries, keys]` at row offsets `[queries, 1]` and key positions `pk`.

    The hint lays the threads of a warp along the keys, where neighbours mostly are neighbours in memory;
    without it Triton puts them across rows and every lane reads a sector of its own. Loads stay one
    element wide, since the alignment of a loaded index is unknown: right for any positions.
    """
    return tl.load(tl.max_contiguous(bias_of_head + (bias_rows + pk[None, :]), [1, 2])).to(tl.float32)


@triton.jit
def scores(dot, bias, score_scale, HAS_BIAS: tl.constexpr):
    if HAS_BIAS:
        return dot * score_scale + bias
    else:
        return dot * score_scale


@triton.jit
def exp_of(difference, NATURAL: tl.constexpr):
    if NATURAL:
        return tl.exp(difference)
    else:
        return tl.exp2(difference)


FWD_DYNAMIC = ["B", "T", "tiles_per_sample", "q_t", "q_h", "k_t", "k_h", "v_t", "v_h", "bias_h", "bias_q"]


@triton.jit(do_not_specialize=FWD_DYNAMIC)
def attention_fwd_kernel(
    Q, K, V, O, LSE, CU, ROWS, POSITIONS, BIAS, PREFIX,
    score_scale, B, T, tiles_per_sample, q_t, q_h, k_t, k_h, v_t, v_h, bias_h, bias_q,
    H: tl.constexpr, GROUP: tl.constexpr, DH: tl.constexpr, DHP: tl.constexpr, ALIGN: tl.constexpr,
    HAS_BIAS: tl.constexpr, NATURAL: tl.constexpr, WIDE_BIAS: tl.constexpr,
    CAUSAL: tl.constexpr, HAS_PREFIX: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, STAGES: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """One program per (query tile, head). O `[T, H, DH]`, LSE fp32 `[H, T]` (natural log), by packed row."""
    pid = tl.program_id(0)
    h = pid % H
    hk = h // GROUP
    b, q0 = locate_tile(CU, B, pid // H, tiles_per_sample, BM)
    base = tl.load(CU + b)
    n = tl.load(CU + b + 1) - base
    if q0 >= n:
        return
    d = tl.arange(0, DHP)
    jq = q0 + tl.arange(0, BM)
    rq = token_rows(ROWS, base, jq, n)
    q = load_head(Q, rq, h, q_t * ALIGN, q_h * ALIGN, d, DH, DHP)
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

    peak = tl.full((BM,), float("-inf"), tl.float32)
    total = tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, DHP), tl.float32)
    # Rows and positions of the next tile are carried: loaded where they are used, they would cost the K
    # and V loads their pipeline (cp.async.wait_group 0).
    rk = token_rows(ROWS, base, tl.arange(0, BN), n)
    if HAS_BIAS or CAUSAL:
        pk = tl.load(POSITIONS + rk)
    # At least one trip: a loop that may run zero times serialises every wgmma (ptxas C7515).
    for i in tl.range(0, tl.maximum(tl.cdiv(end, BN), 1), num_stages=STAGES):
        jk = i * BN + tl.arange(0, BN)
        k = load_head(K, rk, hk, k_t * ALIGN, k_h * ALIGN, d, DH, DHP)
        v = load_head(V, rk, hk, v_t * ALIGN, v_h * ALIGN, d, DH, DHP)
        rk = token_rows(ROWS, base, jk + BN, n)
        bias = 0.0
        if HAS_BIAS:
            bias = load_bias(BIAS + h.to(tl.int64) * bias_h, bias_rows, pk)
        s = scores(tl.dot(q, tl.trans(k), input_precision=PRECISION), bias, score_scale, HAS_BIAS)
        s += tl.where(jk < n, 0.0, float("-inf"))[None, :]
        if CAUSAL:
            s = tl.where((pk[None, :] <= pq[:, None]) | (pk < seen_by_all)[None, :], s, float("-inf"))
        if HAS_BIAS or CAUSAL:
            pk = tl.load(POSITIONS + rk)
        new_peak = tl.maximum(peak, tl.max(s, 1))
        shift = new_peak
        if HAS_BIAS or CAUSAL:  # a query may have seen no key yet: -inf - -inf is NaN
            shift = tl.where(new_peak == float("-inf"), 0.0, new_peak)
        p = exp_of(s - shift[:, None], NATURAL)
        rescale = exp_of(peak - shift, NATURAL)
        total = total * rescale + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * rescale[:, None], input_precision=PRECISION)
        peak = new_peak

    blind = total == 0.0  # no visible key: o = 0, lse = -inf
    acc = acc * (1.0 / tl.where(blind, 1.0, total))[:, None]
    if NATURAL:
        lse = peak + tl.log(total)
    else:
        lse = (peak + tl.log2(total)) * LN2
    live = jq < n
    store_head(O, acc, rq, live, h, H * DH, DH, d, DH)
    tl.store(LSE + h.to(tl.int64) * T + rq, tl.where(blind, float("-inf"), lse), mask=live)
