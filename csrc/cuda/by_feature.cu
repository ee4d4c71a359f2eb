// The transposed latents (which slots hold a feature) by a stable radix sort, and the weight gradient as its gathered sums.
//
//   keys    feature of each slot, `features` where it is out of range, so that those come last
//   order   CUB's stable radix sort of (key, slot), 4 + 4 bytes a slot, over the bits that `features` needs (17 for 131072)
//   sums    out[f] = sum of value * grad[row] over its slots, a warp for each 512 bytes of a row. Slots are summed as
//             for blocks of 16 slots, in order:  block = 0; for each slot: block = fma(value, grad, block);  total += block
//           The sorted slots are also cut at multiples of `split`: a piece between two cuts that lies inside one feature is summed by a
//           warp of its own into `partials`, and then  out[f] = head + partials in order + tail.  Where the cuts fall follows from the
//           sorted slots alone: no scan, no float atomics, and a feature that every row fires is spread over many warps.
// Bytes, for n slots, D columns of e bytes: sort 2 * 8 * n * ceil(bits / 8) + 20 n, sums n (D e + 8) + F D e + n / split * D * 8.
#include <cstring>
#include <type_traits>

#include "cuda/platform.h"
#include "cuda/sort.h"

namespace fastsae::cuda {
namespace {

constexpr int kThreads = 128;
constexpr int kWarps = kThreads / kWarp;
constexpr int kBlock = 16;  // slots summed before they are added to the total
constexpr int kFlight = 8;  // gathered rows before the first use
static_assert(kBlock % kFlight == 0);

int bits_of(int64_t largest) {
  int bits = 1;
  while (largest >> bits != 0) ++bits;
  return bits;
}

template <class I>
__global__ void keys_kernel(const I* __restrict__ indices, int64_t n, int64_t features, uint32_t* __restrict__ keys,
                            uint32_t* __restrict__ slots, int32_t* flag) {
  const int64_t slot = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (slot >= n) return;
  const int64_t index = indices[slot];
  const bool known = index >= 0 && index < features;
  keys[slot] = static_cast<uint32_t>(known ? index : features);
  slots[slot] = static_cast<uint32_t>(slot);
  if (!known) *flag = 1;
}

// The first of n ascending `keys` that is not below `key`.
FASTSAE_DEVICE int64_t lower_bound(const uint32_t* keys, int64_t n, uint32_t key) {
  int64_t low = 0, high = n;
  while (low < high) {
    const int64_t middle = (low + high) / 2;
    if (keys[middle] < key)
      low = middle + 1;
    else
      high = middle;
  }
  return low;
}

__global__ void segments_kernel(const uint32_t* __restrict__ keys, int64_t n, int64_t features, uint32_t* __restrict__ segments) {
  const int64_t f = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (f <= features) segments[f] = static_cast<uint32_t>(lower_bound(keys, n, static_cast<uint32_t>(f)));
}

template <class T>
__global__ void permute_kernel(const uint32_t* __restrict__ order, int64_t n, const T* __restrict__ values,
                               const int64_t* __restrict__ crow, int64_t rows, int64_t k, uint32_t* __restrict__ row,
                               float* __restrict__ value) {
  const int64_t p = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (p >= n) return;
  const int64_t slot = order[p];
  if (crow == nullptr) {
    row[p] = static_cast<uint32_t>(slot / k);
  } else {  // the last row that starts at or before the slot
    int64_t low = 0, high = rows - 1;
    while (low < high) {
      const int64_t middle = (low + high + 1) / 2;
      if (crow[middle] <= slot)
        low = middle;
      else
        high = middle - 1;
    }
    row[p] = static_cast<uint32_t>(low);
  }
  if (value != nullptr) value[p] = to_float(values[slot]);
}

template <class T, int V>
struct Packed {
  T of[V];
};

// Columns of a row that a lane holds: V neighbours read at once, or V that lie 32 apart (more of those would spill).
template <class T, bool kWide>
struct Columns {
  static constexpr int V = kWide ? 16 / sizeof(T) : 2;
  int64_t first, d;

  FASTSAE_DEVICE Columns(int64_t piece, int64_t d) : first(piece * V * kWarp + (threadIdx.x % kWarp) * (kWide ? V : 1)), d(d) {}
  FASTSAE_DEVICE int64_t column(int u) const { return first + (kWide ? u : u * kWarp); }
  FASTSAE_DEVICE bool has(int u) const { return column(u) < d; }  // wide: d is a multiple of V, all or none

