// Non-causal attention for head dim 64 in bf16 on CPUs with AMX or AVX512-BF16: flash attention over transposed scores.
//
// Both multiply A (rows as they lie in memory) by B (pairs of rows interleaved). With S^T = K Q^T and
// O^T = V^T P^T the keys need no repacking, a score's row holds 16 queries of one key, so that the softmax
// runs down the rows with no horizontal reduction, and the exponentials of two keys interleave into a B tile
// with one permutation. Q^T is packed once a task, V^T once a head.
//
// A task is one head and QUERIES queries; it goes over the keys in blocks of KEYS with a running maximum
// (Milakov & Gimelshein 2018; Dao et al. 2022). fp32 scores, sums and output; probabilities are bf16.

#include <immintrin.h>
#include <omp.h>

#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>

#ifdef __AMX_BF16__
#include "attention_tiles.h"
#else
#include "attention_vectors.h"
#endif

namespace {

inline int64_t padded(int64_t keys) { return (keys + 31) / 32 * 32; }

// Transposes 16 rows of 16 dwords.
inline void transpose(__m512i (&rows)[16]) {
  __m512i pairs[16], quads[16];
  for (int i = 0; i < 16; i += 2) {
    pairs[i] = _mm512_unpacklo_epi32(rows[i], rows[i + 1]);
    pairs[i + 1] = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    quads[i] = _mm512_unpacklo_epi64(pairs[i], pairs[i + 2]);
    quads[i + 1] = _mm512_unpackhi_epi64(pairs[i], pairs[i + 2]);
    quads[i + 2] = _mm512_unpacklo_epi64(pairs[i + 1], pairs[i + 3]);
    quads[i + 3] = _mm512_unpackhi_epi64(pairs[i + 1], pairs[i + 3]);
  }
  // quads[4 j + c]: column 4 l + c of rows 4 j .. 4 j + 3 in its lane l.
  for (int c = 0; c < 4; ++c) {
    const __m512i low = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0x88);        // lanes 0, 2 of rows 0-3, 4-7
    const __m512i low_odd = _mm512_shuffle_i32x4(quads[c], quads[4 + c], 0xdd);    // lanes 1, 3
    const __m512i high = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0x88);  // of rows 8-11, 12-15
    const __m512i high_odd = _mm512_shuffle_i32x4(quads[8 + c], quads[12 + c], 0xdd);
    rows[c] = _mm512_shuffle_i32x4(low, high, 0x88);
    rows[4 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0x88);
    rows[8 + c] = _mm512_shuffle_i32x4(low, high, 0xdd);
    rows[12 + c] = _mm512_shuffle_i32x4(low_odd, high_odd, 0xdd);
  }
}

// 2^x for x <= 0: a cubic on the fraction (minimax on [0, 1), relative error below 8e-5, of which the rounding of
// probabilities to bf16 is 26 times as much), and the rest is the exponent.
inline __m512 exp2(__m512 x) {
  const __m512 fraction = _mm512_reduce_ps(x, _MM_FROUND_TO_NEG_INF | _MM_FROUND_NO_EXC);
  __m512 y = _mm512_set1_ps(7.8024524e-2f);
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(2.2606716e-1f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(6.9583354e-1f));
  y = _mm512_fmadd_ps(y, fraction, _mm512_set1_ps(9.9992522e-1f));
  return _mm512_scalef_ps(y, x);
}

