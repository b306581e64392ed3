// Attention over a step's segments.
//
// A tile's queries (its rows times the heads of a group) go over their keys in chunks (see softmax.h). A row of several
// tiles gets their merge by log-sum-exp in float (Hydragen, arXiv 2402.05099, equation 4). Queries are scaled by
// log2(e) / sqrt(head_dim), because scores are in base 2.
#pragma once

#include <cmath>

#include "buffer.h"
#include "crew.h"
#include "kv_store.h"
#include "product.h"
#include "segments.h"
#include "softmax.h"

namespace headwater {

template <class T>
class Attention {
 public:
  // Keys that are scored before they are weighed, or one page if that is more. Scores, weights, sums, keys and values of
  // a chunk share the first-level cache.
  static constexpr int kChunk = kHasTiles<T> ? 32 : 128;
  static constexpr int kSplitKeys = 2048;  // of one tile, rounded up to whole chunks
  static constexpr int kSpareRows = 32;  // AMX reads and writes whole tiles
  static constexpr int kTileBlock = 32;  // queries that go through a chunk together where there are tiles
  static constexpr int kMergedRows = 8;  // per unit
  static constexpr long kSmallTile = 4096;  // rows times keys
  static constexpr int kTilesPerThread = 4;

  // `store`: what a KVStore takes after its shape.
  template <class... Store>
  Attention(const AttentionShape& shape, int num_threads, Store... store)
      : shape_(shape), store_(shape, store...), chunk_(round_up(std::max(kChunk, shape.page_size), shape.page_size)) {
    for (int i = 0; i < num_threads; i++) scratch_.emplace_back(*this);
  }

  const AttentionShape& shape() const { return shape_; }
  KVStore<T>& kv() { return store_; }

  // Cuts the step. `positions`, `places` and the segments, with what they point at, must live until the step is done.
  // Row i's result goes to the row places[i] of the output, or to i where there are none. Throws if a segment names a
  // page that cannot be read.
  void begin(const Segment* segments, int num_segments, const int64_t* positions, int num_rows,
             const int64_t* places = nullptr) {
    for (int i = 0; i < num_segments; i++) check_pages(segments[i]);
    segments_ = segments;
    positions_ = positions;
    places_ = places;
    num_rows_ = num_rows;
    tiles_.cut(segments, num_segments, num_rows, shape_.group(), round_up(kSplitKeys, chunk_));
    queries_.reserve((size_t(num_rows) * shape_.num_heads + Tiles::kQueries + kSpareRows) * shape_.padded_dim());
    split_into_units();
    parts_.reserve(size_t(tiles_.num_slots()) * shape_.num_heads * shape_.padded_dim());
    running_.resize(size_t(tiles_.num_slots()) * shape_.num_heads);
  }

  int num_tile_units() const { return int(units_.size()); }
  int num_merge_units() const { return int(tiles_.merged_rows().size() + kMergedRows - 1) / kMergedRows; }

  // head_dim floats become a query; what lies beyond head_dim stays zero.
  void write_query(int row, int head, const float* query) {
    T* to = queries(head / shape_.group(), row) + long(head % shape_.group()) * shape_.padded_dim();
    convert(to, query, shape_.head_dim, kLog2E / sqrtf(float(shape_.head_dim)));
  }

  // out [rows][out_stride], heads one after another. window: 0 for none.
  void attend(int layer, int window, int unit, int thread, T* out, int out_stride) {
    const auto [tile, first_head, end_head] = units_[unit];
    for (int head = first_head; head < end_head; head++)
      attend_head(layer, window, tiles_.by_size(tile), head, after(unit, head), scratch_[thread], out, out_stride);
  }

  void merge(int unit, int thread, T* out, int out_stride) {
    const std::vector<int>& rows = tiles_.merged_rows();
    const int end = std::min(int(rows.size()), (unit + 1) * kMergedRows);
    for (int i = unit * kMergedRows; i < end; i++)
      for (int head = 0; head < shape_.num_heads; head++)
        merge_head(rows[i], head, scratch_[thread], result(out, out_stride, rows[i], head));
  }

 private:
  struct Pages {
    const int32_t* first = nullptr;
    int count = 0;
  };

