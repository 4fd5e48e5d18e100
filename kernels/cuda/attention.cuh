// Causal attention over quantized pages in two forms that give the same bits:
//   split   one warp a chunk of keys, whose sums go to `partial`; `attention_merge` joins them, ascending;
//   looped  one warp walks all chunks and joins them itself: for prompts, where queries keep the device busy.
// Template parameters of both: formats of K and V, head_dim, fragments of 16 queries a warp (1 or 2; the same
// bits), and whether scores have a soft cap.
#pragma once

#include "attention_walk.cuh"

namespace edge {

constexpr int kAttentionWarps = 4;
constexpr int kNoBend = 0x7fffffff;

// Where partial results of (token, head) pair `pair` lie: sums (chunks, head_dim), then (chunks, 2) top and
// total.
EDGE_DEVICE float* partial_of(const EdgeAttention& args, int64_t pair, int head_dim) {
    return args.partial + pair * (int64_t{args.chunks} * head_dim + (2 * args.chunks + 3) / 4 * 4);
}

// Tokens whose queries fit a warp, and warps that a token's need.
EDGE_DEVICE int tokens_a_warp(int share, int rows) { return share < rows ? rows / share : 1; }
EDGE_DEVICE int warps_a_token(int share, int rows) { return (share + rows - 1) / rows; }

// Whether all keys that token t sees below `end` lie at their positions.
EDGE_DEVICE bool straight(const EdgeStep& step, int t, int end) {
    const int bend = step.bends[t];
    return bend >= end || bend > step.positions[t];
}
// Whether tokens t - 1 and t see the same keys below `end`, but for how far each sees.
EDGE_DEVICE bool alike(const EdgeStep& step, int t, int end) {
    return step.sequence[t - 1] == step.sequence[t] && straight(step, t - 1, end) && straight(step, t, end);
}
// How many lanes from the first on say yes.
EDGE_DEVICE int leading(bool yes) {
    const uint32_t no = ~__ballot_sync(kAll, yes);
    return no == 0 ? kWarp : __ffs(no) - 1;
}

// Whether a group begins at a token: at multiples of `most`, and where a token is unlike the one before it.
EDGE_DEVICE bool begins(const EdgeStep& step, int token, int most, int keys_end) {
    return token % most == 0 || !alike(step, token, keys_end);
}

// The group that begins at `token`; tokens end before `end`.
EDGE_DEVICE Group group_at(const EdgeStep& step, int token, int end, int most, int keys_end) {
    Group g;
    const int next = token + 1 + lane();
    g.token = token;
    g.count = 1 + (most > 1 ? leading(next < end && !begins(step, next, most, keys_end)) : 0);
    g.head = 0;
    g.sequence = step.sequence[token];
    g.bend = straight(step, token, keys_end) ? kNoBend : step.bends[token];
    const int position = step.positions[token + (lane() < g.count ? lane() : 0)];
    g.least = g.most = position;
    for (int n = 16; n > 0; n /= 2) {
        const int less = __shfl_xor_sync(kAll, g.least, n), more = __shfl_xor_sync(kAll, g.most, n);
        g.least = less < g.least ? less : g.least;
        g.most = more > g.most ? more : g.most;
    }
    return g;
}

template <int count>
EDGE_DEVICE void store_floats(float* to, const float (&x)[count]) {
    if constexpr (count == 4)
        *reinterpret_cast<Floats4*>(to) = Floats4{x[0], x[1], x[2], x[3]};
    else
        *to = x[0];
}

// grid (tokens of the bucket * warps a token, kv heads, ceil(chunks / 4)), 128 threads: a warp does a chunk
// of a group of like tokens; which tokens begin a group, the warps find out each for themselves.
template <class K, class V, int head_dim, int tiles, bool capped>
EDGE_DEVICE void attention_split(const EdgeAttention& args) {
    using W = Walk<K, V, head_dim, tiles, capped>;
    EDGE_SHARED Words4 queries[kAttentionWarps][W::kQueries];
    const EdgeStep& step = args.step;
    const int share = args.heads / args.kv_heads, parts = warps_a_token(share, W::kRows);
    const int token = static_cast<int>(blockIdx.x) / parts;
    const int number = static_cast<int>(blockIdx.z) * kAttentionWarps + warp();
    const int end = step.counts[EDGE_TOKENS], keys_end = (number + 1) * EDGE_ATTENTION_CHUNK;
    if (token >= end || number >= args.chunks) return;
    const int most = tokens_a_warp(share, W::kRows);
    if (!begins(step, token, most, keys_end)) return;
    W walk(args, queries[warp()], static_cast<int>(blockIdx.y));
    Group group = group_at(step, token, end, most, keys_end);
    group.head = static_cast<int>(blockIdx.x) % parts * W::kRows;
    if (group.most < number * EDGE_ATTENTION_CHUNK || walk.lowest(group.least) >= keys_end) return;
    walk.take(group);
    walk.chunk(number);
    const int used = walk.used_rows();
#pragma unroll
    for (int t = 0; t < tiles; ++t)
#pragma unroll
        for (int h = 0; h < 2; ++h) {
            const auto& row = walk.rows[t][h];
            const int i = 16 * t + 8 * h + walk.r;
            if (i < used && walk.sees(row, number)) {
                float* to = partial_of(args, walk.head_of(i), head_dim);
                walk.each_part(
                    t, h, [&](int dim, const auto& x) { store_floats(to + number * head_dim + dim, x); });
                if (walk.q == 0) {
                    float* softmax = to + int64_t{args.chunks} * head_dim + 2 * number;
                    softmax[0] = row.softmax.top;
                    softmax[1] = row.softmax.total;
                }
            }
        }
}

// grid (tokens of the bucket, heads), 128 threads: the partial results of a query joined.
template <int head_dim>
EDGE_DEVICE void attention_merge(const EdgeAttention& args) {
    const int token = static_cast<int>(blockIdx.x);
    if (token >= args.step.counts[EDGE_TOKENS]) return;
    const int position = args.step.positions[token];
    const int low = args.window > 0 && position >= args.window ? position - args.window + 1 : 0;
    const int first = low / EDGE_ATTENTION_CHUNK, last = position / EDGE_ATTENTION_CHUNK;
    const int64_t pair = int64_t{token} * args.heads + blockIdx.y;
    const float* sums = partial_of(args, pair, head_dim);
    const float* softmax = sums + int64_t{args.chunks} * head_dim;
    for (int dim = static_cast<int>(threadIdx.x); dim < head_dim; dim += static_cast<int>(blockDim.x)) {
        Softmax all = {softmax[2 * first], softmax[2 * first + 1]};
        float sum = sums[int64_t{first} * head_dim + dim];
#pragma unroll 4
        for (int c = first + 1; c <= last; ++c) {
            const Joint j = join(all, Softmax{softmax[2 * c], softmax[2 * c + 1]});
            sum = joined(j, sum, sums[int64_t{c} * head_dim + dim]);
            all = j.both;
        }
        const float out = product(sum, quotient(1.0f, all.total));
        if (!finite(out)) raise_status(args.step, EDGE_CUDA_NOT_FINITE);
        args.out[pair * head_dim + dim] = out;
    }
}

// grid (ceil(tokens of the bucket / (4 n)) * n * warps a token, kv heads) with n = tokens a warp, 128
// threads. Each token has a warp, which ends where it begins no group; the four of a block lie n tokens
// apart, so that those of a prompt all have work or none. `out` keeps what is joined so far.
template <class K, class V, int head_dim, int tiles, bool capped>
EDGE_DEVICE void attention_looped(const EdgeAttention& args) {
    using W = Walk<K, V, head_dim, tiles, capped>;
    EDGE_SHARED Words4 queries[kAttentionWarps][W::kQueries];
    const EdgeStep& step = args.step;
    const int share = args.heads / args.kv_heads, parts = warps_a_token(share, W::kRows);
    const int most = tokens_a_warp(share, W::kRows);
    // The last tokens of a prompt see most keys, so they begin first
    const int unit = static_cast<int>(gridDim.x - 1 - blockIdx.x);
    const int token = (unit / parts / most * kAttentionWarps + warp()) * most + unit / parts % most;
    const int end = step.counts[EDGE_TOKENS];
    if (token >= end || !begins(step, token, most, kNoBend)) return;
    W walk(args, queries[warp()], static_cast<int>(blockIdx.y));
    Group group = group_at(step, token, end, most, kNoBend);
    group.head = unit % parts * W::kRows;
    walk.take(group);
    Softmax all[tiles][2];
#pragma unroll
    for (int t = 0; t < tiles; ++t) all[t][0] = all[t][1] = Softmax{no_score(), 0.0f};
    const int used = walk.used_rows(), last = group.most / EDGE_ATTENTION_CHUNK;
    for (int number = walk.first() / EDGE_ATTENTION_CHUNK; number <= last; ++number) {
        walk.chunk(number);
#pragma unroll
        for (int t = 0; t < tiles; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const auto& row = walk.rows[t][h];
                const int i = 16 * t + 8 * h + walk.r;
                if (i >= used || !walk.sees(row, number)) continue;
                float* to = args.out + walk.head_of(i) * head_dim;
                const bool begun = number > walk.lowest(row.high) / EDGE_ATTENTION_CHUNK;
                const bool done = number == row.high / EDGE_ATTENTION_CHUNK;
                const Joint j = join(all[t][h], row.softmax);
                all[t][h] = begun ? j.both : row.softmax;
                const float inverse = quotient(1.0f, all[t][h].total);
                bool good = true;
                walk.each_part(t, h, [&](int dim, auto& x) {
                    constexpr int kCount = sizeof x / sizeof(float);
#pragma unroll
                    for (int n = 0; n < kCount; ++n) {
                        if (begun) x[n] = joined(j, to[dim + n], x[n]);
                        if (done) {
                            x[n] = product(x[n], inverse);
                            good = good && finite(x[n]);
                        }
                    }
                    store_floats(to + dim, x);
                });
                if (!good) raise_status(step, EDGE_CUDA_NOT_FINITE);
            }
    }
}

}  // namespace edge
