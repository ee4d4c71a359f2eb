// The only file that knows Python: addresses in, status out. Arguments are checked in fastsae/native, indices in the functions.
#include <pybind11/pybind11.h>

#include <cstdint>
#include <memory>
#include <string>
#include <tuple>

#include "fastsae.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;
using address = std::uintptr_t;
using i64 = std::int64_t;

namespace {

template <class T>
T* pointer(address p) {
  return reinterpret_cast<T*>(p);
}

fastsae::Slots slots(address indices, int index, address crow, i64 rows, i64 k, i64 n, i64 features) {
  return {pointer<const void>(indices), pointer<const i64>(crow), rows, k, n, features, static_cast<fastsae::Index>(index)};
}

// x as (address, dtype, rows, d, stride_row, stride_d, b_pre, eps), W as (address, dtype, stride_f, stride_d, d, features, list, eps,
// packed).
using X = std::tuple<address, int, i64, i64, i64, i64, address, float>;
using W = std::tuple<address, int, i64, i64, i64, i64, address, float, address>;

fastsae::Activations activations(const X& x, const W& w) {
  const auto& [data, type, rows, d, stride_row, stride_d, b_pre, eps] = x;
  if (type != std::get<1>(w) || d != std::get<4>(w))
    throw py::value_error("expected x [rows, D] and W [F, D] of one dtype and D, got D = " + std::to_string(d) + " and " +
                          std::to_string(std::get<4>(w)));
  return {pointer<const void>(data), static_cast<fastsae::Dtype>(type), rows, stride_row, stride_d, pointer<const float>(b_pre), eps};
}

fastsae::Weights weights(const W& w) {
  const auto& [data, type, stride_f, stride_d, d, features, list, eps, packed] = w;
  return {pointer<const void>(data),
          static_cast<fastsae::Dtype>(type),
          stride_f,
          stride_d,
          d,
          features,
          pointer<const std::int32_t>(list),
          eps,
          pointer<const std::uint32_t>(packed)};
}

fastsae::Level level_of(const std::string& name) {
  for (int i = 0; i < fastsae::kLevels; ++i)
    if (name == fastsae::level_name(static_cast<fastsae::Level>(i))) return static_cast<fastsae::Level>(i);
  throw py::value_error("unknown instruction set level \"" + name + "\"");
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  using namespace fastsae;

  m.def("decode", [](address indices, int index, address crow, i64 rows, i64 k, i64 n, i64 features, int dtype, address values, address w,
                     i64 stride_f, i64 stride_d, i64 d, address bias, address y, int threads) {
    py::gil_scoped_release release;
    return decode(slots(indices, index, crow, rows, k, n, features), static_cast<Dtype>(dtype), pointer<const void>(values),
                  {pointer<void>(w), stride_f, stride_d, d}, pointer<const float>(bias), pointer<void>(y), threads);
  });
  m.def("decode_dvalues", [](address indices, int index, address crow, i64 rows, i64 k, i64 n, i64 features, int dtype, address grad,
                             address w, i64 stride_f, i64 stride_d, i64 d, address dvalues, int threads) {
    py::gil_scoped_release release;
    return decode_dvalues(slots(indices, index, crow, rows, k, n, features), static_cast<Dtype>(dtype), pointer<const void>(grad),
                          {pointer<void>(w), stride_f, stride_d, d}, pointer<void>(dvalues), threads);
  });
  m.def("decode_dweight", [](address indices, int index, address crow, i64 rows, i64 k, i64 n, i64 features, int dtype, address values,
                             address grad, address out, i64 stride_f, i64 stride_d, i64 d, bool zero_untouched, int threads) {
    py::gil_scoped_release release;
    return decode_dweight(slots(indices, index, crow, rows, k, n, features), static_cast<Dtype>(dtype), pointer<const void>(values),
                          pointer<const void>(grad), {pointer<void>(out), stride_f, stride_d, d}, zero_untouched, threads);
  });
  m.def("packs", &packs);
  m.def("packed_words", &packed_words);
  m.def("pack", [](address w, int w_type, i64 stride_f, i64 stride_d, i64 d, i64 features, address packed, int threads) {
    py::gil_scoped_release release;
    return pack({pointer<const void>(w), static_cast<Dtype>(w_type), stride_f, stride_d, d, features, nullptr, 0, nullptr},
                pointer<std::uint32_t>(packed), threads);
  });
  m.def("encode_topk", [](const X& x, const W& w, address scale, address bias, i64 k, bool relu, bool absolute, address values,
                          address indices, address survived, int path, address stats, int threads) {
    py::gil_scoped_release release;
    return encode_topk(activations(x, w), weights(w), pointer<const float>(scale), pointer<const float>(bias), k, relu, absolute,
                       pointer<float>(values), pointer<i64>(indices), static_cast<EncodePath>(path), threads, pointer<EncodeStats>(stats),
                       pointer<std::uint8_t>(survived));
  });
  struct Owned {
    Entries* entries;
    i64 status;
    float min_kept;
    Owned(Entries* entries, i64 status, float min_kept) : entries(entries), status(status), min_kept(min_kept) {}
    Owned(const Owned&) = delete;
    Owned& operator=(const Owned&) = delete;
    ~Owned() { free_entries(entries); }
  };
  py::class_<Owned>(m, "Entries")
      .def_readonly("status", &Owned::status)
      .def_readonly("min_kept", &Owned::min_kept)
      .def_property_readonly("count", [](const Owned& o) { return entries_count(*o.entries); })
      .def("copy", [](const Owned& o, address values, address col, address crow, address flags, int threads) {
        py::gil_scoped_release release;
        copy_entries(*o.entries, pointer<float>(values), pointer<i64>(col), pointer<i64>(crow), pointer<std::uint8_t>(flags), threads);
      });
  m.def("encode_threshold",
        [](const X& x, const W& w, address scale, address bias, address threshold, float half_band, int path, address stats, int threads) {
          py::gil_scoped_release release;
          i64 status = kOk;
          Entries* const entries = encode_threshold(activations(x, w), weights(w), pointer<const float>(scale), pointer<const float>(bias),
                                                    pointer<const float>(threshold), half_band, static_cast<EncodePath>(path), threads,
                                                    pointer<EncodeStats>(stats), &status);
          return std::make_unique<Owned>(entries, status, 0.0f);
        });
  m.def("encode_gated", [](const X& x, const W& w, address b_gate, address stretch, address b_mag, int path, address stats, int threads) {
    py::gil_scoped_release release;
    i64 status = kOk;
    Entries* const entries =
        encode_gated(activations(x, w), weights(w), pointer<const float>(b_gate), pointer<const float>(stretch),
                     pointer<const float>(b_mag), static_cast<EncodePath>(path), threads, pointer<EncodeStats>(stats), &status);
    return std::make_unique<Owned>(entries, status, 0.0f);
  });
  m.def("encode_batch_topk", [](const X& x, const W& w, address scale, address bias, i64 total, int path, address stats, int threads) {
    py::gil_scoped_release release;
    i64 status = kOk;
    float min_kept = 0;
    Entries* const entries =
        encode_batch_topk(activations(x, w), weights(w), pointer<const float>(scale), pointer<const float>(bias), total,
                          static_cast<EncodePath>(path), threads, pointer<EncodeStats>(stats), &min_kept, &status);
    return std::make_unique<Owned>(entries, status, min_kept);
  });
  m.def("spline_code", [](const X& x, const W& w, address bias, address words, int path, address stats, int threads) {
    py::gil_scoped_release release;
    return spline_code(activations(x, w), weights(w), pointer<const float>(bias), pointer<i64>(words), static_cast<EncodePath>(path),
                       threads, pointer<EncodeStats>(stats));
  });
  m.def("match_cosine", [](const X& x, const W& w, i64 k, bool absolute, bool exclude_self, address similarity, address index, int path,
                           address stats, int threads) {
    py::gil_scoped_release release;
    return match_cosine(activations(x, w), weights(w), k, absolute, exclude_self, pointer<float>(similarity), pointer<i64>(index),
                        static_cast<EncodePath>(path), threads, pointer<EncodeStats>(stats));
  });
  m.def("match_pair", [](const X& x, const W& w, i64 k_ab, i64 k_ba, address ab, address ab_index, address ba, address ba_index,
                         address low, address low_index, address stats, int threads) {
    py::gil_scoped_release release;
    return match_pair(activations(x, w), weights(w), k_ab, k_ba, pointer<float>(ab), pointer<i64>(ab_index), pointer<float>(ba),
                      pointer<i64>(ba_index), pointer<float>(low), pointer<i64>(low_index), threads, pointer<EncodeStats>(stats));
  });
  m.attr("UNSUPPORTED") = kUnsupported;
  m.def("screen_bounds", [](const X& x, const W& w, address scale, address bias, bool bf16, address lo, address hi, int threads) {
    py::gil_scoped_release release;
    bool screens = false;
    const i64 status = screen_bounds(activations(x, w), weights(w), pointer<const float>(scale), pointer<const float>(bias), bf16,
                                     pointer<float>(lo), pointer<float>(hi), &screens, threads);
    return status == kOk && !screens ? kUnsupported : status;
  });
  m.def("hamming", [](address a, i64 rows_a, i64 stride_a, address b, i64 rows_b, i64 stride_b, i64 words, address out, i64 out_stride_a,
                      i64 out_stride_b, bool vpopcnt, int threads) {
    py::gil_scoped_release release;
    return hamming({pointer<const i64>(a), rows_a, stride_a, words}, {pointer<const i64>(b), rows_b, stride_b, words},
                   pointer<std::int32_t>(out), out_stride_a, out_stride_b, vpopcnt, threads);
  });
  m.def("hamming_topk", [](address a, i64 rows_a, i64 stride_a, address b, i64 rows_b, i64 stride_b, i64 words, i64 k, address distance,
                           address index, bool vpopcnt, int threads) {
    py::gil_scoped_release release;
    return hamming_topk({pointer<const i64>(a), rows_a, stride_a, words}, {pointer<const i64>(b), rows_b, stride_b, words}, k,
                        pointer<std::int32_t>(distance), pointer<i64>(index), vpopcnt, threads);
  });
  m.def("pack_signs", [](address z, int signs, i64 rows, i64 stride, i64 neurons, address taking_part, address words, int threads) {
    py::gil_scoped_release release;
    return pack_signs(pointer<const void>(z), static_cast<Signs>(signs), rows, stride, neurons, pointer<const std::uint8_t>(taking_part),
                      pointer<i64>(words), threads);
  });
  m.def("hash_signs", [](address z, int signs, i64 rows, i64 stride, i64 neurons, address taking_part, std::uint32_t layer,
                         std::uint64_t seed, int bits, address hashes, int threads) {
    py::gil_scoped_release release;
    return hash_signs(pointer<const void>(z), static_cast<Signs>(signs), rows, stride, neurons, pointer<const std::uint8_t>(taking_part),
                      {layer, seed, bits}, pointer<i64>(hashes), threads);
  });
  m.def("hash_code", [](address words, i64 rows, i64 stride, i64 n_words, address taking_part, std::uint32_t layer, std::uint64_t seed,
                        int bits, address hashes, int threads) {
    py::gil_scoped_release release;
    return hash_code(pointer<const i64>(words), rows, stride, n_words, pointer<const std::uint8_t>(taking_part), {layer, seed, bits},
                     pointer<i64>(hashes), threads);
  });
  m.def("adam",
        [](bool sparse, address indices, int index, address crow, i64 rows, i64 k, i64 n, address values, address grad, i64 grad_f,
           i64 grad_d, address factor, address w, address moment, address square, i64 features, i64 d, i64 stride_f, i64 stride_d,
           double lr, double beta1, double beta2, double eps, double weight_decay, i64 step, bool project, bool normalise, int threads) {
          py::gil_scoped_release release;
          const Slots given = slots(indices, index, crow, rows, k, n, features);
          return adam({sparse ? &given : nullptr, pointer<const float>(values), pointer<const float>(grad), grad_f, grad_d},
                      pointer<const float>(factor),
                      {pointer<float>(w), pointer<float>(moment), pointer<float>(square), features, d, stride_f, stride_d},
                      {lr, beta1, beta2, eps, weight_decay, step, project, normalise}, threads);
        });
  m.def("signum", [](bool sparse, address indices, int index, address crow, i64 rows, i64 k, i64 n, address values, address grad,
                     i64 grad_f, i64 grad_d, address y, address z, i64 features, i64 d, i64 stride_f, i64 stride_d, double lr,
                     double momentum, double share, bool project, bool normalise, int threads) {
    py::gil_scoped_release release;
    const Slots given = slots(indices, index, crow, rows, k, n, features);
    return signum({sparse ? &given : nullptr, pointer<const float>(values), pointer<const float>(grad), grad_f, grad_d},
                  {pointer<float>(y), pointer<float>(z), nullptr, features, d, stride_f, stride_d},
                  {lr, momentum, share, project, normalise}, threads);
  });
  m.def("grad_squares", [](bool sparse, address indices, int index, address crow, i64 rows, i64 k, i64 n, address values, address grad,
                           i64 grad_f, i64 grad_d, address w, i64 features, i64 d, i64 stride_f, i64 stride_d, bool project, address total,
                           int threads) {
    py::gil_scoped_release release;
    const Slots given = slots(indices, index, crow, rows, k, n, features);
    return grad_squares({sparse ? &given : nullptr, pointer<const float>(values), pointer<const float>(grad), grad_f, grad_d},
                        {pointer<float>(w), nullptr, nullptr, features, d, stride_f, stride_d}, project, pointer<float>(total), threads);
  });
  m.attr("NO_MEMORY") = kNoMemory;

  m.def("levels", [] {  // built and supported here, ascending
    py::list names;
    for (int i = 0; i < kLevels; ++i) {
      const Level level = static_cast<Level>(i);
      if (level_built(level) && level_supported(level)) names.append(level_name(level));
    }
    return names;
  });
  m.def("level", [] { return level_name(current_level()); });
  m.def("set_level", [](const std::string& name) { return set_level(level_of(name)); });
  m.def("cpu_features", [] {
    py::dict features;
    for (const Feature* f = cpu_features(); f->name != nullptr; ++f) features[f->name] = f->present;
    return features;
  });
  m.def("threads_available", &threads_available);
  m.def("force_serial", &force_serial);
}
