// fastsae: the whole C++ interface on one page. No torch, no Python: addresses, sizes, strides, a thread count.
//
// Conventions
//   - Sizes and strides are int64 and count elements. Nothing is written outside the named outputs.
//   - Sums are fp32 with fused multiply-add (the portable level rounds the product first where the CPU has no FMA) and have one
//     fixed order per instruction set: bits depend neither on the thread count nor on the other rows.
//   - Every index is checked before the first access. A bad argument leaves the outputs untouched.
//   - `threads` is an upper bound; small work runs on one thread.
//   - Workspaces come from one reused block, see workspace.h; their sizes are stated below.
#pragma once
#include <cstdint>

namespace fastsae {

enum class Dtype : int { f32 = 0, bf16 = 1, f16 = 2 };
enum class Index : int { i32 = 0, i64 = 1 };

// The sparse side. Row r owns slots [r*k, (r+1)*k), or [crow[r], crow[r+1]) when crow is given.
struct Slots {
  const void* indices;  // [n] features, `index`
  const int64_t* crow;  // [rows + 1] or null
  int64_t rows, k, n;   // n = rows*k without crow; k is ignored with crow
  int64_t features;     // valid indices are 0 <= i < features
  Index index;
};

// The dense side, [features, d] with any strides: {d, 1} is a plain matrix, {1, features} a transposed view.
struct Matrix {
  void* data;
  int64_t stride_f, stride_d, d;
};

// A status is kOk, kNoMemory, `i >= 0` (indices[i] is out of range), or crow_error(i) (crow[i] is not what it must be:
// crow[0] = 0, never falling, crow[rows] = n).
constexpr int64_t kOk = -1;
constexpr int64_t kNoMemory = INT64_MIN;
constexpr int64_t crow_error(int64_t i) { return -2 - i; }

// decode: y[r, :] = bias + sum over the slots s of row r of values[s] * W[indices[s], :]
//
//   total = 0                                   per element of y, fp32
//   for block in the row's slots, 16 at a time:
//     part = 0
//     for s in block, in order: part = fma(values[s], W[indices[s], d], part)
//     total = total + part                      (the first block is taken as it is)
//   y[r, d] = round(total + bias[d])            bias may be null: then nothing is added
//
// values [n], W and y [rows, d] contiguous have type `t`; bias is fp32 [d].
// W with stride_d = 1 is read in place. Any other W is packed 64 columns at a time for the features in use: workspace 64 elements of t
// for each of min(n, features) features (all of them where they are no more than twice the slots), once per thread as far as 64 MiB
// go and otherwise once for all threads, and 12 * features + 4 * n bytes for the renumbering.
int64_t decode(const Slots& slots, Dtype t, const void* values, const Matrix& w, const float* bias, void* y, int threads);

// decode_dvalues: dvalues[s] = <grad[r, :], W[indices[s], :]> for every slot s of every row r
//
//   stride_d = 1:  16 lanes; lane l of accumulator j (j = 0..3) sums d = 64*i + 16*j + l within a block of 256 elements, the block is
//                  (a0 + a1) + (a2 + a3), blocks are added in order, lanes are folded 8, 4, 2, 1 at the end.
//   otherwise:     panels of 64 elements, each 16 lanes summed over j = 0..3 and folded 8, 4, 2, 1; 4 panels in order make a block of
//                  256 elements, blocks are added in order.
//
// grad [rows, d] contiguous, W and dvalues [n] have type `t`. Workspace of the second case: that of decode, and at most
// 64 MiB or 8 * n bytes for the sums.
int64_t decode_dvalues(const Slots& slots, Dtype t, const void* grad, const Matrix& w, void* dvalues, int threads);

// decode_dweight: out[f, :] = sum over the slots s with indices[s] = f, in slot order, of values[s] * grad[row(s), :]
//
//   (offsets, rows, values) = stable counting sort of the slots by feature
//   out = decode with those as (crow, indices, values), and grad as W: same blocks of 16, same bits rule
//
// Every row of out is written, zeros where a feature has no slot. values [n], grad [rows, d] contiguous and out have type `t`; out has any
// strides. Workspace: 8 * features + n * (4 + sizeof(t)) bytes, and the larger of 8 * features and 16 * n with several threads.
int64_t decode_dweight(const Slots& slots, Dtype t, const void* values, const void* grad, const Matrix& out, int threads);

// ---- encode ----

// x [rows, d] in any strides; row r as the score takes it is fl(x[r, :] - subtract) in fp32 (subtract may be null), or with eps > 0
// fl(x[r, :] / max(norm, eps)) with norm = sqrt(sum of squares in the order of a score). Where that sum is below 2^-80, above 2^126 or NaN
// and the largest element is a normal number, with exponent e: the same of fl(x[r, :] * 2^-e) and fl(eps * 2^-e) (2^-126 for e = 127).
struct Activations {
  const void* data;
  Dtype t;
  int64_t rows, stride_row, stride_d;
  const float* subtract;
  float eps;
};

// The features in use: `features` rows of a dictionary [*, d] in any strides, all of them or those of `list` (ascending, without
// repetition). With eps > 0 they are divided as rows of Activations are. `packed` may be null, or what `pack` wrote for the whole
// dictionary, at a multiple of 64 bytes.
struct Weights {
  const void* data;
  Dtype t;
  int64_t stride_f, stride_d, d, features;
  const int32_t* list;
  float eps;
  const uint32_t* packed;
};

// The packed form of a dictionary: 8-bit integers, rotated, and three numbers a feature; round_up(features, 32) * (about d + 12) bytes. It
// is for screening only: what is undecided is scored from the weights themselves. Its layout is one for all levels; `packs`: this one can.
bool packs(int64_t d);
int64_t packed_words(int64_t features, int64_t d);
int64_t pack(const Weights& w, uint32_t* packed, int threads);

// The score of row r and feature f:
//
//   total = 0                                   16 lanes; lane l sums the d with d mod 16 = l
//   for block in d, 4096 elements at a time:
//     part = 0
//     for i in block, 16 elements at a time, in order: part = fma(x[r, i..], W[f, i..], part)      missing elements are 0
//     total = total + part                      (the first block is taken as it is)
//   score = fl(fl(fold(total) * scale[f]) + bias[f])    lanes fold 8, 4, 2, 1; without scale or bias that step is left out
//
// scale and bias [dictionary] fp32, null where absent. Half-precision inputs are widened exactly.
//
// Several ways to the same bits. dense: every score is computed. screen (levels with 8-bit dot products): products of 8-bit integers with a
// proven error bound (cpu/engine/bound.h) choose which features can be kept; only those are scored. Rows for which that decides too little
// (flat, tied, zero, not finite) are scored densely. A top-k can also screen all features before the first score: with all of them packed
// first, a few rows at a time (rows), or each block packed where it is used (blocks); otherwise these two are as dense, and where a W
// cannot be read row by row as screen. automatic: what was measured to be faster (cpu/engine/plan.h).
//
// Workspace of screen, whatever rows and features are, for chunks of C <= 1024 rows and T threads, d rounded up to 32 (256 for the
// rotation): C * (5 d + 24) bytes, and for each thread 12 C (block + 16), the packed block (not with a handle) and 100 d; block =
// 32 to 256 features. A strided, normalised or (without screening) half-precision W: 4 d * block more for each thread. C shrinks, down to
// 64, to keep all buffers of entries within 64 MiB.
enum class EncodePath : int { automatic = 0, dense = 1, screen = 2, rows = 3, blocks = 4 };
struct EncodeStats {      // for tests and benches; may be null
  int64_t screened_rows;  // rows whose result came from screening
  int64_t exact_rows;     // rows that were screened in vain, and scored densely
  int64_t scored;         // scores computed for screened rows
  int64_t survivors;      // of these, how many were still among the candidates at the end
  int64_t workspace;      // bytes, the largest at a time
};

// encode_topk: the k largest scores of each row, descending; equal scores (-0 == +0): lower feature first; NaN above +inf. `absolute`: the
// k of the largest magnitude, by it, with their signs (s and -s are equal); for fewer than 2^30 features.
//
// values [rows, k] and indices [rows, k] are contiguous; `relu` clamps values at 0 after the selection (NaN stays). A NaN is returned as
// the quiet NaN, -0 as +0. Workspace: that of the engine, and 8 * (4k + 272) bytes a row of the chunk; dense: 4 d a row of the chunk, and
// T * 8 * min(2k + 64, features) a row within 64 MiB (or for one row). rows: features * (d + 32) bytes (not with a handle: 32 each), and a
// thread at most 256 KiB (or 12 rows) of upper ends, 4 bytes a feature and row, 5 d a row and 24 bytes a feature. blocks: that of the
// engine, 8 MiB (or 12 rows) of upper ends, and 24 bytes a feature and thread.
int64_t encode_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t k, bool relu, bool absolute,
                    float* values, int64_t* indices, EncodePath path, EncodeStats* stats, int threads);

