// What the engine needs besides its driver (driver.h): packed handles, the rotation's signs, when to rotate.
#include "cpu/engine/driver.h"

namespace fastsae {
namespace {

const EngineKernels* const kTables[kLevels] = {
    &portable::engine_kernels,           FASTSAE_AVX2(engine_kernels),        FASTSAE_AVX512(engine_kernels),
    FASTSAE_AVX512_VNNI(engine_kernels), FASTSAE_AVX512_BF16(engine_kernels),
};

}  // namespace

const EngineKernels& engine_kernels() { return pick(kTables); }

void rotation_signs(uint32_t* signs, int64_t size) {
  for (int64_t i = 0; i < size; ++i) {
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

bool packs(int64_t d) { return engine_kernels().pack_features[0] != nullptr && d > 0 && d < 65536; }

int64_t packed_words(int64_t features, int64_t d) {
  return packed_features(features) * (words_of(ScreenFormat::int8, d, rotation_of(d)) + 3);
}

int64_t pack(const Weights& w, uint32_t* packed, int threads) {
  const EngineKernels& kernels = engine_kernels();
  const Activations none{nullptr, w.t, 1, 0, 0, nullptr, 0};
  return pack_all(kernels, w, make_plan(kernels, none, w, ScreenFormat::int8, true, threads, 0), packed, threads);
}

int64_t pack_all(const EngineKernels& kernels, const Weights& w, const Plan& plan, uint32_t* packed, int threads) {
  const int64_t words = words_of(plan.format, w.d, plan.rotation), rotated = round_to(w.d, 256), all = packed_features(w.features);
  const int64_t padded = round_to(w.d, 32), row_stride = padded + 16;
  const int64_t block = plan.copied ? plan.block : kPanelWidth, blocks = ceil_div(w.features, block);
  const int64_t scratch_words = 16 * (round_to(words, 16) + 16) + rotated + words + 64;
  threads = static_cast<int>(std::min<int64_t>({useful_threads(threads, w.features * w.d), blocks, kMostWorkers}));
  Workspace space(
      static_cast<size_t>(Workspace::size<uint32_t>(rotated) + threads * (Workspace::size<uint32_t>(scratch_words) +
                                                                          (plan.copied ? Workspace::size<float>(block * row_stride) : 0))));
  if (!space.ok()) return kNoMemory;
  uint32_t* const signs = space.take<uint32_t>(rotated);
  uint32_t* scratch[kMostWorkers];
  float* rows[kMostWorkers];
  for (int t = 0; t < threads; ++t) {
    scratch[t] = space.take<uint32_t>(scratch_words);
    rows[t] = plan.copied ? space.take<float>(block * row_stride) : nullptr;
  }
  rotation_signs(signs, rotated);
  float* const facts = reinterpret_cast<float*>(packed + all * words);
  for_each_unit_by_worker(threads, blocks, [&](int64_t unit, int worker) {
    const int64_t f0 = unit * block, n = std::min(block, w.features - f0);
    PackFeaturesJob job{w.data,
                        w.t,
                        w.stride_f,
                        w.d,
                        f0,
                        n,
                        w.list,
                        static_cast<int>(ceil_div(n, kPanelWidth)),
                        plan.rotation,
                        signs,
                        packed + f0 * words,
                        facts + f0,
                        facts + all + f0,
                        facts + 2 * all + f0,
                        scratch[worker]};
    if (plan.copied) {
      kernels.load({w.data, w.t, w.stride_f, w.stride_d, w.d, f0, n, w.list, nullptr, w.eps, rows[worker], padded, row_stride});
      job.w = rows[worker];
      job.t = Dtype::f32;
      job.stride_f = row_stride;
      job.first = 0;
      job.list = nullptr;
    }
    kernels.pack_features[static_cast<int>(plan.format)](job);
  });
  return kOk;
}

}  // namespace fastsae
