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

// One step, by slots and from the matrix that decode_dweight writes: the same bits, and close to a double-precision loop.
void run_adam(int64_t rows, int64_t k, int64_t features, int64_t d, bool ragged, bool unit, int threads) {
  const auto copy = [](const std::unique_ptr<float[]>& from, int64_t n) {
    std::unique_ptr<float[]> to(new float[static_cast<size_t>(n)]);
    if (n > 0) std::memcpy(to.get(), from.get(), static_cast<size_t>(n) * sizeof(float));
    return to;
  };
  const auto draw_floats = [](int64_t n, float least) {
    std::unique_ptr<float[]> a(new float[static_cast<size_t>(n)]);
    for (int64_t i = 0; i < n; ++i) a[static_cast<size_t>(i)] = std::fmax(draw_float(), least);
    return a;
  };
  const int64_t n = rows * k, size = features * d;
  std::unique_ptr<int64_t[]> indices(new int64_t[static_cast<size_t>(n)]), crow(new int64_t[static_cast<size_t>(rows + 1)]);
  for (int64_t i = 0; i < n; ++i) indices[i] = i % 3 == 0 ? 0 : draw() % features;
  for (int64_t r = 0; r <= rows; ++r) crow[r] = r == 0 ? 0 : r == rows ? n : crow[r - 1] + (n - crow[r - 1]) / 3;
  const auto values = draw_floats(n, -9), grad = draw_floats(rows * d, -9), w = draw_floats(size, -9), m = draw_floats(size, -9),
             v = draw_floats(size, 0.25f);
  const Slots slots{indices.get(), ragged ? crow.get() : nullptr, rows, k, n, features, Index::i64};
  const AdamOptions options{1e-2, 0.9, 0.99, 1e-8, 0.1, 3, unit, unit};
  const float factor = 0.5f;

  std::unique_ptr<float[]> matrix(new float[static_cast<size_t>(size)]);
  expect(decode_dweight(slots, Dtype::f32, values.get(), grad.get(), {matrix.get(), d, 1, d}, true, threads) == kOk, "status", Dtype::f32,
         d, false);
  std::unique_ptr<float[]> after[2][3];
  for (int sparse = 0; sparse < 2; ++sparse) {
    auto& [a, b, c] = after[sparse];
    a = copy(w, size), b = copy(m, size), c = copy(v, size);
    expect(adam(sparse != 0 ? &slots : nullptr, values.get(), sparse != 0 ? grad.get() : matrix.get(), &factor, a.get(), b.get(), c.get(),
                features, d, options, threads) == kOk,
           "adam status", Dtype::f32, d, unit);
  }
  for (int i = 0; i < 3; ++i)
    expect(size == 0 || std::memcmp(after[0][i].get(), after[1][i].get(), static_cast<size_t>(size) * sizeof(float)) == 0, "adam bits",
           Dtype::f32, d, unit);
  double squares = 0;
  for (int64_t f = 0; f < features; ++f) {
    double along = 0, norm = 0;
    std::vector<double> moved(static_cast<size_t>(d));
    for (int64_t e = f * d; unit && e < (f + 1) * d; ++e) along += static_cast<double>(matrix[e]) * w[e];
    for (int64_t e = f * d; e < (f + 1) * d; ++e) {
      const double free = matrix[e] - along * w[e], g = factor * free;
      squares += free * free;
      const double me = 0.9 * m[e] + 0.1 * g, ve = 0.99 * v[e] + 0.01 * g * g;
      const double we = w[e] * (1 - 1e-3) - 1e-2 / (1 - std::pow(0.9, 3)) * me / (std::sqrt(ve / (1 - std::pow(0.99, 3))) + 1e-8);
      moved[static_cast<size_t>(e - f * d)] = we;
      norm += we * we;
      expect(std::fabs(after[1][1][e] - me) <= 1e-4 * (1 + std::fabs(me)), "adam m", Dtype::f32, d, unit);
    }
    for (int64_t e = 0; e < d; ++e) {
      const double want = moved[static_cast<size_t>(e)] / (unit && norm > 0 ? std::sqrt(norm) : 1);
      expect(std::fabs(after[1][0][f * d + e] - want) <= 1e-4 * (1 + std::fabs(want)), "adam w", Dtype::f32, d, unit);
    }
  }
  float total = -1;
  expect(grad_squares(&slots, values.get(), grad.get(), w.get(), features, d, unit, &total, threads) == kOk, "norm", Dtype::f32, d, unit);
  expect(std::fabs(total - squares) <= 1e-3 * (1 + squares), "grad_squares", Dtype::f32, d, unit);

  if (n == 0 || size == 0) return;
  indices[n - 1] = -1;
  const auto kept = copy(after[1][0], size);
  expect(adam(&slots, values.get(), grad.get(), nullptr, after[1][0].get(), after[1][1].get(), after[1][2].get(), features, d, options,
              threads) == n - 1,
         "adam bad index", Dtype::f32, d, unit);
  expect(std::memcmp(kept.get(), after[1][0].get(), static_cast<size_t>(size) * sizeof(float)) == 0, "adam writes", Dtype::f32, d, unit);
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
    for (bool ragged : {false, true})
      for (bool unit : {false, true}) {
        for (int64_t d : {0, 1, 15, 16, 17, 64, 257, 600})
          for (int64_t features : {1, 5, 33, 100}) run_adam(7, 3, features, d, ragged, unit, 2);
        run_adam(0, 3, 4, 20, ragged, unit, 2);
        run_adam(1200, 3, 70, 40, ragged, unit, 2);
        run_adam(3, 2, 2, 30000, ragged, unit, 2);
      }
    std::printf("%s: %s\n", level_name(level), failures == before ? "ok" : "FAILED");
  }
  return failures == 0 ? 0 : 1;
}
