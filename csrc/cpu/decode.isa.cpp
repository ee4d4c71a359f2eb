// Sparse decode and its two gradients: the loops. fastsae.h states the sums and their order, decode.h the jobs.
//
// Cost: `sum` and `dot` read n*d elements of the table once, whole lines, and are bound by memory: a tile of accumulators stays in
// registers over a row's slots, and the lines of later slots are prefetched because no hardware prefetcher can know the next row.

#include "cpu/decode.h"

#include "integers.h"
#include "isa.h"

// The bf16 conversion of avx512_bf16 flushes denormals, so that level runs avx512's body.
#ifndef FASTSAE_ONLY_SCREENS
#include "vec.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

// Where the walk goes after this slot: the slot `ahead` later in this tile, then the next tile of the same row, then the next row.
template <class T, class I, int N>
FASTSAE_INLINE void prefetch_tile(const SumJob& job, int64_t s, int64_t end, int64_t begin, int64_t d, int64_t d_next) {
  const I* const indices = static_cast<const I*>(job.indices);
  int64_t ahead = s + kPrefetch;
  if (ahead >= end) {
    if (d_next > d) ahead -= end - begin;
    d = d_next;
    if (ahead >= job.n) return;
  }
  const char* const line =
      reinterpret_cast<const char*>(static_cast<const T*>(job.table) + static_cast<int64_t>(indices[ahead]) * job.table_stride + d);
  constexpr int kBytes = N * kLanes * static_cast<int>(sizeof(T));
  for (int i = 0; i < kBytes; i += 64) prefetch(line + i);
}

// N vectors of one output row. `part` is 16, or the number of elements of the only vector (N = 1).
template <class T, class I, int N>
FASTSAE_INLINE void sum_tile(const SumJob& job, int64_t r, int64_t begin, int64_t end, int64_t d, int64_t d_next, int part) {
  const T* const values = static_cast<const T*>(job.values);
  const I* const indices = static_cast<const I*>(job.indices);
  const T* const table = static_cast<const T*>(job.table) + d;
  Vec total[N];
  float kept[N * kLanes];
  int64_t s = begin;
  do {
    const int64_t stop = at_most(s + kSlotBlock, end);
    for (int i = 0; i < N; ++i) total[i] = zero();
    const bool first_block = s == begin;
    for (; s < stop; ++s) {
      const T* const row = table + static_cast<int64_t>(indices[s]) * job.table_stride;
      const Vec value = broadcast(widen(values[s]));
      prefetch_tile<T, I, N>(job, s, end, begin, d, d_next);
      if (N > 1 || part == kLanes) {
#pragma GCC unroll 16
        for (int i = 0; i < N; ++i) total[i] = fma(value, load(row + i * kLanes), total[i]);
      } else {
        total[0] = fma(value, load_part(row, part), total[0]);
      }
    }
    if (!first_block)
      for (int i = 0; i < N; ++i) total[i] = add(load(static_cast<const float*>(kept) + i * kLanes), total[i]);
    if (s < end)
      for (int i = 0; i < N; ++i) store(static_cast<float*>(kept) + i * kLanes, total[i]);
  } while (s < end);

  T* const out = static_cast<T*>(job.out) + r * job.out_stride + d;
  if (N == 1 && part != kLanes) {
    if (job.bias != nullptr) total[0] = add(total[0], load_part(job.bias + d, part));
    store_part(out, total[0], part);
    return;
  }
  if (job.bias != nullptr)
    for (int i = 0; i < N; ++i) total[i] = add(total[i], load(job.bias + d + i * kLanes));
  if (job.stream && reinterpret_cast<uintptr_t>(out) % (kLanes * sizeof(T)) == 0) {
    for (int i = 0; i < N; ++i) stream(out + i * kLanes, total[i]);
  } else {
    for (int i = 0; i < N; ++i) store(out + i * kLanes, total[i]);
  }
}

