// The plan of one batch from the modality of every token: the same source for CUDA and the CPU.
//
// A block of kThreads threads plans kSamples samples, kLanes threads each; a thread walks one stretch of its sample.
// What the threads do between two barriers is one function of the thread's index, so a CPU that calls it for every
// index in turn runs the very code that the GPU runs. Two launches: `count` leaves every block's group sizes in a
// workspace, `fill` adds up those of the blocks before it and writes the tables. No atomics, so equal inputs give equal
// tables; nothing depends on the host, so a captured graph replays it.
//
// The specification is plan_in_torch in vlmo_kernels/plan.py.
#pragma once

#include <cstdint>

#include "vlmo_kernels/plan_tables.h"

#if defined(__CUDACC__)
#define VLMO_HOST_DEVICE __host__ __device__
#else
#define VLMO_HOST_DEVICE
#endif

namespace vlmo_kernels {
namespace device_plan {

constexpr int kSamples = 8;
constexpr int kLanes = 32;
constexpr int kThreads = kSamples * kLanes;
constexpr int kMaxModalities = 15;
constexpr int kKinds = kMaxModalities + 1;         // a modality, or padding
constexpr int kColumns = 2 * kMaxModalities + 1;   // groups, then padding
constexpr int kStripes = kThreads / kLanes;
static_assert(kColumns <= kLanes, "one lane sums one column");
static_assert(kSamples * kKinds <= kThreads, "one thread sums one kind of one sample");

// Modality ids [batch, length] and an optional mask of the same shape (not zero: a token), any strides.
template <typename Id>
struct Input {
  const Id* ids;
  const std::uint8_t* mask;
  std::int64_t ids_strides[2], mask_strides[2];
  std::int32_t batch, length, modalities;

  // 0 to modalities - 1, or `modalities` for padding.
  VLMO_HOST_DEVICE int kind(int sample, int position) const {
    if (mask && !mask[sample * mask_strides[0] + position * mask_strides[1]]) return modalities;
    const Id id = ids[sample * ids_strides[0] + position * ids_strides[1]];
    return id >= 0 && id < modalities ? static_cast<int>(id) : modalities;
  }
  VLMO_HOST_DEVICE int columns() const { return 2 * modalities + 1; }
  // At least one: somebody has to write the offsets of an empty batch.
  VLMO_HOST_DEVICE int blocks() const { return batch > 0 ? (batch + kSamples - 1) / kSamples : 1; }
};

// What the threads of a block share. A row of `seen` has one entry more than needed, against bank conflicts.
struct Shared {
  std::int32_t seen[kSamples][kLanes][kKinds + 1];  // tokens of a kind in a lane's stretch, later in those before it
  std::int32_t sizes[kSamples][kKinds];             // tokens of a kind in a sample
  std::int32_t first_row[kSamples][kKinds];
  std::int32_t first_in_order[kSamples];
  std::int32_t before[kStripes][kColumns], all[kStripes][kColumns];  // column sums; stripe 0 ends up with the total
};

template <typename Id>
struct Block {
  const Input<Id>& in;
  Shared& at;
  int block;

  VLMO_HOST_DEVICE bool mixed(int s) const {
    int present = 0;
    for (int m = 0; m < in.modalities; ++m) present += at.sizes[s][m] > 0;
    return present > 1;
  }

  // Column of the group of a kind. The first modality's groups are (alone, mixed), the others' (mixed, alone).
  VLMO_HOST_DEVICE int column(int s, int kind) const {
    if (kind == in.modalities) return 2 * in.modalities;
    return 2 * kind + (kind == 0 ? mixed(s) : !mixed(s));
  }

  VLMO_HOST_DEVICE int live(int s) const {
    int sum = 0;
    for (int m = 0; m < in.modalities; ++m) sum += at.sizes[s][m];
    return sum;
  }

  // ------------------------------------------------------------------ both launches

  VLMO_HOST_DEVICE void count_stretch(int thread) const {
    const int s = thread / kLanes, lane = thread % kLanes, sample = block * kSamples + s;
    std::int32_t* seen = at.seen[s][lane];
    for (int kind = 0; kind <= in.modalities; ++kind) seen[kind] = 0;
    if (sample >= in.batch) return;
    int begin, end;
    stretch(lane, &begin, &end);
    for (int p = begin; p < end; ++p) ++seen[in.kind(sample, p)];
  }

  VLMO_HOST_DEVICE void sum_lanes(int thread) const {
    const int s = thread / kKinds, kind = thread % kKinds;
    if (s >= kSamples || kind > in.modalities) return;
    int sum = 0;
    for (int lane = 0; lane < kLanes; ++lane) {
      const int own = at.seen[s][lane][kind];
      at.seen[s][lane][kind] = sum;
      sum += own;
    }
    at.sizes[s][kind] = sum;
  }

  // ------------------------------------------------------------------ first launch

