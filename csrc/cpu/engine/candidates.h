// The base of drivers that keep any number of entries a row: a worker's undecided features, all of them where screening is off or decides
// too little, and their exact products. Baseline code.
#pragma once
#include <utility>

#include "cpu/encode.h"
#include "cpu/engine/driver.h"

namespace fastsae {

// Null where the level in force cannot screen.
const EncodeKernels* encode_kernels();

struct Candidates {
  const Problem& p;
  const EncodeKernels* screens;
  Undecided undecided[kMostWorkers] = {};
  uint8_t* full[kMostWorkers] = {};  // rows of which every score of the block is computed
  int unscreened[kMostWorkers] = {};
  int64_t scored[kMostWorkers] = {};

  int64_t bytes(const Plan& plan) const {
    return plan.threads * (undecided_bytes(plan.chunk, plan.block + 16) + Workspace::size<uint8_t>(plan.chunk));
  }
  void take(Workspace& space, const Plan& plan) {
    for (int t = 0; t < plan.threads; ++t) {
      undecided[t] = take_undecided(space, plan.chunk, plan.block + 16);
      full[t] = space.take<uint8_t>(plan.chunk);
    }
  }
  void begin(const Chunk&) {}

  // 1. What the screen leaves open; run(undecided) screens.
  template <class Run>
  void screen(const Chunk& chunk, const Block& b, int worker, const Run& run) {
    const Undecided& u = undecided[worker];
    std::memset(full[worker], 0, static_cast<size_t>(chunk.rows));
    if (!chunk.plan.screens || unscreened[worker] > 0) {
      if (unscreened[worker] > 0) --unscreened[worker];
      std::memset(full[worker], 1, static_cast<size_t>(chunk.rows));
    } else {
      run(u);
      int64_t heavy = 0;
      for (int64_t r = 0; r < chunk.rows; ++r) {
        full[worker][r] = static_cast<uint8_t>(chunk.exact[r] != 0 || u.n[r] * 4 > b.count);
        heavy += full[worker][r];
      }
      if (heavy * 2 > chunk.rows) unscreened[worker] = kUnscreened;
    }
  }
  // 2. Exact products of what is still open; every feature of a full row.
  void score(const Chunk& chunk, const Block& b, int worker) {
    const Undecided& u = undecided[worker];
    int64_t rows[16], count = 0;
    const bool plain = b.job.t == Dtype::f32;
    if (chunk.plan.screens) screens->score_undecided(b.job, u, chunk.rows, full[worker]);
    const auto flush = [&] {
      const float* x[16];
      const float* w[kDenseWidth];
      for (int64_t i = 0; i < count; ++i) x[i] = chunk.xc + rows[i] * b.job.padded;
      for (int64_t f0 = 0; f0 < b.count; f0 += kDenseWidth) {
        const int64_t n = std::min(kDenseWidth, b.count - f0);
        for (int64_t j = 0; j < n; ++j) {
          const int64_t id = b.first + f0 + j + b.job.first;
          w[j] = static_cast<const float*>(b.job.w) + (b.job.list != nullptr ? b.job.list[id] : id) * b.job.stride_f;
        }
        float products[16 * kDenseWidth];
        p.kernels.products(x, count, w, n, b.job.d, products, kDenseWidth);
        for (int64_t i = 0; i < count; ++i)
          std::memcpy(u.hi + rows[i] * u.stride + f0, products + i * kDenseWidth, static_cast<size_t>(n) * sizeof(float));
      }
      count = 0;
    };
    for (int64_t r = 0; r < chunk.rows; ++r) {
      if (full[worker][r] != 0) {
        for (int64_t j = 0; j < b.count; ++j) u.id[r * u.stride + j] = static_cast<int32_t>(b.first + j);
        u.n[r] = static_cast<int32_t>(b.count);
        if (plain) {
          rows[count++] = r;
          if (count == 16) flush();
        }
      }
      scored[worker] += u.n[r];
    }
    if (count > 0) flush();
    if (!plain) {
      for (int64_t r = 0; r < chunk.rows; ++r) full[worker][r] ^= 1;
      screens->score_undecided(b.job, u, chunk.rows, full[worker]);
      for (int64_t r = 0; r < chunk.rows; ++r) full[worker][r] ^= 1;
    }
  }
  static float scored_as(const Block& b, int64_t at, float product) {
    if (b.panels.scale != nullptr) product = product * b.panels.scale[at];
    return product + b.panels.bias[at];
  }
  int64_t end(const Chunk&) {
    if (p.stats != nullptr)
      for (int64_t& n : scored) __atomic_fetch_add(&p.stats->scored, std::exchange(n, 0), __ATOMIC_RELAXED);
    return kOk;
  }
};

}  // namespace fastsae
