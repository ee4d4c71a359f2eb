// The Python module of the CUDA kernels: CUDA statuses out.
#include "bind.h"

#ifdef FASTSAE_EMULATE
#include "emulate.h"
#else
#include <cuda_runtime_api.h>
#endif

#include "cuda/cuda.h"

#ifndef FASTSAE_MODULE
#define FASTSAE_MODULE _cuda
#endif

namespace fastsae {
FASTSAE_FIELDS(cuda::Where, 2)
}

PYBIND11_MODULE(FASTSAE_MODULE, m) {
  using namespace fastsae::cuda;
  using fastsae::def;
#define FASTSAE_DEF(function) def(m, #function, function)
  FASTSAE_DEF(select_scores);
  FASTSAE_DEF(select_distances);
  FASTSAE_DEF(finish_scores);
  FASTSAE_DEF(finish_distances);
  FASTSAE_DEF(hamming);
  FASTSAE_DEF(mark);
  FASTSAE_DEF(pack_signs);
  FASTSAE_DEF(neuron_keys);
  FASTSAE_DEF(hash_signs);
  FASTSAE_DEF(hash_code);
  FASTSAE_DEF(by_feature_bytes);
  FASTSAE_DEF(by_feature);
  FASTSAE_DEF(permute_slots);
  FASTSAE_DEF(sum_by_feature);
#undef FASTSAE_DEF
  m.attr("MAX_K") = kMaxK;
#ifdef FASTSAE_EMULATE
  m.def("schedule", [](int order) { emulate::schedule() = order; });
  m.def("error", [](int) { return "no error in the emulation"; });
#else
  m.def("error", [](int status) { return cudaGetErrorString(static_cast<cudaError_t>(status)); });
#endif
}
