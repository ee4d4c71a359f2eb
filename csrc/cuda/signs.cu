// Packed codes and hashes of pre-activations that a model has computed. Bound by reading them.
//
//   pack   a warp turns 256 neurons of a row into 8 half words of 32 bits by ballots
//   hash   a warp takes 4 rows, so that a key is read once for them; lane j holds neurons j, j + 32, ...; XOR over lanes at the end
#include "cpu/keys.h"
#include "cuda/platform.h"

namespace fastsae::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarp;
constexpr int kHalves = 8;  // of a packed row, a warp
constexpr int kRows = 4;    // hashed together
constexpr int kFlight = 4;  // neurons of a lane before the first use

FASTSAE_DEVICE bool positive(float x) { return x > 0; }
FASTSAE_DEVICE bool positive(double x) { return x > 0; }
FASTSAE_DEVICE bool positive(uint8_t x) { return x != 0; }
// Above 0 and not NaN: the bits lie in 1 .. those of infinity.
FASTSAE_DEVICE bool positive(Half x) { return static_cast<uint16_t>(x.bits - 1) < 0x7c00; }
FASTSAE_DEVICE bool positive(Bfloat x) { return static_cast<uint16_t>(x.bits - 1) < 0x7f80; }

template <class T>
struct Signs {
  const T* z;
  int64_t stride;
  FASTSAE_DEVICE bool active(int64_t row, int64_t j) const { return positive(z[row * stride + j]); }
};
struct Words {
  const int64_t* words;
  int64_t stride;
  FASTSAE_DEVICE bool active(int64_t row, int64_t j) const { return (words[row * stride + j / 64] >> (j % 64) & 1) != 0; }
};

FASTSAE_DEVICE int64_t warp_number() { return static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarp; }

template <class I>
__global__ void mark_kernel(const I* __restrict__ indices, int64_t count, int64_t size, uint8_t* __restrict__ mask, int32_t* flag) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count) return;
  const int64_t index = indices[i];
  if (index < 0 || index >= size)
    *flag = 1;
  else
    mask[index] = 1;
}

__global__ void clear_kernel(uint8_t* to, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) to[i] = 0;
}

template <class T>
__global__ void __launch_bounds__(kThreads)
    pack_kernel(const T* __restrict__ z, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* __restrict__ mask, int64_t chunks,
                int64_t halves, uint32_t* __restrict__ out) {
  const int64_t number = warp_number();
  if (number >= rows * chunks) return;
  const int64_t row = number / chunks, chunk = number % chunks;
  const int lane = threadIdx.x % kWarp;
  const int64_t first = chunk * kHalves * kWarp + lane;
  bool active[kHalves];
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const int64_t j = first + h * kWarp;
    active[h] = j < neurons && positive(z[row * stride + j]) && (mask == nullptr || mask[j] != 0);
  }
  uint32_t mine = 0;
#pragma unroll
  for (int h = 0; h < kHalves; ++h) {
    const uint32_t word = __ballot_sync(kAllLanes, active[h]);
    if (lane == h) mine = word;
  }
  if (lane < kHalves && chunk * kHalves + lane < halves) out[row * halves + chunk * kHalves + lane] = mine;
}

__global__ void keys_kernel(int64_t neurons, const uint8_t* __restrict__ mask, uint32_t layer, uint64_t seed, bool wide,
                            int64_t* __restrict__ keys) {
  const int64_t j = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (j >= neurons) return;
  const bool part = mask == nullptr || mask[j] != 0;
  const NeuronKey key = neuron_key(static_cast<uint32_t>(j), layer, seed);
  keys[j] = part ? key.lo : 0;
  if (wide) keys[neurons + j] = part ? key.hi : 0;
}

