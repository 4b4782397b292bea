// What stands between the convolutions of a VAE, on channels-last frames (batch, time, height, width, channels):
// GroupNorm's statistics, and the norm with its modulation and SiLU written where the next convolution reads it.
// fp32 arithmetic, one rounding at the end. The formulas are in reference.py.

#include <omp.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "bfloat16.h"

namespace {

// (batch, time, height, width, channels), the last two contiguous; strides in elements.
template <typename T>
struct Frames {
  T* data;
  const int64_t* strides;
  T* row(int64_t b, int64_t t, int64_t h) const { return data + b * strides[0] + t * strides[1] + h * strides[2]; }
};

// Channels are taken a block at a time, whose sums stay in registers over a whole row.
constexpr int64_t BLOCK = 32;

// Sums over `width` pixels of SIZE channels, of differences to `pivot`: squares of large means would cancel.
template <typename T, int64_t SIZE>
inline void add_row(const T* x, const float* pivot, int64_t any_size, int64_t width, int64_t channels, double* sums,
                    double* squares) {
  const int64_t size = SIZE ? SIZE : any_size;
  float sum[BLOCK] = {}, square[BLOCK] = {};
  for (int64_t w = 0; w < width; ++w)
    for (int64_t c = 0; c < size; ++c) {
      const float d = widen(x[w * channels + c]) - pivot[c];
      sum[c] += d;
      square[c] += d * d;
    }
  for (int64_t c = 0; c < size; ++c) sums[c] += sum[c], squares[c] += square[c];
}

// mean and 1 / std of each group: (batch, groups).
template <typename T>
void statistics(Frames<const T> x, int64_t batch, int64_t time, int64_t height, int64_t width, int64_t channels,
                int64_t groups, float eps, float* mean, float* inverse, int threads) {
  const int64_t each = channels / groups;
  std::vector<float> pivot(channels);
  for (int64_t b = 0; b < batch; ++b) {
    const T* first = x.row(b, 0, 0);
    for (int64_t g = 0; g < groups; ++g)
      for (int64_t c = 0; c < each; ++c) pivot[g * each + c] = widen(first[g * each]);
    std::vector<double> totals(2 * channels * threads, 0.0);
#pragma omp parallel num_threads(threads)
    {
      double* sums = &totals[2 * channels * omp_get_thread_num()];
#pragma omp for schedule(static)
      for (int64_t i = 0; i < time * height; ++i) {
        const T* row = x.row(b, i / height, i % height);
        // A row in pieces: fp32 sums of a few hundred numbers are exact enough, of a million they are not.
        for (int64_t w = 0; w < width; w += 128) {
          const int64_t count = std::min<int64_t>(128, width - w);
          for (int64_t c = 0; c < channels; c += BLOCK) {
            const int64_t size = std::min(BLOCK, channels - c);
            auto add = size == BLOCK ? add_row<T, BLOCK> : add_row<T, 0>;
            add(row + w * channels + c, &pivot[c], size, count, channels, sums + c, sums + channels + c);
          }
        }
      }
    }
    const double count = double(time) * height * width * each;
    for (int64_t g = 0; g < groups; ++g) {
      double sum = 0, square = 0;
      for (int t = 0; t < threads; ++t)
        for (int64_t c = g * each; c < (g + 1) * each; ++c) {
          sum += totals[2 * channels * t + c];
          square += totals[2 * channels * t + channels + c];
        }
      const double shift = sum / count;
      mean[b * groups + g] = float(pivot[g * each] + shift);
      inverse[b * groups + g] = float(1 / std::sqrt(std::max(square / count - shift * shift, 0.0) + eps));
    }
  }
}

// y / (1 + exp(-y)). exp2 by its exponent bits and a polynomial of the rest in [-1/2, 1/2] (Taylor coefficients of
// 2^r to the 7th power, error below 1e-8), so that the loop is vector code.
inline float silu(float y) {
  const float power = std::min(std::max(y * -1.44269504088896f, -126.0f), 126.0f);
  const float whole = std::nearbyint(power), r = power - whole;
  float p = 1.5252734e-5f;
  p = p * r + 1.5403530e-4f;
  p = p * r + 1.3333558e-3f;
  p = p * r + 9.6181291e-3f;
  p = p * r + 5.5504109e-2f;
  p = p * r + 2.4022651e-1f;
  p = p * r + 6.9314718e-1f;
  p = p * r + 1.0f;
  const int32_t bits = (int32_t(whole) + 127) << 23;
  float scale;
  std::memcpy(&scale, &bits, 4);
  return y / (1.0f + p * scale);
}

inline bool inside(const int64_t* indices, int64_t count, int64_t size) {
  return std::all_of(indices, indices + count, [=](int64_t index) { return 0 <= index && index < size; });
}

// output = silu(x * scale + shift), the tables (batch, table_time, table_height, table_width, channels) read at each
// axis' own index.
template <typename T>
void modulate(Frames<const T> x, const float* scale, const float* shift, const int64_t* table, const int64_t* frames,
              const int64_t* rows, const int64_t* columns, int64_t batch, int64_t time, int64_t height, int64_t width,
              int64_t channels, Frames<T> output, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t i = 0; i < batch * time * height; ++i) {
    const int64_t b = i / (time * height), t = i / height % time, h = i % height;
    const int64_t line = ((b * table[0] + frames[t]) * table[1] + rows[h]) * table[2];
    const T* source = x.row(b, t, h);
    T* target = output.row(b, t, h);
    for (int64_t w = 0; w < width; ++w) {
      const float *a = scale + (line + columns[w]) * channels, *o = shift + (line + columns[w]) * channels;
      const T* from = source + w * channels;
      T* to = target + w * channels;
#pragma omp simd
      for (int64_t c = 0; c < channels; ++c) to[c] = narrow<T>(silu(widen(from[c]) * a[c] + o[c]));
    }
  }
}

}  // namespace

#define EXPORT(NAME, T)                                                                                               \
  extern "C" void group_norm_statistics_##NAME(const T* x, const int64_t* strides, int64_t batch, int64_t time,       \
                                               int64_t height, int64_t width, int64_t channels, int64_t groups,       \
                                               float eps, float* mean, float* inverse, int threads) {                 \
    statistics<T>({x, strides}, batch, time, height, width, channels, groups, eps, mean, inverse, threads);           \
  }                                                                                                                   \
  extern "C" int group_norm_modulate_silu_##NAME(                                                                     \
      const T* x, const int64_t* strides, const float* scale, const float* shift, const int64_t* table,               \
      const int64_t* frames, const int64_t* rows, const int64_t* columns, int64_t batch, int64_t time,                \
      int64_t height, int64_t width, int64_t channels, T* output, const int64_t* output_strides, int threads) {       \
    if (!(inside(frames, time, table[0]) && inside(rows, height, table[1]) && inside(columns, width, table[2])))      \
      return 1;                                                                                                       \
    modulate<T>({x, strides}, scale, shift, table, frames, rows, columns, batch, time, height, width, channels,       \
                {output, output_strides}, threads);                                                                   \
    return 0;                                                                                                         \
  }

EXPORT(float32, float)
EXPORT(bfloat16, bfloat16)
