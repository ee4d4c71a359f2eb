// Hamming distances, all pairs or the k nearest: panels of b, selection, and which thread does what. The counting is in hamming.isa.cpp.
#include "cpu/hamming.h"

#include <algorithm>
#include <cstring>

#include "fastsae.h"
#include "integers.h"
#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastsae {
namespace {

const HammingKernels* const kTables[kLevels] = FASTSAE_BASE_TABLES(hamming_kernels);

constexpr int64_t kStreamBytes = int64_t{16} << 20;  // an output beyond this leaves the caches anyway
constexpr int64_t kPanelBytes = int64_t{32} << 10;   // a packed panel of b stays close while all rows of a unit pass
constexpr int64_t kUnitRows = 512;                   // rows that pay for packing a panel
constexpr int64_t kNearRows = 32;                    // rows whose distances to one panel wait for the selection
constexpr int64_t kScan = 64;                        // distances compared with one limit
constexpr int64_t kKeptBytes = int64_t{1} << 20;     // candidates of the rows of a unit, next to the distances in the second-level cache

// Codes in a panel: whole groups of four vectors, so that only the last panel has a narrow tile.
int64_t panel_codes(int64_t words) {
  constexpr int64_t kWhole = 4 * kGroup;
  return std::max(kWhole, kPanelBytes / std::max<int64_t>(8 * words, 1) / kWhole * kWhole);
}

auto distances_of(const HammingKernels& kernels, bool vpopcnt) {
  static const bool present = cpu_has("avx512_vpopcntdq");
  return vpopcnt && present && kernels.distances_vpopcnt != nullptr ? kernels.distances_vpopcnt : kernels.distances;
}

}  // namespace

int64_t hamming(const Codes& a, const Codes& b, int32_t* out, int64_t stride_a, int64_t stride_b, bool vpopcnt, int threads) {
  if (a.rows == 0 || b.rows == 0) return kOk;
  if (stride_b != 1 && b.rows > 1) return hamming(b, a, out, stride_b, stride_a, vpopcnt, threads);  // distances are symmetric
  const HammingKernels& kernels = pick(kTables);
  const auto distances = distances_of(kernels, vpopcnt);
  const int64_t width = std::min(panel_codes(a.words), ceil_div(b.rows, kGroup) * kGroup);
  const int64_t panels = ceil_div(b.rows, width), blocks = ceil_div(a.rows, kUnitRows);
  const int64_t panel_elements = 2 * a.words * width;
  const bool stream = a.rows * b.rows * 4 > kStreamBytes && reinterpret_cast<uintptr_t>(out) % 64 == 0 && stride_a % kGroup == 0;
  threads = useful_threads(threads, a.rows * b.rows * (1 + a.words));
  Workspace space(static_cast<size_t>(threads) * Workspace::size<int32_t>(panel_elements));
  if (!space.ok()) return kNoMemory;
  int32_t* const memory = space.take<int32_t>(threads * panel_elements);
  for_each_unit_by_worker(threads, panels * blocks, [&](int64_t unit, int worker) {
    int32_t* const panel = memory + worker * panel_elements;
    const int64_t j = unit / blocks * width, i = unit % blocks * kUnitRows;
    const int64_t codes = std::min(width, b.rows - j);
    kernels.pack({b.words_of + j * b.stride, b.stride, codes, b.words, panel});
    distances({a.words_of + i * a.stride, a.stride, std::min(kUnitRows, a.rows - i), a.words, panel, codes, out + i * stride_a + j,
               stride_a, stream});
  });
  return kOk;
}

