// The product of one unit: some rows with some columns of a matrix, and what becomes of its sums.
//
// A column is one panel, or a group of panels that are finished together: finish(row, column, sums) gets the sums of
// all its 32 * group columns while they are still in the nearest cache.
#pragma once

#include <algorithm>

#include "matrix.h"
#include "product.h"

namespace headwater {

constexpr int kStreamedRows = 6;  // up to so many rows wait for memory alone, and the processor fetches best by itself
constexpr int kTogether = 4;      // panels that streamed rows take at once
constexpr int kRowsInTiles = 32;  // of a block: two tiles
constexpr int kMaxGroup = 64;     // panels: heads of up to 2,048 dims

// Floats that a unit of at most `max_rows` rows needs for its sums.
template <class T>
constexpr size_t num_sums(int max_rows, int group) {
  const int rows = kHasTiles<T> ? 2 * kRowsInTiles : max_rows;
  return size_t(rows) * std::max(group, kTogether) * kPanel;
}

template <class T>
struct UnitProduct {
  const T* a;  // of the matrix's rows
  int lda;
  const Matrix<T>& matrix;
  int group;  // panels of a column
  Cut::Unit unit;
  float* sums;  // num_sums of them

  int num_rows() const { return unit.end_row - unit.row; }
  const T* row(int i) const { return a + long(i) * lda; }
};

namespace kernel {

template <class T>
Product<T> block_of(const UnitProduct<T>& p, int row, const T* const* panels, int num_panels, float* sums) {
  const int num_steps = p.matrix.num_rows() / Element<T>::kDepth;
  return {p.row(row), p.lda, panels, num_panels, 1, num_steps, sums, num_panels * kPanel, false, nullptr};
}

// All rows with a column before the next column: its panel stays in the first-level cache.
template <class T, class Finish>
void multiply_by_columns(const UnitProduct<T>& p, const Finish& finish) {
  const Cut::Unit& unit = p.unit;
  const bool is_streamed = p.num_rows() <= kStreamedRows;
  const int together = is_streamed ? std::max(1, kTogether / p.group) : 1;
  for (int column = unit.column; column < unit.end_column; column += together) {
    const int num_columns = std::min(together, unit.end_column - column), num_panels = num_columns * p.group;
    const T *panels[kMaxGroup], *next[kMaxGroup];
    for (int i = 0; i < num_panels; i++) {
      panels[i] = p.matrix.panel(column * p.group + i);
      next[i] = p.matrix.panel(column * p.group + num_panels + i);  // only fetched, so it may lie behind the last
    }
    Product<T> block = block_of(p, unit.row, panels, num_panels, p.sums);
    if (!is_streamed) block.next = next;
    multiply_vectors(block, p.num_rows());
    for (int row = 0; row < p.num_rows(); row++)
      for (int i = 0; i < num_columns; i++)
        finish(unit.row + row, column + i, p.sums + (long(row) * num_panels + i * p.group) * kPanel);
  }
}

#if defined(HEADWATER_AMX)

// Sums that wait to be finished: the vector units do it, row by row, while the tiles multiply the next block.
template <class Finish>
class Backlog {
 public:
  explicit Backlog(const Finish& finish) : finish_(finish) {}

  // num_calls: of finish_some, before the next block is done.
  void put(float* sums, int row, int num_rows, int column, int num_columns, int group, int num_calls) {
    sums_ = sums;
    row_ = row;
    end_ = row + num_rows;
    column_ = column;
    num_columns_ = num_columns;
    size_ = group * kPanel;
    rows_per_call_ = (num_rows + num_calls - 1) / num_calls;
  }

  void finish_some() { finish_until(std::min(end_, row_ + rows_per_call_)); }
  void finish_all() { finish_until(end_); }

 private:
  INLINE void finish_until(int end) {
    for (; row_ < end; row_++)
      for (int i = 0; i < num_columns_; i++, sums_ += size_) finish_(row_, column_ + i, sums_);
  }

  const Finish& finish_;
  float* sums_ = nullptr;
  int row_ = 0, end_ = 0, column_ = 0, num_columns_ = 0, size_ = 0, rows_per_call_ = 0;
};

// What a block fetches while it multiplies. A single block streams its panels from memory, and asks for them a little
// ahead: far enough to hide the nearer caches, near enough that the processor's own fetching sees one stream. Where
// several blocks of rows take the same panels, each fetches a share of the next ones.
class Ahead {
 public:
  Ahead(const Bf16* next, int num_blocks) : next_(next), next_bytes_(num_blocks > 1 ? kPairBytes / num_blocks : 0) {}

  void operator()(const Bf16* tiles, bool streams) {
    if (streams) prefetch<true>(tiles + kAhead, kPairBytes);
    if (next_bytes_ == 0) return;
    for (int i = 0; i < next_bytes_; i += kSparse) prefetch(reinterpret_cast<const char*>(next_) + i, 1);
    next_ += next_bytes_ / int(sizeof(Bf16));
  }

 private:
  static constexpr int kAhead = 5 * kTileSize;  // elements
  static constexpr int kSparse = 256;           // bytes: the processor fetches the lines in between by itself
  const Bf16* next_;
  int next_bytes_;  // per pair of tiles
};

template <class Finish>
void multiply_in_tiles(const UnitProduct<Bf16>& p, const Finish& finish) {
  const Cut::Unit& unit = p.unit;
  const int num_blocks = (p.num_rows() + kRowsInTiles - 1) / kRowsInTiles;
  const int together = p.num_rows() <= kTileRows ? std::max(1, 2 / p.group) : 1;
  const long num_sums = long(kRowsInTiles) * std::max(together, p.group) * kPanel;
  Backlog<Finish> backlog(finish);
  int turn = 0;
  for (int column = unit.column; column < unit.end_column; column += together) {
    const int num_columns = std::min(together, unit.end_column - column), num_panels = num_columns * p.group;
    const Bf16* panels[kMaxGroup];
    for (int i = 0; i < num_panels; i++) panels[i] = p.matrix.panel(column * p.group + i);
    Ahead ahead(p.matrix.panel(column * p.group + num_panels), num_blocks);
    for (int row = unit.row; row < unit.end_row; row += kRowsInTiles) {
      const bool streams = num_blocks == 1 || (column == unit.column && row == unit.row);
      auto meanwhile = [&](const Bf16* tiles) INLINE {
        ahead(tiles, streams);
        backlog.finish_some();
      };
      float* const sums = p.sums + turn++ % 2 * num_sums;
      const int num_rows = std::min(kRowsInTiles, unit.end_row - row);
      multiply_tiles(block_of(p, row, panels, num_panels, sums), num_rows, meanwhile);
      backlog.finish_all();
      backlog.put(sums, row, num_rows, column, num_columns, p.group, num_panels * p.matrix.num_rows() / 32);
    }
  }
  backlog.finish_all();
}

#endif

}  // namespace kernel

template <class T, class Finish>
void multiply(const UnitProduct<T>& p, const Finish& finish) {
#if defined(HEADWATER_AMX)
  if constexpr (kHasTiles<T>) return kernel::multiply_in_tiles(p, finish);
#endif
  kernel::multiply_by_columns(p, finish);
}

}  // namespace headwater
