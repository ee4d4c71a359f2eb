// The kernels under AddressSanitizer and UBSan: every level of this CPU, type, layout and awkward size, on exact-size heap blocks, compared
// with a double-precision loop. Prints one line a level; exits with 1 on a mismatch.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#include "fastsae.h"
#include "isa.h"

using namespace fastsae;

namespace {

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u, state >> 8; }
float draw_float() { return static_cast<float>(static_cast<int>(draw() % 17) - 8) / 8.0f; }  // exact in all three types

int failures = 0;
void expect(bool ok, const char* what, Dtype t, int64_t d, bool transposed) {
  if (ok) return;
  ++failures;
  std::printf("  %s differs: dtype %d, d %lld, transposed %d\n", what, static_cast<int>(t), static_cast<long long>(d), transposed);
}

// bf16 is truncation and fp16 a table of eighths: all drawn values are exact.
struct Buffer {
  Dtype t;
  std::unique_ptr<char[]> bytes;
  explicit Buffer(Dtype t, int64_t n) : t(t), bytes(new char[static_cast<size_t>(n) * (t == Dtype::f32 ? 4 : 2)]) {}
  void set(int64_t i, float x) {
    if (t == Dtype::f32) {
      std::memcpy(bytes.get() + 4 * i, &x, 4);
      return;
    }
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    uint16_t half = static_cast<uint16_t>(bits >> 16);
    if (t == Dtype::f16)
      half = x == 0 ? 0 : static_cast<uint16_t>(((bits >> 16) & 0x8000) | ((((bits >> 23) & 0xff) - 112) << 10) | ((bits >> 13) & 0x3ff));
    std::memcpy(bytes.get() + 2 * i, &half, 2);
  }
  double get(int64_t i) const {
    if (t == Dtype::f32) {
      float x;
      std::memcpy(&x, bytes.get() + 4 * i, 4);
      return x;
    }
    uint16_t half;
    std::memcpy(&half, bytes.get() + 2 * i, 2);
    if (t == Dtype::bf16) {
      const uint32_t bits = static_cast<uint32_t>(half) << 16;
      float x;
      std::memcpy(&x, &bits, 4);
      return x;
    }
    const int exponent = (half >> 10) & 31, mantissa = half & 1023;
    const double size = exponent == 0 ? std::ldexp(mantissa, -24) : std::ldexp(1024 + mantissa, exponent - 25);
    return (half & 0x8000) != 0 ? -size : size;
  }
};

bool close(double got, double want, Dtype t) {
  const double eps = t == Dtype::f32 ? 1e-6 : t == Dtype::bf16 ? 1.0 / 128 : 1.0 / 1024;
  return std::fabs(got - want) <= eps * (1 + std::fabs(want));
}

void run(Dtype t, int64_t rows, int64_t k, int64_t features, int64_t d, bool transposed, bool ragged, int threads) {
  const int64_t n = rows * k;
  std::unique_ptr<int64_t[]> indices(new int64_t[static_cast<size_t>(n)]), crow(new int64_t[static_cast<size_t>(rows + 1)]);
  for (int64_t i = 0; i < n; ++i) indices[i] = draw() % features;
  for (int64_t r = 0; r <= rows; ++r) crow[r] = r == 0 ? 0 : r == rows ? n : crow[r - 1] + (n - crow[r - 1]) * (draw() % 3) / 4;
  std::vector<int64_t> row(static_cast<size_t>(n));
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t s = ragged ? crow[r] : r * k; s < (ragged ? crow[r + 1] : (r + 1) * k); ++s) row[static_cast<size_t>(s)] = r;
  Buffer values(t, n), w(t, features * d), grad(t, rows * d), y(t, rows * d), dvalues(t, n), out(t, features * d);
  const int64_t sf = transposed ? 1 : d, sd = transposed ? features : 1;
  for (int64_t i = 0; i < n; ++i) values.set(i, draw_float());
  for (int64_t i = 0; i < features * d; ++i) w.set(i, draw_float());
  for (int64_t i = 0; i < rows * d; ++i) grad.set(i, draw_float());

  const Slots slots{indices.get(), ragged ? crow.get() : nullptr, rows, k, n, features, Index::i64};
  const Matrix matrix{w.bytes.get(), sf, sd, d};
  expect(decode(slots, t, values.bytes.get(), matrix, nullptr, y.bytes.get(), threads) == kOk, "status", t, d, transposed);
  expect(decode_dvalues(slots, t, grad.bytes.get(), matrix, dvalues.bytes.get(), threads) == kOk, "status", t, d, transposed);
  expect(decode_dweight(slots, t, values.bytes.get(), grad.bytes.get(), {out.bytes.get(), sf, sd, d}, true, threads) == kOk, "status", t, d,
         transposed);

  std::vector<double> want_y(static_cast<size_t>(rows * d)), want_out(static_cast<size_t>(features * d));
  for (int64_t s = 0; s < n; ++s) {
    const int64_t r = row[static_cast<size_t>(s)], f = indices[s];
    double dot = 0;
    for (int64_t e = 0; e < d; ++e) {
      want_y[static_cast<size_t>(r * d + e)] += values.get(s) * w.get(f * sf + e * sd);
      want_out[static_cast<size_t>(f * sf + e * sd)] += values.get(s) * grad.get(r * d + e);
      dot += grad.get(r * d + e) * w.get(f * sf + e * sd);
    }
    expect(close(dvalues.get(s), dot, t), "dvalues", t, d, transposed);
  }
  for (int64_t i = 0; i < rows * d; ++i) expect(close(y.get(i), want_y[static_cast<size_t>(i)], t), "decode", t, d, transposed);
  for (int64_t i = 0; i < features * d; ++i) expect(close(out.get(i), want_out[static_cast<size_t>(i)], t), "dweight", t, d, transposed);

  if (n == 0) return;
  indices[n - 1] = features;
  expect(decode(slots, t, values.bytes.get(), matrix, nullptr, y.bytes.get(), threads) == n - 1, "bad index", t, d, transposed);
}