// topk_changes: where the k largest scores of a row change along the segment between rows 2 s and 2 s + 1 of x, which are `ends` [2 S, d]
// in the type of w. Scores are lines <x - subtract, W[f, :]> + bias[f] in fp64, each sum of 8 lanes in order, from the ends as they are.
//
//   at 0: the k largest, of equal ones the first; `relu`: k lines of zeros, feature -1, stand before the others; `absolute`: every feature
//   has the line of its negative as well
//   change: the first place at which the largest of the others is above the least of the best by more than 2^-49 of their sizes: by
//   Newton's iteration on their difference, which is convex
//   at 1: what is equal there, and in the order of features another, changes
//
// counts [S]: changes of each segment, the first at s * capacity of t, leaves and enters; -1: undecided (more than `capacity` of them;
// values beyond 1e18). kUnsupported where this level cannot screen, or W not row by row. Workspace: that of encode_topk's blocks with
// 64 MiB of upper ends (or two rows), and for each thread 8 bytes a feature and 44 (76 of magnitudes) for each of at most 4 k + 256 +
// features / 4 candidates; where there are more, 32 (64) bytes a feature at a time.
int64_t topk_changes(const Activations& x, const Weights& w, const float* bias, const double* ends, int64_t k, bool relu, bool absolute,
                     int64_t capacity, double* t, int32_t* leaves, int32_t* enters, int64_t* counts, int threads);

