// Vectors of floats: as wide as the instruction set of the file being compiled, and the few operations on them.
//
// Plain arithmetic is written with the compiler's vector types, so that the same source serves every variant.
// Intrinsics stand only where they are worth it.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

// Into the loop around the tiles: what a call passes would go through memory at every step.
#define INLINE __attribute__((always_inline))

namespace headwater {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;
#endif

typedef float Vec __attribute__((vector_size(kLanes * 4)));
typedef int32_t VecInt __attribute__((vector_size(kLanes * 4)));
typedef uint32_t VecBits __attribute__((vector_size(kLanes * 4)));

constexpr float kLog2E = 1.4426950408889634f;
constexpr float kLn2 = 0.6931471805599453f;
constexpr float kLowest = -1e30f;  // a score that no key reaches; finite, so that differences of two stay numbers

template <class V>
inline V load_as(const void* from) {
  V value;
  memcpy(&value, from, sizeof value);
  return value;
}

// Ask for memory that will be read soon: into the second-level cache, or with kNearest into the first.
template <bool kNearest = false>
inline void prefetch(const void* from, long num_bytes) {
  constexpr int line = 64;
  for (long i = 0; i < num_bytes; i += line)
    __builtin_prefetch(static_cast<const char*>(from) + i, 0, kNearest ? 3 : 2);
}

inline Vec load(const float* from) { return load_as<Vec>(from); }
inline void store(float* to, Vec value) { memcpy(to, &value, sizeof value); }
inline Vec splat(float value) { return value - Vec{}; }

inline Vec maximum(Vec a, Vec b) {
#if defined(__AVX512F__)
  return (Vec)_mm512_max_ps((__m512)a, (__m512)b);
#else
  return a > b ? a : b;
#endif
}

inline bool any_above(Vec values, Vec limits) {
#if defined(__AVX512F__)
  return _mm512_cmp_ps_mask((__m512)values, (__m512)limits, _CMP_GT_OQ) != 0;
#else
  for (int i = 0; i < kLanes; i++)
    if (values[i] > limits[i]) return true;
  return false;
#endif
}

inline float sum_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);
#else
  float sum = 0;
  for (int i = 0; i < kLanes; i++) sum += v[i];
  return sum;
#endif
}

inline float max_of(Vec v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#else
  float best = v[0];
  for (int i = 1; i < kLanes; i++) best = v[i] > best ? v[i] : best;
  return best;
#endif
}

// 2^x; 0 for x far below -126, and no less than 2^127 for x beyond it. The relative error is about 2e-7 at degree 5 and
// 1e-4 at degree 3: polynomials fitted at Chebyshev points of [-1/2, 1/2].
template <int kDegree = 5>
inline Vec exp2_of(Vec x) {
#if defined(__AVX512F__)
  const Vec whole = (Vec)_mm512_roundscale_ps((__m512)x, 0);
#else
  const Vec highest = splat(127.f);
  x = maximum(x, splat(-127.f));  // the exponent of zero
  x = x < highest ? x : highest;
  const Vec magic = splat(12582912.f);  // 1.5 * 2^23: adding it rounds to the nearest whole number
  const Vec whole = (x + magic) - magic;
#endif
  const Vec f = x - whole;
  constexpr float c[2][6] = {{9.9992448e-1f, 6.9312103e-1f, 2.4264008e-1f, 5.592204e-2f},
                             {1.00000008f, 6.9314721e-1f, 2.4022107e-1f, 5.550327e-2f, 9.67604e-3f, 1.34003956e-3f}};
  static_assert(kDegree == 3 || kDegree == 5);
  Vec p = splat(c[kDegree / 5][kDegree]);
  for (int i = kDegree - 1; i >= 0; i--) p = p * f + splat(c[kDegree / 5][i]);
#if defined(__AVX512F__)
  return (Vec)_mm512_scalef_ps((__m512)p, (__m512)whole);
#else
  const VecInt exponent = (__builtin_convertvector(whole, VecInt) + 127) << 23;
  return p * (Vec)exponent;
#endif
}

}  // namespace headwater
