// Encode: exact scores (every level), and the certified screening of a top-k (levels with bf16 dot products). encode.h states the jobs,
// fastsae.h the order of a score's sum, engine.h the bound.
#include "cpu/encode.h"

#include "vec.h"
#ifdef FASTSAE_LEVEL_avx512_bf16
#include "cpu/engine.h"
#endif

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

FASTSAE_INLINE int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

void centre(const CentreJob& job, int64_t rows) {
  for (int64_t r = 0; r < rows; ++r) {
    const float* const x = job.x + r * job.stride_row;
    float* const to = job.to + r * job.padded;
    for (int64_t d = 0; d < job.d; ++d) to[d] = x[d * job.stride_d];
    if (job.b_pre != nullptr)
      for (int64_t d = 0; d < job.d; ++d) to[d] = to[d] - job.b_pre[d];
    for (int64_t d = job.d; d < job.padded; ++d) to[d] = 0;
  }
}

// ---- exact scores ----

#if defined(__AVX512F__)
constexpr int kDotRows = 4, kDotFeatures = 4;
#else
constexpr int kDotRows = 2, kDotFeatures = 2;
#endif

// R x C products at a time, each with its own accumulator of 16 lanes.
template <int R, int C>
FASTSAE_INLINE void dot_tile(const float* const* x, const float* const* w, int64_t d, Vec (&sum)[R * C]) {
  Vec total[R * C];
  int64_t i = 0;
  do {
    const int64_t end = least(i + kScoreBlock, d);
    const bool first = i == 0;
#pragma GCC unroll 16
    for (int a = 0; a < R * C; ++a) sum[a] = zero();
    for (; i + kLanes <= end; i += kLanes) {
      Vec wv[C];
#pragma GCC unroll 4
      for (int b = 0; b < C; ++b) wv[b] = load(w[b] + i);
#pragma GCC unroll 4
      for (int a = 0; a < R; ++a) {
        const Vec xv = load(x[a] + i);
#pragma GCC unroll 4
        for (int b = 0; b < C; ++b) sum[a * C + b] = fma(xv, wv[b], sum[a * C + b]);
      }
    }
    if (i < end) {
      const int n = static_cast<int>(end - i);
      for (int a = 0; a < R; ++a)
        for (int b = 0; b < C; ++b) sum[a * C + b] = fma(load_part(x[a] + i, n), load_part(w[b] + i, n), sum[a * C + b]);
      i = end;
    }
    if (first && i < d)
      for (int a = 0; a < R * C; ++a) total[a] = sum[a];
    else if (!first)
      for (int a = 0; a < R * C; ++a) sum[a] = total[a] = add(total[a], sum[a]);
  } while (i < d);
}

// Sixteen sums at once, in the order of reduce(): lanes fold 8, 4, 2, 1.
FASTSAE_INLINE Vec reduce16(Vec (&v)[16]) {
  transpose(v);
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i) v[i] = add(v[i], v[i + n]);
  return v[0];
}

template <int R, int C>
FASTSAE_INLINE void store_tile(Vec (&sum)[R * C], float* out, int64_t ld) {
  if constexpr (R * C == 16) {
    float flat[16];
    store(static_cast<float*>(flat), reduce16(sum));
    for (int a = 0; a < R; ++a)
      for (int b = 0; b < C; ++b) out[a * ld + b] = flat[a * C + b];
  } else {
    for (int a = 0; a < R; ++a)
      for (int b = 0; b < C; ++b) out[a * ld + b] = reduce(sum[a * C + b]);
  }
}

template <int R>
void products_of(const float* const* x, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld) {
  int64_t f = 0;
  for (; f + kDotFeatures <= features; f += kDotFeatures) {
    Vec sum[R * kDotFeatures];
    dot_tile<R, kDotFeatures>(x, w + f, d, sum);
    store_tile<R, kDotFeatures>(sum, out + f, ld);
  }
  for (; f < features; ++f) {
    Vec sum[R];
    dot_tile<R, 1>(x, w + f, d, sum);
    store_tile<R, 1>(sum, out + f, ld);
  }
}

