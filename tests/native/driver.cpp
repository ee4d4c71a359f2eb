// The kernels under AddressSanitizer and UBSan: every level of this CPU, type, layout and awkward size, on exact-size heap blocks. Values
// are the business of tests/; here different ways to the same bits are compared. Prints one line a level; exits with 1 on a mismatch.
#include <cmath>
#include <cstdio>
#include <cstring>
#include <memory>
#include <vector>

#ifdef FASTSAE_GUARD
#include <sys/mman.h>
#include <unistd.h>
#endif

#include "fastsae.h"
#include "isa.h"

using namespace fastsae;

namespace {

uint32_t state = 1;
uint32_t draw() { return state = state * 1664525u + 1013904223u, state >> 8; }
float draw_float() { return static_cast<float>(static_cast<int>(draw() % 17) - 8) / 8.0f; }  // exact in all three types

// Of exact size, so that an access beyond it is seen: by AddressSanitizer, or where there is none (FASTSAE_GUARD) by a page that may not be
// touched.
#ifdef FASTSAE_GUARD
struct Unmap {
  char* base = nullptr;
  size_t size = 0;
  void operator()(void*) const { munmap(base, size); }
};
template <class T>
using Block = std::unique_ptr<T[], Unmap>;
template <class T>
Block<T> block(int64_t n) {
  const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE)), bytes = static_cast<size_t>(n) * sizeof(T);
  const size_t size = (bytes + page - 1) / page * page + page;
  char* const base = static_cast<char*>(mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(base + size - page, page, PROT_NONE);
  return Block<T>(reinterpret_cast<T*>(base + size - page - bytes), Unmap{base, size});
}
#else
template <class T>
using Block = std::unique_ptr<T[]>;
template <class T>
Block<T> block(int64_t n) {
  return Block<T>(new T[static_cast<size_t>(n)]);
}
#endif
Block<float> draw_floats(int64_t n, float least = -9) {
  auto a = block<float>(n);
  for (int64_t i = 0; i < n; ++i) a[static_cast<size_t>(i)] = std::fmax(draw_float(), least);
  return a;
}

int failures = 0;

// Of what the operations wrote, for comparing levels and machines (FNV-1a).
uint64_t digest;
void note(const void* data, int64_t bytes) {
  for (int64_t i = 0; i < bytes; ++i) digest = (digest ^ static_cast<const uint8_t*>(data)[i]) * 0x100000001b3u;
}

void expect(bool ok, const char* what, Dtype t, int64_t d, bool transposed) {
  if (ok) return;
  ++failures;
  std::printf("  %s differs: dtype %d, d %lld, transposed %d\n", what, static_cast<int>(t), static_cast<long long>(d), transposed);
}

int64_t size_of(Dtype t) { return t == Dtype::f32 ? 4 : 2; }

// bf16 is truncation and fp16 a table of eighths: all drawn values are exact.
struct Buffer {
  Dtype t;
  Block<char> bytes;
  explicit Buffer(Dtype t, int64_t n) : t(t), bytes(block<char>(n * size_of(t))) {}
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
};

