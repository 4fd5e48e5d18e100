// y = W x on tensor cores, for weights of any packing m16 format.
//
// The order of every sum is a function of the matrix alone. Columns are cut into kSpans spans of whole units.
// Inside a span, integers: the dot of a group is exact in int32, groups are added in ascending order by fma
// (dot * (input scale * scale), and after it, where there is one, (sum of inputs * input scale) * minimum);
// floats: mma's of 16 columns in ascending order, by groups where they have scales. Spans are added in
// ascending order. So one token's outputs are the same bits in both kernels below, whatever shares the step:
//   linear_split: eight warps of a block, each a span of one panel; for a few tokens, bound by the weights'
//   bytes. linear_tile:  a warp has all spans of a few panels and 32 tokens; for prompts, bound by
//   arithmetic.
#pragma once

#include "formats.cuh"

namespace edge {

constexpr int kSpans = 8;
constexpr int kTileBlocks = 4;  // of tokens, of a warp of linear_tile
constexpr int kTileWarps = 2;   // of a block, both ways

EDGE_DEVICE int span_units(int units) { return (units + kSpans - 1) / kSpans; }

// A lane's inputs of a unit: the columns of token r of a block, and scales and sums of tokens 2q and 2q + 1.
template <class W>
struct Inputs {
    Words4 codes[W::kInputs];
    float scale[W::kInteger ? W::kGroups : 1][2];
    int32_t sum[W::kSums ? W::kGroups : 1][2];
};

template <class W>
EDGE_DEVICE void fetch_inputs(Inputs<W>& x, const EdgeInputs& in, int block, int unit, bool present) {
    const int r = lane() / 4, q = lane() % 4;
#pragma unroll
    for (int c = 0; c < W::kInputs; ++c) {
        const int64_t chunk = static_cast<int64_t>(block) * in.chunks + unit * W::kInputs + c;
        x.codes[c] = Words4{0, 0, 0, 0};
        if (present) x.codes[c] = load_cached(in.codes + (chunk * kTokenBlock + r) * 64 + q * 16);
    }
    if constexpr (W::kInteger) {
#pragma unroll
        for (int g = 0; g < W::kGroups; ++g) {
            const int at = (block * in.groups + unit * W::kGroups + g) * kTokenBlock + 2 * q;
            const Words2 scales = load_pair(in.scales + at);
            x.scale[g][0] = float_of(scales.x);
            x.scale[g][1] = float_of(scales.y);
            if constexpr (W::kSums) {
                const Words2 sums = load_pair(in.sums + at);
                x.sum[g][0] = static_cast<int32_t>(sums.x);
                x.sum[g][1] = static_cast<int32_t>(sums.y);
            }
        }
    }
}

// The inputs' fragment of one mma.
template <class W>
EDGE_DEVICE void input_fragment(const Inputs<W>& x, int step, uint32_t (&b)[W::kWords / 2]) {
    constexpr int kLoadSteps = 8 / W::kWords;
    const Words4& c = x.codes[step / kLoadSteps];
    const uint32_t words[4] = {c.x, c.y, c.z, c.w};
    for (int i = 0; i < W::kWords / 2; ++i) b[i] = words[step % kLoadSteps * (W::kWords / 2) + i];
}

// The dots of a group, from where its offset or zero points put them: exact.
template <class W>
EDGE_DEVICE void dot_group(const uint32_t (&a)[W::kGroupSteps][W::kWords], const int32_t (&zero)[2],
                           const Inputs<W>& x, int g, int32_t (&dot)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
        dot[i] = 0;
        if constexpr (W::kZero) dot[i] = -zero[i / 2] * x.sum[g][i % 2];
        if constexpr (W::kOffset != 0) dot[i] = -W::kOffset * x.sum[g][i % 2];
    }
#pragma unroll
    for (int s = 0; s < W::kGroupSteps; ++s) {
        uint32_t b[W::kWords / 2];
        input_fragment(x, g * W::kGroupSteps + s, b);
        if constexpr (W::kWords == 2) {
            mma_i8_k16<W::kUnsigned>(dot, a[s], b);
        } else {
            mma_i8<W::kUnsigned>(dot, a[s], b);
        }
    }
}

