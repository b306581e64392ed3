// Weights as the products want them, and how a product with them is shared among threads.
#pragma once

#include <algorithm>

#include "buffer.h"
#include "element.h"

namespace headwater {

// A weight [columns, rows] of a checkpoint ("out, in"), as panels of 32 columns. The arena outlives it.
template <class T>
class Matrix {
 public:
  Matrix(int num_columns, int num_rows, Arena<T>& arena)
      : num_panels_(round_up(num_columns, kPanel) / kPanel),
        num_rows_(round_up(num_rows, kPanel)),
        panels_(arena.take(size_t(num_panels_) * kPanel * num_rows_)),
        bias_(size_t(num_panels_) * kPanel) {}

  int num_panels() const { return num_panels_; }
  int num_rows() const { return num_rows_; }  // a multiple of 32; those that the checkpoint lacks are zero
  const T* panel(int i) const { return panels_ + size_t(i) * kPanel * num_rows_; }
  const float* bias(int panel) const { return has_bias_ ? bias_.data() + long(panel) * kPanel : nullptr; }

  void set_column(int column, const T* values, int size) {
    constexpr int depth = Element<T>::kDepth;
    T* const to = panels_ + size_t(column / kPanel) * kPanel * num_rows_;
    for (int row = 0; row < size; row++) to[place_in_panel<T>(row / depth, column % kPanel) + row % depth] = values[row];
  }

  void set_bias(int column, float value) {
    bias_[column] = value;
    has_bias_ = true;
  }

 private:
  int num_panels_, num_rows_;
  T* panels_;
  Buffer<float> bias_;
  bool has_bias_ = false;
};

// How a product of many rows with a matrix is cut into units.
struct Cut {
  static constexpr int kMaxRows = 256;  // of a unit

  int num_rows, num_columns;  // of columns: panels, or groups of panels that belong together
  int rows_per_unit, columns_per_unit;

  Cut(int num_rows, int num_columns, int bytes_per_row, int num_threads)
      : num_rows(num_rows), num_columns(num_columns) {
    // The rows of a unit stay in a core's second-level cache while the panels pass by.
    constexpr int cache_bytes = 384 << 10, min_rows = 48, units_per_thread = 6;
    rows_per_unit = std::clamp(cache_bytes / bytes_per_row / 48 * 48, min_rows, kMaxRows);
    const int wanted = std::max(1, units_per_thread * num_threads / std::max(1, num_row_units()));
    columns_per_unit = std::clamp((num_columns + wanted - 1) / wanted, 1, 16);
  }

  int num_row_units() const { return (num_rows + rows_per_unit - 1) / rows_per_unit; }
  int num_column_units() const { return (num_columns + columns_per_unit - 1) / columns_per_unit; }
  int num_units() const { return num_row_units() * num_column_units(); }

  // Units of the same columns follow one another: weights that no cache holds are read once for all rows.
  int column_unit(int i) const { return i / num_row_units(); }

  struct Unit {
    int row, end_row, column, end_column;
  };
  Unit unit(int i) const {
    const int row = i % num_row_units() * rows_per_unit, column = column_unit(i) * columns_per_unit;
    return {row, std::min(row + rows_per_unit, num_rows), column, std::min(column + columns_per_unit, num_columns)};
  }
};

}  // namespace headwater
