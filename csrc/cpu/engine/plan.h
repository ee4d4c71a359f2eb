// How a call of the tile engine is run: dense, screened or row by row, in chunks of rows and blocks of features. Baseline code.
#pragma once
#include <algorithm>

#include "cpu/engine/kernels.h"
#include "workspace.h"

namespace fastsae {

static constexpr int64_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

constexpr int64_t kChunkRows = 1024;
constexpr int64_t kLeastChunk = 64;
constexpr int64_t kBufferBytes = int64_t{64} << 20;
constexpr int64_t kPackedBytes = int64_t{256} << 10;   // packed panels at work, a thread
constexpr int64_t kRawBytes = int64_t{704} << 10;      // they and the features they are made of, where they are made in the call
constexpr int64_t kColumnBytes = int64_t{2560} << 10;  // the same for a strided W: each of its rows costs a page walk a block
constexpr int kMostPanels = 8;
constexpr int kMostWorkers = 256;
constexpr int64_t kRowwiseBytes = int64_t{6} << 20, kSmallBytes = int64_t{1} << 20;  // of packed features
constexpr int64_t kFewRows = 48, kManyRows = 512;
constexpr int64_t kChunkHighBytes = int64_t{8} << 20;  // of the upper ends of a chunk's rows

const EngineKernels& engine_kernels();

// What is computed. Terms of a score are in the order of the dictionary, null where there is none.
struct Problem {
  const EngineKernels& kernels;
  Activations x;
  Weights w;
  const float* scale = nullptr;
  const float* bias = nullptr;
  const float* extra = nullptr;  // of a screen: a threshold, a second bias
  int threads = 1;
  EncodeStats* stats = nullptr;
  bool absolute = false;      // ranked by magnitude; entries then number 2 * feature + (1 where the score is negative)
  bool exclude_self = false;  // feature i does not count for row i
};

inline void note_workspace(EncodeStats* stats, int64_t bytes) {
  if (stats != nullptr) stats->workspace = std::max(stats->workspace, bytes);
}

// What an operation asks of its plan.
struct PlanRequest {
  ScreenFormat format = ScreenFormat::int8;
  EncodePath path = EncodePath::screen;
  int64_t least_rows = 0, least_d = 0, least_features = 0;  // from here on the automatic path screens; measured
  int64_t rowwise_k = 0;                                    // of a top-k that may go row by row; 0: none
  int64_t bytes_a_row = 0;                                  // of the driver's buffers
};

struct Plan {
  ScreenFormat format;
  bool copied;  // features are brought to fp32 rows block by block
  int rotation;
  bool wide;  // rows in 16 bits
  int64_t words, words_most, padded, row_stride;
  EncodePath path = EncodePath::dense;  // not automatic
  bool screens = false;                 // path is not dense
  int panels = 0;
  int64_t block = 0, blocks = 0, chunk = 0;
  int threads = 1;
  const uint32_t* packed = nullptr;  // all features, in this format and rotation; null: each block is packed where it is used