void products(const float* const* x, int64_t rows, const float* const* w, int64_t features, int64_t d, float* out, int64_t ld) {
  if (d == 0) {
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t f = 0; f < features; ++f) out[r * ld + f] = 0;
    return;
  }
  int64_t r = 0;
  for (; r + kDotRows <= rows; r += kDotRows) products_of<kDotRows>(x + r, w, features, d, out + r * ld, ld);
  for (; r < rows; ++r) products_of<1>(x + r, w, features, d, out + r * ld, ld);
}

// Rows of the matrix often lie a multiple of a page apart, so their lines compete for the same few places in every cache: they are copied
// row by row, never more than a few rows ahead, to a small block that is transposed from there.
void transpose_columns(const TransposeJob& job) {
  constexpr int64_t kWide = 256, kStride = kWide + 16, kAhead = 4;
  alignas(64) float block[kLanes * kStride];
  for (int64_t f0 = 0; f0 < job.features; f0 += kWide) {
    const int64_t width = least(kWide, job.features - f0);
    const auto row = [&](int64_t d) { return job.w + d * job.stride_d + f0; };
    for (int64_t d0 = 0; d0 < job.padded; d0 += kLanes) {
      for (int64_t i = 0; i < kLanes; ++i) {
        float* const to = block + i * kStride;
        const int64_t d = d0 + i;
        if (d >= job.d) {
          for (int64_t f = 0; f < width; f += kLanes) store(to + f, zero());
          continue;
        }
        if (d + kAhead < job.d)
          for (int64_t f = 0; f < width; f += kLanes) prefetch(row(d + kAhead) + f);
        int64_t f = 0;
        for (; f + kLanes <= width; f += kLanes) store(to + f, load(row(d) + f));
        if (f < width) store(to + f, load_part(row(d) + f, static_cast<int>(width - f)));
      }
      for (int64_t f = 0; f < width; f += kLanes) {
        Vec v[kLanes];
        for (int i = 0; i < kLanes; ++i) v[i] = load(static_cast<const float*>(block) + i * kStride + f);
        transpose(v);
        const int64_t n = least(kLanes, width - f);
        for (int64_t i = 0; i < n; ++i) store(job.to + (f0 + f + i) * job.stride + d0, v[i]);
      }
    }
  }
}

// The sixteen lanes of a score are sixteen rows of accumulators here, a float a feature: the same additions in the same order. W is read
// along its rows, a few at a time so that an accumulator is loaded and stored once for them.
template <int N>
FASTSAE_INLINE void add_rows(const ColumnsJob& job, int64_t d, float* const* sums) {
  for (int64_t f = 0; f < job.features; f += kLanes) {
    const int64_t left = job.features - f;
    Vec w[N];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i) {
      const float* const from = job.w + (d + i) * job.stride_d + f;
      w[i] = left >= kLanes ? load(from) : load_part(from, static_cast<int>(left));
    }
    for (int r = 0; r < job.rows; ++r)
#pragma GCC unroll 4
      for (int i = 0; i < N; ++i) {
        float* const at = sums[r] + ((d + i) % kLanes) * job.ld + f;
        store(at, fma(broadcast(job.x[r][d + i]), w[i], load(static_cast<const float*>(at))));
      }
  }
}

