// The k best of each row of scores or distances, exactly, in a fixed order.
//
// One block a row. Element i is thread i % 512's, so the columns are dealt out evenly.
//
//   few    n + carried <= 2048: all of them are sorted.
//   maxima k <= 256: each thread finds its largest key. k threads hold a key at or above the k-th largest of these 512 maxima, so that is a
//          lower bound of the k-th best key; the threads whose maximum reaches it collect what reaches it, and that is sorted. For k = 64
//          of unordered scores about 70 keys. The second read is of the few threads' columns only.
//   radix  else, or where more than 2048 keys reach the bound: histograms of the next 11 bits of the key, from the top, until at most 2048
//          keys are at or above the bin that holds the k-th. Keys are distinct (they hold the index), so at the last bits exactly k are.
//
// The buffer of 2048 keys is a cache, not a bound: k <= 2048 always ends in one that fits. Which way was taken does not show in the result,
// a set of distinct keys, sorted.
#include "cuda/platform.h"

namespace fastsae::cuda {
namespace {

constexpr int kThreads = 512;
constexpr int kCapacity = 2048;
constexpr int kMaximaK = 256;
constexpr int kDigit = 11;
constexpr int kBins = 1 << kDigit;
constexpr int kFlight = 8;  // loads of a thread before the first use
static_assert(kMaxK <= kCapacity, "k keys must fit");
static_assert(kMaximaK <= kThreads && kCapacity % kThreads == 0 && kBins % kThreads == 0);
static_assert(kCapacity * 8 + kBins * 4 + kThreads * 4 + 64 <= 48 << 10, "shared memory that every chip gives without asking");

// Larger float, larger integer; NaN above all, -0 as +0. Never 0.
FASTSAE_DEVICE uint32_t ordered(float x) {
  if (x != x) return 0xffffffffu;
  const uint32_t bits = __float_as_uint(x == 0 ? 0.0f : x);
  return bits ^ ((bits >> 31) != 0 ? 0xffffffffu : 0x80000000u);
}
FASTSAE_DEVICE float unordered(uint32_t bits) { return __uint_as_float(bits ^ ((bits >> 31) != 0 ? 0x80000000u : 0xffffffffu)); }

template <class T>
struct Scores {
  const T* z;
  int64_t stride;
  FASTSAE_DEVICE uint32_t rank(int64_t row, int64_t i) const { return ordered(to_float(z[row * stride + i])); }
};
struct Distances {
  const int32_t* distance;
  int64_t stride;
  FASTSAE_DEVICE uint32_t rank(int64_t row, int64_t i) const { return ~static_cast<uint32_t>(distance[row * stride + i]); }
};

// The elements of one row: n columns, then the keys carried over.
template <class Source>
struct Row {
  Source source;
  int64_t row, n, carried;
  uint32_t first;
  const uint64_t* carry;

