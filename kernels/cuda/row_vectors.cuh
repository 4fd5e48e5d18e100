// Rows of f32 values in vectors of four, and what all threads of a row agree on: sums and maxima in an order
// that depends on the row's width alone.
#pragma once

#include "device.cuh"

namespace edge {

constexpr int kRowThreads = 256;  // of a block of every row kernel
constexpr int kRowWarps = kRowThreads / kWarp;
constexpr uint32_t kInfinite = 0x7f800000;  // bits of a magnitude from which on it is Inf or NaN

EDGE_DEVICE uint32_t magnitude(float v) { return bits_of(v) & 0x7fffffff; }
EDGE_DEVICE uint32_t larger(uint32_t a, uint32_t b) { return a > b ? a : b; }
EDGE_DEVICE uint32_t magnitude(const Floats4& v) {
    return larger(larger(magnitude(v.x), magnitude(v.y)), larger(magnitude(v.z), magnitude(v.w)));
}

// A row of `width` values that vectors are read from and written to. kWhole, fixed by who builds the kernel:
// width is a multiple of 4 and rows are aligned to 16 bytes, so that a vector is one access.
template <bool kWhole, class T>
struct Row {
    T* values;
    int width;

    // Values 4 * at and on; zeros beyond the row.
    EDGE_DEVICE Floats4 load(int at) const {
        const int left = width - 4 * at;
        if (left <= 0) return {};
        const float* from = values + 4 * at;
        if constexpr (kWhole) return *reinterpret_cast<const Floats4*>(from);
        return {from[0], left > 1 ? from[1] : 0.0f, left > 2 ? from[2] : 0.0f, left > 3 ? from[3] : 0.0f};
    }
    EDGE_DEVICE void store(int at, const Floats4& v) const {
        const int left = width - 4 * at;
        if (left <= 0) return;
        float* to = values + 4 * at;
        if constexpr (kWhole) {
            *reinterpret_cast<Floats4*>(to) = v;
            return;
        }
        to[0] = v.x;
        if (left > 1) to[1] = v.y;
        if (left > 2) to[2] = v.z;
        if (left > 3) to[3] = v.w;
    }
};
template <bool kWhole>
using RowIn = Row<kWhole, const float>;
template <bool kWhole>
using RowOut = Row<kWhole, float>;

// A thread's vectors first, first + step, ... of a row: the first kVectors are read once and stay in
// registers, those after them are read anew by each pass. Warps pass whole, so that `visit` may shuffle.
template <int kVectors, class Item>
struct Kept {
    Item items[kVectors > 0 ? kVectors : 1];
    int first, step, end;  // end: the row's vectors

    EDGE_DEVICE Kept(int first_, int step_, int end_) : first(first_), step(step_), end(end_) {}

    // fill(at, item) of each vector that stays.
    template <class Fill>
    EDGE_DEVICE void keep(const Fill& fill) {
#pragma unroll
        for (int i = 0; i < kVectors; ++i) fill(first + i * step, items[i]);
    }
    EDGE_DEVICE bool here(int i) const { return first - lane() + i * step < end; }

    // visit(at, item) in the order of the row.
    template <class Load, class Visit>
    EDGE_DEVICE void each(const Load& load, const Visit& visit) const {
#pragma unroll
        for (int i = 0; i < kVectors; ++i)
            if (here(i)) visit(first + i * step, items[i]);
#pragma unroll(kVectors == 0 ? 4 : 1)
        for (int i = kVectors; here(i); ++i) visit(first + i * step, load(first + i * step));
    }
};

template <class T, class Merge>
EDGE_DEVICE T warp_merge(T v, const Merge& merge) {
#pragma unroll
    for (int mask = kWarp / 2; mask > 0; mask /= 2) v = merge(v, __shfl_xor_sync(kAll, v, mask));
    return v;
}

// What all kThreads threads of a row have together, for each of them. `shared`: kRowWarps values, for this
// call alone; unused where a row has one warp.
template <int kThreads, class T, class Merge>
EDGE_DEVICE T row_merge(T v, T* shared, const Merge& merge) {
    static_assert(kThreads == kWarp || kThreads == kRowThreads);
    v = warp_merge(v, merge);
    if constexpr (kThreads == kWarp) return v;
    if (lane() == 0) shared[warp()] = v;
    __syncthreads();
    v = shared[0];
#pragma unroll
    for (int w = 1; w < kRowWarps; ++w) v = merge(v, shared[w]);
    return v;
}

template <int kThreads>
EDGE_DEVICE float row_sum(float v, float* shared) {
    return row_merge<kThreads>(v, shared, [](float a, float b) { return a + b; });
}
template <int kThreads>
EDGE_DEVICE uint32_t row_max(uint32_t v, uint32_t* shared) {
    return row_merge<kThreads>(v, shared, [](uint32_t a, uint32_t b) { return larger(a, b); });
}

}  // namespace edge