void column_products(const ColumnsJob& job) {
  const int64_t size = kLanes * job.ld, width = (job.features + kLanes - 1) / kLanes * kLanes;
  float* sums[kColumnRows];
  for (int r = 0; r < job.rows; ++r) sums[r] = job.sums + r * size;
  for (int64_t d0 = 0; d0 < job.d; d0 += kScoreBlock) {
    const int64_t end = least(d0 + kScoreBlock, job.d);
    for (int64_t i = 0; i < job.rows * size; i += kLanes) store(job.sums + i, zero());
    int64_t d = d0;
    for (; d + 4 <= end; d += 4) add_rows<4>(job, d, sums);
    for (; d < end; ++d) add_rows<1>(job, d, sums);
    if (job.d <= kScoreBlock) break;
    for (int64_t i = 0; i < job.rows * size; i += kLanes) {
      const Vec part = load(static_cast<const float*>(job.sums) + i);
      store(job.totals + i, d0 == 0 ? part : add(load(static_cast<const float*>(job.totals) + i), part));
    }
  }
  const float* const totals = job.d <= kScoreBlock ? job.sums : job.totals;
  for (int64_t r = 0; r < job.rows; ++r)
    for (int64_t f = 0; f < width; f += kLanes) {
      Vec sum[kLanes];
      for (int l = 0; l < kLanes; ++l) sum[l] = load(totals + r * size + l * job.ld + f);
      for (int n = kLanes / 2; n > 0; n /= 2)
        for (int l = 0; l < n; ++l) sum[l] = add(sum[l], sum[l + n]);
      store(job.out + r * job.ld + f, sum[0]);
    }
}

#ifdef FASTSAE_LEVEL_avx512_bf16

// ---- packing ----

// 32 elements to 16 pairs, in order; adds their squares and the squares of what rounding took away.
FASTSAE_INLINE __m512i round_pairs(__m512 v0, __m512 v1, __m512& squares, __m512& lost) {
  const __m512i p = (__m512i)_mm512_cvtne2ps_pbh(v1, v0);
  const __m512 h0 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_castsi512_si256(p)), 16));
  const __m512 h1 = _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm512_extracti64x4_epi64(p, 1)), 16));
  const __m512 e0 = _mm512_sub_ps(v0, h0), e1 = _mm512_sub_ps(v1, h1);
  squares = _mm512_fmadd_ps(v1, v1, _mm512_fmadd_ps(v0, v0, squares));
  lost = _mm512_fmadd_ps(e1, e1, _mm512_fmadd_ps(e0, e0, lost));
  return p;
}

void pack_rows(const RowsJob& job) {
  const int64_t d2 = (job.d + 1) / 2;
  for (int i = 0; i < job.height; ++i) {
    const float* const x = job.xc + i * job.padded;
    __m512 squares = _mm512_setzero_ps(), lost = squares;
    for (int64_t p = 0; p < d2; p += 16) {
      alignas(64) uint32_t out[16];
      _mm512_store_si512(out, round_pairs(_mm512_loadu_ps(x + 2 * p), _mm512_loadu_ps(x + 2 * p + 16), squares, lost));
      const int64_t n = at_most(16, d2 - p);
      for (int64_t j = 0; j < n; ++j) job.pairs[(p + j) * job.height + i] = out[j];
    }
    const float norm = norm_above(reduce({squares}), job.d), loss = norm_above(reduce({lost}), job.d);
    if (norm <= kHugeNorm && loss <= kHugeNorm) {
      const RowFactors factors = row_factors(norm, loss, job.d);
      job.a[i] = factors.a;
      job.c[i] = factors.c;
    } else {
      job.a[i] = job.c[i] = 0;
      job.exact[i] = 1;
      for (int64_t p = 0; p < d2; ++p) job.pairs[p * job.height + i] = 0;
    }
  }
}

FASTSAE_INLINE void set_norms(const PanelsJob& job, int64_t f, float squares, float lost) {
  float norm = norm_above(squares, job.d), loss = norm_above(lost, job.d);
  if (!(norm <= kHugeNorm && loss <= kHugeNorm)) norm = loss = __builtin_inff();
  job.norm[f] = norm;
  job.loss[f] = loss;
}

