// The causal autoencoder's convolution, t x 3 x 3 of stride 1, on channels-last frames (batch, time, height, width,
// channels) by Winograd's F(M x M, 3 x 3) over height and width (Lavin and Gray, arXiv:1509.09308): M x M neighbouring
// pixels are made by (M + 2)^2 products a channel in the place of 9 M^2, 16 of 36 for M = 2 and 36 of 144 for M = 4.
// All in fp32, whatever the frames' type.
//
// Terms are sums and differences of inputs, so they are larger than what they come to and rounding weighs more: 1.7
// times for M = 2, which the short chains of product.h make up for, and some ten times for M = 4, which is nothing
// beside the rounding of bf16 frames.

#include <omp.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "bfloat16.h"
#include "product.h"

namespace {

constexpr int TILES = 24;  // of M x M pixels, computed together: they share reads of weights, and stay in L2
// From one product's numbers to the next's; a line more than they take, or the products of a tile would share few of the
// cache's sets.
constexpr int64_t VALUES = TILES * CHAIN + LANES, SUMS = TILES * WIDTH + LANES;

// The transforms along one axis: of inputs, of weights and back, for `d`, `g` and `m` with a stride.
template <int M>
struct Transform;

template <>
struct Transform<2> {
  static constexpr int IN = 4;

  template <typename T>
  static void inputs(const T* d, int s, T* v) {
    const T d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s];
    v[0] = d0 - d2, v[s] = d1 + d2, v[2 * s] = d2 - d1, v[3 * s] = d1 - d3;
  }

  template <typename T>
  static void weights(const T* g, int s, T* u, int to) {
    const T ends = g[0] + g[2 * s];
    u[0] = g[0], u[to] = (ends + g[s]) / 2, u[2 * to] = (ends - g[s]) / 2, u[3 * to] = g[2 * s];
  }

  template <typename T>
  static void outputs(const T* m, int s, T* y) {
    const T m0 = m[0], m1 = m[s], m2 = m[2 * s], m3 = m[3 * s];
    y[0] = m0 + m1 + m2, y[s] = m1 - m2 - m3;
  }
};

// The points are 0, 1, -1, 2, -2 and infinity.
template <>
struct Transform<4> {
  static constexpr int IN = 6;

  template <typename T>
  static void inputs(const T* d, int s, T* v) {
    const T d0 = d[0], d1 = d[s], d2 = d[2 * s], d3 = d[3 * s], d4 = d[4 * s], d5 = d[5 * s];
    const T even = d4 - 4 * d2, odd = d3 - 4 * d1, near = d4 - d2, far = 2 * (d3 - d1);
    v[0] = 4 * d0 - 5 * d2 + d4, v[s] = even + odd, v[2 * s] = even - odd, v[3 * s] = near + far,
    v[4 * s] = near - far, v[5 * s] = 4 * d1 - 5 * d3 + d5;
  }

  template <typename T>
  static void weights(const T* g, int s, T* u, int to) {
    const T ends = g[0] + g[2 * s], far = g[0] / 24 + g[2 * s] / 6;
    u[0] = g[0] / 4, u[to] = -(ends + g[s]) / 6, u[2 * to] = -(ends - g[s]) / 6, u[3 * to] = far + g[s] / 12,
    u[4 * to] = far - g[s] / 12, u[5 * to] = g[2 * s];
  }

  template <typename T>
  static void outputs(const T* m, int s, T* y) {
    const T m0 = m[0], m5 = m[5 * s];
    const T sum = m[s] + m[2 * s], difference = m[s] - m[2 * s];
    const T far_sum = m[3 * s] + m[4 * s], far_difference = m[3 * s] - m[4 * s];
    y[0] = m0 + sum + far_sum, y[s] = difference + 2 * far_difference, y[2 * s] = sum + 4 * far_sum,
    y[3 * s] = difference + 8 * far_difference + m5;
  }
};

// LANES numbers as fp32, and back.
inline Vector load(const float* from) { return *reinterpret_cast<const Vector*>(from); }
inline void save(Vector x, float* to) { *reinterpret_cast<Vector*>(to) = x; }

typedef uint16_t Halves __attribute__((vector_size(LANES * 2), aligned(2)));
typedef uint32_t Words __attribute__((vector_size(LANES * 4), aligned(4)));

inline Vector load(const bfloat16* from) {
  return reinterpret_cast<Vector>(__builtin_convertvector(*reinterpret_cast<const Halves*>(from), Words) << 16);
}

