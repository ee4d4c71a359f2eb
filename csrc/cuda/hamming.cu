// Hamming distances of packed codes: XOR and population count.
//
// A block forms 64 x 64 distances, a thread 4 x 4 of them, from 8 words at a time in shared memory. Population count runs at a quarter of
// the rate of other integer instructions and bounds the kernel: 2 of them a word and pair.
#include "cuda/platform.h"

namespace fastsae::cuda {
namespace {

constexpr int kTile = 64;  // codes of each side
constexpr int kSide = 16;  // threads of each side
constexpr int kEach = kTile / kSide;
constexpr int kWords = 8;  // words of each code in shared memory at a time
constexpr int kThreads = kSide * kSide;
static_assert(kTile * kWords % kThreads == 0);

struct Tile {
  uint64_t word[kWords][kTile + 1];

  FASTSAE_DEVICE void load(const int64_t* codes, int64_t first, int64_t n, int64_t stride, int64_t start, int64_t words) {
#pragma unroll
    for (int part = 0; part < kTile * kWords / kThreads; ++part) {
      const int place = part * kThreads + static_cast<int>(threadIdx.x), code = place / kWords, w = place % kWords;
      const bool inside = first + code < n && start + w < words;
      word[w][code] = inside ? static_cast<uint64_t>(codes[(first + code) * stride + start + w]) : 0;
    }
  }
};

__global__ void __launch_bounds__(kThreads)
    hamming_kernel(const int64_t* __restrict__ a, int64_t n, int64_t stride_a, const int64_t* __restrict__ b, int64_t m, int64_t stride_b,
                   int64_t words, int64_t tiles, int32_t* __restrict__ out, int64_t out_stride_a, int64_t out_stride_b) {
  __shared__ Tile left, right;
  const int64_t first_a = blockIdx.x / tiles * kTile, first_b = blockIdx.x % tiles * kTile;
  const int x = threadIdx.x % kSide, y = threadIdx.x / kSide;
  int32_t total[kEach][kEach] = {};
  for (int64_t start = 0; start < words; start += kWords) {
    left.load(a, first_a, n, stride_a, start, words);
    right.load(b, first_b, m, stride_b, start, words);
    __syncthreads();
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      uint64_t mine[kEach], theirs[kEach];
#pragma unroll
      for (int i = 0; i < kEach; ++i) mine[i] = left.word[w][y + kSide * i], theirs[i] = right.word[w][x + kSide * i];
#pragma unroll
      for (int i = 0; i < kEach; ++i)
#pragma unroll
        for (int j = 0; j < kEach; ++j) total[i][j] += __popcll(mine[i] ^ theirs[j]);
    }
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kEach; ++i)
#pragma unroll
    for (int j = 0; j < kEach; ++j) {
      const int64_t row = first_a + y + kSide * i, column = first_b + x + kSide * j;
      if (row < n && column < m) out[row * out_stride_a + column * out_stride_b] = total[i][j];
    }
}

}  // namespace

int hamming(Where where, const int64_t* a, int64_t n, int64_t stride_a, const int64_t* b, int64_t m, int64_t stride_b, int64_t words,
            int32_t* out, int64_t out_stride_a, int64_t out_stride_b) {
  // Neighbouring threads write neighbouring columns.
  if (out_stride_b != 1 && out_stride_a == 1) return hamming(where, b, m, stride_b, a, n, stride_a, words, out, out_stride_b, out_stride_a);
  const int64_t tiles = ceil_div(m, kTile);
  return launch(hamming_kernel, where, ceil_div(n, kTile) * tiles, kThreads, a, n, stride_a, b, m, stride_b, words, tiles, out,
                out_stride_a, out_stride_b);
}

}  // namespace fastsae::cuda
