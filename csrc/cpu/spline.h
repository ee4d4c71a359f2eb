// What spline.cpp asks of spline.isa.cpp (levels that can screen).
#pragma once
#include "cpu/engine/kernels.h"

namespace fastsae {

struct SplineKernels {
  // Sets the bits of neurons that are surely on, of the rows at `words` (ld words of 32 bits apart, neuron j at bit j % 32 of word j / 32)
  // and clears the others of the block; those that are not sure go to `undecided`.
  void (*screen_signs)(ScreenFormat, const ScreenRows&, const ScreenPanels&, const Prefetch&, const Undecided&, uint32_t* words,
                       int64_t ld);
};

FASTSAE_DECLARE_TABLES(SplineKernels, spline_kernels)

}  // namespace fastsae
