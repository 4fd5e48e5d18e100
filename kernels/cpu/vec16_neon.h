// ARMv8.2 with dot products (sdot): four quarters of four lanes.
#pragma once

#include <arm_neon.h>

namespace edge {
namespace EDGE_ISA {

struct f32x16 {
    float32x4_t v[4];
};
struct i32x16 {
    int32x4_t v[4];
};
struct mask16 {
    uint32x4_t v[4];
};
struct u8x64 {  // 16 rows of 4 inputs
    uint8x16_t v[4];
};

#define EDGE_QUARTERS(type, expression)              \
    type r;                                          \
    for (int i = 0; i < 4; ++i) r.v[i] = expression; \
    return r

EDGE_INLINE f32x16 set1(float a) { EDGE_QUARTERS(f32x16, vdupq_n_f32(a)); }
EDGE_INLINE f32x16 load(const float* p) { EDGE_QUARTERS(f32x16, vld1q_f32(p + 4 * i)); }
EDGE_INLINE void store(float* p, f32x16 a) {
    for (int i = 0; i < 4; ++i) vst1q_f32(p + 4 * i, a.v[i]);
}
EDGE_INLINE f32x16 add(f32x16 a, f32x16 b) { EDGE_QUARTERS(f32x16, vaddq_f32(a.v[i], b.v[i])); }
EDGE_INLINE f32x16 sub(f32x16 a, f32x16 b) { EDGE_QUARTERS(f32x16, vsubq_f32(a.v[i], b.v[i])); }
EDGE_INLINE f32x16 mul(f32x16 a, f32x16 b) { EDGE_QUARTERS(f32x16, vmulq_f32(a.v[i], b.v[i])); }
EDGE_INLINE f32x16 div(f32x16 a, f32x16 b) { EDGE_QUARTERS(f32x16, vdivq_f32(a.v[i], b.v[i])); }
EDGE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
    EDGE_QUARTERS(f32x16, vfmaq_f32(c.v[i], a.v[i], b.v[i]));
}
// a > b ? a : b, so a NaN in b is kept and one in a is dropped
EDGE_INLINE f32x16 max(f32x16 a, f32x16 b) {
    EDGE_QUARTERS(f32x16, vbslq_f32(vcgtq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
EDGE_INLINE f32x16 min(f32x16 a, f32x16 b) {
    EDGE_QUARTERS(f32x16, vbslq_f32(vcltq_f32(a.v[i], b.v[i]), a.v[i], b.v[i]));
}
EDGE_INLINE f32x16 round_even(f32x16 a) { EDGE_QUARTERS(f32x16, vrndnq_f32(a.v[i])); }
EDGE_INLINE mask16 greater(f32x16 a, f32x16 b) { EDGE_QUARTERS(mask16, vcgtq_f32(a.v[i], b.v[i])); }
EDGE_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) {
    EDGE_QUARTERS(f32x16, vbslq_f32(m.v[i], a.v[i], b.v[i]));
}

EDGE_INLINE i32x16 set1(int32_t a) { EDGE_QUARTERS(i32x16, vdupq_n_s32(a)); }
EDGE_INLINE i32x16 load(const int32_t* p) { EDGE_QUARTERS(i32x16, vld1q_s32(p + 4 * i)); }
EDGE_INLINE void store(int32_t* p, i32x16 a) {
    for (int i = 0; i < 4; ++i) vst1q_s32(p + 4 * i, a.v[i]);
}
EDGE_INLINE i32x16 add(i32x16 a, i32x16 b) { EDGE_QUARTERS(i32x16, vaddq_s32(a.v[i], b.v[i])); }
EDGE_INLINE i32x16 sub(i32x16 a, i32x16 b) { EDGE_QUARTERS(i32x16, vsubq_s32(a.v[i], b.v[i])); }
EDGE_INLINE i32x16 mul(i32x16 a, i32x16 b) { EDGE_QUARTERS(i32x16, vmulq_s32(a.v[i], b.v[i])); }
EDGE_INLINE i32x16 max(i32x16 a, i32x16 b) { EDGE_QUARTERS(i32x16, vmaxq_s32(a.v[i], b.v[i])); }
EDGE_INLINE i32x16 bit_and(i32x16 a, i32x16 b) { EDGE_QUARTERS(i32x16, vandq_s32(a.v[i], b.v[i])); }
EDGE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { EDGE_QUARTERS(i32x16, vorrq_s32(a.v[i], b.v[i])); }
template <int kBits>
EDGE_INLINE i32x16 shift_left(i32x16 a) {
    EDGE_QUARTERS(i32x16, vshlq_n_s32(a.v[i], kBits));
}
template <int kBits>
EDGE_INLINE i32x16 shift_right(i32x16 a) {
    EDGE_QUARTERS(i32x16, vreinterpretq_s32_u32(vshrq_n_u32(vreinterpretq_u32_s32(a.v[i]), kBits)));
}
EDGE_INLINE f32x16 to_f32(i32x16 a) { EDGE_QUARTERS(f32x16, vcvtq_f32_s32(a.v[i])); }
EDGE_INLINE i32x16 to_i32(f32x16 a) { EDGE_QUARTERS(i32x16, vcvtnq_s32_f32(a.v[i])); }  // of whole numbers
EDGE_INLINE i32x16 as_i32(f32x16 a) { EDGE_QUARTERS(i32x16, vreinterpretq_s32_f32(a.v[i])); }
EDGE_INLINE f32x16 as_f32(i32x16 a) { EDGE_QUARTERS(f32x16, vreinterpretq_f32_s32(a.v[i])); }

// Sixteen stored items as f32.
EDGE_INLINE f32x16 from_half(uint16x8_t first, uint16x8_t second) {
    const float16x8_t a = vreinterpretq_f16_u16(first), b = vreinterpretq_f16_u16(second);
    return {{vcvt_f32_f16(vget_low_f16(a)), vcvt_high_f32_f16(a), vcvt_f32_f16(vget_low_f16(b)),
             vcvt_high_f32_f16(b)}};
}
EDGE_INLINE uint16x8_t load_u16(const void* p) {
    return vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p)));
}
EDGE_INLINE f32x16 load_f16(const void* p) {
    return from_half(load_u16(p), load_u16(static_cast<const uint8_t*>(p) + 16));
}
EDGE_INLINE f32x16 load_bf16(const void* p) {
    const uint8_t* c = static_cast<const uint8_t*>(p);
    EDGE_QUARTERS(f32x16, vreinterpretq_f32_u32(vshll_n_u16(vreinterpret_u16_u8(vld1_u8(c + 8 * i)), 16)));
}
EDGE_INLINE i32x16 load_i8(const void* p) {
    const int8x16_t w = vld1q_s8(static_cast<const int8_t*>(p));
    const int16x8_t a = vmovl_s8(vget_low_s8(w)), b = vmovl_s8(vget_high_s8(w));
    return {{vmovl_s16(vget_low_s16(a)), vmovl_high_s16(a), vmovl_s16(vget_low_s16(b)), vmovl_high_s16(b)}};
}
EDGE_INLINE i32x16 load_u8(const void* p) {
    const uint8x16_t w = vld1q_u8(static_cast<const uint8_t*>(p));
    const uint16x8_t a = vmovl_u8(vget_low_u8(w)), b = vmovl_u8(vget_high_u8(w));
    return {{vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(a))), vreinterpretq_s32_u32(vmovl_high_u16(a)),
             vreinterpretq_s32_u32(vmovl_u16(vget_low_u16(b))), vreinterpretq_s32_u32(vmovl_high_u16(b))}};
}
// E4M3 is f16 with three exponent bits cut: shifted up it lacks a factor of 2^8; 0x7f is its only NaN.
EDGE_INLINE uint16x8_t e4m3_to_half(uint16x8_t w) {
    const uint16x8_t magnitude = vshlq_n_u16(vandq_u16(w, vdupq_n_u16(0x7f)), 7);
    const uint16x8_t nan = vandq_u16(vceqq_u16(magnitude, vdupq_n_u16(0x3f80)), vdupq_n_u16(0x7e00));
    const uint16x8_t sign = vshlq_n_u16(vandq_u16(w, vdupq_n_u16(0x80)), 8);
    return vorrq_u16(vorrq_u16(magnitude, sign), nan);
}
EDGE_INLINE f32x16 load_e4m3(const void* p) {
    const uint8x16_t w = vld1q_u8(static_cast<const uint8_t*>(p));
    return mul(from_half(e4m3_to_half(vmovl_u8(vget_low_u8(w))), e4m3_to_half(vmovl_high_u8(w))),
               set1(256.0f));
}
EDGE_INLINE f32x16 load_e5m2(const void* p) {
    const uint8x16_t w = vld1q_u8(static_cast<const uint8_t*>(p));
    return from_half(vshlq_n_u16(vmovl_u8(vget_low_u8(w)), 8), vshlq_n_u16(vmovl_high_u8(w), 8));
}
// table[index] by bytes: index * 4 + 0..3 into the 64 bytes of the table
EDGE_INLINE f32x16 look_up(i32x16 index, const float* table) {
    const uint8_t* t = reinterpret_cast<const uint8_t*>(table);
    const uint8x16x4_t bytes = {{vld1q_u8(t), vld1q_u8(t + 16), vld1q_u8(t + 32), vld1q_u8(t + 48)}};
    EDGE_QUARTERS(
        f32x16,
        vreinterpretq_f32_u8(vqtbl4q_u8(
            bytes, vreinterpretq_u8_s32(vmlaq_n_s32(vdupq_n_s32(0x03020100), index.v[i], 0x04040404)))));
}
// table[low nibble], table[high nibble] of sixteen bytes
EDGE_INLINE void load_table(const void* p, const float* table, f32x16* low, f32x16* high) {
    const i32x16 w = load_u8(p);
    *low = look_up(bit_and(w, set1(15)), table);
    *high = look_up(shift_right<4>(w), table);
}

