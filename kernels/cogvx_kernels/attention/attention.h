// What a task of `attention.cpp` keeps, in the order that its products read and write.

#pragma once

#include <cstdint>

constexpr int64_t HEAD_DIM = 64;
constexpr int64_t QUERIES = 64;  // a task's
constexpr int64_t KEYS = 128;    // a block's
constexpr int64_t GROUPS = QUERIES / 16;
constexpr int64_t TILE = 16 * 16;  // dwords of one tile

struct alignas(64) Scratch {
  uint32_t queries[GROUPS][HEAD_DIM / 32][TILE];  // Q^T: rows are pairs of channels, columns 16 queries
  float scores[GROUPS][KEYS][16];                 // S^T of one block
  uint32_t probabilities[GROUPS][KEYS / 32][TILE];  // P^T: rows are pairs of keys, columns 16 queries
  float output[GROUPS][HEAD_DIM][16];             // O^T
};
