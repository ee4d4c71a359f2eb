// CUDA's built-ins on the CPU, so that the kernels of csrc/cuda can be run by tests where there is no GPU. Compile with FASTSAE_EMULATE.
//
// Each thread of a block is a fiber. It runs until a barrier or a warp operation, then the next one runs; blocks run one after another. The
// order is ascending, descending or shuffled (emulate::schedule): a kernel that lacks a barrier gives another result in another order. A
// barrier that not all threads reach is an error. Not modelled: memory ordering within a warp, caches, timing.
//
// With FASTSAE_EMULATE_THREADS each thread of a block is one of the system's, so that ThreadSanitizer sees what lies between two barriers.
#pragma once
#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __forceinline__ inline
#define __restrict__
#define __shared__ static
#define __launch_bounds__(...)

namespace emulate {

struct Dim {
  unsigned x = 0;
};

inline Dim block_index, block_size, grid_size;
#ifdef FASTSAE_EMULATE_THREADS
inline thread_local Dim thread_index;
#else
inline Dim thread_index;
#endif

inline int& schedule() {
  static int order = 0;  // 0 ascending, 1 descending, 2 shuffled
  return order;
}

#ifdef FASTSAE_EMULATE_THREADS
class Block {
 public:
  static Block& get() {
    static Block block;
    return block;
  }

  void run(unsigned index, int threads, const std::function<void()>& body, uint32_t&) {
    block_index.x = index;
    all_ = std::make_unique<std::barrier<>>(threads);
    warps_.clear();
    for (int warp = 0; warp < threads / 32; ++warp) warps_.push_back(std::make_unique<std::barrier<>>(32));
    std::vector<std::thread> running;
    for (int i = 0; i < threads; ++i)
      running.emplace_back([this, i, &body] {
        thread_index.x = static_cast<unsigned>(i);
        body();
        warps_[static_cast<size_t>(i / 32)]->arrive_and_drop();
        all_->arrive_and_drop();
      });
    for (std::thread& thread : running) thread.join();
  }

  void wait_block() { all_->arrive_and_wait(); }
  void wait_warp() { warps_[thread_index.x / 32]->arrive_and_wait(); }
  const uint64_t* gather(uint64_t value) {
    static thread_local int turn = 0;
    uint64_t* const slots = slots_[turn ^= 1];
    slots[thread_index.x] = value;
    wait_warp();
    return slots + thread_index.x / 32 * 32;
  }

 private:
  std::unique_ptr<std::barrier<>> all_;
  std::vector<std::unique_ptr<std::barrier<>>> warps_;
  uint64_t slots_[2][1024];
};
#else
// The threads of one block, kept and used again by the next: a context is dear to make.
class Block {
 public:
  static Block& get() {
    static Block block;
    return block;
  }

  void run(unsigned index, int threads, const std::function<void()>& body, uint32_t& state) {
    if (threads <= 0 || threads % 32 != 0 || threads > kMost) throw std::runtime_error("emulation: threads must be whole warps");
    block_index.x = index;
    body_ = &body;
    count_ = static_cast<size_t>(threads);
    std::vector<int> order(count_);
    for (size_t i = 0; i < count_; ++i) order[i] = static_cast<int>(schedule() == 1 ? count_ - 1 - i : i);
    for (size_t i = 0; i < count_; ++i) fibers_[i].wait = Wait::ready;
    do {
      if (schedule() == 2)
        for (size_t i = count_ - 1; i > 0; --i) std::swap(order[i], order[(state = state * 1664525u + 1013904223u) / 65536 % (i + 1)]);
      for (const int i : order)
        if (fibers_[static_cast<size_t>(i)].wait == Wait::ready) resume(i);
    } while (release());
    for (size_t i = 0; i < count_; ++i)
      if (fibers_[i].wait != Wait::done) throw std::runtime_error("emulation: threads wait at a barrier that others do not reach");
  }

  void wait_block() { pause(Wait::block); }
  void wait_warp() { pause(Wait::warp); }

  // What all lanes of the warp give here. Two turns of slots: who is late may still read the last ones.
  const uint64_t* gather(uint64_t value) {
    Fiber& fiber = fibers_[static_cast<size_t>(running_)];
    uint64_t* const slots = slots_[fiber.turn ^= 1];
    slots[thread_index.x] = value;
    wait_warp();
    return slots + thread_index.x / 32 * 32;
  }

 private:
  enum class Wait { ready, warp, block, done };
  struct Fiber {
    std::unique_ptr<char[]> stack;
    ucontext_t context;
    jmp_buf place;
    Wait wait = Wait::done;
    int turn = 0;
  };
  static constexpr size_t kStack = 64 << 10;
  static constexpr int kMost = 1024;

  void resume(int i) {
    Fiber& fiber = fibers_[static_cast<size_t>(i)];
    thread_index.x = static_cast<unsigned>(i);
    running_ = i;
    if (_setjmp(scheduler_) != 0) return;
    if (fiber.stack != nullptr) _longjmp(fiber.place, 1);
    fiber.stack = std::make_unique<char[]>(kStack);
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.get();
    fiber.context.uc_stack.ss_size = kStack;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, &Block::live, 0);
    setcontext(&fiber.context);
  }

