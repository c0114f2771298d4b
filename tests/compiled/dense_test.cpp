// The dense kernels of one instruction set on buffers without a byte to spare, to run under sanitizers. Results are
// compared with plain loops in double.
#include "vlmo_kernels/dense_level.h"

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

using namespace vlmo_kernels;
namespace level = vlmo_kernels::VLMO_LEVEL;

static const DenseKernels& kernels = VLMO_JOIN(dense_kernels_, VLMO_LEVEL);
static std::mt19937 generator(7);

template <class T>
std::vector<T> draw(int64_t n) {
  std::normal_distribution<float> normal;
  std::vector<T> values(n);
  for (T& v : values) v = level::from_float<T>(normal(generator));
  return values;
}

// With `row` elements from row to row the last row has no more than it needs.
template <class T>
struct Buffer {
  int64_t row;
  std::vector<T> values;
  Buffer(int64_t rows, int64_t columns, int64_t gap)
      : row(columns + gap), values(draw<T>((rows - 1) * row + columns)) {}
  double at(int64_t r, int64_t c) const { return level::to_float(values[r * row + c]); }
  Matrix matrix(Format format) { return {format, values.data(), row}; }
};

static void check(double difference, double tolerance, const char* what, Format format, int64_t n, int64_t k) {
  if (difference < tolerance) return;
  std::printf("%s, format %d, n %d, k %d: off by %g\n", what, int(format), int(n), int(k), difference);
  std::exit(1);
}

template <class Run>
void all(int64_t tasks, size_t bytes, Run run) {
  std::unique_ptr<char, decltype(&std::free)> scratch(
      static_cast<char*>(std::aligned_alloc(64, (bytes + 63) / 64 * 64)), &std::free);
  for (int64_t t = 0; t < tasks; ++t) run(t, scratch.get());
}

std::vector<char> packed(const Matrix& w, bool swapped, int64_t n, int64_t k) {
  const bool narrow = w.format == BF16 && kernels.bf16;
  std::vector<char> panels(packed_size(n) * packed_size(k) * (narrow ? 2 : 4));
  const Panels to{w.format, n, k, panels.data()};
  all(packed_size(swapped ? k : n) / 32, 0, [&](int64_t task, char*) { kernels.pack(w, swapped, to, task); });
  return panels;
}

double gelu(double z) { return z * 0.5 * std::erfc(-z / std::sqrt(2.0)); }
double gelu_slope(double z) {
  return 0.5 * std::erfc(-z / std::sqrt(2.0)) + z * std::exp(-z * z / 2) / std::sqrt(2 * 3.14159265358979323846);
}

