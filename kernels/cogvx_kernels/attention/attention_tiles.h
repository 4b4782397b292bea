// The products of `attention.cpp` on AMX's tiles.

#pragma once

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include "attention.h"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes_per_row[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// Whether the kernel lets this process use tiles (Linux: arch_prctl ARCH_REQ_XCOMP_PERM, XTILEDATA).
inline bool available() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

// What a thread does before its first product, and after its last.
inline void begin() {
  const TileConfig config;
  _tile_loadconfig(&config);
}
inline void end() { _tile_release(); }

// S^T = K Q^T, 16 keys by 32 queries at a time: the queries' tiles stay, keys stream through.
inline void multiply_scores(const uint16_t* keys, int64_t count, Scratch& scratch) {
  for (int64_t group = 0; group < GROUPS; group += 2) {
    _tile_loadd(4, scratch.queries[group][0], 64);
    _tile_loadd(5, scratch.queries[group][1], 64);
    _tile_loadd(6, scratch.queries[group + 1][0], 64);
    _tile_loadd(7, scratch.queries[group + 1][1], 64);
    for (int64_t key = 0; key < count; key += 16) {
      _tile_zero(0);
      _tile_zero(1);
      _tile_loadd(2, keys + key * HEAD_DIM, HEAD_DIM * 2);
      _tile_loadd(3, keys + key * HEAD_DIM + 32, HEAD_DIM * 2);
      _tile_dpbf16ps(0, 2, 4);
      _tile_dpbf16ps(1, 2, 6);
      _tile_dpbf16ps(0, 3, 5);
      _tile_dpbf16ps(1, 3, 7);
      _tile_stored(0, scratch.scores[group][key], 64);
      _tile_stored(1, scratch.scores[group + 1][key], 64);
    }
  }
}

// O^T += V^T P^T over the block's keys.
inline void multiply_values(const uint16_t* values, int64_t count, Scratch& scratch) {
  for (int64_t group = 0; group < GROUPS; group += 2)
    for (int64_t channel = 0; channel < HEAD_DIM; channel += 32) {
      float *even = scratch.output[group][channel], *odd = scratch.output[group + 1][channel];
      _tile_loadd(0, even, 64);
      _tile_loadd(1, odd, 64);
      _tile_loadd(2, even + 16 * 16, 64);
      _tile_loadd(3, odd + 16 * 16, 64);
      for (int64_t key = 0; key < count; key += 32) {
        const uint16_t* panel = values + key * HEAD_DIM + channel * 32;
        _tile_loadd(4, panel, 64);
        _tile_loadd(5, panel + 16 * 32, 64);
        _tile_loadd(6, scratch.probabilities[group][key / 32], 64);
        _tile_loadd(7, scratch.probabilities[group + 1][key / 32], 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, even, 64);
      _tile_stored(1, odd, 64);
      _tile_stored(2, even + 16 * 16, 64);
      _tile_stored(3, odd + 16 * 16, 64);
    }
}

}  // namespace
