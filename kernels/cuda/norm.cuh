// RMS and layer norm of one run of values: a whole row, or a head.
#pragma once

#include "math.cuh"
#include "row_vectors.cuh"

namespace edge {

struct NormItem {
    Floats4 x, weight;
};

// numpy_ops.norm: (x - mean) / sqrt(mean square + eps) * weight + bias; mean of layer norm alone.
template <bool kLayer, int kThreads>
struct Norm {
    float mean = 0.0f, inverse = 1.0f;

    // `kept` and `load` give NormItems of a run of `width` values; shared: 2 * kRowWarps values. False of NaN
    // or Inf in x, and where squares are beyond f32.
    template <class Run, class Load>
    EDGE_DEVICE bool look(const Run& kept, const Load& load, int width, float eps, float* shared) {
        const Divisor count = divisor(static_cast<float>(width));
        if constexpr (kLayer) {
            float total = 0.0f;
            kept.each(load, [&](int, const NormItem& i) { total = total + i.x.x + i.x.y + i.x.z + i.x.w; });
            mean = count.of(row_sum<kThreads>(total, shared));
        }
        float total = 0.0f;
        kept.each(load, [&](int at, const NormItem& i) {
            Floats4 v = i.x;
            if constexpr (kLayer) {  // beyond the row lie zeros, which the mean must leave zeros
                const int left = width - 4 * at;
                v = {left > 0 ? v.x - mean : 0.0f, left > 1 ? v.y - mean : 0.0f, left > 2 ? v.z - mean : 0.0f,
                     left > 3 ? v.w - mean : 0.0f};
            }
            total = fused(v.w, v.w, fused(v.z, v.z, fused(v.y, v.y, fused(v.x, v.x, total))));
        });
        const float square = count.of(row_sum<kThreads>(total, shared + kRowWarps)) + eps;
        inverse = rcp_root(square);
        return finite(square);
    }

    EDGE_DEVICE float one(float x, float weight) const {
        return product(product(kLayer ? x - mean : x, inverse), weight);
    }
    EDGE_DEVICE Floats4 value(const NormItem& i) const {
        return {one(i.x.x, i.weight.x), one(i.x.y, i.weight.y), one(i.x.z, i.weight.z),
                one(i.x.w, i.weight.w)};
    }
};

EDGE_DEVICE Floats4 sum(const Floats4& a, const Floats4& b) {
    return {a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w};
}

}  // namespace edge
