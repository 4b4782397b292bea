// The products of `attention.cpp` on vectors of pairs of bf16 (AVX512-BF16).

#pragma once

#include <immintrin.h>

#include "attention.h"

namespace {

inline bool available() { return true; }
inline void begin() {}
inline void end() {}

constexpr int64_t CHUNK = 16;  // pairs that lie together in what is multiplied

// ROWS x all queries of `c`, to which it adds or which it overwrites: the products of rows of `a` with the columns of
// `b`, one instruction for a pair of a row and 16 queries. Offsets are in dwords; pairs of one chunk are contiguous.
template <int ROWS, bool ADDS>
inline void multiply(const uint32_t* a, int64_t row, int64_t chunk, int64_t chunks, const uint32_t* b, int64_t b_group,
                     float* c, int64_t c_group) {
  __m512 sums[ROWS][GROUPS];
  for (int r = 0; r < ROWS; ++r)
    for (int g = 0; g < GROUPS; ++g)
      sums[r][g] = ADDS ? _mm512_load_ps(c + g * c_group + r * 16) : _mm512_setzero_ps();
  for (int64_t i = 0; i < chunks; ++i, a += chunk, b += CHUNK * 16)
    for (int64_t pair = 0; pair < CHUNK; ++pair) {
      __m512bh columns[GROUPS];
      for (int g = 0; g < GROUPS; ++g) columns[g] = (__m512bh)_mm512_load_si512(b + g * b_group + pair * 16);
      for (int r = 0; r < ROWS; ++r) {
        const __m512bh both = (__m512bh)_mm512_set1_epi32(int(a[r * row + pair]));
        for (int g = 0; g < GROUPS; ++g) sums[r][g] = _mm512_dpbf16_ps(sums[r][g], both, columns[g]);
      }
    }
  for (int r = 0; r < ROWS; ++r)
    for (int g = 0; g < GROUPS; ++g) _mm512_store_ps(c + g * c_group + r * 16, sums[r][g]);
}

// Accumulators for 4 rows: 16 of 32 registers, and more than the 6 cycles times 1 product that an instruction takes.
constexpr int64_t ROWS = 4;

// S^T = K Q^T.
inline void multiply_scores(const uint16_t* keys, int64_t count, Scratch& scratch) {
  constexpr int64_t PAIRS = HEAD_DIM / 2;
  for (int64_t key = 0; key < count; key += ROWS)
    multiply<ROWS, false>((const uint32_t*)keys + key * PAIRS, PAIRS, CHUNK, PAIRS / CHUNK, scratch.queries[0][0],
                          PAIRS * 16, scratch.scores[0][key], KEYS * 16);
}

// O^T += V^T P^T over the block's keys.
inline void multiply_values(const uint16_t* values, int64_t count, Scratch& scratch) {
  for (int64_t channel = 0; channel < HEAD_DIM; channel += ROWS)
    multiply<ROWS, true>((const uint32_t*)values + channel * CHUNK, CHUNK, HEAD_DIM * CHUNK, count / (2 * CHUNK),
                         scratch.probabilities[0][0], KEYS / 32 * TILE, scratch.output[0][channel], HEAD_DIM * 16);
}

}  // namespace
