// AVX2 with FMA and F16C: two halves of eight lanes.
#pragma once

#include <immintrin.h>

namespace edge {
namespace EDGE_ISA {

struct f32x16 {
    __m256 a, b;
};
struct i32x16 {
    __m256i a, b;
};
struct mask16 {
    __m256 a, b;
};
struct u8x64 {  // 16 rows of 4 inputs
    __m256i a, b;
};

#define EDGE_HALVES(f, ...) {f(x.a, ##__VA_ARGS__), f(x.b, ##__VA_ARGS__)}
#define EDGE_PAIRS(f) {f(x.a, y.a), f(x.b, y.b)}

EDGE_INLINE f32x16 set1(float v) { return {_mm256_set1_ps(v), _mm256_set1_ps(v)}; }
EDGE_INLINE f32x16 load(const float* p) { return {_mm256_loadu_ps(p), _mm256_loadu_ps(p + 8)}; }
EDGE_INLINE void store(float* p, f32x16 x) {
    _mm256_storeu_ps(p, x.a);
    _mm256_storeu_ps(p + 8, x.b);
}
EDGE_INLINE f32x16 add(f32x16 x, f32x16 y) { return EDGE_PAIRS(_mm256_add_ps); }
EDGE_INLINE f32x16 sub(f32x16 x, f32x16 y) { return EDGE_PAIRS(_mm256_sub_ps); }
EDGE_INLINE f32x16 mul(f32x16 x, f32x16 y) { return EDGE_PAIRS(_mm256_mul_ps); }
EDGE_INLINE f32x16 div(f32x16 x, f32x16 y) { return EDGE_PAIRS(_mm256_div_ps); }
EDGE_INLINE f32x16 fma(f32x16 x, f32x16 y, f32x16 z) {
    return {_mm256_fmadd_ps(x.a, y.a, z.a), _mm256_fmadd_ps(x.b, y.b, z.b)};
}
// x > y ? x : y, so a NaN in y is kept and one in x is dropped
EDGE_INLINE f32x16 max(f32x16 x, f32x16 y) { return EDGE_PAIRS(_mm256_max_ps); }
EDGE_INLINE f32x16 min(f32x16 x, f32x16 y) { return EDGE_PAIRS(_mm256_min_ps); }
EDGE_INLINE f32x16 round_even(f32x16 x) {
    return {_mm256_round_ps(x.a, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
            _mm256_round_ps(x.b, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
EDGE_INLINE mask16 greater(f32x16 x, f32x16 y) {
    return {_mm256_cmp_ps(x.a, y.a, _CMP_GT_OQ), _mm256_cmp_ps(x.b, y.b, _CMP_GT_OQ)};
}
EDGE_INLINE f32x16 select(mask16 m, f32x16 x, f32x16 y) {
    return {_mm256_blendv_ps(y.a, x.a, m.a), _mm256_blendv_ps(y.b, x.b, m.b)};
}

EDGE_INLINE i32x16 set1(int32_t v) { return {_mm256_set1_epi32(v), _mm256_set1_epi32(v)}; }
EDGE_INLINE __m256i load256(const void* p) { return _mm256_loadu_si256(static_cast<const __m256i*>(p)); }
EDGE_INLINE i32x16 load(const int32_t* p) { return {load256(p), load256(p + 8)}; }
EDGE_INLINE void store(int32_t* p, i32x16 x) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), x.a);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(p + 8), x.b);
}
EDGE_INLINE i32x16 add(i32x16 x, i32x16 y) { return EDGE_PAIRS(_mm256_add_epi32); }
EDGE_INLINE i32x16 sub(i32x16 x, i32x16 y) { return EDGE_PAIRS(_mm256_sub_epi32); }
EDGE_INLINE i32x16 mul(i32x16 x, i32x16 y) { return EDGE_PAIRS(_mm256_mullo_epi32); }
EDGE_INLINE i32x16 max(i32x16 x, i32x16 y) { return EDGE_PAIRS(_mm256_max_epi32); }
EDGE_INLINE i32x16 bit_and(i32x16 x, i32x16 y) { return EDGE_PAIRS(_mm256_and_si256); }
EDGE_INLINE i32x16 bit_or(i32x16 x, i32x16 y) { return EDGE_PAIRS(_mm256_or_si256); }
template <int kBits>
EDGE_INLINE i32x16 shift_left(i32x16 x) {
    return EDGE_HALVES(_mm256_slli_epi32, kBits);
}
template <int kBits>
EDGE_INLINE i32x16 shift_right(i32x16 x) {
    return EDGE_HALVES(_mm256_srli_epi32, kBits);
}
EDGE_INLINE f32x16 to_f32(i32x16 x) { return EDGE_HALVES(_mm256_cvtepi32_ps); }
EDGE_INLINE i32x16 to_i32(f32x16 x) { return EDGE_HALVES(_mm256_cvtps_epi32); }  // of whole numbers
EDGE_INLINE i32x16 as_i32(f32x16 x) { return EDGE_HALVES(_mm256_castps_si256); }
EDGE_INLINE f32x16 as_f32(i32x16 x) { return EDGE_HALVES(_mm256_castsi256_ps); }

// Sixteen stored items as f32.
EDGE_INLINE __m128i load128(const void* p) { return _mm_loadu_si128(static_cast<const __m128i*>(p)); }
EDGE_INLINE __m128i upper64(__m128i x) { return _mm_unpackhi_epi64(x, x); }
EDGE_INLINE f32x16 from_half(__m256i h) {
    return {_mm256_cvtph_ps(_mm256_castsi256_si128(h)), _mm256_cvtph_ps(_mm256_extracti128_si256(h, 1))};
}
EDGE_INLINE f32x16 load_f16(const void* p) { return from_half(load256(p)); }
EDGE_INLINE f32x16 load_bf16(const void* p) {
    const char* c = static_cast<const char*>(p);
    return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(c)), 16)),
            _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(load128(c + 16)), 16))};
}
EDGE_INLINE i32x16 load_i8(const void* p) {
    const __m128i w = load128(p);
    return {_mm256_cvtepi8_epi32(w), _mm256_cvtepi8_epi32(upper64(w))};
}
EDGE_INLINE i32x16 load_u8(const void* p) {
    const __m128i w = load128(p);
    return {_mm256_cvtepu8_epi32(w), _mm256_cvtepu8_epi32(upper64(w))};
}
// E4M3 is f16 with three exponent bits cut: shifted up it lacks a factor of 2^8; 0x7f is its only NaN.
EDGE_INLINE f32x16 load_e4m3(const void* p) {
    const __m256i w = _mm256_cvtepu8_epi16(load128(p));
    const __m256i magnitude = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x7f)), 7);
    const __m256i nan = _mm256_cmpeq_epi16(magnitude, _mm256_set1_epi16(0x3f80));
    const __m256i sign = _mm256_slli_epi16(_mm256_and_si256(w, _mm256_set1_epi16(0x80)), 8);
    const __m256i half =
        _mm256_or_si256(_mm256_or_si256(magnitude, sign), _mm256_and_si256(nan, _mm256_set1_epi16(0x7e00)));
    return mul(from_half(half), set1(256.0f));
}
EDGE_INLINE f32x16 load_e5m2(const void* p) {
    return from_half(_mm256_slli_epi16(_mm256_cvtepu8_epi16(load128(p)), 8));
}
EDGE_INLINE __m256 look_up(__m256i index, __m256 first, __m256 second) {
    const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(index, 28));  // bit 3 becomes the sign
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(first, index), _mm256_permutevar8x32_ps(second, index),
                            upper);
}
// table[low nibble], table[high nibble] of sixteen bytes
EDGE_INLINE void load_table(const void* p, const float* table, f32x16* low, f32x16* high) {
    const __m256 first = _mm256_loadu_ps(table), second = _mm256_loadu_ps(table + 8);
    const i32x16 w = load_u8(p);
    *low = {look_up(w.a, first, second), look_up(w.b, first, second)};
    const i32x16 h = shift_right<4>(w);
    *high = {look_up(h.a, first, second), look_up(h.b, first, second)};
}

