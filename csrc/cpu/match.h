// What match.cpp asks of match.isa.cpp (levels that can screen).
#pragma once
#include "cpu/encode.h"

namespace fastsae {

// Both directions of a match at once. A pair is open while it can be among the best of its row, the lowest of its row, or among the best of
// its column.
struct PairBuffer {
  TopkBuffer rows;     // best of a row
  int32_t* low_tau;    // [rows] bits: the largest negated score of a row is not below it
  float* column_lows;  // [k][columns]: the k largest lower ends seen in a column, descending
  float* column_tau;   // [columns]: its k-th largest score is not below it
  int64_t columns, k;  // columns: of the padded arrays
};

constexpr int64_t kMostColumnBest = 8;

struct MatchKernels {
  // As screen_topk, without terms; `absolute`: by magnitude.
  void (*screen_match)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const ScoreJob&, const TopkBuffer&);
  void (*screen_match_absolute)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const ScoreJob&, const TopkBuffer&);
  // Leaves the open pairs in rows.undecided.
  void (*screen_pair)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const PairBuffer&);
  void (*merge_scores)(const TopkBuffer&, const ScreenPanels&, int64_t row);  // exact products of a row's undecided to what workers share
  void (*raise_low)(int32_t* tau, float to);
};

FASTSAE_DECLARE_TABLES(MatchKernels, match_kernels)

}  // namespace fastsae
