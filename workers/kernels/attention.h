// Attention over a step's segments, and the store of keys and values.
//
// A tile's queries (its rows times the heads of a group) go over their keys in chunks with a running maximum and sum
// (online softmax, arXiv 1805.02867). A row of several tiles gets their merge by log-sum-exp in float (Hydragen, arXiv
// 2402.05099, equation 4). Scores are in base 2: queries are scaled by log2(e) / sqrt(head_dim).
//
// A page holds, for each key head, its keys and then its values as panels (see element.h):
//
//     keys    [page_size / 32] panels of [padded_dim / depth][32 keys][depth]
//     values  [padded_dim / 32] panels of [page_size / depth][32 dims][depth]
#pragma once

#include <cmath>

#include "buffer.h"
#include "crew.h"
#include "product.h"
#include "segments.h"

namespace headwater {

struct AttentionShape {
  int num_layers;
  int num_pages;
  int page_size;  // tokens; a multiple of 32
  int num_heads;
  int num_kv_heads;
  int head_dim;

  int group() const { return num_heads / num_kv_heads; }
  int padded_dim() const { return round_up(head_dim, kPanel); }
};

template <class T>
class KVStore {
 public:
  explicit KVStore(const AttentionShape& shape)
      : shape_(shape),
        half_(long(shape.page_size) * shape.padded_dim()),
        data_(size_t(shape.num_layers) * shape.num_pages * shape.num_kv_heads * half_ * 2) {
    data_.populate();
  }

  const T* keys(int layer, int page, int head) const { return data_.data() + offset(layer, page, head); }
  const T* values(int layer, int page, int head) const { return keys(layer, page, head) + half_; }

  // slot = page * page_size + place in the page
  void write_key(int layer, long slot, int head, const T* key) {
    constexpr int depth = Element<T>::kDepth;
    const int place = int(slot % shape_.page_size);
    T* const panel = data_.data() + offset(layer, int(slot / shape_.page_size), head) +
                     long(place / kPanel) * kPanel * shape_.padded_dim();
    for (int d = 0; d < shape_.head_dim; d += depth)
      memcpy(panel + place_in_panel<T>(d / depth, place % kPanel), key + d, depth * sizeof(T));
  }

  void write_value(int layer, long slot, int head, const T* value) {
    constexpr int depth = Element<T>::kDepth;
    const int place = int(slot % shape_.page_size);
    T* panel = data_.data() + offset(layer, int(slot / shape_.page_size), head) + half_ + place % depth;
    for (int d = 0; d < shape_.head_dim; d += kPanel, panel += long(kPanel) * shape_.page_size)
      for (int i = 0; i < std::min(kPanel, shape_.head_dim - d); i++)
        panel[place_in_panel<T>(place / depth, i)] = value[d + i];
  }

  // Before a page's first key and value are written: what others left in it must not reach a product, not even
  // with a weight of zero, for it may be no number.
  void clear_page_before(int layer, long slot) {
    if (slot % shape_.page_size != 0) return;
    for (int head = 0; head < shape_.num_kv_heads; head++)
      memset(static_cast<void*>(page(layer, int(slot / shape_.page_size), head)), 0, half_ * 2 * sizeof(T));
  }

  void copy_page(int source, int target) {
    for (int layer = 0; layer < shape_.num_layers; layer++)
      for (int head = 0; head < shape_.num_kv_heads; head++)
        memcpy(page(layer, target, head), page(layer, source, head), half_ * 2 * sizeof(T));
  }

 private:
  T* page(int layer, int page, int head) { return data_.data() + offset(layer, page, head); }

  // A head's pages follow one another: those that were handed out together are read as one stream.
  long offset(int layer, int page, int head) const {
    return ((long(layer) * shape_.num_kv_heads + head) * shape_.num_pages + page) * half_ * 2;
  }

