// Threads of the OpenMP runtime that the process has already loaded (torch brings one). It is looked up at run time, so nothing links
// against libgomp and no second runtime with a thread pool of its own ever starts. Without one, everything runs serially.
#pragma once
#include <atomic>
#include <cstdint>

namespace fastsae {

bool threads_available();
void force_serial();                                                // for good: a forked child must not enter its parent's runtime
void run_on_threads(int threads, void (*body)(void*), void* data);  // body(data) on up to `threads` threads, and waits
int thread_number();                                                // of the caller among those, from 0; a thread keeps it

#ifndef FASTSAE_COUNT
#define FASTSAE_COUNT(own)  // tests/native/counting.cpp counts here
#endif

// body(i, worker) for every i in [0, units), each once, in any order and on any thread; `worker` < threads tells concurrent calls apart,
// for scratch memory. Units must not depend on each other, and what a unit computes must not depend on how many threads there are.
//
// A thread begins with its own range of units, the same share in every call, and helps with the others' afterwards. So what it wrote in
// one call it reads in the next, from its own cache and its own memory, and no counter is shared while every thread has work of its own.
template <class Body>
void for_each_unit_by_worker(int threads, int64_t units, const Body& body) {
  if (units <= 1 || threads <= 1 || !threads_available()) {
    for (int64_t i = 0; i < units; ++i) body(i, 0);
    return;
  }
  constexpr int kHomes = 256;
  struct alignas(64) Home {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct Shared {
    const Body& body;
    int count;
    Home homes[kHomes];
  } shared{body, threads < kHomes ? threads : kHomes, {}};
  if (units < shared.count) shared.count = static_cast<int>(units);
  for (int h = 0; h < shared.count; ++h) {
    shared.homes[h].next.store(units * h / shared.count, std::memory_order_relaxed);
    shared.homes[h].end = units * (h + 1) / shared.count;
  }
  run_on_threads(
      shared.count,
      [](void* data) {
        Shared& s = *static_cast<Shared*>(data);
        const int worker = thread_number();
        for (int h = 0; h < s.count; ++h) {
          Home& home = s.homes[(worker + h) % s.count];
          for (int64_t i; (i = home.next.fetch_add(1, std::memory_order_relaxed)) < home.end;) {
            FASTSAE_COUNT(h == 0)
            s.body(i, worker);
          }
        }
      },
      &shared);
}

template <class Body>
void for_each_unit(int threads, int64_t units, const Body& body) {
  for_each_unit_by_worker(threads, units, [&](int64_t i, int) { body(i); });
}

// As many threads as the work pays for: waking one costs about what `grain` elements do.
inline int useful_threads(int threads, int64_t work, int64_t grain = 32768) {
  const int64_t paid = 1 + work / grain;
  return paid < threads ? static_cast<int>(paid) : threads;
}

}  // namespace fastsae
