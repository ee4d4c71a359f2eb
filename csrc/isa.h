// Which instruction set runs: what was built, what this CPU and its operating system support, what is chosen.
//
// Files named *.isa.cpp are compiled once per level, with that level's flags and FASTSAE_ISA set to its name; everything in them lives
// in namespace fastsae::<level>. Every other file is compiled with baseline flags and FASTSAE_BUILT_<level> for each level that was built.
#pragma once
#include <cstdint>

#undef FASTSAE_BUILT_portable  // always; build scripts may say so too
#define FASTSAE_BUILT_portable 1
#ifndef FASTSAE_BUILT_avx2
#define FASTSAE_BUILT_avx2 0
#endif
#ifndef FASTSAE_BUILT_avx512
#define FASTSAE_BUILT_avx512 0
#endif
#ifndef FASTSAE_BUILT_avx512_vnni
#define FASTSAE_BUILT_avx512_vnni 0
#endif
#ifndef FASTSAE_BUILT_avx512_bf16
#define FASTSAE_BUILT_avx512_bf16 0
#endif
#ifndef FASTSAE_BUILT_neon
#define FASTSAE_BUILT_neon 0
#endif
#ifndef FASTSAE_BUILT_neon_dotprod
#define FASTSAE_BUILT_neon_dotprod 0
#endif
#ifndef FASTSAE_BUILT_neon_i8mm
#define FASTSAE_BUILT_neon_i8mm 0
#endif

namespace fastsae {

// The levels of a kind of CPU, ascending: X(level, a). A level includes those before it, and one without a body of its own runs the body of
// the next lower one. Plain levels have no screen (cpu/engine), those that screen last have bodies for the screen only.
#if defined(__aarch64__)
#define FASTSAE_PLAIN_LEVELS(X, a) X(portable, a) X(neon, a)
#define FASTSAE_FULL_LEVELS(X, a)
#define FASTSAE_SCREEN_LEVELS(X, a) X(neon_dotprod, a) X(neon_i8mm, a)
#else
#define FASTSAE_PLAIN_LEVELS(X, a) X(portable, a)
#define FASTSAE_FULL_LEVELS(X, a) X(avx2, a) X(avx512, a)
#define FASTSAE_SCREEN_LEVELS(X, a) X(avx512_vnni, a) X(avx512_bf16, a)
#endif
#define FASTSAE_LEVELS(X, a) FASTSAE_PLAIN_LEVELS(X, a) FASTSAE_FULL_LEVELS(X, a) FASTSAE_SCREEN_LEVELS(X, a)

#if defined(FASTSAE_LEVEL_neon_dotprod) || defined(FASTSAE_LEVEL_neon_i8mm)
#define FASTSAE_ONLY_SCREENS 1
#define FASTSAE_NEON 1
#elif defined(FASTSAE_LEVEL_neon)
#define FASTSAE_NEON 1
#elif defined(FASTSAE_LEVEL_avx512_vnni) || defined(FASTSAE_LEVEL_avx512_bf16)
#define FASTSAE_ONLY_SCREENS 1
#endif
#if defined(FASTSAE_ONLY_SCREENS) || defined(FASTSAE_LEVEL_avx2) || defined(FASTSAE_LEVEL_avx512)
#define FASTSAE_SCREENS 1
#endif

#define FASTSAE_NAME(level, a) level,
#define FASTSAE_ONE(level, a) +1
enum class Level : int { FASTSAE_LEVELS(FASTSAE_NAME, ) };
constexpr int kLevels = FASTSAE_LEVELS(FASTSAE_ONE, );

const char* level_name(Level level);
bool level_built(Level level);
bool level_supported(Level level);  // by the CPU, and its registers are saved by the operating system
Level current_level();              // the highest built and supported one, unless set
bool set_level(Level level);        // false, and no change, where it was not built or is not supported

// One CPU feature as (name, present); null name ends the list.
struct Feature {
  const char* name;
  bool present;
};
const Feature* cpu_features();
bool cpu_has(const char* feature);

// A family of kernels has a table of function pointers in each level with a body of its own. Its header declares them, its .cpp lists them
// (of all levels, those that do not only screen, or those that screen) and picks one.
#define FASTSAE_TABLE(level, declaration) \
  namespace level {                       \
  extern const declaration;               \
  }
#define FASTSAE_DECLARE_TABLES(Table, name) FASTSAE_LEVELS(FASTSAE_TABLE, Table name)
#define FASTSAE_IN(level, name) (FASTSAE_BUILT_##level ? &level::name : nullptr),
#define FASTSAE_NOT_IN(level, name) nullptr,
#define FASTSAE_ALL_TABLES(name) {FASTSAE_LEVELS(FASTSAE_IN, name)}
#define FASTSAE_BASE_TABLES(name) \
  {FASTSAE_PLAIN_LEVELS(FASTSAE_IN, name) FASTSAE_FULL_LEVELS(FASTSAE_IN, name) FASTSAE_SCREEN_LEVELS(FASTSAE_NOT_IN, name)}
#define FASTSAE_SCREEN_TABLES(name) \
  {FASTSAE_PLAIN_LEVELS(FASTSAE_NOT_IN, name) FASTSAE_FULL_LEVELS(FASTSAE_IN, name) FASTSAE_SCREEN_LEVELS(FASTSAE_IN, name)}

template <class Table>
const Table& pick(const Table* const (&tables)[kLevels]) {
  int level = static_cast<int>(current_level());
  while (tables[level] == nullptr) --level;  // tables[portable] always exists
  return *tables[level];
}

// The same for what low levels cannot do: null where no level up to the current one has a body.
template <class Table>
const Table* pick_if(const Table* const (&tables)[kLevels]) {
  int level = static_cast<int>(current_level());
  while (level >= 0 && tables[level] == nullptr) --level;
  return level >= 0 ? tables[level] : nullptr;
}

}  // namespace fastsae
