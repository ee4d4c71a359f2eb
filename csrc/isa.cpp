#include "isa.h"

#include <atomic>
#include <cstring>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTSAE_X86 1
#endif

namespace fastsae {
namespace {

struct Cpu {
  bool avx = false, f16c = false, fma = false, avx2 = false;
  bool avx512f = false, avx512bw = false, avx512dq = false, avx512vl = false;
  bool avx512_bf16 = false, avx512_vnni = false, avx512_vpopcntdq = false;
};

#ifdef FASTSAE_X86
// The instruction, not the intrinsic: _xgetbv needs -mxsave, which this baseline file must not have.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

Cpu probe() {
  Cpu cpu;
#ifdef FASTSAE_X86
  unsigned a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return cpu;
  const auto bit = [](unsigned word, int i) { return ((word >> i) & 1u) != 0; };
  // A CPU may have registers that its (virtual) operating system does not save: XCR0 decides, not CPUID alone.
  const uint64_t saved = bit(c, 27) ? xcr0() : 0;
  const bool ymm = (saved & 0x06) == 0x06;
  const bool zmm = (saved & 0xe6) == 0xe6;
  cpu.avx = ymm && bit(c, 28);
  cpu.f16c = cpu.avx && bit(c, 29);
  cpu.fma = cpu.avx && bit(c, 12);
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return cpu;
  const unsigned leaves = a;
  cpu.avx2 = cpu.avx && bit(b, 5);
  cpu.avx512f = zmm && bit(b, 16);
  cpu.avx512dq = cpu.avx512f && bit(b, 17);
  cpu.avx512bw = cpu.avx512f && bit(b, 30);
  cpu.avx512vl = cpu.avx512f && bit(b, 31);
  cpu.avx512_vnni = cpu.avx512f && bit(c, 11);
  cpu.avx512_vpopcntdq = cpu.avx512f && bit(c, 14);
  if (leaves >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) cpu.avx512_bf16 = cpu.avx512f && bit(a, 5);
#endif
  return cpu;
}

const Cpu& cpu() {
  static const Cpu probed = probe();
  return probed;
}

std::atomic<int> chosen{-1};

}  // namespace

const char* level_name(Level level) {
  static const char* const names[kLevels] = {
#define FASTSAE_X(name) #name,
      FASTSAE_LEVELS(FASTSAE_X)
#undef FASTSAE_X
  };
  return names[static_cast<int>(level)];
}

bool level_built(Level level) {
  switch (level) {
    case Level::portable:
      return true;
    case Level::avx2:
#ifdef FASTSAE_BUILT_avx2
      return true;
#else
      return false;
#endif
    case Level::avx512:
#ifdef FASTSAE_BUILT_avx512
      return true;
#else
      return false;
#endif
    case Level::avx512_vnni:
#ifdef FASTSAE_BUILT_avx512_vnni
      return true;
#else
      return false;
#endif
    case Level::avx512_bf16:
#ifdef FASTSAE_BUILT_avx512_bf16
      return true;
#else
      return false;
#endif
  }
  return false;
}

bool level_supported(Level level) {
  const Cpu& c = cpu();
  const bool avx2 = c.avx2 && c.fma && c.f16c;
  const bool avx512 = avx2 && c.avx512f && c.avx512bw && c.avx512dq && c.avx512vl;
  switch (level) {
    case Level::portable:
      return true;
    case Level::avx2:
      return avx2;
    case Level::avx512:
      return avx512;
    case Level::avx512_vnni:
      return avx512 && c.avx512_vnni;
    case Level::avx512_bf16:
      return avx512 && c.avx512_bf16 && c.avx512_vnni;
  }
  return false;
}

Level current_level() {
  int level = chosen.load(std::memory_order_relaxed);
  if (level >= 0) return static_cast<Level>(level);
  level = kLevels - 1;
  while (level > 0 && !(level_built(static_cast<Level>(level)) && level_supported(static_cast<Level>(level)))) --level;
  chosen.store(level, std::memory_order_relaxed);
  return static_cast<Level>(level);
}

bool set_level(Level level) {
  if (!level_built(level) || !level_supported(level)) return false;
  chosen.store(static_cast<int>(level), std::memory_order_relaxed);
  return true;
}

const Feature* cpu_features() {
  const Cpu& c = cpu();
  static const Feature list[] = {
      {"avx", c.avx},
      {"f16c", c.f16c},
      {"fma", c.fma},
      {"avx2", c.avx2},
      {"avx512f", c.avx512f},
      {"avx512bw", c.avx512bw},
      {"avx512dq", c.avx512dq},
      {"avx512vl", c.avx512vl},
      {"avx512_bf16", c.avx512_bf16},
      {"avx512_vnni", c.avx512_vnni},
      {"avx512_vpopcntdq", c.avx512_vpopcntdq},
      {nullptr, false},
  };
  return list;
}

bool cpu_has(const char* feature) {
  for (const Feature* f = cpu_features(); f->name != nullptr; ++f)
    if (std::strcmp(f->name, feature) == 0) return f->present;
  return false;
}

}  // namespace fastsae