// What an encoder with any number of latents a row keeps: owned here until it is copied out, because its size is known only then.
struct Entries;
Entries* new_entries();  // for one call
void free_entries(Entries* entries);
int64_t entries_count(const Entries* entries);
// values and flags (may be null) [count], col [count], crow [rows + 1]: features ascending in a row.
int64_t copy_entries(const Entries* entries, float* values, int64_t* col, int64_t* crow, uint8_t* flags, int threads);

// encode_threshold: scores above max(threshold, 0), strictly, and NaN; threshold [dictionary]. With half_band >= 0 also those with
// |fl(score - threshold)| < half_band; a score that is not above its threshold is then stored as 0. flags: 1 above, 2 in the band.
// encode_gated: what is not (product + b_gate <= 0) and not (product * scale + bias <= 0); the value is the latter, or NaN if one is (a NaN
// is the quiet NaN). encode_batch_topk: the `total` largest positive scores (and NaN, above all) of all rows, by score, then row, then
// feature; min_kept is the smallest of them, +inf where there is none.
//
// Workspace of all three: that of the engine, and of batch_topk 16 bytes for each of 2 * total + one block's entries.
// Where more than a quarter of a block's scores of a row are undecided, all of them are computed; where that holds for most rows, the next
// blocks are not screened at all (at initialisation half of all scores are positive).
int64_t encode_threshold(const Activations& x, const Weights& w, const float* scale, const float* bias, const float* threshold,
                         float half_band, Entries* entries, EncodePath path, EncodeStats* stats, int threads);
int64_t encode_gated(const Activations& x, const Weights& w, const float* b_gate, const float* stretch, const float* b_mag,
                     Entries* entries, EncodePath path, EncodeStats* stats, int threads);
int64_t encode_batch_topk(const Activations& x, const Weights& w, const float* scale, const float* bias, int64_t total, float* min_kept,
                          Entries* entries, EncodePath path, EncodeStats* stats, int threads);

// ---- spline codes ----

