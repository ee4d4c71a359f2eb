// Spline codes of a layer: the signs of its scores, packed, without pre-activations. The driver is engine/driver.h, the screen
// spline.isa.cpp.
#include "cpu/spline.h"

#include <memory>

#include "cpu/engine/candidates.h"

namespace fastsae {
namespace {

constexpr int64_t kLongestInt8Signs = 512;  // beyond, too many signs stay open: computing all is as fast

const SplineKernels* const kTables[kLevels] = {nullptr, nullptr, nullptr, FASTSAE_AVX512_VNNI(spline_kernels),
                                               FASTSAE_AVX512_BF16(spline_kernels)};

const SplineKernels* spline_kernels() { return pick_if(kTables); }

struct SignDriver : Candidates {
  const SplineKernels* signs;
  uint32_t* words;  // of the first row
  int64_t ld;       // words of 32 bits a row

  SignDriver(const EngineKernels& kernels, const EncodeKernels* screens, EncodeStats* stats, const SplineKernels* signs, uint32_t* words,
             int64_t ld)
      : Candidates{kernels, screens, stats, {}, {}}, signs(signs), words(words), ld(ld) {}

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
  int64_t end(const Chunk&) {
    note();
    return kOk;
  }
};

}  // namespace

int64_t spline_code(const Activations& x, const Weights& w, const float* bias, int64_t* words, EncodePath path, int threads,
                    EncodeStats* stats) {
  if (stats != nullptr) *stats = {};
  const int64_t n_words = ceil_div(w.features, 64);
  if (x.rows == 0 || n_words == 0) return kOk;
  const EngineKernels& kernels = engine_kernels();
  const EncodeKernels* const screens = encode_kernels();
  const SplineKernels* const signs = spline_kernels();
  // bf16 leaves far fewer signs open than 8-bit integers, which serve where the level has nothing better and rows are not too long.
  const bool bf16 = kernels.pack_features[static_cast<int>(ScreenFormat::bf16)] != nullptr;
  const ScreenFormat format = w.d <= kShortRow ? ScreenFormat::exact : bf16 ? ScreenFormat::bf16 : ScreenFormat::int8;
  const bool worth_screening = x.rows >= 8 && w.features >= 32 && (format != ScreenFormat::int8 || w.d <= kLongestInt8Signs);
  const bool screen = signs != nullptr && (path == EncodePath::screen || (path == EncodePath::automatic && worth_screening));
  const Plan plan = make_plan(kernels, x, w, format, screen, threads, 0);
  return run_by_rows(kernels, x, w, {nullptr, bias, nullptr}, plan, threads, stats != nullptr ? &stats->workspace : nullptr,
                     [&](int64_t first) {
                       return std::make_unique<SignDriver>(kernels, screens, stats, signs,
                                                           reinterpret_cast<uint32_t*>(words + first * n_words), 2 * n_words);
                     });
}

}  // namespace fastsae
