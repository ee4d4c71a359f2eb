/* What every native operation computes, once more: from SPEC and csrc/fastsae.h alone, one loop a sentence, in the documented order of
 * summation, so that results can be compared bit for bit. It shares no code with the kernels and is built without their flags. Inputs are
 * fp32 (widened by the caller), plain and contiguous; a function of a Python test calls each (tests/contract/oracle_problems.py). */
#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

typedef int64_t i64;

int fused = 1; /* 0: the portable level without an FMA instruction rounds the product first */
static float step(float a, float b, float sum) {
  if (fused) return fmaf(a, b, sum);
  float product = a * b;
  return product + sum;
}

static float fold(float* lane) { /* 16 lanes fold 8, 4, 2, 1 */
  for (int half = 8; half > 0; half /= 2)
    for (int i = 0; i < half; ++i) lane[i] += lane[i + half];
  return lane[0];
}

/* ---- the score's sum: lane l sums d with d mod 16 = l, blocks of 4096 ---- */
static float score_sum(const float* x, const float* w, i64 d) {
  float total[16] = {0};
  for (i64 block = 0; block < d; block += 4096) {
    float part[16] = {0};
    for (i64 i = block; i < d && i < block + 4096; ++i) part[i % 16] = step(x[i], w[i], part[i % 16]);
    for (int l = 0; l < 16; ++l) total[l] = block == 0 ? part[l] : total[l] + part[l];
  }
  return fold(total);
}

static void prepare(float* row, i64 d, const float* subtract, float eps) {
  for (i64 i = 0; subtract && i < d; ++i) row[i] -= subtract[i];
  if (eps <= 0) return;
  float squares = score_sum(row, row, d), unit = 1;
  if (!(squares >= ldexpf(1, -80) && squares <= ldexpf(1, 126))) { /* lost or infinite: by the power of two of the largest element */
    float largest = 0;
    for (i64 i = 0; i < d; ++i) largest = fabsf(row[i]) > largest ? fabsf(row[i]) : largest;
    if (isnormal(largest)) {
      unit = ldexpf(1, ilogbf(largest) == 127 ? -126 : -ilogbf(largest));
      for (i64 i = 0; i < d; ++i) row[i] *= unit;
      squares = score_sum(row, row, d);
    }
  }
  float norm = sqrtf(squares), least = eps * unit, divisor = norm < least ? least : norm;
  for (i64 i = 0; i < d; ++i) row[i] /= divisor;
}

/* out[r, j] = <row r of x, feature list[j]>; both centred or normalised first. */
void products(const float* x, i64 rows, const float* w, const int32_t* list, i64 n, i64 d, const float* subtract, float eps, float* out) {
  float* a = malloc((2 * d + 1) * sizeof(float));
  float* b = a + d;
  for (i64 r = 0; r < rows; ++r) {
    memcpy(a, x + r * d, d * sizeof(float));
    prepare(a, d, subtract, eps);
    for (i64 j = 0; j < n; ++j) {
      memcpy(b, w + (list ? list[j] : j) * d, d * sizeof(float));
      prepare(b, d, NULL, eps);
      out[r * n + j] = score_sum(a, b, d);
    }
  }
  free(a);
}

static float score_of(float product, const float* scale, const float* bias, i64 f) {
  if (scale) product = product * scale[f];
  if (bias) product = product + bias[f];
  return product;
}
static float plain(float v) { return isnan(v) ? NAN : v == 0 ? 0 : v; } /* one NaN, one zero */

/* ---- selection ---- */
typedef struct {
  float key, value;
  i64 row, feature;
} Item;
static int better_first(const void* p, const void* q) { /* NaN, then by score, then row, then feature */
  const Item* a = p;
  const Item* b = q;
  if (isnan(a->key) != isnan(b->key)) return isnan(a->key) ? -1 : 1;
  if (!isnan(a->key) && a->key != b->key) return a->key > b->key ? -1 : 1;
  if (a->row != b->row) return a->row < b->row ? -1 : 1;
  return a->feature < b->feature ? -1 : 1;
}

/* skip_self: feature r does not count for row r. */
void topk(const float* products, i64 rows, i64 n, const int32_t* list, const float* scale, const float* bias, i64 k, int relu, int absolute,
          int skip_self, float* values, i64* indices) {
  Item* items = malloc((n + 1) * sizeof(Item));
  for (i64 r = 0; r < rows; ++r) {
    i64 m = 0;
    for (i64 j = 0; j < n; ++j) {
      i64 f = list ? list[j] : j;
      if (skip_self && j == r) continue;
      float v = score_of(products[r * n + j], scale, bias, f);
      items[m++] = (Item){absolute ? fabsf(v) : v, v, r, f};
    }
    qsort(items, m, sizeof(Item), better_first);
    for (i64 i = 0; i < k; ++i) {
      values[r * k + i] = relu && items[i].value < 0 ? 0 : plain(items[i].value);
      indices[r * k + i] = items[i].feature;
    }
  }
  free(items);
}

