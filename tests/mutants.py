"""Changes that must fail a test: one term of the screen's bound weakened, one clamp or tie rule turned. tests/mutate.py runs them.

Each mutant names its file, a text that occurs there once, what takes its place and the test that fails then. `slack` says why no test can:
the proof does not need the text there, because another term or a later check covers it; the runner leaves those out.
"""

# ruff: noqa: E501 (a mutant a line)

from __future__ import annotations

from typing import NamedTuple

ENGINE = "csrc/cpu/engine/"
BOUND, TILE, PACK_ISA, ROWS_ISA = ENGINE + "bound.h", ENGINE + "tile.isa.h", ENGINE + "pack.isa.cpp", ENGINE + "rows.isa.h"
DRIVER, ORDER, DENSE, TOPK_ISA = ENGINE + "driver.h", ENGINE + "order.h", ENGINE + "dense.h", ENGINE + "topk.isa.h"
LANES = ENGINE + "lanes.isa.h"
ENCODE, ENCODE_ISA, SPLINE_ISA = "csrc/cpu/encode.cpp", "csrc/cpu/encode.isa.cpp", "csrc/cpu/spline.isa.cpp"
MATCH, MATCH_ISA, HAMMING = "csrc/cpu/match.cpp", "csrc/cpu/match.isa.cpp", "csrc/cpu/hamming.cpp"
ADAM_ISA, DECODE_ISA, SIGNS_ISA = "csrc/cpu/adam.isa.cpp", "csrc/cpu/decode.isa.cpp", "csrc/cpu/signs.isa.cpp"
TRITON, OPS, REFERENCE = "kernels/_tile.py", "fastsae/ops/encode.py", "fastsae/reference.py"

HALF_WIDTH = "tests/native/test_bound.py::test_the_half_width_is_that_of_the_proof"
HANDLE = "tests/native/test_bound.py::test_norms_and_losses_of_a_handle"
LARGEST_NORM = "tests/native/test_bound.py::test_norms_at_the_largest_that_is_screened"
TOO_LONG = "tests/native/test_bound.py::test_rows_too_long_for_the_sums_are_not_screened"
LARGEST_SUMS = "tests/native/test_bound.py::test_sums_of_the_largest_integers"
PAIR = "tests/native/test_bound.py::test_a_pair_in_one_pass_has_the_bits_of_three"
EDGES = "tests/native/test_bound.py::test_what_the_ends_leave_to_ties"
ORACLE = "tests/contract/test_oracle.py::test_every_operation_has_the_bits_of_the_oracle"
REFERENCES = "tests/contract/test_oracle.py::test_references_select_as_the_oracle"
FACTORS = "interpreted tests/gpu/test_tiles.py::test_the_factors_are_those_of_the_proof"
KEYS = "interpreted tests/gpu/test_tiles.py::test_keys_keep_the_order_of_values"

FACTOR_A = "(loss + (q + 0x1p-22f) * x + g * norm) * (1 + 0x1p-20f)"
FACTOR_C = "x * (1 + q + 0x1p-22f) * (1 + 0x1p-20f)"
COVERED = "(7) multiplies each norm and loss by 1 + (D + 72) 2u, of which their own rounding takes (D / 16 + 10) u at most: 100 u are left"


class Mutant(NamedTuple):
    path: str
    old: str
    new: str
    test: str = ""
    slack: str = ""
    sees: str = ""  # the one source that has to be compiled anew for the test; else all that include `path`


