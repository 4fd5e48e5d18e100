// Plain C++: the meaning of every function that the other vec16_<isa>.h give faster.
#pragma once

#include <cmath>

#include "half.h"

namespace edge {
namespace EDGE_ISA {

struct f32x16 {
    float v[16];
};
struct i32x16 {
    int32_t v[16];
};
struct mask16 {
    bool v[16];
};
struct u8x64 {  // 16 rows of 4 inputs
    uint8_t v[64];
};

#define EDGE_LANES(type, expression)                  \
    type r;                                           \
    for (int i = 0; i < 16; ++i) r.v[i] = expression; \
    return r

EDGE_INLINE f32x16 set1(float a) { EDGE_LANES(f32x16, a); }
EDGE_INLINE f32x16 load(const float* p) { EDGE_LANES(f32x16, p[i]); }
EDGE_INLINE void store(float* p, f32x16 a) { std::memcpy(p, a.v, 64); }
EDGE_INLINE f32x16 add(f32x16 a, f32x16 b) { EDGE_LANES(f32x16, a.v[i] + b.v[i]); }
EDGE_INLINE f32x16 sub(f32x16 a, f32x16 b) { EDGE_LANES(f32x16, a.v[i] - b.v[i]); }
EDGE_INLINE f32x16 mul(f32x16 a, f32x16 b) { EDGE_LANES(f32x16, a.v[i] * b.v[i]); }
EDGE_INLINE f32x16 div(f32x16 a, f32x16 b) { EDGE_LANES(f32x16, a.v[i] / b.v[i]); }
EDGE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    EDGE_LANES(f32x16, __builtin_fmaf(a.v[i], b.v[i], c.v[i]));
}
// a > b ? a : b, so a NaN in b is kept and one in a is dropped
EDGE_INLINE f32x16 max(f32x16 a, f32x16 b) { EDGE_LANES(f32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
EDGE_INLINE f32x16 min(f32x16 a, f32x16 b) { EDGE_LANES(f32x16, a.v[i] < b.v[i] ? a.v[i] : b.v[i]); }
EDGE_INLINE f32x16 round_even(f32x16 a) { EDGE_LANES(f32x16, __builtin_nearbyintf(a.v[i])); }
EDGE_INLINE mask16 greater(f32x16 a, f32x16 b) { EDGE_LANES(mask16, a.v[i] > b.v[i]); }
EDGE_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) { EDGE_LANES(f32x16, m.v[i] ? a.v[i] : b.v[i]); }

EDGE_INLINE i32x16 set1(int32_t a) { EDGE_LANES(i32x16, a); }
EDGE_INLINE i32x16 load(const int32_t* p) { EDGE_LANES(i32x16, p[i]); }
EDGE_INLINE void store(int32_t* p, i32x16 a) { std::memcpy(p, a.v, 64); }
EDGE_INLINE i32x16 add(i32x16 a, i32x16 b) { EDGE_LANES(i32x16, a.v[i] + b.v[i]); }
EDGE_INLINE i32x16 sub(i32x16 a, i32x16 b) { EDGE_LANES(i32x16, a.v[i] - b.v[i]); }
EDGE_INLINE i32x16 mul(i32x16 a, i32x16 b) { EDGE_LANES(i32x16, a.v[i] * b.v[i]); }
EDGE_INLINE i32x16 max(i32x16 a, i32x16 b) { EDGE_LANES(i32x16, a.v[i] > b.v[i] ? a.v[i] : b.v[i]); }
EDGE_INLINE i32x16 bit_and(i32x16 a, i32x16 b) { EDGE_LANES(i32x16, a.v[i] & b.v[i]); }
EDGE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { EDGE_LANES(i32x16, a.v[i] | b.v[i]); }
template <int kBits>
EDGE_INLINE i32x16 shift_left(i32x16 a) {
    EDGE_LANES(i32x16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) << kBits));
}
template <int kBits>
EDGE_INLINE i32x16 shift_right(i32x16 a) {
    EDGE_LANES(i32x16, static_cast<int32_t>(static_cast<uint32_t>(a.v[i]) >> kBits));
}
EDGE_INLINE f32x16 to_f32(i32x16 a) { EDGE_LANES(f32x16, static_cast<float>(a.v[i])); }
// of whole numbers; what does not fit gives the least int32, as on x86
EDGE_INLINE i32x16 to_i32(f32x16 a) {
    EDGE_LANES(i32x16,
               a.v[i] > -2147483648.0f && a.v[i] < 2147483648.0f ? static_cast<int32_t>(a.v[i]) : INT32_MIN);
}
EDGE_INLINE i32x16 as_i32(f32x16 a) {
    i32x16 r;
    std::memcpy(r.v, a.v, 64);
    return r;
}
EDGE_INLINE f32x16 as_f32(i32x16 a) {
    f32x16 r;
    std::memcpy(r.v, a.v, 64);
    return r;
}

