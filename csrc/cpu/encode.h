// What encode.cpp (baseline: which thread does what, exact selection) asks of encode.isa.cpp (one body per instruction set).
#pragma once
#include <stdint.h>

namespace fastsae {

constexpr int64_t kScoreLanes = 16;
constexpr int64_t kScoreBlock = 4096;   // elements of a score summed before they join the total
constexpr int64_t kDenseWidth = 64;     // features whose exact scores are computed before they are looked at
constexpr int kPanelWidth = 32;         // features of a screening panel
constexpr int kTileRows = 12;           // most rows of a screening tile
constexpr int64_t kScreenBlock = 512;   // elements of a screening sum before they join the total

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

// ---- screening, where the instruction set has bf16 dot products; the bound is proven in engine.h ----

struct RowsJob {           // rows of a tile to pairs of bf16, their factors of the bound
  const float* xc;         // [height, padded]
  int64_t padded, d;
  int height;
  uint32_t* pairs;         // [d2][height]
  float* a;
  float* c;
  uint8_t* exact;          // set to 1: this row must take the exact path
};

struct PanelsJob {         // weight rows to panels
  const float* w;          // the block's first feature
  int64_t stride_f, d;
  int64_t features;        // of the block that exist
  int panels;
  uint32_t* data;          // [panels][d2][kPanelWidth]
  float* norm;             // [panels * kPanelWidth]
  float* loss;
  uint32_t* scratch;       // [16][padded pairs]
};

struct ScreenRows {        // tile t covers rows [rows*t/tiles, rows*(t+1)/tiles), its pairs start at that row * d2
  const uint32_t* pairs;
  int64_t rows, d2;
  int tiles;
  const float* a;
  const float* c;
};

struct ScreenPanels {      // per-feature arrays hold panels * kPanelWidth entries, in order
  const uint32_t* data;
  int panels;
  int64_t first, features;
  const float* norm;       // these three with the sign of the scale
  const float* loss;
  const float* floor;
  const float* scale;      // may be null
  const float* bias;       // zeros where there is none
};

struct Ahead {             // memory to bring into the cache while computing: `segments` runs of `lines` cache lines
  const char* base;
  int64_t segments, lines, stride;
};

constexpr uint32_t kScored = 0x80000000u;  // set in the id of an entry whose score is known: hi holds it, lo too unless it is NaN

struct TopkBuffer {        // of one worker; entry e of row r is at r*stride + e: a feature, and an interval that contains its score
  float* lo;
  float* hi;
  int32_t* id;
  int32_t* n;              // [rows]
  int32_t* seen;           // [rows] n when all entries were last scored, or -1
  int32_t* fresh;          // [rows] entries scored since tau was last raised by this worker
  int64_t* scored;
  int64_t stride, capacity, k;
  int32_t* tau;            // [rows] bits of a float, shared by all workers
  uint8_t* exact;          // [rows] shared
};

struct ScoreJob {          // what the exact scores of a block need
  const float* xc;         // [rows, padded]
  int64_t padded;
  const float* w;          // the block's first feature; rows of d elements
  int64_t stride_f, d;
};

struct EncodeKernels {
  void (*centre)(const CentreJob&, int64_t rows);
  void (*transpose)(const TransposeJob&);
  // out[i*ld + j] = <x[i], w[j]>, i < rows, j < features
  void (*products)(const float* const* x, int64_t rows, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld);

  void (*rows)(const RowsJob&);
  void (*panels)(const PanelsJob&);
  void (*screen_topk)(const ScreenRows&, const ScreenPanels&, const Ahead&, const ScoreJob&, const TopkBuffer&);
  // Entries of all workers' buffers that may be in row r's top k, moved to the first buffer; their number, or -1 if they do not fit.
  int64_t (*finish_topk)(const TopkBuffer* buffers, int workers, int64_t row, float* scratch);
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
