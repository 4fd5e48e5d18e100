// Keys and values to the cache: a row of head_dim f32 values becomes codes and scales, bit for bit those of
// the formats' codecs (engine/formats). A warp does a row; a lane has the values lane, lane + 32, ...
#pragma once

#include "kv_fragments.cuh"
#include "math.cuh"

namespace edge {

constexpr float kTiny = 0x1p-126f;  // formats/scaled.py: f32 scales are never denormal
constexpr float kHalfLargest = 65504.0f;

// Greatest over a warp; of non-negative floats.
EDGE_DEVICE float warp_largest(float x) {
    for (int n = 16; n > 0; n /= 2) x = larger(x, __shfl_xor_sync(kAll, x, n));
    return x;
}

// The f32 scale with which `absolute` becomes `largest`; their product never overflows.
EDGE_DEVICE float row_scale(float absolute, float largest) {
    if (absolute == 0.0f) return 0.0f;
    const float scale = larger(quotient(absolute, largest), kTiny);
    return finite(product(scale, largest)) ? scale : float_of(bits_of(scale) - 1);
}

// The least f16 at or above a wanted scale (>= 0).
EDGE_DEVICE uint32_t half_above(float wanted) {
    const uint32_t h = float_to_half(wanted);
    return half_to_float(static_cast<uint16_t>(h)) < wanted ? h + 1 : h;
}

EDGE_DEVICE float divided(float x, float scale) { return scale == 0.0f ? 0.0f : quotient(x, scale); }

// Nearest even, saturating at 448. The sign of zero stays.
EDGE_DEVICE uint32_t e4m3_code(float y) {
    const uint32_t sign = bits_of(y) >> 31 << 7;
    const float a = size_of(y) < 448.0f ? size_of(y) : 448.0f;
    const uint32_t bits = bits_of(a);
    const uint32_t normal = ((bits + (bits >> 20 & 1) + 0x7ffff) >> 20) - (120u << 3);
    return sign | (a < 0x1p-6f ? static_cast<uint32_t>(round_even(product(a, 0x1p9f))) : normal);
}

// Values of one row in a warp: x[i] of lane l is value 32 i + l, 0 beyond head_dim.
template <int head_dim>
struct WarpRow {
    static constexpr int kEach = (head_dim + kWarp - 1) / kWarp;
    float x[kEach];

    EDGE_DEVICE void load(const float* from) {
#pragma unroll
        for (int i = 0; i < kEach; ++i) x[i] = holds(i) ? from[i * kWarp + lane()] : 0.0f;
    }
    EDGE_DEVICE void store(float* to) const {
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            if (holds(i)) to[i * kWarp + lane()] = x[i];
    }
    static EDGE_DEVICE bool holds(int i) { return i * kWarp + lane() < head_dim; }
    // NaN and Inf count as Inf
    EDGE_DEVICE float absmax() const {
        float top = 0.0f;
#pragma unroll
        for (int i = 0; i < kEach; ++i)
            top = larger(top, finite(x[i]) ? size_of(x[i]) : float_of(0x7f800000u));
        return warp_largest(top);
    }
};

// Stores a row; gives the bits of edge_cuda_status that it raises. What a format cannot hold is stored as
// some code.
template <class Format, int head_dim>
EDGE_DEVICE uint32_t store_row(const EdgeKv& kv, int64_t row, const WarpRow<head_dim>& values) {
    using W = WarpRow<head_dim>;
    const float top = values.absmax();
    if (!finite(top)) return EDGE_CUDA_NOT_FINITE;
    if constexpr (Format::kBits == 16) {
        if (top > kHalfLargest) return EDGE_CUDA_OUT_OF_RANGE;
        uint16_t* to = reinterpret_cast<uint16_t*>(kv.codes) + row * head_dim;
#pragma unroll
        for (int i = 0; i < W::kEach; ++i)
            if (W::holds(i)) to[i * kWarp + lane()] = float_to_half(values.x[i]);
        return 0;
    } else if constexpr (Format::kRowScale) {
        constexpr bool kFloat = Format::kFactor != 1.0f;
        const float scale = row_scale(top, kFloat ? 448.0f : 127.0f);
        if (lane() == 0) static_cast<float*>(kv.scale)[row] = scale;
#pragma unroll
        for (int i = 0; i < W::kEach; ++i) {
            const float y = divided(values.x[i], scale);
            uint32_t code;
            if constexpr (kFloat)
                code = e4m3_code(scale == 0.0f ? values.x[i] : y);
            else
                code = static_cast<uint32_t>(static_cast<int32_t>(round_even(y < -127.0f  ? -127.0f
                                                                             : y > 127.0f ? 127.0f
                                                                                          : y)));
            if (W::holds(i)) kv.codes[row * head_dim + i * kWarp + lane()] = static_cast<uint8_t>(code);
        }
        return 0;
    } else {
        // One group of 32 to each i
        constexpr int kRowBytes = Format::row_bytes(head_dim);
        bool beyond = false;  // of what attention can decode
#pragma unroll
        for (int i = 0; i < W::kEach; ++i) {
            const float x = values.x[i];
            const float high = warp_largest(larger(x, 0.0f)), low = -warp_largest(larger(-x, 0.0f));
            const uint32_t half = half_above(quotient(high - low, 15.0f));
            const float scale = half_to_float(static_cast<uint16_t>(half));
            beyond = beyond || scale > Format::kLargestScale;
            const float zero = round_even(divided(-low, scale));
            float y = round_even(divided(x, scale)) + zero;
            y = y < 0.0f ? 0.0f : y > 15.0f ? 15.0f : y;
            const uint32_t code = W::holds(i) ? static_cast<uint32_t>(y) : 0;
            const uint32_t above = __shfl_xor_sync(kAll, code, 1);
            const int at = i * kWarp / 2 + lane() / 2;
            if (lane() % 2 == 0 && at < kRowBytes)
                kv.codes[row * kRowBytes + at] = static_cast<uint8_t>(code | above << 4);
            if (lane() == 0) {
                const int64_t group = row * W::kEach + i;
                static_cast<uint16_t*>(kv.scale)[group] = static_cast<uint16_t>(half);
                kv.zero[group] = static_cast<uint8_t>(zero);
            }
        }
        return beyond ? EDGE_CUDA_OUT_OF_RANGE : 0;
    }
}

}  // namespace edge
