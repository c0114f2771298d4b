// The dense kernels of one instruction set, as csrc/cpu instantiates them.
#pragma once

#include "activation.h"
#include "dense.h"
#include "pack.h"

namespace vlmo_kernels {
namespace VLMO_LEVEL {

// Weights are packed this much of the depth at a time.
constexpr int64_t DEPTH = 256;
// Copied rows are a cache line more than a power of two apart, or they would share a few sets of the cache.
template <class E>
static inline int64_t copied_row(const Dense& a) {
  return packed_size(min_of(a.k, a.piece)) + 64 / sizeof(E);
}

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

// `count` rows and `depth` columns of x from (row, column) on, each column times its factor, into `to`; its rows are
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

// Asks for a tile of m ahead of its turn: on its own a tile's first touch waits for memory.
static inline void prefetch(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns) {
  if (!m.data || m.streamed) return;
  const int64_t size = m.format == FP32 ? 4 : 2;
  for (int64_t r = 0; r < rows; r++) {
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
    prefetch(w, first, count, c + DEPTH, min_of(DEPTH, columns - c - DEPTH));
    copy_in<E>(w, nullptr, first, count, c, real, padded, block, padded);
    __builtin_memset((void*)(block + count * padded), 0, (BLOCK - count) * padded * sizeof(E));
    if (swapped)
      panels(block, padded, first, to + c / width * panel, panel);
    else
      transposed_panels(block, padded, to + first / width * panel + c * width, panel);
  }
}

// ------------------------------------------------------------------ forward, and the gradient of the input

// A tile in blocks of a few rows and one panel. A block is summed over the whole depth in registers (fp32 in pieces,
// see Gemm) and finished at once: nothing but the result is written. The block's rows are read where they are.
template <class E>
struct DenseTile {
  using G = Gemm<E>;
  static constexpr int64_t BLOCK_SIZE = G::row_step * G::width;
  const Dense& a;
  int64_t row, rows, column, columns;
  int64_t in_place;  // rows up to this one are read from a.x; the others from `copied`
  E* copied;
  float* sums;       // of all blocks, where the depth is taken in pieces
  float result[BLOCK_SIZE];

  DenseTile(const Dense& dense, int64_t task, char* scratch) : a(dense), copied((E*)scratch) {
    const int64_t tiles = pieces(a.rows, a.tile.rows);  // neighbouring tasks share a weight
    row = task % tiles * a.tile.rows;
    column = task / tiles * a.tile.columns;
    rows = min_of(a.tile.rows, a.rows - row);
    columns = min_of(a.tile.columns, a.n - column);
    sums = (float*)(scratch + copied_bytes(a));
  }

  static size_t copied_bytes(const Dense& a) { return a.tile.rows * copied_row<E>(a) * sizeof(E); }
  static size_t scratch(const Dense& a) {
    return copied_bytes(a) + (a.k > a.piece ? a.tile.rows * a.tile.columns * sizeof(float) : 0);
  }

  void run() {
    with_format(a.y.format, [&](auto* type) {
      with_activation(a.activation, [&](auto kind) {
        typedef typename Target<decltype(type)>::type T;
        for (int64_t p = 0; p < a.k || p == 0; p += a.piece)
          multiply<T, decltype(kind)::value>(p, min_of(a.piece, a.k - p));
      });
    });
    stream_fence();
  }

 private:
  // The product over a piece of the depth; after the last one the result.
  template <class T, Activation kind>
  void multiply(int64_t from, int64_t real) {
    const int64_t depth = round_up(real, G::depth_step), panel_size = G::width * packed_size(a.k);
    copy_operand(from, real, depth);
    const E* panel = (const E*)a.panels + column * packed_size(a.k) + from * G::width;
    for (int64_t j = 0; j < columns; j += G::width, panel += panel_size)
      for (int64_t i = 0; i < rows; i += G::row_step) {
        const bool here = i < in_place, last = from + real == a.k;
        if (last) prefetch_around(i, j);
        const E* left = here ? at<E>(a.x, row + i, from) : copied + (i - in_place) * copied_row<E>(a);
        const int64_t stride = here ? a.x.row : copied_row<E>(a);
        float* block = a.k > a.piece ? sums + (j / G::width * a.tile.rows + i) * G::width : result;
        G::run(G::row_step, G::width, depth, left, stride, panel, 0, block, G::width, from > 0);
        if (last) finish<T, kind>(i, j, block);
      }
  }

