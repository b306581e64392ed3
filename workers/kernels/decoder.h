// A whole step of a Llama-family decoder in one call: from token ids to logits.
//
// A step is a list of phases for the crew (see crew.h). The products are cut by rows and columns and never along their
// sums, so a result does not depend on the number of threads or on the rows beside it. Hidden states are float
// throughout; what enters a product is rounded to the weights' type.
#pragma once

#include <memory>
#include <stdexcept>
#include <string>

#include "attention.h"
#include "matrix.h"
#include "step.h"
#include "unit_product.h"

namespace headwater {

struct DecoderShape {
  AttentionShape attention;
  int vocab_size;
  int hidden_size;
  int intermediate_size;
  float norm_eps;
  int max_context;
};

template <class T>
class Decoder {
 public:
  Decoder(const DecoderShape& shape, int num_threads)
      : shape_(shape),
        attention_(shape.attention, num_threads),
        head_(shape.vocab_size, shape.hidden_size, arena_),
        embedding_(size_t(shape.vocab_size) * shape.hidden_size),
        norm_(hidden_stride()),
        cos_(size_t(shape.max_context) * half_dim()),
        sin_(size_t(shape.max_context) * half_dim()),
        crew_(num_threads, shape.attention.num_layers * kPhasesPerLayer + kPhasesPerLayer) {
    for (int i = 0; i < shape.attention.num_layers; i++) layers_.push_back(std::make_unique<Layer>(*this, arena_));
    for (int i = 0; i < num_threads; i++) scratch_.emplace_back(padded_dim());
  }

  enum Weight : int { kQuery, kKey, kValue, kOutput, kGate, kUp, kDown, kHead, kEmbedding, kNumWeights };
  enum Norm : int { kAttentionNorm, kFeedForwardNorm, kQueryNorm, kKeyNorm, kFinalNorm, kNumNorms };

  // values [columns][rows] as in the checkpoint; bias [columns] or null.
  void set_weight(int layer, Weight weight, const T* values, const float* bias) {
    if (weight == kEmbedding) {
      memcpy(static_cast<void*>(embedding_.data()), values, embedding_.size() * sizeof(T));
      return;
    }
    Matrix<T>& matrix = matrix_of(layer, weight);
    const auto [num_columns, num_rows] = size_of(weight);
    for (int i = 0; i < num_columns; i++) {
      matrix.set_column(column_of(weight, i), values + long(i) * num_rows, num_rows);
      if (bias != nullptr) matrix.set_bias(column_of(weight, i), bias[i]);
    }
  }

  void set_norm(int layer, Norm norm, const float* values) {
    switch (norm) {
      case kAttentionNorm: return copy(layers_[layer]->attention_norm, values, shape_.hidden_size);
      case kFeedForwardNorm: return copy(layers_[layer]->feed_forward_norm, values, shape_.hidden_size);
      case kQueryNorm: return copy(layers_[layer]->query_norm, values, head_dim());
      case kKeyNorm: return copy(layers_[layer]->key_norm, values, head_dim());
      case kFinalNorm: return copy(norm_, values, shape_.hidden_size);
      case kNumNorms: return;
    }
  }

  void set_window(int layer, int window) { layers_[layer]->window = window; }

  // cos and sin [max_context][head_dim / 2]
  void set_rope(const float* cos, const float* sin) {
    copy(cos_, cos, int(cos_.size()));
    copy(sin_, sin, int(sin_.size()));
  }

  KVStore<T>& kv() { return attention_.kv(); }

  void forward(Step& step) {
    begin(step);
    plan();
    crew_.run(phases_, this);
    tell_times(step);
    if (step.num_logit_rows > 0) finish_argmax();
  }

  // Attention alone, of one layer, on whatever the pages hold, to learn what it costs.
  void rehearse(Step& step, int num_times) {
    begin(step);
    phases_.clear();
    for (int i = 0; i < std::min(num_times, num_layers()); i++) {
      add<&Decoder::attend>(i, attention_.num_tile_units());
      add<&Decoder::merge>(i, attention_.num_merge_units());
    }
    crew_.run(phases_, this);
    tell_times(step);
  }

 private:
  static constexpr int kPhasesPerLayer = 9;
  static constexpr int kRowsPerUnit = 16;  // of phases without products
  static constexpr int kSpareRows = 32;    // AMX reads whole tiles
  static constexpr int kSpareColumns = 32; // keeps rows from meeting in the same sets of a cache

  struct Layer {
    Matrix<T> qkv, output, gate_up, down;
    Buffer<float> attention_norm, feed_forward_norm, query_norm, key_norm;
    int window = 0;