// spline_code: bit j % 64 of words[r, j / 64] is score > 0 (0 for NaN); words [rows, ceil(features / 64)] contiguous, the bits beyond are
// 0. A level that screens decides most signs from products of bf16 numbers (of 8-bit integers where it has no others) with a proven bound
// and computes the scores of the rest; rows of at most 16 elements are computed as they are. Workspace: that of the engine, and up to
// 32 MiB of packed features where there are more rows than a chunk.
int64_t spline_code(const Activations& x, const Weights& w, const float* bias, int64_t* words, EncodePath path, EncodeStats* stats,
                    int threads);

// ---- the optimiser ----

// The gradient of [features, d]: unless it is sparse `data` itself, with one of the strides 1; of slots `data` is [slots.rows, d],
// contiguous, and row f what decode_dweight makes of them and values [n]: same order, same bits.
struct Gradient {
  bool sparse;
  Slots slots;
  const float *values, *data;
  int64_t stride_f, stride_d;
};

// Weights and moments [features, d], all three with the same strides: rows (stride_d = 1), or transposed (stride_f = 1).
struct AdamMatrices {
  float *w, *m, *v;
  int64_t features, d, stride_f, stride_d;
};

// adam: one step of Adam. For every feature f, in fp32:
//
//   g = row f of the gradient
//   g = fma(-<g, w>, w, g)                        with `project`; the product is summed as decode_dvalues does (stride_d = 1)
//   g = g * factor                                factor is read from memory: whoever computes it need not wait; null: 1
//   w = w * fl(1 - lr * weight_decay)
//   m = m + (1 - beta1) * (g - m)                 one fma; from the side of g, g - beta1 * (g - m), where beta1 <= 0.5
//   v = fma(fl((1 - beta2) * g), g, fl(beta2 * v))
//   w = fma(m, -s / (fl(sqrt v) + e), w)          r = sqrt(1 - beta2^step), s = fl(lr * r / (1 - beta1^step)), e = fl(eps * r)
//   w = w * fl(1 / |w|)                           with `normalise`, unless |w| < 1e-8; |w|^2 is summed as <g, w> is
//
// A feature without slots has g = 0 * factor and is not projected; its moments decay and it moves, as in every dense Adam. Each element
// of w, m and v is read and written once. The bits do not depend on the layout. Workspace with slots: that of decode_dweight, and a thread
// the larger of 96 KiB and one row. Transposed: a thread 514 KiB, or with `project` or `normalise` 75 KiB and 1 KiB * d; with slots also
// that of decode_dweight, and a row for each feature with more than 1024 of them.
struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // 1 at the first step
  bool project, normalise;
};
int64_t adam(const Gradient& grad, const float* factor, const AdamMatrices& matrices, const AdamOptions& options, int threads);

// signum: one step of schedule-free sign descent on y (w) and z (m); v is not read and may be null. lerp(a, b, s) is fma(s, b - a, a), from
// the side of b, fma(s - 1, b - a, b), unless |s| < 0.5. For every feature, in fp32, g with `project` as in adam:
//
//   x = lerp(y, z, 1 - 1 / momentum)
//   z = z - lr * sign(g)                          sign(0) = sign(NaN) = 0
//   x = lerp(x, z, average)
//   y = lerp(x, z, 1 - momentum)                  with `normalise` then scaled as in adam
//
// Workspace: that of adam.
struct SignumOptions {
  double lr, momentum, average;
  bool project, normalise;
};
int64_t signum(const Gradient& grad, const AdamMatrices& matrices, const SignumOptions& options, int threads);

// grad_squares: total = the sum of g^2 over all features, with g as in adam up to its factor, for clipping by the global norm. A row is
// summed as <g, w> is; rows are added in order, in fp64. Of the matrices only w is read, with `project`. Workspace: that of adam, and
// 4 * features bytes.
int64_t grad_squares(const Gradient& grad, const AdamMatrices& matrices, bool project, float* total, int threads);

// Packed codes [rows, words] as int64: stride 1 along the words.
struct Codes {
  const int64_t* words_of;
  int64_t rows, stride, words;
};

