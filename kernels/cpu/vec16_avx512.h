// AVX-512 F/BW/VL/DQ with VNNI.
#pragma once

#include <immintrin.h>

namespace edge {
namespace EDGE_ISA {

struct f32x16 {
    __m512 v;
};
struct i32x16 {
    __m512i v;
};
struct mask16 {
    __mmask16 v;
};
struct u8x64 {  // 16 rows of 4 inputs
    __m512i v;
};

EDGE_INLINE f32x16 set1(float a) { return {_mm512_set1_ps(a)}; }
EDGE_INLINE f32x16 load(const float* p) { return {_mm512_loadu_ps(p)}; }
EDGE_INLINE void store(float* p, f32x16 a) { _mm512_storeu_ps(p, a.v); }
EDGE_INLINE f32x16 add(f32x16 a, f32x16 b) { return {_mm512_add_ps(a.v, b.v)}; }
EDGE_INLINE f32x16 sub(f32x16 a, f32x16 b) { return {_mm512_sub_ps(a.v, b.v)}; }
EDGE_INLINE f32x16 mul(f32x16 a, f32x16 b) { return {_mm512_mul_ps(a.v, b.v)}; }
EDGE_INLINE f32x16 div(f32x16 a, f32x16 b) { return {_mm512_div_ps(a.v, b.v)}; }
EDGE_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
// a > b ? a : b, so a NaN in b is kept and one in a is dropped
EDGE_INLINE f32x16 max(f32x16 a, f32x16 b) { return {_mm512_max_ps(a.v, b.v)}; }
EDGE_INLINE f32x16 min(f32x16 a, f32x16 b) { return {_mm512_min_ps(a.v, b.v)}; }
EDGE_INLINE f32x16 round_even(f32x16 a) { return {_mm512_roundscale_ps(a.v, 0)}; }
EDGE_INLINE mask16 greater(f32x16 a, f32x16 b) { return {_mm512_cmp_ps_mask(a.v, b.v, _CMP_GT_OQ)}; }
EDGE_INLINE f32x16 select(mask16 m, f32x16 a, f32x16 b) { return {_mm512_mask_blend_ps(m.v, b.v, a.v)}; }

EDGE_INLINE i32x16 set1(int32_t a) { return {_mm512_set1_epi32(a)}; }
EDGE_INLINE i32x16 load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
EDGE_INLINE void store(int32_t* p, i32x16 a) { _mm512_storeu_si512(p, a.v); }
EDGE_INLINE i32x16 add(i32x16 a, i32x16 b) { return {_mm512_add_epi32(a.v, b.v)}; }
EDGE_INLINE i32x16 sub(i32x16 a, i32x16 b) { return {_mm512_sub_epi32(a.v, b.v)}; }
EDGE_INLINE i32x16 mul(i32x16 a, i32x16 b) { return {_mm512_mullo_epi32(a.v, b.v)}; }
EDGE_INLINE i32x16 max(i32x16 a, i32x16 b) { return {_mm512_max_epi32(a.v, b.v)}; }
EDGE_INLINE i32x16 bit_and(i32x16 a, i32x16 b) { return {_mm512_and_si512(a.v, b.v)}; }
EDGE_INLINE i32x16 bit_or(i32x16 a, i32x16 b) { return {_mm512_or_si512(a.v, b.v)}; }
template <int kBits>
EDGE_INLINE i32x16 shift_left(i32x16 a) {
    return {_mm512_slli_epi32(a.v, kBits)};
}
template <int kBits>
EDGE_INLINE i32x16 shift_right(i32x16 a) {
    return {_mm512_srli_epi32(a.v, kBits)};
}
EDGE_INLINE f32x16 to_f32(i32x16 a) { return {_mm512_cvtepi32_ps(a.v)}; }
EDGE_INLINE i32x16 to_i32(f32x16 a) { return {_mm512_cvtps_epi32(a.v)}; }  // of whole numbers
EDGE_INLINE i32x16 as_i32(f32x16 a) { return {_mm512_castps_si512(a.v)}; }
EDGE_INLINE f32x16 as_f32(i32x16 a) { return {_mm512_castsi512_ps(a.v)}; }

// Sixteen stored items as f32.
EDGE_INLINE f32x16 load_f16(const void* p) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))};
}
EDGE_INLINE f32x16 load_bf16(const void* p) {
    const __m512i w = _mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(p)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(w, 16))};
}
EDGE_INLINE i32x16 load_i8(const void* p) {
    return {_mm512_cvtepi8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
EDGE_INLINE i32x16 load_u8(const void* p) {
    return {_mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
// E4M3 is f16 with three exponent bits cut: shifted up it lacks a factor of 2^8; 0x7f is its only NaN.
EDGE_INLINE f32x16 load_e4m3(const void* p) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x7f)), 7);
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x80)), 8);
    const __m256i half =
        _mm256_or_si256(_mm256_or_si256(magnitude, sign), _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
    return {_mm512_mul_ps(_mm512_cvtph_ps(half), _mm512_set1_ps(256.0f))};
}
EDGE_INLINE f32x16 load_e5m2(const void* p) {
    const __m256i w = _mm256_cvtepu8_epi16(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    return {_mm512_cvtph_ps(_mm256_slli_epi16(w, 8))};
}
// table[low nibble], table[high nibble] of sixteen bytes
EDGE_INLINE void load_table(const void* p, const float* table, f32x16* low, f32x16* high) {
    const __m512 t = _mm512_loadu_ps(table);
    const __m512i w = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(p)));
    low->v = _mm512_permutexvar_ps(w, t);  // the index is taken modulo 16
    high->v = _mm512_permutexvar_ps(_mm512_srli_epi32(w, 4), t);
}

