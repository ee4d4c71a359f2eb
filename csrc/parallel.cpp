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

struct Runtime {
  GompParallel parallel = nullptr;
  int (*number)() = nullptr;
};

// The process's, else torch's own: torch's wheels for aarch64 do not load theirs into the global scope. Both entries of one library, as the
// numbers of another would not tell its threads apart.
Runtime find_runtime() {
#if defined(__unix__) || defined(__APPLE__)
  for (void* scope : {RTLD_DEFAULT, dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD)}) {
    void *parallel = dlsym(scope, "GOMP_parallel"), *number = dlsym(scope, "omp_get_thread_num");
    Dl_info of_parallel, of_number;
    if (parallel != nullptr && number != nullptr && dladdr(parallel, &of_parallel) != 0 && dladdr(number, &of_number) != 0 &&
        of_parallel.dli_fbase == of_number.dli_fbase)
      return {reinterpret_cast<GompParallel>(parallel), reinterpret_cast<int (*)()>(number)};
  }
#endif
  return {};
}

// Rounding and flushing of denormals belong to a thread: all of them take the caller's, or bits would depend on who computes.
#if defined(__SSE2__)
using Control = unsigned;
Control control() { return _mm_getcsr(); }
void set_control(Control c) { _mm_setcsr(c); }
#elif defined(__aarch64__)
using Control = uint64_t;
Control control() {
  Control c;
  __asm__ volatile("mrs %0, fpcr" : "=r"(c));
  return c;
}
void set_control(Control c) { __asm__ volatile("msr fpcr, %0" : : "r"(c)); }
#else
using Control = int;
Control control() { return 0; }
void set_control(Control) {}
#endif

// Looked up when this library is loaded; native.py imports torch before.
Runtime const runtime = find_runtime();
std::atomic<bool> serial{false};

}  // namespace

bool threads_available() { return runtime.parallel != nullptr && !serial.load(std::memory_order_relaxed); }

void force_serial() { serial.store(true, std::memory_order_relaxed); }

int thread_number() { return runtime.number(); }

void run_on_threads(int threads, void (*body)(void*), void* data) {
  if (threads <= 1 || !threads_available()) {
    body(data);
    return;
  }
  struct Call {
    void (*body)(void*);
    void* data;
    Control control;
  } call{body, data, control()};
  runtime.parallel(
      [](void* p) {
        const Call& c = *static_cast<Call*>(p);
        const Control own = control();
        set_control(c.control);
        c.body(c.data);
        set_control(own);
      },
      &call, static_cast<unsigned>(threads), 0);
}

}  // namespace fastsae
