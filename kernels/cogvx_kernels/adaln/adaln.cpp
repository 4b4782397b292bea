// Expert AdaLN of the joint stream and gated residuals, in one pass over memory each. fp32 arithmetic, one rounding at
// the end. The formulas are in reference.py. A row's text or video vectors are chosen by its place in the sequence.

#include <omp.h>

#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "moments.h"

namespace {

// (1 or batch, 2, dim): the stride of the batch is 0 where one vector serves all.
template <typename T>
struct Vectors {
  const T* data;
  int64_t batch_stride, expert_stride;
  const T* of(int64_t batch, int64_t expert) const { return data + batch * batch_stride + expert * expert_stride; }
};

// LayerNorm's affine and the modulation as one: (n * weight + bias) * (1 + scale) + shift = n * factor + offset.
template <typename T>
void fold(const T* weight, const T* bias, const T* shift, const T* scale, int64_t dim, float* factor, float* offset) {
  for (int64_t i = 0; i < dim; ++i) {
    const float grow = 1 + widen(scale[i]);
    factor[i] = (weight ? widen(weight[i]) : 1) * grow;
    offset[i] = (bias ? widen(bias[i]) : 0) * grow + widen(shift[i]);
  }
}

// residual = x + gate * y where there is a y; normed = modulated LayerNorm of residual (or of x).
template <typename T>
void norm_modulate(const T* x, const T* y, Vectors<T> gate, const T* weight, const T* bias, Vectors<T> shift,
                   Vectors<T> scale, int64_t batch, int64_t length, int64_t dim, int64_t text, float eps, T* residual,
                   T* normed, int threads) {
  const bool shared = shift.batch_stride == 0 && scale.batch_stride == 0;
  std::vector<float> folded((shared ? 1 : batch) * 4 * dim);
  for (int64_t i = 0; i < (shared ? 2 : 2 * batch); ++i)
    fold(weight, bias, shift.of(i / 2, i % 2), scale.of(i / 2, i % 2), dim, &folded[i * 2 * dim],
         &folded[i * 2 * dim + dim]);
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> row(dim);
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * length; ++i) {
      const int64_t b = i / length, expert = i % length >= text;
      float* wide = row.data();
      if (y) {
        const T* g = gate.of(b, expert);
        for (int64_t d = 0; d < dim; ++d) {
          const T sum = narrow<T>(widen(x[i * dim + d]) + widen(g[d]) * widen(y[i * dim + d]));
          residual[i * dim + d] = sum;
          wide[d] = widen(sum);
        }
      } else {
        for (int64_t d = 0; d < dim; ++d) wide[d] = widen(x[i * dim + d]);
      }
      float mean, inverse;
      moments(wide, dim, eps, mean, inverse);
      const float* factor = &folded[((shared ? 0 : b) * 2 + expert) * 2 * dim];
      const float* offset = factor + dim;
      for (int64_t d = 0; d < dim; ++d)
        normed[i * dim + d] = narrow<T>((wide[d] - mean) * inverse * factor[d] + offset[d]);
    }
  }
}

template <typename T>
void add_gated(const T* x, const T* y, Vectors<T> gate, int64_t batch, int64_t length, int64_t dim, int64_t text,
               T* output, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < batch * length; ++i) {
    const T* g = gate.of(i / length, i % length >= text);
    for (int64_t d = 0; d < dim; ++d)
      output[i * dim + d] = narrow<T>(widen(x[i * dim + d]) + widen(g[d]) * widen(y[i * dim + d]));
  }
}

}  // namespace

// Pointers may be null where the operation has no such operand; strides in elements.
#define EXPORT(NAME, T)                                                                                               \
  extern "C" void layer_norm_modulate_##NAME(                                                                         \
      const T* x, const T* y, const T* gate, const int64_t* gate_strides, const T* weight, const T* bias,             \
      const T* shift, const int64_t* shift_strides, const T* scale, const int64_t* scale_strides, int64_t batch,      \
      int64_t length, int64_t dim, int64_t text, float eps, T* residual, T* normed, int threads) {                    \
    norm_modulate<T>(x, y, {gate, gate_strides[0], gate_strides[1]}, weight, bias,                                    \
                     {shift, shift_strides[0], shift_strides[1]}, {scale, scale_strides[0], scale_strides[1]}, batch, \
                     length, dim, text, eps, residual, normed, threads);                                              \
  }                                                                                                                   \
  extern "C" void gated_residual_##NAME(const T* x, const T* y, const T* gate, const int64_t* gate_strides,           \
                                        int64_t batch, int64_t length, int64_t dim, int64_t text, T* output,          \
                                        int threads) {                                                                \
    add_gated<T>(x, y, {gate, gate_strides[0], gate_strides[1]}, batch, length, dim, text, output, threads);          \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
