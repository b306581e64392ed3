// What Python calls, through ctypes (workers/kernels/library.py): objects by pointer, arrays by address.
//
// Every function that can fail returns -1, or else 0 or what it is asked for, and leaves the reason for
// headwater_error(). One variant of the instruction set is compiled into one shared library.

#include <exception>
#include <string>

#include "continuation.h"
#include "decoder.h"
#include "top_ids.h"

namespace headwater {

thread_local std::string last_error;

template <class F>
int guarded(F run) {
  try {
    run();
    return 0;
  } catch (const std::exception& error) {
    last_error = error.what();
    return -1;
  }
}

// A layer's heads: row i's begin i * stride elements from the first row's, one after another.
struct Heads {
  void* data;
  long stride;
};

// One layer's attention alone: for the attention backends, which torch layers stand around.
class AttentionOnly {
 public:
  virtual ~AttentionOnly() = default;
  virtual void begin(const Step& step) = 0;
  virtual void attend(int layer, int window, Heads query, Heads key, Heads value, Heads out) = 0;
  virtual void rehearse(Step& step, int num_times) = 0;
  virtual void copy_page(int source, int target) = 0;
  virtual void copy_token(long source, long target) = 0;
};

template <class T>
class AttentionOf final : public AttentionOnly {
 public:
  AttentionOf(const AttentionShape& shape, int num_threads)
      : shape_(shape), attention_(shape, num_threads), crew_(num_threads, kPhases) {}

  // In memory and threads of others.
  AttentionOf(const AttentionShape& shape, int num_threads, void* const* layers, long page_bytes, Team team)
      : shape_(shape), attention_(shape, num_threads, layers, page_bytes), crew_(num_threads, kPhases, team) {}

  void begin(const Step& step) override {
    for (int row = 0; row < step.num_rows; row++) attention_.kv().check_slot(step.slots[row]);
    step_ = step;
    attention_.begin(step.segments, step.num_segments, step.positions, step.num_rows, step.places);
  }

  void attend(int layer, int window, Heads query, Heads key, Heads value, Heads out) override {
    layer_ = layer;
    window_ = window;
    query_ = query;
    key_ = key;
    value_ = value;
    out_ = out;
    crew_.run({{run<&AttentionOf::clear_page>, 0, step_.num_rows},
               {run<&AttentionOf::store_row>, 0, step_.num_rows},
               {run<&AttentionOf::attend_unit>, 0, attention_.num_tile_units()},
               {run<&AttentionOf::merge_unit>, 0, attention_.num_merge_units()}},
              this);
  }

  // Attend, and nothing else, in each of `num_times` layers; the results go nowhere.
  void rehearse(Step& step, int num_times) override {
    begin(step);
    Buffer<T> nowhere(size_t(step.num_rows) * shape_.num_heads * shape_.head_dim);
    out_ = {nowhere.data(), long(shape_.num_heads) * shape_.head_dim};
    window_ = 0;
    step.attend_s = step.merge_s = 0;
    for (layer_ = 0; layer_ < std::min(num_times, shape_.num_layers); layer_++) {
      crew_.run({{run<&AttentionOf::attend_unit>, 0, attention_.num_tile_units()},
                 {run<&AttentionOf::merge_unit>, 0, attention_.num_merge_units()}},
                this);
      step.attend_s += crew_.seconds(0);
      step.merge_s += crew_.seconds(1);
    }
  }

  void copy_page(int source, int target) override { attention_.kv().copy_page(source, target); }
  void copy_token(long source, long target) override { attention_.kv().copy_token(source, target); }

 private:
  static constexpr int kPhases = 4;

  template <void (AttentionOf::*kRun)(int, int)>
  static void run(void* self, int, int unit, int thread) {
    (static_cast<AttentionOf*>(self)->*kRun)(unit, thread);
  }

  // The first head of a row.
  static const T* at(const Heads& heads, int64_t place) {
    return static_cast<const T*>(heads.data) + place * heads.stride;
  }

  void clear_page(int row, int) { attention_.kv().clear_page_before(layer_, step_.slots[row]); }

  void store_row(int row, int) {
    const int dim = shape_.head_dim;
    const int64_t place = step_.places ? step_.places[row] : row;
    std::vector<float> wide(dim);
    for (int head = 0; head < shape_.num_heads; head++) {
      const T* from = at(query_, place) + head * dim;
      for (int d = 0; d < dim; d++) wide[d] = to_float(from[d]);
      attention_.write_query(row, head, wide.data());
    }
    for (int head = 0; head < shape_.num_kv_heads; head++) {
      attention_.kv().write_key(layer_, step_.slots[row], head, at(key_, place) + head * dim);
      attention_.kv().write_value(layer_, step_.slots[row], head, at(value_, place) + head * dim);
    }
  }