void run(Dtype t, int64_t rows, int64_t k, int64_t features, int64_t d, bool transposed, bool ragged, int threads) {
  const int64_t n = rows * k;
  const auto indices = block<int64_t>(n), crow = block<int64_t>(rows + 1);
  for (int64_t i = 0; i < n; ++i) indices[i] = draw() % features;
  for (int64_t r = 0; r <= rows; ++r) crow[r] = r == 0 ? 0 : r == rows ? n : crow[r - 1] + (n - crow[r - 1]) * (draw() % 3) / 4;
  Buffer values(t, n), w(t, features * d), grad(t, rows * d), y(t, rows * d), dvalues(t, n), out(t, features * d);
  const int64_t sf = transposed ? 1 : d, sd = transposed ? features : 1;
  for (int64_t i = 0; i < n; ++i) values.set(i, draw_float());
  for (int64_t i = 0; i < features * d; ++i) w.set(i, draw_float());
  for (int64_t i = 0; i < rows * d; ++i) grad.set(i, draw_float());

  const Slots slots{indices.get(), ragged ? crow.get() : nullptr, rows, k, n, features, Index::i64};
  const Matrix matrix{w.bytes.get(), sf, sd, d};
  expect(decode(slots, t, values.bytes.get(), matrix, nullptr, y.bytes.get(), threads) == kOk, "status", t, d, transposed);
  expect(decode_dvalues(slots, t, grad.bytes.get(), matrix, dvalues.bytes.get(), threads) == kOk, "status", t, d, transposed);
  expect(decode_dweight(slots, t, values.bytes.get(), grad.bytes.get(), {out.bytes.get(), sf, sd, d}, threads) == kOk, "status", t, d,
         transposed);

  note(y.bytes.get(), rows * d * size_of(t)), note(dvalues.bytes.get(), n * size_of(t)), note(out.bytes.get(), features * d * size_of(t));

  if (n == 0) return;
  indices[n - 1] = features;
  expect(decode(slots, t, values.bytes.get(), matrix, nullptr, y.bytes.get(), threads) == n - 1, "bad index", t, d, transposed);
}

// What an operation wrote, to compare ways to the same bits.
struct Outcome {
  std::vector<char> bytes;
  template <class T>
  void add(const T* data, int64_t n) {
    const char* const from = reinterpret_cast<const char*>(data);
    if (n > 0) bytes.insert(bytes.end(), from, from + n * static_cast<int64_t>(sizeof(T)));
  }
  void add(Entries* entries, int64_t rows, int64_t status) {
    const int64_t n = entries_count(entries);
    const auto values = block<float>(n);
    const auto col = block<int64_t>(n), crow = block<int64_t>(rows + 1);
    const auto flags = block<uint8_t>(n);
    copy_entries(entries, values.get(), col.get(), crow.get(), flags.get(), 2);
    free_entries(entries);
    add(&status, 1), add(values.get(), n), add(col.get(), n), add(crow.get(), rows + 1), add(flags.get(), n);
  }
};

// Changes along segments: the same with a handle, and on another number of threads.
void run_segments(Dtype t, int64_t n, Weights w, const uint32_t* packed, const float* b_pre, const float* bias, int64_t k) {
  const uint32_t before = state;  // what is drawn for the other operations is as it was
  const int64_t d = w.d, capacity = 2 * k + 1;
  Buffer x(t, 2 * n * d);
  const auto ends = block<double>(2 * n * d);
  for (int64_t i = 0; i < 2 * n * d; ++i) {
    const float drawn = draw_float();
    x.set(i, drawn);
    ends[i] = drawn;
  }
  for (const bool absolute : {false, true}) {
    Outcome first;
    for (int way = 0; way < 3; ++way) {
      w.packed = way == 0 ? nullptr : packed;
      const auto at = block<double>(n * capacity);
      const auto leaves = block<int32_t>(n * capacity), enters = block<int32_t>(n * capacity);
      const auto counts = block<int64_t>(n);
      const Activations rows{x.bytes.get(), t, 2 * n, d, 1, b_pre, 0};
      const int64_t status = topk_changes(rows, w, bias, ends.get(), k, !absolute, absolute, capacity, at.get(), leaves.get(), enters.get(),
                                          counts.get(), way == 1 ? 1 : 2);
      Outcome now;
      now.add(&status, 1);
      for (int64_t s = 0; status == kOk && s < n; ++s) {
        const int64_t from = s * capacity;
        now.add(&counts[s], 1), now.add(&at[from], counts[s]), now.add(&leaves[from], counts[s]), now.add(&enters[from], counts[s]);
      }
      if (way == 0) first = now;
      expect(now.bytes == first.bytes, "topk_changes", t, d, w.stride_d != 1);
    }
  }
  state = before;
}

