// What the drivers (baseline: chunks, threads, exact selection) ask of pack.isa.cpp: rows in their working form, exact scores, and the
// packed forms that screening reads. The bound on a screened product is proven in bound.h.
#pragma once
#include <stdint.h>

#include "cpu/engine/bound.h"
#include "fastsae.h"
#include "isa.h"

namespace fastsae {

constexpr int64_t kScoreLanes = 16;
constexpr int64_t kDenseWidth = 64;  // features whose exact scores are computed before they are looked at
constexpr int kPanelWidth = 32;      // features of a screening panel
constexpr int kTileRows = 12;        // most rows of a screening tile

// ---- rows in their working form ----

// to[r, :] = fp32 of row list[r] (null: first + r), minus `subtract`, or divided by max(norm, eps) where eps > 0; zeros in [d, padded).
//   norm = sqrt(sum of squares in the order of a score), quotients are rounded once each.
struct LoadJob {
  const void* from;
  Dtype t;
  int64_t stride_row, stride_d, d;
  int64_t first, rows;
  const int32_t* list = nullptr;
  const float* subtract = nullptr;  // may be null
  float eps;                        // 0: no division
  float* to;
  int64_t padded, stride;  // stride >= padded, of `to`
};

// ---- exact scores ----

// Few rows against a strip of columns, without transposing: out[r*ld + f] = <x[r], column f>.
constexpr int64_t kColumnRows = 2, kColumnWidth = 2048;
struct ColumnsJob {
  const float* w;
  int64_t stride_d, d, features;
  const float* const* x;
  int rows;       // <= kColumnRows
  float* sums;    // [rows][16][ld]
  float* totals;  // the same; used beyond kScoreBlock elements
  float* out;
  int64_t ld;  // features rounded up to 16, or more
};

// ---- packed forms ----

// Elements are packed in words of 32 bits: four 8-bit integers, two bf16 numbers or one fp32, of neighbouring elements of a row.
struct PackRowsJob {  // rows of a tile, and the factors of their bounds
  const float* xc;    // [height, padded]
  int64_t padded, d;
  int height;
  int rotation;           // elements mixed by a rotation (int8); 1: none
  bool wide;              // int8: in 16 bits, two words for one of a feature
  const uint32_t* signs;  // [padded to the rotation] sign bits of the rotation
  uint32_t* words;        // [words of a row][height]
  float* unit;            // int8: value of one step, with the rotation's 1/n
  int32_t* start;         // int8: where the sum starts, because features are stored plus 128
  float* a;
  float* c;
  uint8_t* exact;  // set to 1: this row must take the exact path
  float* scratch;  // [padded to the rotation]
};

struct PackFeaturesJob {  // features to panels
  const void* w;          // row-major
  Dtype t;
  int64_t stride_f, d;
  int64_t first, features;  // feature j is row list[first + j] (null: first + j)
  const int32_t* list;
  int panels, rotation;
  const uint32_t* signs;
  uint32_t* data;  // [panels][words of a row][kPanelWidth]
  float* norm;     // [panels * kPanelWidth]
  float* loss;
  float* unit;
  uint32_t* scratch;  // int8: [16][words + 16] and [padded to the rotation] floats; bf16: [16][words + 16]
};

// A rotation that costs little padding. It depends on d alone: packed handles are read by calls that did not make them.
static inline int rotation_of(int64_t d) {
  for (int n = 256; n >= 16; n /= 4)
    if (round_to(d, n) <= d + d / 16) return n;
  return 1;
}
static inline int64_t words_of(ScreenFormat format, int64_t d, int rotation) {
  return format == ScreenFormat::exact ? d : format == ScreenFormat::bf16 ? ceil_div(d, 2) : ceil_div(round_to(d, rotation), 4);
}

// A packed handle: panels, then norm, loss and unit of every feature, in words of 32 bits.
static inline int64_t packed_features(int64_t features) { return round_to(features, kPanelWidth); }

// ---- what a screen reads ----

struct ScreenRows {  // tile t covers rows [rows*t/tiles, rows*(t+1)/tiles), its words start at that row * words
  const uint32_t* data;
  int64_t rows, words;  // twice those of a feature: in 16 bits
  int tiles;
  const float* unit;
  const int32_t* start;
  const float* a;
  const float* c;
};

struct ScreenPanels {  // per-feature arrays hold panels * kPanelWidth entries, in order
  const uint32_t* data = nullptr;
  int64_t words;
  int panels;
  int64_t first = 0, features;
  const float* norm = nullptr;  // these three with the sign of the scale
  const float* loss = nullptr;
  const float* floor = nullptr;
  const float* unit = nullptr;
  const float* scale;            // may be null
  const float* bias;             // zeros where there is none
  const float* extra = nullptr;  // a screen's own: a threshold, a second bias
};

struct Prefetch {  // memory to bring into the cache while computing: `segments` runs of `lines` cache lines
  const char* base = nullptr;
  int64_t segments = 0, lines = 1, stride = 0;
};

// Features of the block at hand that screening left undecided, a worker's own. Entry e of row r is at r*stride + e.
struct Undecided {
  float* lo;  // an interval that contains the score; after scoring, hi is the exact product
  float* hi;
  int32_t* id;
  int32_t* n;      // [rows]
  int64_t stride;  // at least a block of features and 16
};

struct ScoreJob {   // what the exact scores of a block need: rows, and the features in a row-major form
  const float* xc;  // [rows, padded]
  int64_t padded, d;
  const void* w;  // feature j of the block is row list[first + j] (null: first + j)
  Dtype t;
  int64_t stride_f, first = 0;
  const int32_t* list = nullptr;
};

struct EngineKernels {
  void (*load)(const LoadJob&);
  void (*columns)(const ColumnsJob&);
  // out[i*ld + j] = <x[i], w[j]>, i < rows, j < features
  void (*products)(const float* const* x, int64_t rows, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld);
  // The longest rows for which the automatic path screens with integers, a score and a sign: beyond, too many stay open. Measured. And
  // those of integers of 8 bits: longer ones have 16.
  int64_t longest_scores, longest_signs, longest_bytes;
  // Null where the level cannot screen with this number.
  void (*pack_rows[kScreenFormats])(const PackRowsJob&);
  void (*pack_features[kScreenFormats])(const PackFeaturesJob&);
};

FASTSAE_DECLARE_TABLES(EngineKernels, engine_kernels)

}  // namespace fastsae
