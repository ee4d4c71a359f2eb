// Arithmetic of sizes, for every file. Functions that baseline code shares with the instruction sets have internal linkage: one copy for
// all could be compiled with AVX-512 and be the one that the linker keeps.
#pragma once
#include <stdint.h>

namespace fastsae {

static constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static constexpr int64_t round_to(int64_t n, int64_t unit) { return ceil_div(n, unit) * unit; }
static constexpr int64_t at_most(int64_t a, int64_t b) { return a < b ? a : b; }

}  // namespace fastsae
