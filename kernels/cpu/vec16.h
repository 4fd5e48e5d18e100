// Sixteen lanes on every instruction set. Each vec16_<isa>.h gives the same types and functions with the same
// results to the last bit: IEEE single operations, explicit fma, and exact integer arithmetic only.
// The including file defines EDGE_ISA (the namespace) before anything else.
#pragma once

#include <cstdint>
#include <cstring>

#define EDGE_INLINE static inline __attribute__((always_inline))

// Of the larger steps of a kernel: plain C++ has no registers to keep their values in, and would take minutes
// to compile them inlined everywhere.
#if defined(EDGE_VEC_SCALAR)
#define EDGE_STEP static __attribute__((noinline, unused))
#else
#define EDGE_STEP EDGE_INLINE
#endif

#if defined(EDGE_VEC_AVX512)
#include "vec16_avx512.h"
#elif defined(EDGE_VEC_AVX2)
#include "vec16_avx2.h"
#elif defined(EDGE_VEC_NEON)
#include "vec16_neon.h"
#else
#include "vec16_scalar.h"
#endif

namespace edge {
namespace EDGE_ISA {

EDGE_INLINE f32x16 zero16() { return set1(0.0f); }

// First n lanes of p, the others 0.
EDGE_INLINE f32x16 load_first(const float* p, int64_t n) {
    if (n >= 16) return load(p);
    float lanes[16] = {};
    for (int64_t i = 0; i < n; ++i) lanes[i] = p[i];
    return load(lanes);
}

EDGE_INLINE void store_first(float* p, f32x16 v, int64_t n) {
    if (n >= 16) {
        store(p, v);
        return;
    }
    float lanes[16];
    store(lanes, v);
    for (int64_t i = 0; i < n; ++i) p[i] = lanes[i];
}

// Greatest |lane| as f32 bits: an integer order, in which NaN lies above Inf and Inf above all numbers.
EDGE_INLINE int32_t bits_of(float v) {
    int32_t b;
    std::memcpy(&b, &v, 4);
    return b;
}
EDGE_INLINE float float_of(int32_t b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
}

}  // namespace EDGE_ISA
}  // namespace edge