inline void save(Vector x, bfloat16* to) {  // as `narrow` does
  const Words bits = reinterpret_cast<Words>(x), rounded = (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
  const Words is_nan = reinterpret_cast<Words>(x != x);
  *reinterpret_cast<Halves*>(to) = __builtin_convertvector((rounded & ~is_nan) | (is_nan & 0x7fc0), Halves);
}

template <typename T>
inline Vector load_some(const T* from, int64_t count) {
  Vector x = {};
  for (int64_t l = 0; l < count; ++l) x[l] = widen(from[l]);
  return x;
}

// What the products of a tile have: `steps` channels of `rows` x `columns` pixels, zeros beyond, `VALUES` apart.
template <int M, typename T>
void transform(const T* x, int64_t down, int64_t right, int64_t rows, int64_t columns, int64_t steps,
               float* values) {
  constexpr int IN = Transform<M>::IN;
  const bool whole = rows >= IN && columns >= IN;
  for (int64_t c = 0; c < steps; c += LANES) {
    const int64_t there = steps - c;
    Vector d[IN * IN];
    if (whole && there >= LANES) {
      for (int r = 0; r < IN; ++r)
        for (int k = 0; k < IN; ++k) {
          const T* from = x + r * down + k * right + c;
          d[r * IN + k] = load(from);
          // The next tile's, where it does not overlap: too far apart for the hardware to foresee.
          if (k >= IN - M) __builtin_prefetch(from + M * right);
        }
    } else {
      for (int r = 0; r < IN; ++r)
        for (int k = 0; k < IN; ++k)
          d[r * IN + k] = r < rows && k < columns
                              ? load_some(x + r * down + k * right + c, std::min<int64_t>(LANES, there))
                              : Vector{};
    }
    for (int k = 0; k < IN; ++k) Transform<M>::inputs(d + k, IN, d + k);
    for (int r = 0; r < IN; ++r) Transform<M>::inputs(d + r * IN, 1, d + r * IN);
    for (int n = 0; n < IN * IN; ++n) save(d[n], values + n * VALUES + c);
  }
}

// The tile's `rows` x `columns` pixels of `there` output channels; sums are `SUMS` apart.
template <int M, typename T>
void finish(const float* sums, const float* bias, int64_t there, int64_t rows, int64_t columns, T* to,
            int64_t down, int64_t right, bool adds) {
  constexpr int IN = Transform<M>::IN;
  for (int64_t o = 0; o < there; o += LANES) {
    const int64_t count = std::min<int64_t>(LANES, there - o);
    Vector m[IN * IN];
    for (int n = 0; n < IN * IN; ++n) m[n] = load(sums + n * SUMS + o);
    for (int k = 0; k < IN; ++k) Transform<M>::outputs(m + k, IN, m + k);
    for (int r = 0; r < M; ++r) Transform<M>::outputs(m + r * IN, 1, m + r * IN);
    const Vector offset = bias == nullptr ? Vector{} : load_some(bias + o, count);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t k = 0; k < columns; ++k) {
        T* pixel = to + r * down + k * right + o;
        Vector sum = m[r * IN + k] + offset;
        if (count == LANES) {
          save(adds ? load(pixel) + sum : sum, pixel);
        } else {
          if (adds) sum += load_some(pixel, count);
          for (int64_t l = 0; l < count; ++l) pixel[l] = narrow<T>(sum[l]);
        }
      }
  }
}

// output[b, t, h, w] = bias + sum over taps of x[b, t + i, h + j, w + k] * weight (and the output before, if `adds`).
template <int M, typename T>
void convolve(const T* x, const int64_t* strides, const float* packed, const float* bias, int64_t taps, int64_t batch,
              int64_t time, int64_t height, int64_t width, int64_t inputs, int64_t outputs, T* output,
              const int64_t* output_strides, bool adds, int threads) {
  constexpr int IN = Transform<M>::IN, PRODUCTS = IN * IN;
  const int64_t across = (width + M - 1) / M, tiles = (height + M - 1) / M * across;
  const int64_t segments = (tiles + TILES - 1) / TILES, blocks = (outputs + WIDTH - 1) / WIDTH;
#pragma omp parallel num_threads(threads)
  {
    std::vector<float> memory(PRODUCTS * (VALUES + SUMS) + LANES);
    float* values = memory.data() + (LANES - reinterpret_cast<uintptr_t>(memory.data()) / sizeof(float) % LANES);
    float* sums = values + PRODUCTS * VALUES;
    // Blocks of outputs outermost: their weights are read from memory once and from the cache for all pixels.
#pragma omp for schedule(dynamic)
    for (int64_t i = 0; i < blocks * batch * time * segments; ++i) {
      const int64_t tile = i % segments * TILES, t = i / segments % time, b = i / segments / time % batch,
                    first = i / segments / time / batch * WIDTH;
      const int64_t count = std::min<int64_t>(TILES, tiles - tile), there = std::min<int64_t>(WIDTH, outputs - first);
      const int vectors = vectors_of(outputs - first);
      const Multiply multiply_vectors = kernel_of(vectors);
      const float* weights = packed + first * taps * PRODUCTS * inputs;
      std::memset(sums, 0, sizeof(float) * PRODUCTS * SUMS);
      for (int64_t tap = 0; tap < taps; ++tap)
        for (int64_t c = 0; c < inputs; c += CHAIN) {
          const int64_t steps = std::min<int64_t>(CHAIN, inputs - c);
          for (int64_t n = 0; n < count; ++n) {
            const int64_t top = (tile + n) / across * M, left = (tile + n) % across * M;
            const T* corner = x + b * strides[0] + (t + tap) * strides[1] + top * strides[2] + left * strides[3] + c;
            transform<M>(corner, strides[2], strides[3], height + 2 - top, width + 2 - left, steps,
                         values + n * CHAIN);
          }
          for (int n = 0; n < PRODUCTS; ++n)
            multiply_vectors(values + n * VALUES, CHAIN,
                             weights + ((tap * PRODUCTS + n) * inputs + c) * vectors * LANES, steps, sums + n * SUMS,
                             count);
        }
      for (int64_t n = 0; n < count; ++n) {
        const int64_t top = (tile + n) / across * M, left = (tile + n) % across * M;
        T* to = output + b * output_strides[0] + t * output_strides[1] + top * output_strides[2] +
                left * output_strides[3] + first;
        finish<M>(sums + n * WIDTH, bias ? bias + first : nullptr, there,
                  std::min<int64_t>(M, height - top), std::min<int64_t>(M, width - left), to, output_strides[2],
                  output_strides[3], adds);
      }
    }
  }
}