// Each feature is rounded along its row, then blocks of 16 features x 16 pairs are transposed.
void pack_panels(const PanelsJob& job) {
  const int64_t d2 = (job.d + 1) / 2, ld = (d2 + 15) / 16 * 16 + 16;
  for (int64_t g = 0; g < static_cast<int64_t>(job.panels) * 2; ++g) {
    for (int64_t j = 0; j < 16; ++j) {
      const int64_t f = g * 16 + j;
      uint32_t* const to = job.scratch + j * ld;
      __m512 squares = _mm512_setzero_ps(), lost = squares;
      if (f < job.features) {
        const float* const w = job.w + f * job.stride_f;
        int64_t d = 0;
        for (; d + 32 <= job.d; d += 32)
          _mm512_storeu_si512(to + d / 2, round_pairs(_mm512_loadu_ps(w + d), _mm512_loadu_ps(w + d + 16), squares, lost));
        if (d < job.d) {
          const int n = static_cast<int>(job.d - d);
          const __m512 v0 = _mm512_maskz_loadu_ps(first(n < 16 ? n : 16), w + d);
          const __m512 v1 = n > 16 ? _mm512_maskz_loadu_ps(first(n - 16), w + d + 16) : _mm512_setzero_ps();
          _mm512_storeu_si512(to + d / 2, round_pairs(v0, v1, squares, lost));
        }
        set_norms(job, f, reduce({squares}), reduce({lost}));
      } else {
        for (int64_t p = 0; p < d2; p += 16) _mm512_storeu_si512(to + p, _mm512_setzero_si512());
        job.norm[f] = job.loss[f] = 0;
      }
    }
    uint32_t* const panel = job.data + g / 2 * d2 * kPanelWidth + g % 2 * 16;
    for (int64_t p = 0; p < d2; p += 16) {
      Vec block[16];
      for (int j = 0; j < 16; ++j) block[j].x = _mm512_castsi512_ps(_mm512_loadu_si512(job.scratch + j * ld + p));
      transpose(block);
      const int n = static_cast<int>(at_most(16, d2 - p));
      for (int j = 0; j < n; ++j) _mm512_store_si512(panel + (p + j) * kPanelWidth, _mm512_castps_si512(block[j].x));
    }
  }
}

// ---- top-k ----

constexpr int32_t kMinusInfinity = static_cast<int32_t>(0xff800000u);

FASTSAE_INLINE float from_bits32(int32_t bits) { return as_float(static_cast<uint32_t>(bits)); }
FASTSAE_INLINE int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }  // its own inverse
FASTSAE_INLINE __m512i ordered(__m512i bits) {
  return _mm512_xor_si512(bits, _mm512_and_si512(_mm512_srai_epi32(bits, 31), _mm512_set1_epi32(0x7fffffff)));
}

// A number t with at least k of the n values not below t: the k-th largest. NaN counts as -inf. 0 < k <= n.
float kth_largest(const float* values, int64_t n, int64_t k) {
  const int64_t bottom = ordered(kMinusInfinity);
  const auto key = [&](int64_t i) {
    const __mmask16 m = n - i >= 16 ? static_cast<__mmask16>(0xffff) : first(static_cast<int>(n - i));
    const __m512 v = _mm512_mask_loadu_ps(_mm512_set1_ps(-__builtin_inff()), m, values + i);
    return ordered(_mm512_castps_si512(_mm512_mask_mov_ps(v, _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q), _mm512_set1_ps(-__builtin_inff()))));
  };
  __m512i high_v = _mm512_set1_epi32(INT32_MIN), low_v = _mm512_set1_epi32(0x7fffffff);
  for (int64_t i = 0; i < n; i += 16) {
    high_v = _mm512_max_epi32(high_v, key(i));
    low_v = _mm512_min_epi32(low_v, key(i));
  }
  // Invariant: at least k keys >= low, fewer than k keys >= high. Padding lanes count as -inf, which only `low` may be.
  int64_t low = _mm512_reduce_min_epi32(low_v), high = static_cast<int64_t>(_mm512_reduce_max_epi32(high_v)) + 1;
  while (high - low > 1) {
    const int64_t mid = low + (high - low) / 2;
    const __m512i pivot = _mm512_set1_epi32(static_cast<int32_t>(mid));
    int64_t count = 0;
    for (int64_t i = 0; i < n; i += 16) count += __builtin_popcount(_mm512_cmpge_epi32_mask(key(i), pivot));
    if (count >= k) {
      low = mid;
      if (count == k) break;
    } else {
      high = mid;
    }
  }
  return low <= bottom ? -__builtin_inff() : from_bits32(ordered(static_cast<int32_t>(low)));
}

