// Low-rank adapters beside a linear launch, out += scale * (B (A x)) for each row whose sequence uses one:
// before the launch low_rank_in makes u = A x, after it low_rank_out adds B u. Adapters come and go between
// steps: a step says where those of its sequences lie (EdgeLowRank.adapters), and ranks are read there.
//
// The order of every sum is a function of the shape alone. In A x a thread has each 256th vector of 8
// columns, in one ascending chain of fma; then the lanes of a warp (warp_merge), then warps in ascending
// order. In B u one ascending chain of fma over the rank. Rows of x that share a load of A or B are those of
// one adapter among four that follow each other; that changes no number.
#pragma once

#include "row_vectors.cuh"

namespace edge {

constexpr int kLowRankTokens = 4;  // rows of x of a block
constexpr int kRankRows = 4;       // rows of A that a block takes at once
constexpr int kRankUnit = 8;       // rows of A and columns of B are padded to it with zeros
constexpr int kRankPanel = 32;     // rows of B that lie together: [panel][unit of columns][row][column]

// The adapter of a row of the launch, or NULL.
EDGE_DEVICE const EdgeAdapter* adapter_of(const EdgeLowRank& p, int row) {
    const int token = p.row_count == EDGE_TOKENS ? row : p.step.logit_rows[row];
    return p.adapters[p.step.sequence[token]];
}

// act(first row, rows, adapter, update of matrix m) of each run of rows with one adapter that updates it,
// among the four of a block. Warps pass whole: a lane looks up each row's adapter, so that their waits are
// one.
template <class Act>
EDGE_DEVICE void each_run(const EdgeLowRank& p, const EdgeUpdated& m, int first, const Act& act) {
    const int count = p.step.counts[p.row_count];
    const int rows = first + kLowRankTokens < count ? kLowRankTokens : count - first;
    const uint64_t mine = lane() < rows ? reinterpret_cast<uint64_t>(adapter_of(p, first + lane())) : 0;
    for (int at = 0; at < rows;) {
        const uint64_t user = __shfl_sync(kAll, mine, at);
        int n = 1;
        while (at + n < rows && __shfl_sync(kAll, mine, at + n) == user) ++n;
        if (user != 0) {
            const EdgeAdapter* adapter = reinterpret_cast<const EdgeAdapter*>(user);
            const EdgeUpdate& update = reinterpret_cast<const EdgeUpdate*>(adapter + 1)[m.op];
            if (update.rank > 0) act(first + at, n, *adapter, update);
        }
        at += n;
    }
}

EDGE_DEVICE void unpack_halves(const Words4& w, float (&v)[8]) {
    const uint32_t words[4] = {w.x, w.y, w.z, w.w};
#pragma unroll
    for (int i = 0; i < 8; ++i) v[i] = half_to_float(static_cast<uint16_t>(words[i / 2] >> 16 * (i % 2)));
}

// acc + a dot of eight.
EDGE_DEVICE float dot8(const float (&a)[8], const Floats4& low, const Floats4& high, float acc) {
    acc = fused(a[3], low.w, fused(a[2], low.z, fused(a[1], low.y, fused(a[0], low.x, acc))));
    return fused(a[7], high.w, fused(a[6], high.z, fused(a[5], high.y, fused(a[4], high.x, acc))));
}

// u of n rows from `at` on, for the rows of A that the block has. kWhole: see Row.
template <bool kWhole>
EDGE_DEVICE void low_rank_dots(const EdgeLowRank& p, int at, int n, const EdgeAdapter& adapter,
                               const EdgeUpdate& update,
                               float (&sums)[kRowWarps][kRankRows * kLowRankTokens]) {
    const int thread = static_cast<int>(threadIdx.x), vectors = (p.cols + 7) / 8;
    const int rank = (update.rank + kRankUnit - 1) / kRankUnit * kRankUnit;
    for (int first = static_cast<int>(blockIdx.x) * kRankRows; first < rank;
         first += static_cast<int>(gridDim.x) * kRankRows) {
        float acc[kRankRows][kLowRankTokens];
        for (int i = 0; i < kRankRows; ++i)
            for (int t = 0; t < kLowRankTokens; ++t) acc[i][t] = 0.0f;
        const uint8_t* a = static_cast<const uint8_t*>(update.a) + static_cast<int64_t>(first) * vectors * 16;
        for (int v = thread; v < vectors; v += kRowThreads) {
            Words4 w[kRankRows];
#pragma unroll
            for (int i = 0; i < kRankRows; ++i)
                w[i] = load_cached(a + (static_cast<int64_t>(i) * vectors + v) * 16);
            Floats4 low[kLowRankTokens], high[kLowRankTokens];
#pragma unroll
            for (int t = 0; t < kLowRankTokens; ++t) {
                if (t >= n) continue;
                const RowIn<kWhole> x{p.x + static_cast<int64_t>(at + t) * p.cols, p.cols};
                low[t] = x.load(2 * v);
                high[t] = x.load(2 * v + 1);
            }
#pragma unroll
            for (int i = 0; i < kRankRows; ++i) {
                float values[8];
                unpack_halves(w[i], values);
#pragma unroll
                for (int t = 0; t < kLowRankTokens; ++t)
                    if (t < n) acc[i][t] = dot8(values, low[t], high[t], acc[i][t]);
            }
        }
#pragma unroll
        for (int t = 0; t < kLowRankTokens; ++t) {
            if (t >= n) continue;
#pragma unroll
            for (int i = 0; i < kRankRows; ++i) {
                const float sum = warp_merge(acc[i][t], [](float x, float y) { return x + y; });
                if (lane() == 0) sums[warp()][t * kRankRows + i] = sum;
            }
        }
        __syncthreads();
        if (thread < n * kRankRows) {
            float total = sums[0][thread];
            for (int w = 1; w < kRowWarps; ++w) total = total + sums[w][thread];
            const int row = at + thread / kRankRows;
            adapter.u[row * adapter.stride + update.offset + first + thread % kRankRows] = total;
        }
        __syncthreads();  // before the sums are written again
    }
}

// Grid (turns, matrices, ceil(rows / 4)), 256 threads: turns of blocks share the rows of an A.
EDGE_DEVICE void low_rank_in(const EdgeLowRank& p) {
    EDGE_SHARED float sums[kRowWarps][kRankRows * kLowRankTokens];
    const int first = static_cast<int>(blockIdx.z) * kLowRankTokens;
    each_run(p, p.matrix[blockIdx.y], first,
             [&](int at, int n, const EdgeAdapter& adapter, const EdgeUpdate& update) {
                 if (p.cols % 4 == 0) {
                     low_rank_dots<true>(p, at, n, adapter, update, sums);
                 } else {
                     low_rank_dots<false>(p, at, n, adapter, update, sums);
                 }
             });
}

// Grid (ceil(panels / 8), ceil(rows / 4)), 256 threads: a warp has a panel of outputs of four rows.
EDGE_DEVICE void low_rank_out(const EdgeLowRank& p) {
    int panel = static_cast<int>(blockIdx.x) * kRowWarps + warp();
    if (panel >= p.panels) return;
    int found = 0;
    for (int i = 1; i < p.count; ++i)
        if (panel >= p.matrix[i].first_panel) found = i;
    const EdgeUpdated& m = p.matrix[found];
    panel -= m.first_panel;
    const int row = panel * kRankPanel + lane();
    const int first = static_cast<int>(blockIdx.y) * kLowRankTokens;
    each_run(p, m, first, [&](int at, int n, const EdgeAdapter& adapter, const EdgeUpdate& update) {
        const int units = (update.rank + kRankUnit - 1) / kRankUnit;
        const uint8_t* b = static_cast<const uint8_t*>(update.b) +
                           (static_cast<int64_t>(panel) * units * kRankPanel + lane()) * 16;
        const float* u = adapter.u + at * adapter.stride + update.offset;
        float acc[kLowRankTokens];
        for (int t = 0; t < kLowRankTokens; ++t) acc[t] = 0.0f;
        for (int c = 0; c < units; ++c) {
            float values[8];
            unpack_halves(load_cached(b + static_cast<int64_t>(c) * kRankPanel * 16), values);
#pragma unroll
            for (int t = 0; t < kLowRankTokens; ++t) {
                if (t >= n) continue;
                const Floats4* from = reinterpret_cast<const Floats4*>(u + t * adapter.stride) + 2 * c;
                acc[t] = dot8(values, from[0], from[1], acc[t]);
            }
        }
        if (row >= m.rows) return;
#pragma unroll
        for (int t = 0; t < kLowRankTokens; ++t) {
            if (t >= n) continue;
            float& out = m.out[static_cast<int64_t>(at + t) * m.stride + row];
            out = fused(m.scale, product(update.scale, acc[t]), out);
        }
    });
}

}  // namespace edge
