// Gradients of attention from the saved log-sum-exp (Dao et al. 2022), that of the bias included.
//
// A task takes one key head through the samples of its group in order, so every sum has a fixed order. Scores are
// formed anew for QUERIES x KEYS at a time; of these P and dS stay in the cache as operands of the products with a
// long inner dimension, dV^T = dO^T P and dK^T = Q^T dS.
#pragma once

#include "attention_scores.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

constexpr int64_t QUERIES = 256;  // a multiple of BLOCK

// Rows q and q + 1 of W columns of B, `to` at row q of their panel, and the same values row-major.
static inline void store_pair(float* to, float* rows, int64_t stride, vf first, vf second) {
  store(to, first);
  store(to + Gemm<float>::width, second);
  if (rows) {
    store(rows, first);
    store(rows + stride, second);
  }
}
static inline float* panel_at(float* panels, int64_t panel, int64_t q, int64_t column) {
  constexpr int width = Gemm<float>::width;
  return panels + column / width * panel + q * width + column % width;
}
#if defined(__AVX512BF16__)
static inline void store_pair(bf16* to, bf16* rows, int64_t stride, vf first, vf second) {
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)second, (__m512)first);
  const __m512i index = _mm512_set_epi16(31, 15, 30, 14, 29, 13, 28, 12, 27, 11, 26, 10, 25, 9, 24, 8, 23, 7, 22, 6, 21,
                                         5, 20, 4, 19, 3, 18, 2, 17, 1, 16, 0);
  _mm512_storeu_si512(to, _mm512_permutexvar_epi16(index, both));
  if (rows) {
    _mm256_storeu_si256((__m256i*)rows, _mm512_castsi512_si256(both));
    _mm256_storeu_si256((__m256i*)(rows + stride), _mm512_extracti64x4_epi64(both, 1));
  }
}
static inline bf16* panel_at(bf16* panels, int64_t panel, int64_t q, int64_t column) {
  constexpr int width = Gemm<bf16>::width;
  return panels + column / width * panel + q * width + 2 * (column % width);
}
#endif

template <class T, class E>
struct Backward {
  using G = Gemm<E>;
  static constexpr bool precise = sizeof(T) == 4;

  const Attention& a;
  int64_t dim, group;  // padded head dim; query heads of a key head
  Sample sample;
  E *block, *keys_t, *values_t, *keys;       // [BLOCK, dim]; panels of K^T, V^T [dim, KEYS] and K [KEYS, dim]
  E *queries, *grads, *queries_t, *grads_t;  // Q and dO [QUERIES, dim], and transposed
  E *p_panels, *ds_panels, *ds_rows;         // P and dS [QUERIES, KEYS]; dS [BLOCK, KEYS]
  float *scores, *dp;                        // [BLOCK, KEYS]
  float *dq, *dk_t, *dv_t, *rows_out;        // [group, longest, dim]; [dim, KEYS] twice; [BLOCK, dim]
  float lse[QUERIES], delta[QUERIES];
  int32_t limits[QUERIES], positions[QUERIES];

  Backward(const Attention& attention, Scratch& scratch)
      : a(attention), dim(padded_dim(attention)), group(attention.heads / attention.kv_heads) {
    sample = make_sample(a, scratch);
    const int64_t n = min_of(KEYS, padded_length(a)), m = min_of(QUERIES, padded_length(a));
    block = scratch.take<E>(BLOCK * dim);
    keys_t = scratch.take<E>(n * dim);
    values_t = scratch.take<E>(n * dim);
    keys = scratch.take<E>(KEYS * dim);
    queries = scratch.take<E>(m * dim);
    grads = scratch.take<E>(m * dim);
    queries_t = scratch.take<E>(dim * QUERIES);
    grads_t = scratch.take<E>(dim * QUERIES);
    p_panels = scratch.take<E>(QUERIES * n);
    ds_panels = scratch.take<E>(QUERIES * n);
    ds_rows = scratch.take<E>(BLOCK * KEYS);
    scores = scratch.take<float>(BLOCK * KEYS);
    dp = scratch.take<float>(BLOCK * KEYS);
    dq = scratch.take<float>(group * padded_length(a) * dim);
    dk_t = scratch.take<float>(dim * KEYS);
    dv_t = scratch.take<float>(dim * KEYS);
    rows_out = scratch.take<float>(BLOCK * dim);
  }

