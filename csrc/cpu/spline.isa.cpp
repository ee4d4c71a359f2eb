// The screen of spline codes: which signs a screened product decides. bound.h states the bound.
#include "cpu/spline.h"

#include "isa.h"

#ifdef FASTSAE_SCREENS
#include "cpu/engine/tile.isa.h"

namespace fastsae {
namespace FASTSAE_ISA {
namespace {

struct SignScreen {
  const Undecided& undecided;
  const ScreenRows& rows;
  uint32_t* words;
  int64_t ld;
  Features<false> f{};

  FASTSAE_INLINE void panel(const ScreenPanels& p, int panel) { f.set(p, panel); }

  FASTSAE_INLINE void row(int64_t row, Vec r0, Vec r1) {
    const Vec a = broadcast(rows.a[row]), c = broadcast(rows.c[row]), none = zero();
    const Vec e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const uint32_t on =
        joined(above(f.lower(0, r0, e0), none), above(f.lower(1, r1, e1), none));
    const uint32_t maybe =
        joined(not_at_most(f.upper(0, r0, e0), none), not_at_most(f.upper(1, r1, e1), none));
    words[row * ld + f.first / 32] = on & f.exist;
    const uint32_t open = maybe & ~on & f.exist;
    if (open != 0) append(undecided, row, open, f, r0, r1, e0, e1);
  }
};

template <ScreenFormat kFormat>
void signs_as(const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const Undecided& undecided, uint32_t* words,
              int64_t ld) {
  SignScreen screen{undecided, rows, words, ld};
  run_block<kFormat>(rows, panels, next, screen);
}

void screen_signs(ScreenFormat format, const ScreenRows& rows, const ScreenPanels& panels, const Prefetch& next, const Undecided& undecided,
                  uint32_t* words, int64_t ld) {
  constexpr decltype(&signs_as<ScreenFormat::int8>) kSigns[kScreenFormats] = {
      signs_as<ScreenFormat::int8>, FASTSAE_BF16(signs_as<ScreenFormat::bf16>), signs_as<ScreenFormat::exact>};
  kSigns[static_cast<int>(format)](rows, panels, next, undecided, words, ld);
}

}  // namespace

const SplineKernels spline_kernels = {screen_signs};

}  // namespace FASTSAE_ISA
}  // namespace fastsae
#endif
