// wgmma: the products of a warpgroup (PTX ISA: wgmma.mma_async), part of ptx.h and included by it alone.
#pragma once

namespace dnc {

#define DNC_ACCUMULATORS_8(i) \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), "+f"(d[i + 7])
#define DNC_ACCUMULATORS_32 DNC_ACCUMULATORS_8(0), DNC_ACCUMULATORS_8(8), DNC_ACCUMULATORS_8(16), DNC_ACCUMULATORS_8(24)
#define DNC_ACCUMULATORS_40 DNC_ACCUMULATORS_32, DNC_ACCUMULATORS_8(32)
#define DNC_NAMES_32                                                       \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, " \
  "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define DNC_NAMES_40 \
  DNC_NAMES_32       \
  ", "               \
  "%32, %33, %34, %35, %36, %37, %38, %39"

// One case: N columns in R = N / 2 accumulators, `type` twice in the name; A, B and S are the numbers of the operands after
// them.
#define DNC_MULTIPLY(N, R, A, B, S, type, columns)                                                                           \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #S ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" DNC_NAMES_##R "}, %" #A ", %" #B ", p, 1, 1, " columns ", 0;\n}"                                         \
               : DNC_ACCUMULATORS_##R                                                                                        \
               : "l"(a), "l"(b), "r"(int(accumulate)))
#define DNC_MULTIPLY_TRANSPOSED(N, R, A0, A1, A2, A3, B, S, type)                                                            \
  asm volatile("{\n.reg .pred p;\nsetp.ne.b32 p, %" #S ", 0;\nwgmma.mma_async.sync.aligned.m64n" #N "k16.f32." type "." type \
               " {" DNC_NAMES_##R "}, {%" #A0 ", %" #A1 ", %" #A2 ", %" #A3 "}, %" #B ", p, 1, 1, 1;\n}"                     \
               : DNC_ACCUMULATORS_##R                                                                                        \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(int(accumulate)))

// d [64,2R] (+)= a [64,16] b [2R,16]^T; both descriptors, 16-bit elements, fp32 sums. kColumns: a lies as [16,64], its rows'
// neighbours adjacent. A thread's d: rows g and g + 8 of its warp's 16, columns 8 j + 2 q and the next in d[4 j], d[4 j + 1]
// and d[4 j + 2], d[4 j + 3]; g = lane / 4, q = lane % 4.
template <class T, bool kColumns, int R>
__device__ inline void multiply(float (&d)[R], uint64_t a, uint64_t b, bool accumulate) {
  static_assert(R == 40, "an instruction of each width is written out below");
  if constexpr (std::is_same_v<T, BFloat16>) {
    if constexpr (kColumns) {
      DNC_MULTIPLY(80, 40, 40, 41, 42, "bf16", "1");
    } else {
      DNC_MULTIPLY(80, 40, 40, 41, 42, "bf16", "0");
    }
  } else {
    if constexpr (kColumns) {
      DNC_MULTIPLY(80, 40, 40, 41, 42, "f16", "1");
    } else {
      DNC_MULTIPLY(80, 40, 40, 41, 42, "f16", "0");
    }
  }
}

// d [64,2R] (+)= a [64,16] b [16,2R]: a from registers, in the layout of multiply_16x8x16; b a descriptor, its columns
// adjacent.
template <class T, int R>
__device__ inline void multiply_transposed(float (&d)[R], const uint32_t (&a)[4], uint64_t b, bool accumulate) {
  static_assert(R == 32, "an instruction of each width is written out below");
  if constexpr (std::is_same_v<T, BFloat16>) {
    DNC_MULTIPLY_TRANSPOSED(64, 32, 32, 33, 34, 35, 36, 37, "bf16");
  } else {
    DNC_MULTIPLY_TRANSPOSED(64, 32, 32, 33, 34, 35, 36, 37, "f16");
  }
}

#undef DNC_MULTIPLY
#undef DNC_MULTIPLY_TRANSPOSED
#undef DNC_NAMES_32
#undef DNC_NAMES_40
#undef DNC_ACCUMULATORS_8
#undef DNC_ACCUMULATORS_32
#undef DNC_ACCUMULATORS_40

}  // namespace dnc