  AttentionShape shape_;
  long half_;  // elements of one head's keys in a page
  Buffer<T> data_;
};

// The softmax of one row, as far as it has come: sum = sum of 2^(score - base).
//
// The base need not be the highest score, only so near that nothing overflows; it is raised when a score exceeds it by
// more than kSlack. (FlashAttention-4 defers rescaling likewise.)
struct Running {
  static constexpr float kUnseen = kLowest / 2;  // below any score of a key, above that of a hidden one
  static constexpr float kSlack = 32;

  float base = kUnseen;
  float sum = 0;
};

template <class T>
class Attention {
 public:
  // Keys that are scored before they are weighed, or one page if that is more. Scores, weights, sums, keys and values of
  // a chunk share the first-level cache.
  static constexpr int kChunk = kHasTiles<T> ? 64 : 128;
  static constexpr int kSplitKeys = 2048;  // of one tile, rounded up to whole chunks
  static constexpr int kSpareRows = 32;  // AMX reads and writes whole tiles
  static constexpr int kTileBlock = 32;  // queries that go through a chunk together where there are tiles
  static constexpr int kMergedRows = 8;  // per unit
  static constexpr long kSmallTile = 4096;  // rows times keys
  static constexpr int kTilesPerThread = 4;

  Attention(const AttentionShape& shape, int num_threads)
      : shape_(shape), store_(shape), chunk_(round_up(std::max(kChunk, shape.page_size), shape.page_size)) {
    for (int i = 0; i < num_threads; i++) scratch_.emplace_back(*this);
  }

  const AttentionShape& shape() const { return shape_; }
  KVStore<T>& kv() { return store_; }

