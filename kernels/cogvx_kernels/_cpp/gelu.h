// GELU in its tanh form, in code that compilers turn into vectors.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

// 2^x for -126 <= x <= 126, exact to the rounding of fp32: a polynomial of degree 6, minimax on [-0.5, 0.5].
inline float exp2_of(float x) {
  const float whole = std::nearbyintf(x), fraction = x - whole;
  float y = 1.5345812e-4f;
  y = y * fraction + 1.3399931e-3f;
  y = y * fraction + 9.6184890e-3f;
  y = y * fraction + 5.5503288e-2f;
  y = y * fraction + 2.4022647e-1f;
  y = y * fraction + 6.9314721e-1f;
  y = y * fraction + 1.0f;
  const int32_t exponent = (int32_t(whole) + 127) << 23;
  float power;
  std::memcpy(&power, &exponent, 4);
  return y * power;
}

// x * sigmoid(2 u), u = sqrt(2 / pi) (x + 0.044715 x^3) (Hendrycks & Gimpel 2016).
inline float gelu(float x) {
  const float factor = -2 * 0.7978845608f * 1.44269504f;  // exp(-2 u) = 2^(-2 u log2 e)
  float power = factor * (x + 0.044715f * x * x * x);
  const bool vanishes = power > 126;  // GELU is 0 there, and x below -126; NaN is neither
  power = power < -126 ? -126 : vanishes ? 126 : power;
  return vanishes ? 0 : x / (1 + exp2_of(power));
}
