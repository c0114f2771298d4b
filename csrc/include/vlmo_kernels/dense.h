// Dense layers on a range of rows, with everything around the product done while a tile of it is in the cache.
//
//   forward     y  = residual + row_scale * gamma * act(x w' + bias), and the sum under `act` kept on request
//   backward    dz = ((gamma * dy) w) * act'(pre), and act(pre) and the column sums of dz on request
//               dw = gamma * (dy' x), and the row sums of w * (dy' x) on request
//
// Every number is summed in one order and written by one task, so results depend neither on the number of threads nor
// on which of them does what.
#pragma once

#include <stddef.h>
#include <stdint.h>

#include "format.h"

namespace vlmo_kernels {

enum Activation { NO_ACTIVATION, GELU, GELU_TANH, RELU, SILU };

// A task is a tile of the result.
struct Tile {
  int64_t rows, columns;
};
// Sums over rows or columns are formed in pieces of these sizes, and a tile is whole pieces.
constexpr int64_t SUM_ROWS = 32, SUM_COLUMNS = 256;
constexpr Tile LARGEST_TILE = {6 * SUM_ROWS, 3 * SUM_COLUMNS};
// The rows of the left operand that a tile reads stay in a second-level cache.
constexpr int64_t OPERAND_BYTES = 384 << 10;
// A greater depth is taken in pieces, so that a panel of the right one stays there too. In a weight gradient, whose
// depth are the tokens, pieces of so many bytes a row are faster.
constexpr int64_t DEEPEST = 4096, PIECE_BYTES = 2048;

static inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }
static inline int64_t tasks_of(Tile tile, int64_t rows, int64_t columns) {
  return pieces(rows, tile.rows) * pieces(columns, tile.columns);
}
// Large tiles read operands less often, small ones keep all threads busy. What is computed does not depend on it.
static inline Tile tile_for(int64_t rows, int64_t columns, int64_t row_bytes, int64_t threads) {
  Tile tile = LARGEST_TILE;
  while (tile.rows > SUM_ROWS && tile.rows * row_bytes > OPERAND_BYTES) tile.rows -= SUM_ROWS;
  while (tasks_of(tile, rows, columns) < 8 * threads && (tile.columns > SUM_COLUMNS || tile.rows > SUM_ROWS)) {
    if (tile.columns > SUM_COLUMNS)
      tile.columns -= SUM_COLUMNS;
    else
      tile.rows -= SUM_ROWS;
  }
  return tile;
}

// A row-major matrix; its rows are `row` elements apart and contiguous.
struct Matrix {
  Format format;
  void* data;
  int64_t row;
  bool streamed;  // written around the caches, in whole lines: by the time it is read they hold other things
};
// Results of this many bytes are streamed.
constexpr int64_t STREAMED_BYTES = 4 << 20;

// What a product reads as its right operand: the weight in panels, in the order and format of an instruction set.
struct Panels {
  Format format;
  int64_t n, k;  // the product's columns, and its depth
  void* data;
};

struct Dense {
  Format format;  // of the product's operands
  Tile tile;
  int64_t rows, n, k;
  int64_t piece;                           // of the depth; a smaller depth is taken whole
  Matrix x;                                // [rows, k], or with by_columns [k, rows]
  bool by_columns;
  const float* x_columns;                  // factors of its columns [k], or null
  const void* panels;
  Activation activation;
  const float *bias, *gamma, *row_scale;   // [n], [n], [rows], or null
  Matrix residual, pre, hidden, y;         // [rows, n], of one format; absent ones have no data
  bool backward;                           // `pre` is read, and `y` is what flows through it
  float* sums;                             // backward: column sums, [pieces of SUM_ROWS, n], or null
  Matrix dotted;                           // [rows, n], what `dots` are sums of together with the product
  float* dots;                             // row sums, [pieces of SUM_COLUMNS, rows], or null
};

// Both sides of a packed weight are padded to 32; a task packs 32 rows of it.
static inline int64_t packed_size(int64_t side) { return (side + 31) / 32 * 32; }

struct DenseKernels {
  size_t (*scratch)(const Dense&);  // bytes a thread needs, 64-byte aligned
  bool bf16;                        // whether bf16 operands stay bf16; otherwise panels hold fp32
  // 32 rows of `w`, which is [n, k], or with `swapped` [k, n].
  void (*pack)(const Matrix& w, bool swapped, const Panels& to, int64_t task);
  void (*dense)(const Dense&, int64_t task, char* scratch);
};

// One for every instruction set of cpu_isa.h that makes a difference; with AMX tiles oneDNN is used instead.
extern const DenseKernels dense_kernels_portable, dense_kernels_avx2, dense_kernels_avx512, dense_kernels_avx512bf16;

}  // namespace vlmo_kernels
