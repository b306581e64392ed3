// Pages that lie in blocks of others, mapped in to be read: their numbers, and where they are.
//
// A block holds some pages in the form of the store, its heads' pages one after another:
//
//     [layer][kv head][page of the block][keys | values]
#pragma once

#include <algorithm>
#include <climits>
#include <cstdint>
#include <stdexcept>
#include <string>
#include <vector>

namespace headwater {

// Hands out numbers from `first_number` up, and takes them back. Nothing of a block is copied: its memory must stay
// where it is, as it is, until it is unmapped.
template <class T>
class ForeignPages {
 public:
  static constexpr int kNumbersPerPage = 3;  // of the store: pages of blocks may be several times its own
  static constexpr int kAlignment = 64;      // bytes: a cache line

  // page_size: elements of one head's keys and values in a page.
  ForeignPages(int first_number, long page_size)
      : first_number_(first_number),
        most_(int(std::min<long>(long(first_number) * kNumbersPerPage, INT_MAX - first_number))),
        page_size_(page_size) {}

  // The number of the block's first page; the others follow. Throws when there are no so many numbers in a row.
  int map(const T* block, int num_pages) {
    if (num_pages < 1) throw std::invalid_argument("a block of " + std::to_string(num_pages) + " pages");
    if (reinterpret_cast<uintptr_t>(block) % kAlignment != 0)
      throw std::invalid_argument("a block that does not begin with a cache line");
    const int first = find_room(num_pages);
    if (first + num_pages > int(places_.size())) places_.resize(first + num_pages);
    for (int i = 0; i < num_pages; i++) places_[first + i] = {block + i * page_size_, num_pages * page_size_, i == 0};
    return first_number_ + first;
  }

  // Takes back the numbers of the block whose first page this is.
  void unmap(int number) {
    if (!holds(number) || !places_[number - first_number_].is_first)
      throw std::out_of_range("no block is mapped at page " + std::to_string(number));
    size_t i = number - first_number_;
    do places_[i++] = {};
    while (i < places_.size() && places_[i].data != nullptr && !places_[i].is_first);
  }

  bool holds(int number) const {
    const long i = long(number) - first_number_;
    return i >= 0 && i < long(places_.size()) && places_[i].data != nullptr;
  }

  // head: counted over all layers. The page must be mapped.
  const T* at(int number, long head) const {
    const Place& place = places_[number - first_number_];
    return place.data + head * place.stride;
  }

 private:
  struct Place {
    const T* data = nullptr;  // of the first head; null where nothing is mapped
    long stride = 0;          // from one head to the next
    bool is_first = false;    // of its block
  };

  // The first run of free places that is long enough.
  int find_room(int num_pages) const {
    int num_free = 0;
    for (int i = 0; i < most_; i++) {
      num_free = i < int(places_.size()) && places_[i].data != nullptr ? 0 : num_free + 1;
      if (num_free == num_pages) return i + 1 - num_pages;
    }
    throw std::length_error(std::to_string(most_) + " numbers for mapped pages have no " + std::to_string(num_pages) +
                            " left in a row; unmap a block first");
  }

  int first_number_;
  int most_;  // pages at once
  long page_size_;
  std::vector<Place> places_;
};

}  // namespace headwater