// table[index]
EDGE_INLINE f32x16 look_up_any(const float* table, i32x16 index) {
    int32_t at[16];
    float lanes[16];
    store(at, index);
    for (int i = 0; i < 16; ++i) lanes[i] = table[at[i]];
    return load(lanes);
}

constexpr int32_t kByteOffset = 0;  // what load_bytes leaves in each code: it makes them signed
EDGE_INLINE u8x64 load_codes(const uint8_t* p) { EDGE_QUARTERS(u8x64, vld1q_u8(p + 16 * i)); }
EDGE_INLINE u8x64 load_bytes(const uint8_t* p) {
    EDGE_QUARTERS(u8x64, veorq_u8(vld1q_u8(p + 16 * i), vdupq_n_u8(0x80)));
}
EDGE_INLINE u8x64 bit_and(u8x64 w, int mask) {
    EDGE_QUARTERS(u8x64, vandq_u8(w.v[i], vdupq_n_u8(static_cast<uint8_t>(mask))));
}
EDGE_INLINE u8x64 bit_or(u8x64 w, u8x64 y) { EDGE_QUARTERS(u8x64, vorrq_u8(w.v[i], y.v[i])); }
EDGE_INLINE u8x64 bit_xor(u8x64 w, u8x64 y) { EDGE_QUARTERS(u8x64, veorq_u8(w.v[i], y.v[i])); }
EDGE_INLINE u8x64 add_bytes(u8x64 w, u8x64 y) { EDGE_QUARTERS(u8x64, vaddq_u8(w.v[i], y.v[i])); }
// w moved down by kRows < 8 rows; the last ones of `before` move in
template <int kRows>
EDGE_INLINE u8x64 rows_down(u8x64 w, u8x64 before) {
    uint8x16_t at[8];
    for (int i = 0; i < 4; ++i) at[i] = before.v[i];
    for (int i = 0; i < 4; ++i) at[i + 4] = w.v[i];
    constexpr int kWhole = (kRows + 3) / 4, kPart = 16 * kWhole - 4 * kRows;
    if constexpr (kPart == 0) {
        EDGE_QUARTERS(u8x64, at[4 + i - kWhole]);
    } else {
        EDGE_QUARTERS(u8x64, vextq_u8(at[4 + i - kWhole], at[5 + i - kWhole], kPart));
    }
}
// to the left by kBits, to the right where it is negative; what comes from a neighbour must be masked
template <int kBits>
EDGE_INLINE u8x64 shift_bytes(u8x64 w) {
    if constexpr (kBits == 0) return w;
    if constexpr (kBits > 0) {
        EDGE_QUARTERS(u8x64, vshlq_n_u8(w.v[i], kBits));
    }
    EDGE_QUARTERS(u8x64, vshrq_n_u8(w.v[i], kBits < 0 ? -kBits : 1));
}
// table[w], w below 16
EDGE_INLINE u8x64 look_up(u8x64 w, const uint8_t* table) {
    const uint8x16_t t = vld1q_u8(table);
    EDGE_QUARTERS(u8x64, vqtbl1q_u8(t, w.v[i]));
}
// sum[row] += codes[row][0..3] . a[0..3], exact; codes below 128 are as well signed bytes
EDGE_INLINE i32x16 dot_codes(i32x16 sum, u8x64 w, const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, 4);
    const int8x16_t inputs = vreinterpretq_s8_s32(vdupq_n_s32(four));
    EDGE_QUARTERS(i32x16, vdotq_s32(sum.v[i], vreinterpretq_s8_u8(w.v[i]), inputs));
}
EDGE_INLINE i32x16 dot_bytes(i32x16 sum, u8x64 w, const int8_t* a) { return dot_codes(sum, w, a); }