// hamming: out[i * stride_a + j * stride_b] = number of bits that differ between row i of a and row j of b. One of the strides is 1, or
// the side of the other has one row at most.
//
// b is packed in panels of 16 codes side by side: at most 32 KiB, or 64 codes, a thread. `vpopcnt` allows VPOPCNTDQ where the CPU has it
// (false is for tests).
int64_t hamming(const Codes& a, const Codes& b, int32_t* out, int64_t stride_a, int64_t stride_b, bool vpopcnt, int threads);

// hamming_topk: the k nearest rows of b for every row of a, by distance, then by lower index. 0 <= k <= b.rows < 2^32.
//
// distance and index [a.rows, k] contiguous. Workspace a thread: one panel as above, 136 * (codes in a panel) bytes, and 16 k + 8 bytes a
// row for as many rows as fit 1 MiB (at least one, at most 512), and for one row more.
int64_t hamming_topk(const Codes& a, const Codes& b, int64_t k, int32_t* distance, int64_t* index, bool vpopcnt, int threads);

// Pre-activations whose signs are codes. z [rows, neurons] has stride 1 along the neurons; a bit is z > 0, and 0 for -0 and NaN.
// `taking_part` [neurons] (null: all) is 0 where a neuron's bit is 0 whatever its sign.
enum class Signs : int { f32 = 0, bf16 = 1, f16 = 2, boolean = 3 };

// pack_signs: bit j % 64 of words[r, j / 64] = sign j of row r; words [rows, ceil(neurons / 64)] contiguous, the bits beyond are 0.
int64_t pack_signs(const void* z, Signs t, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* taking_part, int64_t* words,
                   int threads);

// hash_signs, hash_code: hashes[r] = XOR of the keys of the neurons whose bit is set; keys as in cpu/keys.h. hashes [rows] with 64 bits,
// [rows, 2] with 128. hash_code takes packed words [rows, n_words] with stride 1 along the words, and taking_part [64 n_words].
// Workspace: 8 bytes a neuron (16 with 128 bits), and 16 KiB a thread or four packed rows.
struct HashKey {
  uint32_t layer;
  uint64_t seed;
  int bits;  // 64 or 128
};
int64_t hash_signs(const void* z, Signs t, int64_t rows, int64_t stride, int64_t neurons, const uint8_t* taking_part, const HashKey& key,
                   int64_t* hashes, int threads);
int64_t hash_code(const int64_t* words, int64_t rows, int64_t stride, int64_t n_words, const uint8_t* taking_part, const HashKey& key,
                  int64_t* hashes, int threads);

// ---- match ----

// A similarity is the score of a row of a and a row of b, both divided by max(norm, eps) (Activations and Weights with eps > 0).
//
// match_cosine: the k most similar rows of b for every row of a, descending, lower index first, NaN above all; `absolute`: by magnitude,
// with the sign kept; `exclude_self`: not row i for row i. similarity and index [a.rows, k]. Workspace: that of encode_topk.
int64_t match_cosine(const Activations& a, const Weights& b, int64_t k, bool absolute, bool exclude_self, float* similarity, int64_t* index,
                     EncodePath path, EncodeStats* stats, int threads);
// match_pair: in one pass the k_ab best of b for every row of a, the k_ba best of a for every row of b, and for every row of a its lowest
// similarity. kUnsupported where this level cannot screen, or for k_ba > 8. Workspace: twice that of encode_topk, and 20 * k_ba + 12 bytes
// for each row of b. Nothing grows with a.rows * b.features.
constexpr int64_t kUnsupported = INT64_MIN + 1;
int64_t match_pair(const Activations& a, const Weights& b, int64_t k_ab, int64_t k_ba, float* ab, int64_t* ab_index, float* ba,
                   int64_t* ba_index, float* low, int64_t* low_index, EncodeStats* stats, int threads);

// For tests: the interval of every score, lo and hi [rows, features]; `bf16` takes the screen of spline codes. Rows that would take the
// exact path have lo = -inf, hi = inf. kUnsupported where this level cannot screen.
int64_t screen_bounds(const Activations& x, const Weights& w, const float* scale, const float* bias, bool bf16, float* lo, float* hi,
                      int threads);

}  // namespace fastsae