EDGE_INLINE f32x16 load_f16(const void* p) { EDGE_LANES(f32x16, half_at(p, i)); }
EDGE_INLINE f32x16 load_bf16(const void* p) { EDGE_LANES(f32x16, bfloat_at(p, i)); }
EDGE_INLINE i32x16 load_i8(const void* p) { EDGE_LANES(i32x16, static_cast<const int8_t*>(p)[i]); }
EDGE_INLINE i32x16 load_u8(const void* p) { EDGE_LANES(i32x16, static_cast<const uint8_t*>(p)[i]); }
EDGE_INLINE f32x16 load_e4m3(const void* p) {
    EDGE_LANES(f32x16, e4m3_to_float(static_cast<const uint8_t*>(p)[i]));
}
EDGE_INLINE f32x16 load_e5m2(const void* p) {
    EDGE_LANES(f32x16, e5m2_to_float(static_cast<const uint8_t*>(p)[i]));
}
// table[low nibble], table[high nibble] of sixteen bytes
EDGE_INLINE void load_table(const void* p, const float* table, f32x16* low, f32x16* high) {
    for (int i = 0; i < 16; ++i) {
        const uint8_t b = static_cast<const uint8_t*>(p)[i];
        low->v[i] = table[b & 15];
        high->v[i] = table[b >> 4];
    }
}

// table[index]
EDGE_INLINE f32x16 look_up_any(const float* table, i32x16 index) { EDGE_LANES(f32x16, table[index.v[i]]); }

constexpr int32_t kByteOffset = 128;  // what load_bytes leaves in each code
EDGE_INLINE u8x64 load_bytes(const uint8_t* p) {
    u8x64 r;
    std::memcpy(r.v, p, 64);
    return r;
}
EDGE_INLINE u8x64 load_codes(const uint8_t* p) { return load_bytes(p); }
EDGE_INLINE u8x64 bit_and(u8x64 w, int mask) {
    for (uint8_t& b : w.v) b = static_cast<uint8_t>(b & mask);
    return w;
}
EDGE_INLINE u8x64 bit_or(u8x64 w, u8x64 y) {
    for (int i = 0; i < 64; ++i) w.v[i] |= y.v[i];
    return w;
}
EDGE_INLINE u8x64 bit_xor(u8x64 w, u8x64 y) {
    for (int i = 0; i < 64; ++i) w.v[i] ^= y.v[i];
    return w;
}
EDGE_INLINE u8x64 add_bytes(u8x64 w, u8x64 y) {
    for (int i = 0; i < 64; ++i) w.v[i] = static_cast<uint8_t>(w.v[i] + y.v[i]);
    return w;
}
// w moved down by kRows < 8 rows; the last ones of `before` move in
template <int kRows>
EDGE_INLINE u8x64 rows_down(u8x64 w, u8x64 before) {
    u8x64 r;
    std::memcpy(r.v, before.v + 64 - 4 * kRows, 4 * kRows);
    std::memcpy(r.v + 4 * kRows, w.v, 64 - 4 * kRows);
    return r;
}
// to the left by kBits, to the right where it is negative; what comes from a neighbour must be masked
template <int kBits>
EDGE_INLINE u8x64 shift_bytes(u8x64 w) {
    for (uint8_t& b : w.v) b = static_cast<uint8_t>(kBits > 0 ? b << (kBits & 7) : b >> (-kBits & 7));
    return w;
}
// table[w], w below 16
EDGE_INLINE u8x64 look_up(u8x64 w, const uint8_t* table) {
    for (uint8_t& b : w.v) b = table[b];
    return w;
}
// sum[row] += codes[row][0..3] . a[0..3], exact
EDGE_INLINE i32x16 dot_codes(i32x16 sum, u8x64 w, const int8_t* a) {
    for (int i = 0; i < 16; ++i)
        for (int j = 0; j < 4; ++j) sum.v[i] += static_cast<int32_t>(w.v[4 * i + j]) * a[j];
    return sum;
}
EDGE_INLINE i32x16 dot_bytes(i32x16 sum, u8x64 w, const int8_t* a) { return dot_codes(sum, w, a); }

// Fixed tree of all horizontal sums: lane i + lane i+8, then +4, +2, +1.
EDGE_INLINE float sum_lanes(f32x16 a) {
    for (int width = 8; width > 0; width /= 2)
        for (int i = 0; i < width; ++i) a.v[i] = a.v[i] + a.v[i + width];
    return a.v[0];
}
EDGE_INLINE float max_lanes(f32x16 a) {
    float m = a.v[0];
    for (float x : a.v) m = x > m ? x : m;
    return m;
}
EDGE_INLINE int32_t max_lanes(i32x16 a) {
    int32_t m = a.v[0];
    for (int32_t x : a.v) m = x > m ? x : m;
    return m;
}
EDGE_INLINE int32_t sum_lanes(i32x16 a) {
    int32_t s = 0;
    for (int32_t x : a.v) s += x;
    return s;
}
// lane i = sum_lanes(a[i])
EDGE_INLINE f32x16 sum_each(const f32x16* a) { EDGE_LANES(f32x16, sum_lanes(a[i])); }

// 16 / kTimes values, each kTimes
template <int kTimes>
EDGE_INLINE f32x16 load_repeated(const float* p) {
    EDGE_LANES(f32x16, p[i / kTimes]);
}
// sixteen whole numbers in 0..255 as bytes
EDGE_INLINE void store_u8(uint8_t* p, i32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<uint8_t>(a.v[i]);
}
// p = a0 b0 a1 b1 ...: 32 values
EDGE_INLINE void store_pairs(float* p, f32x16 a, f32x16 b) {
    for (int i = 0; i < 16; ++i) {
        p[2 * i] = a.v[i];
        p[2 * i + 1] = b.v[i];
    }
}
// sixteen whole numbers in -127..127 as bytes
EDGE_INLINE void store_i8(int8_t* p, i32x16 a) {
    for (int i = 0; i < 16; ++i) p[i] = static_cast<int8_t>(a.v[i]);
}

#undef EDGE_LANES

}  // namespace EDGE_ISA
}  // namespace edge