  void task(int64_t index) {
    const int64_t groups = backward_groups(a), g = index % groups, kv_head = index / groups;
    if (a.dbias) {
      const int64_t size = group * a.bias_rows * a.bias_columns;
      __builtin_memset(a.dbias + (g * a.kv_heads + kv_head) * size, 0, size * sizeof(float));
    }
    for (int64_t b = g * a.batch / groups; b < (g + 1) * a.batch / groups; b++) {
      read_sample(a, b, sample);
      for (int64_t j = 0; j < sample.length; j += KEYS) key_block(kv_head, g, j, min_of(KEYS, sample.length - j));
      for (int64_t head = 0; head < group; head++) write_dq(kv_head * group + head, head);
    }
  }

  void key_block(int64_t kv_head, int64_t g, int64_t first, int64_t count) {
    const int64_t width = round_up(count, BLOCK);
    for (int64_t j = 0; j < count; j += BLOCK) {
      const int64_t some = min_of<int64_t>(BLOCK, count - j);
      const int32_t* rows = sample.rows + first + j;
      gather_block(head_of<T>(a.v, kv_head), a.v.row, rows, some, a.head_dim, dim, block);
      transposed_panels(block, dim, values_t + j * dim, G::width * dim);
      gather_block(head_of<T>(a.k, kv_head), a.k.row, rows, some, a.head_dim, dim, block);
      transposed_panels(block, dim, keys_t + j * dim, G::width * dim);
      panels(block, dim, j, keys, G::width * KEYS);
    }
    bool add = false;
    for (int64_t head = 0; head < group; head++)
      for (int64_t i = 0; i < sample.length; i += QUERIES, add = true)
        queries_and_keys(kv_head * group + head, head, g, i, min_of(QUERIES, sample.length - i), first, width, add);
    write_keys(a.dk, kv_head, dk_t, first, count, a.scale);
    write_keys(a.dv, kv_head, dv_t, first, count, 1.0f);
  }

  void queries_and_keys(int64_t head, int64_t head_in_group, int64_t g, int64_t first, int64_t count, int64_t key,
                        int64_t width, bool add) {
    read_queries(head, first, count);
    const int64_t padded = round_up(count, BLOCK), panel = G::width * padded;
    for (int64_t i = 0; i < padded; i += BLOCK) {
      G::run(BLOCK, width, dim, queries + i * dim, dim, keys_t, G::width * dim, scores, KEYS, false);
      G::run(BLOCK, width, dim, grads + i * dim, dim, values_t, G::width * dim, dp, KEYS, false);
      if (!a.bias)
        gradients<NoBias>(head, g, i, key, width, panel);
      else if (a.bias_format == FP32)
        gradients<float>(head, g, i, key, width, panel);
      else
        gradients<T>(head, g, i, key, width, panel);
      float* rows = dq + (head_in_group * padded_length(a) + first + i) * dim;
      G::run(BLOCK, dim, width, ds_rows, KEYS, keys, G::width * KEYS, rows, dim, key > 0);
    }
    G::run(dim, width, padded, queries_t, QUERIES, ds_panels, panel, dk_t, KEYS, add);
    G::run(dim, width, padded, grads_t, QUERIES, p_panels, panel, dv_t, KEYS, add);
  }

