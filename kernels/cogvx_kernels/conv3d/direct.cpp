// A convolution of channels-last frames (batch, time, height, width, channels) in fp32 whose sums are short.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "product.h"

namespace {

constexpr int SEGMENT = 96;  // pixels that are computed together, of one row or of several: they share reads of weights

}  // namespace

// Number of floats that `pack_weight` writes.
extern "C" int64_t packed_size(int64_t outputs, int64_t inputs, int64_t taps) {
  int64_t size = 0;
  for (int64_t first = 0; first < outputs; first += WIDTH) size += taps * inputs * vectors_of(outputs - first) * LANES;
  return size;
}

// weight (outputs, inputs, taps) to (block of outputs, taps, inputs, outputs of the block), zeros where there are none.
extern "C" void pack_weight(const float* weight, int64_t outputs, int64_t inputs, int64_t taps, float* packed,
                            int threads) {
  const int64_t blocks = (outputs + WIDTH - 1) / WIDTH;
#pragma omp parallel num_threads(threads)
  {
    // By way of a block in cache: reads follow the weight, writes are whole rows.
    std::vector<float> block(taps * WIDTH);
#pragma omp for schedule(static)
    for (int64_t n = 0; n < blocks * inputs; ++n) {
      const int64_t first = n / inputs * WIDTH, i = n % inputs;
      const int64_t wide = vectors_of(outputs - first) * LANES, there = std::min(wide, outputs - first);
      for (int64_t o = 0; o < wide; ++o) {
        const float* from = weight + ((first + o) * inputs + i) * taps;
        for (int64_t tap = 0; tap < taps; ++tap) block[tap * wide + o] = o < there ? from[tap] : 0;
      }
      for (int64_t tap = 0; tap < taps; ++tap)
        std::memcpy(packed + first * taps * inputs + (tap * inputs + i) * wide, &block[tap * wide],
                    wide * sizeof(float));
    }
  }
}

// output[b, t, h, w] = bias + sum over taps of x[b, t + i, step h + j, step w + k] * weight (and the output before, if
// `adds`).
// Strides in elements, of batch, time, height and width; channels are contiguous.
extern "C" void convolution(const float* x, const int64_t* strides, const float* packed, const float* bias,
                            const int64_t* kernel, int64_t step, int64_t batch, int64_t time, int64_t height, int64_t width,
                            int64_t inputs, int64_t outputs, float* output, const int64_t* output_strides, int adds,
                            int threads) {
  const int64_t taps = kernel[0] * kernel[1] * kernel[2], segments = (width + SEGMENT - 1) / SEGMENT;
  const int64_t together = std::max<int64_t>(1, SEGMENT / width), groups = (height + together - 1) / together;
  const int64_t down = step * strides[2], right = step * strides[3];  // from one output pixel's input to the next's
#pragma omp parallel for num_threads(threads) schedule(dynamic)
  for (int64_t i = 0; i < batch * time * groups * segments; ++i) {
    const int64_t left = i % segments * SEGMENT, top = i / segments % groups * together,
                  t = i / segments / groups % time, b = i / segments / groups / time;
    const int64_t pixels = std::min<int64_t>(SEGMENT, width - left), rows = std::min(together, height - top);
    const float* corner = x + b * strides[0] + t * strides[1] + top * down + left * right;
    float* target =
        output + b * output_strides[0] + t * output_strides[1] + top * output_strides[2] + left * output_strides[3];
    alignas(64) float sums[SEGMENT * WIDTH];
    for (int64_t first = 0; first < outputs; first += WIDTH) {
      const int vectors = vectors_of(outputs - first);
      const Multiply multiply_vectors = kernel_of(vectors);
      const int64_t there = std::min<int64_t>(WIDTH, outputs - first);
      const float* weights = packed + first * taps * inputs;
      std::memset(sums, 0, sizeof(float) * rows * pixels * WIDTH);
      for (int64_t tap = 0; tap < taps; ++tap) {
        const int64_t k = tap % kernel[2], j = tap / kernel[2] % kernel[1], a = tap / kernel[2] / kernel[1];
        const float* from = corner + a * strides[1] + j * strides[2] + k * strides[3];
        for (int64_t c = 0; c < inputs; c += CHAIN) {
          const int64_t steps = std::min<int64_t>(CHAIN, inputs - c);
          for (int64_t row = 0; row < rows; ++row)
            multiply_vectors(from + c + row * down, right, weights, steps, sums + row * pixels * WIDTH, pixels);
          weights += steps * vectors * LANES;
        }
      }
      for (int64_t p = 0; p < rows * pixels; ++p) {
        float* to = target + p / pixels * output_strides[2] + p % pixels * output_strides[3] + first;
        for (int64_t o = 0; o < there; ++o) {
          const float sum = sums[p * WIDTH + o] + (bias ? bias[first + o] : 0.0f);
          to[o] = adds ? to[o] + sum : sum;
        }
      }
    }
  }
}