  // What cannot be read in place: other formats, scaled or stored columns, a depth or a number of rows with a rest.
  void copy_operand(int64_t from, int64_t real, int64_t depth) {
    in_place = 0;
    with_format(a.x.format, [&](auto* type) {
      const bool same = Same<typename Target<decltype(type)>::type, E>::value;
      if (same && !a.x_columns && !a.by_columns && depth == real) in_place = rows / G::row_step * G::row_step;
    });
    if (a.by_columns) return copy_transposed(from, real);
    const int64_t count = rows - in_place, stride = copied_row<E>(a);
    copy_in<E>(a.x, a.x_columns, row + in_place, count, from, real, depth, copied, stride);
    // Rows that only fill the last block: their products are not used, but NaN or denormals left there cost time.
    for (int64_t r = count; r < round_up(count, G::row_step); r++)
      __builtin_memset((void*)(copied + r * stride), 0, depth * sizeof(E));
  }

  void copy_transposed(int64_t from, int64_t real) {
    const int64_t padded = packed_size(rows);  // the rows of a tile are whole blocks
    E block[BLOCK * LARGEST_TILE.rows];
    for (int64_t t = 0; t < real; t += BLOCK) {
      const int64_t count = min_of<int64_t>(BLOCK, real - t);
      copy_in<E>(a.x, nullptr, from + t, count, row, rows, padded, block, padded);
      __builtin_memset((void*)(block + count * padded), 0, (BLOCK - count) * padded * sizeof(E));
      transposed_rows(block, padded, copied + t, copied_row<E>(a));
    }
  }

  void prefetch_around(int64_t i, int64_t j) {
    const Matrix* const around[] = {&a.residual, &a.pre, &a.y, &a.hidden, &a.dotted};
    for (const Matrix* m : around)
      prefetch(*m, row + i, min_of<int64_t>(G::row_step, rows - i), column + j, min_of<int64_t>(G::width, columns - j));
  }

  template <class T, Activation kind>
  void finish(int64_t i, int64_t j, const float* block) {
    const int64_t height = min_of<int64_t>(G::row_step, rows - i), width = min_of<int64_t>(G::width, columns - j);
    for (int64_t r = 0; r < height; r++)
      a.backward ? backward<T, kind>(i + r, j, width, block + r * G::width)
                 : forward<T, kind>(i + r, j, width, block + r * G::width);
  }

  // A row of one of the matrices around the product, from a column on.
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

  // `line` is row r of the product, `width` columns from column j of the tile on.
  template <class T, Activation kind>
  void forward(int64_t r, int64_t j, int64_t width, const float* line) {
    const int64_t first = column + j;
    const float *bias = a.bias ? a.bias + first : nullptr, *gamma = a.gamma ? a.gamma + first : nullptr;
    const float factor = a.row_scale ? a.row_scale[row + r] : 1.0f;
    const Row<T> residual(a.residual, row + r, first), pre(a.pre, row + r, first), y(a.y, row + r, first);
    if (a.dots) dot(r, first, width, line, Row<T>(a.dotted, row + r, first));
    over_row(width, [&](int64_t i, int lanes) {
      vf v = load_some(line + i, lanes), slope;
      if (bias) v = v + load_some(bias + i, lanes);
      if (pre) pre.put(i, lanes, v);
      v = activate<kind, false, sizeof(T) == 4>(v, slope) * factor;
      if (gamma) v = v * load_some(gamma + i, lanes);
      if (residual) v = v + residual.get(i, lanes);
      y.put(i, lanes, v);
    });
  }

  template <class T>
  void dot(int64_t r, int64_t first, int64_t width, const float* line, const Row<T>& with) {
    float* sum = a.dots + first / SUM_COLUMNS * a.rows + row + r;
    vf products{};
    over_row(width, [&](int64_t i, int lanes) {
      products = fma(load_some(line + i, lanes), with.get(i, lanes), products);
    });
    *sum = (first % SUM_COLUMNS ? *sum : 0) + sum_of(products);
  }

  template <class T, Activation kind>
  void backward(int64_t r, int64_t j, int64_t width, const float* line) {
    const int64_t first = column + j;
    const Row<T> pre(a.pre, row + r, first), hidden(a.hidden, row + r, first), y(a.y, row + r, first);
    float* sums = a.sums ? a.sums + (row + r) / SUM_ROWS * a.n + first : nullptr;
    if (sums && r % SUM_ROWS == 0) __builtin_memset(sums, 0, width * sizeof(float));
    over_row(width, [&](int64_t i, int lanes) {
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
static size_t scratch_of(const Dense& a) {
  return a.format == BF16 ? DenseTile<DenseOperand>::scratch(a) : DenseTile<float>::scratch(a);
}

}  // namespace VLMO_LEVEL

const DenseKernels VLMO_JOIN(dense_kernels_, VLMO_LEVEL) = {
    VLMO_LEVEL::scratch_of, sizeof(VLMO_LEVEL::DenseOperand) == 2, VLMO_LEVEL::pack_of, VLMO_LEVEL::dense_of};

}  // namespace vlmo_kernels