// table[index]
EDGE_INLINE f32x16 look_up_any(const float* table, i32x16 index) {
    return {_mm256_i32gather_ps(table, index.a, 4), _mm256_i32gather_ps(table, index.b, 4)};
}

constexpr int32_t kByteOffset = 0;  // what load_bytes leaves in each code: it makes them signed
EDGE_INLINE u8x64 load_codes(const uint8_t* p) { return {load256(p), load256(p + 32)}; }
EDGE_INLINE u8x64 load_bytes(const uint8_t* p) {
    const __m256i flip = _mm256_set1_epi8(-128);
    return {_mm256_xor_si256(load256(p), flip), _mm256_xor_si256(load256(p + 32), flip)};
}
EDGE_INLINE u8x64 bit_and(u8x64 x, int mask) {
    const __m256i m = _mm256_set1_epi8(static_cast<char>(mask));
    return {_mm256_and_si256(x.a, m), _mm256_and_si256(x.b, m)};
}
EDGE_INLINE u8x64 bit_or(u8x64 x, u8x64 y) { return EDGE_PAIRS(_mm256_or_si256); }
EDGE_INLINE u8x64 bit_xor(u8x64 x, u8x64 y) { return EDGE_PAIRS(_mm256_xor_si256); }
EDGE_INLINE u8x64 add_bytes(u8x64 x, u8x64 y) { return EDGE_PAIRS(_mm256_add_epi8); }
// eight rows that end kRows < 8 before the end of x, the last ones of `before` first
template <int kRows>
EDGE_INLINE __m256i half_down(__m256i x, __m256i before) {
    const __m256i middle = _mm256_permute2x128_si256(before, x, 0x21);
    if constexpr (kRows < 4) return _mm256_alignr_epi8(x, middle, 16 - 4 * kRows);
    if constexpr (kRows == 4) return middle;
    return _mm256_alignr_epi8(middle, before, kRows > 4 ? 32 - 4 * kRows : 0);
}
// x moved down by kRows < 8 rows; the last ones of `before` move in
template <int kRows>
EDGE_INLINE u8x64 rows_down(u8x64 x, u8x64 before) {
    return {half_down<kRows>(x.a, before.b), half_down<kRows>(x.b, x.a)};
}
// to the left by kBits, to the right where it is negative; what comes from a neighbour must be masked
template <int kBits>
EDGE_INLINE u8x64 shift_bytes(u8x64 x) {
    if constexpr (kBits == 0) return x;
    if constexpr (kBits > 0) return EDGE_HALVES(_mm256_slli_epi16, kBits);
    return EDGE_HALVES(_mm256_srli_epi16, kBits < 0 ? -kBits : 0);
}
// table[x], x below 16
EDGE_INLINE u8x64 look_up(u8x64 x, const uint8_t* table) {
    const __m256i t = _mm256_broadcastsi128_si256(load128(table));
    return {_mm256_shuffle_epi8(t, x.a), _mm256_shuffle_epi8(t, x.b)};
}
EDGE_INLINE __m256i four_inputs(const int8_t* a) {
    int32_t four;
    std::memcpy(&four, a, 4);
    return _mm256_set1_epi32(four);
}
EDGE_INLINE __m256i add_pairs(__m256i sum, __m256i products) {
    return _mm256_add_epi32(sum, _mm256_madd_epi16(products, _mm256_set1_epi16(1)));
}
// sum[row] += codes[row][0..3] . a[0..3] of codes below 128, exact: 2 * 127 * 127 stays below 2^15
EDGE_INLINE i32x16 dot_codes(i32x16 sum, u8x64 w, const int8_t* a) {
    const __m256i four = four_inputs(a);
    return {add_pairs(sum.a, _mm256_maddubs_epi16(w.a, four)),
            add_pairs(sum.b, _mm256_maddubs_epi16(w.b, four))};
}
// The sign moves to the activation: 2 * 128 * 127 stays below 2^15.
EDGE_INLINE __m256i signed_products(__m256i w, __m256i a) {
    return _mm256_maddubs_epi16(_mm256_abs_epi8(w), _mm256_sign_epi8(a, w));
}
EDGE_INLINE i32x16 dot_bytes(i32x16 sum, u8x64 w, const int8_t* a) {
    const __m256i four = four_inputs(a);
    return {add_pairs(sum.a, signed_products(w.a, four)), add_pairs(sum.b, signed_products(w.b, four))};
}

