// Every kernel of csrc/cuda once or more on threads of the system, for ThreadSanitizer. With an argument: one that lacks a barrier.
#include <tuple>
#include <vector>

#include "cuda/platform.h"

using namespace fastsae::cuda;

namespace {

__global__ void swap(int* out) {
  __shared__ int value[64];
  value[threadIdx.x] = static_cast<int>(threadIdx.x);
  out[threadIdx.x] = value[63 - threadIdx.x];
}

std::vector<float> drawn(int64_t n, int kinds) {
  std::vector<float> values(static_cast<size_t>(n));
  uint32_t state = 1;
  for (float& value : values) value = static_cast<float>((state = state * 1664525u + 1013904223u) / 65536 % static_cast<uint32_t>(kinds)) - 99.5f;
  return values;
}

int all() {
  const Where where{0, nullptr};
  int failed = 0;
  // few, maxima, radix, more equal keys than fit; resumed
  for (const auto& [n, k, kinds] : {std::tuple{300, 40, 9999}, {2100, 40, 9999}, {2100, 300, 9999}, {2100, 3, 1}}) {
    const std::vector<float> z = drawn(n, kinds);
    const std::vector<int32_t> distance(z.begin(), z.end());
    std::vector<uint64_t> keys(static_cast<size_t>(k));
    std::vector<float> values(keys.size());
    std::vector<int32_t> distances(keys.size());
    std::vector<int64_t> indices(keys.size());
    const auto count = static_cast<int64_t>(keys.size());
    failed |= select_scores(where, z.data(), Type::f32, 1, n, n, 0, k, false, keys.data());
    if (k == 3) failed |= select_scores(where, z.data(), Type::f32, 1, n, n, n, k, true, keys.data());
    failed |= finish_scores(where, keys.data(), count, true, values.data(), Type::f32, indices.data());
    if (n == 300) failed |= select_distances(where, distance.data(), 1, n, n, 0, k, false, keys.data());
    failed |= finish_distances(where, keys.data(), count, distances.data(), indices.data());
  }
  const int64_t rows = 9, neurons = 300, words = 5;
  const std::vector<float> z = drawn(rows * neurons, 200);
  std::vector<int64_t> code(rows * words), keys(2 * neurons), hashes(2 * rows), chosen{3, 5, 299};
  std::vector<uint8_t> mask(neurons);
  std::vector<int32_t> apart(rows * rows);
  int32_t flag = 0;
  failed |= mark(where, chosen.data(), Index::i64, 3, neurons, mask.data(), &flag);
  failed |= pack_signs(where, z.data(), Type::f32, rows, neurons, neurons, nullptr, code.data());
  failed |= neuron_keys(where, neurons, nullptr, 1, 2, 128, keys.data());
  failed |= hash_signs(where, z.data(), Type::f32, rows, neurons, neurons, keys.data(), 128, hashes.data());
  failed |= hash_code(where, code.data(), rows, words, words, keys.data(), 64, hashes.data());
  failed |= hamming(where, code.data(), rows, words, code.data(), rows, words, words, apart.data(), rows, 1);

  const int64_t slots = 500, features = 40, d = 70, k = 4, split = 32;
  const std::vector<float> grad = drawn(slots / k * d, 9);
  std::vector<int64_t> index(slots);
  for (int64_t s = 0; s < slots; ++s) index[static_cast<size_t>(s)] = s % 3 == 0 ? 7 : s * 5 % features;
  std::vector<char> workspace(static_cast<size_t>(by_feature_bytes(where, slots, features)));
  std::vector<uint32_t> order(slots), segments(features + 1), row(slots);
  std::vector<float> value(slots), partials(static_cast<size_t>(slots / split * d)), out(static_cast<size_t>(features * d));
  failed |= by_feature(where, index.data(), Index::i64, slots, features, workspace.data(), order.data(), segments.data(), &flag);
  failed |= permute_slots(where, order.data(), slots, z.data(), Type::f32, nullptr, slots / k, k, row.data(), value.data());
  failed |= sum_by_feature(where, segments.data(), slots, features, row.data(), value.data(), grad.data(), Type::f32, d, d, split,
                           partials.data(), out.data(), d);
  return failed | flag;
}

}  // namespace

int main(int count, char**) {
  int out[64];
  return count > 1 ? launch(swap, Where{0, nullptr}, 1, 64, out) : all();
}
