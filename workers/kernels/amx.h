// The tile instructions of AMX, or the same in plain C++ where HEADWATER_AMX_EMULATED is defined: slow, and only for
// testing the code around them on a processor without AMX.
//
// Every tile is 16 rows of 64 bytes.
#pragma once

#if defined(HEADWATER_AMX)

#include "element.h"

#if defined(HEADWATER_AMX_EMULATED)

namespace headwater {

struct TileRegister {
  alignas(64) uint8_t rows[16][64];
};
inline thread_local TileRegister emulated_tiles[8];

inline void emulate_load(TileRegister& tile, const void* from, long stride) {
  for (int r = 0; r < 16; r++) memcpy(tile.rows[r], static_cast<const char*>(from) + r * stride, 64);
}

inline void emulate_store(const TileRegister& tile, void* to, long stride) {
  for (int r = 0; r < 16; r++) memcpy(static_cast<char*>(to) + r * stride, tile.rows[r], 64);
}

inline void emulate_multiply(TileRegister& sums, const TileRegister& left, const TileRegister& right) {
  for (int r = 0; r < 16; r++)
    for (int c = 0; c < 16; c++) {
      float sum = load_as<float>(sums.rows[r] + c * 4);
      for (int k = 0; k < 16; k++)
        for (int e = 0; e < 2; e++)
          sum += to_float(load_as<Bf16>(left.rows[r] + k * 4 + e * 2)) *
                 to_float(load_as<Bf16>(right.rows[k] + c * 4 + e * 2));
      memcpy(sums.rows[r] + c * 4, &sum, 4);
    }
}

inline bool allow_tiles() { return true; }
inline void configure_tiles() {}

}  // namespace headwater

#define TILE_ZERO(t) (emulated_tiles[t] = TileRegister{})
#define TILE_LOAD(t, from, stride) emulate_load(emulated_tiles[t], from, stride)
#define TILE_STORE(t, to, stride) emulate_store(emulated_tiles[t], to, stride)
#define TILE_MULTIPLY(t, left, right) emulate_multiply(emulated_tiles[t], emulated_tiles[left], emulated_tiles[right])

#else

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

namespace headwater {

// Ask the kernel for the tile registers, once per process; false where it refuses.
inline bool allow_tiles() {
  constexpr long request_permission = 0x1023, tile_data = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  return syscall(SYS_arch_prctl, request_permission, tile_data) == 0;
}

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t num_rows[16] = {};

  constexpr TileConfig() {
    for (int tile = 0; tile < 8; tile++) {
      row_bytes[tile] = 64;
      num_rows[tile] = 16;
    }
  }
};
inline constexpr TileConfig kTileConfig;  // in memory for good: the compiler sees only its first bytes being used

// Before every use: other libraries in the process configure and release the tiles of a thread as they please.
inline void configure_tiles() { _tile_loadconfig(&kTileConfig); }

}  // namespace headwater

#define TILE_ZERO(t) _tile_zero(t)
#define TILE_LOAD(t, from, stride) _tile_loadd(t, from, stride)
#define TILE_STORE(t, to, stride) _tile_stored(t, to, stride)
#define TILE_MULTIPLY(t, left, right) _tile_dpbf16ps(t, left, right)

#endif
#else

namespace headwater {
inline bool allow_tiles() { return true; }
inline void configure_tiles() {}
}  // namespace headwater

#endif
