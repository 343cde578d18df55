// The tensor cores' instruction of sm_90a, for every number of columns that a tile can have. An accumulator is an
// operand of its own in PTX, so that the lists of them are made by macros; the rest of sm_90a's PTX is in
// ptx_sm90.cuh.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace moe_ext::cuda::ptx {

// d (64, n) = a (64, 16) * b (16, n), plus d if `accumulate`; float32 accumulators, n a multiple of 16 up to 192.
// a and b are described by wgmma_operand(): a's rows are rows (kTransposed: the columns of a), b's rows are columns. Of
// a warpgroup, warp w has rows 16 w to 16 w + 15: with g = lane / 4 and t = lane % 4, d[4 j..4 j + 3] are row g columns
// 8 j + 2 t and the next, then row g + 8. The accumulators must not be touched until wgmma_wait() has waited for the
// group.
template <int kColumns, typename T, bool kTransposed = false>
__device__ __forceinline__ void wgmma(float* d, uint64_t a, uint64_t b, int accumulate) {
#define MOE_EXT_8(i)                                                                                          \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define MOE_EXT_D16 MOE_EXT_8(0)
#define MOE_EXT_D32 MOE_EXT_D16, MOE_EXT_8(8)
#define MOE_EXT_D48 MOE_EXT_D32, MOE_EXT_8(16)
#define MOE_EXT_D64 MOE_EXT_D48, MOE_EXT_8(24)
#define MOE_EXT_D80 MOE_EXT_D64, MOE_EXT_8(32)
#define MOE_EXT_D96 MOE_EXT_D80, MOE_EXT_8(40)
#define MOE_EXT_D112 MOE_EXT_D96, MOE_EXT_8(48)
#define MOE_EXT_D128 MOE_EXT_D112, MOE_EXT_8(56)
#define MOE_EXT_D144 MOE_EXT_D128, MOE_EXT_8(64)
#define MOE_EXT_D160 MOE_EXT_D144, MOE_EXT_8(72)
#define MOE_EXT_D176 MOE_EXT_D160, MOE_EXT_8(80)
#define MOE_EXT_D192 MOE_EXT_D176, MOE_EXT_8(88)
#define MOE_EXT_P16 "%0, %1, %2, %3, %4, %5, %6, %7"
#define MOE_EXT_P32 MOE_EXT_P16 ", %8, %9, %10, %11, %12, %13, %14, %15"
#define MOE_EXT_P48 MOE_EXT_P32 ", %16, %17, %18, %19, %20, %21, %22, %23"
#define MOE_EXT_P64 MOE_EXT_P48 ", %24, %25, %26, %27, %28, %29, %30, %31"
#define MOE_EXT_P80 MOE_EXT_P64 ", %32, %33, %34, %35, %36, %37, %38, %39"
#define MOE_EXT_P96 MOE_EXT_P80 ", %40, %41, %42, %43, %44, %45, %46, %47"
#define MOE_EXT_P112 MOE_EXT_P96 ", %48, %49, %50, %51, %52, %53, %54, %55"
#define MOE_EXT_P128 MOE_EXT_P112 ", %56, %57, %58, %59, %60, %61, %62, %63"
#define MOE_EXT_P144 MOE_EXT_P128 ", %64, %65, %66, %67, %68, %69, %70, %71"
#define MOE_EXT_P160 MOE_EXT_P144 ", %72, %73, %74, %75, %76, %77, %78, %79"
#define MOE_EXT_P176 MOE_EXT_P160 ", %80, %81, %82, %83, %84, %85, %86, %87"
#define MOE_EXT_P192 MOE_EXT_P176 ", %88, %89, %90, %91, %92, %93, %94, %95"
// `a_at`, `b_at`, `p_at`, `t_at`: numbers of the operands after the accumulators.
#define MOE_EXT_WGMMA(n, type, a_at, b_at, p_at, t_at)                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #p_at                                        \
               ", 0;\n"                                                                          \
               "wgmma.mma_async.sync.aligned.m64n" #n "k16.f32." type "." type " {" MOE_EXT_P##n \
               "}, %" #a_at ", %" #b_at ", p, 1, 1, %" #t_at ", 0;\n}"                           \
               : MOE_EXT_D##n                                                                    \
               : "l"(a), "l"(b), "r"(accumulate), "n"(kTransposed ? 1 : 0)                       \
               : "memory")
#define MOE_EXT_WGMMA_OF(n, a_at, b_at, p_at, t_at)     \
  if constexpr (kColumns == n) {                        \
    if constexpr (std::is_same_v<T, __nv_bfloat16>) {   \
      MOE_EXT_WGMMA(n, "bf16", a_at, b_at, p_at, t_at); \
    } else {                                            \
      MOE_EXT_WGMMA(n, "f16", a_at, b_at, p_at, t_at);  \
    }                                                   \
  }
  static_assert(kColumns % 16 == 0 && 0 < kColumns && kColumns <= 192);
  MOE_EXT_WGMMA_OF(16, 8, 9, 10, 11)
  MOE_EXT_WGMMA_OF(32, 16, 17, 18, 19)
  MOE_EXT_WGMMA_OF(48, 24, 25, 26, 27)
  MOE_EXT_WGMMA_OF(64, 32, 33, 34, 35)
  MOE_EXT_WGMMA_OF(80, 40, 41, 42, 43)
  MOE_EXT_WGMMA_OF(96, 48, 49, 50, 51)
  MOE_EXT_WGMMA_OF(112, 56, 57, 58, 59)
  MOE_EXT_WGMMA_OF(128, 64, 65, 66, 67)
  MOE_EXT_WGMMA_OF(144, 72, 73, 74, 75)
  MOE_EXT_WGMMA_OF(160, 80, 81, 82, 83)
  MOE_EXT_WGMMA_OF(176, 88, 89, 90, 91)
  MOE_EXT_WGMMA_OF(192, 96, 97, 98, 99)
#undef MOE_EXT_8
#undef MOE_EXT_D16
#undef MOE_EXT_D32
#undef MOE_EXT_D48
#undef MOE_EXT_D64
#undef MOE_EXT_D80
#undef MOE_EXT_D96
#undef MOE_EXT_D112
#undef MOE_EXT_D128
#undef MOE_EXT_D144
#undef MOE_EXT_D160
#undef MOE_EXT_D176
#undef MOE_EXT_D192
#undef MOE_EXT_P16
#undef MOE_EXT_P32
#undef MOE_EXT_P48
#undef MOE_EXT_P64
#undef MOE_EXT_P80
#undef MOE_EXT_P96
#undef MOE_EXT_P112
#undef MOE_EXT_P128
#undef MOE_EXT_P144
#undef MOE_EXT_P160
#undef MOE_EXT_P176
#undef MOE_EXT_P192
#undef MOE_EXT_WGMMA
#undef MOE_EXT_WGMMA_OF
}

}  // namespace moe_ext::cuda::ptx