// Groups with their own scales: each dot by itself, then added.
template <class W, int kBlocks>
EDGE_DEVICE void multiply_groups(const typename W::Unit& w, const Inputs<W> (&x)[kBlocks],
                                 const uint32_t* table, float (&sum)[kBlocks][4]) {
#pragma unroll
    for (int g = 0; g < W::kGroups; ++g) {
        uint32_t a[W::kGroupSteps][W::kWords];
#pragma unroll
        for (int s = 0; s < W::kGroupSteps; ++s) W::fragment(w, g * W::kGroupSteps + s, table, a[s]);
        float scale[2] = {1.0f, 1.0f}, shift[2] = {0.0f, 0.0f};
        int32_t zero[2] = {0, 0};
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            if constexpr (W::kGrouped) scale[h] = W::group_scale(w, h, g);
            if constexpr (W::kShift) shift[h] = W::group_shift(w, h, g);
            if constexpr (W::kZero) zero[h] = static_cast<int32_t>(w.shift.bits(h, g));
        }
#pragma unroll
        for (int n = 0; n < kBlocks; ++n) {
            if constexpr (W::kInteger) {
                int32_t dot[4];
                dot_group<W>(a, zero, x[n], g, dot);
#pragma unroll
                for (int i = 0; i < 4; ++i) {
                    const float by = W::kGrouped ? x[n].scale[g][i % 2] * scale[i / 2] : x[n].scale[g][i % 2];
                    sum[n][i] = fused(static_cast<float>(dot[i]), by, sum[n][i]);
                }
                if constexpr (W::kShift) {
                    const float all[2] = {static_cast<float>(x[n].sum[g][0]) * x[n].scale[g][0],
                                          static_cast<float>(x[n].sum[g][1]) * x[n].scale[g][1]};
#pragma unroll
                    for (int i = 0; i < 4; ++i) sum[n][i] = fused(all[i % 2], shift[i / 2], sum[n][i]);
                }
            } else {
                float part[4] = {0.0f, 0.0f, 0.0f, 0.0f};
#pragma unroll
                for (int s = 0; s < W::kGroupSteps; ++s) {
                    uint32_t b[2];
                    input_fragment(x[n], g * W::kGroupSteps + s, b);
                    mma_f16<W::kBfloat>(part, a[s], b);
                }
#pragma unroll
                for (int i = 0; i < 4; ++i) sum[n][i] = fused(part[i], scale[i / 2], sum[n][i]);
            }
        }
    }
}

// sum[n] += a unit of a panel times that of kBlocks blocks of tokens.
template <class W, int kBlocks>
EDGE_DEVICE void multiply(const typename W::Unit& w, const Inputs<W> (&x)[kBlocks], const uint32_t* table,
                          float (&sum)[kBlocks][4]) {
    if constexpr (!W::kInteger && !W::kGrouped) {
#pragma unroll
        for (int s = 0; s < W::kSteps; ++s) {
            uint32_t a[4];
            W::fragment(w, s, table, a);
#pragma unroll
            for (int n = 0; n < kBlocks; ++n) {
                uint32_t b[2];
                input_fragment(x[n], s, b);
                mma_f16<W::kBfloat>(sum[n], a, b);
            }
        }
    } else {
        multiply_groups<W, kBlocks>(w, x, table, sum);
    }
}

// The matrix of a launch that has this panel; `panel` becomes the matrix' own.
EDGE_DEVICE const EdgeMatrix& matrix_of(const EdgeLinear& args, int& panel) {
    int found = 0;
    for (int i = 1; i < args.count; ++i)
        if (panel >= args.matrix[i].first_panel) found = i;
    panel -= args.matrix[found].first_panel;
    return args.matrix[found];
}

// From the sum over all columns to the value stored.
template <class W>
EDGE_DEVICE void finish(const EdgeLinear& args, const EdgeMatrix& m, int row, int token, float sum) {
    float v = sum * W::row_scale(m, row);
    if constexpr (!W::kInteger)
        v = v *
            args.inputs.scales[token / kTokenBlock * kTokenBlock * args.inputs.groups + token % kTokenBlock];
    if (m.bias != nullptr) v = v + m.bias[row];
    v = v * m.scale_all;
    const int64_t at = static_cast<int64_t>(token) * m.stride + row;
    if (m.add != nullptr) v = m.add[at] + m.add_scale * v;
    m.out[at] = v;
}

// Grid (panels, ceil(tokens / (8 * kBlocks))), 256 threads. kAhead units of a warp's weights are on their way
// at any time; the first ones are asked for before the launch that makes the inputs has ended.
template <class W, int kBlocks, int kAhead>
EDGE_DEVICE void linear_split(const EdgeLinear& args) {
    EDGE_SHARED float spans[kSpans][kBlocks * 4 * kWarp];
    EDGE_SHARED uint32_t table[W::kTable ? 256 : 1];
    int panel = static_cast<int>(blockIdx.x);
    const EdgeMatrix& m = matrix_of(args, panel);
    const int own = span_units(args.units), begin = warp() * own;
    const int end = begin + own < args.units ? begin + own : args.units;
    typename W::Unit w[kAhead];
    // One branch around all of them: ptxas moves loads that have predicates of their own behind the wait
    if (begin + kAhead <= end) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) W::fetch(w[i], m, panel, begin + i, args.units);
    } else {
#pragma unroll
        for (int i = 0; i < kAhead; ++i)
            if (begin + i < end) W::fetch(w[i], m, panel, begin + i, args.units);
    }
    wait_for_inputs();
    const int count = args.step.counts[args.row_count];
    const int first = static_cast<int>(blockIdx.y) * kBlocks;
    if (first * kTokenBlock >= count) return;
    W::fill_table(table);
    float sum[kBlocks][4];
    for (int n = 0; n < kBlocks; ++n)
        for (int i = 0; i < 4; ++i) sum[n][i] = 0.0f;
    for (int at = begin; at < end; at += kAhead) {
#pragma unroll
        for (int i = 0; i < kAhead; ++i) {
            const int unit = at + i;
            if (unit >= end) continue;
            Inputs<W> x[kBlocks];
#pragma unroll
            for (int n = 0; n < kBlocks; ++n)
                fetch_inputs(x[n], args.inputs, first + n, unit,
                             (first + n) * kTokenBlock + lane() / 4 < count);
            multiply<W, kBlocks>(w[i], x, table, sum);
            if (unit + kAhead < end) W::fetch(w[i], m, panel, unit + kAhead, args.units);
        }
    }
