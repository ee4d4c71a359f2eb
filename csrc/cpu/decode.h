// What decode.cpp (baseline: checks, sorting, threads) asks of decode.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

#include "isa.h"

namespace fastsae {

constexpr int64_t kSlotBlock = 16;  // slots summed before they join the total
constexpr int64_t kDotBlock = 256;  // elements of a dot product summed before they join the total
constexpr int64_t kPanel = 64;      // columns of a strided W that are packed at a time
constexpr int64_t kPrefetch = 6;    // slots ahead

// Rows [r0, r1) x columns [d0, d1) of: out[r, :] = bias + sum_s values[s] * table[indices[s], :]
struct SumJob {
  const void* values;
  const void* indices;
  const int64_t* crow;  // null: k slots a row
  int64_t k, n;
  const void* table;
  int64_t table_stride;
  const float* bias;  // may be null
  void* out;
  int64_t out_stride;
  bool stream;  // out is larger than the caches: write past them
};

// Slots [s0, s1) of row r: out[s] = <grad[r, :], table[indices[s], :]>
struct DotJob {
  const void* grad;
  const void* indices;
  const void* table;
  int64_t table_stride, d, n;
  void* out;
};

// One panel of the same: block[s] += <grad[r, :width], panel[indices[s], :width]>
struct PanelDotJob {
  const void* grad;
  int64_t grad_stride, width;
  const int32_t* indices;
  const void* panel;  // [*, kPanel]
  float* block;
};

// panel[u, j] = w[feature(u)*stride_f + (d0 + j)*stride_d] for u in [u0, u1), j < width; feature(u) = used ? used[u] : u
struct PackJob {
  const void* w;
  int64_t stride_f, stride_d, d0, width;
  const int64_t* used;
  void* panel;
};

constexpr int64_t kScatterRows = 256;  // written in one run

// to[i*stride_i + j*stride_j] = tile[i*ld + j], i < rows, j < columns
struct ScatterJob {
  const void* tile;
  int64_t ld, rows, columns;
  void* to;
  int64_t stride_i, stride_j;
  bool stream;
};

struct DecodeKernels {  // [Dtype], [Dtype][Index]
  void (*sum[3][2])(const SumJob&, int64_t r0, int64_t r1, int64_t d0, int64_t d1);
  void (*dot[3][2])(const DotJob&, int64_t r, int64_t s0, int64_t s1);
  void (*panel_dot[3])(const PanelDotJob&, int64_t r, int64_t s0, int64_t s1);
  void (*pack[3])(const PackJob&, int64_t u0, int64_t u1);
  void (*scatter[3])(const ScatterJob&);
  void (*round[3])(const float* block, const float* total, void* out, int64_t n);  // out = round(total + block)
};

FASTSAE_DECLARE_TABLES(DecodeKernels, decode_kernels)

}  // namespace fastsae