template <class Source, int kParts>
__global__ void __launch_bounds__(kThreads)
    hash_kernel(Source source, int64_t rows, int64_t neurons, const int64_t* __restrict__ keys, int64_t* __restrict__ hashes) {
  const int64_t first = warp_number() * kRows;
  if (first >= rows) return;
  int64_t total[kRows][kParts] = {};
  for (int64_t start = threadIdx.x % kWarp; start < neurons; start += kFlight * kWarp) {
    int64_t key[kFlight][kParts];
    bool active[kFlight][kRows];
#pragma unroll
    for (int u = 0; u < kFlight; ++u) {
      const int64_t j = start + u * kWarp;
#pragma unroll
      for (int part = 0; part < kParts; ++part) key[u][part] = j < neurons ? keys[part * neurons + j] : 0;
#pragma unroll
      for (int r = 0; r < kRows; ++r) active[u][r] = j < neurons && first + r < rows && source.active(first + r, j);
    }
#pragma unroll
    for (int u = 0; u < kFlight; ++u)
#pragma unroll
      for (int r = 0; r < kRows; ++r)
#pragma unroll
        for (int part = 0; part < kParts; ++part) total[r][part] ^= active[u][r] ? key[u][part] : 0;
  }
#pragma unroll
  for (int r = 0; r < kRows; ++r)
#pragma unroll
    for (int part = 0; part < kParts; ++part) {
#pragma unroll
      for (int lanes = kWarp / 2; lanes > 0; lanes /= 2) total[r][part] ^= __shfl_xor_sync(kAllLanes, total[r][part], lanes);
      if (threadIdx.x % kWarp == 0 && first + r < rows) hashes[(first + r) * kParts + part] = total[r][part];
    }
}

// The same as with_type, of everything that has signs.
template <class Body>
int with_signs(Type type, const Body& body) {
  if (type == Type::boolean) return body(uint8_t{});
  return type == Type::f64 ? body(double{}) : with_type(type, body);
}

template <class T>
int pack(Where where, const void* z, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* mask, int64_t* words) {
  const int64_t chunks = ceil_div(neurons, kHalves * kWarp), halves = ceil_div(neurons, 64) * 2;
  return launch(pack_kernel<T>, where, ceil_div(rows * chunks, kWarps), kThreads, static_cast<const T*>(z), rows, stride, neurons, mask,
                chunks, halves, reinterpret_cast<uint32_t*>(words));
}

template <class Source>
int hash(Where where, Source source, int64_t rows, int64_t neurons, const int64_t* keys, int bits, int64_t* hashes) {
  const int64_t blocks = ceil_div(ceil_div(rows, kRows), kWarps);
  if (bits == 64) return launch(hash_kernel<Source, 1>, where, blocks, kThreads, source, rows, neurons, keys, hashes);
  return launch(hash_kernel<Source, 2>, where, blocks, kThreads, source, rows, neurons, keys, hashes);
}

}  // namespace

int mark(Where where, const void* indices, Index index, int64_t count, int64_t size, uint8_t* mask, int32_t* flag) {
  if (const int error = launch(clear_kernel, where, ceil_div(size, kThreads), kThreads, mask, size); error != 0) return error;
  return with_type(index, [&](auto i) {
    using I = decltype(i);
    return launch(mark_kernel<I>, where, ceil_div(count, kThreads), kThreads, static_cast<const I*>(indices), count, size, mask, flag);
  });
}

int pack_signs(Where where, const void* z, Type type, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* mask, int64_t* words) {
  return with_signs(type, [&](auto t) { return pack<decltype(t)>(where, z, rows, stride, neurons, mask, words); });
}

int neuron_keys(Where where, int64_t neurons, const uint8_t* mask, uint32_t layer, uint64_t seed, int bits, int64_t* keys) {
  return launch(keys_kernel, where, ceil_div(neurons, kThreads), kThreads, neurons, mask, layer, seed, bits == 128, keys);
}

int hash_signs(Where where, const void* z, Type type, int64_t rows, int64_t stride, int64_t neurons, const int64_t* keys, int bits,
               int64_t* hashes) {
  return with_signs(type, [&](auto t) {
    using T = decltype(t);
    return hash(where, Signs<T>{static_cast<const T*>(z), stride}, rows, neurons, keys, bits, hashes);
  });
}

int hash_code(Where where, const int64_t* words, int64_t rows, int64_t stride, int64_t n_words, const int64_t* keys, int bits,
              int64_t* hashes) {
  return hash(where, Words{words, stride}, rows, n_words * 64, keys, bits, hashes);
}

}  // namespace fastsae::cuda