// A head's keys, row after row, and V^T: for each 32 keys a [64][32] panel. Rows past the last are zero.
void pack(const uint16_t* key, const uint16_t* value, int64_t key_stride, int64_t value_stride, int64_t length,
          uint16_t* keys, uint16_t* values) {
  for (int64_t row = 0; row < length; ++row)
    std::memcpy(keys + row * HEAD_DIM, key + row * key_stride, HEAD_DIM * 2);
  std::memset(keys + length * HEAD_DIM, 0, (padded(length) - length) * HEAD_DIM * 2);

  // Words of two keys interleaved, then dwords transposed: row d is 32 keys of channel d.
  const __m512i even = _mm512_set_epi16(47, 15, 46, 14, 45, 13, 44, 12, 43, 11, 42, 10, 41, 9, 40, 8, 39, 7, 38, 6, 37,
                                        5, 36, 4, 35, 3, 34, 2, 33, 1, 32, 0);
  const __m512i odd = _mm512_add_epi16(even, _mm512_set1_epi16(16));
  for (int64_t first = 0; first < length; first += 32) {
    for (int half = 0; half < 2; ++half) {  // channels 0-31, 32-63
      __m512i low[16], high[16];
      for (int pair = 0; pair < 16; ++pair) {
        __m512i a = _mm512_setzero_si512(), b = a;
        const int64_t row = first + 2 * pair;
        const uint16_t* source = value + row * value_stride + half * 32;
        if (row < length) a = _mm512_loadu_si512(source);
        if (row + 1 < length) b = _mm512_loadu_si512(source + value_stride);
        low[pair] = _mm512_permutex2var_epi16(a, even, b);
        high[pair] = _mm512_permutex2var_epi16(a, odd, b);
      }
      transpose(low);
      transpose(high);
      uint16_t* panel = values + first * HEAD_DIM + half * 32 * 32;
      for (int d = 0; d < 16; ++d) {
        _mm512_storeu_si512(panel + d * 32, low[d]);
        _mm512_storeu_si512(panel + (16 + d) * 32, high[d]);
      }
    }
  }
}

void pack_queries(const uint16_t* query, int64_t stride, int64_t count, Scratch& scratch) {
  for (int64_t group = 0; group < GROUPS; ++group)
    for (int64_t step = 0; step < HEAD_DIM / 32; ++step) {
      __m512i rows[16];
      for (int i = 0; i < 16; ++i) {
        const int64_t row = group * 16 + i;
        rows[i] = row < count ? _mm512_loadu_si512(query + row * stride + step * 32) : _mm512_setzero_si512();
      }
      transpose(rows);
      for (int i = 0; i < 16; ++i) _mm512_store_si512(&scratch.queries[group][step][i * 16], rows[i]);
    }
}

// Exponentials of one block for 16 queries: updates their running maximum and sum, rescales O^T if the maximum grew.
void exponentiate(int64_t group, int64_t count, __m512 scale, __m512& maximum, __m512& sum, Scratch& scratch) {
  const float* scores = scratch.scores[group][0];
  __m512 highest[4];
  for (int i = 0; i < 4; ++i) highest[i] = _mm512_load_ps(scores + i * 16);
  for (int64_t key = 4; key < count; key += 4)
    for (int i = 0; i < 4; ++i) highest[i] = _mm512_max_ps(highest[i], _mm512_load_ps(scores + (key + i) * 16));
  highest[0] = _mm512_max_ps(_mm512_max_ps(highest[0], highest[1]), _mm512_max_ps(highest[2], highest[3]));
  highest[0] = _mm512_mul_ps(highest[0], scale);
  if (_mm512_cmp_ps_mask(highest[0], maximum, _CMP_GT_OQ)) {
    const __m512 grown = _mm512_max_ps(maximum, highest[0]);
    const __m512 factor = exp2(_mm512_sub_ps(maximum, grown));
    maximum = grown;
    sum = _mm512_mul_ps(sum, factor);
    for (int64_t d = 0; d < HEAD_DIM; ++d) {
      float* row = scratch.output[group][d];
      _mm512_store_ps(row, _mm512_mul_ps(_mm512_load_ps(row), factor));
    }
  }
  const __m512i half = _mm512_set1_epi32(0x8000);  // of the last bit that bf16 keeps
  __m512 sums[2] = {sum, _mm512_setzero_ps()};
  uint32_t* probabilities = scratch.probabilities[group][0];  // tiles of consecutive keys follow each other
  for (int64_t key = 0; key < count; key += 2) {
    const __m512 a = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + key * 16), scale, maximum));
    const __m512 b = exp2(_mm512_fmsub_ps(_mm512_load_ps(scores + (key + 1) * 16), scale, maximum));
    sums[0] = _mm512_add_ps(sums[0], a);
    sums[1] = _mm512_add_ps(sums[1], b);
    const __m512i low = _mm512_srli_epi32(_mm512_add_epi32((__m512i)a, half), 16);
    const __m512i high = _mm512_add_epi32((__m512i)b, half);
    _mm512_store_si512(probabilities + key / 2 * 16, _mm512_mask_blend_epi16(0xaaaaaaaa, low, high));
  }
  sum = _mm512_add_ps(sums[0], sums[1]);
}