/* Ragged results: entries in order, crow [rows + 1]; the number of entries is returned. */
i64 threshold(const float* products, i64 rows, i64 n, const int32_t* list, const float* scale, const float* bias, const float* theta,
              float half_band, float* values, i64* col, i64* crow, uint8_t* flags) {
  i64 m = 0;
  for (i64 r = crow[0] = 0; r < rows; crow[++r] = m)
    for (i64 j = 0; j < n; ++j) {
      i64 f = list ? list[j] : j;
      float v = score_of(products[r * n + j], scale, bias, f), cut = theta[f] < 0 ? 0 : theta[f];
      int above = v > cut || isnan(v), band = half_band >= 0 && fabsf(v - theta[f]) < half_band;
      if (!above && !band) continue;
      values[m] = above ? plain(v) : 0;
      col[m] = f;
      flags[m++] = (uint8_t)(above + 2 * band);
    }
  return m;
}

i64 gated(const float* products, i64 rows, i64 n, const float* b_gate, const float* stretch, const float* b_mag, float* values, i64* col,
          i64* crow) {
  i64 m = 0;
  for (i64 r = crow[0] = 0; r < rows; crow[++r] = m)
    for (i64 j = 0; j < n; ++j) {
      float gate = products[r * n + j] + b_gate[j], v = score_of(products[r * n + j], stretch, b_mag, j);
      if (gate <= 0 || v <= 0) continue;
      values[m] = plain(isnan(gate) ? gate : v);
      col[m++] = j;
    }
  return m;
}

i64 batch_topk(const float* products, i64 rows, i64 n, const int32_t* list, const float* scale, const float* bias, i64 total, float* values,
               i64* col, i64* crow, float* min_kept) {
  Item* items = malloc((rows * n + 1) * sizeof(Item));
  i64 m = 0;
  for (i64 r = 0; r < rows; ++r)
    for (i64 j = 0; j < n; ++j) {
      i64 f = list ? list[j] : j;
      float v = score_of(products[r * n + j], scale, bias, f);
      if (!(v <= 0)) items[m++] = (Item){v, v, r, f};
    }
  qsort(items, m, sizeof(Item), better_first);
  if (m > total) m = total;
  *min_kept = m ? plain(items[m - 1].value) : INFINITY;
  for (i64 i = 0; i < m; ++i) items[i].key = 0; /* now by row, then feature */
  qsort(items, m, sizeof(Item), better_first);
  memset(crow, 0, (rows + 1) * sizeof(i64));
  for (i64 i = 0; i < m; ++i) {
    values[i] = plain(items[i].value);
    col[i] = items[i].feature;
    ++crow[items[i].row + 1];
  }
  for (i64 r = 0; r < rows; ++r) crow[r + 1] += crow[r];
  free(items);
  return m;
}

/* ---- codes ---- */
void signs(const float* z, i64 rows, i64 n, const float* bias, const uint8_t* taking_part, uint64_t* words) {
  i64 w = (n + 63) / 64;
  memset(words, 0, rows * w * 8);
  for (i64 r = 0; r < rows; ++r)
    for (i64 j = 0; j < n; ++j)
      if (score_of(z[r * n + j], NULL, bias, j) > 0 && (!taking_part || taking_part[j])) words[r * w + j / 64] |= 1ull << j % 64;
}