  // Q and dO of some queries in both layouts, and what the scores are masked and scaled with.
  void read_queries(int64_t head, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; i += BLOCK) {
      const int64_t some = min_of<int64_t>(BLOCK, count - i);
      const int32_t* rows = sample.rows + first + i;
      gather_block(head_of<T>(a.q, head), a.q.row, rows, some, a.head_dim, dim, queries + i * dim);
      transposed_rows(queries + i * dim, dim, queries_t + i, QUERIES);
      gather_block(head_of<T>(a.d_o, head), a.d_o.row, rows, some, a.head_dim, dim, grads + i * dim);
      transposed_rows(grads + i * dim, dim, grads_t + i, QUERIES);
      for (int64_t r = 0; r < BLOCK; r++) {
        limits[i + r] = INT32_MIN;  // rows that pad a block see nothing
        positions[i + r] = 0;
        lse[i + r] = delta[i + r] = 0;
        if (r >= some) continue;
        positions[i + r] = sample.positions[first + i + r];
        limits[i + r] = visible_below(a, sample.index, positions[i + r]);
        const float peak = a.lse[head * a.tokens + rows[r]];
        lse[i + r] = peak == MINUS_INF ? -MINUS_INF : peak;  // no visible key: all probabilities are 0
        delta[i + r] = dot(head_of<T>(a.d_o, head) + rows[r] * a.d_o.row, head_of<T>(a.o, head) + rows[r] * a.o.row);
      }
    }
  }

  float dot(const T* x, const T* y) {
    vf sum{};
    int64_t d = 0;
    for (; d + W <= a.head_dim; d += W) sum = fma(load(x + d), load(y + d), sum);
    const int rest = int(a.head_dim - d);
    if (rest) sum = fma(load_lanes(x + d, 0, rest), load_lanes(y + d, 0, rest), sum);
    return sum_of(sum);
  }

  // P and dS of BLOCK queries from `i` on and the keys from `key` on; adds dS to the bias gradient.
  template <class B>
  void gradients(int64_t head, int64_t g, int64_t i, int64_t key, int64_t width, int64_t panel) {
    const B* bias = bias_of<B>(a, head);
    float* dbias = a.dbias ? a.dbias + (g * a.heads + head) * a.bias_rows * a.bias_columns : nullptr;
    for (int64_t r = 0; r < BLOCK; r += 2)
      for (int64_t v = 0; v < width; v += W) {
        const int32_t* at = sample.positions + key + v;
        const Lanes& lanes = sample.lanes[(key + v) / W];
        vf p[2], ds[2];
        for (int64_t t = 0; t < 2; t++) {
          const int64_t q = i + r + t;
          const Mask seen = less(load_raw<vi>(at), limits[q]);
          const int64_t row = positions[q] * a.bias_columns;
          vf x = load(scores + (r + t) * KEYS + v);
          x = bias ? fma(x, set1(a.scale), read_bias(bias + row, lanes, at)) : x * a.scale;
          p[t] = select(seen, exp_of<precise>(x - lse[q]), vf{});
          ds[t] = select(seen, p[t] * (load(dp + (r + t) * KEYS + v) - delta[q]), vf{});
          if (dbias) add_to_bias(dbias + row, lanes, at, ds[t]);
        }
        store_pair(panel_at(p_panels, panel, i + r, v), (E*)nullptr, 0, p[0], p[1]);
        store_pair(panel_at(ds_panels, panel, i + r, v), ds_rows + r * KEYS + v, KEYS, ds[0], ds[1]);
      }
  }

  void write_keys(const Rows& to, int64_t kv_head, const float* transposed, int64_t first, int64_t count,
                  float factor) {
    for (int64_t j = 0; j < count; j += W) {
      for (int64_t d = 0; d < dim; d += W)
        transpose_words((const uint32_t*)(transposed + d * KEYS + j), KEYS, (uint32_t*)rows_out + d, dim);
      for (int64_t r = 0; r < min_of<int64_t>(W, count - j); r++)
        store_row((T*)to.data + sample.rows[first + j + r] * to.row + kv_head * to.head, rows_out + r * dim, a.head_dim,
                  factor);
    }
  }

  void write_dq(int64_t head, int64_t head_in_group) {
    const float* from = dq + head_in_group * padded_length(a) * dim;
    for (int64_t i = 0; i < sample.length; i++)
      store_row((T*)a.dq.data + sample.rows[i] * a.dq.row + head * a.dq.head, from + i * dim, a.head_dim, a.scale);
  }
};

template <class T, class E>
void backward_tasks_of(const Attention& a, int64_t first, int64_t end, char* memory) {
  Scratch scratch{memory};
  Backward<T, E> backward(a, scratch);
  Gemm<E>::open();
  for (int64_t t = first; t < end; t++) backward.task(t);
  Gemm<E>::close();
}

template <class T, class E>
size_t backward_scratch_of(const Attention& a) {
  Scratch scratch{nullptr};
  Backward<T, E> backward(a, scratch);
  return scratch.used;
}

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