// Fixed tree of all horizontal sums: lane i + lane i+8, then +4, +2, +1.
EDGE_INLINE float sum_lanes(f32x16 x) {
    const __m256 h = _mm256_add_ps(x.a, x.b);
    const __m128 q = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_add_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_add_ss(d, _mm_movehdup_ps(d)));
}
EDGE_INLINE float max_lanes(f32x16 x) {  // no NaN among them
    const __m256 h = _mm256_max_ps(x.a, x.b);
    const __m128 q = _mm_max_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
    const __m128 d = _mm_max_ps(q, _mm_movehl_ps(q, q));
    return _mm_cvtss_f32(_mm_max_ss(d, _mm_movehdup_ps(d)));
}
EDGE_INLINE int32_t max_lanes(i32x16 x) {
    int32_t lanes[16];
    store(lanes, x);
    int32_t m = lanes[0];
    for (int32_t v : lanes) m = v > m ? v : m;
    return m;
}
EDGE_INLINE int32_t sum_lanes(i32x16 x) {
    int32_t lanes[16], s = 0;
    store(lanes, x);
    for (int32_t v : lanes) s += v;
    return s;
}
// lanes 0..3 = the four-lane sums of x, y, z, w after the first two steps of the tree
EDGE_INLINE __m128 quarter(f32x16 x) {
    const __m256 h = _mm256_add_ps(x.a, x.b);
    return _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
}
// lane i = sum_lanes(x[i])
EDGE_INLINE f32x16 sum_each(const f32x16* x) {
    __m128 out[4];
    for (int k = 0; k < 4; ++k) {
        __m128 r0 = quarter(x[4 * k]), r1 = quarter(x[4 * k + 1]), r2 = quarter(x[4 * k + 2]),
               r3 = quarter(x[4 * k + 3]);
        _MM_TRANSPOSE4_PS(r0, r1, r2, r3);  // r0 holds lane 0 of all four
        out[k] = _mm_add_ps(_mm_add_ps(r0, r2), _mm_add_ps(r1, r3));
    }
    return {_mm256_set_m128(out[1], out[0]), _mm256_set_m128(out[3], out[2])};
}

