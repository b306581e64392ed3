// The store of keys and values, in pages.
//
// A page holds, for each key head, its keys and then its values as panels (see element.h):
//
//     keys    [page_size / 32] panels of [padded_dim / depth] steps by 32 keys
//     values  [padded_dim / 32] panels of [page_size / depth] steps by 32 dims
//
// Pages from num_pages on are those of mapped blocks (see foreign_pages.h): they are read like the store's own, and
// never written. The pages below it may lie in memory that somebody else owns, too: the store then reads and writes
// them there (see Placement).
#pragma once

#include <algorithm>

#include "buffer.h"
#include "element.h"
#include "foreign_pages.h"

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

// Where pages are, in elements: those of a layer's key head follow one another from layers[layer] + head * head_stride
// on, at distances of page_stride.
template <class T>
struct Placement {
  std::vector<T*> layers;
  long head_stride;
  long page_stride;
};

template <class T>
class KVStore {
 public:
  explicit KVStore(const AttentionShape& shape)
      : shape_(shape),
        half_(long(shape.page_size) * shape.padded_dim()),
        data_(size_t(shape.num_layers) * shape.num_pages * shape.num_kv_heads * half_ * 2),
        placement_(own_placement()),
        foreign_(shape.num_pages, half_ * 2) {
    data_.populate();
  }

  // In memory of others: the heads of a page one after another at layers[layer] + page * page_bytes. It must stay where
  // it is as long as the store does. Throws if there is no room for them.
  KVStore(const AttentionShape& shape, void* const* layers, long page_bytes)
      : shape_(shape),
        half_(long(shape.page_size) * shape.padded_dim()),
        placement_(borrowed_placement(layers, page_bytes)),
        foreign_(shape.num_pages, half_ * 2) {}

  KVStore(const KVStore&) = delete;
  KVStore& operator=(const KVStore&) = delete;

  ForeignPages<T>& foreign() { return foreign_; }

  // Of one page in a block, all layers and heads together.
  long page_bytes() const { return long(shape_.num_layers) * shape_.num_kv_heads * long(head_bytes()); }

  // One head of one layer, for whoever reads several of its pages.
  class Head {
   public:
    Head(const KVStore& store, int layer, int head)
        : own_(store.first_page(layer, head)),
          half_(store.half_),
          page_stride_(store.placement_.page_stride),
          num_pages_(store.shape_.num_pages),
          number_(layer * store.shape_.num_kv_heads + head),
          foreign_(store.foreign_) {}

    const T* keys(int page) const {
      if (page < num_pages_) [[likely]]
        return own_ + page * page_stride_;
      return foreign_.at(page, number_);
    }
    const T* values_behind(const T* keys) const { return keys + half_; }

   private:
    const T* own_;  // of the first page
    long half_;
    long page_stride_;
    int num_pages_;
    int number_;
    const ForeignPages<T>& foreign_;
  };

  Head head(int layer, int head) const { return Head(*this, layer, head); }

  // Throws if one of the pages is neither the store's nor mapped.
  void check_readable(const int32_t* pages, long count) const {
    uint32_t highest = 0;  // of numbers that are no page's, negative ones are the highest
    for (long i = 0; i < count; i++) highest = std::max(highest, uint32_t(pages[i]));
    if (highest < uint32_t(shape_.num_pages)) [[likely]]
      return;
    for (long i = 0; i < count; i++)
      if (uint32_t(pages[i]) >= uint32_t(shape_.num_pages) && !foreign_.holds(pages[i]))
        throw std::out_of_range("page " + std::to_string(pages[i]) + " is neither in the store nor mapped");
  }

  // Throws if one of the pages is not the store's own.
  void check_writable(const int32_t* pages, long count) const {
    check_readable(pages, count);
    for (long i = 0; i < count; i++)
      if (pages[i] >= shape_.num_pages)
        throw std::out_of_range("page " + std::to_string(pages[i]) + " is mapped, and only read");
  }

  // slot = page * page_size + place in the page. Throws if its page is not the store's own.
  void check_slot(int64_t slot) const {
    const int64_t page = slot / shape_.page_size;
    if (slot >= 0 && page < shape_.num_pages) [[likely]]
      return;
    const bool is_mapped = slot >= 0 && page <= INT_MAX && foreign_.holds(int(page));
    throw std::out_of_range("slot " + std::to_string(slot) +
                            (is_mapped ? " is in a mapped page, and only read" : " is not in the store"));
  }

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
      memset(static_cast<void*>(page(layer, int(slot / shape_.page_size), head)), 0, head_bytes());
  }

  // From one slot to another, whose page has been cleared; both of the store's own pages.
  void copy_token(long source, long target) {
    check_slot(source);
    check_slot(target);
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
    check_readable(&source, 1);
    check_writable(&target, 1);
    for (int layer = 0; layer < shape_.num_layers; layer++)
      for (int head = 0; head < shape_.num_kv_heads; head++)
        memcpy(page(layer, target, head), this->head(layer, head).keys(source), head_bytes());
  }

  // As a block, which may begin anywhere.
  void export_pages(const int32_t* pages, int count, char* block) const {
    check_readable(pages, count);
    for_each_of(pages, count, [&](int layer, int page, int head) {
      memcpy(block, this->head(layer, head).keys(page), head_bytes());
      block += head_bytes();
    });
  }

  // From a block of `count` pages, which may begin anywhere.
  void import_pages(const char* block, const int32_t* pages, int count) {
    check_writable(pages, count);
    for_each_of(pages, count, [&](int layer, int index, int head) {
      memcpy(page(layer, index, head), block, head_bytes());
      block += head_bytes();
    });
  }

 private:
  size_t head_bytes() const { return half_ * 2 * sizeof(T); }  // of one head in a page

  // In the order of a block.
  template <class F>
  void for_each_of(const int32_t* pages, int count, F run) const {
    for (int layer = 0; layer < shape_.num_layers; layer++)
      for (int head = 0; head < shape_.num_kv_heads; head++)
        for (int i = 0; i < count; i++) run(layer, pages[i], head);
  }

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

  T* page(int layer, int page, int head) { return first_page(layer, head) + page * placement_.page_stride; }

  T* first_page(int layer, int head) const { return placement_.layers[layer] + head * placement_.head_stride; }

  // A head's pages follow one another: those that were handed out together are read as one stream.
  Placement<T> own_placement() {
    const long head_stride = shape_.num_pages * half_ * 2;
    Placement<T> placement{{}, head_stride, half_ * 2};
    for (int layer = 0; layer < shape_.num_layers; layer++)
      placement.layers.push_back(data_.data() + layer * shape_.num_kv_heads * head_stride);
    return placement;
  }

  Placement<T> borrowed_placement(void* const* layers, long page_bytes) const {
    const long needed = shape_.num_kv_heads * long(head_bytes());
    if (page_bytes < needed || page_bytes % long(sizeof(T)) != 0)
      throw std::invalid_argument("a page of a layer has " + std::to_string(needed) + " bytes, and the memory offered " +
                                  std::to_string(page_bytes));
    Placement<T> placement{{}, half_ * 2, page_bytes / long(sizeof(T))};
    for (int layer = 0; layer < shape_.num_layers; layer++) placement.layers.push_back(static_cast<T*>(layers[layer]));
    return placement;
  }

  AttentionShape shape_;
  long half_;  // elements of one head's keys in a page
  Buffer<T> data_;  // empty if the pages lie elsewhere
  Placement<T> placement_;
  ForeignPages<T> foreign_;
};

}  // namespace headwater