    Layer(const Decoder& d, Arena<T>& arena)
        : qkv((d.num_heads() + 2 * d.num_kv_heads()) * d.padded_dim(), d.shape_.hidden_size, arena),
          output(d.shape_.hidden_size, d.num_heads() * d.head_dim(), arena),
          gate_up(2 * round_up(d.shape_.intermediate_size, kPanel / 2), d.shape_.hidden_size, arena),
          down(d.shape_.hidden_size, d.shape_.intermediate_size, arena),
          attention_norm(d.hidden_stride()),
          feed_forward_norm(d.hidden_stride()) {}
  };

  // As large as any unit needs: nothing is allocated while a step runs.
  struct Scratch {
    Buffer<float> sums;  // [rows of a unit][columns]
    std::vector<T> head;

    explicit Scratch(int padded_dim) : sums(num_sums<T>(Cut::kMaxRows, padded_dim / kPanel)), head(padded_dim) {}
  };

  struct Best {
    float value;
    int32_t column;
  };

  int num_layers() const { return shape_.attention.num_layers; }
  int num_heads() const { return shape_.attention.num_heads; }
  int num_kv_heads() const { return shape_.attention.num_kv_heads; }
  int head_dim() const { return shape_.attention.head_dim; }
  int half_dim() const { return shape_.attention.head_dim / 2; }
  int padded_dim() const { return shape_.attention.padded_dim(); }
  int hidden_stride() const { return round_up(shape_.hidden_size, kPanel); }
  int input_stride() const { return hidden_stride() + kSpareColumns; }
  int attended_stride() const { return round_up(num_heads() * head_dim(), kPanel) + kSpareColumns; }
  int active_stride() const { return round_up(shape_.intermediate_size, kPanel) + kSpareColumns; }

  // Loading

  static void copy(Buffer<float>& to, const float* from, int size) {
    to.reserve(size);
    memcpy(to.data(), from, size * sizeof(float));
  }

  Matrix<T>& matrix_of(int layer, Weight weight) {
    switch (weight) {
      case kQuery:
      case kKey:
      case kValue: return layers_[layer]->qkv;
      case kOutput: return layers_[layer]->output;
      case kGate:
      case kUp: return layers_[layer]->gate_up;
      case kDown: return layers_[layer]->down;
      default: return head_;
    }
  }

  std::pair<int, int> size_of(Weight weight) const {  // columns, rows
    const int hidden = shape_.hidden_size, inner = shape_.intermediate_size;
    switch (weight) {
      case kQuery: return {num_heads() * head_dim(), hidden};
      case kKey:
      case kValue: return {num_kv_heads() * head_dim(), hidden};
      case kOutput: return {hidden, num_heads() * head_dim()};
      case kGate:
      case kUp: return {inner, hidden};
      case kDown: return {hidden, inner};
      default: return {shape_.vocab_size, hidden};
    }
  }

  // Heads begin with a panel; gate and up share one, so that a unit has both.
  int column_of(Weight weight, int i) const {
    const int half = kPanel / 2;
    switch (weight) {
      case kQuery: return head_column(0, i);
      case kKey: return head_column(num_heads(), i);
      case kValue: return head_column(num_heads() + num_kv_heads(), i);
      case kGate: return i / half * kPanel + i % half;
      case kUp: return i / half * kPanel + half + i % half;
      default: return i;
    }
  }

  int head_column(int first_head, int i) const { return (first_head + i / head_dim()) * padded_dim() + i % head_dim(); }

  // Planning a step

  void begin(const Step& step) {
    check(step);
    step_ = &step;
    attention_.begin(step.segments, step.num_segments, step.positions, step.num_rows);
    reserve();
  }

  // What stands in the arrays is used as an index.
  void check(const Step& step) {
    for (int row = 0; row < step.num_rows; row++) {
      if (step.token_ids[row] < 0 || step.token_ids[row] >= shape_.vocab_size)
        throw std::out_of_range("token id " + std::to_string(step.token_ids[row]) + " is not in the vocabulary");
      if (step.positions[row] < 0 || step.positions[row] >= shape_.max_context)
        throw std::out_of_range("position " + std::to_string(step.positions[row]) + " is beyond the context");
      kv().check_slot(step.slots[row]);
    }
  }

  void tell_times(Step& step) const {
    step.attend_s = step.merge_s = 0;
    for (size_t i = 0; i < phases_.size(); i++) {
      if (phases_[i].run == run_units<&Decoder::attend>) step.attend_s += crew_.seconds(int(i));
      if (phases_[i].run == run_units<&Decoder::merge>) step.merge_s += crew_.seconds(int(i));
    }
  }