static void philox(uint32_t c[4], uint32_t k0, uint32_t k1) { /* Philox4x32-10 */
  for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
    uint64_t a = 0xD2511F53ull * c[0], b = 0xCD9E8D57ull * c[2];
    uint32_t next[4] = {(uint32_t)(b >> 32) ^ c[1] ^ k0, (uint32_t)b, (uint32_t)(a >> 32) ^ c[3] ^ k1, (uint32_t)a};
    memcpy(c, next, sizeof next);
  }
}
void hash(const uint64_t* words, i64 rows, i64 n_words, const uint8_t* taking_part, uint32_t layer, uint64_t seed, int bits, uint64_t* out) {
  memset(out, 0, rows * (bits / 64) * 8);
  for (i64 r = 0; r < rows; ++r)
    for (i64 j = 0; j < 64 * n_words; ++j) {
      if (!(words[r * n_words + j / 64] >> j % 64 & 1) || (taking_part && !taking_part[j])) continue;
      uint32_t c[4] = {(uint32_t)j, layer, 0, 0};
      philox(c, (uint32_t)seed, (uint32_t)(seed >> 32));
      for (int half = 0; half < bits / 64; ++half) out[r * (bits / 64) + half] ^= c[2 * half] | (uint64_t)c[2 * half + 1] << 32;
    }
}
void hamming(const uint64_t* a, i64 n, const uint64_t* b, i64 m, i64 words, i64 k, int32_t* out, int32_t* distance, i64* index) {
  for (i64 i = 0; i < n; ++i) {
    for (i64 j = 0; j < m; ++j) {
      out[i * m + j] = 0;
      for (i64 w = 0; w < words; ++w)
        for (uint64_t left = a[i * words + w] ^ b[j * words + w]; left; left &= left - 1) ++out[i * m + j];
    }
    for (i64 s = 0; s < k; ++s) { /* the next one after the last, by distance, then index */
      i64 best = -1;
      for (i64 j = 0; j < m; ++j) {
        int32_t at = out[i * m + j];
        int after = s == 0 || at > distance[i * k + s - 1] || (at == distance[i * k + s - 1] && j > index[i * k + s - 1]);
        if (after && (best < 0 || at < out[i * m + best])) best = j;
      }
      distance[i * k + s] = out[i * m + best];
      index[i * k + s] = best;
    }
  }
}

/* ---- decode and its gradients; crow [rows + 1] always given ---- */
static float narrow(float x, int type) { /* the nearest number of fp32, bf16 (8 bits, from 2^-126) or fp16 (11 bits, from 2^-14); ties to even */
  int bits = type == 1 ? 8 : 11, least = type == 1 ? -126 : -14;
  if (type == 0 || x == 0 || !isfinite(x)) return x;
  double last = ldexp(1, (ilogb(x) > least ? ilogb(x) : least) - bits + 1), rounded = rint(x / last) * last;
  double beyond = type == 1 ? ldexp(1, 128) : 65536;
  return fabs(rounded) >= beyond ? copysignf(INFINITY, x) : (float)copysign(rounded, x);
}
static float sum_slots(const float* values, const i64* rows_of, const i64* order, i64 n, const float* table, i64 d, i64 at) {
  float total = 0;
  for (i64 block = 0; block < n || block == 0; block += 16) {
    float part = 0;
    for (i64 i = block; i < n && i < block + 16; ++i) part = step(values[order[i]], table[rows_of[order[i]] * d + at], part);
    total = block == 0 ? part : total + part;
  }
  return total;
}
void decode(const float* values, const i64* indices, const i64* crow, i64 rows, const float* w, i64 d, const float* bias, int type, float* y) {
  i64* order = malloc((crow[rows] + 1) * sizeof(i64));
  for (i64 i = 0; i < crow[rows]; ++i) order[i] = i;
  for (i64 r = 0; r < rows; ++r)
    for (i64 e = 0; e < d; ++e) {
      float total = sum_slots(values, indices, order + crow[r], crow[r + 1] - crow[r], w, d, e);
      y[r * d + e] = narrow(bias ? total + bias[e] : total, type);
    }
  free(order);
}
void dweight(const float* values, const i64* indices, const i64* crow, i64 rows, const float* grad, i64 d, i64 features, int type, float* out) {
  i64 n = crow[rows];
  i64* order = malloc((2 * n + 1) * sizeof(i64));
  i64* row = order + n;
  for (i64 r = 0; r < rows; ++r)
    for (i64 i = crow[r]; i < crow[r + 1]; ++i) row[i] = r;
  for (i64 f = 0; f < features; ++f) {
    i64 m = 0;
    for (i64 i = 0; i < n; ++i)
      if (indices[i] == f) order[m++] = i;
    for (i64 e = 0; e < d; ++e) out[f * d + e] = narrow(sum_slots(values, row, order, m, grad, d, e), type);
  }
  free(order);
}
/* Blocks of 256: four accumulators of 16 lanes, (a0 + a1) + (a2 + a3), folded at the end; term(i) is a[i] * b[i]. */
static float dot(const float* a, const float* b, i64 d) {
  float total[16] = {0};
  for (i64 block = 0; block < d; block += 256) {
    float part[4][16] = {{0}};
    for (i64 i = block; i < d && i < block + 256; ++i) part[i / 16 % 4][i % 16] = step(a[i], b[i], part[i / 16 % 4][i % 16]);
    for (int l = 0; l < 16; ++l) total[l] += (part[0][l] + part[1][l]) + (part[2][l] + part[3][l]);
  }
  return fold(total);
}
/* The same of a W that does not lie by rows: panels of 64, each folded; four in order are a block. */
static float dot_panels(const float* a, const float* b, i64 d) {
  float total = 0;
  for (i64 block = 0; block < d; block += 256) {
    float sum = 0;
    for (i64 panel = block; panel < d && panel < block + 256; panel += 64) {
      float part[16] = {0};
      for (i64 i = panel; i < d && i < panel + 64; ++i) part[i % 16] = step(a[i], b[i], part[i % 16]);
      sum += fold(part);
    }
    total += sum;
  }
  return total;
}
void dvalues(const float* grad, const i64* indices, const i64* crow, i64 rows, const float* w, i64 d, int panels, int type, float* out) {
  for (i64 r = 0; r < rows; ++r)
    for (i64 i = crow[r]; i < crow[r + 1]; ++i)
      out[i] = narrow((panels ? dot_panels : dot)(grad + r * d, w + indices[i] * d, d), type);
}

