// What encode.cpp (baseline: which thread does what, exact selection) asks of encode.isa.cpp (levels that can screen).
#pragma once
#include "cpu/engine/kernels.h"

namespace fastsae {

// What a top-k keeps. Entry e of row r is at r*kept_stride + e. `tau` of a row never exceeds its k-th largest score, and only rises; when
// it rises first depends on the threads, what is selected in the end does not.
struct TopkBuffer {
  Undecided undecided;  // the worker's own, as the next four
  float* room;          // [kept_stride + undecided.stride]
  int64_t* scored;      // counts scores
  int64_t* seen;        // features of the chunk so far
  int32_t* spent;       // [rows] scores of the chunk so far
  // Shared by all workers: scores not below tau, and their features.
  float* score;
  int32_t* feature;
  int32_t* kept;   // [rows] entries
  int32_t* fresh;  // [rows] entries since tau was last raised
  uint8_t* lock;   // [rows] guards the four above
  int64_t kept_stride, capacity, k;
  int32_t* tau;    // [rows] bits of a float
  uint8_t* exact;  // [rows] set: more undecided than a buffer is for; this row takes the exact path
  int64_t self;    // match: feature self + r does not count for row r
};

// A top-k for which every interval of a row is known before its first score: tau comes from all features, and nothing is shared.
struct RowwiseTopk {
  float* high;  // [rows][stride] upper ends
  int64_t stride;
  float* low;  // [rows][lows] of `panels` panels together, the largest lower end in each of 16 lanes
  int64_t lows, panels, k;
  // Of one row at a time, [features + 32] each: what may be among the best, and what is looked at when some of it has been scored.
  Undecided open{}, later{};
  int64_t* scored = nullptr;  // counts scores
  bool absolute = false;      // by magnitude: ends are of it, and a scored feature is numbered 2 * feature + sign
};

// What an entry must be able to exceed: the threshold of its feature (strictly), one for all, or 0 twice (score, and product + extra).
enum class ThresholdKind : int { per_feature, shared, gate };

struct EncodeKernels {
  void (*screen_topk)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const ScoreJob&, const TopkBuffer&);
  void (*screen_topk_absolute)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const ScoreJob&, const TopkBuffer&);  // by magnitude
  // Drops the kept entries of a row that cannot be in its top k; how many are left.
  int64_t (*finish_topk)(const TopkBuffer&, int64_t row);
  // `tau`: bits of the one for ThresholdKind::shared.
  void (*screen_threshold)(ThresholdKind, const ScreenRows&, const ScreenPanels&, const Prefetch&, const Undecided&, const int32_t* tau);
  void (*keep_undecided)(const Undecided&, int64_t row, float tau);                               // those whose hi is not below tau
  void (*score_undecided)(const ScoreJob&, const Undecided&, int64_t rows, const uint8_t* skip);  // hi = the exact product
  float (*kth_largest)(const float* values, int64_t n, int64_t k, int64_t most);  // at least k values are not below it; see topk.isa.h
  // The interval of every score of a block: rows of lo and hi are ld apart, features at their place.
  void (*bounds)(ScreenFormat, const ScreenRows&, const ScreenPanels&, float* lo, float* hi, int64_t ld);
  void (*screen_rowwise)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const RowwiseTopk&);
  // The scores of all features that can be among the k best of a row, to open.hi and open.id: their number; -1: too many to be worth it.
  int64_t (*rescore_row)(const ScreenPanels&, const ScoreJob&, const RowwiseTopk&, int64_t row);
  // The k best of n entries (order.h) in order to `best`; `all` has room for n + 8.
  void (*rank_scores)(const float* scores, const int32_t* features, int64_t n, int64_t k, uint64_t* all, uint64_t* best);
  // Of segments between two rows with upper ends p and q; see encode.isa.cpp. `ids` has room for 16 more.
  void (*largest_along)(const float* p, const float* q, int64_t features, int64_t each, float t, float* lows);
  int64_t (*reaching_along)(const float* p, const float* q, int64_t features, const float* t, const float* floor, int points, int32_t* ids);
};

FASTSAE_DECLARE_TABLES(EncodeKernels, encode_kernels)

}  // namespace fastsae
