// Sums of products as NVIDIA's tensor cores form them: groups of products and the accumulator are aligned to the largest exponent, cut off
// below `fraction` bits of it, added exactly, and the sum is cut off to float32 (Fasi, Higham, Mikaitis and Pranesh 2021; Khattak and
// Mikaitis 2025). Exponents are those of the factors, added: a product of significands in [1, 4) is not normalised first.
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

struct Part {
  std::int64_t significand;  // value = significand * 2^(exponent - bits)
  int exponent;
};

Part split(float x, int bits, int least) {
  if (x == 0 || !std::isfinite(x)) return {0, least};
  int exponent = std::ilogb(x);
  if (exponent < least) exponent = least;
  return {static_cast<std::int64_t>(std::ldexp(static_cast<double>(x), bits - exponent)), exponent};
}

std::int64_t shifted(std::int64_t value, int left) {  // towards zero
  if (left >= 0) return value << left;
  if (left < -62) return 0;
  return value < 0 ? -(-value >> -left) : value >> -left;
}

float truncated(std::int64_t sum, int scale) {  // sum * 2^scale
  if (sum == 0) return 0;
  const std::uint64_t size = static_cast<std::uint64_t>(sum < 0 ? -sum : sum);
  const int last = std::max(static_cast<int>(std::bit_width(size)) - 24 + scale, -149);
  const int drop = last - scale;
  const std::uint64_t kept = drop <= 0 ? size : drop > 63 ? 0 : size >> drop << drop;
  const float result = static_cast<float>(std::ldexp(static_cast<double>(kept), scale));
  return sum < 0 ? -result : result;
}

}  // namespace

// out [m, n] = c + a [m, k] @ b [k, n], with factors of `bits` fraction bits and exponents of at least `least`.
extern "C" void tensor_core(const float* a, const float* b, const float* c, float* out, std::int64_t m, std::int64_t n, std::int64_t k,
                            int bits, int least, int fused, int fraction) {
  const int zero = -(fraction + 108);
  std::vector<Part> left(m * k), right(n * k);
  std::vector<std::int64_t> products(fused);
  std::vector<int> exponents(fused);
  for (std::int64_t i = 0; i < m * k; ++i) left[i] = split(a[i], bits, least);
  for (std::int64_t d = 0; d < k; ++d)
    for (std::int64_t j = 0; j < n; ++j) right[j * k + d] = split(b[d * n + j], bits, least);
  for (std::int64_t i = 0; i < m; ++i)
    for (std::int64_t j = 0; j < n; ++j) {
      float total = c[i * n + j];
      for (std::int64_t start = 0; start < k; start += fused) {
        const int count = static_cast<int>(std::min<std::int64_t>(fused, k - start));
        float special = std::isfinite(total) ? 0 : total;  // the sum of what is not finite
        bool finite = std::isfinite(total);
        Part held = split(total, 23, -126);
        int largest = held.significand ? held.exponent : zero;
        for (int t = 0; t < count; ++t) {
          const Part &x = left[i * k + start + t], &y = right[j * k + start + t];
          products[t] = x.significand * y.significand;
          exponents[t] = products[t] ? x.exponent + y.exponent : zero;
          largest = std::max(largest, exponents[t]);
          const float value = a[i * k + start + t], other = b[(start + t) * n + j];
          if (!std::isfinite(value) || !std::isfinite(other)) {
            special += value * other;
            finite = false;
          }
        }
        if (!finite) {
          total = std::isnan(special) ? std::bit_cast<float>(0x7fffffff) : special;
          continue;
        }
        std::int64_t sum = held.significand ? shifted(held.significand, fraction - 23 + held.exponent - largest) : 0;
        for (int t = 0; t < count; ++t) sum += shifted(products[t], fraction - 2 * bits + exponents[t] - largest);
        total = truncated(sum, largest - fraction);
      }
      out[i * n + j] = total;
    }
}
