// What the forward and the backward share: one sample's keys, its bias and masks, and scratch memory.
#pragma once

#include "attention.h"
#include "pack.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

constexpr int64_t KEYS = 256;  // keys whose scores are held at once; a multiple of BLOCK
constexpr float MINUS_INF = -__builtin_inff();

// Cuts scratch memory into 64-byte aligned pieces. With a null start it only counts.
struct Scratch {
  char* at;
  size_t used = 0;

  template <class T>
  T* take(int64_t count) {
    char* p = at ? at + used : nullptr;
    used += round_up(count * sizeof(T), 64);
    return (T*)p;
  }
};

// Where the positions of W neighbouring keys lie. Lanes before `split` are consecutive from `first` on, lanes up
// to `end` are consecutive so that lane i is at `second + i`; `scattered` if that does not describe them.
struct Lanes {
  int32_t first, second;
  uint8_t split, end;
  bool scattered;
};

struct Sample {
  int64_t index, length;
  const int32_t* rows;  // [length], packed rows of its tokens
  int32_t* positions;   // [length padded], INT32_MAX past the end
  Lanes* lanes;         // [length padded / W]
};

static inline int64_t padded_length(const Attention& a) { return round_up(a.longest, BLOCK); }
static inline int64_t padded_dim(const Attention& a) { return round_up(a.head_dim, BLOCK); }

static inline Sample make_sample(const Attention& a, Scratch& scratch) {
  Sample s{};
  s.index = -1;
  s.positions = scratch.take<int32_t>(padded_length(a));
  s.lanes = scratch.take<Lanes>(padded_length(a) / W);
  return s;
}

static inline void read_sample(const Attention& a, int64_t b, Sample& s) {
  if (s.index == b) return;
  s.index = b;
  s.length = a.cu_seqlens[b + 1] - a.cu_seqlens[b];
  s.rows = a.rows + a.cu_seqlens[b];
  const int64_t padded = round_up(s.length, BLOCK);
  for (int64_t j = 0; j < padded; j++) s.positions[j] = j < s.length ? a.positions[s.rows[j]] : INT32_MAX;
  for (int64_t j = 0; j < padded; j += W) {
    const int32_t* p = s.positions + j;
    const int end = int(max_of<int64_t>(0, min_of<int64_t>(W, s.length - j)));
    int split = 1, last = 1;
    while (split < end && p[split] == p[0] + split) split++;
    split = min_of(split, end);
    if (split < end) {
      last = split + 1;
      while (last < end && p[last] == p[split] + last - split) last++;
    }
    s.lanes[j / W] = {p[0], split < end ? p[split] - split : 0, uint8_t(split), uint8_t(end),
                      split < end && last < end};
  }
}

struct NoBias {};

// W values of a bias row at the keys' positions; 0 past the end.
template <class B>
static inline vf read_bias(const B* row, const Lanes& at, const int32_t* positions) {
  if (at.split == W) return load(row + at.first);
  if (!at.scattered) {
    const vf low = load_lanes(row + at.first, 0, at.split);
    return at.split == at.end ? low : low + load_lanes(row + at.second, at.split, at.end);
  }
  float lanes[W] = {};
  for (int i = 0; i < at.end; i++) lanes[i] = to_float(row[positions[i]]);
  return load(lanes);
}
template <>
inline vf read_bias<NoBias>(const NoBias*, const Lanes&, const int32_t*) {
  return vf{};
}

// Adds W values to a row of the bias gradient at the keys' positions.
static inline void add_to_bias(float* row, const Lanes& at, const int32_t* positions, vf value) {
  if (at.split == W) {
    store(row + at.first, load(row + at.first) + value);
  } else if (!at.scattered) {
    float* low = row + at.first;
    store_lanes(low, load_lanes(low, 0, at.split) + value, 0, at.split);
    float* high = row + at.second;
    if (at.split < at.end) store_lanes(high, load_lanes(high, at.split, at.end) + value, at.split, at.end);
  } else {
    float lanes[W];
    store(lanes, value);
    for (int i = 0; i < at.end; i++) row[positions[i]] += lanes[i];
  }
}

// Keys at positions below this are visible to a query at `position`; there is no key at INT32_MAX.
static inline int32_t visible_below(const Attention& a, int64_t b, int32_t position) {
  if (!a.causal) return INT32_MAX;
  const int32_t own = position + 1;
  return a.prefix ? max_of(own, a.prefix[b]) : own;
}

// Keys from here on are hidden from all queries that see keys below `limit`.
static inline int64_t keys_below(const Sample& s, int32_t limit) {
  int64_t n = s.length;
  while (n > 0 && s.positions[n - 1] >= limit) n--;
  return n;
}

template <class T>
static inline const T* head_of(const Rows& t, int64_t head) {
  return (const T*)t.data + head * t.head;
}

// The bias of one head, or null.
template <class B>
static inline const B* bias_of(const Attention& a, int64_t head) {
  return (const B*)a.bias + head * a.bias_rows * a.bias_columns;
}
template <>
inline const NoBias* bias_of<NoBias>(const Attention&, int64_t) {
  return nullptr;
}

// A row in the format of memory, times a factor.
template <class T>
static inline void store_row(T* to, const float* from, int64_t n, float factor) {
  int64_t i = 0;
  for (; i + W <= n; i += W) store(to + i, load(from + i) * factor);
  if (i < n) store_lanes(to + i, load(from + i) * factor, 0, int(n - i));
}

}  // namespace VLMO_LEVEL
}  // namespace vlmo_kernels
