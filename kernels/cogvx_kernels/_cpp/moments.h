// Mean and inverse deviation of a row, in two passes over what is in cache.

#pragma once

#include <cmath>
#include <cstdint>

inline void moments(const float* x, int64_t dim, float eps, float& mean, float& inverse) {
  float sum = 0, squares = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < dim; ++i) sum += x[i];
  mean = sum / dim;
#pragma omp simd reduction(+ : squares)
  for (int64_t i = 0; i < dim; ++i) squares += (x[i] - mean) * (x[i] - mean);
  inverse = 1 / std::sqrt(squares / dim + eps);
}