template <class T, class I>
void sum(const SumJob& job, int64_t r0, int64_t r1, int64_t d0, int64_t d1) {
  for (int64_t r = r0; r < r1; ++r) {
    const int64_t begin = job.crow != nullptr ? job.crow[r] : r * job.k;
    const int64_t end = job.crow != nullptr ? job.crow[r + 1] : begin + job.k;
    for (int64_t d = d0; d < d1;) {
      const int64_t left = d1 - d;
      const auto next = [&](int n) { return left > n * kLanes ? d + n * kLanes : d0; };
      if (left >= kTile * kLanes) {
        sum_tile<T, I, kTile>(job, r, begin, end, d, next(kTile), kLanes);
        d += kTile * kLanes;
      } else if (kTile > 8 && left >= 8 * kLanes) {
        sum_tile<T, I, 8>(job, r, begin, end, d, next(8), kLanes);
        d += 8 * kLanes;
      } else if (left >= 4 * kLanes) {
        sum_tile<T, I, 4>(job, r, begin, end, d, next(4), kLanes);
        d += 4 * kLanes;
      } else if (left >= 2 * kLanes) {
        sum_tile<T, I, 2>(job, r, begin, end, d, next(2), kLanes);
        d += 2 * kLanes;
      } else {
        sum_tile<T, I, 1>(job, r, begin, end, d, next(1), static_cast<int>(at_most(left, kLanes)));
        d += kLanes;
      }
    }
  }
  if (job.stream) fence();
}

template <class T, class I>
void dot(const DotJob& job, int64_t r, int64_t s0, int64_t s1) {
  const T* const grad = static_cast<const T*>(job.grad) + r * job.d;
  const I* const indices = static_cast<const I*>(job.indices);
  const T* const table = static_cast<const T*>(job.table);
  T* const out = static_cast<T*>(job.out);
  for (int64_t s = s0; s < s1; ++s) {
    const T* const row = table + static_cast<int64_t>(indices[s]) * job.table_stride;
    // The next row's first lines; the hardware prefetcher follows from there, and each block fetches its own place in the next row.
    const T* const later = table + static_cast<int64_t>(indices[at_most(s + 1, job.n - 1)]) * job.table_stride;
    Vec total = zero();
    for (int64_t d = 0; d < job.d; d += kDotBlock) {
      Vec a[4] = {zero(), zero(), zero(), zero()};
      if (job.d - d >= kDotBlock) {
        constexpr int kBytes = static_cast<int>(kDotBlock * sizeof(T));
        const char* const line = reinterpret_cast<const char*>(later + d);
        for (int i = 0; i < kBytes; i += 64) prefetch(line + i);
#pragma GCC unroll 16
        for (int i = 0; i < kDotBlock / kLanes; ++i) a[i % 4] = fma(load(grad + d + i * kLanes), load(row + d + i * kLanes), a[i % 4]);
      } else {
        int64_t e = d;
        int i = 0;
        for (; job.d - e >= kLanes; e += kLanes, i = (i + 1) % 4) a[i] = fma(load(grad + e), load(row + e), a[i]);
        const int part = static_cast<int>(job.d - e);
        if (part > 0) a[i] = fma(load_part(grad + e, part), load_part(row + e, part), a[i]);
      }
      total = add(total, add(add(a[0], a[1]), add(a[2], a[3])));
    }
    narrow(reduce(total), out + s);
  }
}

template <class T>
void panel_dot(const PanelDotJob& job, int64_t r, int64_t s0, int64_t s1) {
  const T* const grad = static_cast<const T*>(job.grad) + r * job.grad_stride;
  Vec g[kPanel / kLanes];
  for (int i = 0; i < kPanel / kLanes; ++i) {
    const int64_t left = job.width - i * kLanes;
    g[i] = left >= kLanes ? load(grad + i * kLanes) : left > 0 ? load_part(grad + i * kLanes, static_cast<int>(left)) : zero();
  }
  for (int64_t s = s0; s < s1; ++s) {
    const T* const row = static_cast<const T*>(job.panel) + static_cast<int64_t>(job.indices[s]) * kPanel;
    Vec sum = zero();
    for (int i = 0; i < kPanel / kLanes; ++i) sum = fma(g[i], load(row + i * kLanes), sum);
    job.block[s] += reduce(sum);
  }
}