// Arrays of exact size, so that a read beyond them is seen; all ways must give the same bits. `twist` varies what is in them.
void run_engine(Dtype t, int64_t rows, int64_t d, int64_t features, int64_t k, bool transposed, int twist) {
  const auto bias = draw_floats(features), b_pre = draw_floats(d), scale = draw_floats(features), theta = draw_floats(features);
  const auto stretch = draw_floats(features, 0);
  Buffer x(t, rows * d), w(t, features * d);
  for (int64_t i = 0; i < rows * d; ++i) x.set(i, twist % 7 == 3 && i < d ? 0.0f : twist % 5 == 3 && i == 0 ? NAN : draw_float());
  for (int64_t i = 0; i < features * d; ++i) w.set(i, twist % 6 == 1 && i == features * d - 1 ? INFINITY : draw_float());
  const auto list = block<int32_t>(features);
  int64_t chosen = 0;
  for (int64_t f = 0; f < features; ++f)
    if (f == 0 || draw() % 3 != 0) list[static_cast<size_t>(chosen++)] = static_cast<int32_t>(f);
  const auto exact_list = block<int32_t>(chosen);
  std::memcpy(exact_list.get(), list.get(), static_cast<size_t>(chosen) * sizeof(int32_t));

  const Activations rows_of{x.bytes.get(), t, rows, d, 1, twist % 3 != 0 ? b_pre.get() : nullptr, 0};
  Weights all{w.bytes.get(), t, transposed ? 1 : d, transposed ? features : 1, d, features, nullptr, 0, nullptr};
  Block<uint32_t> packed;
  if (packs(d)) {
    packed = block<uint32_t>(packed_words(features, d));
    expect(pack(all, packed.get(), 2) == kOk, "pack", t, d, transposed);
  }
  const float* const maybe_scale = twist % 4 != 0 ? nullptr : scale.get();
  const float* const maybe_bias = twist % 2 != 0 ? bias.get() : nullptr;
  for (int subset = 0; subset < 2; ++subset) {
    Outcome first;
    for (int way = 0; way < 7; ++way) {  // dense, then each way with and without a handle
      Weights in = all;
      if (subset != 0) {
        in.list = exact_list.get();
        in.features = chosen;
      }
      if (way != 0 && way % 2 == 0) in.packed = packed.get();
      constexpr EncodePath kWays[] = {EncodePath::dense, EncodePath::screen, EncodePath::rows, EncodePath::blocks};
      const EncodePath path = kWays[(way + 1) / 2];
      const int64_t kept = k < in.features ? k : in.features;
      const auto values = block<float>(rows * kept);
      const auto indices = block<int64_t>(rows * kept);
      Outcome now;
      int64_t status = kOk;
      for (const bool absolute : {false, true}) {
        status = encode_topk(rows_of, in, maybe_scale, maybe_bias, kept, !absolute && twist % 2 != 0, absolute, values.get(), indices.get(),
                             path, nullptr, 2);
        now.add(&status, 1), now.add(values.get(), rows * kept), now.add(indices.get(), rows * kept);
      }
      Entries* held;
      for (const float band : {-1.0f, 0.5f}) {
        held = new_entries();
        status = encode_threshold(rows_of, in, maybe_scale, maybe_bias, theta.get(), band, held, path, nullptr, 2);
        now.add(held, rows, status);
      }
      held = new_entries();
      status = encode_gated(rows_of, in, theta.get(), stretch.get(), bias.get(), held, path, nullptr, 2);
      now.add(held, rows, status);
      held = new_entries();
      float least = 0;
      status = encode_batch_topk(rows_of, in, maybe_scale, maybe_bias, rows * k / 2, &least, held, path, nullptr, 2);
      now.add(held, rows, status);
      now.add(&least, 1);
      if (subset == 0) {
        const int64_t words = (features + 63) / 64;
        const auto code = block<int64_t>(rows * words);
        status = spline_code(rows_of, in, maybe_bias, code.get(), path, nullptr, 2);
        now.add(&status, 1), now.add(code.get(), rows * words);
        Activations a = rows_of;
        a.subtract = nullptr;
        a.eps = in.eps = 1e-8f;
        const bool self = twist % 2 != 0 && kept < features;
        status = match_cosine(a, in, kept, twist % 3 == 0, self, values.get(), indices.get(), path, nullptr, 2);
        now.add(&status, 1), now.add(values.get(), rows * kept), now.add(indices.get(), rows * kept);
      }
      if (way == 0) first = now, note(now.bytes.data(), static_cast<int64_t>(now.bytes.size()));
      expect(now.bytes == first.bytes, way == 1 ? "engine, screened" : "engine, packed", t, d, transposed);
    }
  }
  // Every score lies in the interval that screening claims for it.
  const int64_t n = rows * features;
  const auto lo = block<float>(n), hi = block<float>(n), score = block<float>(n);
  const auto order = block<int64_t>(n);
  if (packs(d) && screen_bounds(rows_of, all, maybe_scale, maybe_bias, false, lo.get(), hi.get(), 2) == kOk) {
    expect(encode_topk(rows_of, all, maybe_scale, maybe_bias, features, false, false, score.get(), order.get(), EncodePath::dense, nullptr,
                       2) == kOk,
           "status", t, d, transposed);
    bool inside = true;
    for (int64_t i = 0; i < n; ++i) {
      const int64_t at = i / features * features + order[i];
      inside &= !(score[i] < lo[at]) && !(score[i] > hi[at]) && (score[i] == score[i] || !(hi[at] < INFINITY));
    }
    expect(inside, "an interval", t, d, transposed);
  }
  run_segments(t, rows / 2, all, packed.get(), twist % 3 != 0 ? b_pre.get() : nullptr, maybe_bias, k < features ? k : features);
  if (!packs(d) || k > 8 || k > rows || 32 * k > features) return;
  // Both directions in one pass, beside one after the other.
  Activations a = rows_of, b{w.bytes.get(), t, features, all.stride_f, all.stride_d, nullptr, 1e-8f};
  Weights in = all, back{x.bytes.get(), t, d, 1, d, rows, nullptr, 1e-8f, nullptr};
  a.subtract = nullptr;
  a.eps = in.eps = 1e-8f;
  Outcome both, each;
  const size_t forward = static_cast<size_t>(rows * k), backward = static_cast<size_t>(features * k);
  const auto ab = block<float>(forward), ba = block<float>(backward), low = block<float>(rows);
  const auto ab_at = block<int64_t>(forward), ba_at = block<int64_t>(backward), low_at = block<int64_t>(rows);
  const auto keep = [&](Outcome& outcome) {
    outcome.add(ab.get(), rows * k), outcome.add(ab_at.get(), rows * k);
    outcome.add(ba.get(), features * k), outcome.add(ba_at.get(), features * k);
  };
  expect(match_pair(a, in, k, k, ab.get(), ab_at.get(), ba.get(), ba_at.get(), low.get(), low_at.get(), nullptr, 2) == kOk, "match_pair", t,
         d, transposed);
  keep(both);
  expect(match_cosine(a, in, k, false, false, ab.get(), ab_at.get(), EncodePath::dense, nullptr, 2) == kOk, "match", t, d, transposed);
  expect(match_cosine(b, back, k, false, false, ba.get(), ba_at.get(), EncodePath::dense, nullptr, 2) == kOk, "match", t, d, transposed);
  keep(each);
  expect(both.bytes == each.bytes, "match_pair", t, d, transposed);
}

