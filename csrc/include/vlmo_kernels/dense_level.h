// The dense kernels of one instruction set, as csrc/cpu instantiates them.
#pragma once

#include "activation.h"
#include "dense.h"
#include "pack.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

constexpr int64_t ROWS = LARGEST_TILE.rows, COLUMNS = LARGEST_TILE.columns, DEPTH = TILE_DEPTH;
// Rows of a tile are a cache line more than a power of two apart, or they would share a few sets of the cache.
constexpr int64_t RESULT_ROW = COLUMNS + 16;
template <class E>
constexpr int64_t LEFT_ROW = DEPTH + 64 / sizeof(E);

// Calls body with a null pointer to the type of a format.
template <class Body>
static inline void with_format(Format format, Body body) {
  if (format == BF16) return body((bf16*)nullptr);
  format == FP16 ? body((fp16*)nullptr) : body((float*)nullptr);
}
template <class P>
struct Target;
template <class T>
struct Target<T*> {
  typedef T type;
};

template <class A, class B>
struct Same {
  static constexpr bool value = false;
};
template <class A>
struct Same<A, A> {
  static constexpr bool value = true;
};

template <class T>
static inline const T* at(const Matrix& m, int64_t row, int64_t column) {
  return (const T*)m.data + row * m.row + column;
}

// `count` rows and `depth` columns of x from (row, column) on, each column times its factor, into `to`; rows of `to` are
// `stride` apart and zero from `depth` to `padded`.
template <class E>
static inline void copy_in(const Matrix& x, const float* factors, int64_t row, int64_t count, int64_t column,
                           int64_t depth, int64_t padded, E* to, int64_t stride) {
  with_format(x.format, [&](auto* type) {
    typedef typename Target<decltype(type)>::type T;
    for (int64_t r = 0; r < count; r++, to += stride) {
      const T* from = at<T>(x, row + r, column);
      if (!factors && Same<T, E>::value) {
        __builtin_memcpy((void*)to, from, depth * sizeof(E));
      } else {
        over_row(depth, [&](int64_t i, int lanes) {
          const vf v = load_some(from + i, lanes);
          store_some(to + i, factors ? v * load_some(factors + column + i, lanes) : v, lanes);
        });
      }
      if (depth < padded) __builtin_memset((void*)(to + depth), 0, (padded - depth) * sizeof(E));
    }
  });
}

// Asks for one of `slices` parts of a tile of m ahead of its turn: on its own a tile's first touch waits for memory.
static inline void prefetch(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, int64_t slice,
                            int64_t slices) {
  if (!m.data) return;
  const int64_t size = m.format == FP32 ? 4 : 2, end = rows * (slice + 1) / slices;
  for (int64_t r = rows * slice / slices; r < end; r++) {
    const char* from = (const char*)m.data + ((row + r) * m.row + column) * size;
    for (int64_t b = 0; b < columns * size; b += 64) __builtin_prefetch(from + b, 0, 2);
  }
}

// ------------------------------------------------------------------ weights into panels

template <class E>
static inline void pack(const Matrix& w, bool swapped, const Panels& p, int64_t task) {
  constexpr int width = Gemm<E>::width;
  const int64_t rows = swapped ? p.k : p.n, columns = swapped ? p.n : p.k, panel = width * packed_size(p.k);
  const int64_t first = task * BLOCK, count = min_of<int64_t>(BLOCK, rows - first);
  E block[BLOCK * DEPTH];
  E* to = (E*)p.data;
  for (int64_t c = 0; c < columns; c += DEPTH) {
    const int64_t real = min_of(DEPTH, columns - c), padded = packed_size(real);
    prefetch(w, first, count, c + DEPTH, min_of(DEPTH, columns - c - DEPTH), 0, 1);
    copy_in<E>(w, nullptr, first, count, c, real, padded, block, padded);
    __builtin_memset((void*)(block + count * padded), 0, (BLOCK - count) * padded * sizeof(E));
    if (swapped)
      panels(block, padded, first, to + c / width * panel, panel);
    else
      transposed_panels(block, padded, to + first / width * panel + c * width, panel);
  }
}

// ------------------------------------------------------------------ forward, and the gradient of the input

template <class E>
struct DenseTile {
  using G = Gemm<E>;
  const Dense& a;
  int64_t row, rows, column, columns;
  E* left;       // [ROWS, LEFT_ROW], DEPTH of them used
  float* result; // [ROWS, RESULT_ROW]

  DenseTile(const Dense& dense, int64_t task, char* scratch) : a(dense) {
    const int64_t tiles = pieces(a.rows, a.tile.rows);  // neighbouring tasks share a weight
    row = task % tiles * a.tile.rows;
    column = task / tiles * a.tile.columns;
    rows = min_of(a.tile.rows, a.rows - row);
    columns = min_of(a.tile.columns, a.n - column);
    result = (float*)scratch;
    left = (E*)(scratch + ROWS * RESULT_ROW * sizeof(float));
  }

  void run() {
    multiply();
    with_format(a.y.format, [&](auto* type) {
      with_activation(a.activation, [&](auto kind) {
        typedef typename Target<decltype(type)>::type T;
        for (int64_t r = 0; r < rows; r++)
          a.backward ? backward<T, decltype(kind)::value>(r) : forward<T, decltype(kind)::value>(r);
      });
    });
    stream_fence();
  }