  void attend_unit(int unit, int thread) {
    attention_.attend(layer_, window_, unit, thread, static_cast<T*>(out_.data), int(out_.stride));
  }
  void merge_unit(int unit, int thread) {
    attention_.merge(unit, thread, static_cast<T*>(out_.data), int(out_.stride));
  }

  const AttentionShape shape_;
  Attention<T> attention_;
  Step step_{};
  int layer_ = 0, window_ = 0;
  Heads query_{}, key_{}, value_{}, out_{};
  Crew crew_;  // last: its threads use what stands above
};

class AnyDecoder {
 public:
  virtual ~AnyDecoder() = default;
  virtual void set_weight(int layer, int weight, const void* values, const float* bias) = 0;
  virtual void set_norm(int layer, int norm, const float* values) = 0;
  virtual void set_window(int layer, int window) = 0;
  virtual void set_rope(const float* cos, const float* sin) = 0;
  virtual void copy_page(int source, int target) = 0;
  virtual void copy_token(long source, long target) = 0;
  virtual long page_bytes() = 0;
  virtual void export_pages(const int32_t* pages, int count, char* block) = 0;
  virtual void import_pages(const char* block, const int32_t* pages, int count) = 0;
  virtual int map_block(const void* block, int num_pages) = 0;
  virtual void unmap_block(int first) = 0;
  virtual void forward(Step& step) = 0;
  virtual int continue_greedily(Step& step, int num_steps, float least, int* ids, float* probabilities) = 0;
  virtual void rehearse(Step& step, int num_times) = 0;
};

template <class T>
class DecoderOf final : public AnyDecoder {
 public:
  DecoderOf(const DecoderShape& shape, int num_threads) : shape_(shape), decoder_(shape, num_threads) {}

  void set_weight(int layer, int weight, const void* values, const float* bias) override {
    decoder_.set_weight(layer, typename Decoder<T>::Weight(weight), static_cast<const T*>(values), bias);
  }
  void set_norm(int layer, int norm, const float* values) override {
    decoder_.set_norm(layer, typename Decoder<T>::Norm(norm), values);
  }
  void set_window(int layer, int window) override { decoder_.set_window(layer, window); }
  void set_rope(const float* cos, const float* sin) override { decoder_.set_rope(cos, sin); }
  void copy_page(int source, int target) override { decoder_.kv().copy_page(source, target); }
  void copy_token(long source, long target) override { decoder_.kv().copy_token(source, target); }
  long page_bytes() override { return decoder_.kv().page_bytes(); }
  void export_pages(const int32_t* pages, int count, char* block) override {
    decoder_.kv().export_pages(pages, count, block);
  }
  void import_pages(const char* block, const int32_t* pages, int count) override {
    decoder_.kv().import_pages(block, pages, count);
  }
  int map_block(const void* block, int num_pages) override {
    return decoder_.kv().foreign().map(static_cast<const T*>(block), num_pages);
  }
  void unmap_block(int first) override { decoder_.kv().foreign().unmap(first); }
  void forward(Step& step) override { decoder_.forward(step); }
  int continue_greedily(Step& step, int num_steps, float least, int* ids, float* probabilities) override {
    return headwater::continue_greedily(decoder_, step, shape_.attention.page_size, shape_.vocab_size, num_steps, least,
                                        ids, probabilities);
  }
  void rehearse(Step& step, int num_times) override { decoder_.rehearse(step, num_times); }

 private:
  const DecoderShape shape_;
  Decoder<T> decoder_;
};

void require_tiles() {
  if (!allow_tiles()) throw std::runtime_error("the operating system refuses AMX tiles; choose another variant");
}

}  // namespace headwater

using namespace headwater;

