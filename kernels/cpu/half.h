// Small floats in plain integer arithmetic, equal to numpy's conversions and to engine/formats/fp8.py bit for
// bit.
#pragma once

#include <cstdint>
#include <cstring>

namespace edge {
namespace {

inline uint32_t bits_from_float(float v) {
    uint32_t b;
    std::memcpy(&b, &v, 4);
    return b;
}

inline float float_from_bits(uint32_t b) {
    float v;
    std::memcpy(&v, &b, 4);
    return v;
}

inline float half_to_float(uint16_t h) {
    const uint32_t sign = static_cast<uint32_t>(h & 0x8000) << 16;
    const uint32_t exponent = (h >> 10) & 31, fraction = h & 0x3ff;
    if (exponent == 31) return float_from_bits(sign | 0x7f800000 | (fraction << 13));
    if (exponent == 0) {  // fraction * 2^-24, exact in f32
        const float v = static_cast<float>(fraction) * 0x1p-24f;
        return float_from_bits(bits_from_float(v) | sign);
    }
    return float_from_bits(sign | ((exponent + 112) << 23) | (fraction << 13));
}

// Round to nearest even; beyond the range Inf.
inline uint16_t float_to_half(float v) {
    const uint32_t bits = bits_from_float(v);
    const uint32_t sign = (bits >> 16) & 0x8000;
    const uint32_t a = bits & 0x7fffffff;
    if (a > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);
    if (a >= 0x477ff000) return static_cast<uint16_t>(sign | 0x7c00);  // 65520 and above
    if (a < 0x38800000) {                                              // below 2^-14: steps of 2^-24
        const float steps = float_from_bits(a) * 0x1p24f;              // exact, below 1024
        return static_cast<uint16_t>(sign | static_cast<uint32_t>(__builtin_nearbyintf(steps)));
    }
    const uint32_t rounded = a + 0xfff + ((a >> 13) & 1);
    return static_cast<uint16_t>(sign | ((rounded >> 13) - (112u << 10)));
}

// Items may lie unaligned in no plane of ours; memcpy keeps the compiler from assuming a type.
inline float half_at(const void* p, int64_t i) {
    uint16_t h;
    std::memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
    return half_to_float(h);
}

inline float bfloat_at(const void* p, int64_t i) {
    uint16_t h;
    std::memcpy(&h, static_cast<const char*>(p) + 2 * i, 2);
    return float_from_bits(static_cast<uint32_t>(h) << 16);
}

inline float e5m2_to_float(uint8_t code) { return half_to_float(static_cast<uint16_t>(code << 8)); }

// E4M3 is f16 with three exponent bits cut: shifted up it lacks a factor of 2^8; 0x7f is its only NaN.
inline float e4m3_to_float(uint8_t code) {
    uint32_t h = ((code & 0x7fu) << 7) | ((code & 0x80u) << 8);
    if ((code & 0x7f) == 0x7f) h |= 0x7e00;
    return half_to_float(static_cast<uint16_t>(h)) * 256.0f;
}

}  // namespace
}  // namespace edge