  // What stands in a table is used as an index.
  void check_pages(const Segment& segment) const {
    if (segment.num_rows == 0 || segment.num_keys == 0) return;
    const long first = segment.key_start / shape_.page_size;
    const long end = (segment.key_start + segment.num_keys + shape_.page_size - 1) / shape_.page_size;
    store_.check_readable(segment.pages + first, end - first);
  }

  // A tile, and the head that is read first of it. -1 for none.
  struct Following {
    int tile;
    int head;
  };

  // One head of a tile, from the first chunk that any query reaches into.
  struct Run {
    int layer, head;
    const Tile& tile;
    int begin;
    int num_queries;
    const T* queries;
    Following following;
  };

  // Some key heads of a tile.
  struct Unit {
    int tile;  // by size
    int first_head, end_head;
  };

  // Some keys of a tile, for one head, and what is read after them.
  struct Chunk {
    int layer, head;
    int key;  // the first, relative to the segment's
    bool is_first;
    Pages pages;
    int next_head;
    Pages next;
  };

  // Fetches what is read after a chunk, a few lines at a time: more would wait for one another. With many queries it is
  // done beside the weighing, which takes longest; with few, beside the products.
  class Fetch {
   public:
    Fetch() = default;
    Fetch(const Attention& a, const Chunk& chunk, int num_queries)
        : attention_(&a), layer_(chunk.layer), head_(chunk.next_head), pages_(chunk.next) {
      if (num_queries <= kTileBlock / 2)
        beside_tiles_ = 32;
      else
        beside_weights_ = num_queries <= kTileBlock ? 8 : 4;
    }

    void beside_tiles() { run(beside_tiles_); }
    void beside_weights() { run(beside_weights_); }

   private:
    void run(int num_lines) {
      if (num_lines == 0 || (line_ == end_ && !turn_page())) return;
      for (int i = 0; i < num_lines; i++, line_ += 64) prefetch(line_, 64);
    }

    bool turn_page() {
      if (pages_.count == 0) return false;
      line_ = reinterpret_cast<const char*>(attention_->store_.head(layer_, head_).keys(*pages_.first));
      end_ = line_ + long(attention_->page_lines()) * 64;  // a multiple of 32 lines
      pages_.first++;
      pages_.count--;
      return true;
    }

    const Attention* attention_ = nullptr;
    int layer_ = 0, head_ = 0;
    Pages pages_;
    int beside_tiles_ = 0, beside_weights_ = 0;  // lines
    const char *line_ = nullptr, *end_ = nullptr;
  };

  // A block of queries in a chunk: it is scored, weighed, and the values are added.
  struct Item {
    Chunk chunk;
    Weighed<T> weighed;
  };

  // Weighs the rows of an item, some at each call.
  class Weighing {
   public:
    Weighing(Softmax<T>& softmax, const Weighed<T>& weighed, Fetch& fetch)
        : softmax_(softmax), weighed_(weighed), fetch_(fetch) {
      softmax_.hide(weighed);
    }

    void some() {
      auto meanwhile = [this] { fetch_.beside_weights(); };
      if (row_ + 4 <= weighed_.num_queries) {
        softmax_.template weigh<4>(weighed_, row_, meanwhile);
        row_ += 4;
      } else if (row_ < weighed_.num_queries) {
        softmax_.template weigh<1>(weighed_, row_, meanwhile);
        row_++;
      }
    }

    void all() {
      while (row_ < weighed_.num_queries) some();
    }

   private:
    Softmax<T>& softmax_;
    const Weighed<T>& weighed_;
    Fetch& fetch_;
    int row_ = 0;
  };

  struct Scratch {
    Buffer<float> scores;  // [2][queries][chunk]
    Buffer<T> weights;     // [2][queries][chunk]
    Buffer<float> sums;    // [queries][padded_dim]
    Buffer<float> zeros;   // [padded_dim]
    std::vector<const T*> panels, next;
    Softmax<T> softmax;

    explicit Scratch(const Attention& a)
        : scores(2 * a.scores_size()),
          weights(2 * a.scores_size()),
          sums(long(a.max_queries() + kSpareRows) * a.shape_.padded_dim()),
          zeros(a.shape_.padded_dim()),
          panels(std::max(a.chunk_ / kPanel, a.chunk_ / a.shape_.page_size * (a.shape_.padded_dim() / kPanel))),
          next(panels.size()),
          softmax(a.max_queries()) {}
  };

