// The Python module: addresses in, a CUDA status out. Arguments are checked in fastsae/native_cuda.py.
#include <pybind11/pybind11.h>

#ifdef FASTSAE_EMULATE
#include "test/emulate.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "cuda/cuda.h"

#ifndef FASTSAE_MODULE
#define FASTSAE_MODULE _cuda
#endif

namespace py = pybind11;
using address = std::uintptr_t;
using i64 = std::int64_t;

namespace {
template <class T>
T* pointer(address p) {
  return reinterpret_cast<T*>(p);
}
}  // namespace

PYBIND11_MODULE(FASTSAE_MODULE, m) {
  using namespace fastsae::cuda;
  using release = py::call_guard<py::gil_scoped_release>;
#define FASTSAE_WHERE int device, address stream
#define FASTSAE_AT Where{device, pointer<void>(stream)}
  m.attr("MAX_K") = kMaxK;
  m.def(
      "select_scores",
      [](FASTSAE_WHERE, address z, int type, i64 rows, i64 n, i64 stride, i64 first, i64 k, bool resume, address keys) {
        return select_scores(FASTSAE_AT, pointer<const void>(z), static_cast<Type>(type), rows, n, stride, first, k, resume,
                             pointer<std::uint64_t>(keys));
      },
      release());
  m.def(
      "select_distances",
      [](FASTSAE_WHERE, address distance, i64 rows, i64 n, i64 stride, i64 first, i64 k, bool resume, address keys) {
        return select_distances(FASTSAE_AT, pointer<const std::int32_t>(distance), rows, n, stride, first, k, resume,
                                pointer<std::uint64_t>(keys));
      },
      release());
  m.def(
      "finish_scores",
      [](FASTSAE_WHERE, address keys, i64 count, bool relu, address values, int type, address indices) {
        return finish_scores(FASTSAE_AT, pointer<const std::uint64_t>(keys), count, relu, pointer<void>(values), static_cast<Type>(type),
                             pointer<i64>(indices));
      },
      release());
  m.def(
      "finish_distances",
      [](FASTSAE_WHERE, address keys, i64 count, address distance, address indices) {
        return finish_distances(FASTSAE_AT, pointer<const std::uint64_t>(keys), count, pointer<std::int32_t>(distance),
                                pointer<i64>(indices));
      },
      release());
  m.def(
      "hamming",
      [](FASTSAE_WHERE, address a, i64 n, i64 stride_a, address b, i64 count_b, i64 stride_b, i64 words, address out, i64 out_stride_a,
         i64 out_stride_b) {
        return hamming(FASTSAE_AT, pointer<const i64>(a), n, stride_a, pointer<const i64>(b), count_b, stride_b, words,
                       pointer<std::int32_t>(out), out_stride_a, out_stride_b);
      },
      release());
  m.def(
      "mark",
      [](FASTSAE_WHERE, address indices, int index, i64 count, i64 size, address mask, address flag) {
        return mark(FASTSAE_AT, pointer<const void>(indices), static_cast<Index>(index), count, size, pointer<std::uint8_t>(mask),
                    pointer<std::int32_t>(flag));
      },
      release());
  m.def(
      "pack_signs",
      [](FASTSAE_WHERE, address z, int type, i64 rows, i64 stride, i64 neurons, address mask, address words) {
        return pack_signs(FASTSAE_AT, pointer<const void>(z), static_cast<Type>(type), rows, stride, neurons,
                          pointer<const std::uint8_t>(mask), pointer<i64>(words));
      },
      release());
  m.def(
      "neuron_keys",
      [](FASTSAE_WHERE, i64 neurons, address mask, std::uint32_t layer, std::uint64_t seed, int bits, address keys) {
        return neuron_keys(FASTSAE_AT, neurons, pointer<const std::uint8_t>(mask), layer, seed, bits, pointer<i64>(keys));
      },
      release());
  m.def(
      "hash_signs",
      [](FASTSAE_WHERE, address z, int type, i64 rows, i64 stride, i64 neurons, address keys, int bits, address hashes) {
        return hash_signs(FASTSAE_AT, pointer<const void>(z), static_cast<Type>(type), rows, stride, neurons, pointer<const i64>(keys),
                          bits, pointer<i64>(hashes));
      },
      release());
  m.def(
      "hash_code",
      [](FASTSAE_WHERE, address words, i64 rows, i64 stride, i64 n_words, address keys, int bits, address hashes) {
        return hash_code(FASTSAE_AT, pointer<const i64>(words), rows, stride, n_words, pointer<const i64>(keys), bits,
                         pointer<i64>(hashes));
      },
      release());
  m.def("by_feature_bytes", [](FASTSAE_WHERE, i64 n, i64 features) { return by_feature_bytes(FASTSAE_AT, n, features); }, release());
  m.def(
      "by_feature",
      [](FASTSAE_WHERE, address indices, int index, i64 n, i64 features, address workspace, address order, address segments, address flag) {
        return by_feature(FASTSAE_AT, pointer<const void>(indices), static_cast<Index>(index), n, features, pointer<void>(workspace),
                          pointer<std::uint32_t>(order), pointer<std::uint32_t>(segments), pointer<std::int32_t>(flag));
      },
      release());
  m.def(
      "permute_slots",
      [](FASTSAE_WHERE, address order, i64 n, address values, int type, address crow, i64 rows, i64 k, address row, address value) {
        return permute_slots(FASTSAE_AT, pointer<const std::uint32_t>(order), n, pointer<const void>(values), static_cast<Type>(type),
                             pointer<const i64>(crow), rows, k, pointer<std::uint32_t>(row), pointer<float>(value));
      },
      release());
  m.def(
      "sum_by_feature",
      [](FASTSAE_WHERE, address segments, i64 n, i64 features, address row, address value, address grad, int type, i64 stride_r, i64 d,
         i64 split, address partials, address out, i64 stride_f) {
        return sum_by_feature(FASTSAE_AT, pointer<const std::uint32_t>(segments), n, features, pointer<const std::uint32_t>(row),
                              pointer<const float>(value), pointer<const void>(grad), static_cast<Type>(type), stride_r, d, split,
                              pointer<float>(partials), pointer<void>(out), stride_f);
      },
      release());
#undef FASTSAE_WHERE
#undef FASTSAE_AT
#ifdef FASTSAE_EMULATE
  m.def("schedule", [](int order) { emulate::schedule() = order; });
  m.def("error", [](int) { return "no error in the emulation"; });
#else
  m.def("error", [](int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); });
#endif
}
