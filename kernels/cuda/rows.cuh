// Ops on rows of f32 values, as numpy_ops.py and reference.py mean them. Blocks have kRowThreads threads.
//  - norm, round_rows: kThreads threads for a run of values; grid ceil(T * runs / (kRowThreads / kThreads))
//  - activate_rows, add, input: 1024 values of all rows a block; a smaller grid does them in turns
//  - gather: a block for a token; not in place, as all others may be
#pragma once

#include "math.cuh"
#include "norm.cuh"

namespace edge {

EDGE_DEVICE void check(const EdgeStep& step, uint32_t worst) {
    if (worst >= kInfinite) raise_status(step, EDGE_CUDA_NOT_FINITE);
}

// x (T, x_width), normalised in runs of `group` values. kThreads: kWarp for short runs, kRowThreads for long
// ones; kVectors: see Kept. Raises NOT_FINITE.
template <bool kLayer, int kThreads, int kVectors, bool kWhole>
EDGE_DEVICE void norm(const EdgeRow& p) {
    EDGE_SHARED float shared[2 * kRowWarps];
    const RowIn<kWhole> weight{p.weight, p.group}, bias{p.bias, p.group};
    constexpr int kRuns = kRowThreads / kThreads;
    const int thread = static_cast<int>(threadIdx.x) % kThreads;
    const int64_t run = static_cast<int64_t>(blockIdx.x) * kRuns + static_cast<int>(threadIdx.x) / kThreads;
    Kept<kVectors, NormItem> kept(thread, kThreads, (p.group + 3) / 4);
    kept.keep([&](int at, NormItem& i) { i.weight = weight.load(at); });
    wait_for_inputs();
    if (run >= static_cast<int64_t>(p.step.counts[EDGE_TOKENS]) * (p.x_width / p.group)) return;
    const RowIn<kWhole> x{p.x + run * p.group, p.group};
    const RowOut<kWhole> out{p.out + run * p.group, p.group};
    kept.keep([&](int at, NormItem& i) { i.x = x.load(at); });
    const auto load = [&](int at) { return NormItem{x.load(at), weight.load(at)}; };
    Norm<kLayer, kThreads> norm;
    uint32_t worst = norm.look(kept, load, p.group, p.eps, shared) ? 0 : kInfinite;
    kept.each(load, [&](int at, const NormItem& i) {
        Floats4 v = norm.value(i);
        if (p.bias != nullptr) v = sum(v, bias.load(at));
        worst = larger(worst, magnitude(v));
        out.store(at, v);
    });
    check(p.step, worst);
}

// value(at, left) of each vector of all rows' values, of which only `left` (at most 4) exist.
template <class Value>
EDGE_DEVICE void each_value(const EdgeRow& p, const Value& value) {
    const int64_t end = static_cast<int64_t>(p.step.counts[EDGE_TOKENS]) * p.out_width;
    const int64_t step = static_cast<int64_t>(gridDim.x) * kRowThreads;
    uint32_t worst = 0;
    for (int64_t at = static_cast<int64_t>(blockIdx.x) * kRowThreads + threadIdx.x; 4 * at < end;
         at += step) {
        if (4 * at + 4 <= end) {
            Floats4 v[2] = {reinterpret_cast<const Floats4*>(p.x)[at], {}};
            if (p.y != nullptr) v[1] = reinterpret_cast<const Floats4*>(p.y)[at];
            const Floats4 out = {value(v[0].x, v[1].x), value(v[0].y, v[1].y), value(v[0].z, v[1].z),
                                 value(v[0].w, v[1].w)};
            worst = larger(worst, magnitude(out));
            reinterpret_cast<Floats4*>(p.out)[at] = out;
            continue;
        }
        for (int64_t i = 4 * at; i < end; ++i) {
            const float out = value(p.x[i], p.y != nullptr ? p.y[i] : 0.0f);
            worst = larger(worst, magnitude(out));
            p.out[i] = out;
        }
    }
    check(p.step, worst);
}

// kKind(x), times y where it is gated: (T, out_width). Raises NOT_FINITE.
template <Activation kKind, bool kGated>
EDGE_DEVICE void activate_rows(const EdgeRow& p) {
    each_value(p, [](float x, float y) {
        const float v = activate<kKind>(x);
        return kGated ? product(v, y) : v;
    });
}

// x + scale * y, the product rounded by itself: (T, out_width). Raises NOT_FINITE.
EDGE_DEVICE void add(const EdgeRow& p) {
    each_value(p, [&](float x, float y) { return x + product(p.scale, y); });
}

// The step's inputs x as values: (T, out_width). Raises NOT_FINITE.
EDGE_DEVICE void input(const EdgeRow& p) {
    each_value(p, [](float x, float) { return x; });
}

// out (T, out_width) = x (T, x_width)[:, weight], weight (out_width) columns as f32. Raises NOT_FINITE, of
// columns that are not chosen too.
EDGE_DEVICE void gather(const EdgeRow& p) {
    const int token = static_cast<int>(blockIdx.x);
    if (token >= p.step.counts[EDGE_TOKENS]) return;
    const float* x = p.x + static_cast<int64_t>(token) * p.x_width;
    float* out = p.out + static_cast<int64_t>(token) * p.out_width;
    uint32_t worst = 0;
    for (int i = static_cast<int>(threadIdx.x); i < p.x_width; i += kRowThreads)
        worst = larger(worst, magnitude(x[i]));
    for (int i = static_cast<int>(threadIdx.x); i < p.out_width; i += kRowThreads)
        out[i] = x[static_cast<int>(p.weight[i])];
    check(p.step, worst);
}

// formats/scaled.py: f32_scale.
EDGE_DEVICE float scale_for(float absmax, float largest) {
    if (absmax == 0.0f) return 0.0f;
    const float wanted = quotient(absmax, largest);
    const float scale = wanted > 0x1p-126f ? wanted : 0x1p-126f;
    return finite(product(scale, largest)) ? scale : float_of(bits_of(scale) - 1);
}

// formats/fp8.py: nearest even of a magnitude up to 448, as a value with the sign of y.
EDGE_DEVICE float nearest_e4m3(float y) {
    const float size = size_of(y), a = size < 448.0f ? size : 448.0f;
    const uint32_t bits = bits_of(a);
    const float normal = float_of((bits + (bits >> 20 & 1) + 0x7ffff) & ~0xfffffu);
    const float tiny = product(round_even(product(a, 0x1p9f)), 0x1p-9f);
    return with_sign(a < 0x1p-6f ? tiny : normal, y);
}

// Clipped before it becomes an integer; a NaN becomes -127.
EDGE_DEVICE int32_t nearest_i8(float y) {
    y = round_even(y);
    y = y > -127.0f ? y : -127.0f;
    return static_cast<int32_t>(y < 127.0f ? y : 127.0f);
}

// x (T, x_width) rounded by the codec of fp8_e4m3_row or int8_row: with the scale given, or for 0 the token's
// own. Raises NOT_FINITE.
template <bool kE4m3, int kThreads, int kVectors, bool kWhole>
EDGE_DEVICE void round_rows(const EdgeRow& p) {
    EDGE_SHARED uint32_t shared[kRowWarps];
    constexpr int kRuns = kRowThreads / kThreads;
    const int thread = static_cast<int>(threadIdx.x) % kThreads;
    const int64_t token = static_cast<int64_t>(blockIdx.x) * kRuns + static_cast<int>(threadIdx.x) / kThreads;
    if (token >= p.step.counts[EDGE_TOKENS]) return;
    const RowIn<kWhole> x{p.x + token * p.x_width, p.x_width};
    const RowOut<kWhole> out{p.out + token * p.x_width, p.x_width};
    const auto load = [&](int at) { return x.load(at); };
    Kept<kVectors, Floats4> kept(thread, kThreads, (p.x_width + 3) / 4);
    kept.keep([&](int at, Floats4& v) { v = load(at); });
    uint32_t worst = 0;
    kept.each(load, [&](int, const Floats4& v) { worst = larger(worst, magnitude(v)); });
    worst = row_max<kThreads>(worst, shared);
    if (thread == 0) check(p.step, worst);
    const float scale = p.scale != 0.0f ? p.scale : scale_for(float_of(worst), kE4m3 ? 448.0f : 127.0f);
    const float divisor = scale != 0.0f ? scale : float_of(kInfinite);
    const auto value = [&](float v) {
        const float y = quotient(v, divisor);
        // by way of integers, which have no -0
        return product(kE4m3 ? nearest_e4m3(y) : static_cast<float>(nearest_i8(y)), scale);
    };
    kept.each(load, [&](int at, const Floats4& v) {
        out.store(at, {value(v.x), value(v.y), value(v.z), value(v.w)});
    });
}

}  // namespace edge
