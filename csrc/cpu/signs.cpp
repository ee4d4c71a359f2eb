// Packed codes and hashes of given pre-activations: keys, masks, and which thread does what. The loops are in signs.isa.cpp.
#include "cpu/signs.h"

#include <algorithm>
#include <cstring>

#include "cpu/keys.h"
#include "fastsae.h"
#include "integers.h"
#include "isa.h"
#include "parallel.h"
#include "workspace.h"

namespace fastsae {

namespace {

const SignsKernels* const kTables[kLevels] = FASTSAE_BASE_TABLES(signs_kernels);

constexpr int64_t kUnitBytes = int64_t{128} << 10;  // of input, for a unit of rows: enough to pay for handing it to a thread
constexpr int64_t kCodeBytes = int64_t{16} << 10;   // of packed words that wait in the first-level cache for their hash

int64_t element_size(Signs t) { return t == Signs::f32 ? 4 : t == Signs::boolean ? 1 : 2; }
const void* at(const void* p, int64_t elements, Signs t) { return static_cast<const char*>(p) + elements * element_size(t); }

// Rows of `bytes` each in a unit.
int64_t unit_rows(int64_t bytes) { return std::max<int64_t>(4, kUnitBytes / std::max<int64_t>(bytes, 1)); }

struct KeyTable {
  int64_t* lo;
  int64_t* hi;  // null with 64 bits

  static size_t bytes(int64_t words, int bits) { return static_cast<size_t>(bits / 64) * Workspace::size<int64_t>(words * kWordBits); }

  // `key` by value: stores might change one that is referred to, and several keys are made at a time.
  KeyTable(Workspace& space, int64_t neurons, const uint8_t* taking_part, const HashKey key)
      : lo(space.take<int64_t>(round_to(neurons, kWordBits))),
        hi(key.bits == 64 ? nullptr : space.take<int64_t>(round_to(neurons, kWordBits))) {
    for (int64_t i = 0; i < neurons; ++i) {
      const NeuronKey made = neuron_key(static_cast<uint32_t>(i), key.layer, key.seed);
      lo[i] = made.lo;
      if (hi != nullptr) hi[i] = made.hi;
    }
    for (int64_t* const half : {lo, hi}) {
      if (half == nullptr) continue;
      for (int64_t i = 0; taking_part != nullptr && i < neurons; ++i)
        if (taking_part[i] == 0) half[i] = 0;
      std::fill(half + neurons, half + round_to(neurons, kWordBits), 0);
    }
  }

  void hash(const SignsKernels& kernels, const uint64_t* words, int64_t stride, int64_t rows, int64_t n_words, int64_t* out) const {
    const int64_t out_stride = hi == nullptr ? 1 : 2;
    kernels.hash(words, stride, rows, n_words, lo, out, out_stride);
    if (hi != nullptr) kernels.hash(words, stride, rows, n_words, hi, out + 1, out_stride);
  }
};

}  // namespace

int64_t pack_signs(const void* z, Signs t, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* taking_part, int64_t* words,
                   int threads) {
  const SignsKernels& kernels = pick(kTables);
  const auto pack = kernels.pack[static_cast<int>(t)];
  const int64_t n_words = ceil_div(neurons, kWordBits), height = unit_rows(neurons * element_size(t));
  uint64_t* mask = nullptr;
  Workspace space(Workspace::size<uint64_t>(n_words));
  if (!space.ok()) return kNoMemory;
  if (taking_part != nullptr) {
    mask = space.take<uint64_t>(n_words);
    kernels.pack[static_cast<int>(Signs::boolean)](taking_part, neurons, nullptr, mask);
  }
  uint64_t* const out = reinterpret_cast<uint64_t*>(words);
  for_each_unit(useful_threads(threads, rows * neurons), ceil_div(rows, height), [&](int64_t unit) {
    for (int64_t r = unit * height; r < std::min((unit + 1) * height, rows); ++r)
      pack(at(z, r * stride, t), neurons, mask, out + r * n_words);
  });
  return kOk;
}

int64_t hash_signs(const void* z, Signs t, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* taking_part, const HashKey& key,
                   int64_t* hashes, int threads) {
  const SignsKernels& kernels = pick(kTables);
  const auto pack = kernels.pack[static_cast<int>(t)];
  const int64_t n_words = ceil_div(neurons, kWordBits), height = unit_rows(neurons * element_size(t));
  const int64_t some = std::clamp<int64_t>(kCodeBytes / std::max<int64_t>(8 * n_words, 1), 4, height);
  threads = useful_threads(threads, rows * neurons);
  Workspace space(KeyTable::bytes(n_words, key.bits) + static_cast<size_t>(threads) * Workspace::size<uint64_t>(some * n_words));
  if (!space.ok()) return kNoMemory;
  const KeyTable keys(space, neurons, taking_part, key);
  uint64_t* const memory = space.take<uint64_t>(threads * some * n_words);
  for_each_unit_by_worker(threads, ceil_div(rows, height), [&](int64_t unit, int worker) {
    uint64_t* const words = memory + worker * some * n_words;
    const int64_t end = std::min((unit + 1) * height, rows);
    for (int64_t first = unit * height; first < end; first += some) {
      const int64_t count = std::min(some, end - first);
      for (int64_t r = 0; r < count; ++r) pack(at(z, (first + r) * stride, t), neurons, nullptr, words + r * n_words);
      keys.hash(kernels, words, n_words, count, n_words, hashes + first * (key.bits / 64));
    }
  });
  return kOk;
}

int64_t hash_code(const int64_t* words, int64_t rows, int64_t stride, int64_t n_words, const uint8_t* taking_part, const HashKey& key,
                  int64_t* hashes, int threads) {
  const SignsKernels& kernels = pick(kTables);
  const int64_t height = unit_rows(8 * n_words);
  Workspace space(KeyTable::bytes(n_words, key.bits));
  if (!space.ok()) return kNoMemory;
  const KeyTable keys(space, n_words * kWordBits, taking_part, key);
  const uint64_t* const in = reinterpret_cast<const uint64_t*>(words);
  for_each_unit(useful_threads(threads, rows * n_words * 8), ceil_div(rows, height), [&](int64_t unit) {
    const int64_t first = unit * height, count = std::min(height, rows - first);
    keys.hash(kernels, in + first * stride, stride, count, n_words, hashes + first * (key.bits / 64));
  });
  return kOk;
}

}  // namespace fastsae
