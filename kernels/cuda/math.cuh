// exp, tanh, erf and the activations, in operations that round alike everywhere: a GPU, the emulator and the
// cpu backend (kernels/cpu/math16.h) get the same bits. exp and erf are within 2 ulp of the true value, tanh
// within 3.
#pragma once

#include "device.cuh"

namespace edge {

EDGE_DEVICE float size_of(float x) { return float_of(bits_of(x) & 0x7fffffff); }
EDGE_DEVICE float with_sign(float size, float sign) {
    return float_of(bits_of(size) | (bits_of(sign) & 0x80000000u));
}

// Quotients by one number, each rounded to nearest: what CUDA's division does in its fast path, with the
// reciprocal taken once and no call for the rest. Those below 2^-48 may be off by an ulp. NaN of x Inf.
struct Divisor {
    float lift, by, inverse;  // lift: a power of two that brings `by` to where nothing over- or underflows

    EDGE_DEVICE float of(float x) const {
        const float a = product(x, lift);
        float q = product(a, inverse);
        q = fused(fused(-q, by, a), inverse, q);
        return fused(fused(-q, by, a), inverse, q);
    }
};
// b >= 0; quotients by 0 are 0, by Inf NaN, and those by less than 2^-40 must lie below 2^64.
EDGE_DEVICE Divisor divisor(float b) {
    const float lift = b < 0x1p-40f ? 0x1p96f : b > 0x1p120f ? 0x1p-64f : 1.0f;
    const float by = product(b, lift);
    return {lift, by, b == 0.0f ? 0.0f : reciprocal(by)};
}

// Cephes expf: 2^n * p(r), |r| <= ln2/2; saturates at exp(-87.3) and exp(88.3); exp(0) = 1; NaN stays.
EDGE_DEVICE float exp_of(float x) {
    x = x < -87.3365402f ? -87.3365402f : x > 88.3762589f ? 88.3762589f : x;
    const float n = round_even(product(x, 1.44269504f));
    float r = fused(n, -0.693359375f, x);
    r = fused(n, 2.12194440e-4f, r);
    float p = 1.9875691500e-4f;
    p = fused(p, r, 1.3981999507e-3f);
    p = fused(p, r, 8.3334519073e-3f);
    p = fused(p, r, 4.1665795894e-2f);
    p = fused(p, r, 1.6666665459e-1f);
    p = fused(p, r, 5.0000001201e-1f);
    p = fused(p, product(r, r), r) + 1.0f;
    const int32_t power = finite(n) ? static_cast<int32_t>(n) + 127 : 127;
    return product(p, float_of(static_cast<uint32_t>(power) << 23));
}

// Cephes tanhf: a polynomial below 0.625, else 1 - 2 / (exp(2|x|) + 1).
EDGE_DEVICE float tanh_of(float x) {
    const float a = size_of(x), z = product(x, x);
    float p = -5.70498872745e-3f;
    p = fused(p, z, 2.06390887954e-2f);
    p = fused(p, z, -5.37397155531e-2f);
    p = fused(p, z, 1.33314422036e-1f);
    p = fused(p, z, -3.33332819422e-1f);
    const float small = fused(product(p, z), x, x);
    const float large = with_sign(1.0f - divisor(exp_of(a + a) + 1.0f).of(2.0f), x);
    return a > 0.625f ? large : small;
}

// Two minimax polynomials meeting at 475/512.
EDGE_DEVICE float erf_of(float x) {
    const float t = size_of(x), s = product(x, x);
    const float u = fused(-3.88396438e-3f, t, 2.42546219e-2f);
    float r = fused(-1.72853470e-5f, t, 3.83197126e-4f);
    r = fused(r, s, u);
    r = fused(r, t, -1.06777877e-1f);
    r = fused(r, t, -6.34846687e-1f);
    r = fused(r, t, -1.28717512e-1f);
    r = product(r, t) - t;
    const float large = with_sign(1.0f - exp_of(r), x);
    float p = -5.96761703e-4f;
    p = fused(p, s, 4.99119423e-3f);
    p = fused(p, s, -2.67681349e-2f);
    p = fused(p, s, 1.12819925e-1f);
    p = fused(p, s, -3.76125336e-1f);
    p = fused(p, s, 1.28379166e-1f);
    return t > 0.927734375f ? large : fused(p, x, x);
}

enum class Activation { kSilu, kGelu, kGeluTanh, kRelu };

// NaN and Inf give NaN or Inf, except Inf where the function ends there.
template <Activation kKind>
EDGE_DEVICE float activate(float x) {
    if constexpr (kKind == Activation::kSilu) return divisor(1.0f + exp_of(-x)).of(x);
    if constexpr (kKind == Activation::kGelu)
        return product(product(0.5f, x), 1.0f + erf_of(product(x, 0.70710678118654752f)));
    if constexpr (kKind == Activation::kGeluTanh) {
        const float cube = product(product(x, x), x);
        const float inner = product(0.79788456080286536f, x + product(0.044715f, cube));
        return product(product(0.5f, x), 1.0f + tanh_of(inner));
    }
    if constexpr (kKind == Activation::kRelu) {
        const float kept = fused(x, 0.0f, x);  // NaN for Inf, which the comparison would lose
        return kept < 0.0f ? 0.0f : kept;
    }
    return 0.0f;
}

}  // namespace edge
