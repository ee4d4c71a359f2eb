// CUB's stable radix sort of 32-bit pairs, in a file of its own: it takes longer to compile than all other kernels together.
#pragma once
#include <cstddef>
#include <cstdint>

#include "cuda/cuda.h"

namespace fastsae::cuda {

struct Pairs {
  const uint32_t* keys;
  uint32_t* sorted;
  const uint32_t* slots;
  uint32_t* order;
};

// sorted, order = keys, slots in stable order of the lowest `bits` of the keys, n < 2^32. temporary null: sets `bytes`, what it needs.
int sort_pairs(Where where, void* temporary, size_t& bytes, Pairs pairs, int64_t n, int bits);

}  // namespace fastsae::cuda