  VLMO_HOST_DEVICE void store_sizes(int thread, std::int32_t* workspace) const {
    if (thread >= in.columns()) return;
    int sum = 0;
    for (int s = 0; s < kSamples; ++s) {
      const int kind = thread / 2;
      if (column(s, kind) == thread) sum += at.sizes[s][kind];
    }
    workspace[static_cast<std::int64_t>(block) * in.columns() + thread] = sum;
  }

  // ------------------------------------------------------------------ second launch

  VLMO_HOST_DEVICE void sum_stripe(int thread, const std::int32_t* workspace) const {
    const int stripe = thread / kLanes, c = thread % kLanes;
    if (c >= in.columns()) return;
    int before = 0, all = 0;
    for (int b = stripe; b < in.blocks(); b += kStripes) {
      const int size = workspace[static_cast<std::int64_t>(b) * in.columns() + c];
      all += size;
      if (b < block) before += size;
    }
    at.before[stripe][c] = before;
    at.all[stripe][c] = all;
  }

  VLMO_HOST_DEVICE void sum_stripes(int thread) const {
    if (thread >= in.columns()) return;
    for (int stripe = 1; stripe < kStripes; ++stripe) {
      at.before[0][thread] += at.before[stripe][thread];
      at.all[0][thread] += at.all[stripe][thread];
    }
  }

  VLMO_HOST_DEVICE void place_samples(int thread, const Tables& out) const {
    const int s = thread / kKinds, kind = thread % kKinds;
    if (block == 0 && thread < in.columns()) {
      out.group_offsets[thread] = first_of_column(thread);
      if (thread == 0) out.cu_seqlens[0] = 0;
    }
    if (s >= kSamples || kind > in.modalities) return;
    const int c = column(s, kind);
    int row = first_of_column(c) + at.before[0][c];
    for (int other = 0; other < s; ++other) {
      if (column(other, kind) == c) row += at.sizes[other][kind];
    }
    at.first_row[s][kind] = row;
    const int sample = block * kSamples + s;
    if (kind == 0) {
      int order = 0;
      for (int g = 0; g < 2 * in.modalities; ++g) order += at.before[0][g];
      for (int other = 0; other < s; ++other) order += live(other);
      at.first_in_order[s] = order;
      if (sample < in.batch) out.cu_seqlens[sample + 1] = order + live(s);
    }
  }

  VLMO_HOST_DEVICE void fill(int thread, const Tables& out) const {
    const int s = thread / kLanes, lane = thread % kLanes, sample = block * kSamples + s;
    if (sample >= in.batch) return;
    std::int32_t* seen = at.seen[s][lane];
    int order = at.first_in_order[s];
    for (int m = 0; m < in.modalities; ++m) order += seen[m];
    int begin, end;
    stretch(lane, &begin, &end);
    for (int p = begin; p < end; ++p) {
      const int kind = in.kind(sample, p);
      const bool token = kind < in.modalities;
      const int row = at.first_row[s][kind] + seen[kind]++;
      out.positions[row] = p;
      out.sample_of_row[row] = token ? sample : -1;
      out.row_of_token[sample * in.length + p] = token ? row : -1;
      out.rows[token ? order++ : row] = row;  // padding comes last in either order, and in the same order
    }
  }

 private:
  VLMO_HOST_DEVICE int first_of_column(int c) const {
    int sum = 0;
    for (int earlier = 0; earlier < c; ++earlier) sum += at.all[0][earlier];
    return sum;
  }

  VLMO_HOST_DEVICE void stretch(int lane, int* begin, int* end) const {
    const int size = in.length / kLanes + (in.length % kLanes > 0);
    *begin = lane * size < in.length ? lane * size : in.length;
    *end = in.length - *begin > size ? *begin + size : in.length;
  }
};

// ---------------------------------------------------------------------- one block on the CPU

template <typename Phase>
inline void every_thread(Phase phase) {
  for (int thread = 0; thread < kThreads; ++thread) phase(thread);
}

// workspace: [blocks, columns].
template <typename Id>
inline void count_on_cpu(const Input<Id>& in, int block, std::int32_t* workspace) {
  Shared shared;
  const Block<Id> b{in, shared, block};
  every_thread([&](int t) { b.count_stretch(t); });
  every_thread([&](int t) { b.sum_lanes(t); });
  every_thread([&](int t) { b.store_sizes(t, workspace); });
}

template <typename Id>
inline void fill_on_cpu(const Input<Id>& in, int block, const std::int32_t* workspace, const Tables& out) {
  Shared shared;
  const Block<Id> b{in, shared, block};
  every_thread([&](int t) { b.count_stretch(t); });
  every_thread([&](int t) { b.sum_lanes(t); });
  every_thread([&](int t) { b.sum_stripe(t, workspace); });
  every_thread([&](int t) { b.sum_stripes(t); });
  every_thread([&](int t) { b.place_samples(t, out); });
  every_thread([&](int t) { b.fill(t, out); });
}

}  // namespace device_plan
}  // namespace vlmo_kernels
