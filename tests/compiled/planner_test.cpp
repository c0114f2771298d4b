// The planners' C++ under the sanitizers: random batches against plain loops, malformed ones, and the threads of a block
// in random order between barriers, which the order of a GPU's threads must not matter for. Prints "ok" at the end.
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <numeric>
#include <random>
#include <set>
#include <stdexcept>
#include <vector>

#include "vlmo_kernels/device_plan.h"
#include "vlmo_kernels/host_plan.h"

using namespace vlmo_kernels;

namespace {

std::mt19937_64 rng(0);

std::int64_t below(std::int64_t n) { return static_cast<std::int64_t>(rng() % static_cast<std::uint64_t>(n)); }

void check(bool holds, const char* what) {
  if (!holds) {
    std::printf("wrong: %s\n", what);
    std::exit(1);
  }
}

// Exact sizes on the heap, so that the sanitizer sees one entry too many.
struct Owned {
  std::unique_ptr<std::int32_t[]> data[6];
  std::int64_t size[6];
  Owned(std::int64_t batch, std::int64_t rows, std::int64_t groups, std::int64_t tokens)
      : size{batch + 1, rows, rows, rows, groups + 1, tokens} {
    for (int i = 0; i < 6; ++i) {
      data[i].reset(new std::int32_t[static_cast<std::size_t>(size[i])]);
      std::fill_n(data[i].get(), size[i], -77);
    }
  }
  Tables tables() const {
    return {data[0].get(), data[1].get(), data[2].get(), data[3].get(), data[4].get(), data[5].get()};
  }
};

// Every table of the batch ids[b][p] (-1 is padding), token by token; rows past the live ones where `padding`.
void check_tables(const Owned& found, const std::vector<std::vector<int>>& ids, int modalities, bool padding) {
  struct Token {
    int sample, position;
  };
  std::vector<std::vector<Token>> groups(static_cast<std::size_t>(2 * modalities + 1));
  const int length = ids.empty() ? 0 : static_cast<int>(ids[0].size());
  std::vector<int> live(ids.size(), 0);
  for (std::size_t b = 0; b < ids.size(); ++b) {
    std::set<int> present(ids[b].begin(), ids[b].end());
    present.erase(-1);
    for (int p = 0; p < length; ++p) {
      const int m = ids[b][static_cast<std::size_t>(p)];
      const int group = m < 0 ? 2 * modalities : 2 * m + ((m == 0) == (present.size() > 1) ? 1 : 0);
      groups[static_cast<std::size_t>(group)].push_back({static_cast<int>(b), p});
      live[b] += m >= 0;
    }
  }
  const Tables t = found.tables();
  std::vector<int> row_of(static_cast<std::size_t>(length) * ids.size(), -1);
  int row = 0;
  for (std::size_t g = 0; g < groups.size(); ++g) {
    const bool dead = g + 1 == groups.size();
    check(t.group_offsets[g] == row, "group_offsets");
    if (dead && !padding) break;
    for (const Token token : groups[g]) {
      check(t.positions[row] == token.position, "positions");
      check(t.sample_of_row[row] == (dead ? -1 : token.sample), "sample_of_row");
      if (dead) check(t.rows[row] == row, "rows of padding");
      if (!dead) row_of[static_cast<std::size_t>(token.sample * length + token.position)] = row;
      ++row;
    }
  }
  int order = 0;
  check(t.cu_seqlens[0] == 0, "cu_seqlens");
  for (std::size_t b = 0; b < ids.size(); ++b) {
    for (int p = 0; p < length; ++p) {
      const auto token = b * static_cast<std::size_t>(length) + static_cast<std::size_t>(p);
      check(t.row_of_token[token] == row_of[token], "row_of_token");
      if (row_of[token] >= 0) check(t.rows[order++] == row_of[token], "rows");
    }
    check(t.cu_seqlens[b + 1] == order, "cu_seqlens");
  }
}

// ---------------------------------------------------------------------- host

void host_batch() {
  const int modalities = 1 + static_cast<int>(below(4));
  std::vector<std::int64_t> modality, length, of_sample, starts(static_cast<std::size_t>(modalities), -1);
  std::vector<std::vector<int>> ids;
  for (std::int64_t b = below(7); b > 0; --b) {
    ids.emplace_back();
    of_sample.push_back(below(5));
    for (std::int64_t r = of_sample.back(); r > 0; --r) {
      modality.push_back(below(modalities));
      length.push_back(below(9));
      ids.back().insert(ids.back().end(), static_cast<std::size_t>(length.back()), static_cast<int>(modality.back()));
    }
  }
  std::size_t longest = 0;
  for (const auto& sample : ids) longest = std::max(longest, sample.size());
  for (auto& sample : ids) sample.resize(longest, -1);
  const Runs runs{modality.data(), length.data(), static_cast<std::int64_t>(length.size()), of_sample.data(),
                  static_cast<std::int64_t>(of_sample.size())};
  const HostPlan plan(runs, starts.data(), modalities);
  check(plan.length() == static_cast<std::int64_t>(longest), "length");
  const Owned out(plan.batch(), plan.tokens(), plan.groups(), plan.batch() * plan.length());
  plan.fill(out.tables());
  check_tables(out, ids, modalities, false);
}

std::int64_t wild() {
  constexpr std::int64_t values[] = {-1, INT64_MIN, INT64_MAX, INT64_MAX / 2, std::int64_t{1} << 31,
                                     (std::int64_t{1} << 31) - 1, std::int64_t{1} << 32, -5, 7, 0};
  return below(4) ? below(4) : values[below(10)];
}

int malformed_batch() {
  std::vector<std::int64_t> numbers[4];
  const std::int64_t count = below(6);
  for (std::int64_t i = 0; i < count; ++i) numbers[0].push_back(wild()), numbers[1].push_back(wild());
  for (std::int64_t i = below(5); i > 0; --i) numbers[2].push_back(wild());
  for (std::int64_t i = below(4); i > 0; --i) numbers[3].push_back(below(2) ? -1 : wild());
  const Runs runs{numbers[0].data(), numbers[1].data(), count, numbers[2].data(),
                  static_cast<std::int64_t>(numbers[2].size())};
  try {
    const HostPlan plan(runs, numbers[3].data(), static_cast<std::int64_t>(numbers[3].size()));
    if (plan.tokens() > 1000 || plan.batch() * plan.length() > 100000) return 0;
    const Owned out(plan.batch(), plan.tokens(), plan.groups(), plan.batch() * plan.length());
    plan.fill(out.tables());
    return 0;
  } catch (const std::invalid_argument&) {
    return 1;
  }
}

// ---------------------------------------------------------------------- device

template <typename Phase>
void shuffled(Phase phase) {
  int order[device_plan::kThreads];
  std::iota(order, order + device_plan::kThreads, 0);
  std::shuffle(order, order + device_plan::kThreads, rng);
  for (const int thread : order) phase(thread);
}

template <typename Id>
void device_batch() {
  const int modalities = 1 + static_cast<int>(below(below(4) ? 3 : 15));
  const int batch = static_cast<int>(below(40)), length = static_cast<int>(below(below(4) ? 50 : 300));
  std::vector<Id> ids(static_cast<std::size_t>(batch * length));
  std::vector<std::uint8_t> mask(ids.size());
  std::vector<std::vector<int>> plain(static_cast<std::size_t>(batch), std::vector<int>(static_cast<std::size_t>(length)));
  const bool masked = below(2);
  for (int b = 0; b < batch; ++b) {
    for (int p = 0; p < length; ++p) {
      const auto at = static_cast<std::size_t>(p * batch + b);  // transposed: strides are read
      const std::int64_t id = below(modalities + 3) - 1;
      ids[at] = static_cast<Id>(id);
      mask[at] = static_cast<std::uint8_t>(below(3) > 0);
      const bool token = id >= 0 && id < modalities && (!masked || mask[at]);
      plain[static_cast<std::size_t>(b)][static_cast<std::size_t>(p)] = token ? static_cast<int>(id) : -1;
    }
  }
  const device_plan::Input<Id> in{
      ids.data(), masked ? mask.data() : nullptr, {1, batch}, {1, batch}, batch, length, modalities};
  const auto cells = static_cast<std::size_t>(in.blocks() * in.columns());
  const std::unique_ptr<std::int32_t[]> workspace(new std::int32_t[cells]);
  const Owned out(batch, batch * length, 2 * modalities, batch * length);
  const Tables tables = out.tables();
  std::vector<int> blocks(static_cast<std::size_t>(in.blocks()));
  std::iota(blocks.begin(), blocks.end(), 0);
  std::shuffle(blocks.begin(), blocks.end(), rng);
  for (const int block : blocks) {
    const std::unique_ptr<device_plan::Shared> shared(new device_plan::Shared);
    const device_plan::Block<Id> b{in, *shared, block};
    shuffled([&](int t) { b.count_stretch(t); });
    shuffled([&](int t) { b.sum_lanes(t); });
    shuffled([&](int t) { b.store_sizes(t, workspace.get()); });
  }
  for (const int block : blocks) {
    const std::unique_ptr<device_plan::Shared> shared(new device_plan::Shared);
    const device_plan::Block<Id> b{in, *shared, block};
    shuffled([&](int t) { b.count_stretch(t); });
    shuffled([&](int t) {  // one stretch of code between two barriers in plan.cu
      b.sum_lanes(t);
      b.sum_stripe(t, workspace.get());
    });
    shuffled([&](int t) { b.sum_stripes(t); });
    shuffled([&](int t) { b.place_samples(t, tables); });
    shuffled([&](int t) { b.fill(t, tables); });
  }
  check_tables(out, plain, modalities, true);

  const Owned again(batch, batch * length, 2 * modalities, batch * length);
  for (const int block : blocks) device_plan::count_on_cpu(in, block, workspace.get());
  for (const int block : blocks) device_plan::fill_on_cpu(in, block, workspace.get(), again.tables());
  check_tables(again, plain, modalities, true);
}

}  // namespace

int main(int argc, char** argv) {
  const int cases = argc > 1 ? std::atoi(argv[1]) : 1000;
  int refused = 0;
  for (int i = 0; i < cases; ++i) host_batch();
  for (int i = 0; i < 20 * cases; ++i) refused += malformed_batch();
  check(refused > 10 * cases && refused < 20 * cases, "malformed batches are refused, others are not");
  for (int i = 0; i < cases / 10; ++i) i % 2 ? device_batch<std::int64_t>() : device_batch<std::int32_t>();
  std::printf("ok\n");
}