// Fixed tree of all horizontal sums: lane i + lane i+8, then +4, +2, +1.
EDGE_INLINE float32x4_t quarter(f32x16 a) {
    return vaddq_f32(vaddq_f32(a.v[0], a.v[2]), vaddq_f32(a.v[1], a.v[3]));
}
EDGE_INLINE float sum_lanes(f32x16 a) {
    const float32x4_t q = quarter(a);
    const float32x2_t d = vadd_f32(vget_low_f32(q), vget_high_f32(q));
    return vget_lane_f32(d, 0) + vget_lane_f32(d, 1);
}
EDGE_INLINE float max_lanes(f32x16 a) {  // no NaN among them
    return vmaxvq_f32(vmaxq_f32(vmaxq_f32(a.v[0], a.v[1]), vmaxq_f32(a.v[2], a.v[3])));
}
EDGE_INLINE int32_t max_lanes(i32x16 a) {
    return vmaxvq_s32(vmaxq_s32(vmaxq_s32(a.v[0], a.v[1]), vmaxq_s32(a.v[2], a.v[3])));
}
EDGE_INLINE int32_t sum_lanes(i32x16 a) {
    return vaddvq_s32(vaddq_s32(vaddq_s32(a.v[0], a.v[1]), vaddq_s32(a.v[2], a.v[3])));
}
// lane i = sum_lanes(a[i])
EDGE_INLINE f32x16 sum_each(const f32x16* a) {
    f32x16 r;
    for (int k = 0; k < 4; ++k) {
        const float32x4_t q0 = quarter(a[4 * k]), q1 = quarter(a[4 * k + 1]);
        const float32x4_t q2 = quarter(a[4 * k + 2]), q3 = quarter(a[4 * k + 3]);
        const float64x2_t e01 = vreinterpretq_f64_f32(vtrn1q_f32(q0, q1));  // lanes 0 and 2 of both
        const float64x2_t o01 = vreinterpretq_f64_f32(vtrn2q_f32(q0, q1));  // lanes 1 and 3
        const float64x2_t e23 = vreinterpretq_f64_f32(vtrn1q_f32(q2, q3));
        const float64x2_t o23 = vreinterpretq_f64_f32(vtrn2q_f32(q2, q3));
        const float32x4_t lane0 = vreinterpretq_f32_f64(vtrn1q_f64(e01, e23));
        const float32x4_t lane2 = vreinterpretq_f32_f64(vtrn2q_f64(e01, e23));
        const float32x4_t lane1 = vreinterpretq_f32_f64(vtrn1q_f64(o01, o23));
        const float32x4_t lane3 = vreinterpretq_f32_f64(vtrn2q_f64(o01, o23));
        r.v[k] = vaddq_f32(vaddq_f32(lane0, lane2), vaddq_f32(lane1, lane3));
    }
    return r;
}

