// The Python module of the CPU kernels: statuses out. Indices are checked in the functions.
#include "bind.h"

#include "fastsae.h"
#include "isa.h"
#include "parallel.h"

namespace py = pybind11;

namespace fastsae {

FASTSAE_FIELDS(Slots, 7)
FASTSAE_FIELDS(Matrix, 4)
FASTSAE_FIELDS(Activations, 7)
FASTSAE_FIELDS(Weights, 9)
FASTSAE_FIELDS(Gradient, 6)
FASTSAE_FIELDS(AdamMatrices, 7)
FASTSAE_FIELDS(AdamOptions, 8)
FASTSAE_FIELDS(SignumOptions, 5)
FASTSAE_FIELDS(Codes, 4)
FASTSAE_FIELDS(HashKey, 3)

namespace {

struct Owned {
  Entries* entries = new_entries();
  Owned() = default;
  Owned(const Owned&) = delete;
  Owned& operator=(const Owned&) = delete;
  ~Owned() { free_entries(entries); }
};

Level level_of(const std::string& name) {
  for (int i = 0; i < kLevels; ++i)
    if (name == level_name(static_cast<Level>(i))) return static_cast<Level>(i);
  throw py::value_error("unknown instruction set level \"" + name + "\"");
}

}  // namespace
}  // namespace fastsae

PYBIND11_MODULE(_C, m) {
  using namespace fastsae;

#define FASTSAE_DEF(function) def(m, #function, function)
  FASTSAE_DEF(decode);
  FASTSAE_DEF(decode_dvalues);
  FASTSAE_DEF(decode_dweight);
  FASTSAE_DEF(packs);
  FASTSAE_DEF(packed_words);
  FASTSAE_DEF(pack);
  FASTSAE_DEF(encode_topk);
  FASTSAE_DEF(topk_changes);
  FASTSAE_DEF(encode_threshold);
  FASTSAE_DEF(encode_gated);
  FASTSAE_DEF(encode_batch_topk);
  FASTSAE_DEF(entries_count);
  FASTSAE_DEF(copy_entries);
  FASTSAE_DEF(spline_code);
  FASTSAE_DEF(match_cosine);
  FASTSAE_DEF(match_pair);
  FASTSAE_DEF(screen_bounds);
  FASTSAE_DEF(hamming);
  FASTSAE_DEF(hamming_topk);
  FASTSAE_DEF(pack_signs);
  FASTSAE_DEF(hash_signs);
  FASTSAE_DEF(hash_code);
  FASTSAE_DEF(adam);
  FASTSAE_DEF(signum);
  FASTSAE_DEF(grad_squares);
#undef FASTSAE_DEF
  py::class_<Owned>(m, "Entries").def(py::init<>()).def_property_readonly("address", [](const Owned& o) {
    return reinterpret_cast<std::uintptr_t>(o.entries);
  });
  m.attr("UNSUPPORTED") = kUnsupported;
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