FASTSAE_INLINE float load_tau(const int32_t* tau) { return from_bits32(__atomic_load_n(tau, __ATOMIC_RELAXED)); }

// Never falls; what another worker sets in between stays if it is higher. Results do not depend on who was first: the last word is exact.
FASTSAE_INLINE void raise_tau(int32_t* tau, float to) {
  int32_t seen = __atomic_load_n(tau, __ATOMIC_RELAXED);
  while (from_bits32(seen) < to &&
         !__atomic_compare_exchange_n(tau, &seen, static_cast<int32_t>(as_bits(to)), true, __ATOMIC_RELAXED, __ATOMIC_RELAXED)) {
  }
}

// Copies the entries with !(value < tau), to the same place or another; their number. Writes up to 15 elements beyond them.
FASTSAE_INLINE int64_t keep_above(float tau, const float* value, const int32_t* id, const float* other, int64_t n, float* to_value,
                                  int32_t* to_id, float* to_other) {
  int64_t kept = 0;
  for (int64_t i = 0; i < n; i += 16) {
    const __mmask16 valid = n - i >= 16 ? static_cast<__mmask16>(0xffff) : first(static_cast<int>(n - i));
    const __m512 v = _mm512_loadu_ps(value + i);
    const __m512i f = _mm512_loadu_si512(id + i);
    const __mmask16 m = _mm512_mask_cmp_ps_mask(valid, v, _mm512_set1_ps(tau), _CMP_NLT_UQ);
    if (other != nullptr) _mm512_storeu_ps(to_other + kept, _mm512_maskz_compress_ps(m, _mm512_loadu_ps(other + i)));
    _mm512_storeu_ps(to_value + kept, _mm512_maskz_compress_ps(m, v));
    _mm512_storeu_si512(to_id + kept, _mm512_maskz_compress_epi32(m, f));
    kept += __builtin_popcount(m);
  }
  return kept;
}

constexpr int64_t kPatience = 4;  // tau is raised when k / kPatience scores are new

template <bool kScaled>
struct TopkConsumer {
  const TopkBuffer& buffer;
  const ScreenRows& rows;
  Features<kScaled> f;

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) { f.set(p, panel); }

  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]);
    const __m512 tau = _mm512_set1_ps(load_tau(buffer.tau + row));
    const __m512 e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const __mmask16 m0 = _mm512_cmp_ps_mask(f.upper(0, r0, e0), tau, _CMP_NLT_UQ);
    const __mmask16 m1 = _mm512_cmp_ps_mask(f.upper(1, r1, e1), tau, _CMP_NLT_UQ);
    const uint32_t m = _mm512_mask2int(m0) | (static_cast<uint32_t>(_mm512_mask2int(m1)) << 16);
    if (__builtin_expect(m != 0, 0)) append(row, m & f.exist, r0, r1, e0, e1);
  }

  __attribute__((noinline)) void append(int64_t row, uint32_t mask, __m512 r0, __m512 r1, __m512 e0, __m512 e1) {
    if (__atomic_load_n(buffer.exact + row, __ATOMIC_RELAXED) != 0) return;
    int64_t n = buffer.n[row];
    const __m512i lanes = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    for (int h = 0; h < 2; ++h) {
      const __mmask16 m = static_cast<__mmask16>(mask >> (16 * h));
      if (m == 0) continue;
      const __m512 r = h == 0 ? r0 : r1, e = h == 0 ? e0 : e1;
      const int64_t at = row * buffer.stride + n;
      _mm512_storeu_ps(buffer.lo + at, _mm512_maskz_compress_ps(m, f.lower(h, r, e)));
      _mm512_storeu_ps(buffer.hi + at, _mm512_maskz_compress_ps(m, f.upper(h, r, e)));
      _mm512_storeu_si512(buffer.id + at, _mm512_maskz_compress_epi32(
                                              m, _mm512_add_epi32(lanes, _mm512_set1_epi32(static_cast<int32_t>(f.first + 16 * h)))));
      n += __builtin_popcount(m);
    }
    buffer.n[row] = static_cast<int32_t>(n);
  }
};

