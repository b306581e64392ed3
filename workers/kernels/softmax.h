// The softmax of a tile's queries, as far as it has come, chunk of keys by chunk (online softmax, arXiv 1805.02867).
//
// Scores are in base 2. A query's sum is that of 2^(score - base). The base need not be the highest score, only so near
// that nothing overflows: it is raised when a score exceeds it by more than kSlack, so that most chunks are gone over
// once and nothing is rescaled (FlashAttention-4 defers rescaling likewise). What becomes of a query does not depend on
// those beside it.
#pragma once

#include <algorithm>
#include <cmath>
#include <vector>

#include "buffer.h"
#include "element.h"

namespace headwater {

// How far one query has come.
struct Running {
  static constexpr float kUnseen = kLowest / 2;  // below any score of a key, above that of a hidden one
  static constexpr float kSlack = 32;

  float base = kUnseen;
  float sum = 0;
};

// The scores of some queries for a chunk of keys, which become weights.
template <class T>
struct Weighed {
  int query;  // the first; the arrays begin with it
  int num_queries;
  int key;  // the first, relative to the segment's
  int num_keys;
  bool is_first;  // nothing has been summed up yet
  float* scores;  // [queries][stride]
  T* weights;     // [queries][stride]
  int stride;
  float* sums;  // [queries][sums_size]: of values by weights so far
  int sums_size;
};

template <class T>
class Softmax {
 public:
  explicit Softmax(int max_queries)
      : base_(max_queries),
        sums_(size_t(max_queries) * kLanes),
        first_(max_queries),
        limit_(max_queries),
        mask_(max_queries) {}

  Running running(int query) const { return {base_[query], sum_of(load(sums_.data() + long(query) * kLanes))}; }

  void begin() {
    latest_first_ = 0;
    earliest_limit_ = INT32_MAX;
  }

  // A query sees the keys [first, limit), and of those after them the ones in its mask.
  void begin_query(int query, int first, int limit, uint64_t mask) {
    base_[query] = Running::kUnseen;
    store(sums_of(query), Vec{});
    first_[query] = first;
    limit_[query] = limit;
    mask_[query] = mask;
    latest_first_ = std::max(latest_first_, first);
    earliest_limit_ = std::min(earliest_limit_, limit);
  }

  // The scores of keys that a query must not see become the lowest.
  void hide(const Weighed<T>& w) const {
    if (latest_first_ <= w.key && w.key + w.num_keys <= earliest_limit_) return;
    for (int i = 0; i < w.num_queries; i++)
      if (first_[w.query + i] > w.key || limit_[w.query + i] < w.key + w.num_keys) hide_row(w, i);
  }

  // Rows [row, row + kCount), whose long chains of operations overlap. `meanwhile()` is called now and then.
  template <int kCount, class Meanwhile>
  void weigh(const Weighed<T>& w, int row, Meanwhile& meanwhile) {
    if (w.is_first) raise<kCount>(w, row);
    if (add_weights<kCount>(w, row, meanwhile)) return;
    raise<kCount>(w, row);
    add_weights<kCount>(w, row, meanwhile);
  }

 private:
  // False, and nothing added to the sums, where a score exceeds its base by too much.
  template <int kCount, class Meanwhile>
  bool add_weights(const Weighed<T>& w, int row, Meanwhile& meanwhile) {
    const float* scores = w.scores + long(row) * w.stride;
    T* weights = w.weights + long(row) * w.stride;
    Vec base[kCount], highest[kCount], sums[kCount];
    for (int q = 0; q < kCount; q++) {
      base[q] = splat(base_[w.query + row + q]);
      highest[q] = base[q];
      sums[q] = load(sums_of(w.query + row + q));
    }
    for (int i = 0; i < w.num_keys; i += kLanes) {
      meanwhile();
      for (int q = 0; q < kCount; q++) {
        const Vec score = load(scores + long(q) * w.stride + i);
        const Vec weight = exp2_of<Element<T>::kExpDegree>(score - base[q]);
        highest[q] = maximum(highest[q], score);
        sums[q] += weight;
        store_as(weights + long(q) * w.stride + i, weight);
      }
    }
    Vec excess = highest[0] - base[0];
    for (int q = 1; q < kCount; q++) excess = maximum(excess, highest[q] - base[q]);
    if (any_above(excess, splat(Running::kSlack))) return false;
    for (int q = 0; q < kCount; q++) store(sums_of(w.query + row + q), sums[q]);
    return true;
  }

  // The bases that are too low become the highest scores so far, and what was summed up by them is brought in line.
  template <int kCount>
  void raise(const Weighed<T>& w, int row) {
    for (int r = row; r < row + kCount; r++) {
      float& base = base_[w.query + r];
      Vec scores = splat(base);
      for (int i = 0; i < w.num_keys; i += kLanes) scores = maximum(scores, load(w.scores + long(r) * w.stride + i));
      const float highest = max_of(scores);
      if (!w.is_first && highest <= base + Running::kSlack) continue;
      const Vec kept = splat(exp2f(base - highest));  // nothing, of what was unseen
      base = highest;
      if (w.is_first) continue;
      float* const sum = sums_of(w.query + r);
      store(sum, load(sum) * kept);
      float* sums = w.sums + long(r) * w.sums_size;
      for (int d = 0; d < w.sums_size; d += kLanes) store(sums + d, load(sums + d) * kept);
    }
  }

  void hide_row(const Weighed<T>& w, int row) const {
    float* scores = w.scores + long(row) * w.stride;
    const int query = w.query + row;
    const int first = std::clamp(first_[query] - w.key, 0, w.num_keys);
    const int limit = limit_[query] - w.key;  // may be before or behind this chunk
    std::fill(scores, scores + first, kLowest);
    const uint64_t mask = mask_[query];
    const int begin = std::clamp(limit, 0, w.num_keys);
    const int end = mask == 0 ? begin : std::clamp(limit + 64, begin, w.num_keys);
    for (int i = begin; i < end; i++)
      if (!(mask >> (i - limit) & 1)) scores[i] = kLowest;
    std::fill(scores + end, scores + w.num_keys, kLowest);
  }

  float* sums_of(int query) { return sums_.data() + long(query) * kLanes; }

  std::vector<float> base_;
  Buffer<float> sums_;  // [queries][lanes], to be added up
  std::vector<int> first_, limit_;
  std::vector<uint64_t> mask_;
  int latest_first_ = 0, earliest_limit_ = 0;
};

}  // namespace headwater
