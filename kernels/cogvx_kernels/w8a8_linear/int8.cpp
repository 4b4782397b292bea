// What is before and after an int8 product of a linear layer: rows of activations rounded to int8, and the product's
// int32 sums scaled, with bias and GELU, into numbers again or straight into the next product's int8 rows. The formulas
// are in int8.py.

#include <omp.h>

#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "gelu.h"

namespace {

// q = round(x / scale), scale = max|x| / 127; of a row of zeros both are 0. What is not finite makes the scale NaN.
inline float round_row(const float* x, int64_t dim, int8_t* q) {
  float largest = 0;
  int32_t bad = 0;
#pragma omp simd reduction(max : largest) reduction(| : bad)
  for (int64_t d = 0; d < dim; ++d) {
    const float size = std::fabs(x[d]);
    largest = largest > size ? largest : size;
    bad |= !(size < INFINITY);
  }
  const float inverse = largest > 0 ? 127 / largest : 0;
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) q[d] = int8_t(int32_t(std::nearbyintf(x[d] * inverse)));
  return bad ? NAN : largest / 127;
}

template <bool GELU>
inline void scale_row(const int32_t* sums, int64_t dim, float row_scale, const float* scales, const float* bias,
                      float* y) {
#pragma omp simd
  for (int64_t d = 0; d < dim; ++d) {
    const float value = float(sums[d]) * (row_scale * scales[d]) + bias[d];
    y[d] = GELU ? gelu(value) : value;
  }
}

template <typename T>
void quantize(const T* x, int64_t rows, int64_t dim, int8_t* q, float* scales, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> wide(dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      for (int64_t d = 0; d < dim; ++d) wide[d] = widen(x[i * dim + d]);
      scales[i] = round_row(wide.data(), dim, q + i * dim);
    }
  }
}

// output: rows `stride` apart.
template <typename T>
void dequantize(const int32_t* sums, int64_t rows, int64_t dim, const float* row_scales, const float* scales,
                const float* bias, T* output, int64_t stride, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> wide(dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      scale_row<false>(sums + i * dim, dim, row_scales[i], scales, bias, wide.data());
      for (int64_t d = 0; d < dim; ++d) output[i * stride + d] = narrow<T>(wide[d]);
    }
  }
}

}  // namespace

extern "C" void gelu_quantize_rows(const int32_t* sums, int64_t rows, int64_t dim, const float* row_scales,
                                   const float* scales, const float* bias, int8_t* q, float* q_scales, int threads) {
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> wide(dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < rows; ++i) {
      scale_row<true>(sums + i * dim, dim, row_scales[i], scales, bias, wide.data());
      q_scales[i] = round_row(wide.data(), dim, q + i * dim);
    }
  }
}

#define EXPORT(NAME, T)                                                                                                \
  extern "C" void quantize_rows_##NAME(const T* x, int64_t rows, int64_t dim, int8_t* q, float* scales, int threads) { \
    quantize<T>(x, rows, dim, q, scales, threads);                                                                     \
  }                                                                                                                    \
  extern "C" void dequantize_##NAME(const int32_t* sums, int64_t rows, int64_t dim, const float* row_scales,           \
                                    const float* scales, const float* bias, T* output, int64_t stride, int threads) {  \
    dequantize<T>(sums, rows, dim, row_scales, scales, bias, output, stride, threads);                                 \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
