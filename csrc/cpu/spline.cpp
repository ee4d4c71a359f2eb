// Spline codes of a layer: the signs of its scores, packed, without pre-activations: the driver. spline.isa.cpp has the screen.
#include "cpu/spline.h"

#include <memory>

#include "cpu/engine/candidates.h"

namespace fastsae {
namespace {

const SplineKernels* const kTables[kLevels] = FASTSAE_SCREEN_TABLES(spline_kernels);

const SplineKernels* spline_kernels() { return pick_if(kTables); }

struct SignDriver : Candidates {
  const SplineKernels* signs;
  uint32_t* words;  // of the first row
  int64_t ld;       // words of 32 bits a row

  void begin(const Chunk& chunk) { std::memset(words + chunk.base * ld, 0, static_cast<size_t>(chunk.rows * ld) * sizeof(uint32_t)); }
  void block(const Chunk& chunk, const Block& b, int worker) {
    uint32_t* const to = words + chunk.base * ld;
    screen(chunk, b, worker,
           [&](const Undecided& open) { signs->screen_signs(chunk.plan.format, b.rows, b.panels, b.next, open, to, ld); });
    score(chunk, b, worker);
    const Undecided& u = undecided[worker];
    for (int64_t r = 0; r < chunk.rows; ++r) {
      uint32_t* const row = to + r * ld;
      if (full[worker][r] != 0)  // a row whose screened bits mean nothing
        for (int64_t j = b.first / 32; j < ceil_div(b.first + b.count, 32); ++j) row[j] = 0;
      for (int64_t i = r * u.stride; i < r * u.stride + u.n[r]; ++i) {
        const int64_t id = u.id[i];
        row[id / 32] |= static_cast<uint32_t>(scored_as(b, id - b.first, u.hi[i]) > 0) << (id % 32);
      }
      u.n[r] = 0;
    }
  }
};

}  // namespace

int64_t spline_code(const Activations& x, const Weights& w, const float* bias, int64_t* words, EncodePath path, EncodeStats* stats,
                    int threads) {
  if (stats != nullptr) *stats = {};
  const int64_t n_words = ceil_div(w.features, 64);
  if (x.rows == 0 || n_words == 0) return kOk;
  const Problem p{.kernels = engine_kernels(), .x = x, .w = w, .bias = bias, .threads = threads, .stats = stats};
  const EncodeKernels* const screens = encode_kernels();
  const SplineKernels* const signs = spline_kernels();
  // bf16 leaves far fewer signs open than 8-bit integers, which serve where the level has nothing better and rows are not too long.
  const bool bf16 = p.kernels.pack_features[static_cast<int>(ScreenFormat::bf16)] != nullptr;
  const ScreenFormat format = w.d <= kLongestExact ? ScreenFormat::exact : bf16 ? ScreenFormat::bf16 : ScreenFormat::int8;
  if (path == EncodePath::automatic && format == ScreenFormat::int8 && w.d > p.kernels.longest_signs) path = EncodePath::dense;
  const Plan plan = make_plan(p, {.format = format, .path = path, .least_rows = 8, .least_features = 32});
  return run_by_rows(p, plan, [&](int64_t first) {
    uint32_t* const to = reinterpret_cast<uint32_t*>(words + first * n_words);
    return std::unique_ptr<SignDriver>(new SignDriver{{p, screens}, signs, to, 2 * n_words});
  });
}

}  // namespace fastsae