// 16 / kTimes values, each kTimes; reads 16
template <int kTimes>
EDGE_INLINE f32x16 load_repeated(const float* p) {
    constexpr int k = kTimes;
    const __m256 all = _mm256_loadu_ps(p);
    const __m256i first = _mm256_setr_epi32(0, 1 / k, 2 / k, 3 / k, 4 / k, 5 / k, 6 / k, 7 / k);
    const __m256i second = _mm256_setr_epi32(8 / k, 9 / k, 10 / k, 11 / k, 12 / k, 13 / k, 14 / k, 15 / k);
    return {_mm256_permutevar8x32_ps(all, first), _mm256_permutevar8x32_ps(all, second)};
}
// sixteen whole numbers in 0..255 as bytes
EDGE_INLINE void store_u8(uint8_t* p, i32x16 x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(x.a, x.b), 0xd8);
    const __m128i bytes = _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}
// p = x0 y0 x1 y1 ...: 32 values
EDGE_INLINE void store_pairs(float* p, f32x16 x, f32x16 y) {
    for (int k = 0; k < 2; ++k) {
        const __m256 u = k == 0 ? x.a : x.b, v = k == 0 ? y.a : y.b;
        const __m256 low = _mm256_unpacklo_ps(u, v), high = _mm256_unpackhi_ps(u, v);
        _mm256_storeu_ps(p + 16 * k, _mm256_permute2f128_ps(low, high, 0x20));
        _mm256_storeu_ps(p + 16 * k + 8, _mm256_permute2f128_ps(low, high, 0x31));
    }
}

// sixteen whole numbers in -127..127 as bytes
EDGE_INLINE void store_i8(int8_t* p, i32x16 x) {
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packs_epi32(x.a, x.b), 0xd8);
    const __m128i bytes = _mm_packs_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(p), bytes);
}

#undef EDGE_HALVES
#undef EDGE_PAIRS

}  // namespace EDGE_ISA
}  // namespace edge