  // As it was read: packed halves stay packed until they are used.
  struct Read {
    std::conditional_t<kWide, Wide, Packed<T, V>> bits;
  };
  FASTSAE_DEVICE Read read(const T* row, bool live) const {
    Read to;
    memset(&to, 0, sizeof to);
    if constexpr (kWide) {
      if (live && has(0)) to.bits = *reinterpret_cast<const Wide*>(row + first);
    } else {
#pragma unroll
      for (int u = 0; u < V; ++u)
        if (live && has(u)) to.bits.of[u] = row[column(u)];
    }
    return to;
  }
  FASTSAE_DEVICE void write(const float (&from)[V], T* row) const {
    T given[V];
#pragma unroll
    for (int u = 0; u < V; ++u) from_float(from[u], given[u]);
    if constexpr (kWide) {
      Wide wide;
      memcpy(&wide, given, sizeof wide);
      if (has(0)) *reinterpret_cast<Wide*>(row + first) = wide;
    } else {
#pragma unroll
      for (int u = 0; u < V; ++u)
        if (has(u)) row[column(u)] = given[u];
    }
  }
};

template <class T, bool kWide>
FASTSAE_DEVICE void add_slots(const Columns<T, kWide>& columns, const uint32_t* row, const float* value, const T* grad, int64_t stride,
                              int64_t start, int64_t end, float (&total)[Columns<T, kWide>::V]) {
  constexpr int V = Columns<T, kWide>::V;
  for (int64_t first = start; first < end; first += kBlock) {
    float block[V] = {};
#pragma unroll
    for (int group = 0; group < kBlock; group += kFlight) {
      if (first + group >= end) break;
      typename Columns<T, kWide>::Read read[kFlight];
      float factor[kFlight];
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        const int64_t p = first + group + u;
        const bool live = p < end;
        factor[u] = live ? value[p] : 0;
        read[u] = columns.read(grad + (live ? row[p] * stride : 0), live);
      }
#pragma unroll
      for (int u = 0; u < kFlight; ++u) {
        Packed<T, V> numbers;
        memcpy(&numbers, &read[u], sizeof numbers);
#pragma unroll
        for (int v = 0; v < V; ++v) block[v] = __fmaf_rn(factor[u], to_float(numbers.of[v]), block[v]);
      }
    }
#pragma unroll
    for (int v = 0; v < V; ++v) total[v] += block[v];
  }
}

FASTSAE_DEVICE int64_t warp_number() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

// partials[c] = the slots c * split .. (c + 1) * split, where they are all of one feature.
template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 4)  // 4: up to 128 registers, else ptxas spills for occupancy
    partials_kernel(const uint32_t* __restrict__ segments, int64_t cuts, int64_t features, const uint32_t* __restrict__ row,
                    const float* __restrict__ value, const T* __restrict__ grad, int64_t stride, int64_t d, int64_t pieces, int64_t split,
                    float* __restrict__ partials) {
  const int64_t number = warp_number();
  if (number >= cuts * pieces) return;
  const int64_t cut = number / pieces, start = cut * split;
  // The feature of the first slot: the last segment that starts at or before it. Slots with a bad index lie beyond segments[features].
  int64_t low = 0, high = features;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (segments[middle] <= start)
      low = middle;
    else
      high = middle - 1;
  }
  if (low == features || segments[low + 1] < start + split) return;
  const Columns<T, kWide> columns(number % pieces, d);
  float total[Columns<T, kWide>::V] = {};
  add_slots(columns, row, value, grad, stride, start, start + split, total);
#pragma unroll
  for (int u = 0; u < Columns<T, kWide>::V; ++u)
    if (columns.has(u)) partials[cut * d + columns.column(u)] = total[u];
}

template <class T, bool kWide>
__global__ void __launch_bounds__(kThreads, 4)  // 4: up to 128 registers, else ptxas spills for occupancy
    sum_kernel(const uint32_t* __restrict__ segments, int64_t features, const uint32_t* __restrict__ row, const float* __restrict__ value,
               const T* __restrict__ grad, int64_t stride, int64_t d, int64_t pieces, int64_t split, const float* __restrict__ partials,
               T* __restrict__ out, int64_t stride_f) {
  constexpr int V = Columns<T, kWide>::V;
  const int64_t number = warp_number();
  if (number >= features * pieces) return;
  const int64_t f = number / pieces, start = segments[f], end = segments[f + 1];
  const Columns<T, kWide> columns(number % pieces, d);
  const int64_t first_cut = (start + split - 1) / split, last_cut = end / split;
  const bool is_cut = first_cut < last_cut;  // at least one whole piece
  float total[V] = {};
  add_slots(columns, row, value, grad, stride, start, is_cut ? first_cut * split : end, total);
  if (is_cut) {
    for (int64_t cut = first_cut; cut < last_cut; ++cut)
#pragma unroll
      for (int u = 0; u < V; ++u)
        if (columns.has(u)) total[u] += partials[cut * d + columns.column(u)];
    add_slots(columns, row, value, grad, stride, last_cut * split, end, total);
  }
  columns.write(total, out + f * stride_f);
}

