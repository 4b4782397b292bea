// What follows the first product of a feed-forward in fp32, in place and in one pass.

#include <omp.h>

#include <cstdint>

#include "gelu.h"

extern "C" void bias_gelu_float32(float* x, const float* bias, int64_t rows, int64_t dim, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < rows; ++i)
    for (int64_t d = 0; d < dim; ++d) x[i * dim + d] = gelu(x[i * dim + d] + bias[d]);
}
