// What the kernels use of CUDA and of number formats. With FASTSAE_EMULATE the same names come from tests/gpu/emulate.h.
#pragma once
#include <cstdint>

#ifdef FASTSAE_EMULATE
#include "emulate.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>
#endif

#include "cuda/cuda.h"
#include "integers.h"

#define FASTSAE_DEVICE __device__ __forceinline__

namespace fastsae::cuda {

constexpr int kWarp = 32;
constexpr unsigned kAllLanes = 0xffffffffu;

#ifndef FASTSAE_EMULATE
inline int begin(Where where) { return cudaSetDevice(where.device); }
// Queues a kernel; 0 or the error of the launch.
template <class... P, class... A>
int launch(void (*kernel)(P...), Where where, int64_t blocks, int threads, A... args) {
  if (blocks == 0) return cudaSuccess;
  if (blocks > 0x7fffffff) return cudaErrorInvalidConfiguration;
  if (const cudaError_t error = cudaSetDevice(where.device); error != cudaSuccess) return error;
  kernel<<<dim3(static_cast<unsigned>(blocks)), threads, 0, static_cast<cudaStream_t>(where.stream)>>>(static_cast<P>(args)...);
  return cudaGetLastError();
}

FASTSAE_DEVICE float half_to_float(uint16_t bits) { return __half2float(__ushort_as_half(bits)); }
FASTSAE_DEVICE uint16_t float_to_half(float x) { return __half_as_ushort(__float2half_rn(x)); }
FASTSAE_DEVICE uint16_t float_to_bfloat(float x) { return __bfloat16_as_ushort(__float2bfloat16_rn(x)); }
#else
inline int begin(Where) { return 0; }
template <class... P, class... A>
int launch(void (*kernel)(P...), Where, int64_t blocks, int threads, A... args) {
  emulate::run(blocks, threads, [=] { kernel(static_cast<P>(args)...); });
  return 0;
}
#endif

// Stored numbers, by their bits.
struct Half {
  uint16_t bits;
};
struct Bfloat {
  uint16_t bits;
};

FASTSAE_DEVICE float to_float(float x) { return x; }
FASTSAE_DEVICE float to_float(Half x) { return half_to_float(x.bits); }
FASTSAE_DEVICE float to_float(Bfloat x) { return __uint_as_float(static_cast<uint32_t>(x.bits) << 16); }
FASTSAE_DEVICE void from_float(float x, float& to) { to = x; }
FASTSAE_DEVICE void from_float(float x, Half& to) { to.bits = float_to_half(x); }
FASTSAE_DEVICE void from_float(float x, Bfloat& to) { to.bits = float_to_bfloat(x); }

// body(T{}) with the type of floating numbers, or of indices, as they are stored.
template <class Body>
int with_type(Type type, const Body& body) {
  if (type == Type::f32) return body(float{});
  return type == Type::f16 ? body(Half{}) : body(Bfloat{});
}
template <class Body>
int with_type(Index index, const Body& body) {
  return index == Index::i32 ? body(int32_t{}) : body(int64_t{});
}

// 16 bytes, read and written at once.
struct alignas(16) Wide {
  uint32_t words[4];
};

}  // namespace fastsae::cuda
