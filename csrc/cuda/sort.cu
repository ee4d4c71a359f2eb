#include "cuda/sort.h"

#ifdef FASTSAE_EMULATE
#include <algorithm>
#include <numeric>
#include <vector>
#else
#include <cub/device/device_radix_sort.cuh>
#endif

namespace fastsae::cuda {

int sort_pairs(Where where, void* temporary, size_t& bytes, Pairs pairs, int64_t n, int bits) {
#ifdef FASTSAE_EMULATE
  (void)where;
  bytes = 1;
  if (temporary == nullptr) return 0;
  std::vector<uint32_t> by(static_cast<size_t>(n));
  std::iota(by.begin(), by.end(), 0u);
  const uint32_t mask = bits == 32 ? ~0u : (1u << bits) - 1;  // as the radix sort: higher bits do not count
  std::stable_sort(by.begin(), by.end(), [&](uint32_t a, uint32_t b) { return (pairs.keys[a] & mask) < (pairs.keys[b] & mask); });
  for (size_t i = 0; i < by.size(); ++i) pairs.sorted[i] = pairs.keys[by[i]], pairs.order[i] = pairs.slots[by[i]];
  return 0;
#else
  return cub::DeviceRadixSort::SortPairs(temporary, bytes, pairs.keys, pairs.sorted, pairs.slots, pairs.order, static_cast<uint32_t>(n), 0,
                                         bits, static_cast<cudaStream_t>(where.stream));
#endif
}

}  // namespace fastsae::cuda