#pragma unroll
    for (int n = 0; n < kBlocks; ++n)
        for (int i = 0; i < 4; ++i) spans[warp()][(n * 4 + i) * kWarp + lane()] = sum[n][i];
    __syncthreads();
    for (int item = static_cast<int>(threadIdx.x); item < kBlocks * 4 * kWarp; item += kSpans * kWarp) {
        float total = 0.0f;
        for (int s = 0; s < kSpans; ++s) total = total + spans[s][item];
        const int of = item % kWarp, i = item / kWarp % 4, n = item / kWarp / 4;
        const int row = panel * kPanel + of / 4 + i / 2 * 8;
        const int token = (first + n) * kTokenBlock + of % 4 * 2 + i % 2;
        if (row < m.rows && token < count) finish<W>(args, m, row, token, total);
    }
}

// Grid (ceil(panels / (2 * kPanels)), ceil(tokens / 64)), 128 threads; every matrix begins with a new block
// of panels, of which a warp has kPanels: what registers hold.
template <class W, int kPanels>
EDGE_DEVICE void linear_tile(const EdgeLinear& args) {
    constexpr int kThreads = kTileWarps * kTileWarps * kWarp;
    EDGE_SHARED float totals[kPanels * kTileBlocks * 4][kThreads];  // of spans before; a thread reads its own
    EDGE_SHARED uint32_t table[W::kTable ? 256 : 1];
    W::fill_table(table);
    const int count = args.step.counts[args.row_count];
    const int first = (static_cast<int>(blockIdx.y) * kTileWarps + warp() % kTileWarps) * kTileBlocks;
    if (first * kTokenBlock >= count) return;
    int panel = static_cast<int>(blockIdx.x) * kPanels * kTileWarps;
    const EdgeMatrix& m = matrix_of(args, panel);
    panel += warp() / kTileWarps * kPanels;
    const int last = (m.rows + kPanel - 1) / kPanel - 1;
    if (panel > last) return;
    const int thread = static_cast<int>(threadIdx.x);
    float sum[kPanels][kTileBlocks][4];
    const auto each = [&](const auto& act) {
#pragma unroll
        for (int p = 0; p < kPanels; ++p)
#pragma unroll
            for (int n = 0; n < kTileBlocks; ++n)
#pragma unroll
                for (int i = 0; i < 4; ++i)
                    act(sum[p][n][i], totals[(p * kTileBlocks + n) * 4 + i][thread], p, n, i);
    };
    each([](float& s, float& total, int, int, int) { s = total = 0.0f; });
    const int own = span_units(args.units);
    for (int begin = 0; begin < args.units; begin += own) {
        const int end = begin + own < args.units ? begin + own : args.units;
        for (int unit = begin; unit < end; ++unit) {
            Inputs<W> x[kTileBlocks];
#pragma unroll
            for (int n = 0; n < kTileBlocks; ++n) fetch_inputs(x[n], args.inputs, first + n, unit, true);
#pragma unroll
            for (int p = 0; p < kPanels; ++p) {
                typename W::Unit w;
                W::fetch(w, m, panel + p < last ? panel + p : last, unit, args.units);
                multiply<W, kTileBlocks>(w, x, table, sum[p]);
            }
        }
        each([](float& s, float& total, int, int, int) {
            total = total + s;
            s = 0.0f;
        });
    }
    each([&](float&, float& total, int p, int n, int i) {
        const int row = (panel + p) * kPanel + lane() / 4 + i / 2 * 8;
        const int token = (first + n) * kTokenBlock + lane() % 4 * 2 + i % 2;
        if (row < m.rows && token < count) finish<W>(args, m, row, token, total);
    });
}

// Rows of a table of tokens. Grid (tokens), 256 threads.
template <class W>
EDGE_DEVICE void embed(const EdgeEmbed& args) {
    const int token = static_cast<int>(blockIdx.x);
    if (token >= args.step.counts[EDGE_TOKENS]) return;
    const int row = args.step.tokens[token] - args.first;
    if (row < 0 || row >= args.matrix.rows) return;
    float* out = args.out + static_cast<int64_t>(token) * args.cols;
    for (int k = static_cast<int>(threadIdx.x); k < args.cols; k += static_cast<int>(blockDim.x))
        out[k] = W::value(args.matrix, row, k, args.units) * args.scale;
}

}  // namespace edge