typedef double Doubles __attribute__((vector_size(LANES * 8)));

template <int M, typename T>
void pack(const T* weight, int64_t outputs, int64_t inputs, int64_t taps, float* packed, int threads) {
  constexpr int IN = Transform<M>::IN, PRODUCTS = IN * IN;
  const int64_t blocks = (outputs + WIDTH - 1) / WIDTH;
#pragma omp parallel for num_threads(threads) schedule(static)
  for (int64_t n = 0; n < blocks * inputs; ++n) {
    const int64_t first = n / inputs * WIDTH, i = n % inputs, wide = vectors_of(outputs - first) * LANES;
    for (int64_t tap = 0; tap < taps; ++tap)
      for (int64_t o = 0; o < wide; o += LANES) {
        Doubles g[9] = {}, rows[IN * 3], u[PRODUCTS];
        for (int64_t l = 0; l < std::min<int64_t>(LANES, outputs - first - o); ++l) {
          const T* from = weight + (((first + o + l) * inputs + i) * taps + tap) * 9;
          for (int k = 0; k < 9; ++k) g[k][l] = widen(from[k]);
        }
        for (int k = 0; k < 3; ++k) Transform<M>::weights(g + k, 3, rows + k, 3);
        for (int r = 0; r < IN; ++r) Transform<M>::weights(rows + r * 3, 1, u + r * IN, 1);
        float* to = packed + first * taps * PRODUCTS * inputs + (tap * PRODUCTS * inputs + i) * wide + o;
        for (int k = 0; k < PRODUCTS; ++k) save(__builtin_convertvector(u[k], Vector), to + k * inputs * wide);
      }
  }
}

}  // namespace

// Number of floats that `pack_weight` writes.
extern "C" int64_t packed_size(int64_t outputs, int64_t inputs, int64_t taps, int tile) {
  int64_t size = 0;
  for (int64_t first = 0; first < outputs; first += WIDTH) size += vectors_of(outputs - first) * LANES;
  return size * inputs * taps * (tile + 2) * (tile + 2);
}

// weight (outputs, inputs, taps, 3, 3) to (block of outputs, taps, products, inputs, outputs of the block).
extern "C" void pack_weight(const void* weight, int is_bfloat16, int64_t outputs, int64_t inputs, int64_t taps, int tile,
                            float* packed, int threads) {
  const auto run = [&](auto data) {
    if (tile == 2) return pack<2>(data, outputs, inputs, taps, packed, threads);
    return pack<4>(data, outputs, inputs, taps, packed, threads);
  };
  is_bfloat16 ? run(static_cast<const bfloat16*>(weight)) : run(static_cast<const float*>(weight));
}

// Strides in elements, of batch, time, height and width; channels are contiguous. `x` has a row and a column of zeros on
// each side, and `taps` - 1 frames more than the output.
extern "C" void convolution(const void* x, int is_bfloat16, const int64_t* strides, const float* packed,
                            const float* bias, int64_t taps, int tile, int64_t batch, int64_t time, int64_t height,
                            int64_t width, int64_t inputs, int64_t outputs, void* output, const int64_t* output_strides,
                            int adds, int threads) {
  const auto run = [&](auto from, auto to) {
    if (tile == 2)
      return convolve<2>(from, strides, packed, bias, taps, batch, time, height, width, inputs, outputs, to,
                         output_strides, adds, threads);
    return convolve<4>(from, strides, packed, bias, taps, batch, time, height, width, inputs, outputs, to,
                       output_strides, adds, threads);
  };
  if (is_bfloat16)
    run(static_cast<const bfloat16*>(x), static_cast<bfloat16*>(output));
  else
    run(static_cast<const float*>(x), static_cast<float*>(output));
}