  // Cuts the step. `positions` and the segments, with what they point at, must live until the step is done.
  void begin(const Segment* segments, int num_segments, const int64_t* positions, int num_rows) {
    segments_ = segments;
    positions_ = positions;
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
      attend_head(layer, window, tiles_.by_size(tile), head, head + 1 < end_head, scratch_[thread], out, out_stride);
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

  // Some key heads of a tile.
  struct Unit {
    int tile;  // by size
    int first_head, end_head;
  };

  // Some keys of a tile, for one head.
  struct Chunk {
    int layer, head;
    int key;  // the first, relative to the segment's
    bool is_first;
    Pages pages;
    int next_head;  // what comes after: to be fetched meanwhile
    Pages next;
  };

  // Fetches the next chunk, a few lines at a time: more would wait for one another. With many queries it is done beside
  // the weighing, which takes longest; with few, beside the tiles.
  class Fetch {
   public:
    Fetch(const Attention& a, const Chunk& chunk, bool is_tall)
        : attention_(a), chunk_(chunk), is_tall_(is_tall), pages_left_(chunk.next.count) {}

    void beside_tiles() {
      if (!is_tall_) run<32>();
    }
    void beside_weights() {
      if (is_tall_) run<4>();
    }

   private:
    template <int kLines>
    void run() {
      if (line_ == end_ && !turn_page()) return;
      for (int i = 0; i < kLines; i++, line_ += 64) prefetch(line_, 64);
    }

    bool turn_page() {
      if (pages_left_ == 0) return false;
      const int page = chunk_.next.first[chunk_.next.count - pages_left_--];
      line_ = reinterpret_cast<const char*>(attention_.store_.keys(chunk_.layer, page, chunk_.next_head));
      end_ = line_ + long(attention_.page_lines()) * 64;
      return true;
    }

    const Attention& attention_;
    const Chunk& chunk_;
    const bool is_tall_;
    int pages_left_;
    const char *line_ = nullptr, *end_ = nullptr;
  };

  struct Scratch {
    Buffer<float> scores;  // [queries][chunk]
    Buffer<T> weights;     // [queries][chunk]
    Buffer<float> sums;    // [queries][padded_dim]
    Buffer<float> zeros;   // [padded_dim]
    std::vector<const T*> panels, next;
    std::vector<Running> running;
    std::vector<int> first, limit;  // the keys that a query sees: [first, limit), and those of its mask
    std::vector<uint64_t> mask;

    explicit Scratch(const Attention& a)
        : scores(long(a.max_queries() + kSpareRows) * a.chunk_),
          weights(long(a.max_queries() + kSpareRows) * a.chunk_),
          sums(long(a.max_queries() + kSpareRows) * a.shape_.padded_dim()),
          zeros(a.shape_.padded_dim()),
          panels(std::max(a.chunk_ / kPanel, a.chunk_ / a.shape_.page_size * (a.shape_.padded_dim() / kPanel))),
          next(panels.size()),
          running(a.max_queries()),
          first(a.max_queries()),
          limit(a.max_queries()),
          mask(a.max_queries()) {}
  };

  // Of one head's keys and values in a page: cache lines.
  int page_lines() const { return shape_.page_size * shape_.padded_dim() * 2 * int(sizeof(T)) / 64; }

  void multiply(const Product<T>& product, int num_rows, Fetch& fetch) const {
#if defined(HEADWATER_AMX)
    if constexpr (kHasTiles<T>) {
      auto meanwhile = [&](const T*) { fetch.beside_tiles(); };
      return multiply_tiles(product, num_rows, meanwhile);
    }
#endif
    headwater::multiply(product, num_rows);
  }

  int max_queries() const { return std::max(Tiles::kQueries, shape_.group()); }

  T* queries(int kv_head, int row) {
    return queries_.data() + (long(kv_head) * num_rows_ + row) * shape_.group() * shape_.padded_dim();
  }

  T* result(T* out, int out_stride, int row, int head) const {
    return out + long(row) * out_stride + long(head) * shape_.head_dim;
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

  void attend_head(int layer, int window, const Tile& tile, int head, bool has_next, Scratch& scratch, T* out,
                   int out_stride) {
    const int num_queries = tile.num_rows * shape_.group();
    for (int i = 0; i < num_queries; i++) scratch.running[i] = Running{};
    const bool is_empty = !run_chunks(layer, window, tile, head, has_next, num_queries, scratch);
    for (int i = 0; i < num_queries; i++) {
      const float* sums = is_empty ? scratch.zeros.data() : scratch.sums.data() + long(i) * shape_.padded_dim();
      const int row = i / shape_.group(), query_head = head * shape_.group() + i % shape_.group();
      const int slot = tiles_.slot(tile, row);
      if (slot == Tiles::kAlone)
        write_result(scratch.running[i].sum, sums, result(out, out_stride, tile.row + row, query_head));
      else
        write_part(slot, query_head, scratch.running[i], sums);
    }
  }

  // False where no row sees a key.
  bool run_chunks(int layer, int window, const Tile& tile, int head, bool has_next, int num_queries,
                  Scratch& scratch) {
    const Segment& segment = segments_[tile.segment];
    const int begin = find_visible(segment, window, tile, scratch);
    for (int key = begin; key < tile.end_key; key += chunk_) {
      const bool is_last = key + chunk_ >= tile.end_key;
      Chunk chunk{layer, head, key, key == begin, pages_at(segment, tile, key), is_last ? head + 1 : head, {}};
      if (!is_last) chunk.next = pages_at(segment, tile, key + chunk_);
      if (is_last && has_next) chunk.next = pages_at(segment, tile, begin);
      run_chunk(chunk, queries(head, tile.row), num_queries, scratch);
    }
    return begin < tile.end_key;
  }

  // Tiles take a block of queries through the whole chunk, so that its scores stay in the first-level cache.
  void run_chunk(const Chunk& chunk, const T* queries, int num_queries, Scratch& scratch) const {
    const int block = kHasTiles<T> ? kTileBlock : num_queries;
    Fetch fetch(*this, chunk, num_queries > kTileBlock / 2);
    for (int first = 0; first < num_queries; first += block) {
      const int count = std::min(block, num_queries - first);
      score(chunk, queries + long(first) * shape_.padded_dim(), count, fetch, scratch);
      weigh_all(chunk, first, count, fetch, scratch);
      add_values(chunk, first, count, fetch, scratch);
    }
  }

  // The pages of a tile's chunk at `key`.
  Pages pages_at(const Segment& segment, const Tile& tile, int key) const {
    const int num_keys = std::min(tile.end_key - key, chunk_);
    return {segment.pages + (segment.key_start + key) / shape_.page_size,
            (num_keys + shape_.page_size - 1) / shape_.page_size};
  }

  // Fills in what each query sees; returns the first chunk that any of them reaches into.
  int find_visible(const Segment& segment, int window, const Tile& tile, Scratch& scratch) const {
    int earliest = tile.end_key;
    const int group = shape_.group();
    for (int r = 0; r < tile.num_rows; r++) {
      const int row = tile.row + r;
      const int first = window ? std::max<int>(0, int(positions_[row] - window + 1 - segment.key_start)) : 0;
      const int limit = std::min(int(segment.limit(row)), tile.end_key);
      const uint64_t mask = tree_mask(segment, row, window, tile.end_key - limit);
      for (int i = r * group; i < (r + 1) * group; i++) {
        scratch.first[i] = first;
        scratch.limit[i] = limit;
        scratch.mask[i] = mask;
      }
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

  // Scores of a chunk's keys. Meanwhile, if wished, its values are fetched: a page has as many of them.
  void score(const Chunk& chunk, const T* queries, int num_queries, Fetch& fetch, Scratch& scratch) const {
    const int per_page = shape_.page_size / kPanel;
    const long size = long(kPanel) * shape_.padded_dim();
    for (int i = 0; i < chunk.pages.count; i++)
      for (int j = 0; j < per_page; j++) {
        scratch.panels[i * per_page + j] = store_.keys(chunk.layer, chunk.pages.first[i], chunk.head) + j * size;
        scratch.next[i * per_page + j] = store_.values(chunk.layer, chunk.pages.first[i], chunk.head) + j * size;
      }
    Product<T> product;
    product.a = queries;
    product.lda = shape_.padded_dim();
    product.panels = scratch.panels.data();
    product.num_panels = chunk.pages.count * per_page;
    product.num_blocks = 1;
    product.num_steps = shape_.padded_dim() / Element<T>::kDepth;
    product.c = scratch.scores.data();
    product.ldc = chunk_;
    product.adds = false;
    product.next = scratch.next.data();
    multiply(product, num_queries, fetch);
  }

  // The chunk's values by their weights. Meanwhile, if wished, the keys of the next pages are fetched.
  void add_values(const Chunk& chunk, int query, int num_queries, Fetch& fetch, Scratch& scratch) const {
    const int num_panels = shape_.padded_dim() / kPanel;
    const long size = long(kPanel) * shape_.page_size;
    for (int i = 0; i < chunk.pages.count; i++)
      for (int j = 0; j < num_panels; j++) {
        const T* panel = store_.values(chunk.layer, chunk.pages.first[i], chunk.head) + j * size;
        scratch.panels[i * num_panels + j] = panel;
        scratch.next[i * num_panels + j] =
            i < chunk.next.count ? store_.keys(chunk.layer, chunk.next.first[i], chunk.next_head) + j * size : panel;
      }
    Product<T> product;
    product.a = scratch.weights.data();
    product.lda = chunk_;
    product.panels = scratch.panels.data();
    product.num_panels = num_panels;
    product.num_blocks = chunk.pages.count;
    product.num_steps = shape_.page_size / Element<T>::kDepth;
    product.c = scratch.sums.data() + long(query) * shape_.padded_dim();
    product.ldc = shape_.padded_dim();
    product.adds = !chunk.is_first;
    product.next = chunk.next.count > 0 ? scratch.next.data() : nullptr;
    multiply(product, num_queries, fetch);
  }

  // The scores of a block of queries become weights, several queries at a time: their long chains of operations overlap.
  void weigh_all(const Chunk& chunk, int first, int count, Fetch& fetch, Scratch& scratch) const {
    const int num_keys = chunk.pages.count * shape_.page_size;
    for (int i = 0; i < count; i++)
      if (scratch.first[first + i] > chunk.key || scratch.limit[first + i] < chunk.key + num_keys)
        hide(first + i, i, chunk.key, num_keys, scratch);
    int i = 0;
    for (; i + 4 <= count; i += 4) weigh<4>(first + i, i, num_keys, chunk.is_first, fetch, scratch);
    for (; i < count; i++) weigh<1>(first + i, i, num_keys, chunk.is_first, fetch, scratch);
  }

  // Queries whose scores begin at a row of the scratch: one pass, unless a base must be raised first.
  template <int kCount>
  void weigh(int query, int row, int num_keys, bool is_first, Fetch& fetch, Scratch& scratch) const {
    if (is_first) raise<kCount>(query, row, num_keys, is_first, scratch);
    if (add_weights<kCount>(query, row, num_keys, fetch, scratch)) return;
    raise<kCount>(query, row, num_keys, is_first, scratch);
    add_weights<kCount>(query, row, num_keys, fetch, scratch);
  }

  // False, and nothing added to the sums, where a score exceeds its base by too much.
  template <int kCount>
  bool add_weights(int query, int row, int num_keys, Fetch& fetch, Scratch& scratch) const {
    const float* scores = scratch.scores.data() + long(row) * chunk_;
    T* weights = scratch.weights.data() + long(row) * chunk_;
    Vec base[kCount], highest[kCount], sums[kCount];
    for (int q = 0; q < kCount; q++) {
      base[q] = splat(scratch.running[query + q].base);
      highest[q] = base[q];
      sums[q] = Vec{};
    }
    for (int i = 0; i < num_keys; i += kLanes) {
      fetch.beside_weights();
      for (int q = 0; q < kCount; q++) {
        const Vec score = load(scores + long(q) * chunk_ + i);
        const Vec weight = exp2_of<Element<T>::kExpDegree>(score - base[q]);
        highest[q] = maximum(highest[q], score);
        sums[q] += weight;
        store_as(weights + long(q) * chunk_ + i, weight);
      }
    }
    for (int q = 0; q < kCount; q++)
      if (any_above(highest[q], base[q] + splat(Running::kSlack))) return false;
    for (int q = 0; q < kCount; q++) scratch.running[query + q].sum += sum_of(sums[q]);
    return true;
  }

  // The bases that are too low become the highest scores so far, and what was summed up by them is brought in line. A
  // query's base does not depend on those beside it.
  template <int kCount>
  void raise(int query, int row, int num_keys, bool is_first, Scratch& scratch) const {
    const float* scores = scratch.scores.data() + long(row) * chunk_;
    for (int q = 0; q < kCount; q++) {
      Running& running = scratch.running[query + q];
      Vec highest = splat(running.base);
      for (int i = 0; i < num_keys; i += kLanes) highest = maximum(highest, load(scores + long(q) * chunk_ + i));
      const float base = max_of(highest);
      if (!is_first && base <= running.base + Running::kSlack) continue;
      const float kept = running.sum > 0 ? exp2f(running.base - base) : 0.f;
      running.base = base;
      running.sum *= kept;
      if (is_first) continue;
      float* sums = scratch.sums.data() + long(query + q) * shape_.padded_dim();
      for (int d = 0; d < shape_.padded_dim(); d += kLanes) store(sums + d, load(sums + d) * splat(kept));
    }
  }

  // The scores of the keys that a query must not see become the lowest.
  void hide(int query, int row, int key, int num_keys, Scratch& scratch) const {
    float* scores = scratch.scores.data() + long(row) * chunk_;
    const int first = std::clamp(scratch.first[query] - key, 0, num_keys);
    const int limit = scratch.limit[query] - key;  // may be before or behind this chunk
    std::fill(scores, scores + first, kLowest);
    const uint64_t mask = scratch.mask[query];
    const int begin = std::clamp(limit, 0, num_keys);
    const int end = mask == 0 ? begin : std::clamp(limit + 64, begin, num_keys);
    for (int i = begin; i < end; i++)
      if (!(mask >> (i - limit) & 1)) scores[i] = kLowest;
    std::fill(scores + end, scores + num_keys, kLowest);
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
  int num_rows_ = 0;
  Buffer<T> queries_;  // [kv_heads][rows][group][padded_dim]
  Buffer<float> parts_;
  std::vector<Running> running_;
  std::vector<Scratch> scratch_;
};

}  // namespace headwater
