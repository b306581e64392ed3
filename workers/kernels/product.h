// Products of a few rows with panels of 32 columns: the one place where nearly all the time goes.
//
//     c[row][32 * panel + column] (+)= sum over blocks b and steps s: a[row][b, s] * panels[b][panel][s][column]
//
// The right side may be cut into blocks along the sum (the pages that hold values). The order of the sum is the same
// for every number of rows and panels, so a row's result does not depend on the rows beside it.
//
// AMX multiplies tiles of 16 rows by 16 columns. It reads and writes whole tiles: `a` and `c` must be readable, and `c`
// writable, up to a multiple of 16 rows.
#pragma once

#include <algorithm>
#include <utility>

#include "amx.h"
#include "element.h"

namespace headwater {

// Rows that one call of a vector kernel takes: what the registers hold beside one panel.
#if defined(__AVX512F__)
constexpr int kRows = 12;
#elif defined(__AVX__)
constexpr int kRows = 3;
#else
constexpr int kRows = 1;
#endif

template <class T>
struct Product {
  const T* a;
  int lda;
  const T* const* panels;  // [blocks][panels]
  int num_panels;
  int num_blocks;
  int num_steps;  // of kDepth elements, per block
  float* c;
  int ldc;
  bool adds;  // to what c holds
  const T* const* next;  // [blocks][panels], or null: memory as large as a panel, to be fetched into the cache meanwhile
};

namespace kernel {

constexpr int kVecs = kPanel / kLanes;  // of one step of a panel

template <int kNum>
inline void multiply_step(Vec (&sums)[kNum], const float* a, const float* b) {
  const Vec factor = splat(*a);
  for (int i = 0; i < kNum; i++) sums[i] += factor * load(b + i * kLanes);
}

#if defined(__AVX512BF16__)
template <int kNum>
inline void multiply_step(Vec (&sums)[kNum], const Bf16* a, const Bf16* b) {
  const __m512bh factor = (__m512bh)_mm512_set1_epi32(load_as<int32_t>(a));
  for (int i = 0; i < kNum; i++) {
    const __m512bh right = (__m512bh)_mm512_loadu_si512(b + i * kLanes * 2);
    sums[i] = (Vec)_mm512_dpbf16_ps((__m512)sums[i], factor, right);
  }
}
#else
template <int kNum>
inline void multiply_step(Vec (&sums)[kNum], const Bf16* a, const Bf16* b) {
  const Vec even = splat(to_float(a[0])), odd = splat(to_float(a[1]));
  for (int i = 0; i < kNum; i++) {
    const VecBits pair = load_as<VecBits>(b + i * kLanes * 2);  // little-endian: the even element is the low half
    sums[i] += even * (Vec)(pair << 16);
    sums[i] += odd * (Vec)(pair & 0xffff0000u);
  }
}
#endif

// kNumRows rows with kNumPanels panels, from the panel `first` on.
// Steps of the next panels to fetch while some rows are multiplied.
struct Share {
  int first = 0;
  int count = 0;
};

template <class T, int kNumRows, int kNumPanels, bool kFetches>
void multiply_block(const Product<T>& p, int row, int first, Share share) {
  constexpr int depth = Element<T>::kDepth;
  Vec sums[kNumRows][kNumPanels][kVecs];
  float* c = p.c + long(row) * p.ldc + first * kPanel;
  for (int r = 0; r < kNumRows; r++)
    for (int n = 0; n < kNumPanels; n++)
      for (int i = 0; i < kVecs; i++)
        sums[r][n][i] = p.adds ? load(c + long(r) * p.ldc + n * kPanel + i * kLanes) : Vec{};
  const T* a = p.a + long(row) * p.lda;
  for (int block = 0; block < p.num_blocks; block++) {
    const T* const* panels = p.panels + long(block) * p.num_panels + first;
    const T* b[kNumPanels];
    for (int n = 0; n < kNumPanels; n++) b[n] = panels[n];
    const T* next[kNumPanels];
    for (int n = 0; n < kNumPanels; n++) next[n] = kFetches ? p.next[long(block) * p.num_panels + first + n] : nullptr;
    for (int step = 0; step < p.num_steps; step++) {
      for (int n = 0; n < kNumPanels; n++) {
        if (kFetches && unsigned(step - share.first) < unsigned(share.count))
          prefetch(next[n] + long(step) * kPanel * depth, kStepBytes<T>);
        for (int r = 0; r < kNumRows; r++) multiply_step(sums[r][n], a + long(r) * p.lda, b[n]);
        b[n] += kPanel * depth;
      }
      a += depth;
    }
  }
  for (int r = 0; r < kNumRows; r++)
    for (int n = 0; n < kNumPanels; n++)
      for (int i = 0; i < kVecs; i++) store(c + long(r) * p.ldc + n * kPanel + i * kLanes, sums[r][n][i]);
}

template <class T>
using Block = void (*)(const Product<T>&, int row, int first, Share share);

template <class T, int kNumPanels, bool kFetches, size_t... kIndex>
constexpr Block<T> pick(int num_rows, std::index_sequence<kIndex...>) {
  constexpr Block<T> table[] = {multiply_block<T, int(kIndex) + 1, kNumPanels, kFetches>...};
  return table[num_rows - 1];
}

// Few rows take several panels at once: more sums run beside one another, and more streams are read.
template <class T, int kNumPanels>
void multiply_panels(const Product<T>& p, int row, int num_rows, Share share, int& first) {
  constexpr int max_rows = kRows / kNumPanels;
  if constexpr (max_rows > 0) {
    if (num_rows > max_rows) return;
    constexpr auto rows = std::make_index_sequence<max_rows>();
    const Block<T> run = share.count > 0 ? pick<T, kNumPanels, true>(num_rows, rows) : pick<T, kNumPanels, false>(num_rows, rows);
    for (; first + kNumPanels <= p.num_panels; first += kNumPanels) run(p, row, first, share);
  }
}

}  // namespace kernel

template <class T>
void multiply_vectors(const Product<T>& p, int num_rows) {
  const int num_groups = (num_rows + kRows - 1) / kRows;
  for (int group = 0, row = 0; group < num_groups; group++) {
    const int end = num_rows * (group + 1) / num_groups;
    kernel::Share share;  // each group of rows fetches a part, so that memory is busy all the time
    if (p.next != nullptr) {
      share.first = p.num_steps * group / num_groups;
      share.count = p.num_steps * (group + 1) / num_groups - share.first;
    }
    int first = 0;
    kernel::multiply_panels<T, 4>(p, row, end - row, share, first);
    kernel::multiply_panels<T, 2>(p, row, end - row, share, first);
    kernel::multiply_panels<T, 1>(p, row, end - row, share, first);
    row = end;
  }
}

#if defined(HEADWATER_AMX)

namespace kernel {

constexpr int kTileRows = 16;
constexpr int kTileSteps = 16;
constexpr int kTileSize = 512;                        // elements
constexpr int kPairBytes = 16 * kStepBytes<Bf16>;     // the two tiles that are as wide as a panel

// Up to 32 rows with one panel: two tiles of rows by two of columns.
template <class Meanwhile>
INLINE inline void multiply_tall(const Product<Bf16>& p, int row, int panel, Meanwhile& meanwhile) {
  const Bf16* a = p.a + long(row) * p.lda;
  const Bf16* a_low = a + long(kTileRows) * p.lda;
  float* const c = p.c + long(row) * p.ldc + panel * kPanel;
  float* const c_low = c + long(kTileRows) * p.ldc;
  const long a_stride = p.lda * 2l, c_stride = p.ldc * 4l;
  if (p.adds) {
    TILE_LOAD(0, c, c_stride);
    TILE_LOAD(1, c + 16, c_stride);
    TILE_LOAD(2, c_low, c_stride);
    TILE_LOAD(3, c_low + 16, c_stride);
  } else {
    TILE_ZERO(0);
    TILE_ZERO(1);
    TILE_ZERO(2);
    TILE_ZERO(3);
  }
  for (int block = 0; block < p.num_blocks; block++) {
    const Bf16* b = p.panels[long(block) * p.num_panels + panel];
    for (int step = 0; step < p.num_steps; step += kTileSteps, a += 32, a_low += 32, b += 2 * kTileSize) {
      TILE_LOAD(6, b, 64);
      TILE_LOAD(4, a, a_stride);
      TILE_MULTIPLY(0, 4, 6);
      TILE_LOAD(7, b + kTileSize, 64);
      TILE_MULTIPLY(1, 4, 7);
      TILE_LOAD(5, a_low, a_stride);
      TILE_MULTIPLY(2, 5, 6);
      TILE_MULTIPLY(3, 5, 7);
      meanwhile(b);
    }
  }
  TILE_STORE(0, c, c_stride);
  TILE_STORE(1, c + 16, c_stride);
  TILE_STORE(2, c_low, c_stride);
  TILE_STORE(3, c_low + 16, c_stride);
}

// Up to 16 rows with one panel or two: a tile of rows by two or four of columns.
template <int kNumPanels, class Meanwhile>
INLINE inline void multiply_wide(const Product<Bf16>& p, int row, int panel, Meanwhile& meanwhile) {
  const Bf16* a = p.a + long(row) * p.lda;
  float* const c = p.c + long(row) * p.ldc + panel * kPanel;
  const long a_stride = p.lda * 2l, c_stride = p.ldc * 4l;
  TILE_ZERO(0);
  TILE_ZERO(1);
  TILE_ZERO(2);
  TILE_ZERO(3);
  if (p.adds) {
    TILE_LOAD(0, c, c_stride);
    TILE_LOAD(1, c + 16, c_stride);
    if (kNumPanels == 2) {
      TILE_LOAD(2, c + 32, c_stride);
      TILE_LOAD(3, c + 48, c_stride);
    }
  }
  for (int block = 0; block < p.num_blocks; block++) {
    const Bf16* b = p.panels[long(block) * p.num_panels + panel];
    const Bf16* right = p.panels[long(block) * p.num_panels + panel + kNumPanels - 1];
    for (int step = 0; step < p.num_steps; step += kTileSteps, a += 32, b += 2 * kTileSize, right += 2 * kTileSize) {
      TILE_LOAD(4, a, a_stride);
      TILE_LOAD(6, b, 64);
      TILE_MULTIPLY(0, 4, 6);
      TILE_LOAD(7, b + kTileSize, 64);
      TILE_MULTIPLY(1, 4, 7);
      meanwhile(b);
      if (kNumPanels == 2) {
        TILE_LOAD(6, right, 64);
        TILE_MULTIPLY(2, 4, 6);
        TILE_LOAD(7, right + kTileSize, 64);
        TILE_MULTIPLY(3, 4, 7);
        meanwhile(right);
      }
    }
  }
  TILE_STORE(0, c, c_stride);
  TILE_STORE(1, c + 16, c_stride);
  if (kNumPanels == 2) {
    TILE_STORE(2, c + 32, c_stride);
    TILE_STORE(3, c + 48, c_stride);
  }
}

}  // namespace kernel

// In tiles, `meanwhile(tiles)` is called for each pair of tiles of a panel that is multiplied: what it does runs beside
// them. Nothing is fetched but by it.
template <class Meanwhile>
INLINE inline void multiply_tiles(const Product<Bf16>& p, int num_rows, Meanwhile& meanwhile) {
  int row = 0;
  for (; num_rows - row > kernel::kTileRows; row += 2 * kernel::kTileRows)
    for (int panel = 0; panel < p.num_panels; panel++) kernel::multiply_tall(p, row, panel, meanwhile);
  if (row >= num_rows) return;
  int panel = 0;
  for (; panel + 2 <= p.num_panels; panel += 2) kernel::multiply_wide<2>(p, row, panel, meanwhile);
  if (panel < p.num_panels) kernel::multiply_wide<1>(p, row, panel, meanwhile);
}

#endif

// The product of num_rows rows, in tiles where there are some: see multiply_tiles.
template <class T, class Meanwhile>
void multiply(const Product<T>& p, int num_rows, [[maybe_unused]] Meanwhile& meanwhile) {
#if defined(HEADWATER_AMX)
  if constexpr (kHasTiles<T>) return multiply_tiles(p, num_rows, meanwhile);
#endif
  multiply_vectors(p, num_rows);
}

}  // namespace headwater
