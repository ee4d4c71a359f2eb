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
// Every row of out is written, zeros where a feature has no slot; with zero_untouched = false those rows keep what they hold (for a
// caller that reuses `out` and knows which rows it dirtied). values [n], grad [rows, d] contiguous and out have type `t`; out has
// any strides. Workspace: 16 * features + n * (4 + sizeof(t)) bytes.
int64_t decode_dweight(const Slots& slots, Dtype t, const void* values, const void* grad, const Matrix& out, bool zero_untouched,
                       int threads);

// encode_topk: the k largest scores of each row, descending; equal scores (-0 == +0): lower feature first; NaN above +inf.
//
//   xc = fl(x[r, :] - b_pre)                    fp32; without b_pre, x itself
//   total = 0                                   16 lanes; lane l sums the d with d mod 16 = l
//   for block in d, 4096 elements at a time:
//     part = 0
//     for i in block, 16 elements at a time, in order: part = fma(xc[i..], W[f, i..], part)       missing elements are 0
//     total = total + part                      (the first block is taken as it is)
//   score = fl(fl(fold(total) * scale[f]) + bias[f])    lanes fold 8, 4, 2, 1; without scale or bias that step is left out
//
// values [rows, k] and indices [rows, k] are contiguous; `relu` clamps values at 0 after the selection (NaN stays). A NaN is returned as
// the quiet NaN, -0 as +0. x has any strides; W has stride 1 along d or along the features. Null: b_pre [d], scale and bias [features].
//
// Two ways to the same bits. dense: every score is computed. screen (levels with bf16 dot products): bf16 products with a proven error
// bound (cpu/engine.h) choose which features can be among the k; only those are scored. Rows for which that decides too little (flat,
// tied, zero, not finite) are scored densely. automatic: screen where it was measured to be faster.
//
// Workspace, whatever rows and features are, for chunks of C <= 1024 rows and T threads. d counts rounded up to 32.
//   screen: C * (6 d + 8 * (4k + 272) + 40), and for each thread C * 12 * (block + 16) + 2 d * block + 40 d + 20 * block + 64 k bytes,
//           with a strided W 4 d * block more. block = 32 to 256 features: packed ones fill 256 KiB (3 MiB with a strided W and its copy),
//           or there are 32. C shrinks, down to 64, to keep all buffers of entries within 64 MiB.
//   dense:  4 d a row of the chunk; T * 8 * min(2k + 64, features) a row, within 64 MiB (or for one row); with a strided W 256 d a thread.
enum class EncodePath : int { automatic = 0, dense = 1, screen = 2 };
struct EncodeStats {      // for tests and benches
  int64_t screened_rows;  // rows whose result came from screening
  int64_t exact_rows;     // rows that were screened in vain, and scored densely
  int64_t scored;         // scores computed for screened rows
  int64_t survivors;      // of these, how many were still among the candidates at the end
  int64_t workspace;      // bytes, the largest at a time
};
int64_t encode_topk(const float* x, int64_t rows, int64_t stride_row, int64_t stride_d, const Matrix& w, int64_t features,
                    const float* bias, const float* b_pre, const float* scale, int64_t k, bool relu, float* values, int64_t* indices,
                    EncodePath path, int threads, EncodeStats* stats,
                    uint8_t* survived);  // the last two may be null; survived [rows, features] is or-ed

// adam: one step of Adam on w [features, d], with its moments m and v, all contiguous. For every feature f, in fp32:
//
//   g = grad[f, :]                                without slots: grad is [features, d]
//     = what decode_dweight writes into row f     with slots: grad is [slots->rows, d], values [n]; same order, same bits
//   g = fma(-<g, w>, w, g)                        with `project`; the product is summed as decode_dvalues does (stride_d = 1)
//   g = g * factor                                factor is read from memory: whoever computes it need not wait; null: 1
//   w = w * fl(1 - lr * weight_decay)
//   m = m + (1 - beta1) * (g - m)                 one fma; from the side of g, g - beta1 * (g - m), where beta1 <= 0.5
//   v = fma(fl((1 - beta2) * g), g, fl(beta2 * v))
//   w = fma(m, -s / (fl(sqrt v) + e), w)          r = sqrt(1 - beta2^step), s = fl(lr * r / (1 - beta1^step)), e = fl(eps * r)
//   w = w * fl(1 / |w|)                           with `normalise`, unless |w| < 1e-8; |w|^2 is summed as <g, w> is
//
// A feature without slots has g = 0 * factor and is not projected; its moments decay and it moves, as in every dense Adam. Each element
// of w, m and v is read and written once. Workspace with slots: that of decode_dweight, and a thread the larger of 96 KiB and one row.
struct AdamOptions {
  double lr, beta1, beta2, eps, weight_decay;
  int64_t step;  // 1 at the first step
  bool project, normalise;
};
int64_t adam(const Slots* slots, const float* values, const float* grad, const float* factor, float* w, float* m, float* v,
             int64_t features, int64_t d, const AdamOptions& options, int threads);

// grad_squares: total = the sum of g^2 over all features, with g as in adam up to its factor, for clipping by the global norm. A row is
// summed as <g, w> is; rows are added in order, in fp64. w may be null without `project`. Workspace: that of adam, and 4 * features bytes.
int64_t grad_squares(const Slots* slots, const float* values, const float* grad, const float* w, int64_t features, int64_t d, bool project,
                     float* total, int threads);

}  // namespace fastsae