int64_t hamming_topk(const Codes& a, const Codes& b, int64_t k, int32_t* distance, int64_t* index, bool vpopcnt, int threads) {
  if (a.rows == 0 || k == 0) return kOk;
  const HammingKernels& kernels = pick(kTables);
  const auto distances = distances_of(kernels, vpopcnt);
  const int64_t width = std::min(panel_codes(a.words), ceil_div(b.rows, kGroup) * kGroup);
  const int64_t panel_elements = 2 * a.words * width;
  threads = useful_threads(threads, a.rows * b.rows * (1 + a.words));
  // Enough units for all threads, but packing b once a unit has to pay.
  const int64_t each = std::max(kNearRows, ceil_div(a.rows, 4 * int64_t{threads}));
  const int64_t height = std::max<int64_t>(1, std::min({kUnitRows, each, kKeptBytes / (16 * k)}));
  const int64_t near_elements = kNearRows * width;
  Workspace space(static_cast<size_t>(threads) *
                  (Workspace::size<int32_t>(panel_elements) + Workspace::size<int32_t>(near_elements) +
                   Workspace::size<uint64_t>((height + 1) * 2 * k + width) + Workspace::size<int64_t>(height)));
  if (!space.ok()) return kNoMemory;
  int32_t* const panel_memory = space.take<int32_t>(threads * panel_elements);
  int32_t* const near_memory = space.take<int32_t>(threads * near_elements);
  const int64_t kept_elements = (height + 1) * 2 * k + width;
  uint64_t* const kept_memory = space.take<uint64_t>(threads * kept_elements);
  int64_t* const size_memory = space.take<int64_t>(threads * height);

  for_each_unit_by_worker(threads, ceil_div(a.rows, height), [&](int64_t unit, int worker) {
    int32_t* const panel = panel_memory + worker * panel_elements;
    int32_t* const near = near_memory + worker * near_elements;
    int32_t found[kScan];
    uint64_t* const all = kept_memory + worker * kept_elements;  // up to 2 k candidates a row, as distance << 32 | index
    uint64_t* const merged = all + height * 2 * k;
    int64_t* const sizes = size_memory + worker * height;
    const int64_t first = unit * height, rows = std::min(height, a.rows - first);
    std::fill(sizes, sizes + rows, 0);
    for (int64_t j = 0; j < b.rows; j += width) {
      const int64_t codes = std::min(width, b.rows - j);
      kernels.pack({b.words_of + j * b.stride, b.stride, codes, b.words, panel});
      for (int64_t i = 0; i < rows; i += kNearRows) {
        const int64_t some = std::min(kNearRows, rows - i);
        distances({a.words_of + (first + i) * a.stride, a.stride, some, a.words, panel, codes, near, width, false});
        for (int64_t r = 0; r < some; ++r) {
          uint64_t* const kept = all + (i + r) * 2 * k;
          int64_t& size = sizes[i + r];
          for (int64_t c = 0; c < codes; c += kScan) {
            const int32_t* const block = near + r * width + c;
            // Where k are known, the k-th stands at k - 1. Codes come by index, so an equal distance never displaces one that is kept.
            const int32_t limit = size < k ? INT32_MAX : static_cast<int32_t>(kept[k - 1] >> 32);
            const int64_t count = kernels.below(block, std::min(kScan, codes - c), limit, found);
            if (count == 0) continue;
            uint64_t* const to = size + count <= 2 * k ? kept : std::copy(kept, kept + size, merged) - size;
            for (int64_t f = 0; f < count; ++f)
              to[size + f] = static_cast<uint64_t>(block[found[f]]) << 32 | static_cast<uint64_t>(j + c + found[f]);
            const bool knew = size >= k;
            size += count;
            if (size < k || (knew && size <= 2 * k)) continue;
            std::nth_element(to, to + k - 1, to + size);
            size = k;
            if (to == merged) std::copy(merged, merged + k, kept);
          }
        }
      }
    }
    for (int64_t r = 0; r < rows; ++r) {
      uint64_t* const kept = all + r * 2 * k;
      if (sizes[r] > k) std::nth_element(kept, kept + k - 1, kept + sizes[r]);
      std::sort(kept, kept + k);
      for (int64_t s = 0; s < k; ++s) {
        distance[(first + r) * k + s] = static_cast<int32_t>(kept[s] >> 32);
        index[(first + r) * k + s] = static_cast<int64_t>(kept[s] & 0xffffffffu);
      }
    }
  });
  return kOk;
}

}  // namespace fastsae