  void reserve() {
    const size_t rows = step_->num_rows + kSpareRows, wanted = step_->num_logit_rows + kSpareRows;
    hidden_.reserve(rows * hidden_stride());
    input_.reserve(std::max(rows, wanted) * input_stride());  // a row may be wanted more than once
    attended_.reserve(rows * attended_stride());
    active_.reserve(std::max(rows, wanted) * active_stride());
    last_hidden_.reserve(wanted * hidden_stride());
    last_attended_.reserve(wanted * attended_stride());
  }

  void plan() {
    phases_.clear();
    by_rows<&Decoder::embed, &Decoder::num_rows>(0);
    for (int layer = 0; layer < num_layers(); layer++) {
      const bool is_last = layer + 1 == num_layers();
      if (layer > 0) by_rows<&Decoder::normalize_for_attention, &Decoder::num_rows>(layer);
      add<&Decoder::project>(layer, projection_cut().num_units());
      if (is_last && step_->num_logit_rows == 0) return;
      add<&Decoder::attend>(layer, attention_.num_tile_units());
      add<&Decoder::merge>(layer, attention_.num_merge_units());
      if (is_last) by_rows<&Decoder::select, &Decoder::num_wanted>(layer);
      const int num_rows = rows_after_attention(layer);
      add<&Decoder::finish_attention>(layer, cut(layers_[layer]->output, num_rows).num_units());
      by_rows<&Decoder::normalize_for_feed_forward, &Decoder::rows_after_attention>(layer);
      add<&Decoder::activate>(layer, cut(layers_[layer]->gate_up, num_rows).num_units());
      add<&Decoder::finish_feed_forward>(layer, cut(layers_[layer]->down, num_rows).num_units());
    }
    by_rows<&Decoder::normalize_for_head, &Decoder::num_wanted>(0);
    const Cut last = cut(head_, step_->num_logit_rows);
    best_.resize(size_t(last.num_column_units()) * step_->num_logit_rows);
    add<&Decoder::predict>(0, last.num_units());
  }

  template <void (Decoder::*kRun)(int, int, int)>
  void add(int layer, int num_units) {
    if (num_units > 0) phases_.push_back({run_units<kRun>, layer, num_units});
  }

  template <void (Decoder::*kRun)(int, int, int)>
  static void run_units(void* decoder, int layer, int unit, int thread) {
    (static_cast<Decoder*>(decoder)->*kRun)(layer, unit, thread);
  }

  template <void (Decoder::*kRun)(int, int), int (Decoder::*kNumRows)(int) const>
  void by_rows(int layer) {
    phases_.push_back(
        {run_rows<kRun, kNumRows>, layer, ((this->*kNumRows)(layer) + kRowsPerUnit - 1) / kRowsPerUnit});
  }

  template <void (Decoder::*kRun)(int, int), int (Decoder::*kNumRows)(int) const>
  static void run_rows(void* decoder, int layer, int unit, int) {
    Decoder& d = *static_cast<Decoder*>(decoder);
    const int end = std::min((unit + 1) * kRowsPerUnit, (d.*kNumRows)(layer));
    for (int row = unit * kRowsPerUnit; row < end; row++) (d.*kRun)(layer, row);
  }

  int num_rows(int) const { return step_->num_rows; }
  int num_wanted(int) const { return step_->num_logit_rows; }

  // After the last layer's attention only the rows whose logits are wanted go on.
  int rows_after_attention(int layer) const {
    return layer + 1 == num_layers() ? step_->num_logit_rows : step_->num_rows;
  }

  Cut cut(const Matrix<T>& matrix, int num_rows) const {
    return Cut(num_rows, matrix.num_panels(), matrix.num_rows() * int(sizeof(T)), crew_.num_threads());
  }

  Cut projection_cut() const {  // by heads
    return Cut(step_->num_rows, num_heads() + 2 * num_kv_heads(), hidden_stride() * int(sizeof(T)),
               crew_.num_threads());
  }

  // Rows

  float* hidden(int layer, int row) {
    Buffer<float>& buffer = layer + 1 == num_layers() ? last_hidden_ : hidden_;
    return buffer.data() + long(row) * hidden_stride();
  }

