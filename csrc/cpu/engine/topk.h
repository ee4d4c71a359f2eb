// The driver of a screened top-k, a block of features at a time: all workers share the running best of each row. Baseline code.
#pragma once
#include <utility>

#include "cpu/encode.h"
#include "cpu/engine/dense.h"

namespace fastsae {

// Of the entries that workers share, for the plan.
inline int64_t topk_bytes_a_row(int64_t k) { return 8 * (4 * k + 272); }

struct TopkDriver {
  const EncodeKernels& screens;
  void (*screen_topk)(const ScreenRows&, const ScreenPanels&, const Prefetch&, const ScoreJob&, const TopkBuffer&);
  const Problem& p;
  const TopkOutput& out;
  TopkBuffer shared{};
  TopkBuffer buffers[kMostWorkers] = {};
  uint64_t* entries[kMostWorkers] = {};
  int64_t* survivors[kMostWorkers] = {};
  int32_t* list = nullptr;
  int threads = 0;

  int64_t capacity() const { return 4 * out.k + 256; }
  int64_t stride() const { return capacity() + 16; }

  int64_t bytes(const Plan& plan) const {
    const int64_t chunk = plan.chunk, undecided = plan.block + 16;
    return Workspace::size<int32_t>(chunk) * 4 + Workspace::size<uint8_t>(chunk) + 2 * Workspace::size<float>(chunk * stride()) +
           plan.threads * (undecided_bytes(chunk, undecided) + Workspace::size<int32_t>(chunk) + 3 * Workspace::size<int64_t>(1) +
                           Workspace::size<float>(stride() + undecided) + Workspace::size<uint64_t>(capacity()));
  }
  void take(Workspace& space, const Plan& plan) {
    const int64_t chunk = plan.chunk, undecided = plan.block + 16;
    threads = plan.threads;
    list = space.take<int32_t>(chunk);
    shared.score = space.take<float>(chunk * stride());
    shared.feature = space.take<int32_t>(chunk * stride());
    shared.kept = space.take<int32_t>(chunk);
    shared.fresh = space.take<int32_t>(chunk);
    shared.tau = space.take<int32_t>(chunk);
    shared.lock = space.take<uint8_t>(chunk);
    shared.kept_stride = stride();
    shared.capacity = capacity();
    shared.k = out.k;
    for (int t = 0; t < threads; ++t) {
      TopkBuffer& b = buffers[t];
      b = shared;
      b.undecided = take_undecided(space, chunk, undecided);
      b.scored = space.take<int64_t>(1);
      b.seen = space.take<int64_t>(1);
      b.spent = space.take<int32_t>(chunk);
      b.room = space.take<float>(stride() + undecided);
      entries[t] = space.take<uint64_t>(capacity());
      survivors[t] = space.take<int64_t>(1);
      *b.scored = *survivors[t] = 0;
    }
  }
  void begin(const Chunk& chunk) {
    std::memset(shared.lock, 0, static_cast<size_t>(chunk.rows));
    for (int32_t* counts : {shared.kept, shared.fresh}) std::memset(counts, 0, static_cast<size_t>(chunk.rows) * sizeof(int32_t));
    std::fill_n(shared.tau, chunk.rows, std::bit_cast<int32_t>(-INFINITY));
    shared.exact = chunk.exact;
    for (int t = 0; t < threads; ++t) {
      buffers[t].exact = chunk.exact;
      *buffers[t].seen = 0;
      std::memset(buffers[t].spent, 0, static_cast<size_t>(chunk.rows) * sizeof(int32_t));
    }
  }
  void block(const Chunk& chunk, const Block& b, int worker) {
    buffers[worker].self = p.exclude_self ? chunk.base : -(int64_t{1} << 40);
    screen_topk(b.rows, b.panels, b.next, b.job, buffers[worker]);
  }
  int64_t end(const Chunk& chunk) {
    for_each_unit_by_worker(threads, chunk.rows, [&](int64_t r, int worker) {
      if (chunk.exact[r] != 0) return;
      const int64_t n = screens.finish_topk(shared, r), base = r * stride();
      *survivors[worker] += n;
      for (int64_t i = 0; i < n; ++i) entries[worker][i] = entry(shared.score[base + i], shared.feature[base + i]);
      out.select(chunk.base + r, entries[worker], n);
    });
    if (p.stats != nullptr) {
      for (int t = 0; t < threads; ++t) p.stats->survivors += std::exchange(*survivors[t], 0);
      for (int t = 0; t < threads; ++t) p.stats->scored += std::exchange(*buffers[t].scored, 0);
    }
    const int64_t count = collect_exact(p, chunk.exact, chunk.rows, list);
    return count > 0 ? dense_topk(p, out, chunk.xc, chunk.base, list, count) : kOk;
  }
};

}  // namespace fastsae