// 16 / kTimes values, each kTimes
template <int kTimes>
EDGE_INLINE f32x16 load_repeated(const float* p) {
    if constexpr (kTimes == 16) return set1(p[0]);
    if constexpr (kTimes == 8)
        return {{vdupq_n_f32(p[0]), vdupq_n_f32(p[0]), vdupq_n_f32(p[1]), vdupq_n_f32(p[1])}};
    EDGE_QUARTERS(f32x16, vdupq_n_f32(p[i]));
}
// sixteen whole numbers in 0..255 as bytes
EDGE_INLINE void store_u8(uint8_t* p, i32x16 a) {
    const uint16x8_t first =
        vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(a.v[0])), vmovn_u32(vreinterpretq_u32_s32(a.v[1])));
    const uint16x8_t second =
        vcombine_u16(vmovn_u32(vreinterpretq_u32_s32(a.v[2])), vmovn_u32(vreinterpretq_u32_s32(a.v[3])));
    vst1q_u8(p, vcombine_u8(vmovn_u16(first), vmovn_u16(second)));
}
// p = a0 b0 a1 b1 ...: 32 values
EDGE_INLINE void store_pairs(float* p, f32x16 a, f32x16 b) {
    for (int i = 0; i < 4; ++i) {
        const float32x4x2_t pair = {{a.v[i], b.v[i]}};  // clang's vst2q_f32 is a macro and takes no braces
        vst2q_f32(p + 8 * i, pair);
    }
}

// sixteen whole numbers in -127..127 as bytes
EDGE_INLINE void store_i8(int8_t* p, i32x16 a) {
    const int16x8_t low = vcombine_s16(vmovn_s32(a.v[0]), vmovn_s32(a.v[1]));
    const int16x8_t high = vcombine_s16(vmovn_s32(a.v[2]), vmovn_s32(a.v[3]));
    vst1q_s8(p, vcombine_s8(vmovn_s16(low), vmovn_s16(high)));
}

#undef EDGE_QUARTERS

}  // namespace EDGE_ISA
}  // namespace edge