// Arrays of exact size, so that a read beyond them is seen; both paths must give the same bits. `twist` varies what is in them.
void run_encode(int64_t rows, int64_t d, int64_t features, int64_t k, bool transposed, int twist) {
  const auto draw = [](int64_t n) {
    std::unique_ptr<float[]> a(new float[static_cast<size_t>(n)]);
    for (int64_t i = 0; i < n; ++i) a[static_cast<size_t>(i)] = draw_float();
    return a;
  };
  const auto x = draw(rows * d), w = draw(features * d), bias = draw(features), b_pre = draw(d), scale = draw(features);
  if (twist % 7 == 3)
    for (int64_t i = 0; i < d; ++i) x[static_cast<size_t>(i)] = 0;
  if (twist % 5 == 3) x[0] = NAN;
  if (twist % 6 == 1) w[static_cast<size_t>(features * d - 1)] = INFINITY;
  const Matrix matrix{w.get(), transposed ? 1 : d, transposed ? features : 1, d};
  const size_t slots = static_cast<size_t>(rows * k);
  std::unique_ptr<float[]> values[2];
  std::unique_ptr<int64_t[]> indices[2];
  for (int path = 0; path < 2; ++path) {
    values[path].reset(new float[slots]);
    indices[path].reset(new int64_t[slots]);
    const int64_t status =
        encode_topk(x.get(), rows, d, 1, matrix, features, twist % 2 != 0 ? bias.get() : nullptr, twist % 3 != 0 ? b_pre.get() : nullptr,
                    twist % 4 != 0 ? nullptr : scale.get(), k, twist % 2 != 0, values[path].get(), indices[path].get(),
                    path == 0 ? EncodePath::dense : EncodePath::screen, 2, nullptr, nullptr);
    expect(status == kOk, "encode status", Dtype::f32, d, transposed);
  }
  expect(std::memcmp(values[0].get(), values[1].get(), slots * sizeof(float)) == 0, "encode values", Dtype::f32, d, transposed);
  expect(std::memcmp(indices[0].get(), indices[1].get(), slots * sizeof(int64_t)) == 0, "encode indices", Dtype::f32, d, transposed);
}