// Codes, on exact-size blocks with a gap between rows; `twist` varies strides, subsets and which pre-activations are special.
void run_codes(int64_t n, int64_t m, int64_t words, int twist) {
  const auto draw64 = [](int64_t count) {
    auto a = block<int64_t>(count);
    for (int64_t i = 0; i < count; ++i)
      a[i] = static_cast<int64_t>(static_cast<uint64_t>(draw()) << 42 ^ static_cast<uint64_t>(draw()) << 20 ^ draw());
    return a;
  };
  const int64_t gap = twist % 3;
  const auto rows_of = [&](int64_t rows) { return (rows - 1) * (words + gap) + words; };
  const auto a = draw64(rows_of(n)), b = draw64(rows_of(m));
  const Codes left{a.get(), n, words + gap, words}, right{b.get(), m, words + gap, words};
  const int64_t k = 1 + draw() % m;
  const bool transposed = twist % 2 != 0;
  for (const bool vpopcnt : {true, false}) {
    const auto out = block<int32_t>(n * m), distance = block<int32_t>(n * k);
    const auto index = block<int64_t>(n * k);
    expect(hamming(left, right, out.get(), transposed ? 1 : m, transposed ? n : 1, vpopcnt, 2) == kOk, "hamming", Dtype::f32, m,
           transposed);
    expect(hamming_topk(left, right, k, distance.get(), index.get(), vpopcnt, 2) == kOk, "hamming_topk", Dtype::f32, m, false);
    note(out.get(), n * m * 4), note(distance.get(), n * k * 4), note(index.get(), n * k * 8);
  }

  // Signs: n rows of m neurons, each type.
  const auto some = block<uint8_t>(m);
  for (int64_t i = 0; i < m; ++i) some[i] = draw() % 3 != 0;
  const uint8_t* const taking_part = twist % 2 != 0 ? some.get() : nullptr;
  const HashKey key{static_cast<uint32_t>(twist), 99, twist % 3 == 0 ? 64 : 128};
  const int64_t packed = (m + 63) / 64, hash_words = key.bits / 64, stride = m + gap;
  for (const Signs t : {Signs::f32, Signs::bf16, Signs::f16, Signs::boolean}) {
    Buffer z(t == Signs::boolean ? Dtype::f32 : static_cast<Dtype>(t), (n - 1) * stride + m);
    const auto flags = block<uint8_t>((n - 1) * stride + m);
    for (int64_t i = 0; i < (n - 1) * stride + m; ++i) {
      const float x = draw_float();
      z.set(i, i % 7 == 0 ? -0.0f : x);
      flags[i] = static_cast<uint8_t>(i % 7 != 0 && x > 0);
    }
    const void* const data = t == Signs::boolean ? static_cast<const void*>(flags.get()) : z.bytes.get();
    const auto codes = block<int64_t>(n * packed);
    const auto hashes = block<int64_t>(n * hash_words), again = block<int64_t>(n * hash_words);
    expect(pack_signs(data, t, n, stride, m, taking_part, codes.get(), 2) == kOk, "pack_signs", Dtype::f32, m, false);
    expect(hash_signs(data, t, n, stride, m, taking_part, key, hashes.get(), 2) == kOk, "hash_signs", Dtype::f32, m, false);
    expect(hash_code(codes.get(), n, packed, packed, nullptr, key, again.get(), 2) == kOk, "hash_code", Dtype::f32, m, false);
    note(codes.get(), n * packed * 8), note(hashes.get(), n * hash_words * 8);
  }
}