  long scores_size() const { return long(max_queries() + kSpareRows) * chunk_; }

  // Of one head's keys and values in a page: cache lines.
  int page_lines() const { return shape_.page_size * shape_.padded_dim() * 2 * int(sizeof(T)) / 64; }

  int max_queries() const { return std::max(Tiles::kQueries, shape_.group()); }

  T* queries(int kv_head, int row) {
    return queries_.data() + (long(kv_head) * num_rows_ + row) * shape_.group() * shape_.padded_dim();
  }

  T* result(T* out, int out_stride, int row, int head) const {
    const int64_t place = places_ ? places_[row] : row;
    return out + place * out_stride + long(head) * shape_.head_dim;
  }

  // A large tile's heads go to the threads one by one, so that these end together; a small one's stay together, so that
  // the next head's keys are fetched while the last one's are used.
  void split_into_units() {
    units_.clear();
    const bool is_plenty = tiles_.num_tiles() >= kTilesPerThread * int(scratch_.size());
    for (int i = 0; i < tiles_.num_tiles(); i++) {
      const Tile& tile = tiles_.by_size(i);
      const bool is_small = long(tile.num_rows) * (tile.end_key - tile.first_key) <= kSmallTile;
      const int num_heads = is_small && is_plenty ? shape_.num_kv_heads : 1;
      for (int head = 0; head < shape_.num_kv_heads; head += num_heads) units_.push_back({i, head, head + num_heads});
    }
  }

  // What the thread is likely to read when it is done with this head: the unit's next one, or the first of a later unit.
  Following after(int unit, int head) const {
    if (head + 1 < units_[unit].end_head) return {units_[unit].tile, head + 1};
    const size_t later = unit + scratch_.size();
    return later < units_.size() ? Following{units_[later].tile, units_[later].first_head} : Following{-1, 0};
  }

  void attend_head(int layer, int window, const Tile& tile, int head, Following following, Scratch& scratch, T* out,
                   int out_stride) {
    const int num_queries = tile.num_rows * shape_.group();
    const int begin = find_visible(window, tile, scratch.softmax);
    const bool is_empty = begin >= tile.end_key;  // no row sees a key
    if (!is_empty) {
      const Run run{layer, head, tile, begin, num_queries, queries(head, tile.row), following};
      if (kHasTiles<T> && num_queries > kTileBlock)
        run_interleaved(run, scratch);
      else
        run_chunks(run, scratch);
    }
    for (int i = 0; i < num_queries; i++) {
      const float* sums = is_empty ? scratch.zeros.data() : scratch.sums.data() + long(i) * shape_.padded_dim();
      const int row = i / shape_.group(), query_head = head * shape_.group() + i % shape_.group();
      const int slot = tiles_.slot(tile, row);
      if (slot == Tiles::kAlone)
        write_result(scratch.softmax.running(i).sum, sums, result(out, out_stride, tile.row + row, query_head));
      else
        write_part(slot, query_head, scratch.softmax.running(i), sums);
    }
  }

  void run_chunks(const Run& run, Scratch& scratch) const {
    for (int index = 0; run.begin + index * chunk_ < run.tile.end_key; index++) {
      const Item item = item_of(run, index, 0, run.num_queries, 0, scratch);
      Fetch fetch(*this, item.chunk, run.num_queries);
      auto meanwhile = [&](const T*) { fetch.beside_tiles(); };
      score(item, run.queries, scratch, meanwhile);
      Weighing(scratch.softmax, item.weighed, fetch).all();
      add_values(item, scratch, meanwhile);
    }
  }