  static void live() {
    for (Block& block = get();;) {
      (*block.body_)();
      block.pause(Wait::done);
    }
  }

  void pause(Wait why) {
    Fiber& fiber = fibers_[static_cast<size_t>(running_)];
    fiber.wait = why;
    if (_setjmp(fiber.place) == 0) _longjmp(scheduler_, 1);
  }

  // Lets those go on whose barrier is complete; false where none is.
  bool release() {
    bool any = false, all = true;
    for (size_t warp = 0; warp < count_; warp += 32) {
      size_t waiting = 0;
      for (size_t i = warp; i < warp + 32; ++i) waiting += fibers_[i].wait == Wait::warp, all = all && fibers_[i].wait == Wait::block;
      if (waiting != 32) continue;
      any = true;
      for (size_t i = warp; i < warp + 32; ++i) fibers_[i].wait = Wait::ready;
    }
    if (!all) return any;
    for (size_t i = 0; i < count_; ++i) fibers_[i].wait = Wait::ready;
    return true;
  }

  const std::function<void()>* body_ = nullptr;
  size_t count_ = 0;
  std::vector<Fiber> fibers_ = std::vector<Fiber>(kMost);
  uint64_t slots_[2][kMost];
  jmp_buf scheduler_;
  int running_ = 0;
};
#endif

inline void run(int64_t blocks, int threads, const std::function<void()>& body) {
  block_size.x = static_cast<unsigned>(threads);
  grid_size.x = static_cast<unsigned>(blocks);
  uint32_t state = 1;
  for (int64_t i = 0; i < blocks; ++i) Block::get().run(static_cast<unsigned>(schedule() == 0 ? i : blocks - 1 - i), threads, body, state);
}

template <class To, class From>
To bits(From from) {
  static_assert(sizeof(To) >= sizeof(From));
  To to{};
  std::memcpy(&to, &from, sizeof from);
  return to;
}

inline void all_lanes(unsigned mask) {
  if (mask != 0xffffffffu) throw std::runtime_error("emulation: warp operations of all lanes only");
}

}  // namespace emulate

#define threadIdx emulate::thread_index
#define blockIdx emulate::block_index
#define blockDim emulate::block_size
#define gridDim emulate::grid_size

inline void __syncthreads() { emulate::Block::get().wait_block(); }
inline void __syncwarp() { emulate::Block::get().wait_warp(); }
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  emulate::all_lanes(mask);
  const uint64_t* const given = emulate::Block::get().gather(emulate::bits<uint64_t>(value));
  T result;
  std::memcpy(&result, given + (static_cast<int>(threadIdx.x % 32) ^ lanes), sizeof result);
  return result;
}
inline unsigned __ballot_sync(unsigned mask, bool vote) {
  emulate::all_lanes(mask);
  const uint64_t* const given = emulate::Block::get().gather(vote);
  unsigned result = 0;
  for (int lane = 0; lane < 32; ++lane) result |= static_cast<unsigned>(given[lane]) << lane;
  return result;
}
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline uint32_t __float_as_uint(float x) { return emulate::bits<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return emulate::bits<float>(x); }
inline float __fmaf_rn(float a, float b, float c) { return std::fmaf(a, b, c); }
inline uint32_t atomicAdd(uint32_t* to, uint32_t value) {
  return std::atomic_ref<uint32_t>(*to).fetch_add(value, std::memory_order_relaxed);
}

namespace fastsae::cuda {
inline float half_to_float(uint16_t bits) {
  const int exponent = (bits >> 10) & 31, mantissa = bits & 1023;
  const uint32_t sign = static_cast<uint32_t>(bits & 0x8000) << 16;
  if (exponent == 31) return __uint_as_float(sign | 0x7f800000u | static_cast<uint32_t>(mantissa) << 13);
  const float size =
      exponent == 0 ? std::ldexp(static_cast<float>(mantissa), -24) : std::ldexp(1024.0f + static_cast<float>(mantissa), exponent - 25);
  return sign != 0 ? -size : size;
}
inline uint16_t float_to_half(float x) {
  const uint32_t bits = __float_as_uint(x);
  const uint16_t sign = static_cast<uint16_t>((bits >> 16) & 0x8000);
  const float size = std::fabs(x);
  if (std::isnan(x)) return 0x7fff;
  if (size >= 65520.0f) return static_cast<uint16_t>(sign | 0x7c00);
  if (size < 0x1p-14f) return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::nearbyint(size * 0x1p24f)));
  const uint32_t rounded = (bits & 0x7fffffffu) + 0xfffu + ((bits >> 13) & 1u);
  return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}
inline uint16_t float_to_bfloat(float x) {
  const uint32_t bits = __float_as_uint(x);
  if (std::isnan(x)) return 0x7fff;
  return static_cast<uint16_t>((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}
}  // namespace fastsae::cuda
