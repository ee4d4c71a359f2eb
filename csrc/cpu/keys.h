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

#ifdef __CUDACC__
#define FASTSAE_EVERYWHERE __host__ __device__ __forceinline__
#else
#define FASTSAE_EVERYWHERE inline
#endif

struct NeuronKey {
  int64_t lo, hi;
};
static FASTSAE_EVERYWHERE NeuronKey neuron_key(uint32_t neuron, uint32_t layer, uint64_t seed) {
  uint32_t c0 = neuron, c1 = layer, c2 = 0, c3 = 0, k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
  for (int round = 0; round < 10; ++round) {
    const uint64_t a = uint64_t{0xD2511F53} * c0, b = uint64_t{0xCD9E8D57} * c2;
    c0 = static_cast<uint32_t>(b >> 32) ^ c1 ^ k0;
    c1 = static_cast<uint32_t>(b);
    c2 = static_cast<uint32_t>(a >> 32) ^ c3 ^ k1;
    c3 = static_cast<uint32_t>(a);
    k0 += 0x9E3779B9;
    k1 += 0xBB67AE85;
  }
  return {static_cast<int64_t>(c0 | static_cast<uint64_t>(c1) << 32), static_cast<int64_t>(c2 | static_cast<uint64_t>(c3) << 32)};
}

}  // namespace fastsae
