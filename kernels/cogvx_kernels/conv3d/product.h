// Products of pixels with blocks of weights, in fp32, whose sums are short.
//
// One chain of additions over all taps and channels rounds with each of thousands of steps. Here a chain has at most
// CHAIN steps and starts at zero; what it comes to is then added to the output's sum: the error is that of the short
// chain. The time is that of the products, since a chain's steps keep the accumulators in registers.

#pragma once

#include <algorithm>
#include <cstdint>

namespace {

#ifdef __AVX512F__
constexpr int LANES = 16, VECTORS = 4, PIXELS = 6;  // 24 accumulators of the 32 registers
#else
constexpr int LANES = 8, VECTORS = 2, PIXELS = 6;  // 12 of 16
#endif
constexpr int WIDTH = LANES * VECTORS;  // output channels that are computed together
constexpr int CHAIN = 64;

typedef float Vector __attribute__((vector_size(LANES * 4), aligned(4)));

// sums[p][...] += the products of `steps` channels of COUNT neighbouring pixels with a chunk of weights.
template <int COUNT, int USED>
inline void multiply(const float* x, int64_t stride, const float* weights, int64_t steps, float* sums) {
  Vector accumulators[COUNT][USED];
  for (int p = 0; p < COUNT; ++p)
    for (int v = 0; v < USED; ++v) accumulators[p][v] = Vector{};
  for (int64_t c = 0; c < steps; ++c) {
    Vector row[USED];
    for (int v = 0; v < USED; ++v) row[v] = *reinterpret_cast<const Vector*>(weights + c * USED * LANES + v * LANES);
    for (int p = 0; p < COUNT; ++p) {
      const float value = x[p * stride + c];
      for (int v = 0; v < USED; ++v) accumulators[p][v] += value * row[v];
    }
  }
  for (int p = 0; p < COUNT; ++p)
    for (int v = 0; v < USED; ++v) {
      Vector* sum = reinterpret_cast<Vector*>(sums + p * WIDTH + v * LANES);
      *sum = *sum + accumulators[p][v];
    }
}

template <int USED>
void multiply_row(const float* x, int64_t stride, const float* weights, int64_t steps, float* sums, int64_t pixels) {
  int64_t p = 0;
  for (; p + PIXELS <= pixels; p += PIXELS)
    multiply<PIXELS, USED>(x + p * stride, stride, weights, steps, sums + p * WIDTH);
  for (; p + 2 <= pixels; p += 2) multiply<2, USED>(x + p * stride, stride, weights, steps, sums + p * WIDTH);
  if (p < pixels) multiply<1, USED>(x + p * stride, stride, weights, steps, sums + p * WIDTH);
}

typedef void (*Multiply)(const float*, int64_t, const float*, int64_t, float*, int64_t);

// How many vectors hold `channels` output channels, WIDTH at most: the last block may be narrower.
inline int vectors_of(int64_t channels) { return int((std::min<int64_t>(channels, WIDTH) + LANES - 1) / LANES); }

inline Multiply kernel_of(int vectors) {
  switch (vectors) {
    case 1: return multiply_row<1>;
    case 2: return multiply_row<2>;
#ifdef __AVX512F__
    case 3: return multiply_row<3>;
    case 4: return multiply_row<4>;
#endif
  }
  return nullptr;
}

}  // namespace