// Columns of a strided W often lie a multiple of a page apart, so their lines compete for the same few places in every cache: they are copied
// one after the other, never more than a few ahead, to a small block that is transposed from there.
template <class T>
void pack(const PackJob& job, int64_t u0, int64_t u1) {
  constexpr int64_t kWide = 256, kStride = kWide + 64, kAhead = 4;
  alignas(64) T block[kLanes * kStride] = {};
  for (; u0 < u1; u0 += kWide) {
    const int64_t width = at_most(kWide, u1 - u0);
    const int64_t* const used = job.used != nullptr ? job.used + u0 : nullptr;
    T* const panel = static_cast<T*>(job.panel) + u0 * kPanel;
    for (int64_t j0 = 0; j0 < kPanel; j0 += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        const int64_t j = j0 + i;
        T* const to = block + i * kStride;
        if (j >= job.width) {
          for (int64_t u = 0; u < width; ++u) to[u] = T{};
          continue;
        }
        const T* const from = static_cast<const T*>(job.w) + (job.d0 + j) * job.stride_d;
        const T* const ahead = from + (j + kAhead < job.width ? kAhead * job.stride_d : 0);
        if (used != nullptr) {
          for (int64_t u = 0; u < width; ++u) {
            prefetch(ahead + used[u] * job.stride_f);
            to[u] = from[used[u] * job.stride_f];
          }
        } else if (job.stride_f == 1) {
          for (int64_t u = 0; u < width; u += kLanes) prefetch(ahead + u0 + u);
          __builtin_memcpy(to, from + u0, static_cast<size_t>(width) * sizeof(T));
        } else {
          for (int64_t u = 0; u < width; ++u) to[u] = from[(u0 + u) * job.stride_f];
        }
      }
      for (int64_t u = 0; u < width; u += kLanes) {
        Vec v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(static_cast<const T*>(block) + i * kStride + u);
        transpose(v);
        const int64_t n = at_most(kLanes, width - u);
        for (int64_t i = 0; i < n; ++i) store(panel + (u + i) * kPanel + j0, v[i]);
      }
    }
  }
}

template <class T>
void scatter(const ScatterJob& job) {
  if (job.rows > kScatterRows && job.stride_i == 1) {
    ScatterJob part = job;
    for (int64_t i = 0; i < job.rows; i += kScatterRows) {
      part.tile = static_cast<const T*>(job.tile) + i * job.ld;
      part.to = static_cast<T*>(job.to) + i;
      part.rows = at_most(kScatterRows, job.rows - i);
      scatter<T>(part);
    }
    return;
  }
  const T* const tile = static_cast<const T*>(job.tile);
  T* const to = static_cast<T*>(job.to);
  if (job.stride_i != 1 || job.rows == 1) {
    for (int64_t i = 0; i < job.rows; ++i)
      for (int64_t j = 0; j < job.columns; ++j) to[i * job.stride_i + j * job.stride_j] = tile[i * job.ld + j];
    return;
  }
  const bool aligned = job.stream && reinterpret_cast<uintptr_t>(to) % (kLanes * sizeof(T)) == 0 && job.stride_j % kLanes == 0;
  T lines[kLanes][kScatterRows + kLanes];  // of `to`: each is written in one run, as memory has it
  for (int64_t j = 0; j < job.columns; j += kLanes) {
    const int columns = static_cast<int>(at_most(kLanes, job.columns - j));
    for (int64_t i = 0; i < job.rows; i += kLanes) {
      const int rows = static_cast<int>(at_most(kLanes, job.rows - i));
      Vec block[kLanes];
      for (int a = 0; a < kLanes; ++a)
        block[a] = a >= rows           ? zero()
                   : columns == kLanes ? load(tile + (i + a) * job.ld + j)
                                       : load_part(tile + (i + a) * job.ld + j, columns);
      transpose(block);
      for (int a = 0; a < columns; ++a) store(lines[a] + i, block[a]);
    }
    for (int a = 0; a < columns; ++a) {
      T* const line = to + (j + a) * job.stride_j;
      for (int64_t i = 0; i < job.rows; i += kLanes) {
        const Vec part = load(static_cast<const T*>(lines[a] + i));
        if (job.rows - i < kLanes)
          store_part(line + i, part, static_cast<int>(job.rows - i));
        else if (aligned)
          stream(line + i, part);
        else
          store(line + i, part);
      }
    }
  }
  if (job.stream) fence();
}

template <class T>
void round(const float* block, const float* total, void* out, int64_t n) {
  for (int64_t s = 0; s < n; ++s) narrow(total[s] + block[s], static_cast<T*>(out) + s);
}

}  // namespace

const DecodeKernels decode_kernels = {
    {{sum<float, int32_t>, sum<float, int64_t>}, {sum<bf16, int32_t>, sum<bf16, int64_t>}, {sum<f16, int32_t>, sum<f16, int64_t>}},
    {{dot<float, int32_t>, dot<float, int64_t>}, {dot<bf16, int32_t>, dot<bf16, int64_t>}, {dot<f16, int32_t>, dot<f16, int64_t>}},
    {panel_dot<float>, panel_dot<bf16>, panel_dot<f16>},
    {pack<float>, pack<bf16>, pack<f16>},
    {scatter<float>, scatter<bf16>, scatter<f16>},
    {round<float>, round<bf16>, round<f16>},
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
