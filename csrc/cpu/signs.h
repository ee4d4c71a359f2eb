// What signs.cpp (baseline: keys, chunks, threads) asks of signs.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

#include "isa.h"

namespace fastsae {

struct SignsKernels {
  // words[w] = bits of z[64 w ..] > 0, and-ed with mask[w] unless null; one row of n elements of a `Signs` type. Bits from n on are 0.
  void (*pack[4])(const void* z, int64_t n, const uint64_t* mask, uint64_t* words);
  // out[r * out_stride] = XOR of the keys of the bits that are set in row r
  void (*hash)(const uint64_t* words, int64_t stride, int64_t rows, int64_t n_words, const int64_t* keys, int64_t* out, int64_t out_stride);
};

FASTSAE_DECLARE_TABLES(SignsKernels, signs_kernels)

}  // namespace fastsae