void attend(const uint16_t* query, int64_t query_stride, int64_t count, const uint16_t* keys, const uint16_t* values,
            int64_t length, float scale, uint16_t* output, int64_t output_stride, Scratch& scratch) {
  pack_queries(query, query_stride, count, scratch);
  std::memset(scratch.output, 0, sizeof(scratch.output));
  const __m512 factor = _mm512_set1_ps(scale * 1.44269504f);  // exp(x) = 2^(x log2 e)
  __m512 maximum[GROUPS], sum[GROUPS];
  for (int64_t group = 0; group < GROUPS; ++group) {
    maximum[group] = _mm512_set1_ps(-INFINITY);
    sum[group] = _mm512_setzero_ps();
  }
  const int64_t groups = (count + 15) / 16;
  for (int64_t first = 0; first < length; first += KEYS) {
    const int64_t block = length - first < KEYS ? padded(length - first) : KEYS;
    multiply_scores(keys + first * HEAD_DIM, block, scratch);
    for (int64_t key = length - first; key < block; ++key)
      for (int64_t q = 0; q < QUERIES; ++q) scratch.scores[q / 16][key][q % 16] = -INFINITY;
    for (int64_t group = 0; group < groups; ++group)
      exponentiate(group, block, factor, maximum[group], sum[group], scratch);
    multiply_values(values + first * HEAD_DIM, block, scratch);
  }
  for (int64_t group = 0; group < groups; ++group) {
    const __m512 reciprocal = _mm512_div_ps(_mm512_set1_ps(1.0f), sum[group]);
    for (int64_t channel = 0; channel < HEAD_DIM; channel += 16) {
      __m512i rows[16];
      for (int d = 0; d < 16; ++d)
        rows[d] = (__m512i)_mm512_mul_ps(_mm512_load_ps(scratch.output[group][channel + d]), reciprocal);
      transpose(rows);
      for (int i = 0; i < 16 && group * 16 + i < count; ++i)
        _mm256_storeu_si256((__m256i*)(output + (group * 16 + i) * output_stride + channel),
                            (__m256i)_mm512_cvtneps_pbh((__m512)rows[i]));
    }
  }
}

}  // namespace

extern "C" {

int cogvx_attention_available() { return available(); }

// Strides in elements, of (batch, position, head); channels are contiguous. Returns 0, or 1 if memory ran out.
int cogvx_attention(const uint16_t* query, const uint16_t* key, const uint16_t* value, uint16_t* output, int64_t batch,
                    int64_t length_q, int64_t length_k, int64_t heads, const int64_t* query_strides,
                    const int64_t* key_strides, const int64_t* value_strides, const int64_t* output_strides,
                    float scale, int threads) {
  const int64_t panel = padded(length_k) * HEAD_DIM, tasks = (length_q + QUERIES - 1) / QUERIES, all = batch * heads;
  // As many heads at a time as there are threads: enough tasks for all, and their keys and values stay in cache.
  auto* packed = (uint16_t*)std::aligned_alloc(64, threads * panel * 2 * sizeof(uint16_t));
  auto* scratch = (Scratch*)std::aligned_alloc(64, threads * sizeof(Scratch));
  if (!packed || !scratch) {
    std::free(packed);
    std::free(scratch);
    return 1;
  }
#pragma omp parallel num_threads(threads)
  {
    begin();
    std::memset(&scratch[omp_get_thread_num()], 0, sizeof(Scratch));
    for (int64_t first = 0; first < all; first += threads) {
      const int64_t count = all - first < threads ? all - first : threads;
#pragma omp for schedule(static)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t b = (first + i) / heads, h = (first + i) % heads;
        pack(key + b * key_strides[0] + h * key_strides[2], value + b * value_strides[0] + h * value_strides[2],
             key_strides[1], value_strides[1], length_k, packed + i * 2 * panel, packed + i * 2 * panel + panel);
      }
#pragma omp for schedule(dynamic)
      for (int64_t i = 0; i < count * tasks; ++i) {
        const int64_t head = first + i / tasks, b = head / heads, h = head % heads, row = i % tasks * QUERIES;
        const uint16_t* keys = packed + (head - first) * 2 * panel;
        attend(query + b * query_strides[0] + h * query_strides[2] + row * query_strides[1], query_strides[1],
               length_q - row < QUERIES ? length_q - row : QUERIES, keys, keys + panel, length_k, scale,
               output + b * output_strides[0] + h * output_strides[2] + row * output_strides[1], output_strides[1],
               scratch[omp_get_thread_num()]);
      }
    }
    end();
  }
  std::free(packed);
  std::free(scratch);
  return 0;
}
}