FASTSAE_INLINE void lock_row(uint8_t* lock) {
  while (__atomic_exchange_n(lock, 1, __ATOMIC_ACQUIRE) != 0) _mm_pause();
}
FASTSAE_INLINE void unlock_row(uint8_t* lock) { __atomic_store_n(lock, 0, __ATOMIC_RELEASE); }

// The scores of a block's undecided features, while its weights are in the cache. Their exact values also make the best tau.
struct Scorer {
  const ScoreJob& job;
  const ScreenPanels& p;
  const TopkBuffer& buffer;
  static constexpr int kAtOnce = 4;
  const float* x[kAtOnce];
  const float* w[kAtOnce];
  int64_t place[kAtOnce];
  int held = 0;

  // N independent products: one chain alone would wait for its own last addition.
  template <int N>
  FASTSAE_INLINE void score() {
    Vec sum[N], total[N];
    int64_t i = 0;
    do {
      const int64_t end = at_most(i + kScoreBlock, job.d);
      const bool first = i == 0;
#pragma GCC unroll 4
      for (int a = 0; a < N; ++a) sum[a] = zero();
      for (; i + kLanes <= end; i += kLanes)
#pragma GCC unroll 4
        for (int a = 0; a < N; ++a) sum[a] = fma(load(x[a] + i), load(w[a] + i), sum[a]);
      if (i < end) {
        const int n = static_cast<int>(end - i);
        for (int a = 0; a < N; ++a) sum[a] = fma(load_part(x[a] + i, n), load_part(w[a] + i, n), sum[a]);
        i = end;
      }
      for (int a = 0; a < N; ++a) total[a] = first ? sum[a] : add(total[a], sum[a]);
    } while (i < job.d);
    for (int a = 0; a < N; ++a) {
      const int64_t at = buffer.id[place[a]] - p.first;
      float score = reduce(total[a]);
      if (p.scale != nullptr) score = score * p.scale[at];
      score = score + p.bias[at];
      buffer.hi[place[a]] = score;
    }
  }

  FASTSAE_INLINE void add_entry(int64_t row, int64_t at) {
    place[held] = at;
    x[held] = job.xc + row * job.padded;
    w[held] = job.w + (buffer.id[at] - p.first) * job.stride_f;
    if (++held == kAtOnce) {
      score<kAtOnce>();
      held = 0;
    }
  }

  void finish() {
    if (held == 3) score<3>();
    if (held == 2) score<2>();
    if (held == 1) score<1>();
  }

  // Scores what is left of a row's undecided features after another look at tau; with many of them, after a better tau.
  FASTSAE_INLINE void row(int64_t row) {
    const int64_t base = row * buffer.stride;
    float* const lo = buffer.lo + base;
    float* const hi = buffer.hi + base;
    int32_t* const id = buffer.id + base;
    int64_t n = keep_above(load_tau(buffer.tau + row), hi, id, lo, buffer.n[row], hi, id, lo);
    constexpr int64_t kMany = 8;
    if (n >= kMany) {
      const int64_t kept_base = row * buffer.kept_stride;
      lock_row(buffer.lock + row);
      const int64_t kept = buffer.kept[row];
      __builtin_memcpy(buffer.room, buffer.score + kept_base, static_cast<size_t>(kept) * sizeof(float));
      unlock_row(buffer.lock + row);
      __builtin_memcpy(buffer.room + kept, lo, static_cast<size_t>(n) * sizeof(float));
      if (kept + n >= buffer.k) {
        raise_tau(buffer.tau + row, kth_largest(buffer.room, kept + n, buffer.k));
        n = keep_above(load_tau(buffer.tau + row), hi, id, lo, n, hi, id, lo);
      }
    }
    for (int64_t i = 0; i < n; ++i) add_entry(row, base + i);
    *buffer.scored += n;
    buffer.n[row] = static_cast<int32_t>(n);
  }

