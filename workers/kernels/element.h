// The two element types of weights, keys and values: bfloat16 and float.
//
// A product wants its right side in panels of 32 columns. Consecutive elements of one column, `kDepth` of them, lie side
// by side, because that is what the bfloat16 instructions multiply at once:
//
//     panel[step][column][element]    step * kDepth + element = row, column < 32
//
// For AMX the steps of a panel of bfloat16 are cut further, into tiles of 16 steps by 16 columns, a tile's memory all in
// one piece: [step / 16][column / 16][step % 16][column % 16][element].
//
// Weights, transposed keys and values all have this form, so one product serves them all.
#pragma once

#include "simd.h"

namespace headwater {

constexpr int kPanel = 32;  // columns

struct Bf16 {
  uint16_t bits;
};

inline float to_float(Bf16 value) {
  const uint32_t bits = uint32_t(value.bits) << 16;
  return load_as<float>(&bits);
}
inline float to_float(float value) { return value; }

inline void assign(float& to, float value) { to = value; }
inline void assign(Bf16& to, float value) {  // to the nearest, ties to even; a NaN stays one
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  const uint32_t rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  to.bits = uint16_t(value == value ? rounded : (bits >> 16) | 0x40);
}

template <class T>
struct Element;

template <>
struct Element<float> {
  static constexpr int kDepth = 1;
  static constexpr int kExpDegree = 5;  // of the polynomial for softmax weights: an error below rounding
};

template <>
struct Element<Bf16> {
  static constexpr int kDepth = 2;
  static constexpr int kExpDegree = 3;
};

// Whether products of this type are made of tiles.
#if defined(HEADWATER_AMX)
template <class T>
constexpr bool kHasTiles = sizeof(T) == 2;
#else
template <class T>
constexpr bool kHasTiles = false;
#endif

// Where the elements of a step and a column begin in a panel.
template <class T>
constexpr long place_in_panel(int step, int column) {
  constexpr int depth = Element<T>::kDepth, side = 16;
  if (!kHasTiles<T>) return (long(step) * kPanel + column) * depth;
  const int tile = step / side * (kPanel / side) + column / side;
  return (long(tile) * side * side + step % side * side + column % side) * depth;
}

// Steps of a column that lie at equal distances, and these distances in elements.
template <class T>
constexpr int kRunSteps = kHasTiles<T> ? 16 : 1 << 20;
template <class T>
constexpr int kRunStride = (kHasTiles<T> ? 16 : kPanel) * Element<T>::kDepth;

template <class T>
constexpr int kStepBytes = kPanel * Element<T>::kDepth * int(sizeof(T));  // 128 either way

inline void store_as(float* to, Vec value) { store(to, value); }

inline void store_as(Bf16* to, Vec value) {
#if defined(__AVX512BF16__)
  const __m256bh rounded = _mm512_cvtneps_pbh((__m512)value);
  memcpy(to, &rounded, sizeof rounded);
#else
  const VecBits bits = (VecBits)value;
  const VecBits rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * 2)));
  const Narrow narrow = __builtin_convertvector(rounded, Narrow);
  memcpy(to, &narrow, sizeof narrow);
#endif
}

inline Vec load_from(const float* from) { return load(from); }

inline Vec load_from(const Bf16* from) {
  typedef uint16_t Narrow __attribute__((vector_size(kLanes * 2)));
  return (Vec)(__builtin_convertvector(load_as<Narrow>(from), VecBits) << 16);
}

// to[i] = from[i] * factor
template <class T>
inline void convert(T* to, const float* from, int size, float factor) {
  int i = 0;
  for (; i + kLanes <= size; i += kLanes) store_as(to + i, load(from + i) * splat(factor));
  for (; i < size; i++) assign(to[i], from[i] * factor);
}

inline int round_up(int value, int multiple) { return (value + multiple - 1) / multiple * multiple; }

}  // namespace headwater
