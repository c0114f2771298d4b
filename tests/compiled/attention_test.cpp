// The attention kernels of one instruction set on buffers without a byte to spare, to run under sanitizers. Results
// are compared with a plain loop in double.
#include "vlmo_kernels/attention_level.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

#include "vlmo_kernels/cpu_isa.h"

using namespace vlmo_kernels;
namespace level = vlmo_kernels::VLMO_LEVEL;

static const AttentionKernels& kernels = VLMO_JOIN(attention_kernels_, VLMO_LEVEL);
static std::mt19937 generator(7);

struct Shape {
  std::vector<int> lengths;
  int64_t heads, kv_heads, dim;
  bool bias, causal;
};

template <class T>
std::vector<T> draw(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& v : values) v = level::from_float<T>(normal(generator));
  return values;
}

template <class T>
void run(const Shape& s, Format format, double tolerance) {
  std::vector<int32_t> cu{0}, rows, positions;
  for (int n : s.lengths) cu.push_back(cu.back() + n);
  const int64_t tokens = cu.back();
  int longest = 0;
  for (size_t b = 0; b < s.lengths.size(); ++b) {
    for (int i = 0; i < s.lengths[b]; ++i) {
      rows.push_back(static_cast<int32_t>(tokens) - 1 - cu[b] - i);
    }
    longest = std::max(longest, s.lengths[b]);
  }
  positions.resize(tokens);
  for (size_t b = 0; b < s.lengths.size(); ++b) {  // a gap after the third token
    for (int i = 0; i < s.lengths[b]; ++i) positions[rows[cu[b] + i]] = i < 3 ? i : i + 2;
  }
  const int64_t n = longest + 2, h = s.heads, k = s.kv_heads, d = s.dim;
  auto q = draw<T>(tokens * h * d), key = draw<T>(tokens * k * d), value = draw<T>(tokens * k * d);
  auto grad = draw<T>(tokens * h * d), out = draw<T>(tokens * h * d);
  auto dq = draw<T>(tokens * h * d), dk = draw<T>(tokens * k * d), dv = draw<T>(tokens * k * d);
  auto bias = draw<float>(h * n * n);
  std::vector<float> lse(h * tokens);
  Attention a{};
  a.format = format;
  a.batch = static_cast<int64_t>(s.lengths.size());
  a.tokens = tokens;
  a.heads = h;
  a.kv_heads = k;
  a.head_dim = d;
  a.longest = longest;
  a.q = {q.data(), h * d, d};
  a.k = {key.data(), k * d, d};
  a.v = {value.data(), k * d, d};
  a.o = {out.data(), h * d, d};
  a.d_o = {grad.data(), h * d, d};
  a.dq = {dq.data(), h * d, d};
  a.dk = {dk.data(), k * d, d};
  a.dv = {dv.data(), k * d, d};
  a.lse = lse.data();
  a.cu_seqlens = cu.data();
  a.rows = rows.data();
  a.positions = positions.data();
  a.bias = s.bias ? bias.data() : nullptr;
  a.bias_format = FP32;
  a.bias_rows = a.bias_columns = n;
  a.causal = s.causal;
  a.scale = 0.3f;
  a.dbias_groups = dbias_groups(a.batch, k);
  std::vector<float> dbias(s.bias ? a.dbias_groups * h * n * n : 0);
  a.dbias = s.bias ? dbias.data() : nullptr;

  const auto all = [&](auto kernel, size_t bytes, int64_t tasks) {
    const size_t size = (bytes + 63) / 64 * 64;
    std::unique_ptr<char, decltype(&std::free)> scratch(static_cast<char*>(std::aligned_alloc(64, size)), &std::free);
    for (int64_t t = 0; t < tasks; ++t) kernel(a, t, t + 1, scratch.get());
  };
  all(kernels.forward, kernels.forward_scratch(a), forward_tasks(a));
  all(kernels.backward, kernels.backward_scratch(a), backward_tasks(a));

  double worst = 0;
  for (size_t b = 0; b < s.lengths.size(); ++b) {
    for (int64_t head = 0; head < h; ++head) {
      for (int i = cu[b]; i < cu[b + 1]; ++i) {
        const int64_t row = rows[i], kv = head / (h / k);
        std::vector<double> p(s.lengths[b]);
        double total = 0;
        for (int j = cu[b]; j < cu[b + 1]; ++j) {
          double x = 0;
          for (int64_t e = 0; e < d; ++e) {
            x += double(level::to_float(q[(row * h + head) * d + e])) *
                 level::to_float(key[(rows[j] * k + kv) * d + e]);
          }
          x = x * 0.3f + (s.bias ? bias[(head * n + positions[row]) * n + positions[rows[j]]] : 0.0f);
          p[j - cu[b]] = s.causal && positions[rows[j]] > positions[row] ? 0 : std::exp(x);
          total += p[j - cu[b]];
        }
        for (int64_t e = 0; e < d; ++e) {
          double x = 0;
          for (int j = cu[b]; j < cu[b + 1]; ++j) {
            x += p[j - cu[b]] / total * level::to_float(value[(rows[j] * k + kv) * d + e]);
          }
          worst = std::max(worst, std::fabs(x - level::to_float(out[(row * h + head) * d + e])));
        }
      }
    }
  }
  if (!(worst < tolerance)) {
    std::printf("format %d, head dim %d: off by %g\n", int(format), int(d), worst);
    std::exit(1);
  }
}

int main() {
#if defined(__AMX_TILE__)
  if (isa() != Isa::amx) return 1;  // asks the system for the tiles
#endif
  const Shape shapes[] = {
      {{1}, 1, 1, 1, true, false},           {{0, 15, 16, 17, 0}, 2, 1, 34, true, false},
      {{33, 5}, 4, 2, 40, false, true},      {{237}, 1, 1, 64, true, false},
      {{300, 2}, 2, 1, 20, true, true},      {{4, 3, 2}, 3, 3, 256, true, false},
  };
  for (const Shape& s : shapes) {
    run<float>(s, FP32, 1e-5);
    run<level::bf16>(s, BF16, 4e-2);
    run<level::fp16>(s, FP16, 4e-3);
  }
  std::puts("ok");
}
