// Cosine matching: the nearest rows of another dictionary, in one direction or both: the drivers. match.isa.cpp has the screens.
#include "cpu/match.h"

#include <vector>

#include "cpu/engine/candidates.h"
#include "cpu/engine/topk.h"

namespace fastsae {
namespace {

const MatchKernels* const kTables[kLevels] = FASTSAE_SCREEN_TABLES(match_kernels);

const MatchKernels* match_kernels() { return pick_if(kTables); }

struct Ranked {
  uint32_t key;  // of a score, ascending from the best
  int64_t row;
};

// The rows' side is TopkDriver's; columns are a worker's own within a chunk, and their rows come in ascending order.
struct PairDriver : Candidates {
  const MatchKernels& match;
  TopkDriver best;
  int64_t k_columns;
  float* similarity_columns;
  int64_t* index_columns;
  float* low;  // [rows] the lowest similarity of a row, and where
  int64_t* low_index;
  int64_t columns = p.w.features, padded_columns = packed_features(columns);
  std::vector<Ranked> ranked = std::vector<Ranked>(static_cast<size_t>(columns * k_columns));  // [columns][k_columns], ascending by key
  std::vector<int64_t> found = std::vector<int64_t>(static_cast<size_t>(columns));             // [columns]
  float* column_lows = nullptr;
  float* column_tau = nullptr;
  int32_t* low_tau = nullptr;
  uint64_t* lowest[kMostWorkers] = {};  // [rows] key of the negated score, and the feature
  PairBuffer buffers[kMostWorkers] = {};

  int64_t bytes(const Plan& plan) const {
    return Candidates::bytes(plan) + best.bytes(plan) + Workspace::size<float>(padded_columns * k_columns) +
           Workspace::size<float>(padded_columns) + Workspace::size<int32_t>(plan.chunk) +
           plan.threads * Workspace::size<uint64_t>(plan.chunk);
  }
  void take(Workspace& space, const Plan& plan) {
    Candidates::take(space, plan);
    best.take(space, plan);
    column_lows = space.take<float>(padded_columns * k_columns);
    column_tau = space.take<float>(padded_columns);
    low_tau = space.take<int32_t>(plan.chunk);
    std::fill(column_lows, column_lows + padded_columns * k_columns, -INFINITY);
    std::fill(column_tau, column_tau + padded_columns, -INFINITY);
    for (int t = 0; t < plan.threads; ++t) lowest[t] = space.take<uint64_t>(plan.chunk);
  }
  void begin(const Chunk& chunk) {
    best.begin(chunk);
    std::fill_n(low_tau, chunk.rows, std::bit_cast<int32_t>(-INFINITY));
    for (int t = 0; t < chunk.plan.threads; ++t) {
      std::fill(lowest[t], lowest[t] + chunk.rows, ~uint64_t{0});
      buffers[t] = {best.buffers[t], low_tau, column_lows, column_tau, padded_columns, k_columns};
      buffers[t].rows.undecided = undecided[t];
    }
  }
  void block(const Chunk& chunk, const Block& b, int worker) {
    const PairBuffer& buffer = buffers[worker];
    screen(chunk, b, worker, [&](const Undecided&) { match.screen_pair(b.rows, b.panels, b.next, buffer); });
    score(chunk, b, worker);
    const Undecided& u = undecided[worker];
    for (int64_t r = 0; r < chunk.rows; ++r) {
      const int64_t n = u.n[r];
      if (n == 0) continue;
      for (int64_t i = r * u.stride; i < r * u.stride + n; ++i) {
        const float similarity = u.hi[i];
        lowest[worker][r] = std::min(lowest[worker][r], entry(-similarity, u.id[i]));
        insert(u.id[i], similarity, chunk.base + r);
      }
      const float least = score_of(static_cast<uint32_t>(lowest[worker][r] >> 32));
      match.raise_low(low_tau + r, least != least ? INFINITY : least);
      if (chunk.exact[r] == 0)
        match.merge_scores(buffer.rows, b.panels, r);
      else
        u.n[r] = 0;
    }
  }
  void insert(int64_t column, float similarity, int64_t row) {
    Ranked* const list = ranked.data() + column * k_columns;
    int64_t& n = found[column];
    const uint32_t key = key_of(similarity);
    if (n == k_columns && key >= list[n - 1].key) return;
    int64_t at = n < k_columns ? n++ : n - 1;
    for (; at > 0 && list[at - 1].key > key; --at) list[at] = list[at - 1];
    list[at] = {key, row};
    if (n < k_columns) return;
    const float kth = score_of(list[n - 1].key);
    column_tau[column] = kth != kth ? INFINITY : std::max(column_tau[column], kth);
  }
  int64_t end(const Chunk& chunk) {
    for (int64_t r = 0; r < chunk.rows; ++r) {
      uint64_t least = ~uint64_t{0};
      for (int t = 0; t < chunk.plan.threads; ++t) least = std::min(least, lowest[t][r]);
      low[chunk.base + r] = -score_of(static_cast<uint32_t>(least >> 32));
      low_index[chunk.base + r] = static_cast<int64_t>(least & 0xffffffffu);
    }
    Candidates::end(chunk);
    return best.end(chunk);
  }
  void finish() const {
    for (int64_t c = 0; c < columns; ++c)
      for (int64_t i = 0; i < k_columns; ++i) {
        similarity_columns[c * k_columns + i] = score_of(ranked[c * k_columns + i].key);
        index_columns[c * k_columns + i] = ranked[c * k_columns + i].row;
      }
  }
};

}  // namespace

int64_t match_cosine(const Activations& a, const Weights& b, int64_t k, bool absolute, bool exclude_self, float* similarity, int64_t* index,
                     EncodePath path, EncodeStats* stats, int threads) {
  if (stats != nullptr) *stats = {};
  if (a.rows == 0 || k == 0) return kOk;
  const MatchKernels* const match = match_kernels();
  const Problem p{
      .kernels = engine_kernels(), .x = a, .w = b, .threads = threads, .stats = stats, .absolute = absolute, .exclude_self = exclude_self};
  const TopkOutput out{.k = k, .relu = false, .values = similarity, .indices = index, .absolute = absolute};
  const Plan plan =
      make_plan(p, {.path = path, .least_rows = 16, .least_d = 16, .least_features = 32 * k, .bytes_a_row = topk_bytes_a_row(k)});
  if (!plan.screens) return dense_topk_all(p, out);
  TopkDriver driver{*encode_kernels(), absolute ? match->screen_match_absolute : match->screen_match, p, out};
  return run_engine(p, plan, driver);
}

int64_t match_pair(const Activations& a, const Weights& b, int64_t k_ab, int64_t k_ba, float* ab, int64_t* ab_index, float* ba,
                   int64_t* ba_index, float* low, int64_t* low_index, EncodeStats* stats, int threads) {
  if (stats != nullptr) *stats = {};
  const Problem p{.kernels = engine_kernels(), .x = a, .w = b, .threads = threads, .stats = stats};
  const Plan plan = make_plan(p, {.bytes_a_row = topk_bytes_a_row(k_ab)});
  if (!plan.screens || k_ba > kMostColumnBest) return kUnsupported;
  const TopkOutput out{.k = k_ab, .relu = false, .values = ab, .indices = ab_index};
  const EncodeKernels& screens = *encode_kernels();
  PairDriver driver{{p, &screens}, *match_kernels(), {screens, nullptr, p, out}, k_ba, ba, ba_index, low, low_index};
  const int64_t status = run_engine(p, plan, driver);
  if (status == kOk) driver.finish();
  return status;
}

}  // namespace fastsae
