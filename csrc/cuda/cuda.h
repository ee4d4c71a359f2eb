// fastsae on CUDA: the interface of the kernels that are CUDA C++, on one page. No torch, no Python: addresses, sizes, a device, a stream.
//
// Conventions
//   - Addresses are of memory on `where.device`; work is queued on `where.stream`. Nothing waits for the device, nothing is allocated:
//     workspaces come from the caller, their sizes are stated here. All of it can be captured in a CUDA graph.
//   - Sizes and strides are int64 and count elements. Nothing is written outside the named outputs.
//   - Every function returns a cudaError_t as int: 0, or why a launch failed. Sizes of 0 are served.
//   - No float atomics; the same inputs give the same bits.
//   - A bad index is never followed: it sets *flag to 1.
// tests/gpu/emulate.h compiles the same sources for the CPU, where the tests run them.
#pragma once
#include <cstdint>

namespace fastsae::cuda {

enum class Type : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3, f64 = 4 };
enum class Index : int { i32 = 0, i64 = 1 };

struct Where {
  int device;
  void* stream;
};

// ---- select.cu: the k best of each row ----

constexpr int64_t kMaxK = 2048;

// keys [rows, k], descending, become the k best of z [rows, n] (stride between rows, 1 along n), whose columns are numbered from `first`,
// and with `resume` also of the keys given. A key is (ordered score << 32) | ~index: higher score first, then lower index; NaN above +inf,
// -0 == +0. Key 0 is "none" and fills up where there are fewer than k. 1 <= k <= kMaxK, first + n < 2^32, type f32, bf16, f16.
int select_scores(Where where, const void* z, Type type, int64_t rows, int64_t n, int64_t stride, int64_t first, int64_t k, bool resume,
                  uint64_t* keys);
// The same for distances >= 0, the smallest first.
int select_distances(Where where, const int32_t* distance, int64_t rows, int64_t n, int64_t stride, int64_t first, int64_t k, bool resume,
                     uint64_t* keys);
// Keys to results of the type of z. `relu` clamps values at 0. A zero comes out as +0.
int finish_scores(Where where, const uint64_t* keys, int64_t count, bool relu, void* values, Type type, int64_t* indices);
int finish_distances(Where where, const uint64_t* keys, int64_t count, int32_t* distance, int64_t* indices);

// ---- hamming.cu ----

// out[i, j] (any strides) = bits that differ between a[i] and b[j], [n, words] and [m, words] with stride 1 along the words.
int hamming(Where where, const int64_t* a, int64_t n, int64_t stride_a, const int64_t* b, int64_t m, int64_t stride_b, int64_t words,
            int32_t* out, int64_t out_stride_a, int64_t out_stride_b);

// ---- signs.cu: codes of given pre-activations ----

// mask [size] of 0 and 1 from `count` indices.
int mark(Where where, const void* indices, Index index, int64_t count, int64_t size, uint8_t* mask, int32_t* flag);
// words [rows, ceil(neurons / 64)]: bit j % 64 of word j // 64 is z[row, j] > 0 and, with a mask, mask[j] != 0.
int pack_signs(Where where, const void* z, Type type, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* mask, int64_t* words);
// keys [bits / 64, neurons]: of each neuron that takes part (Philox4x32-10, see csrc/cpu/keys.h), 0 of the others. neurons < 2^32.
int neuron_keys(Where where, int64_t neurons, const uint8_t* mask, uint32_t layer, uint64_t seed, int bits, int64_t* keys);
// hashes [rows, bits / 64]: the XOR of the keys of the neurons with z > 0, or of the bits that are set in words [rows, n_words].
int hash_signs(Where where, const void* z, Type type, int64_t rows, int64_t stride, int64_t neurons, const int64_t* keys, int bits,
               int64_t* hashes);
int hash_code(Where where, const int64_t* words, int64_t rows, int64_t stride, int64_t n_words, const int64_t* keys, int bits,
              int64_t* hashes);

// ---- by_feature.cu: transposed latents and the weight gradient ----

// Bytes of the workspace of by_feature for n slots, or minus a cudaError_t.
int64_t by_feature_bytes(Where where, int64_t n, int64_t features);
// Slots in the order of (feature, slot): order [n], segments [features + 1]: the slots of f are order[segments[f] .. segments[f + 1]).
// Slots with a bad index come last and set *flag. n < 2^32 - 1, features < 2^32 - 1. Passes over the bits that `features` needs, not
// over 64.
int by_feature(Where where, const void* indices, Index index, int64_t n, int64_t features, void* workspace, uint32_t* order,
               uint32_t* segments, int32_t* flag);
// What the sums read, by position in `order`: row [n] and, unless null, value [n] in float32. crow [rows + 1] or null with k slots a row.
int permute_slots(Where where, const uint32_t* order, int64_t n, const void* values, Type type, const int64_t* crow, int64_t rows,
                  int64_t k, uint32_t* row, float* value);
// out[f, :] (stride 1 along D) = the sum of value * grad[row] over the slots of f: see by_feature.cu for the order. Every row is written.
// partials [n / split, d] float32; split is a multiple of 16.
int sum_by_feature(Where where, const uint32_t* segments, int64_t n, int64_t features, const uint32_t* row, const float* value,
                   const void* grad, Type type, int64_t stride_r, int64_t d, int64_t split, float* partials, void* out, int64_t stride_f);

}  // namespace fastsae::cuda
