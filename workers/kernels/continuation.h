// Greedy continuations: several steps of one row for each sequence, each step fed with what the last one chose.
//
// For drafting, where a step of a small model takes less time than a call from Python.
#pragma once

#include <vector>

#include "decoder.h"
#include "top_ids.h"

namespace headwater {

// The softmax of the highest of `size` logits: what its exponential, 1, is to be divided by.
inline float sum_of_exponentials(const float* logits, int size, float highest) {
  Vec sums = splat(0.f);
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) sums = sums + exp2_of((load(logits + i) - splat(highest)) * splat(kLog2E));
  float sum = sum_of(sums);
  for (; i < size; i++) sum += std::exp(logits[i] - highest);
  return sum;
}

// Moves each row on by one position: to the token chosen for it, its slot, and one key more of its own segment, which is
// that of the same number and begins with the sequence.
inline void advance(Step& step, Segment* segments, int64_t* token_ids, int64_t* positions, int64_t* slots,
                    int page_size) {
  for (int row = 0; row < step.num_rows; row++) {
    const int64_t position = ++positions[row];
    token_ids[row] = step.argmax[row];
    segments[row].num_keys++;
    slots[row] = int64_t(segments[row].pages[position / page_size]) * page_size + position % page_size;
  }
}

constexpr int kChoices = 2;  // tokens told of each row: the one that is fed to the next step, and the runner-up

// ids and probabilities [num_steps][rows][kChoices]. Ends when no row's tokens are right with a probability of at least `least`
// any more, all of them together; returns the number of steps made. Needs logits.
template <class T>
int continue_greedily(Decoder<T>& decoder, Step& step, int page_size, int vocab_size, int num_steps, float least,
                      int* ids, float* probabilities) {
  std::vector<float> paths(step.num_rows, 1.f);
  for (int done = 0;;) {
    decoder.forward(step);
    bool goes_on = false;
    for (int row = 0; row < step.num_rows; row++) {
      const float* const logits = step.logits + long(row) * vocab_size;
      const long at = (long(done) * step.num_rows + row) * kChoices;
      find_top_ids(logits, vocab_size, kChoices, ids + at);
      const float highest = logits[ids[at]], sum = sum_of_exponentials(logits, vocab_size, highest);
      for (int i = 0; i < kChoices; i++) probabilities[at + i] = std::exp(logits[ids[at + i]] - highest) / sum;
      paths[row] *= probabilities[at];
      goes_on |= paths[row] >= least;
    }
    if (++done == num_steps || !goes_on) return done;
    advance(step, const_cast<Segment*>(step.segments), const_cast<int64_t*>(step.token_ids),
            const_cast<int64_t*>(step.positions), const_cast<int64_t*>(step.slots), page_size);
  }
}

}  // namespace headwater
