// What the kernels need of a device, in two variants: inline PTX for a GPU (NVRTC, sm_80 and newer), plain
// C++ for the host emulator of tests. Everything above this header is shared by both.
#pragma once

#include "edge_cuda.h"

#ifdef EDGE_EMULATE
#include "emulator/emulator.h"
#define EDGE_KERNEL_EARLY EDGE_KERNEL
namespace edge {
EDGE_DEVICE void wait_for_inputs() {}
}  // namespace edge
#else
#define EDGE_DEVICE __device__ __forceinline__
#define EDGE_SHARED __shared__
namespace edge {
// From sm_90 on a launch may begin while the one before it still runs (programmatic dependent launch). Every
// kernel waits for that one's end, and so for all before it, before it reads what they wrote or writes; one
// that has something to do until then calls wait_for_inputs() itself.
EDGE_DEVICE void wait_for_inputs() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
EDGE_DEVICE void let_next_begin() {
#if __CUDA_ARCH__ >= 900
    asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}
}  // namespace edge
// A kernel named `symbol`: the device function after it, called with one record.
#define EDGE_KERNEL_EARLY(symbol, threads, Args, ...)                                                 \
    extern "C" __global__ void __launch_bounds__(threads) symbol(const __grid_constant__ Args args) { \
        edge::let_next_begin();                                                                       \
        __VA_ARGS__(args);                                                                            \
    }
#define EDGE_KERNEL(symbol, threads, Args, ...)                                                       \
    extern "C" __global__ void __launch_bounds__(threads) symbol(const __grid_constant__ Args args) { \
        edge::let_next_begin();                                                                       \
        edge::wait_for_inputs();                                                                      \
        __VA_ARGS__(args);                                                                            \
    }
namespace edge {
// Memory of the block that the launch asked for, 16-byte aligned.
EDGE_DEVICE char* dynamic_shared() {
    extern __shared__ __align__(16) char memory[];
    return memory;
}
}  // namespace edge
#endif

namespace edge {

constexpr int kWarp = 32;
constexpr uint32_t kAll = 0xffffffffu;

struct alignas(8) Words2 {
    uint32_t x, y;
};
struct alignas(16) Words4 {
    uint32_t x, y, z, w;
};
struct alignas(16) Floats4 {
    float x, y, z, w;
};

EDGE_DEVICE uint32_t bits_of(float v);
EDGE_DEVICE float float_of(uint32_t bits);

#ifdef EDGE_EMULATE

EDGE_DEVICE uint32_t bits_of(float v) { return __builtin_bit_cast(uint32_t, v); }
EDGE_DEVICE float float_of(uint32_t bits) { return __builtin_bit_cast(float, bits); }
EDGE_DEVICE float half_to_float(uint16_t h) { return static_cast<float>(__builtin_bit_cast(_Float16, h)); }
// Nearest even; beyond 65504 it becomes infinite.
EDGE_DEVICE uint16_t float_to_half(float v) { return __builtin_bit_cast(uint16_t, static_cast<_Float16>(v)); }
EDGE_DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
    const auto one = [](uint32_t x, uint32_t y) {
        return uint32_t{
            float_to_half(half_to_float(static_cast<uint16_t>(x)) * half_to_float(static_cast<uint16_t>(y)))};
    };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
}
EDGE_DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
    const auto one = [](uint32_t x, uint32_t y) {
        return uint32_t{
            float_to_half(half_to_float(static_cast<uint16_t>(x)) - half_to_float(static_cast<uint16_t>(y)))};
    };
    return one(a, b) | one(a >> 16, b >> 16) << 16;
}
// One instruction each; a compiler makes two of them where mask and bits are constants.
EDGE_DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) | bits; }
EDGE_DEVICE uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) { return (x & mask) ^ bits; }
// a * b + c, rounded once (in f64 the sum is exact unless its parts are 2^42 apart).
EDGE_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    const auto one = [](uint32_t x, uint32_t y, uint32_t z) {
        const auto wide = [](uint32_t h) {
            return static_cast<double>(half_to_float(static_cast<uint16_t>(h)));
        };
        return uint32_t{
            __builtin_bit_cast(uint16_t, static_cast<_Float16>(__builtin_fma(wide(x), wide(y), wide(z))))};
    };
    return one(a, b, c) | one(a >> 16, b >> 16, c >> 16) << 16;
}
EDGE_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    const uint64_t both = a | static_cast<uint64_t>(b) << 32;
    uint32_t out = 0;
    for (int i = 0; i < 4; ++i)
        out |= static_cast<uint32_t>(both >> 8 * (selector >> 4 * i & 7) & 255) << 8 * i;
    return out;
}
EDGE_DEVICE float exp2_fast(float x) { return __builtin_exp2f(x); }
EDGE_DEVICE float rcp_root(float x) { return 1.0f / __builtin_sqrtf(x); }
EDGE_DEVICE float round_even(float x) { return __builtin_nearbyintf(x); }
EDGE_DEVICE float fused(float a, float b, float c) { return __builtin_fmaf(a, b, c); }
// Rounded by themselves, whatever is added to them: a compiler may not fuse them.
EDGE_DEVICE float product(float a, float b) { return a * b; }
EDGE_DEVICE float quotient(float a, float b) { return a / b; }
EDGE_DEVICE float reciprocal(float b) { return 1.0f / b; }  // of 2^-126 to 2^126
EDGE_DEVICE Words4 load_cached(const void* p) { return *static_cast<const Words4*>(p); }
EDGE_DEVICE Words2 load_pair(const void* p) { return *static_cast<const Words2*>(p); }
// `bytes` (1, 2, 4, 8 or 16, aligned to it) that this kernel does not write, as words; above them zeros.
template <int bytes>
EDGE_DEVICE void load_words(const void* p, uint32_t* words) {
    if (reinterpret_cast<uintptr_t>(p) % bytes != 0) emu::fail("a load of %d bytes at %p", bytes, p);
    words[0] = 0;
    __builtin_memcpy(words, p, bytes);
}
// `bytes` (2, 4, 8 or 16) that no kernel writes; those read once are not kept in L1.
template <int bytes, bool kOnce>
EDGE_DEVICE void load_weights(const void* p, uint32_t* words) {
    load_words<bytes>(p, words);
}
// 2^x; a result below 2^-126 is 0.
EDGE_DEVICE float exp2_flushed(float x) {
    const float y = __builtin_exp2f(x);
    return y < 0x1p-126f ? 0.0f : y;
}
EDGE_DEVICE float reciprocal_fast(float x) { return 1.0f / x; }  // to an ulp
EDGE_DEVICE float larger(float a, float b) {
    return __builtin_fmaxf(a, b);
}  // of NaN and a number the number
EDGE_DEVICE double fused(double a, double b, double c) { return __builtin_fma(a, b, c); }
EDGE_DEVICE double product(double a, double b) { return a * b; }
EDGE_DEVICE double round_even(double x) { return __builtin_nearbyint(x); }
EDGE_DEVICE uint32_t pack_halves(float low, float high) {
    return float_to_half(low) | static_cast<uint32_t>(float_to_half(high)) << 16;
}