// One step, by slots and from the matrix that decode_dweight writes, on rows and transposed: the same bits.
void run_adam(int64_t rows, int64_t k, int64_t features, int64_t d, bool ragged, bool unit, int threads) {
  const auto copy = [](const Block<float>& from, int64_t n) {
    auto to = block<float>(n);
    if (n > 0) std::memcpy(to.get(), from.get(), static_cast<size_t>(n) * sizeof(float));
    return to;
  };
  const int64_t n = rows * k, size = features * d;
  const auto indices = block<int64_t>(n), crow = block<int64_t>(rows + 1);
  for (int64_t i = 0; i < n; ++i) indices[i] = i % 3 == 0 ? 0 : draw() % features;
  for (int64_t r = 0; r <= rows; ++r) crow[r] = r == 0 ? 0 : r == rows ? n : crow[r - 1] + (n - crow[r - 1]) / 3;
  const auto values = draw_floats(n), grad = draw_floats(rows * d), w = draw_floats(size), m = draw_floats(size);
  const auto v = draw_floats(size, 0.25f);
  const Slots slots{indices.get(), ragged ? crow.get() : nullptr, rows, k, n, features, Index::i64};
  const AdamOptions options{1e-2, 0.9, 0.99, 1e-8, 0.1, 3, unit, unit};
  const float factor = 0.5f;

  const auto matrix = block<float>(size);
  expect(decode_dweight(slots, Dtype::f32, values.get(), grad.get(), {matrix.get(), d, 1, d}, threads) == kOk, "status", Dtype::f32, d,
         false);
  const auto transposed = [&](const Block<float>& from, int64_t columns) {
    auto to = block<float>(size);
    for (int64_t i = 0; i < size; ++i) to[static_cast<size_t>(i % columns * (size / columns) + i / columns)] = from[static_cast<size_t>(i)];
    return to;
  };
  const Gradient by_slots{true, slots, values.get(), grad.get(), d, 1};
  Block<float> after[4][3];
  float totals[4];
  for (int way = 0; way < 4; ++way) {
    auto& [a, b, c] = after[way];
    const bool on_columns = way >= 2 && size > 0 && d > 1;
    const auto given = [&](const Block<float>& from) { return on_columns ? transposed(from, d) : copy(from, size); };
    a = given(w), b = given(m), c = given(v);
    const auto dense = given(matrix);
    const int64_t stride_f = on_columns ? 1 : d, stride_d = on_columns ? features : 1;
    const AdamMatrices matrices{a.get(), b.get(), c.get(), features, d, stride_f, stride_d};
    const Gradient gradient = way % 2 == 0 ? Gradient{false, {}, nullptr, dense.get(), stride_f, stride_d} : by_slots;
    expect(grad_squares(gradient, matrices, unit, &totals[way], threads) == kOk, "norm", Dtype::f32, d, unit);
    expect(adam(gradient, &factor, matrices, options, threads) == kOk, "adam status", Dtype::f32, d, unit);
    if (on_columns) a = transposed(a, features), b = transposed(b, features), c = transposed(c, features);
  }
  const float total = totals[1];
  note(&total, 4);
  for (const auto& a : after[1]) note(a.get(), size * 4);
  for (int way = 0; way < 4; ++way) {
    for (int i = 0; i < 3; ++i)
      expect(size == 0 || std::memcmp(after[way][i].get(), after[1][i].get(), static_cast<size_t>(size) * sizeof(float)) == 0, "adam bits",
             Dtype::f32, d, unit);
    // A feature without slots is not projected, where the matrix's row of zeros is: to the same zeros.
    expect(totals[way] == total, "norm bits", Dtype::f32, d, unit);
  }
  const SignumOptions sign_options{1e-2, 0.9, 0.25, unit, unit};
  Block<float> followed[4][2];
  for (int way = 0; way < 4; ++way) {
    auto& [y, z] = followed[way];
    const bool on_columns = way >= 2 && size > 0 && d > 1;
    const auto given = [&](const Block<float>& from) { return on_columns ? transposed(from, d) : copy(from, size); };
    y = given(w), z = given(m);
    const auto dense = given(matrix);
    const int64_t stride_f = on_columns ? 1 : d, stride_d = on_columns ? features : 1;
    const Gradient gradient = way % 2 == 0 ? Gradient{false, {}, nullptr, dense.get(), stride_f, stride_d} : by_slots;
    expect(signum(gradient, {y.get(), z.get(), nullptr, features, d, stride_f, stride_d}, sign_options, threads) == kOk, "signum status",
           Dtype::f32, d, unit);
    if (on_columns) y = transposed(y, features), z = transposed(z, features);
    for (int i = 0; i < 2; ++i)
      expect(size == 0 ||
                 std::memcmp(followed[way][i].get(), followed[way > 0 ? 1 : 0][i].get(), static_cast<size_t>(size) * sizeof(float)) == 0,
             "signum bits", Dtype::f32, d, unit);
  }
  for (const auto& a : followed[1]) note(a.get(), size * 4);
  if (n == 0 || size == 0) return;
  indices[n - 1] = -1;
  const auto kept = copy(after[1][0], size);
  const AdamMatrices matrices{after[1][0].get(), after[1][1].get(), after[1][2].get(), features, d, d, 1};
  expect(adam(by_slots, nullptr, matrices, options, threads) == n - 1, "adam bad index", Dtype::f32, d, unit);
  expect(std::memcmp(kept.get(), after[1][0].get(), static_cast<size_t>(size) * sizeof(float)) == 0, "adam writes", Dtype::f32, d, unit);
}

}  // namespace