  FASTSAE_DEVICE uint64_t key(int64_t i) const {
    return static_cast<uint64_t>(source.rank(row, i)) << 32 | static_cast<uint32_t>(~(first + static_cast<uint32_t>(i)));
  }
  // use(key) for this thread's elements, several loads in flight.
  template <class Use>
  FASTSAE_DEVICE void each(Use use) const {
    int64_t i = threadIdx.x;
    for (; i + (kFlight - 1) * kThreads < n; i += kFlight * kThreads) {
      uint64_t keys[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) keys[u] = key(i + u * kThreads);
#pragma unroll
      for (int u = 0; u < kFlight; ++u) use(keys[u]);
    }
    for (; i < n; i += kThreads) use(key(i));
    for (int64_t c = threadIdx.x; c < carried; c += kThreads) use(carry[c]);
  }
};

// pool[0 .. size), a power of two, descending. All threads.
FASTSAE_DEVICE void sort_pool(uint64_t* pool, int size) {
  for (int run = 2; run <= size; run *= 2) {
    for (int step = run / 2; step > 0; step /= 2) {
      __syncthreads();
      for (int pair = threadIdx.x; pair < size / 2; pair += kThreads) {
        const int low = 2 * pair - (pair & (step - 1)), high = low + step;
        const uint64_t a = pool[low], b = pool[high];
        if ((a < b) == ((low & run) == 0)) pool[low] = b, pool[high] = a;
      }
    }
  }
  __syncthreads();
}

struct Shared {
  uint64_t pool[kCapacity];
  uint32_t bins[kBins];
  uint32_t above[kThreads];  // keys in this and all later threads' bins
  uint32_t count;            // keys collected, or found at or above a bin
  uint32_t digit, before;
};

// Collects the keys >= bound (none of them 0); shared.count is their number, at most kCapacity of them are kept.
template <class R>
FASTSAE_DEVICE void collect(Shared& shared, const R& row, uint64_t bound, bool has_any) {
  if (threadIdx.x == 0) shared.count = 0;
  __syncthreads();
  if (has_any) {
    row.each([&](uint64_t key) {
      if (key < bound || key == 0) return;
      const uint32_t place = atomicAdd(&shared.count, 1u);
      if (place < kCapacity) shared.pool[place] = key;
    });
  }
  __syncthreads();
}

// The bin (from the top) in which the `need`-th key lies: shared.digit, and in shared.before the keys above it. All threads.
FASTSAE_DEVICE void find_bin(Shared& shared, uint32_t need) {
  constexpr int kMine = kBins / kThreads;
  uint32_t mine = 0;
  for (int b = 0; b < kMine; ++b) mine += shared.bins[threadIdx.x * kMine + b];
  shared.above[threadIdx.x] = mine;
  for (int step = 1; step < kThreads; step *= 2) {
    __syncthreads();
    const uint32_t other = threadIdx.x + step < kThreads ? shared.above[threadIdx.x + step] : 0;
    __syncthreads();
    shared.above[threadIdx.x] += other;
  }
  __syncthreads();
  uint32_t before = shared.above[threadIdx.x] - mine;
  for (int b = kMine - 1; b >= 0; --b) {
    const uint32_t here = shared.bins[threadIdx.x * kMine + b];
    if (before < need && need <= before + here) shared.digit = threadIdx.x * kMine + b, shared.before = before;
    before += here;
  }
  __syncthreads();
}

// A bound that min(k, keys there are) to kCapacity keys reach.
template <class R>
FASTSAE_DEVICE uint64_t radix_bound(Shared& shared, const R& row, uint32_t k) {
  uint64_t prefix = 0;
  uint32_t need = k, kept = 0;  // keys above the bin of the prefix
  int shift = 64;
  while (shift > 0) {
    const int bits = shift < kDigit ? shift : kDigit;
    shift -= bits;
    for (int b = threadIdx.x; b < kBins; b += kThreads) shared.bins[b] = 0;
    __syncthreads();
    const bool top = shift + bits == 64;
    row.each([&](uint64_t key) {
      if (key != 0 && (top || key >> (shift + bits) == prefix)) atomicAdd(&shared.bins[(key >> shift) & ((1u << bits) - 1)], 1u);
    });
    __syncthreads();
    if (top) {
      if (threadIdx.x == 0) shared.count = 0;
      __syncthreads();
      uint32_t mine = 0;
      for (int b = threadIdx.x; b < kBins; b += kThreads) mine += shared.bins[b];
      if (mine != 0) atomicAdd(&shared.count, mine);
      __syncthreads();
      need = k < shared.count ? k : shared.count;
      if (need == 0) return 1;
    }
    find_bin(shared, need);
    kept += shared.before;
    need -= shared.before;
    prefix = (top ? 0 : prefix << bits) | shared.digit;
    if (kept + shared.bins[shared.digit] <= kCapacity) break;
    __syncthreads();
  }
  return prefix << shift;
}

template <class Source>
__global__ void __launch_bounds__(kThreads)
    select_kernel(Source source, int64_t n, uint32_t first, int k, bool resume, uint64_t* __restrict__ keys) {
  __shared__ Shared shared;
  uint64_t* const best = keys + static_cast<int64_t>(blockIdx.x) * k;
  const Row<Source> row{source, static_cast<int64_t>(blockIdx.x), n, resume ? k : 0, first, best};
  if (n + row.carried <= kCapacity) {
    collect(shared, row, 1, true);
  } else {
    bool done = false;
    if (k <= kMaximaK) {
      uint64_t most = 0;
      row.each([&](uint64_t key) { most = key > most ? key : most; });
      shared.pool[threadIdx.x] = most;
      sort_pool(shared.pool, kThreads);
      const uint64_t bound = shared.pool[k - 1];
      __syncthreads();
      collect(shared, row, bound, most >= bound && most != 0);
      done = shared.count <= kCapacity;
      __syncthreads();
    }
    if (!done) {
      const uint64_t bound = radix_bound(shared, row, static_cast<uint32_t>(k));
      __syncthreads();
      collect(shared, row, bound, true);
    }
  }
  const int count = static_cast<int>(shared.count);
  int size = 1;
  while (size < count) size *= 2;
  for (int i = count + threadIdx.x; i < size; i += kThreads) shared.pool[i] = 0;
  sort_pool(shared.pool, size);
  for (int i = threadIdx.x; i < k; i += kThreads) best[i] = i < count ? shared.pool[i] : 0;
}

template <class T>
__global__ void finish_scores_kernel(const uint64_t* __restrict__ keys, int64_t count, bool relu, T* __restrict__ values,
                                     int64_t* __restrict__ indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  const uint32_t bits = static_cast<uint32_t>(keys[i] >> 32);
  float value = bits == 0xffffffffu ? __uint_as_float(0x7fc00000u) : unordered(bits);
  if (relu && value < 0) value = 0;
  from_float(value, values[i]);
  indices[i] = static_cast<uint32_t>(~static_cast<uint32_t>(keys[i]));
}

__global__ void finish_distances_kernel(const uint64_t* __restrict__ keys, int64_t count, int32_t* __restrict__ distance,
                                        int64_t* __restrict__ indices) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  if (i >= count) return;
  distance[i] = static_cast<int32_t>(~static_cast<uint32_t>(keys[i] >> 32));
  indices[i] = static_cast<uint32_t>(~static_cast<uint32_t>(keys[i]));
}

template <class Source>
int select(Where where, Source source, int64_t rows, int64_t n, int64_t first, int64_t k, bool resume, uint64_t* keys) {
  return launch(select_kernel<Source>, where, rows, kThreads, source, n, first, k, resume, keys);
}

constexpr int kFinish = 256;

}  // namespace

int select_scores(Where where, const void* z, Type type, int64_t rows, int64_t n, int64_t stride, int64_t first, int64_t k, bool resume,
                  uint64_t* keys) {
  return with_type(type, [&](auto t) {
    return select(where, Scores<decltype(t)>{static_cast<const decltype(t)*>(z), stride}, rows, n, first, k, resume, keys);
  });
}

int select_distances(Where where, const int32_t* distance, int64_t rows, int64_t n, int64_t stride, int64_t first, int64_t k, bool resume,
                     uint64_t* keys) {
  return select(where, Distances{distance, stride}, rows, n, first, k, resume, keys);
}

int finish_scores(Where where, const uint64_t* keys, int64_t count, bool relu, void* values, Type type, int64_t* indices) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    return launch(finish_scores_kernel<T>, where, ceil_div(count, kFinish), kFinish, keys, count, relu, static_cast<T*>(values), indices);
  });
}

int finish_distances(Where where, const uint64_t* keys, int64_t count, int32_t* distance, int64_t* indices) {
  return launch(finish_distances_kernel, where, ceil_div(count, kFinish), kFinish, keys, count, distance, indices);
}

}  // namespace fastsae::cuda
