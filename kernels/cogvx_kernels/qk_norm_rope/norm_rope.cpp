// LayerNorm over each head of Q or K and rotary positions, in one pass over memory. fp32 arithmetic, one rounding at the
// end. The formula is in reference.py.

#include <omp.h>

#include <cstdint>
#include <vector>

#include "bfloat16.h"
#include "moments.h"

namespace {

// x (batch, length, heads, head_dim) with strides, output contiguous. Pairs of channels rotate, as in diffusers.
// A head is short: known at compile time (SIZE, 0 if it is not), its loops become straight vector code.
template <typename T, int64_t SIZE>
void norm_rotate(const T* x, const int64_t* strides, const T* weight, const T* bias, const float* cosines,
                 const float* sines, int64_t batch, int64_t length, int64_t heads, int64_t any_head_dim, int64_t text,
                 float eps, T* output, int threads) {
  const int64_t head_dim = SIZE ? SIZE : any_head_dim;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> buffer(4 * head_dim);
    float *wide = buffer.data(), *normed = wide + head_dim, *factor = normed + head_dim, *offset = factor + head_dim;
    for (int64_t d = 0; d < head_dim; ++d) {
      factor[d] = weight ? widen(weight[d]) : 1;
      offset[d] = bias ? widen(bias[d]) : 0;
    }
#pragma omp for schedule(static)
    for (int64_t i = 0; i < batch * length; ++i) {
      const int64_t position = i % length;
      const bool rotates = cosines && position >= text;
      const float *c = cosines + (position - text) * head_dim, *s = sines + (position - text) * head_dim;
      for (int64_t h = 0; h < heads; ++h) {
        const T* source = x + i / length * strides[0] + position * strides[1] + h * strides[2];
        T* target = output + (i * heads + h) * head_dim;
        for (int64_t d = 0; d < head_dim; ++d) wide[d] = widen(source[d]);
        float mean, inverse;
        moments(wide, head_dim, eps, mean, inverse);
        for (int64_t d = 0; d < head_dim; ++d) normed[d] = (wide[d] - mean) * inverse * factor[d] + offset[d];
        if (rotates) {
          for (int64_t d = 0; d < head_dim; d += 2) {
            const float even = normed[d], odd = normed[d + 1];
            normed[d] = even * c[d] - odd * s[d];
            normed[d + 1] = odd * c[d + 1] + even * s[d + 1];
          }
        }
        for (int64_t d = 0; d < head_dim; ++d) target[d] = narrow<T>(normed[d]);
      }
    }
  }
}

}  // namespace

// Pointers may be null where the operation has no such operand; strides in elements.
#define EXPORT(NAME, T)\
  extern "C" void norm_rope_##NAME(const T* x, const int64_t* strides, const T* weight, const T* bias,                \
                                   const float* cosines, const float* sines, int64_t batch, int64_t length,           \
                                   int64_t heads, int64_t head_dim, int64_t text, float eps, T* output,               \
                                   int threads) {                                                                     \
    auto run = head_dim == 64 ? norm_rotate<T, 64> : norm_rotate<T, 0>;                                               \
    run(x, strides, weight, bias, cosines, sines, batch, length, heads, head_dim, text, eps, output, threads);        \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