// d (16x8) += a (16x32) b (32x8): bytes of a unsigned (kUnsigned) or signed, of b signed; fragments as the
// PTX ISA's m16n8k32 has them (emulator/mma.h says how).
using emu::mma_i8;
// The same of half the columns, d (16x8) += a (16x16) b (16x8): m16n8k16.
using emu::mma_i8_k16;

// d (16x8) += a (16x16) b (16x8) in f16 or bf16, summed in f32: m16n8k16.
using emu::mma_f16;

#else

EDGE_DEVICE uint32_t bits_of(float v) { return __float_as_uint(v); }
EDGE_DEVICE float float_of(uint32_t bits) { return __uint_as_float(bits); }
EDGE_DEVICE float half_to_float(uint16_t h) {
    float f;
    asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(h));
    return f;
}
EDGE_DEVICE uint16_t float_to_half(float v) {
    uint16_t h;
    asm("cvt.rn.f16.f32 %0, %1;" : "=h"(h) : "f"(v));
    return h;
}
EDGE_DEVICE uint32_t half2_mul(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("mul.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
EDGE_DEVICE uint32_t half2_sub(uint32_t a, uint32_t b) {
    uint32_t d;
    asm("sub.rn.f16x2 %0, %1, %2;" : "=r"(d) : "r"(a), "r"(b));
    return d;
}
EDGE_DEVICE uint32_t and_or(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0xea;" : "=r"(d) : "r"(x), "r"(mask), "r"(bits));
    return d;
}
EDGE_DEVICE uint32_t and_xor(uint32_t x, uint32_t mask, uint32_t bits) {
    uint32_t d;
    asm("lop3.b32 %0, %1, %2, %3, 0x6a;" : "=r"(d) : "r"(x), "r"(mask), "r"(bits));
    return d;
}
EDGE_DEVICE uint32_t half2_fma(uint32_t a, uint32_t b, uint32_t c) {
    uint32_t d;
    asm("fma.rn.f16x2 %0, %1, %2, %3;" : "=r"(d) : "r"(a), "r"(b), "r"(c));
    return d;
}
EDGE_DEVICE uint32_t byte_perm(uint32_t a, uint32_t b, uint32_t selector) {
    return __byte_perm(a, b, selector);
}
EDGE_DEVICE float exp2_fast(float x) {
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
EDGE_DEVICE float rcp_root(float x) {  // within 2 ulp
    float y;
    asm("rsqrt.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return __fmaf_rn(__fmul_rn(0.5f, y), __fmaf_rn(__fmul_rn(-x, y), y, 1.0f), y);
}
EDGE_DEVICE float round_even(float x) { return rintf(x); }
EDGE_DEVICE float fused(float a, float b, float c) { return __fmaf_rn(a, b, c); }
EDGE_DEVICE float product(float a, float b) { return __fmul_rn(a, b); }
EDGE_DEVICE float quotient(float a, float b) { return __fdiv_rn(a, b); }
EDGE_DEVICE float reciprocal(float b) {  // as CUDA's own division has it where nothing over- or underflows
    float r;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(r) : "f"(b));
    return __fmaf_rn(r, __fmaf_rn(-b, r, 1.0f), r);
}
EDGE_DEVICE Words4 load_cached(const void* p) { return *static_cast<const Words4*>(p); }
EDGE_DEVICE Words2 load_pair(const void* p) { return *static_cast<const Words2*>(p); }
template <int bytes, bool kOnce>
EDGE_DEVICE void load_weights(const void* p, uint32_t* words) {
    if constexpr (bytes == 16 && kOnce) {
        asm("ld.global.nc.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
            : "l"(p));
    } else if constexpr (bytes == 16) {
        asm("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
            : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
            : "l"(p));
    } else if constexpr (bytes == 8 && kOnce) {
        asm("ld.global.nc.L1::no_allocate.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
    } else if constexpr (bytes == 8) {
        asm("ld.global.nc.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
    } else if constexpr (bytes == 4 && kOnce) {
        asm("ld.global.nc.L1::no_allocate.u32 %0, [%1];" : "=r"(words[0]) : "l"(p));
    } else if constexpr (bytes == 4) {
        asm("ld.global.nc.u32 %0, [%1];" : "=r"(words[0]) : "l"(p));
    } else {
        static_assert(bytes == 2 && !kOnce);
        asm("ld.global.nc.u16 %0, [%1];" : "=r"(words[0]) : "l"(p));
    }
}
// Of what a launch before this one may have written: never by the read-only path, nor before
// wait_for_inputs().
template <int bytes>
EDGE_DEVICE void load_words(const void* p, uint32_t* words) {
    if constexpr (bytes == 16) {
        asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
                     : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                     : "l"(p));
    } else if constexpr (bytes == 8) {
        asm volatile("ld.global.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "l"(p));
    } else if constexpr (bytes == 4) {
        asm volatile("ld.global.u32 %0, [%1];" : "=r"(words[0]) : "l"(p));
    } else if constexpr (bytes == 2) {
        asm volatile("ld.global.u16 %0, [%1];" : "=r"(words[0]) : "l"(p));
    } else {
        static_assert(bytes == 1);
        asm volatile("ld.global.u8 %0, [%1];" : "=r"(words[0]) : "l"(p));
    }
}
EDGE_DEVICE float exp2_flushed(float x) {
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
EDGE_DEVICE float reciprocal_fast(float x) {
    float y;
    asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
}
EDGE_DEVICE float larger(float a, float b) { return fmaxf(a, b); }
EDGE_DEVICE double fused(double a, double b, double c) { return __fma_rn(a, b, c); }
EDGE_DEVICE double product(double a, double b) { return __dmul_rn(a, b); }
EDGE_DEVICE double round_even(double x) { return rint(x); }
EDGE_DEVICE uint32_t pack_halves(float low, float high) {
    uint32_t d;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(d) : "f"(high), "f"(low));
    return d;
}

template <bool kUnsigned>
EDGE_DEVICE void mma_i8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kUnsigned) {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

template <bool kUnsigned>
EDGE_DEVICE void mma_i8_k16(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1]) {
    if constexpr (kUnsigned) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.s32.u8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, {%4, %5}, {%6}, "
            "{%0, %1, %2, %3};"
            : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(b[0]));
    }
}

template <bool kBfloat>
EDGE_DEVICE void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    if constexpr (kBfloat) {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, "
            "%9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    } else {
        asm volatile(
            "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
            "{%0, %1, %2, %3};"
            : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
            : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
    }
}

#endif

EDGE_DEVICE int lane() { return threadIdx.x % kWarp; }
EDGE_DEVICE int warp() { return threadIdx.x / kWarp; }
EDGE_DEVICE bool finite(float v) { return (bits_of(v) & 0x7fffffff) < 0x7f800000; }
EDGE_DEVICE void raise_status(const EdgeStep& step, uint32_t bits) { atomicOr(step.status, bits); }

}  // namespace edge
