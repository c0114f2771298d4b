// The plan of one batch from lengths known on the host. The specification is the plain Python of tests/host/twin.py.
#pragma once

#include <algorithm>
#include <cstdint>
#include <limits>
#include <stdexcept>
#include <string>
#include <vector>

#include "vlmo_kernels/plan_tables.h"

namespace vlmo_kernels {

// Runs of all samples, one after the other: run r has length[r] tokens of modality[r].
struct Runs {
  const std::int64_t* modality;
  const std::int64_t* length;
  std::int64_t count;
  const std::int64_t* of_sample;  // [batch], number of runs of every sample
  std::int64_t batch;
};

class HostPlan {
 public:
  static constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max() - 1;
  static constexpr std::int64_t kMostModalities = 1 << 16;

  // starts: [modalities], position of a modality's first run in every sample, or -1: where the run before it ended.
  // Throws std::invalid_argument for whatever is no plan.
  HostPlan(const Runs& runs, const std::int64_t* starts, std::int64_t modalities) {
    require(modalities >= 1 && modalities <= kMostModalities, "the number of modalities must be 1 to 65536", modalities);
    require(runs.count >= 0 && runs.batch >= 0 && runs.batch <= kMost, "too many samples", runs.batch);
    for (std::int64_t m = 0; m < modalities; ++m) {
      require(starts[m] >= -1 && starts[m] <= kMost, "a start is out of range", starts[m]);
    }
    group_sizes_.assign(static_cast<std::size_t>(2 * modalities), 0);
    samples_.reserve(static_cast<std::size_t>(runs.batch));
    placed_.reserve(static_cast<std::size_t>(runs.count));
    std::vector<std::int64_t> seen_in(static_cast<std::size_t>(modalities), -1);
    std::int64_t run = 0;
    for (std::int64_t b = 0; b < runs.batch; ++b) {
      const std::int64_t own = runs.of_sample[b];
      require(own >= 0 && own <= runs.count - run, "the numbers of runs must add up to the runs", own);
      const std::size_t first = placed_.size();
      std::int64_t cursor = 0;
      for (const std::int64_t end = run + own; run < end; ++run) {
        const std::int64_t m = runs.modality[run], n = runs.length[run];
        require(m >= 0 && m < modalities, "a modality is out of range", m);
        require(n >= 0, "a length is negative", n);
        require(n <= kMost, "a length is too large", n);
        if (seen_in[static_cast<std::size_t>(m)] != b) {
          seen_in[static_cast<std::size_t>(m)] = b;
          if (starts[m] >= 0) cursor = starts[m];
        }
        if (n > 0) placed_.push_back({static_cast<std::int32_t>(m), cursor, cursor + n});
        cursor += n;
        require(cursor <= kMost, "a sample is too long", cursor);
      }
      finish_sample(first);
    }
    require(run == runs.count, "the numbers of runs must add up to the runs", runs.count - run);
    require(length_ == 0 || runs.batch <= kMost / length_, "B * N is 2^31 - 1 or more, with N", length_);
  }

  std::int64_t batch() const { return static_cast<std::int64_t>(samples_.size()); }
  std::int64_t length() const { return length_; }
  std::int64_t tokens() const { return tokens_; }
  std::int64_t groups() const { return static_cast<std::int64_t>(group_sizes_.size()); }

  void fill(const Tables& out) const {
    std::vector<std::int32_t> next(group_sizes_.size());  // row of every group
    std::int32_t offset = 0;
    for (std::size_t g = 0; g < next.size(); ++g) {
      out.group_offsets[g] = next[g] = offset;
      offset += static_cast<std::int32_t>(group_sizes_[g]);
    }
    out.group_offsets[next.size()] = offset;
    out.cu_seqlens[0] = 0;
    std::int32_t order = 0;  // sample-major position
    std::int32_t* row_of_token = out.row_of_token;
    std::size_t r = 0;
    for (std::size_t b = 0; b < samples_.size(); ++b, row_of_token += length_) {
      std::int64_t filled = 0;
      for (; r < samples_[b].end; ++r) {
        const Placed& run = placed_[r];
        const auto n = static_cast<std::int32_t>(run.end - run.start);
        std::int32_t& row = next[group(run.modality, samples_[b].mixed)];
        std::fill(row_of_token + filled, row_of_token + run.start, -1);
        count_up(row_of_token + run.start, n, row);
        count_up(out.rows + order, n, row);
        count_up(out.positions + row, n, static_cast<std::int32_t>(run.start));
        std::fill_n(out.sample_of_row + row, n, static_cast<std::int32_t>(b));
        filled = run.end;
        order += n;
        row += n;
      }
      std::fill(row_of_token + filled, row_of_token + length_, -1);
      out.cu_seqlens[b + 1] = order;
    }
  }

 private:
  struct Placed {
    std::int32_t modality;
    std::int64_t start, end;
  };
  struct Sample {
    std::size_t end;  // of its runs in placed_
    bool mixed;
  };

  static void require(bool holds, const char* what, std::int64_t given) {
    if (!holds) throw std::invalid_argument(std::string("host_planner: ") + what + ", got " + std::to_string(given));
  }

  // The first modality's groups are (alone, mixed), all others' (mixed, alone).
  static std::size_t group(std::int32_t modality, bool mixed) {
    return 2 * static_cast<std::size_t>(modality) + ((modality == 0) == mixed);
  }

  static void count_up(std::int32_t* out, std::int32_t n, std::int32_t first) {
    for (std::int32_t i = 0; i < n; ++i) out[i] = first + i;
  }

  void finish_sample(std::size_t first) {
    const auto begin = placed_.begin() + static_cast<std::ptrdiff_t>(first);
    const auto earlier = [](const Placed& a, const Placed& b) { return a.start < b.start; };
    if (!std::is_sorted(begin, placed_.end(), earlier)) std::sort(begin, placed_.end(), earlier);
    bool mixed = false;
    for (auto run = begin; run != placed_.end(); ++run) {
      require(run == begin || run[-1].end <= run->start, "positions collide at", run->start);
      mixed |= run->modality != begin->modality;
    }
    for (auto run = begin; run != placed_.end(); ++run) {
      group_sizes_[group(run->modality, mixed)] += run->end - run->start;
      tokens_ += run->end - run->start;
    }
    if (begin != placed_.end()) length_ = std::max(length_, placed_.back().end);
    require(tokens_ <= kMost, "there are too many tokens", tokens_);
    samples_.push_back({placed_.size(), mixed});
  }

  std::vector<Placed> placed_;
  std::vector<Sample> samples_;
  std::vector<std::int64_t> group_sizes_;
  std::int64_t length_ = 0, tokens_ = 0;
};

}  // namespace vlmo_kernels
