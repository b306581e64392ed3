// A step's segments, cut into tiles: the units of attention, and where their parts are merged.
#pragma once

#include <algorithm>
#include <cstdint>
#include <numeric>
#include <vector>

namespace headwater {

// What workers/attention/protocol.py calls a Segment. Eight 64-bit integers, so that an array of them can be handed over.
struct Segment {
  enum Kind : int64_t { kCausal = 0, kFull = 1, kTree = 2 };

  int64_t row_start;
  int64_t num_rows;
  const int32_t* pages;   // entry i: the page with the positions [i * page_size, (i + 1) * page_size)
  int64_t key_start;      // position of the first key; a multiple of the page size
  int64_t num_keys;
  int64_t kind;
  const uint64_t* masks;  // kTree: per row, which of the segment's last num_rows keys it sees
  int64_t unused;

  // The keys before this one are seen by the row, windows aside; of those after it only what its mask names.
  int64_t limit(int64_t row) const {
    if (kind == kFull) return num_keys;
    if (kind == kTree) return num_keys - num_rows;
    return num_keys - num_rows + 1 + (row - row_start);
  }

  uint64_t mask(int64_t row) const { return kind == kTree ? masks[row - row_start] : 0; }

  // No row below `end` sees a key from this one on.
  int64_t last_limit(int64_t end) const { return kind == kTree ? num_keys : limit(end - 1); }
};

// Some rows of a segment on some of its keys.
struct Tile {
  int segment;
  int row;
  int num_rows;
  int first_key;  // relative to the segment's first
  int end_key;
  int first_slot;  // into Tiles::slots: one for each row
};

// Cuts segments into tiles of a fixed number of keys, whatever else is in the step: a row's rounding does not depend on
// its neighbours or on the number of threads.
class Tiles {
 public:
  static constexpr int kQueries = 64;  // rows times heads of a group, per tile
  static constexpr int kAlone = -1;    // in place of a slot: the row has this part only

  // split_keys: the keys of a tile; a multiple of the page size.
  void cut(const Segment* segments, int num_segments, int num_rows, int group, int split_keys) {
    split_keys_ = split_keys;
    tiles_.clear();
    num_parts_.assign(num_rows, 0);
    const int rows_per_tile = std::max(1, kQueries / group);
    for (int s = 0; s < num_segments; s++) cut_segment(segments[s], s, rows_per_tile);
    assign_slots(num_rows);
    order_.resize(tiles_.size());
    std::iota(order_.begin(), order_.end(), 0);
    std::stable_sort(order_.begin(), order_.end(), [this](int a, int b) { return cost(tiles_[a]) > cost(tiles_[b]); });
  }

  int num_tiles() const { return int(tiles_.size()); }
  int num_slots() const { return num_slots_; }

  // Large tiles come first, so that the threads end at about the same time.
  const Tile& by_size(int i) const { return tiles_[order_[i]]; }
  int slot(const Tile& tile, int i) const { return slots_[tile.first_slot + i]; }

  // Rows whose result is not that of one tile alone, and their parts in order.
  const std::vector<int>& merged_rows() const { return merged_rows_; }
  int first_part(int row) const { return first_parts_[row]; }
  int num_parts(int row) const { return num_parts_[row]; }

 private:
  static long cost(const Tile& tile) { return long(tile.num_rows + 4) * (tile.end_key - tile.first_key + 32); }

  void cut_segment(const Segment& segment, int index, int rows_per_tile) {
    const int end = int(segment.row_start + segment.num_rows);
    for (int row = int(segment.row_start); row < end; row += rows_per_tile) {
      const int num_rows = std::min(rows_per_tile, end - row);
      const int num_keys = int(segment.last_limit(row + num_rows));
      for (int key = 0; key < num_keys; key += split_keys_) {
        tiles_.push_back({index, row, num_rows, key, std::min(key + split_keys_, num_keys), 0});
        for (int r = row; r < row + num_rows; r++) num_parts_[r]++;
      }
    }
  }

  // Slots lie row by row, and within a row in the order of its tiles: the merge is always the same.
  void assign_slots(int num_rows) {
    first_parts_.resize(num_rows);
    merged_rows_.clear();
    num_slots_ = 0;
    for (int row = 0; row < num_rows; row++) {
      first_parts_[row] = num_slots_;
      if (num_parts_[row] == 1) continue;
      merged_rows_.push_back(row);
      num_slots_ += num_parts_[row];
    }
    slots_.clear();
    next_part_.assign(num_rows, 0);
    for (Tile& tile : tiles_) {
      tile.first_slot = int(slots_.size());
      for (int row = tile.row; row < tile.row + tile.num_rows; row++)
        slots_.push_back(num_parts_[row] == 1 ? kAlone : first_parts_[row] + next_part_[row]++);
    }
  }

  std::vector<Tile> tiles_;
  std::vector<int> order_, slots_, num_parts_, first_parts_, next_part_, merged_rows_;
  int num_slots_ = 0;
  int split_keys_ = 0;
};

}  // namespace headwater
