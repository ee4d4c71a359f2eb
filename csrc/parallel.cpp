#include "parallel.h"

#ifdef __SSE2__
#include <xmmintrin.h>
#endif

#if defined(__unix__) || defined(__APPLE__)
#include <dlfcn.h>
#endif

namespace fastsae {
namespace {

// The entry that compilers emit for `#pragma omp parallel`. GNU, LLVM and Intel runtimes all export it.
using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

GompParallel find_runtime() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<GompParallel>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
#else
  return nullptr;
#endif
}

int (*find_thread_number())() {
#if defined(__unix__) || defined(__APPLE__)
  return reinterpret_cast<int (*)()>(dlsym(RTLD_DEFAULT, "omp_get_thread_num"));
#else
  return nullptr;
#endif
}

// Looked up when this library is loaded; native.py imports torch before.
GompParallel const runtime = find_runtime();
int (*const number)() = find_thread_number();
std::atomic<bool> serial{false};

}  // namespace

bool threads_available() { return runtime != nullptr && !serial.load(std::memory_order_relaxed); }

void force_serial() { serial.store(true, std::memory_order_relaxed); }

int thread_number() { return number != nullptr ? number() : 0; }

void run_on_threads(int threads, void (*body)(void*), void* data) {
  if (threads <= 1 || !threads_available()) {
    body(data);
    return;
  }
#ifdef __SSE2__
  // Rounding and flushing of denormals belong to a thread: all of them take the caller's, or bits would depend on who computes.
  struct Call {
    void (*body)(void*);
    void* data;
    unsigned control;
  } call{body, data, _mm_getcsr()};
  runtime(
      [](void* p) {
        const Call& c = *static_cast<Call*>(p);
        const unsigned own = _mm_getcsr();
        _mm_setcsr(c.control);
        c.body(c.data);
        _mm_setcsr(own);
      },
      &call, static_cast<unsigned>(threads), 0);
#else
  runtime(body, data, static_cast<unsigned>(threads), 0);
#endif
}

}  // namespace fastsae
