// The store of keys and values, in pages.
//
// A page holds, for each key head, its keys and then its values as panels (see element.h):
//
//     keys    [page_size / 32] panels of [padded_dim / depth] steps by 32 keys
//     values  [padded_dim / 32] panels of [page_size / depth] steps by 32 dims
#pragma once

#include <algorithm>

#include "buffer.h"
#include "element.h"

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
    constexpr int depth = Element<T>::kDepth, run = kRunSteps<T>;
    const int place = int(slot % shape_.page_size);
    T* const keys = page(layer, int(slot / shape_.page_size), head);
    T* const panel = keys + long(place / kPanel) * kPanel * shape_.padded_dim();
    for (int d = 0; d < shape_.head_dim; d += run * depth) {
      T* const to = panel + place_in_panel<T>(d / depth, place % kPanel);
      const int num_steps = std::min(run, (shape_.head_dim - d) / depth);
      for (int i = 0; i < num_steps; i++) memcpy(to + long(i) * kRunStride<T>, key + d + i * depth, depth * sizeof(T));
    }
  }

  void write_value(int layer, long slot, int head, const T* value) {
    constexpr int depth = Element<T>::kDepth, side = kPanel / 2;
    const int place = int(slot % shape_.page_size);
    T* const values = page(layer, int(slot / shape_.page_size), head) + half_ + place % depth;
    for (int d = 0; d < shape_.head_dim; d += side) {
      T* const panel = values + long(d / kPanel) * kPanel * shape_.page_size;
      T* const to = panel + place_in_panel<T>(place / depth, d % kPanel);
      const int num_dims = std::min(side, shape_.head_dim - d);
      for (int i = 0; i < num_dims; i++) to[i * depth] = value[d + i];
    }
  }

  // Before a page's first key and value are written: what others left in it must not reach a product, not even
  // with a weight of zero, for it may be no number.
  void clear_page_before(int layer, long slot) {
    if (slot % shape_.page_size != 0) return;
    for (int head = 0; head < shape_.num_kv_heads; head++)
      memset(static_cast<void*>(page(layer, int(slot / shape_.page_size), head)), 0, half_ * 2 * sizeof(T));
  }

  // From one slot to another, whose page has been cleared.
  void copy_token(long source, long target) {
    constexpr int depth = Element<T>::kDepth;
    for (int layer = 0; layer < shape_.num_layers; layer++)
      for (int head = 0; head < shape_.num_kv_heads; head++)
        for (int d = 0; d < shape_.head_dim; d++) {
          if (d % depth == 0)
            memcpy(key_at(layer, target, head, d), key_at(layer, source, head, d), depth * sizeof(T));
          *value_at(layer, target, head, d) = *value_at(layer, source, head, d);
        }
  }

  void copy_page(int source, int target) {
    for (int layer = 0; layer < shape_.num_layers; layer++)
      for (int head = 0; head < shape_.num_kv_heads; head++)
        memcpy(page(layer, target, head), page(layer, source, head), half_ * 2 * sizeof(T));
  }

 private:
  // One element of a key; those of its step follow.
  T* key_at(int layer, long slot, int head, int d) {
    const int place = int(slot % shape_.page_size);
    T* const keys = page(layer, int(slot / shape_.page_size), head);
    T* const panel = keys + long(place / kPanel) * kPanel * shape_.padded_dim();
    return panel + place_in_panel<T>(d / Element<T>::kDepth, place % kPanel);
  }

  T* value_at(int layer, long slot, int head, int d) {
    constexpr int depth = Element<T>::kDepth;
    const int place = int(slot % shape_.page_size);
    T* const values = page(layer, int(slot / shape_.page_size), head) + half_;
    T* const panel = values + long(d / kPanel) * kPanel * shape_.page_size;
    return panel + place_in_panel<T>(place / depth, d % kPanel) + place % depth;
  }

  T* page(int layer, int page, int head) { return data_.data() + offset(layer, page, head); }

  // A head's pages follow one another: those that were handed out together are read as one stream.
  long offset(int layer, int page, int head) const {
    return ((long(layer) * shape_.num_kv_heads + head) * shape_.num_pages + page) * half_ * 2;
  }

  AttentionShape shape_;
  long half_;  // elements of one head's keys in a page
  Buffer<T> data_;
};

}  // namespace headwater
