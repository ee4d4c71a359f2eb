#include "isa.h"

#include <algorithm>
#include <atomic>
#include <cstring>
#include <vector>

#if defined(__x86_64__) || defined(__i386__)
#include <cpuid.h>
#define FASTSAE_X86 1
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace fastsae {
namespace {

#ifdef FASTSAE_X86
// The instruction, not the intrinsic: _xgetbv needs -mxsave, which this baseline file must not have.
uint64_t xcr0() {
  uint32_t low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}
#endif

#if defined(__aarch64__)

// `bit` of AT_HWCAP (word 0) or AT_HWCAP2 (1) where Linux tells, a name of sysctl on macOS; elsewhere nothing is assumed.
bool has([[maybe_unused]] int word, [[maybe_unused]] int bit, [[maybe_unused]] const char* name) {
#if defined(__linux__)
  return (getauxval(word == 0 ? AT_HWCAP : AT_HWCAP2) >> bit & 1) != 0;
#elif defined(__APPLE__)
  int present = 0;
  size_t size = sizeof(present);
  return sysctlbyname(name, &present, &size, nullptr, 0) == 0 && present != 0;
#else
  return false;
#endif
}

std::vector<Feature> probe() {
  return {{"atomics", has(0, 8, "hw.optional.arm.FEAT_LSE")},
          {"dotprod", has(0, 20, "hw.optional.arm.FEAT_DotProd")},
          {"i8mm", has(1, 13, "hw.optional.arm.FEAT_I8MM")},
          {nullptr, false}};
}

#else

std::vector<Feature> probe() {
  uint64_t saved = 0;
  unsigned a = 0, b = 0, c = 0, d = 0, c1 = 0, b7 = 0, c7 = 0, a71 = 0;  // registers of the leaves of CPUID
  const auto bit = [](unsigned word, int i) { return ((word >> i) & 1u) != 0; };
#ifdef FASTSAE_X86
  if (__get_cpuid(1, &a, &b, &c1, &d) && bit(c1, 27)) saved = xcr0();
  if (__get_cpuid_count(7, 0, &a, &b7, &c7, &d) && a >= 1 && __get_cpuid_count(7, 1, &a, &b, &c, &d)) a71 = a;
#endif
  // A CPU may have registers that its (virtual) operating system does not save: XCR0 decides, not CPUID alone.
  const bool avx = (saved & 0x06) == 0x06 && bit(c1, 28), avx512 = (saved & 0xe6) == 0xe6 && bit(b7, 16);
  return {{"avx", avx},
          {"f16c", avx && bit(c1, 29)},
          {"fma", avx && bit(c1, 12)},
          {"avx2", avx && bit(b7, 5)},
          {"avx512f", avx512},
          {"avx512bw", avx512 && bit(b7, 30)},
          {"avx512dq", avx512 && bit(b7, 17)},
          {"avx512vl", avx512 && bit(b7, 31)},
          {"avx512_bf16", avx512 && bit(a71, 5)},
          {"avx512_vnni", avx512 && bit(c7, 11)},
          {"avx512_vpopcntdq", avx512 && bit(c7, 14)},
          {nullptr, false}};
}

#endif

std::atomic<int> chosen{-1};

}  // namespace

const char* level_name(Level level) {
#define FASTSAE_TEXT(level, a) #level,
  static const char* const names[kLevels] = {FASTSAE_LEVELS(FASTSAE_TEXT, )};
  return names[static_cast<int>(level)];
}

bool level_built(Level level) {
#define FASTSAE_BUILT(level, a) FASTSAE_BUILT_##level != 0,
  constexpr bool kBuilt[kLevels] = {FASTSAE_LEVELS(FASTSAE_BUILT, )};
  return kBuilt[static_cast<int>(level)];
}

bool level_supported(Level level) {
  static const std::vector<const char*> needs[kLevels] = {  // beyond those of the levels before
#if defined(__aarch64__)
      {}, {}, {"atomics", "dotprod"}, {"i8mm"}  // compilers take ARMv8.2 for these, and with it its atomic instructions
#else
      {}, {"avx2", "fma", "f16c"}, {"avx512f", "avx512bw", "avx512dq", "avx512vl"}, {"avx512_vnni"}, {"avx512_bf16"}
#endif
  };
  return std::all_of(needs, needs + static_cast<int>(level) + 1,
                     [](const auto& names) { return std::all_of(names.begin(), names.end(), cpu_has); });
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
  static const std::vector<Feature> probed = probe();
  return probed.data();
}

bool cpu_has(const char* feature) {
  for (const Feature* f = cpu_features(); f->name != nullptr; ++f)
    if (std::strcmp(f->name, feature) == 0) return f->present;
  return false;
}

}  // namespace fastsae