  // Scored features to the entries that all workers share.
  FASTSAE_INLINE void share(int64_t row) {
    const int64_t base = row * buffer.stride, kept_base = row * buffer.kept_stride;
    const int64_t n = buffer.n[row];
    buffer.n[row] = 0;
    float* const score = buffer.score + kept_base;
    int32_t* const feature = buffer.feature + kept_base;
    lock_row(buffer.lock + row);
    int64_t kept = buffer.kept[row];
    if (kept + n > buffer.capacity) kept = raise(row, kept);
    if (kept + n > buffer.capacity) {
      __atomic_store_n(buffer.exact + row, 1, __ATOMIC_RELAXED);
      raise_tau(buffer.tau + row, __builtin_inff());
      kept = 0;
    } else {
      kept += keep_above(load_tau(buffer.tau + row), buffer.hi + base, buffer.id + base, nullptr, n, score + kept, feature + kept, nullptr);
      buffer.fresh[row] += static_cast<int32_t>(n);
      if (buffer.fresh[row] > buffer.k / kPatience && kept >= buffer.k) kept = raise(row, kept);
    }
    buffer.kept[row] = static_cast<int32_t>(kept);
    unlock_row(buffer.lock + row);
  }

  int64_t raise(int64_t row, int64_t kept) {
    float* const score = buffer.score + row * buffer.kept_stride;
    int32_t* const feature = buffer.feature + row * buffer.kept_stride;
    if (kept >= buffer.k) raise_tau(buffer.tau + row, kth_largest(score, kept, buffer.k));
    buffer.fresh[row] = 0;
    return keep_above(load_tau(buffer.tau + row), score, feature, nullptr, kept, score, feature, nullptr);
  }
};

template <bool kScaled>
void screen_topk_with(const ScreenRows& rows, const ScreenPanels& panels, const Ahead& next, const ScoreJob& job,
                      const TopkBuffer& buffer) {
  TopkConsumer<kScaled> consumer{buffer, rows, {}};
  run_block(rows, panels, next, consumer);
  Scorer scorer{job, panels, buffer, {}, {}, {}, 0};
  for (int64_t r = 0; r < rows.rows; ++r)
    if (buffer.n[r] != 0) scorer.row(r);
  scorer.finish();
  for (int64_t r = 0; r < rows.rows; ++r)
    if (buffer.n[r] != 0) scorer.share(r);
}

void screen_topk(const ScreenRows& rows, const ScreenPanels& panels, const Ahead& next, const ScoreJob& job, const TopkBuffer& buffer) {
  if (panels.scale != nullptr)
    screen_topk_with<true>(rows, panels, next, job, buffer);
  else
    screen_topk_with<false>(rows, panels, next, job, buffer);
}

int64_t finish_topk(const TopkBuffer& buffer, int64_t row) {
  float* const score = buffer.score + row * buffer.kept_stride;
  int32_t* const feature = buffer.feature + row * buffer.kept_stride;
  const int64_t kept = buffer.kept[row];
  const float tau = kept > buffer.k ? kth_largest(score, kept, buffer.k) : -__builtin_inff();
  return keep_above(tau, score, feature, nullptr, kept, score, feature, nullptr);
}

#endif

}  // namespace

extern const EncodeKernels encode_kernels;
const EncodeKernels encode_kernels = {
    centre,    transpose_columns, column_products, products,
#ifdef FASTSAE_LEVEL_avx512_bf16
    pack_rows, pack_panels,       screen_topk,     finish_topk,
#else
    nullptr, nullptr,           nullptr,         nullptr,
#endif
};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