template <class T>
void run(int64_t rows, int64_t n, int64_t k, Tile tile, int64_t piece, Format format, double tolerance) {
  Buffer<T> x(rows, k, 3), w(n, k, 1), y(rows, n, 2), pre(rows, n, 0), residual(rows, n, 5);
  auto bias = draw<float>(n), gamma = draw<float>(n), scale = draw<float>(rows);
  const double size = tolerance * std::sqrt(double(k) + 1);
  Dense common{};
  common.format = format;
  common.rows = rows;
  common.n = n;
  common.k = k;
  common.tile = tile;
  common.piece = piece;
  {
    const auto panels = packed(w.matrix(format), false, n, k);
    Dense a = common;
    a.x = x.matrix(format);
    a.panels = panels.data();
    a.activation = GELU;
    a.bias = bias.data();
    a.gamma = gamma.data();
    a.row_scale = scale.data();
    a.residual = residual.matrix(format);
    a.pre = pre.matrix(format);
    a.y = y.matrix(format);
    all(tasks_of(a.tile, rows, n), kernels.scratch(a), [&](int64_t t, char* scratch) { kernels.dense(a, t, scratch); });
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t c = 0; c < n; ++c) {
        double z = bias[c];
        for (int64_t i = 0; i < k; ++i) z += x.at(r, i) * w.at(c, i);
        check(std::fabs(pre.at(r, c) - z), size, "pre", format, n, k);
        const double value = residual.at(r, c) + scale[r] * gamma[c] * gelu(z);
        check(std::fabs(y.at(r, c) - value), 9 * size, "y", format, n, k);
      }
    }
  }
  Buffer<T> hidden(rows, n, 0), dx(rows, n, 4), v(k, n, 0);  // gradients flow from k to n through [k, n]
  auto factor = draw<float>(k);
  std::vector<float> sums(pieces(rows, SUM_ROWS) * n, std::nanf(""));
  {
    const auto panels = packed(v.matrix(format), true, n, k);
    Dense a = common;
    a.x = x.matrix(format);
    a.x_columns = factor.data();
    a.panels = panels.data();
    a.backward = true;
    a.activation = GELU;
    a.pre = pre.matrix(format);
    a.hidden = hidden.matrix(format);
    a.y = dx.matrix(format);
    a.sums = sums.data();
    all(tasks_of(a.tile, rows, n), kernels.scratch(a), [&](int64_t t, char* scratch) { kernels.dense(a, t, scratch); });
    for (int64_t c = 0; c < n; ++c) {
      double total = 0;
      for (int64_t r = 0; r < rows; ++r) {
        double d = 0;
        for (int64_t i = 0; i < k; ++i) d += x.at(r, i) * factor[i] * v.at(i, c);
        d *= gelu_slope(pre.at(r, c));
        total += d;
        check(std::fabs(dx.at(r, c) - d), 9 * size, "dx", format, n, k);
        check(std::fabs(hidden.at(r, c) - gelu(pre.at(r, c))), 9 * tolerance, "hidden", format, n, k);
      }
      for (int64_t p = 0; p < pieces(rows, SUM_ROWS); ++p) total -= sums[p * n + c];
      check(std::fabs(total), 9 * size * std::sqrt(double(rows)), "sums", format, n, k);
    }
  }
  {  // a weight gradient, whose left operand is stored by columns
    Buffer<T> dy(k, rows, 2), input(k, n, 1), weight(rows, n, 3), dw(rows, n, 0);
    std::vector<float> dots(pieces(n, SUM_COLUMNS) * rows, std::nanf(""));
    const auto panels = packed(input.matrix(format), true, n, k);
    Dense a = common;
    a.x = dy.matrix(format);
    a.by_columns = true;
    a.panels = panels.data();
    a.row_scale = scale.data();
    a.y = dw.matrix(format);
    a.dotted = weight.matrix(format);
    a.dots = dots.data();
    all(tasks_of(a.tile, rows, n), kernels.scratch(a), [&](int64_t t, char* scratch) { kernels.dense(a, t, scratch); });
    for (int64_t r = 0; r < rows; ++r) {
      double total = 0;
      for (int64_t c = 0; c < n; ++c) {
        double u = 0;
        for (int64_t i = 0; i < k; ++i) u += dy.at(i, r) * input.at(i, c);
        check(std::fabs(dw.at(r, c) - scale[r] * u), 9 * size, "dw", format, n, k);
        total += u * weight.at(r, c);
      }
      for (int64_t p = 0; p < pieces(n, SUM_COLUMNS); ++p) total -= dots[p * rows + r];
      check(std::fabs(total), 9 * size * std::sqrt(double(n)), "dots", format, n, k);
    }
  }
}

int main() {
  const int64_t shapes[][3] = {{1, 1, 1}, {3, 33, 7}, {65, 40, 300}, {200, 17, 70}, {5, 800, 20}, {200, 800, 20}};
  for (const auto& s : shapes) {
    for (const Tile tile : {LARGEST_TILE, tile_for(s[0], s[1], 4 * s[2], 8)}) {
      for (const int64_t piece : {DEEPEST, int64_t(64)}) {
        run<float>(s[0], s[1], s[2], tile, piece, FP32, 1e-5);
        run<level::bf16>(s[0], s[1], s[2], tile, piece, BF16, 2e-2);
        run<level::fp16>(s[0], s[1], s[2], tile, piece, FP16, 2e-3);
      }
    }
  }
  std::puts("ok");
  return 0;
}