/* ---- the optimiser: one row; g is null for a feature without slots ---- */
static void projected(const float* g, const float* w, i64 d, float* to) {
  float minus_along = -dot(g, w, d);
  for (i64 i = 0; i < d; ++i) to[i] = step(minus_along, w[i], g[i]);
}
static void scale_row(float* w, i64 d, int normalise) {
  float norm = sqrtf(dot(w, w, d));
  if (!normalise || norm < 1e-8f) return;
  for (i64 i = 0; i < d; ++i) w[i] = w[i] * (1 / norm);
}
void adam(const float* grad, const uint8_t* has, i64 features, i64 d, float factor, float* w, float* m, float* v, double lr, double beta1,
          double beta2, double eps, double weight_decay, i64 t, int project, int normalise) {
  double r = sqrt(1 - pow(beta2, (double)t));
  float decay = (float)(1 - lr * weight_decay), s = (float)(lr * r / (1 - pow(beta1, (double)t))), e = (float)(eps * r);
  float* g = malloc((d + 1) * sizeof(float));
  for (i64 f = 0; f < features; ++f, grad += d, w += d, m += d, v += d) {
    memcpy(g, grad, d * sizeof(float));
    if (!has[f]) memset(g, 0, d * sizeof(float));
    else if (project) projected(grad, w, d, g);
    for (i64 i = 0; i < d; ++i) {
      float gi = g[i] * factor, difference = gi - m[i];
      m[i] = 1 - beta1 < 0.5 ? step((float)(1 - beta1), difference, m[i]) : step((float)-beta1, difference, gi);
      float fresh = (float)(1 - beta2) * gi, old = (float)beta2 * v[i];
      v[i] = step(fresh, gi, old);
      w[i] = step(m[i], -s / (sqrtf(v[i]) + e), w[i] * decay);
    }
    scale_row(w, d, normalise);
  }
  free(g);
}
static float lerp(float a, float b, float s) { return fabsf(s) < 0.5f ? step(s, b - a, a) : step(s - 1, b - a, b); }
void signum(const float* grad, const uint8_t* has, i64 features, i64 d, float* y, float* z, double lr, double momentum, double share,
            int project, int normalise) {
  float* g = malloc((d + 1) * sizeof(float));
  for (i64 f = 0; f < features; ++f, grad += d, y += d, z += d) {
    memcpy(g, grad, d * sizeof(float));
    if (!has[f]) memset(g, 0, d * sizeof(float));
    else if (project) projected(grad, y, d, g);
    for (i64 i = 0; i < d; ++i) {
      float x = lerp(y[i], z[i], (float)(1 - 1 / momentum));
      z[i] -= (float)lr * (float)((g[i] > 0) - (g[i] < 0));
      y[i] = lerp(lerp(x, z[i], (float)share), z[i], (float)(1 - momentum));
    }
    scale_row(y, d, normalise);
  }
  free(g);
}
float grad_squares(const float* grad, const uint8_t* has, i64 features, i64 d, const float* w, int project) {
  double sum = 0;
  float* g = malloc((d + 1) * sizeof(float));
  for (i64 f = 0; f < features; ++f, grad += d, w += d) {
    if (!has[f]) continue;
    memcpy(g, grad, d * sizeof(float));
    if (project) projected(grad, w, d, g);
    sum += dot(g, g, d);
  }
  free(g);
  return (float)sum;
}
