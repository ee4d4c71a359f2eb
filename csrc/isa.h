// Which instruction set runs: what was built, what this CPU and its operating system support, what is chosen.
//
// Files named *.isa.cpp are compiled once per level, with that level's flags and FASTSAE_ISA set to its name; everything in them lives
// in namespace fastsae::<level>. Every other file is compiled with baseline flags and FASTSAE_BUILT_<level> for each level that was built.
#pragma once
#include <cstdint>

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

namespace fastsae {

// Ascending: a level includes those before it, and a level without a body of its own runs the body of the next lower one.
#define FASTSAE_LEVELS(X) X(portable) X(avx2) X(avx512) X(avx512_vnni) X(avx512_bf16)

// A level with dot products of 8-bit integers screens (cpu/engine); what gains nothing from them has no body there and runs avx512's.
#if defined(FASTSAE_LEVEL_avx512_vnni) || defined(FASTSAE_LEVEL_avx512_bf16)
#define FASTSAE_SCREENS 1
#endif

enum class Level : int {
#define FASTSAE_X(level) level,
  FASTSAE_LEVELS(FASTSAE_X)
#undef FASTSAE_X
};
constexpr int kLevels = 5;

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
// (all levels up to avx512, or those that screen) and picks one.
#define FASTSAE_TABLE(level, Table, name) \
  namespace level {                       \
  extern const Table name;                \
  }
#define FASTSAE_DECLARE_TABLES(Table, name) \
  FASTSAE_TABLE(portable, Table, name)      \
  FASTSAE_TABLE(avx2, Table, name)          \
  FASTSAE_TABLE(avx512, Table, name) FASTSAE_TABLE(avx512_vnni, Table, name) FASTSAE_TABLE(avx512_bf16, Table, name)
#define FASTSAE_IN(level, name) (FASTSAE_BUILT_##level ? &level::name : nullptr)
#define FASTSAE_BASE_TABLES(name) {&portable::name, FASTSAE_IN(avx2, name), FASTSAE_IN(avx512, name), nullptr, nullptr}
#define FASTSAE_SCREEN_TABLES(name) {nullptr, nullptr, nullptr, FASTSAE_IN(avx512_vnni, name), FASTSAE_IN(avx512_bf16, name)}

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
