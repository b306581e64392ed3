// Memory that grows and never shrinks, on large pages where the system has them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

namespace headwater {

// Zeros, until written. Growing forgets what was there.
template <class T>
class Buffer {
 public:
  Buffer() = default;
  explicit Buffer(size_t size) { reserve(size); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  Buffer(Buffer&& other) noexcept : data_(other.data_), size_(other.size_) {
    other.data_ = nullptr;
    other.size_ = 0;
  }
  ~Buffer() { release(); }

  void reserve(size_t size) {
    if (size <= size_) return;
    release();
    const size_t num_bytes = size * sizeof(T);
    data_ = static_cast<T*>(num_bytes >= kHugePage ? map_huge(num_bytes) : map(num_bytes));
    size_ = size;
  }

  // Have the system find all the memory now: the first writes would wait for it, page by page.
  void populate() {
#if defined(MADV_POPULATE_WRITE)
    if (size_ > 0) madvise(data_, length(), MADV_POPULATE_WRITE);  // where that is unknown, it comes with the writes
#endif
  }

  T* data() { return data_; }
  const T* data() const { return data_; }
  size_t size() const { return size_; }
  T& operator[](size_t i) { return data_[i]; }
  const T& operator[](size_t i) const { return data_[i]; }

 private:
  static constexpr size_t kHugePage = 2 << 20;

  static void* map(size_t num_bytes) {
    void* memory = mmap(nullptr, num_bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    return memory;
  }

  // On whole large pages; what is mapped around them is given back.
  static void* map_huge(size_t num_bytes) {
    const size_t wanted = whole_pages(num_bytes);
    char* const memory = static_cast<char*>(map(wanted + kHugePage));
    const size_t before = (kHugePage - reinterpret_cast<uintptr_t>(memory) % kHugePage) % kHugePage;
    if (before > 0) munmap(memory, before);
    if (before < kHugePage) munmap(memory + before + wanted, kHugePage - before);
#if defined(MADV_HUGEPAGE)
    madvise(memory + before, wanted, MADV_HUGEPAGE);
#endif
    return memory + before;
  }

  static size_t whole_pages(size_t num_bytes) { return (num_bytes + kHugePage - 1) / kHugePage * kHugePage; }

  size_t length() const {  // of what is mapped
    const size_t num_bytes = size_ * sizeof(T);
    return num_bytes >= kHugePage ? whole_pages(num_bytes) : num_bytes;
  }

  void release() {
    if (data_ != nullptr) munmap(data_, length());
    data_ = nullptr;
    size_ = 0;
  }

  T* data_ = nullptr;
  size_t size_ = 0;
};

// Memory for arrays that live as long as it does: together they lie on large pages, which each alone would not fill.
template <class T>
class Arena {
 public:
  // Zeros.
  T* take(size_t size) {
    if (slabs_.empty() || used_ + size > slabs_.back().size()) {
      slabs_.emplace_back(std::max(size, kSlabSize));
      used_ = 0;
    }
    T* const taken = slabs_.back().data() + used_;
    used_ += size;
    return taken;
  }

 private:
  static constexpr size_t kSlabSize = (32 << 20) / sizeof(T);

  std::vector<Buffer<T>> slabs_;
  size_t used_ = 0;  // of the last slab
};

}  // namespace headwater