// table[index]
EDGE_INLINE f32x16 look_up_any(const float* table, i32x16 index) {
    return {_mm512_i32gather_ps(index.v, table, 4)};
}

constexpr int32_t kByteOffset = 128;  // what load_bytes leaves in each code
EDGE_INLINE u8x64 load_bytes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
EDGE_INLINE u8x64 load_codes(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
EDGE_INLINE u8x64 bit_and(u8x64 w, int mask) {
    return {_mm512_and_si512(w.v, _mm512_set1_epi8(static_cast<char>(mask)))};
}
EDGE_INLINE u8x64 bit_or(u8x64 w, u8x64 y) { return {_mm512_or_si512(w.v, y.v)}; }
EDGE_INLINE u8x64 bit_xor(u8x64 w, u8x64 y) { return {_mm512_xor_si512(w.v, y.v)}; }
EDGE_INLINE u8x64 add_bytes(u8x64 w, u8x64 y) { return {_mm512_add_epi8(w.v, y.v)}; }
// w moved down by kRows < 8 rows; the last ones of `before` move in
template <int kRows>
EDGE_INLINE u8x64 rows_down(u8x64 w, u8x64 before) {
    return {_mm512_alignr_epi32(w.v, before.v, 16 - kRows)};
}
// to the left by kBits, to the right where it is negative; what comes from a neighbour must be masked
template <int kBits>
EDGE_INLINE u8x64 shift_bytes(u8x64 w) {
    if constexpr (kBits == 0) return w;
    if constexpr (kBits > 0) return {_mm512_slli_epi16(w.v, kBits)};
    return {_mm512_srli_epi16(w.v, kBits < 0 ? -kBits : 0)};
}
// table[w], w below 16
EDGE_INLINE u8x64 look_up(u8x64 w, const uint8_t* table) {
    const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
    return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), w.v)};
}
// sum[row] += codes[row][0..3] . a[0..3], exact
EDGE_INLINE i32x16 dot_codes(i32x16 sum, u8x64 w, const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, 4);
    return {_mm512_dpbusd_epi32(sum.v, w.v, _mm512_set1_epi32(four))};
}
EDGE_INLINE i32x16 dot_bytes(i32x16 sum, u8x64 w, const int8_t* a) { return dot_codes(sum, w, a); }

// Fixed tree of all horizontal sums: lane i + lane i+8, then +4, +2, +1.
EDGE_INLINE float sum_lanes(f32x16 a) {
    const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
EDGE_INLINE float max_lanes(f32x16 a) { return _mm512_reduce_max_ps(a.v); }  // no NaN among them
EDGE_INLINE int32_t max_lanes(i32x16 a) { return _mm512_reduce_max_epi32(a.v); }
EDGE_INLINE int32_t sum_lanes(i32x16 a) { return _mm512_reduce_add_epi32(a.v); }

// lane i = sum_lanes(a[i])
EDGE_INLINE f32x16 sum_each(const f32x16* a) {
    __m512 u[4];
    for (int k = 0; k < 4; ++k) {
        const __m512 a0 = a[4 * k].v, a1 = a[4 * k + 1].v, a2 = a[4 * k + 2].v, a3 = a[4 * k + 3].v;
        const __m512 t1 =
            _mm512_add_ps(_mm512_shuffle_f32x4(a0, a1, 0x44), _mm512_shuffle_f32x4(a0, a1, 0xee));
        const __m512 t2 =
            _mm512_add_ps(_mm512_shuffle_f32x4(a2, a3, 0x44), _mm512_shuffle_f32x4(a2, a3, 0xee));
        u[k] = _mm512_add_ps(_mm512_shuffle_f32x4(t1, t2, 0x88), _mm512_shuffle_f32x4(t1, t2, 0xdd));
    }
    const __m512 v1 = _mm512_add_ps(_mm512_shuffle_ps(u[0], u[1], 0x44), _mm512_shuffle_ps(u[0], u[1], 0xee));
    const __m512 v2 = _mm512_add_ps(_mm512_shuffle_ps(u[2], u[3], 0x44), _mm512_shuffle_ps(u[2], u[3], 0xee));
    const __m512 w = _mm512_add_ps(_mm512_shuffle_ps(v1, v2, 0x88), _mm512_shuffle_ps(v1, v2, 0xdd));
    // lane 4L+j holds the sum of a[4j+L]
    const __m512i order = _mm512_setr_epi32(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15);
    return {_mm512_permutexvar_ps(order, w)};
}

// 16 / kTimes values, each kTimes; reads 16
template <int kTimes>
EDGE_INLINE f32x16 load_repeated(const float* p) {
    constexpr int k = kTimes;
    const __m512i order = _mm512_setr_epi32(0, 1 / k, 2 / k, 3 / k, 4 / k, 5 / k, 6 / k, 7 / k, 8 / k, 9 / k,
                                            10 / k, 11 / k, 12 / k, 13 / k, 14 / k, 15 / k);
    return {_mm512_permutexvar_ps(order, _mm512_loadu_ps(p))};
}
// sixteen whole numbers in 0..255 as bytes
EDGE_INLINE void store_u8(uint8_t* p, i32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}
// p = a0 b0 a1 b1 ...: 32 values
EDGE_INLINE void store_pairs(float* p, f32x16 a, f32x16 b) {
    const __m512i low = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512i high = _mm512_setr_epi32(8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
    _mm512_storeu_ps(p, _mm512_permutex2var_ps(a.v, low, b.v));
    _mm512_storeu_ps(p + 16, _mm512_permutex2var_ps(a.v, high, b.v));
}
// sixteen whole numbers in -127..127 as bytes
EDGE_INLINE void store_i8(int8_t* p, i32x16 a) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(a.v));
}

}  // namespace EDGE_ISA
}  // namespace edge