// Codes, on exact-size blocks with a gap between rows; `twist` varies strides, subsets and which pre-activations are special.
void run_codes(int64_t n, int64_t m, int64_t words, int twist) {
  const auto draw64 = [](int64_t count) {
    std::unique_ptr<int64_t[]> a(new int64_t[static_cast<size_t>(count)]);
    for (int64_t i = 0; i < count; ++i)
      a[i] = static_cast<int64_t>(static_cast<uint64_t>(draw()) << 42 ^ static_cast<uint64_t>(draw()) << 20 ^ draw());
    return a;
  };
  const int64_t gap = twist % 3;
  const auto rows_of = [&](int64_t rows) { return (rows - 1) * (words + gap) + words; };
  const auto a = draw64(rows_of(n)), b = draw64(rows_of(m));
  const Codes left{a.get(), n, words + gap, words}, right{b.get(), m, words + gap, words};
  const int64_t k = 1 + draw() % m;
  std::vector<int32_t> want(static_cast<size_t>(n * m));
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < m; ++j)
      for (int64_t w = 0; w < words; ++w)
        want[static_cast<size_t>(i * m + j)] +=
            __builtin_popcountll(static_cast<uint64_t>(a[i * (words + gap) + w] ^ b[j * (words + gap) + w]));
  const bool transposed = twist % 2 != 0;
  for (const bool vpopcnt : {true, false}) {
    std::unique_ptr<int32_t[]> out(new int32_t[static_cast<size_t>(n * m)]), distance(new int32_t[static_cast<size_t>(n * k)]);
    std::unique_ptr<int64_t[]> index(new int64_t[static_cast<size_t>(n * k)]);
    expect(hamming(left, right, out.get(), transposed ? 1 : m, transposed ? n : 1, vpopcnt, 2) == kOk, "hamming", Dtype::f32, m,
           transposed);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t j = 0; j < m; ++j)
        expect(out[transposed ? j * n + i : i * m + j] == want[static_cast<size_t>(i * m + j)], "hamming", Dtype::f32, m, transposed);
    expect(hamming_topk(left, right, k, distance.get(), index.get(), vpopcnt, 2) == kOk, "hamming_topk", Dtype::f32, m, false);
    for (int64_t i = 0; i < n; ++i)
      for (int64_t s = 0; s < k; ++s) {
        const int64_t j = index[i * k + s];
        const bool inside = j >= 0 && j < m && distance[i * k + s] == want[static_cast<size_t>(i * m + j)];
        const bool after = s == 0 || distance[i * k + s - 1] < distance[i * k + s] ||
                           (distance[i * k + s - 1] == distance[i * k + s] && index[i * k + s - 1] < j);
        expect(inside && after, "hamming_topk", Dtype::f32, m, false);
      }
  }

  // Signs: n rows of m neurons, each type; the hash from pre-activations, and from the packed bits.
  std::unique_ptr<uint8_t[]> some(new uint8_t[static_cast<size_t>(m)]);
  for (int64_t i = 0; i < m; ++i) some[i] = draw() % 3 != 0;
  const uint8_t* const taking_part = twist % 2 != 0 ? some.get() : nullptr;
  const HashKey key{static_cast<uint32_t>(twist), 99, twist % 3 == 0 ? 64 : 128};
  const int64_t packed = (m + 63) / 64, hash_words = key.bits / 64, stride = m + gap;
  for (const Signs t : {Signs::f32, Signs::bf16, Signs::f16, Signs::boolean}) {
    Buffer z(t == Signs::boolean ? Dtype::f32 : static_cast<Dtype>(t), (n - 1) * stride + m);
    std::unique_ptr<uint8_t[]> flags(new uint8_t[static_cast<size_t>((n - 1) * stride + m)]);
    for (int64_t i = 0; i < (n - 1) * stride + m; ++i) {
      const float x = draw_float();
      z.set(i, i % 7 == 0 ? -0.0f : x);
      flags[i] = static_cast<uint8_t>(i % 7 != 0 && x > 0);
    }
    const void* const data = t == Signs::boolean ? static_cast<const void*>(flags.get()) : z.bytes.get();
    std::unique_ptr<int64_t[]> codes(new int64_t[static_cast<size_t>(n * packed)]);
    std::unique_ptr<int64_t[]> hashes(new int64_t[static_cast<size_t>(n * hash_words)]),
        again(new int64_t[static_cast<size_t>(n * hash_words)]);
    expect(pack_signs(data, t, n, stride, m, taking_part, codes.get(), 2) == kOk, "pack_signs", Dtype::f32, m, false);
    expect(hash_signs(data, t, n, stride, m, taking_part, key, hashes.get(), 2) == kOk, "hash_signs", Dtype::f32, m, false);
    expect(hash_code(codes.get(), n, packed, packed, nullptr, key, again.get(), 2) == kOk, "hash_code", Dtype::f32, m, false);
    for (int64_t r = 0; r < n; ++r)
      for (int64_t j = 0; j < packed * 64; ++j) {
        const bool on = j < m && flags[r * stride + j] != 0 && (taking_part == nullptr || taking_part[j] != 0);
        expect(((static_cast<uint64_t>(codes[r * packed + j / 64]) >> (j % 64)) & 1) == on, "pack_signs", Dtype::f32, m, false);
      }
    expect(std::memcmp(hashes.get(), again.get(), static_cast<size_t>(n * hash_words) * 8) == 0, "hash_signs", Dtype::f32, m, false);
  }
}

}  // namespace

int main() {
  for (int i = 0; i < kLevels; ++i) {
    const Level level = static_cast<Level>(i);
    if (!set_level(level)) continue;
    const int before = failures;
    for (Dtype t : {Dtype::f32, Dtype::bf16, Dtype::f16})
      for (bool transposed : {false, true})
        for (bool ragged : {false, true})
          for (int64_t d : {0, 1, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 600}) {
            run(t, 5, 7, 19, d, transposed, ragged, 2);
            run(t, 3, 40, 300, d, transposed, ragged, 2);
            run(t, 0, 4, 3, d, transposed, ragged, 2);
            run(t, 4, 0, 3, d, transposed, ragged, 2);
          }
    run(Dtype::f32, 40, 33, 500, 300, true, false, 2);
    int twist = 0;
    for (bool transposed : {false, true})
      for (int64_t rows : {1, 2, 13, 30})
        for (int64_t d : {1, 15, 33, 64, 100, 513})
          for (int64_t features : {1, 31, 64, 300, 2100})
            for (int64_t k : {int64_t{1}, (features + 1) / 2, features})
              if (rows * d * features < 1000000) run_encode(rows, d, features, k, transposed, twist++);
    for (int64_t n : {1, 3, 4, 9, 40})
      for (int64_t m : {1, 15, 16, 17, 63, 64, 65, 130, 300})
        for (int64_t words : {0, 1, 2, 8, 16, 17}) run_codes(n, m, words, twist++);
    run_codes(600, 700, 3, 2);
    std::printf("%s: %s\n", level_name(level), failures == before ? "ok" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}