  void embed(int, int row) {
    const T* from = embedding_.data() + long(step_->token_ids[row]) * shape_.hidden_size;
    float* to = hidden_.data() + long(row) * hidden_stride();
    for (int i = 0; i < shape_.hidden_size; i++) to[i] = to_float(from[i]);
    for (int i = shape_.hidden_size; i < hidden_stride(); i++) to[i] = 0;  // a row before may have left a NaN
    normalize_for_attention(0, row);
  }

  void normalize_for_attention(int layer, int row) {
    attention_.kv().clear_page_before(layer, step_->slots[row]);
    normalize(hidden_.data() + long(row) * hidden_stride(), layers_[layer]->attention_norm, row);
  }

  void normalize_for_feed_forward(int layer, int row) {
    normalize(hidden(layer, row), layers_[layer]->feed_forward_norm, row);
  }

  void normalize_for_head(int, int row) { normalize(hidden(num_layers() - 1, row), norm_, row); }

  void select(int, int row) {
    const long from = step_->logit_rows[row];
    memcpy(last_hidden_.data() + long(row) * hidden_stride(), hidden_.data() + from * hidden_stride(),
           hidden_stride() * sizeof(float));
    memcpy(static_cast<void*>(last_attended_.data() + long(row) * attended_stride()),
           attended_.data() + from * attended_stride(), attended_stride() * sizeof(T));
  }

  // Root-mean-square norm (arXiv 1910.07467). Columns beyond hidden_size are zero in both.
  void normalize(const float* from, const Buffer<float>& weight, int row) {
    T* to = input_.data() + long(row) * input_stride();
    Vec squares{};
    for (int i = 0; i < hidden_stride(); i += kLanes) squares += load(from + i) * load(from + i);
    const Vec factor = splat(1.f / sqrtf(sum_of(squares) / shape_.hidden_size + shape_.norm_eps));
    for (int i = 0; i < hidden_stride(); i += kLanes)
      store_as(to + i, load(from + i) * factor * load(weight.data() + i));
  }

  // Products

  // finish(row, column, sums): see unit_product.h
  template <class Finish>
  void product(const Buffer<T>& a, int lda, const Matrix<T>& matrix, int group, const Cut::Unit& unit, int thread,
               const Finish& finish) {
    multiply(UnitProduct<T>{a.data(), lda, matrix, group, unit, scratch_[thread].sums.data()}, finish);
  }

  // Queries, keys and values of some heads: rotated, and stored where attention finds them.
  void project(int layer, int unit, int thread) {
    product(input_, input_stride(), layers_[layer]->qkv, padded_dim() / kPanel, projection_cut().unit(unit), thread,
            [&](int row, int head, float* sums) { store_head(layer, row, head, sums, scratch_[thread].head.data()); });
  }

  void store_head(int layer, int row, int head, float* values, T* converted) {
    const Layer& weights = *layers_[layer];
    add_bias(values, weights.qkv.bias(head * padded_dim() / kPanel), padded_dim());
    if (head < num_heads()) {
      turn(values, weights.query_norm, step_->positions[row]);
      attention_.write_query(row, head, values);
    } else if (const int key_head = head - num_heads(); key_head < num_kv_heads()) {
      turn(values, weights.key_norm, step_->positions[row]);
      convert(converted, values, head_dim(), 1.f);
      attention_.kv().write_key(layer, step_->slots[row], key_head, converted);
    } else {
      convert(converted, values, head_dim(), 1.f);
      attention_.kv().write_value(layer, step_->slots[row], key_head - num_kv_heads(), converted);
    }
  }

  static void add_bias(float* values, const float* bias, int size) {
    if (bias == nullptr) return;
    for (int i = 0; i < size; i += kLanes) store(values + i, load(values + i) + load(bias + i));
  }

  // The norm of one head where the model has it, then the rotation (arXiv 2104.09864): i is paired with i + half.
  void turn(float* head, const Buffer<float>& norm, long position) const {
    if (norm.size() > 0) normalize_head(head, norm);
    const float* cos = cos_.data() + position * half_dim();
    const float* sin = sin_.data() + position * half_dim();
    float* left = head;
    float* right = head + half_dim();
    for (int i = 0; i < half_dim(); i++) {
      const float l = left[i], r = right[i];
      left[i] = l * cos[i] - r * sin[i];
      right[i] = r * cos[i] + l * sin[i];
    }
  }

  void normalize_head(float* head, const Buffer<float>& norm) const {
    float squares = 0;
    for (int i = 0; i < head_dim(); i++) squares += head[i] * head[i];
    const float factor = 1.f / sqrtf(squares / head_dim() + shape_.norm_eps);
    for (int i = 0; i < head_dim(); i++) head[i] *= factor * norm[i];
  }