 private:
  void multiply() {
    const int64_t steps = round_up(rows, G::row_step), width = packed_size(columns), depth = packed_size(a.k);
    const E* right = (const E*)a.panels + column * depth;
    for (int64_t p = 0; p < depth || p == 0; p += DEPTH) {
      const int64_t padded = min_of(DEPTH, depth - p), real = max_of<int64_t>(0, min_of(DEPTH, a.k - p));
      copy_in<E>(a.x, a.x_columns, row, rows, p, real, padded, left, LEFT_ROW<E>);
      // Rows that only fill the last step: their products are not used, but NaN or denormals left there cost time.
      for (int64_t r = rows; r < steps; r++) __builtin_memset((void*)(left + r * LEFT_ROW<E>), 0, padded * sizeof(E));
      const int64_t next = p + DEPTH, ahead = min_of(DEPTH, a.k - next);
      for (int64_t j = 0; j < width; j += G::width) {
        const E* panel = right + j * depth + p * G::width;
        G::run(steps, G::width, padded, left, LEFT_ROW<E>, panel, 0, result + j, RESULT_ROW, p > 0);
        if (ahead > 0) {
          prefetch(a.x, row, rows, next, ahead, j / G::width, width / G::width);
        } else {
          const Matrix* const around[] = {&a.residual, &a.pre, &a.y, &a.hidden};
          for (const Matrix* m : around)
            if (!m->streamed) prefetch(*m, row, rows, column, columns, j / G::width, width / G::width);
        }
      }
    }
  }

  // A row of one of the matrices around the product, from the tile's first column on.
  template <class T>
  struct Row {
    T* p;
    bool streamed;
    Row(const Matrix& m, int64_t r, int64_t column)
        : p(m.data ? (T*)m.data + r * m.row + column : nullptr), streamed(m.streamed) {}
    explicit operator bool() const { return p; }
    vf get(int64_t i, int lanes) const { return load_some(p + i, lanes); }
    void put(int64_t i, int lanes, vf v) const {
      if (streamed && lanes == W)
        stream(p + i, v);
      else
        store_some(p + i, v, lanes);
    }
  };
  const float* columns_of(const float* vector) const { return vector ? vector + column : nullptr; }

  template <class T, Activation kind>
  void forward(int64_t r) {
    const float *line = result + r * RESULT_ROW, *bias = columns_of(a.bias), *gamma = columns_of(a.gamma);
    const float factor = a.row_scale ? a.row_scale[row + r] : 1.0f;
    const Row<T> residual(a.residual, row + r, column), pre(a.pre, row + r, column), y(a.y, row + r, column);
    over_row(columns, [&](int64_t i, int lanes) {
      vf v = load_some(line + i, lanes), slope;
      if (bias) v = v + load_some(bias + i, lanes);
      if (pre) pre.put(i, lanes, v);
      v = activate<kind, false, sizeof(T) == 4>(v, slope) * factor;
      if (gamma) v = v * load_some(gamma + i, lanes);
      if (residual) v = v + residual.get(i, lanes);
      y.put(i, lanes, v);
    });
  }

  template <class T, Activation kind>
  void backward(int64_t r) {
    const float* line = result + r * RESULT_ROW;
    const Row<T> pre(a.pre, row + r, column), hidden(a.hidden, row + r, column), y(a.y, row + r, column);
    float* sums = a.sums ? a.sums + (row + r) / SUM_ROWS * a.n + column : nullptr;
    if (sums && r % SUM_ROWS == 0) __builtin_memset(sums, 0, columns * sizeof(float));
    over_row(columns, [&](int64_t i, int lanes) {
      vf flow = load_some(line + i, lanes);
      if (kind != NO_ACTIVATION) {
        const vf x = pre.get(i, lanes);
        vf slope;
        const vf value = activate<kind, true, sizeof(T) == 4>(x, slope);
        if (hidden) hidden.put(i, lanes, value);
        // as torch has it, an infinite gradient ends at a ReLU that is shut
        flow = kind == RELU ? select(at_most_zero(x), vf{}, flow) : flow * slope;
      }
      if (sums) store_some(sums + i, load_some(sums + i, lanes) + flow, lanes);
      y.put(i, lanes, flow);
    });
  }
};

// ------------------------------------------------------------------ by format

#if defined(__AVX512BF16__)
typedef bf16 DenseOperand;  // of bf16 products
#else
typedef float DenseOperand;
#endif

static void pack_of(const Matrix& w, bool swapped, const Panels& to, int64_t task) {
  to.format == BF16 ? pack<DenseOperand>(w, swapped, to, task) : pack<float>(w, swapped, to, task);
}
template <class E>
static void dense_as(const Dense& a, int64_t task, char* scratch) {
  Gemm<E>::open();
  DenseTile<E>(a, task, scratch).run();
  Gemm<E>::close();
}
static void dense_of(const Dense& a, int64_t task, char* scratch) {
  a.format == BF16 ? dense_as<DenseOperand>(a, task, scratch) : dense_as<float>(a, task, scratch);
}
constexpr size_t DENSE_SCRATCH = sizeof(float) * ROWS * (RESULT_ROW + LEFT_ROW<float>);

}  // namespace VLMO_LEVEL

const DenseKernels VLMO_JOIN(dense_kernels_, VLMO_LEVEL) = {
    VLMO_LEVEL::DENSE_SCRATCH, sizeof(VLMO_LEVEL::DenseOperand) == 2, VLMO_LEVEL::pack_of, VLMO_LEVEL::dense_of};

}  // namespace vlmo_kernels
