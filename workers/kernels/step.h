// What one step computes, as it is handed over by Python.
#pragma once

#include <cstdint>

#include "segments.h"

namespace headwater {

// One step's input and output. Arrays live until the step is done.
struct Step {
  int num_rows;
  const int64_t* token_ids;
  const int64_t* positions;
  const int64_t* slots;
  const Segment* segments;
  int num_segments;
  const int64_t* logit_rows;
  int num_logit_rows;
  float* logits;    // [logit_rows][vocab_size], or null
  int64_t* argmax;  // [logit_rows]: the first of the highest logits
  double attend_s;  // out: seconds in the phases of attention, and in those of its merges
  double merge_s;
  const int64_t* places;  // for attention alone: by row, where it stands in the caller's tensors; null: as in the step
};

}  // namespace headwater
