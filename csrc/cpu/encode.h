// What encode.cpp (baseline: which thread does what, exact selection) asks of encode.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

namespace fastsae {

constexpr int64_t kScoreLanes = 16;
constexpr int64_t kScoreBlock = 4096;  // elements of a score summed before they join the total
constexpr int64_t kDenseWidth = 64;    // features whose exact scores are computed before they are looked at
constexpr int kPanelWidth = 32;        // features of a screening panel
constexpr int kTileRows = 12;          // most rows of a screening tile
constexpr int64_t kScreenBlock = 512;  // elements of a screening sum before they join the total

// ---- exact scores, every level ----

struct CentreJob {
  const float* x;
  int64_t stride_row, stride_d, d;
  const float* b_pre;  // may be null
  float* to;           // [rows, padded], zeros beyond d
  int64_t padded;
};

// to[f, :] = column f of w; zeros in [d, padded)
struct TransposeJob {
  const float* w;
  int64_t stride_d, d, features;
  float* to;
  int64_t padded, stride;  // stride >= padded, of `to`
};

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

// ---- screening, where the instruction set has bf16 dot products; the bound is proven in engine.h ----

struct RowsJob {    // rows of a tile to pairs of bf16, their factors of the bound
  const float* xc;  // [height, padded]
  int64_t padded, d;
  int height;
  uint32_t* pairs;  // [d2][height]
  float* a;
  float* c;
  uint8_t* exact;  // set to 1: this row must take the exact path
};

struct PanelsJob {  // weight rows to panels
  const float* w;   // the block's first feature
  int64_t stride_f, d;
  int64_t features;  // of the block that exist
  int panels;
  uint32_t* data;  // [panels][d2][kPanelWidth]
  float* norm;     // [panels * kPanelWidth]
  float* loss;
  uint32_t* scratch;  // [16][padded pairs]
};

struct ScreenRows {  // tile t covers rows [rows*t/tiles, rows*(t+1)/tiles), its pairs start at that row * d2
  const uint32_t* pairs;
  int64_t rows, d2;
  int tiles;
  const float* a;
  const float* c;
};

struct ScreenPanels {  // per-feature arrays hold panels * kPanelWidth entries, in order
  const uint32_t* data;
  int panels;
  int64_t first, features;
  const float* norm;  // these three with the sign of the scale
  const float* loss;
  const float* floor;
  const float* scale;  // may be null
  const float* bias;   // zeros where there is none
};

struct Ahead {  // memory to bring into the cache while computing: `segments` runs of `lines` cache lines
  const char* base;
  int64_t segments, lines, stride;
};

// What a top-k keeps. Entry e of row r is at r*stride + e. `tau` of a row never exceeds its k-th largest score, and only rises; when it
// rises first depends on the threads, what is selected in the end does not.
struct TopkBuffer {
  // The worker's own: features of the block at hand that screening left undecided, an interval that contains the score of each.
  float* lo;
  float* hi;
  int32_t* id;
  int32_t* n;       // [rows]
  int64_t stride;   // at least a block of features and 16
  float* room;      // [kept_stride + stride]
  int64_t* scored;  // counts scores
  // Shared by all workers: scores not below tau, and their features.
  float* score;
  int32_t* feature;
  int32_t* kept;   // [rows] entries
  int32_t* fresh;  // [rows] entries since tau was last raised
  uint8_t* lock;   // [rows] guards the four above
  int64_t kept_stride, capacity, k;
  int32_t* tau;    // [rows] bits of a float
  uint8_t* exact;  // [rows] set: more undecided than a buffer is for; this row takes the exact path
};

struct ScoreJob {   // what the exact scores of a block need
  const float* xc;  // [rows, padded]
  int64_t padded;
  const float* w;  // the block's first feature; rows of d elements
  int64_t stride_f, d;
};

struct EncodeKernels {
  void (*centre)(const CentreJob&, int64_t rows);
  void (*transpose)(const TransposeJob&);
  void (*columns)(const ColumnsJob&);
  // out[i*ld + j] = <x[i], w[j]>, i < rows, j < features
  void (*products)(const float* const* x, int64_t rows, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld);

  void (*rows)(const RowsJob&);
  void (*panels)(const PanelsJob&);
  void (*screen_topk)(const ScreenRows&, const ScreenPanels&, const Ahead&, const ScoreJob&, const TopkBuffer&);
  // Drops the kept entries of a row that cannot be in its top k; how many are left.
  int64_t (*finish_topk)(const TopkBuffer&, int64_t row);
};

namespace portable {
extern const EncodeKernels encode_kernels;
}
namespace avx2 {
extern const EncodeKernels encode_kernels;
}
namespace avx512 {
extern const EncodeKernels encode_kernels;
}
namespace avx512_bf16 {
extern const EncodeKernels encode_kernels;
}

}  // namespace fastsae
