// Flash attention (Dao et al. 2022) of every sample, reading rows through the row table.
#pragma once

#include "attention_scores.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

// T: format of memory. E: format of the products' operands.
template <class T, class E>
struct Forward {
  using G = Gemm<E>;
  static constexpr bool precise = sizeof(T) == 4;

  const Attention& a;
  int64_t dim;  // padded head dim
  Sample sample;
  E *block, *keys, *values;    // [BLOCK, dim]; panels of K^T; panels of V
  E *queries, *probabilities;  // [BLOCK, dim], [BLOCK, KEYS]
  float *scores, *out;         // [BLOCK, KEYS], [BLOCK, dim]
  int32_t limits[BLOCK];       // keys below this position are visible to the query
  float best[BLOCK], total[BLOCK];

  Forward(const Attention& attention, Scratch& scratch) : a(attention), dim(padded_dim(attention)) {
    sample = make_sample(a, scratch);
    block = scratch.take<E>(BLOCK * dim);
    keys = scratch.take<E>(padded_length(a) * dim);
    values = scratch.take<E>(padded_length(a) * dim);
    queries = scratch.take<E>(BLOCK * dim);
    probabilities = scratch.take<E>(BLOCK * KEYS);
    scores = scratch.take<float>(BLOCK * KEYS);
    out = scratch.take<float>(BLOCK * dim);
  }

  // Tasks of one key head are neighbours, so that its bias stays in the cache from sample to sample.
  void task(int64_t index) {
    const int64_t chunks = query_chunks(a), group = a.heads / a.kv_heads;
    const int64_t chunk = index % chunks, b = index / chunks % a.batch, kv_head = index / chunks / a.batch;
    read_sample(a, b, sample);
    const int64_t step = round_up((sample.length + chunks - 1) / chunks, BLOCK);
    const int64_t first = chunk * step, end = min_of(sample.length, first + step);
    if (first >= end) return;
    pack(kv_head);
    for (int64_t head = kv_head * group; head < (kv_head + 1) * group; head++)
      for (int64_t i = first; i < end; i += BLOCK) query_block(head, i, min_of<int64_t>(BLOCK, end - i));
  }

  void pack(int64_t kv_head) {
    const int64_t padded = round_up(sample.length, BLOCK);
    for (int64_t j = 0; j < sample.length; j += BLOCK) {
      const int64_t count = min_of<int64_t>(BLOCK, sample.length - j);
      gather_block(head_of<T>(a.k, kv_head), a.k.row, sample.rows + j, count, a.head_dim, dim, block);
      transposed_panels(block, dim, keys + j * dim, G::width * dim);
      gather_block(head_of<T>(a.v, kv_head), a.v.row, sample.rows + j, count, a.head_dim, dim, block);
      panels(block, dim, j, values, G::width * padded);
    }
  }

  void query_block(int64_t head, int64_t first, int64_t count) {
    const int32_t* rows = sample.rows + first;
    const int64_t steps = round_up(count, G::row_step), padded = round_up(sample.length, BLOCK);
    gather_block(head_of<T>(a.q, head), a.q.row, rows, count, a.head_dim, dim, queries);
    int32_t limit = 0;
    for (int64_t i = 0; i < count; i++) {
      limits[i] = visible_below(a, sample.index, sample.positions[first + i]);
      limit = max_of(limit, limits[i]);
      best[i] = MINUS_INF;
      total[i] = 0;
    }
    const int64_t seen = keys_below(sample, limit);
    for (int64_t j = 0; j < seen || j == 0; j += KEYS) {
      const int64_t width = round_up(min_of(KEYS, seen - j), BLOCK);
      G::run(steps, width, dim, queries, dim, keys + j * dim, G::width * dim, scores, KEYS, false);
      if (!a.bias)
        softmax<NoBias>(head, first, count, j, width);
      else if (a.bias_format == FP32)
        softmax<float>(head, first, count, j, width);
      else
        softmax<T>(head, first, count, j, width);
      G::run(steps, dim, width, probabilities, KEYS, values + j * G::width, G::width * padded, out, dim, j > 0);
    }
    for (int64_t i = 0; i < count; i++) {
      const bool blind = best[i] == MINUS_INF && total[i] == 0;  // no visible key: 0 by definition
      if (blind) __builtin_memset(out + i * dim, 0, dim * sizeof(float));
      store_row((T*)a.o.data + rows[i] * a.o.row + head * a.o.head, out + i * dim, a.head_dim,
                blind ? 0.0f : 1.0f / total[i]);
      a.lse[head * a.tokens + rows[i]] = blind ? MINUS_INF : best[i] + __builtin_logf(total[i]);
    }
  }

  // Scores of keys j to j + width to probabilities, relative to the largest score so far.
  template <class B>
  void softmax(int64_t head, int64_t first, int64_t count, int64_t j, int64_t width) {
    const B* bias = bias_of<B>(a, head);
    for (int64_t i = 0; i < count; i++) {
      float* s = scores + i * KEYS;
      const B* bias_row = bias ? bias + sample.positions[first + i] * a.bias_columns : nullptr;
      vf most = set1(MINUS_INF);
      for (int64_t v = 0; v < width; v += W) {
        const int32_t* positions = sample.positions + j + v;
        vf x = load(s + v);
        x = bias_row ? fma(x, set1(a.scale), read_bias(bias_row, sample.lanes[(j + v) / W], positions)) : x * a.scale;
        x = select(less(load_raw<vi>(positions), limits[i]), x, set1(MINUS_INF));
        store(s + v, x);
        most = vmax(x, most);
      }
      const float before = best[i];
      best[i] = max_of(before, max_of(most));
      const float base = best[i] == MINUS_INF ? 0 : best[i];
      vf sum{};
      E* p = probabilities + i * KEYS;
      for (int64_t v = 0; v < width; v += W) {
        const vf e = exp_of<precise>(load(s + v) - base);
        sum = sum + e;
        store(p + v, e);
      }
      if (j > 0) {
        const float shrink = before == MINUS_INF ? 0 : __builtin_expf(before - base);
        total[i] *= shrink;
        for (int64_t d = 0; d < dim; d += W) store(out + i * dim + d, load(out + i * dim + d) * shrink);
      }
      total[i] += sum_of(sum);
    }
  }
};

template <class T, class E>
void forward_tasks_of(const Attention& a, int64_t first, int64_t end, char* memory) {
  Scratch scratch{memory};
  Forward<T, E> forward(a, scratch);
  Gemm<E>::open();
  for (int64_t t = first; t < end; t++) forward.task(t);
  Gemm<E>::close();
}

template <class T, class E>
size_t forward_scratch_of(const Attention& a) {
  Scratch scratch{nullptr};
  Forward<T, E> forward(a, scratch);
  return scratch.used;
}

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