  void attend(int layer, int unit, int thread) {
    attention_.attend(layer, layers_[layer]->window, unit, thread, attended_.data(), attended_stride());
  }

  void merge(int, int unit, int thread) { attention_.merge(unit, thread, attended_.data(), attended_stride()); }

  void finish_attention(int layer, int unit, int thread) {
    const bool is_last = layer + 1 == num_layers();
    add_product(layer, layers_[layer]->output, is_last ? last_attended_ : attended_, attended_stride(), unit, thread);
  }

  void finish_feed_forward(int layer, int unit, int thread) {
    add_product(layer, layers_[layer]->down, active_, active_stride(), unit, thread);
  }

  void add_product(int layer, const Matrix<T>& matrix, const Buffer<T>& a, int lda, int unit, int thread) {
    product(a, lda, matrix, 1, cut(matrix, rows_after_attention(layer)).unit(unit), thread,
            [&](int row, int panel, float* sums) {
              add_bias(sums, matrix.bias(panel), kPanel);
              float* to = hidden(layer, row) + panel * kPanel;
              for (int i = 0; i < kPanel; i += kLanes) store(to + i, load(to + i) + load(sums + i));
            });
  }

  // silu(gate) * up (SwiGLU, arXiv 2002.05202)
  void activate(int layer, int unit, int thread) {
    const Matrix<T>& matrix = layers_[layer]->gate_up;
    product(input_, input_stride(), matrix, 1, cut(matrix, rows_after_attention(layer)).unit(unit), thread,
            [&](int row, int panel, float* sums) {
              constexpr int half = kPanel / 2;
              add_bias(sums, matrix.bias(panel), kPanel);
              T* to = active_.data() + long(row) * active_stride() + panel * half;
              for (int i = 0; i < half; i += kLanes) {
                const Vec gate = load(sums + i), up = load(sums + half + i);
                store_as(to + i, up * gate / (splat(1.f) + exp2_of(gate * splat(-kLog2E))));
              }
            });
  }

  void predict(int, int unit_index, int thread) {
    const Cut whole = cut(head_, step_->num_logit_rows);
    const Cut::Unit unit = whole.unit(unit_index);
    Best* best = best_.data() + long(whole.column_unit(unit_index)) * step_->num_logit_rows;
    for (int row = unit.row; row < unit.end_row; row++) best[row] = {-INFINITY, 0};
    product(input_, input_stride(), head_, 1, unit, thread, [&](int row, int panel, float* sums) {
      const int first = panel * kPanel, size = std::min(kPanel, shape_.vocab_size - first);
      add_bias(sums, head_.bias(panel), kPanel);
      if (step_->logits != nullptr)
        memcpy(step_->logits + long(row) * shape_.vocab_size + first, sums, size * sizeof(float));
      update(best[row], sums, first, size);
    });
  }

  static void update(Best& best, const float* values, int first, int size) {
    if (size == kPanel) {
      Vec highest = load(values);
      for (int i = kLanes; i < kPanel; i += kLanes) highest = maximum(highest, load(values + i));
      if (!(max_of(highest) > best.value)) return;
    }
    for (int i = 0; i < size; i++)
      if (values[i] > best.value) best = {values[i], first + i};
  }

  void finish_argmax() {
    const int num_rows = step_->num_logit_rows, num_columns = cut(head_, num_rows).num_column_units();
    for (int row = 0; row < num_rows; row++) {
      Best best = best_[row];
      for (int i = 1; i < num_columns; i++)
        if (const Best& other = best_[long(i) * num_rows + row]; other.value > best.value) best = other;
      step_->argmax[row] = best.column;
    }
  }

  const DecoderShape shape_;
  Attention<T> attention_;
  Arena<T> arena_;  // of the matrices
  Matrix<T> head_;
  Buffer<T> embedding_;
  Buffer<float> norm_, cos_, sin_;
  std::vector<std::unique_ptr<Layer>> layers_;

  const Step* step_ = nullptr;
  std::vector<Phase> phases_;
  Buffer<float> hidden_;    // [rows][hidden_stride]: what the layers add to
  Buffer<T> input_;         // [rows][input_stride]: normalized, rounded
  Buffer<T> attended_;      // [rows][attended_stride]
  Buffer<T> active_;        // [rows][active_stride]
  Buffer<float> last_hidden_;  // of the last layer's rows that go on
  Buffer<T> last_attended_;
  std::vector<Best> best_;  // [column units][logit rows]
  std::vector<Scratch> scratch_;
  Crew crew_;  // last: its threads use what stands above
};

}  // namespace headwater