  // While the vector units weigh a block of queries, the tiles add the values of the block before it and score the one
  // after it: the block before it is never of the same queries, whose sums may be rescaled.
  void run_interleaved(const Run& run, Scratch& scratch) const {
    const int num_blocks = (run.num_queries + kTileBlock - 1) / kTileBlock;
    const int num_items = (run.tile.end_key - run.begin + chunk_ - 1) / chunk_ * num_blocks;
    const auto item = [&](int i) {
      const int first = i % num_blocks * kTileBlock;
      return item_of(run, i / num_blocks, first, std::min(kTileBlock, run.num_queries - first), i % 2, scratch);
    };
    const auto queries_of = [&](const Item& item) {
      return run.queries + long(item.weighed.query) * shape_.padded_dim();
    };
    auto idle = [](const T*) {};
    Item before{}, now = item(0);
    Fetch fetch;
    score(now, queries_of(now), scratch, idle);
    for (int i = 0; i < num_items; i++) {
      if (i % num_blocks == 0) fetch = Fetch(*this, now.chunk, run.num_queries);
      Weighing weighing(scratch.softmax, now.weighed, fetch);
      auto meanwhile = [&](const T*) { weighing.some(); };
      if (i > 0) add_values(before, scratch, meanwhile);
      before = now;
      if (i + 1 == num_items) {
        weighing.all();
        break;
      }
      const Item next = item(i + 1);
      score(next, queries_of(next), scratch, meanwhile);
      weighing.all();
      now = next;
    }
    add_values(before, scratch, idle);
  }

  // A block of queries in the chunk number `index`. turn: of the two places for scores and weights.
  Item item_of(const Run& run, int index, int first, int num_queries, int turn, Scratch& scratch) const {
    const int key = run.begin + index * chunk_;
    const Segment& segment = segments_[run.tile.segment];
    Item item;
    item.chunk = {run.layer, run.head, key, index == 0, pages_at(segment, run.tile, key), run.head, {}};
    if (key + chunk_ < run.tile.end_key) {
      item.chunk.next = pages_at(segment, run.tile, key + chunk_);
    } else if (run.following.tile >= 0) {
      const Tile& tile = tiles_.by_size(run.following.tile);
      item.chunk.next_head = run.following.head;
      item.chunk.next = pages_at(segments_[tile.segment], tile, &tile == &run.tile ? run.begin : tile.first_key);
    }
    item.weighed = {first,
                    num_queries,
                    key,
                    item.chunk.pages.count * shape_.page_size,
                    index == 0,
                    scratch.scores.data() + turn * scores_size(),
                    scratch.weights.data() + turn * scores_size(),
                    chunk_,
                    scratch.sums.data() + long(first) * shape_.padded_dim(),
                    shape_.padded_dim()};
    return item;
  }

  // The pages of a tile's chunk at `key`.
  Pages pages_at(const Segment& segment, const Tile& tile, int key) const {
    const int num_keys = std::min(tile.end_key - key, chunk_);
    return {segment.pages + (segment.key_start + key) / shape_.page_size,
            (num_keys + shape_.page_size - 1) / shape_.page_size};
  }

  // Fills in what each query sees; returns the first chunk that any of them reaches into.
  int find_visible(int window, const Tile& tile, Softmax<T>& softmax) const {
    const Segment& segment = segments_[tile.segment];
    softmax.begin();
    int earliest = tile.end_key;
    const int group = shape_.group();
    for (int r = 0; r < tile.num_rows; r++) {
      const int row = tile.row + r;
      const int first = window ? std::max<int>(0, int(positions_[row] - window + 1 - segment.key_start)) : 0;
      const int limit = std::min(int(segment.limit(row)), tile.end_key);
      const uint64_t mask = tree_mask(segment, row, window, tile.end_key - limit);
      for (int i = r * group; i < (r + 1) * group; i++) softmax.begin_query(i, first, limit, mask);
      earliest = std::min(earliest, mask ? std::min(first, limit) : first);
    }
    return std::max(tile.first_key, earliest / chunk_ * chunk_);
  }

  // Which of a tree's first `num_keys` keys the row sees. They are rows of this step and have their positions.
  uint64_t tree_mask(const Segment& segment, int row, int window, int num_keys) const {
    uint64_t mask = segment.mask(row);
    for (int j = 0; j < 64 && mask >> j != 0; j++) {
      const bool is_far = window && positions_[segment.row_start + j] <= positions_[row] - window;
      if (is_far || j >= num_keys) mask &= ~(uint64_t(1) << j);
    }
    return mask;
  }

