// Counts what the threads of the engine share: how often one takes a unit from a counter that is another's, and whether the thread that
// first touches a panel is the one that reads it. Two threads in step: each takes its next unit when the other has done the same.
#include <omp.h>

#include <barrier>
#include <cstdlib>
#include <cstdio>
#include <vector>

namespace {
long own, other;
}
#define FASTSAE_COUNT(ours) __atomic_fetch_add(ours ? &own : &other, 1, __ATOMIC_RELAXED);
#include "parallel.h"

int main() {
  using namespace fastsae;
  constexpr int64_t kUnits = 64;
  std::barrier step(2);
  std::vector<int> packed(kUnits, -1), read(2 * kUnits, -1);
  const auto in_step = [&](auto& by, int64_t units) {
    for_each_unit_by_worker(2, units, [&](int64_t i, int worker) {
      by[i] = omp_get_thread_num();
      if (worker != by[i]) std::abort();
      step.arrive_and_wait();
    });
  };
  in_step(packed, kUnits);    // as pack_all: panels
  in_step(read, 2 * kUnits);  // as run_engine: blocks, here of half a panel
  int same = 0;
  for (int64_t i = 0; i < 2 * kUnits; ++i) same += packed[i / 2] == read[i];
  std::printf("%ld own, %ld of another, %d of %d read by the thread that packed\n", own, other, same, static_cast<int>(2 * kUnits));
  return other == 0 && same == 2 * kUnits ? 0 : 1;
}
