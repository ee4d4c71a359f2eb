// What the engine needs besides its loops (driver.h): packed handles, the rotation's signs, when to rotate.
#include "cpu/engine/driver.h"

namespace fastsae {
namespace {

const EngineKernels* const kTables[kLevels] = FASTSAE_ALL_TABLES(engine_kernels);

}  // namespace

const EngineKernels& engine_kernels() { return pick(kTables); }

void rotation_signs(uint32_t* signs, int64_t d) {
  for (int64_t i = 0; i < signs_size(d); ++i) {
    uint32_t h = static_cast<uint32_t>(i) * 0x9e3779b9u + 0x7f4a7c15u;
    h = (h ^ (h >> 16)) * 0x85ebca6bu;
    h = (h ^ (h >> 13)) * 0xc2b2ae35u;
    signs[i] = h & 0x80000000u;
  }
}

bool worth_rotating(const float* xc, int64_t rows, int64_t stride, int64_t d) {
  constexpr int64_t kLooked = 64;
  constexpr float kCrest = 6;  // Gaussian rows have a largest element of 3 to 4 times their root mean square
  const int64_t step = std::max<int64_t>(1, rows / kLooked);
  int64_t looked = 0, peaked = 0;
  for (int64_t r = 0; r < rows; r += step, ++looked) {
    float squares[4] = {}, largest[4] = {};
    const float* const x = xc + r * stride;
    int64_t i = 0;
    for (; i + 4 <= d; i += 4)
      for (int j = 0; j < 4; ++j) {
        squares[j] += x[i + j] * x[i + j];
        largest[j] = std::max(largest[j], std::fabs(x[i + j]));
      }
    for (; i < d; ++i) {
      squares[0] += x[i] * x[i];
      largest[0] = std::max(largest[0], std::fabs(x[i]));
    }
    const float most = std::max(std::max(largest[0], largest[1]), std::max(largest[2], largest[3]));
    peaked += most * most * static_cast<float>(d) > kCrest * kCrest * (squares[0] + squares[1] + squares[2] + squares[3]);
  }
  return peaked * 8 > looked;
}

bool packs(int64_t d) { return engine_kernels().pack_features[0] != nullptr && can_screen(ScreenFormat::int8, d); }

int64_t packed_words(int64_t features, int64_t d) {
  return packed_features(features) * (words_of(ScreenFormat::int8, d, rotation_of(d)) + 3);
}

int64_t pack(const Weights& w, uint32_t* packed, int threads) {
  const Problem p{.kernels = engine_kernels(), .x = {}, .w = w, .threads = threads};
  return pack_all(p, make_plan(p, {}), packed);
}

int64_t pack_all(const Problem& p, const Plan& plan, uint32_t* packed) {
  const Weights& w = p.w;
  const int64_t words = plan.words, all = packed_features(w.features), block = plan.copied ? plan.block : kPanelWidth;
  const int64_t blocks = ceil_div(w.features, block), scratch = scratch_words(w.d, words, true);
  const int64_t row_elements = plan.copied ? block * plan.row_stride : 0;
  const int threads = static_cast<int>(std::min<int64_t>({useful_threads(p.threads, w.features * w.d), blocks, kMostWorkers}));
  Workspace space(Workspace::size<uint32_t>(signs_size(w.d)) +
                  static_cast<size_t>(threads) * (Workspace::size<uint32_t>(scratch) + Workspace::size<float>(row_elements)));
  if (!space.ok()) return kNoMemory;
  uint32_t* const signs = space.take<uint32_t>(signs_size(w.d));
  uint32_t* scratches[kMostWorkers];
  float* rows[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    scratches[t] = space.take<uint32_t>(scratch);
    rows[t] = space.take<float>(row_elements);
  }
  rotation_signs(signs, w.d);
  float* const facts = reinterpret_cast<float*>(packed + all * words);
  for_each_unit_by_worker(threads, blocks, [&](int64_t unit, int worker) {
    const int64_t f0 = unit * block, n = std::min(block, w.features - f0);
    if (plan.copied) load_features(p, f0, n, rows[worker], plan.row_stride);
    p.kernels.pack_features[static_cast<int>(plan.format)]({.w = plan.copied ? rows[worker] : w.data,
                                                            .t = plan.copied ? Dtype::f32 : w.t,
                                                            .stride_f = plan.copied ? plan.row_stride : w.stride_f,
                                                            .d = w.d,
                                                            .first = plan.copied ? 0 : f0,
                                                            .features = n,
                                                            .list = plan.copied ? nullptr : w.list,
                                                            .panels = static_cast<int>(ceil_div(n, kPanelWidth)),
                                                            .rotation = plan.rotation,
                                                            .signs = signs,
                                                            .data = packed + f0 * words,
                                                            .norm = facts + f0,
                                                            .loss = facts + all + f0,
                                                            .unit = facts + 2 * all + f0,
                                                            .scratch = scratches[worker]});
  });
  return kOk;
}

}  // namespace fastsae