// Any argument: one in forty of the cases, for an emulated CPU; a second one: which levels it has, and no case.
int main(int argc, char**) {
  int64_t turn = 0;
  const auto taken = [&] { return argc == 1 || turn++ % 40 == 0; };
  for (int i = 0; i < kLevels; ++i) {
    const Level level = static_cast<Level>(i);
    if (!set_level(level)) continue;
    if (argc > 2) {
      std::puts(level_name(level));
      continue;
    }
    const int before = failures;
    state = 1, digest = 0xcbf29ce484222325u, turn = 0;
    for (Dtype t : {Dtype::f32, Dtype::bf16, Dtype::f16})
      for (bool transposed : {false, true})
        for (bool ragged : {false, true})
          for (int64_t d : {0, 1, 15, 16, 17, 63, 64, 65, 100, 255, 256, 257, 600}) {
            if (!taken()) continue;
            run(t, 5, 7, 19, d, transposed, ragged, 2);
            run(t, 3, 40, 300, d, transposed, ragged, 2);
            run(t, 0, 4, 3, d, transposed, ragged, 2);
            run(t, 4, 0, 3, d, transposed, ragged, 2);
          }
    run(Dtype::f32, 40, 33, 500, 300, true, false, 2);
    int twist = 0;
    for (bool transposed : {false, true})
      for (int64_t rows : {1, 2, 13, 30})
        for (int64_t d : {1, 2, 15, 16, 33, 64, 100, 256, 513})
          for (int64_t features : {1, 31, 64, 300, 2100})
            for (int64_t k : {int64_t{1}, (features + 1) / 2, features})
              if (rows * d * features < (argc == 1 ? 500000 : 100000) && taken()) {
                run_engine(twist % 3 == 1 ? Dtype::bf16 : Dtype::f32, rows, d, features, k, transposed, twist);
                ++twist;
              }
    for (int64_t k : {1, 3, 8})
      if (k == 1 || argc == 1) run_engine(Dtype::f32, 60, 48, 700, k, k == 3, twist++);
    for (int64_t n : {1, 3, 4, 9, 40})
      for (int64_t m : {1, 15, 16, 17, 63, 64, 65, 130, 300})
        for (int64_t words : {0, 1, 2, 8, 16, 17})
          if (taken()) run_codes(n, m, words, twist++);
    run_codes(argc == 1 ? 600 : 60, 700, 3, 2);
    for (bool ragged : {false, true})
      for (bool unit : {false, true}) {
        for (int64_t d : {0, 1, 15, 16, 17, 64, 257, 600})
          for (int64_t features : {1, 5, 33, 100})
            if (taken()) run_adam(7, 3, features, d, ragged, unit, 2);
        if (!taken()) continue;
        run_adam(0, 3, 4, 20, ragged, unit, 2);
        run_adam(1200, 3, 70, 40, ragged, unit, 2);
        run_adam(3, 2, 2, 30000, ragged, unit, 2);
        run_adam(600, 40, 2100, 70, ragged, unit, 2);
        run_adam(2200, 60, 100, 5, ragged, unit, 2);  // sorted by both threads
      }
    std::printf("%s: %s %016llx\n", level_name(level), failures == before ? "ok" : "FAILED", static_cast<unsigned long long>(digest));
    std::fflush(stdout);
  }
  return failures == 0 ? 0 : 1;
}