MUTANTS = [
    # ---- the CPU's bound: E = |w| (l(x) + q X + g |x|) + l(w) (X + q X) + U
    Mutant(BOUND, FACTOR_A, "(loss + (q + 0x1p-22f) * x) * (1 + 0x1p-20f)", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, FACTOR_A, "((q + 0x1p-22f) * x + g * norm) * (1 + 0x1p-20f)", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, FACTOR_A, "(loss + 0x1p-22f * x + g * norm) * (1 + 0x1p-20f)", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, FACTOR_A, "(loss + q * x + g * norm) * (1 + 0x1p-20f)", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, FACTOR_A, "(loss + (q + 0x1p-22f) * x + g * norm)", slack=COVERED),
    Mutant(BOUND, FACTOR_C, "norm * (1 + q + 0x1p-22f) * (1 + 0x1p-20f)", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, FACTOR_C, "0", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, FACTOR_C, "x * (1 + 0x1p-22f) * (1 + 0x1p-20f)", slack=COVERED + "; q is 4 u, or for bf16 less than (D + 8) 2u"),
    Mutant(BOUND, FACTOR_C, "x * (1 + q) * (1 + 0x1p-20f)", slack=COVERED),
    Mutant(BOUND, FACTOR_C, "x * (1 + q + 0x1p-22f)", slack=COVERED),
    Mutant(BOUND, "const float x = norm + loss;", "const float x = norm;", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "ScreenFormat::int8 ? 4 * kUnit", "ScreenFormat::int8 ? 0", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "1.01f * additions * 2 * kUnit", "1.01f * additions * kUnit", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "at_most(d + 1, kScreenBlock) + ceil_div(d", "ceil_div(d", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "ceil_div(d, kScreenBlock) + 3)", "1)", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "at_most(vectors, kScoreBlock / 16) + blocks + 5", "blocks + 5", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "kScoreBlock / 16) + blocks + 5", "kScoreBlock / 16) + 1", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "const float g = 1.01f * ", "const float g = ", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "(1.0f + static_cast<float>(d + 72) * 2 * kUnit)", "1.0f", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, " + __builtin_sqrtf(static_cast<float>(d)) * 0x1p-62f", "", HALF_WIDTH, sees=PACK_ISA),
    Mutant(BOUND, "if (!(squares <= 3e38f)) return __builtin_inff();", "", slack="the callers' norm <= kHugeNorm is false for inf and NaN as well"),
    Mutant(BOUND, "kHugeNorm = 1e18f", "kHugeNorm = 1e19f", LARGEST_NORM, sees=PACK_ISA),
    Mutant(TILE, "fma(c, loss[h], floor[h])", "mul(c, loss[h])", HALF_WIDTH, sees=ENCODE_ISA),
    Mutant(TILE, "fma(c, loss[h], floor[h])", "floor[h]", HALF_WIDTH, sees=ENCODE_ISA),
    Mutant(TILE, "score(h, sub(r, e))", "score(h, r)", ORACLE, sees=ENCODE_ISA),
    Mutant(TILE, "score(h, add(r, e))", "score(h, r)", ORACLE, sees=ENCODE_ISA),
    Mutant(TILE, "(1u << left) - 1u", "~0u", ORACLE, sees=ENCODE_ISA),
    Mutant(PACK_ISA, " + 1.02f * stages * kUnit * norm", "", HANDLE),
    Mutant(PACK_ISA, "rotation == 64 ? 0.125f", "rotation == 64 ? 0.0625f", HANDLE),
    Mutant(PACK_ISA, "rotation == 256 ? 0.0625f", "rotation == 256 ? 0.03125f", HANDLE),
    Mutant(PACK_ISA, "lost = fma(e, e, lost);", "", HALF_WIDTH),
    Mutant(PACK_ISA, "usable && loss <= kHugeNorm}", "usable}", slack="l(x) <= 2 |x| + sqrt(D) 2^-62: where |x| <= 1e18 no partial sum comes near 2^127"),
    Mutant(PACK_ISA, "const bool usable = norm <= kHugeNorm;", "const bool usable = true;", LARGEST_NORM),
    Mutant(PACK_ISA, "const bool usable = norm <= kHugeNorm && loss", "const bool usable = loss", LARGEST_NORM),
    Mutant(PACK_ISA, "set_feature(job, f, norm <= kHugeNorm && loss", "set_feature(job, f, loss", LARGEST_NORM),
    Mutant(PACK_ISA, "? -128 * total", "? -127 * total", LARGEST_SUMS),
    Mutant(PACK_ISA, "^= 0x80808080", "^= 0", LARGEST_SUMS),
    Mutant(PACK_ISA, "usable && !zero_row ? steps / most", "usable && !zero_row ? (steps + 1) / most", HANDLE),
    Mutant(PACK_ISA, "kWideSum = (1 << 24) - 1", "kWideSum = (1 << 24) + (1 << 21)", LARGEST_SUMS),
    Mutant(LANES, "_mm256_shufflelo_epi16(halves, 0xd8)", "halves", LARGEST_SUMS, sees=PACK_ISA),
    Mutant(PACK_ISA, "sums.largest = larger(sums.largest, magnitude(x));", "sums.largest = larger(sums.largest, x);", LARGEST_SUMS),
    Mutant(BOUND, "static_cast<float>(4 * d + 128) * 0x1p-126f + ", "", HALF_WIDTH, sees=ENCODE),
    Mutant(BOUND, "ScreenFormat::int8 ? 0x1p-94f", "ScreenFormat::int8 ? 0.0f", HALF_WIDTH, sees=ENCODE),
    Mutant(DRIVER, "norm[j] = std::copysign(norms[j], scale[j]);", "norm[j] = norms[j];", ORACLE),
    Mutant(DRIVER, "loss[j] = std::copysign(losses[j], scale[j]);", "loss[j] = losses[j];", ORACLE),
    Mutant(DRIVER, "floor[j] = std::copysign(underflow, scale[j]);", "floor[j] = underflow;", ORACLE),
    Mutant(BOUND, "kLongestRow = 65535", "kLongestRow = 65536", TOO_LONG),
    # ---- what an interval decides
    Mutant(TOPK_ISA, "not_below(v, broadcast(tau))", "not_at_most(v, broadcast(tau))", EDGES, sees=ENCODE_ISA),
    Mutant(TOPK_ISA, "not_below(v, broadcast(tau))", "at_least(v, broadcast(tau))", ORACLE, sees=ENCODE_ISA),
    Mutant(TOPK_ISA, "choose(is_nan(v), broadcast(-__builtin_inff()), v)", "v", slack="a NaN made here has its sign bit set and is below -inf; one passed on from scale or bias is the end of a NaN score, which ranks first"),
    Mutant(TOPK_ISA, "if (count >= k) {", "if (count > k) {", slack="tau is then a lower bound: more is scored, the same is kept"),
    Mutant(TOPK_ISA, "score < 0 ? 1 : 0", "0", ORACLE, sees=MATCH_ISA),
    Mutant(TOPK_ISA, "score = score + p.bias[at];", "", ORACLE, sees=ENCODE_ISA),
    Mutant(TOPK_ISA, "kAbsolute ? __builtin_fabsf(score) : score;", "score;", ORACLE, sees=ENCODE_ISA),
    Mutant(TILE, "larger_or_nan(Features<kScaled>::upper(h, r, e), negative(Features<kScaled>::lower(h, r, e)))", "Features<kScaled>::upper(h, r, e)", ORACLE, sees=ENCODE_ISA),
    Mutant(TILE, "larger_or_nan(Features<kScaled>::lower(h, r, e), negative(Features<kScaled>::upper(h, r, e)))", "upper(h, r, e)", ORACLE, sees=ENCODE_ISA),
    Mutant(TILE, "larger_or_nan(Features<kScaled>::lower(h, r, e), negative(Features<kScaled>::upper(h, r, e)))", "Features<kScaled>::lower(h, r, e)", slack="tau then rises more slowly: more is scored, the same is kept"),
    Mutant(LANES, "choose(is_nan(a), a, larger(a, b))", "larger(a, b)", slack="an upper end is NaN only where the lower one is infinite or NaN: both pass"),
    Mutant(ENCODE_ISA, "not_below(f.upper(0, r0, e0), tau)", "above(f.upper(0, r0, e0), tau)", ORACLE),
    Mutant(ENCODE_ISA, "not_below(f.upper(1, r1, e1), tau)", "not_below(f.lower(1, r1, e1), tau)", ORACLE),
    Mutant(ENCODE_ISA, "valid & not_below(v, broadcast(tau))", "valid & not_at_most(v, broadcast(tau))", EDGES),
    Mutant(ENCODE_ISA, "valid & not_below(v, broadcast(tau))", "valid & at_least(v, broadcast(tau))", ORACLE),
    Mutant(ENCODE_ISA, "at_least(v, broadcast(least))", "above(v, broadcast(least))", slack="what is put aside is looked at again"),
    Mutant(ENCODE_ISA, "most = choose(m, larger(", "most = choose(0xffff, larger(", ORACLE),
    Mutant(ENCODE_ISA, "scores[i] + 0.0f", "scores[i]", EDGES),
    Mutant(ENCODE_ISA, "score != score ? 0 : key", "key", ORACLE),
    Mutant(ENCODE_ISA, "better += all[j] < all[i]", "better += all[j] <= all[i]", ORACLE),
    Mutant(ENCODE_ISA, "not_at_most(upper, least) :", "above(upper, least) :", ORACLE),
    Mutant(ENCODE_ISA, ": not_below(upper, least);", ": not_at_most(upper, least);", EDGES),
    Mutant(ENCODE_ISA, "add(add(r0, e0), extra[0])", "add(r0, extra[0])", ORACLE),
    Mutant(ENCODE_ISA, "not_at_most(add(add(r1, e1), extra[1])", "above(add(add(r1, e1), extra[1])", EDGES),
    Mutant(SPLINE_ISA, "above(f.lower(0, r0, e0), none)", "at_least(f.lower(0, r0, e0), none)", ORACLE),
    Mutant(SPLINE_ISA, "not_at_most(f.upper(1, r1, e1), none)", "above(f.upper(1, r1, e1), none)", slack="an upper end is NaN only where the score is NaN or -inf, whose bit is 0"),
    Mutant(SPLINE_ISA, "maybe & ~on & f.exist", "maybe & ~on", ORACLE),
    Mutant(MATCH_ISA, "not_below(add(r0, e0), tau)", "not_below(r0, tau)", ORACLE),
    Mutant(MATCH_ISA, "m &= ~(1u << self);", "m &= ~0u;", ORACLE),
    Mutant(MATCH_ISA, "not_above(lo, low_tau)", "not_above(r, low_tau)", PAIR),
    Mutant(MATCH_ISA, "not_below(hi, smaller(tau, kth))", "not_below(hi, tau)", PAIR),
    # ---- order, ties, clamps
    Mutant(ORDER, "if (score != score) return 0;", "", ORACLE),
    Mutant(ORDER, "std::bit_cast<uint32_t>(score + 0.0f)", "std::bit_cast<uint32_t>(score)", EDGES),
    Mutant(ORDER, "values[row * k + i] = relu && score < 0 ? 0.0f : score;", "values[row * k + i] = score;", ORACLE),
    Mutant(ORDER, "if ((feature & 1) != 0) score = -score;", "", ORACLE),
    Mutant(DENSE, "(scores[j] < 0 ? 1 : 0)", "(scores[j] > 0 ? 1 : 0)", ORACLE),
    Mutant(DENSE, "(p.exclude_self && first + j == row)", "false", ORACLE),
    Mutant(DENSE, "if (worst == 0) above = INFINITY;", "", slack="a NaN lets all scores enter the list, where they lose"),
    Mutant(DENSE, "(!any && score < above)", "(!any && score <= above)", "tests/native/test_engine_hard.py::test_hard_inputs"),
    Mutant(ENCODE, "score > (theta < 0 ? 0.0f : theta)", "score >= (theta < 0 ? 0.0f : theta)", ORACLE),
    Mutant(ENCODE, "score > (theta < 0 ? 0.0f : theta)", "score > theta", ORACLE),
    Mutant(ENCODE, "std::fabs(score - theta) < half)", "std::fabs(score - theta) <= half)", ORACLE),
    Mutant(ENCODE, "active != 0 ? plain(score) : 0.0f", "plain(score)", ORACLE),
    Mutant(ENCODE, "least[f] = theta < 0 ? 0.0f : theta;", "least[f] = theta < 0 ? 1e-3f : theta;", ORACLE),
    Mutant(ENCODE, "theta - half_band - (std::fabs(theta) + half_band) * 0x1p-20f", "theta - half_band", EDGES),
    Mutant(ENCODE, "least[f] = std::min(least[f], FLT_MAX);", "", "tests/native/test_engine.py::test_a_nan_score_passes_an_infinite_threshold"),
    Mutant(ENCODE, "static_cast<int>(!(gate <= 0)) & static_cast<int>(!(score <= 0))", "static_cast<int>(gate > 0) & static_cast<int>(!(score <= 0))", ORACLE),
    Mutant(ENCODE, "static_cast<int>(!(gate <= 0)) & static_cast<int>(!(score <= 0))", "static_cast<int>(!(gate < 0)) & static_cast<int>(!(score <= 0))", ORACLE),
    Mutant(ENCODE, "if (score <= 0 || score < load_tau()) continue;", "if (score < 0 || score < load_tau()) continue;", ORACLE),
    Mutant(ENCODE, "if (score <= 0 || score < load_tau()) continue;", "if (score <= 0 || score <= load_tau()) continue;", EDGES),
    Mutant(ENCODE, "std::tie(key, row, feature) < std::tie(o.key, o.row, o.feature)", "std::tie(key, o.row, feature) < std::tie(o.key, row, o.feature)", ORACLE),
    Mutant(ENCODE, "std::tie(key, row, feature) < std::tie(o.key, o.row, o.feature)", "std::tie(key, row, o.feature) < std::tie(o.key, o.row, feature)", ORACLE),
    Mutant(ENCODE, "raise_to(worst != worst ? INFINITY : worst);", "raise_to(INFINITY);", ORACLE),
    Mutant(MATCH, "for (; at > 0 && list[at - 1].key > key; --at)", "for (; at > 0 && list[at - 1].key >= key; --at)", ORACLE),
    Mutant(MATCH, "entry(-similarity, u.id[i])", "entry(similarity, u.id[i])", ORACLE),
    Mutant(ROWS_ISA, "norm < least ? least : norm;", "norm > least ? norm : least;", slack="a NaN norm has a NaN element, which stays NaN by any divisor"),
    Mutant(ROWS_ISA, "squares >= 0x1p-80f && squares <= 0x1p126f", "squares == squares", ORACLE),
    Mutant(ROWS_ISA, "exponent < 254 ? 254 - exponent : 1", "254 - exponent", ORACLE),
    Mutant(HAMMING, "if (sizes[r] > k) std::nth_element(kept, kept + k - 1, kept + sizes[r]);", "", ORACLE),
    Mutant(HAMMING, "static_cast<uint64_t>(j + c + found[f]);", "static_cast<uint64_t>(0xffffffff - (j + c + found[f]));", ORACLE),
    Mutant(SIGNS_ISA, "uint64_t pack64(const boolean* z) {\n  const __m512i bytes", "uint64_t pack64(const boolean* z) {\n  const __m512i bytes = _mm512_set1_epi8(1), unused", ORACLE),
    # ---- sums in the documented order, and the optimisers' clamps
    Mutant(DECODE_ISA, "total = add(total, add(add(a[0], a[1]), add(a[2], a[3])));", "total = add(total, add(add(a[0], a[2]), add(a[1], a[3])));", ORACLE),
    Mutant(DECODE_ISA, "narrow(reduce(total), out + s);", "narrow(reduce(total) + 0.0f * job.d, out + s + 0);", slack="the same value: shows that survivors are seen"),
    Mutant("csrc/cpu/decode.h", "kSlotBlock = 16", "kSlotBlock = 32", ORACLE),
    Mutant(BOUND, "kScoreBlock = 4096", "kScoreBlock = 8192", ORACLE),
    Mutant("csrc/cpu/adam.cpp", "job.from_m = 1 - o.beta1 < 0.5;", "job.from_m = 1 - o.beta1 <= 0.5;", ORACLE),
    Mutant(ADAM_ISA, "from_b(!(__builtin_fabsf(s) < 0.5f))", "from_b(!(__builtin_fabsf(s) <= 0.5f))", ORACLE),
    Mutant(ADAM_ISA, "  if (norm < 1e-8f) return;", "", ORACLE),
    Mutant(ADAM_ISA, "norm < 1e-8f ? 1.0f : 1.0f / norm", "1.0f / norm", ORACLE),
    Mutant(ADAM_ISA, "if (kProject) gi = both(fma(load(minus_along + f), wi, gi), load(c.touched + f));", "if (kProject) gi = fma(load(minus_along + f), wi, gi);", ORACLE),
    Mutant("csrc/cpu/keys.h", "k0 += 0x9E3779B9;", "k0 += 0x9E3779B8;", ORACLE),
    # ---- the Triton engine's bound
    Mutant(TRITON, " + (g + 1.9073486328125e-06) * norm)", " + 1.9073486328125e-06 * norm)", FACTORS),
    Mutant(TRITON, "norm_factor = (loss + (q", "norm_factor = ((q", FACTORS),
    Mutant(TRITON, "(loss + (q + 1.9073486328125e-06) * reach", "(loss + 1.9073486328125e-06 * reach", FACTORS),
    Mutant(TRITON, "(loss + (q + 1.9073486328125e-06) * reach", "(loss + q * reach", FACTORS),
    Mutant(TRITON, "(g + 1.9073486328125e-06) * norm", "g * norm", FACTORS),
    Mutant(TRITON, "* norm) * 1.00000095367431640625", "* norm)", slack=COVERED),
    Mutant(TRITON, "reach = norm + loss", "reach = norm", FACTORS),
    Mutant(TRITON, "loss_factor = reach * (1.0 + q", "loss_factor = reach * (1.0", slack="q is 1.5 (D + 64) 2u: (7) leaves 2 (D + 72) 2u in c l(w)"),
    Mutant(TRITON, "(n + 1) * 2.0**-f + 2.0**-23", "(n + 1) * 2.0**-f", FACTORS),
    Mutant(TRITON, "(n + 1) * 2.0**-f + 2.0**-23", "2.0**-f + 2.0**-23", FACTORS),
    Mutant(TRITON, "q = s * (width + 64.0)", "q = s * width", FACTORS),
    Mutant(TRITON, "tl.cast((D + 127) // 128, tl.float32) + 10.0)", "tl.cast((D + 127) // 128, tl.float32))", FACTORS),
    Mutant(TRITON, "relative = 1.0 + (width + 72.0) * 1.1920928955078125e-07", "relative = 1.0", FACTORS),
    Mutant(TRITON, "absolute = tl.sqrt_rn(width) * 2.168404344971009e-19", "absolute = 0.0 * width", FACTORS),
    Mutant(TRITON, "a * norm + (c * loss + floor)", "a * norm + c * loss", FACTORS),
    Mutant(TRITON, "a * norm + (c * loss + floor)", "a * norm + floor", FACTORS),
    Mutant(TRITON, "e = tl.where((tl.load(scale + f, mask=inside, other=0) < 0)[None, :], -e, e)", "e = e", FACTORS),
    Mutant(TRITON, "norm = tl.where(squares <= 1e36, tl.sqrt_rn(squares)", "norm = tl.where(squares <= 1e38, tl.sqrt_rn(squares)", FACTORS),
    Mutant(TRITON, "tl.where(value != value, 0x7FFFFFFF, key)", "key", KEYS),
    Mutant(TRITON, "bits = tl.where(value == 0, 0.0, value)", "bits = tl.where(value != value, 0.0, value)", KEYS),
    # ---- selections of the references
    Mutant(REFERENCE, "same = (values[:, 1:] == values[:, :-1]) | values[:, 1:].isnan()", "same = values[:, 1:] == values[:, :-1]", REFERENCES),
    Mutant(REFERENCE, "s[rows].sort(dim=1, descending=True, stable=True)", "s[rows].flip(1).sort(dim=1, descending=True, stable=True)", REFERENCES),
    Mutant(REFERENCE, "values, indices = s.topk(min(k + 1, n), dim=1)", "values, indices = s.topk(k, dim=1)", REFERENCES),
    Mutant(OPS, "active = (s > theta.clamp_min(0)) | s.isnan()", "active = (s >= theta.clamp_min(0)) | s.isnan()", REFERENCES),
    Mutant(OPS, "active = (s > theta.clamp_min(0)) | s.isnan()", "active = (s > theta) | s.isnan()", REFERENCES),
    Mutant(OPS, "active = (s > theta.clamp_min(0)) | s.isnan()", "active = s > theta.clamp_min(0)", REFERENCES),
    Mutant(OPS, "keep = ~(new < least)", "keep = new > least", REFERENCES),
    Mutant(OPS, "((s > floor.clamp_min(0)) | (s.isnan()", "((s >= floor.clamp_min(0)) | (s.isnan()", REFERENCES),
]  # fmt: skip