extern "C" {

const char* headwater_error() { return last_error.c_str(); }

// Before anything else: whether the operating system lets this process use what the variant needs.
int headwater_prepare() { return guarded(require_tiles); }

AttentionOnly* headwater_attention_new(const AttentionShape* shape, int is_bf16, int num_threads) {
  AttentionOnly* made = nullptr;
  guarded([&] {
    if (is_bf16)
      made = new AttentionOf<Bf16>(*shape, num_threads);
    else
      made = new AttentionOf<float>(*shape, num_threads);
  });
  return made;
}

// Keys and values in memory of others: layers[i] is the address of layer i's first page (see KVStore). team: whose
// threads do the work, or null.
AttentionOnly* headwater_attention_borrow(const AttentionShape* shape, int is_bf16, int num_threads,
                                          void* const* layers, long page_bytes, Team team) {
  AttentionOnly* made = nullptr;
  guarded([&] {
    if (is_bf16)
      made = new AttentionOf<Bf16>(*shape, num_threads, layers, page_bytes, team);
    else
      made = new AttentionOf<float>(*shape, num_threads, layers, page_bytes, team);
  });
  return made;
}

void headwater_attention_delete(AttentionOnly* attention) { delete attention; }

int headwater_attention_begin(AttentionOnly* attention, const Step* step) {
  return guarded([&] { attention->begin(*step); });
}

// heads: query, key, value, out
int headwater_attention_attend(AttentionOnly* attention, int layer, int window, const Heads* heads) {
  return guarded([&] { attention->attend(layer, window, heads[0], heads[1], heads[2], heads[3]); });
}

int headwater_attention_rehearse(AttentionOnly* attention, Step* step, int num_times) {
  return guarded([&] { attention->rehearse(*step, num_times); });
}

int headwater_attention_copy_page(AttentionOnly* attention, int source, int target) {
  return guarded([&] { attention->copy_page(source, target); });
}

int headwater_attention_copy_token(AttentionOnly* attention, long source, long target) {
  return guarded([&] { attention->copy_token(source, target); });
}

AnyDecoder* headwater_decoder_new(const DecoderShape* shape, int is_bf16, int num_threads) {
  AnyDecoder* made = nullptr;
  guarded([&] {
    if (is_bf16)
      made = new DecoderOf<Bf16>(*shape, num_threads);
    else
      made = new DecoderOf<float>(*shape, num_threads);
  });
  return made;
}

void headwater_decoder_delete(AnyDecoder* decoder) { delete decoder; }

void headwater_decoder_set_weight(AnyDecoder* decoder, int layer, int weight, const void* values, const float* bias) {
  decoder->set_weight(layer, weight, values, bias);
}

void headwater_decoder_set_norm(AnyDecoder* decoder, int layer, int norm, const float* values) {
  decoder->set_norm(layer, norm, values);
}

void headwater_decoder_set_window(AnyDecoder* decoder, int layer, int window) { decoder->set_window(layer, window); }

void headwater_decoder_set_rope(AnyDecoder* decoder, const float* cos, const float* sin) {
  decoder->set_rope(cos, sin);
}

int headwater_decoder_copy_page(AnyDecoder* decoder, int source, int target) {
  return guarded([&] { decoder->copy_page(source, target); });
}

int headwater_decoder_copy_token(AnyDecoder* decoder, long source, long target) {
  return guarded([&] { decoder->copy_token(source, target); });
}

long headwater_decoder_page_bytes(AnyDecoder* decoder) { return decoder->page_bytes(); }

int headwater_decoder_export_pages(AnyDecoder* decoder, const int32_t* pages, int count, char* block) {
  return guarded([&] { decoder->export_pages(pages, count, block); });
}

int headwater_decoder_import_pages(AnyDecoder* decoder, const char* block, const int32_t* pages, int count) {
  return guarded([&] { decoder->import_pages(block, pages, count); });
}

// The number of the block's first page, or -1.
int headwater_decoder_map_block(AnyDecoder* decoder, const void* block, int num_pages) {
  int first = 0;
  const int status = guarded([&] { first = decoder->map_block(block, num_pages); });
  return status == 0 ? first : status;
}

int headwater_decoder_unmap_block(AnyDecoder* decoder, int first) {
  return guarded([&] { decoder->unmap_block(first); });
}

void headwater_top_ids(const float* logits, int num_rows, int vocab_size, int count, int* ids) {
  for (long row = 0; row < num_rows; row++)
    find_top_ids(logits + row * vocab_size, vocab_size, count, ids + row * count);
}

int headwater_decoder_forward(AnyDecoder* decoder, Step* step) {
  return guarded([&] { decoder->forward(*step); });
}

// The number of steps made, or -1.
int headwater_decoder_continue(AnyDecoder* decoder, Step* step, int num_steps, float least, int* ids,
                               float* probabilities) {
  int done = 0;
  const int status = guarded([&] { done = decoder->continue_greedily(*step, num_steps, least, ids, probabilities); });
  return status == 0 ? done : status;
}

int headwater_decoder_rehearse(AnyDecoder* decoder, Step* step, int num_times) {
  return guarded([&] { decoder->rehearse(*step, num_times); });
}

}  // extern "C"
