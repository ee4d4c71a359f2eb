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

  FASTSAE_INLINE void row(int64_t row, __m512 r0, __m512 r1) {
    const __m512 a = _mm512_set1_ps(rows.a[row]), c = _mm512_set1_ps(rows.c[row]), none = _mm512_setzero_ps();
    const __m512 e0 = f.slack(0, a, c), e1 = f.slack(1, a, c);
    const uint32_t on =
        joined(_mm512_cmp_ps_mask(f.lower(0, r0, e0), none, _CMP_GT_OQ), _mm512_cmp_ps_mask(f.lower(1, r1, e1), none, _CMP_GT_OQ));
    const uint32_t maybe =
        joined(_mm512_cmp_ps_mask(f.upper(0, r0, e0), none, _CMP_NLE_UQ), _mm512_cmp_ps_mask(f.upper(1, r1, e1), none, _CMP_NLE_UQ));
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