  int64_t row_words(int64_t of) const { return wide ? 2 * of : of; }
};

// Whether features can be read in place, a row after another.
inline bool by_rows(const Weights& w) { return w.stride_d == 1 || w.d <= 1; }
inline bool has_handle(const Weights& w) { return w.packed != nullptr && w.list == nullptr; }
inline int64_t padded_to(int64_t d) { return round_to(std::max<int64_t>(d, 1), 32); }

// The path of a plan whose blocks are those of a screen. Measured:
//   screen   from the request's sizes on: with fewer rows, packing costs more than it saves; a handle or a W whose columns have to be
//            transposed anyway is cheaper to pack.
//   blocks   all features are screened before the first score, which then comes from further away than where a block is screened and scored
//            at once: worth it until the dictionary is larger than a cache, or for few rows of a handle.
//   rows     the same with all features packed before the first row rather than each block where it is used: while they are few, or there
//            is a handle, or rows enough to pay for it.
inline EncodePath choose_path(const Problem& p, const PlanRequest& request, const Plan& plan) {
  const Activations& x = p.x;
  const Weights& w = p.w;
  const int64_t k = request.rowwise_k;
  if (p.kernels.pack_features[static_cast<int>(request.format)] == nullptr || !can_screen(request.format, w.d)) return EncodePath::dense;
  if (request.path == EncodePath::rows || request.path == EncodePath::blocks)
    return k == 0 ? EncodePath::dense : plan.copied ? EncodePath::screen : request.path;
  if (request.path != EncodePath::automatic) return request.path;
  if (request.format == ScreenFormat::int8 && w.d > p.kernels.longest_scores) return EncodePath::dense;
  const int64_t bytes = packed_features(w.features) * w.d;
  if (k > 0 && !plan.copied && w.d >= 32 && w.features >= std::max<int64_t>(2 * k, 128) && x.rows >= (has_handle(w) ? 1 : 12) &&
      (bytes <= kRowwiseBytes || (has_handle(w) && x.rows <= kFewRows && x.rows * w.features * 4 <= kChunkHighBytes))) {
    const int64_t packed_bytes = plan.blocks * plan.block * plan.words * 4;
    const bool enough = x.rows >= 4 * plan.threads;  // rows, not features, to divide among threads
    const bool paid = packed_bytes <= kSmallBytes || (packed_bytes <= kRowwiseBytes && (plan.packed != nullptr || x.rows >= kManyRows));
    return enough && paid ? EncodePath::rows : EncodePath::blocks;
  }
  const bool large = x.rows >= request.least_rows && w.d >= request.least_d && w.features >= request.least_features;
  return large ? EncodePath::screen : EncodePath::dense;
}

inline Plan make_plan(const Problem& p, const PlanRequest& request) {
  const Weights& w = p.w;
  const ScreenFormat format = request.format;
  const int rotation = format == ScreenFormat::int8 ? rotation_of(w.d) : 1;
  const int64_t words = words_of(format, w.d, rotation), padded = padded_to(w.d);
  Plan plan{.format = format,
            .copied = !by_rows(w) || w.eps != 0,
            .rotation = rotation,
            .wide = format == ScreenFormat::int8 && w.d > p.kernels.longest_bytes,
            .words = words,
            .words_most = words,
            .padded = padded,
            .row_stride = padded + 16};  // not a power of two
  const auto set_block = [&](int64_t panels) {
    plan.panels = static_cast<int>(panels);
    plan.block = panels * kPanelWidth;
    plan.blocks = ceil_div(w.features, plan.block);
    plan.threads = static_cast<int>(std::min<int64_t>({p.threads, std::max<int64_t>(plan.blocks, 1), kMostWorkers}));
  };
  const int64_t panel_bytes = std::max<int64_t>(words, 1) * kPanelWidth * 4, raw = kPanelWidth * round_to(std::max<int64_t>(w.d, 1), 16);
  if (format == ScreenFormat::int8 && has_handle(w) && !plan.copied) plan.packed = w.packed;
  const int64_t fit = plan.packed != nullptr ? kPackedBytes / panel_bytes
                      : plan.copied          ? kColumnBytes / (panel_bytes + raw * 4)
                                             : kRawBytes / (panel_bytes + raw * size_of(w.t));
  set_block(std::clamp<int64_t>(fit, 1, kMostPanels));
  plan.path = choose_path(p, request, plan);
  plan.screens = plan.path != EncodePath::dense;
  if (!plan.screens) {
    plan.packed = nullptr;
    set_block(kMostPanels);
  }
  const int64_t rows = kBufferBytes / std::max<int64_t>(request.bytes_a_row + 12 * (plan.block + 16) * plan.threads, 1);
  plan.chunk = std::min(p.x.rows, std::clamp(rows, kLeastChunk, kChunkRows));
  if (plan.path == EncodePath::blocks)
    plan.chunk = std::min(plan.chunk, std::max<int64_t>(kChunkHighBytes / (4 * packed_features(w.features)), kTileRows));
  return plan;
}

}  // namespace fastsae
