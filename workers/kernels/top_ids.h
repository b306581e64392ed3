// The highest of many numbers, and where they stand.
#pragma once

#include <algorithm>
#include <vector>

namespace headwater {

// Keeps the highest of the values it is offered, best first, and of equals the first.
class TopIds {
 public:
  TopIds(int count, int* ids) : count_(count), values_(count), ids_(ids) {}

  bool takes(float value) const { return size_ < count_ || value > values_[count_ - 1]; }

  void offer(float value, int id) {
    if (!takes(value)) return;
    if (size_ < count_) size_++;
    int place = size_ - 1;
    for (; place > 0 && values_[place - 1] < value; place--) {
      values_[place] = values_[place - 1];
      ids_[place] = ids_[place - 1];
    }
    values_[place] = value;
    ids_[place] = id;
  }

 private:
  const int count_;
  int size_ = 0;
  std::vector<float> values_;
  int* const ids_;
};

// The `count` largest of `size` numbers; count <= size.
inline void find_top_ids(const float* values, int size, int count, int* ids) {
  constexpr int kBlock = 64;
  TopIds top(count, ids);
  for (int first = 0; first < size; first += kBlock) {
    const int last = std::min(first + kBlock, size);
    float highest = values[first];
    for (int i = first; i < last; i++) highest = std::max(highest, values[i]);
    if (!top.takes(highest)) continue;
    for (int i = first; i < last; i++) top.offer(values[i], i);
  }
}

}  // namespace headwater