template <class T, bool kWide>
int sum(Where where, const uint32_t* segments, int64_t n, int64_t features, const uint32_t* row, const float* value, const T* grad,
        int64_t stride_r, int64_t d, int64_t split, float* partials, T* out, int64_t stride_f) {
  const int64_t pieces = ceil_div(d, Columns<T, kWide>::V * kWarp), cuts = n / split;
  const int error = launch(partials_kernel<T, kWide>, where, ceil_div(cuts * pieces, kWarps), kThreads, segments, cuts, features, row,
                           value, grad, stride_r, d, pieces, split, partials);
  if (error != 0) return error;
  return launch(sum_kernel<T, kWide>, where, ceil_div(features * pieces, kWarps), kThreads, segments, features, row, value, grad, stride_r,
                d, pieces, split, partials, out, stride_f);
}

template <class T>
int sum(Where where, const uint32_t* segments, int64_t n, int64_t features, const uint32_t* row, const float* value, const void* grad,
        int64_t stride_r, int64_t d, int64_t split, float* partials, void* out, int64_t stride_f) {
  constexpr int64_t kVector = 16 / sizeof(T);
  const auto aligned = [](const void* p) { return reinterpret_cast<uintptr_t>(p) % 16 == 0; };
  const bool wide = d % kVector == 0 && stride_r % kVector == 0 && stride_f % kVector == 0 && aligned(grad) && aligned(out);
  const T* const g = static_cast<const T*>(grad);
  T* const o = static_cast<T*>(out);
  if (wide) return sum<T, true>(where, segments, n, features, row, value, g, stride_r, d, split, partials, o, stride_f);
  return sum<T, false>(where, segments, n, features, row, value, g, stride_r, d, split, partials, o, stride_f);
}

// The workspace: sorted keys, keys, slots, then the sort's own.
constexpr int64_t kAlign = 256;
int64_t part_bytes(int64_t n) { return ceil_div(n * 4, kAlign) * kAlign; }

}  // namespace

int64_t by_feature_bytes(Where where, int64_t n, int64_t features) {
  size_t bytes = 0;
  int error = begin(where);
  if (error == 0) error = sort_pairs(where, nullptr, bytes, {}, n, bits_of(features));
  if (error != 0) return -static_cast<int64_t>(error);
  return 3 * part_bytes(n) + static_cast<int64_t>(bytes) + kAlign;
}

int by_feature(Where where, const void* indices, Index index, int64_t n, int64_t features, void* workspace, uint32_t* order,
               uint32_t* segments, int32_t* flag) {
  char* const base = static_cast<char*>(workspace);
  const auto part = [&](int64_t i) { return reinterpret_cast<uint32_t*>(base + i * part_bytes(n)); };
  const Pairs pairs{part(1), part(0), part(2), order};
  const int64_t blocks = ceil_div(n, kThreads);
  int error = begin(where);
  if (error == 0)
    error = with_type(index, [&](auto i) {
      using I = decltype(i);
      return launch(keys_kernel<I>, where, blocks, kThreads, static_cast<const I*>(indices), n, features, part(1), part(2), flag);
    });
  size_t bytes = 0;
  if (error == 0 && n != 0) error = sort_pairs(where, nullptr, bytes, pairs, n, bits_of(features));
  if (error == 0 && n != 0) error = sort_pairs(where, part(3), bytes, pairs, n, bits_of(features));
  if (error != 0) return error;
  return launch(segments_kernel, where, ceil_div(features + 1, kThreads), kThreads, part(0), n, features, segments);
}

int permute_slots(Where where, const uint32_t* order, int64_t n, const void* values, Type type, const int64_t* crow, int64_t rows,
                  int64_t k, uint32_t* row, float* value) {
  return with_type(type, [&](auto t) {
    using T = decltype(t);
    const T* const from = static_cast<const T*>(values);
    return launch(permute_kernel<T>, where, ceil_div(n, kThreads), kThreads, order, n, from, crow, rows, k, row, value);
  });
}

int sum_by_feature(Where where, const uint32_t* segments, int64_t n, int64_t features, const uint32_t* row, const float* value,
                   const void* grad, Type type, int64_t stride_r, int64_t d, int64_t split, float* partials, void* out, int64_t stride_f) {
  return with_type(type, [&](auto t) {
    return sum<decltype(t)>(where, segments, n, features, row, value, grad, stride_r, d, split, partials, out, stride_f);
  });
}

}  // namespace fastsae::cuda