  // Scores of a chunk's keys. A page has as many panels of values, which the vector products fetch meanwhile.
  template <class Meanwhile>
  void score(const Item& item, const T* queries, Scratch& scratch, Meanwhile& meanwhile) const {
    const Chunk& chunk = item.chunk;
    const int per_page = shape_.page_size / kPanel;
    const long size = long(kPanel) * shape_.padded_dim();
    const auto head = store_.head(chunk.layer, chunk.head);
    for (int i = 0; i < chunk.pages.count; i++) {
      const T* const keys = head.keys(chunk.pages.first[i]);
      const T* const values = head.values_behind(keys);
      for (int j = 0; j < per_page; j++) {
        scratch.panels[i * per_page + j] = keys + j * size;
        scratch.next[i * per_page + j] = values + j * size;
      }
    }
    Product<T> product;
    product.a = queries;
    product.lda = shape_.padded_dim();
    product.panels = scratch.panels.data();
    product.num_panels = chunk.pages.count * per_page;
    product.num_blocks = 1;
    product.num_steps = shape_.padded_dim() / Element<T>::kDepth;
    product.c = item.weighed.scores;
    product.ldc = chunk_;
    product.adds = false;
    product.next = scratch.next.data();
    multiply(product, item.weighed.num_queries, meanwhile);
  }

  // The chunk's values by their weights. The vector products fetch the next keys meanwhile.
  template <class Meanwhile>
  void add_values(const Item& item, Scratch& scratch, Meanwhile& meanwhile) const {
    const Chunk& chunk = item.chunk;
    const int num_panels = shape_.padded_dim() / kPanel;
    const long size = long(kPanel) * shape_.page_size;
    const auto head = store_.head(chunk.layer, chunk.head), next_head = store_.head(chunk.layer, chunk.next_head);
    for (int i = 0; i < chunk.pages.count; i++) {
      const T* const values = head.values_behind(head.keys(chunk.pages.first[i]));
      const T* const next = i < chunk.next.count ? next_head.keys(chunk.next.first[i]) : values;
      for (int j = 0; j < num_panels; j++) {
        scratch.panels[i * num_panels + j] = values + j * size;
        scratch.next[i * num_panels + j] = next + j * size;
      }
    }
    Product<T> product;
    product.a = item.weighed.weights;
    product.lda = chunk_;
    product.panels = scratch.panels.data();
    product.num_panels = num_panels;
    product.num_blocks = chunk.pages.count;
    product.num_steps = shape_.page_size / Element<T>::kDepth;
    product.c = item.weighed.sums;
    product.ldc = shape_.padded_dim();
    product.adds = !chunk.is_first;
    product.next = chunk.next.count > 0 ? scratch.next.data() : nullptr;
    multiply(product, item.weighed.num_queries, meanwhile);
  }

  void write_result(float sum, const float* sums, T* to) const {
    convert(to, sums, shape_.head_dim, sum > 0 ? 1.f / sum : 0.f);
  }

  float* part(int slot, int head) {
    return parts_.data() + (long(slot) * shape_.num_heads + head) * shape_.padded_dim();
  }

  void write_part(int slot, int head, const Running& running, const float* sums) {
    running_[long(slot) * shape_.num_heads + head] = running;
    memcpy(part(slot, head), sums, shape_.padded_dim() * sizeof(float));
  }

  void merge_head(int row, int head, Scratch& scratch, T* to) {
    const int first = tiles_.first_part(row), end = first + tiles_.num_parts(row);
    float base = Running::kUnseen, sum = 0;
    for (int slot = first; slot < end; slot++)
      base = std::max(base, running_[long(slot) * shape_.num_heads + head].base);
    float* sums = scratch.sums.data();
    memset(sums, 0, shape_.padded_dim() * sizeof(float));
    for (int slot = first; slot < end; slot++) {
      const Running& running = running_[long(slot) * shape_.num_heads + head];
      if (running.sum == 0) continue;
      const float weight = exp2f(running.base - base);
      sum += running.sum * weight;
      const float* from = part(slot, head);
      for (int d = 0; d < shape_.padded_dim(); d += kLanes)
        store(sums + d, load(sums + d) + load(from + d) * splat(weight));
    }
    write_result(sum, sums, to);
  }

  const AttentionShape shape_;
  KVStore<T> store_;
  const int chunk_;  // keys
  Tiles tiles_;
  std::vector<Unit> units_;
  const Segment* segments_ = nullptr;
  const int64_t* positions_ = nullptr;
  const int64_t* places_ = nullptr;
  int num_rows_ = 0;
  Buffer<T> queries_;  // [kv_heads][rows][group][padded_dim]
  Buffer<float> parts_;
  std::vector<Running> running_;
  std::vector<Scratch> scratch_;
};

}  // namespace headwater
