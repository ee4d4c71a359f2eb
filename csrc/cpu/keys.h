// Keys of neurons. For every kernel that hashes signs; keys.isa.h has the hashes.
//
// The key of a neuron is 128 bits: Philox4x32-10 (Salmon et al. 2011) of the counter (neuron, layer, 0, 0) under the seed. Tables hold the
// first 64 bits of all neurons in one array and the second 64 in another, so that a 64-bit hash reads one of them only:
//   lo[i] = word 0 | word 1 << 32        hi[i] = word 2 | word 3 << 32
// A neuron that takes no part has the key 0. Tables are padded with keys 0 to whole words of 64 neurons, so that kernels have no tail.
#pragma once
#include <stdint.h>

namespace fastsae {

constexpr int64_t kWordBits = 64;

// lo[i] and, unless null, hi[i] for the neurons first + i, 0 <= i < count.
void fill_keys(int64_t first, int64_t count, uint32_t layer, uint64_t seed, int64_t* lo, int64_t* hi);

}  // namespace fastsae
