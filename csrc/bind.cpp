// The only file that knows Python: addresses in, status out. Arguments are checked in fastsae/native.py, indices in the functions.
#include <pybind11/pybind11.h>

#include <cstdint>

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
  m.def("encode_topk", [](address x, i64 rows, i64 stride_row, i64 stride_d, address w, i64 w_stride_f, i64 w_stride_d, i64 d, i64 features,
                          address bias, address b_pre, address scale, i64 k, bool relu, address values, address indices, int path,
                          int threads, address stats, address survived) {
    py::gil_scoped_release release;
    return encode_topk(pointer<const float>(x), rows, stride_row, stride_d, {pointer<void>(w), w_stride_f, w_stride_d, d}, features,
                       pointer<const float>(bias), pointer<const float>(b_pre), pointer<const float>(scale), k, relu,
                       pointer<float>(values), pointer<i64>(indices), static_cast<EncodePath>(path), threads, pointer<EncodeStats>(stats),
                       pointer<std::uint8_t>(survived));
  });
  m.def("adam", [](bool sparse, address indices, int index, address crow, i64 rows, i64 k, i64 n, address values, address grad,
                   address factor, address w, address moment, address square, i64 features, i64 d, double lr, double beta1, double beta2,
                   double eps, double weight_decay, i64 step, bool project, bool normalise, int threads) {
    py::gil_scoped_release release;
    const Slots given = slots(indices, index, crow, rows, k, n, features);
    return adam(sparse ? &given : nullptr, pointer<const float>(values), pointer<const float>(grad), pointer<const float>(factor),
                pointer<float>(w), pointer<float>(moment), pointer<float>(square), features, d,
                {lr, beta1, beta2, eps, weight_decay, step, project, normalise}, threads);
  });
  m.def("grad_squares", [](bool sparse, address indices, int index, address crow, i64 rows, i64 k, i64 n, address values, address grad,
                           address w, i64 features, i64 d, bool project, address total, int threads) {
    py::gil_scoped_release release;
    const Slots given = slots(indices, index, crow, rows, k, n, features);
    return grad_squares(sparse ? &given : nullptr, pointer<const float>(values), pointer<const float>(grad), pointer<const float>(w),
                        features, d, project, pointer<float>(total), threads);
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
