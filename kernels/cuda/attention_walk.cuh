// One warp's attention of up to 16 or 32 queries that share a kv head, over a chunk of keys: flash attention
// (Dao et al. 2022) with online softmax in base 2, tile by tile in ascending order. A query's numbers depend
// on its own position and keys alone: tiles and chunks lie at multiples of 16 and EDGE_ATTENTION_CHUNK, a
// tile that a query does not see leaves its state as it was, and each row of a fragment has its own sums.
//
// Ranges: a query is divided by the power of two at its largest value before it becomes f16, and weights of
// values with a scale a row by the largest power of two of such scales (of keys it has seen); both come back
// in f32.
#pragma once

#include "kv_fragments.cuh"
#include "math.cuh"

namespace edge {

constexpr float kLog2e = 1.44269504088896340736f;

EDGE_DEVICE float no_score() { return float_of(0xff800000u); }  // -Inf

// Queries of a warp: `count` tokens from `token` on, whose keys in the chunk lie at the same places; heads
// from `head` on of those that share the kv head (more than one token: all of them).
struct Group {
    int token, count, head, sequence;
    int least, most;  // positions of the tokens
    int bend;         // of the only token: keys at positions >= bend lie where its ancestors were put
};

// Softmax of a query over a chunk, or over several: of scores in base 2.
struct Softmax {
    float top, total;
};

// cap * tanh(x / cap), with 2 log2(e) / cap for `inverse`; errs by some 2^-23 of cap, which is less than
// scores do.
EDGE_DEVICE float soft_capped(float x, float cap, float inverse) {
    const float power = exp2_flushed(product(size_of(x), inverse));
    return with_sign(fused(-2.0f * cap, reciprocal_fast(power + 1.0f), cap), x);
}

// Weights with which two parts are summed, and their softmax.
struct Joint {
    Softmax both;
    float first, second;
};
EDGE_DEVICE Joint join(const Softmax& first, const Softmax& second) {
    Joint j;
    j.both.top = larger(first.top, second.top);
    const float base = j.both.top == no_score() ? 0.0f : j.both.top;
    j.first = exp2_flushed(first.top - base);
    j.second = exp2_flushed(second.top - base);
    j.both.total = fused(first.total, j.first, product(second.total, j.second));
    return j;
}
EDGE_DEVICE float joined(const Joint& j, float first, float second) {
    return fused(first, j.first, product(second, j.second));
}

template <class K, class V, int head_dim, int tiles, bool capped>
struct Walk {
    static constexpr int kRows = 16 * tiles;
    static constexpr int kSteps = Keys<K, head_dim>::kSteps, kBlocks = Values<V, head_dim>::kBlocks;
    static constexpr int kQueries = tiles * kSteps * kWarp;  // Words4 of a warp's queries
    // Rows of scales and codes of the next tile are on their way while this one is worked on, if registers
    // allow
    static constexpr bool kAhead =
        4 * tiles * kBlocks + 2 * words_to<Run<K, head_dim, 4>>() + 4 * words_to<Run<V, head_dim, 8>>() <=
        159;

    struct Row {
        float factor;   // from a dot to its score in base 2
        int high;       // last position it sees
        uint32_t unit;  // bits of the power of two that weights are divided by, 0 at first
        Softmax softmax;
    };

    const EdgeAttention& args;
    Words4* queries;
    const int kv_head, share, page_shift, r, q;
    Group group;
    Row rows[tiles][2];             // 16 t + 8 h + r
    float sums[tiles][kBlocks][4];  // of a chunk; fragments
    Keys<K, head_dim> keys;
    Values<V, head_dim> values;
    const typename Rows<K, head_dim, 4, 2>::Start key_start;
    const typename Rows<V, head_dim, 8, 4>::Start value_start;
    float key_scale[4], value_scale[4];  // of keys 4q .. 4q+3
    int row;                             // of the tile's first key in the cache
    bool gathers;                        // its keys lie apart, or end before the tile:
    int gathered;                        // the row of key lane % 16

    EDGE_DEVICE Walk(const EdgeAttention& record, Words4* memory, int head)
        : args(record),
          queries(memory),
          kv_head(head),
          share(record.heads / record.kv_heads),
          page_shift(31 - __clz(static_cast<uint32_t>(record.page_tokens))),
          r(lane() / 4),
          q(lane() % 4),
          key_start(Rows<K, head_dim, 4, 2>::start(record.k, q)),
          value_start(Rows<V, head_dim, 8, 4>::start(record.v, r)) {}

    EDGE_DEVICE int used_rows() const {
        const int left = group.count * share - group.head;
        return left < kRows ? left : kRows;
    }
    EDGE_DEVICE int token_of(int i) const { return group.token + (group.head + i) / share; }
    EDGE_DEVICE int64_t head_of(int i) const {  // of all (token, head) pairs
        return int64_t{token_of(i)} * args.heads + kv_head * share + (group.head + i) % share;
    }

    // Takes up a group: its queries as f16, in the order of fragments, and what each row sees.
    EDGE_DEVICE void take(const Group& g) {
        constexpr int kWords = kSteps * 8, kEach = (kWords + kWarp - 1) / kWarp;
        group = g;
        __syncwarp();
        for (int i = 0; i < tiles * kSteps; ++i) queries[i * kWarp + lane()] = Words4{0, 0, 0, 0};
        __syncwarp();
        const int used = used_rows();
        uint16_t* halves = reinterpret_cast<uint16_t*>(queries);
        for (int i = 0; i < used; ++i) {
            const float* x = args.q + head_of(i) * head_dim;
            float v[kEach][2];
            uint32_t size = 0;
#pragma unroll
            for (int n = 0; n < kEach; ++n) {
                const int word = n * kWarp + lane();
#pragma unroll
                for (int e = 0; e < 2; ++e) {
                    const int dim = word < kWords
                                        ? Keys<K, head_dim>::dim(word / 8, word % 8 / 2, word % 2, e)
                                        : head_dim;
                    v[n][e] = dim < head_dim ? x[dim] : 0.0f;
                    const uint32_t bits = bits_of(v[n][e]) & 0x7fffffff;
                    size = bits > size ? bits : size;
                }
            }
            for (int n = 16; n > 0; n /= 2) {
                const uint32_t other = __shfl_xor_sync(kAll, size, n);
                size = other > size ? other : size;
            }
            uint32_t exponent = size >> 23;
            exponent = exponent < 1 ? 1 : exponent > 253 ? 253 : exponent;
            const float down = float_of((254 - exponent) << 23);
            const float scale = product(float_of(exponent << 23), product(args.scale, K::kFactor));
            const float factor = capped ? scale : product(scale, kLog2e);
            // A score of f16 or int4 keys cannot overflow below that; of the others it is looked at
            if (!(size < 0x7f800000u && factor < 0x1p96f && factor > -0x1p96f))
                raise_status(args.step, EDGE_CUDA_NOT_FINITE);
#pragma unroll
            for (int n = 0; n < kEach; ++n) {
                const int word = n * kWarp + lane();
                if (word < kWords) {
                    const int at = ((i / 16 * kSteps + word / 8) * kWarp + i % 8 * 4 + word % 8 / 2) * 4 +
                                   i % 16 / 8 + word % 2 * 2;
                    reinterpret_cast<uint32_t*>(halves)[at] =
                        pack_halves(product(v[n][0], down), product(v[n][1], down));
                }
            }
#pragma unroll
            for (int t = 0; t < tiles; ++t)
#pragma unroll
                for (int h = 0; h < 2; ++h)
                    if (16 * t + 8 * h + r == i) rows[t][h].factor = factor;
        }
        __syncwarp();
#pragma unroll
        for (int t = 0; t < tiles; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                const int i = 16 * t + 8 * h + r;
                if (i >= used) rows[t][h].factor = 0.0f;
                rows[t][h].high = args.step.positions[token_of(i < used ? i : 0)];
            }
    }

    EDGE_DEVICE int lowest(int position) const {
        return args.window > 0 && position >= args.window ? position - args.window + 1 : 0;
    }
    EDGE_DEVICE int first() const { return lowest(group.least); }
    EDGE_DEVICE bool sees(const Row& row, int chunk) const {
        return row.high >= chunk * EDGE_ATTENTION_CHUNK &&
               lowest(row.high) < (chunk + 1) * EDGE_ATTENTION_CHUNK;
    }

    // All keys of a chunk that some row sees: their softmax in `rows`, sums in `sums`, which are of weights
    // divided by what `unit` says.
    EDGE_DEVICE void chunk(int number) {
        const int start = number * EDGE_ATTENTION_CHUNK;
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                rows[t][h].softmax = Softmax{no_score(), 0.0f};
                rows[t][h].unit = 0;
            }
#pragma unroll
            for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                for (int n = 0; n < 4; ++n) sums[t][b][n] = 0.0f;
        }
        const int low = first() > start ? first() : start;
        const int high =
            group.most < start + EDGE_ATTENTION_CHUNK ? group.most : start + EDGE_ATTENTION_CHUNK - 1;
        if (low > high) return;
        // Pages of the chunk's tiles, one a lane
        const int mine = start + lane() * kTile;
        const bool needed = lane() < EDGE_ATTENTION_CHUNK / kTile && mine + kTile > low && mine <= high;
        const int page = needed ? page_of(mine) : 0;
        const int begin = low / kTile * kTile;
        if constexpr (kAhead) {
            find(begin, page);
            load_keys();
            load_scales();
            load_values();
        }
        for (int tile = begin; tile <= high; tile += kTile) {
            const int next = tile + kTile;
            const bool more = kAhead && next <= high;
            if constexpr (!kAhead) {
                find(tile, page);
                load_keys();
                load_scales();
            }
            float scores[tiles][2][4];
#pragma unroll
            for (int t = 0; t < tiles; ++t)
#pragma unroll
                for (int n = 0; n < 8; ++n) scores[t][n / 4][n % 4] = 0.0f;
            keys.each([&](int step, const uint32_t (&b)[2][2]) {
#pragma unroll
                for (int t = 0; t < tiles; ++t) {
                    const Words4 w = queries[(t * kSteps + step) * kWarp + lane()];
                    const uint32_t a[4] = {w.x, w.y, w.z, w.w};
                    mma_f16<false>(scores[t][0], a, b[0]);
                    mma_f16<false>(scores[t][1], a, b[1]);
                }
            });
            if (more) {
                find(next, page);
                load_keys();
            }
            if constexpr (!kAhead) load_values();
            uint32_t weights[tiles][4];
            if (tile >= lowest(group.most) && next <= group.least + 1)
                weigh<true>(tile, scores, weights);
            else
                weigh<false>(tile, scores, weights);
            if (more) load_scales();
            values.each([&](int block, const uint32_t (&b)[2]) {
#pragma unroll
                for (int t = 0; t < tiles; ++t) mma_f16<false>(sums[t][block], weights[t], b);
            });
            if (more) load_values();
        }
        // A row's total lies in four lanes
#pragma unroll
        for (int t = 0; t < tiles; ++t)
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                float& total = rows[t][h].softmax.total;
                total += __shfl_xor_sync(kAll, total, 1);
                total += __shfl_xor_sync(kAll, total, 2);
            }
    }

    // f(dim, s): dims dim .. of this lane's sums of row (t, h) are s[0] .. s[n-1], n of F::operator()'s run.
    template <class F>
    EDGE_DEVICE void each_part(int t, int h, F&& f) const {
        float unit = 1.0f;
        if constexpr (V::kRowScale) unit = product(float_of(rows[t][h].unit), V::kFactor);
        Values<V, head_dim>::each_part([&](auto run) {
            using R = decltype(run);
#pragma unroll
            for (int c = 0; c < 2; ++c) {
                const int dim = R::kFirst + (2 * q + c) * R::kDims;
                constexpr int kVector = R::kDims % 4 == 0 && head_dim % 4 == 0 ? 4 : 1;
#pragma unroll
                for (int s = 0; s < R::kDims; s += kVector) {
                    float x[kVector];
#pragma unroll
                    for (int n = 0; n < kVector; ++n) {
                        x[n] = sums[t][R::kStep + s + n][2 * h + c];
                        if constexpr (V::kRowScale) x[n] = product(x[n], unit);
                    }
                    if (!R::kGuarded || dim < head_dim) f(dim + s, x);
                }
            }
        });
    }

  private:
    EDGE_DEVICE int page_of(int place) const {
        const int64_t table = int64_t{group.sequence} * args.step.counts[EDGE_TABLE_STRIDE];
        return args.step.page_tables[table + (place >> page_shift)];
    }
    EDGE_DEVICE int row_in(int page, int place) const {
        return ((page * args.kv_heads + kv_head) << page_shift) + (place & (args.page_tokens - 1));
    }

    // Where the tile's keys lie. Those beyond the last position are the last again, which is finite.
    EDGE_DEVICE void find(int tile, int page) {
        row = row_in(__shfl_sync(kAll, page, (tile & (EDGE_ATTENTION_CHUNK - 1)) / kTile), tile);
        gathers = tile + kTile > group.bend || tile + kTile > group.most + 1;
        if (!gathers) return;
        int position = tile + lane() % kTile;
        position = position < first() ? first() : position;
        position = position > group.most ? group.most : position;
        if (position < group.bend) {
            gathered = row_in(page_of(position), position);
        } else {
            int ancestor = group.token;
            for (int n = group.most - position; n > 0; --n) ancestor = args.step.parents[ancestor];
            const int place = args.step.places[ancestor];
            gathered = row_in(page_of(place), place);
        }
    }

    EDGE_DEVICE int gathered_row(int key) const { return __shfl_sync(kAll, gathered, key); }
    EDGE_DEVICE void load_keys() {
        if (gathers) {
#pragma unroll
            for (int n = 0; n < 2; ++n)
                keys.rows.load(args.k, key_start, n, gathered_row(r / 2 * 4 + r % 2 + 2 * n), 0);
        } else {
            const int at = row + r / 2 * 4 + r % 2;
#pragma unroll
            for (int n = 0; n < 2; ++n) keys.rows.load(args.k, key_start, n, at, 2 * n);
        }
    }
    EDGE_DEVICE void load_values() {
        if (gathers) {
#pragma unroll
            for (int n = 0; n < 4; ++n) values.rows.load(args.v, value_start, n, gathered_row(4 * q + n), 0);
        } else {
            const int at = row + 4 * q;
#pragma unroll
            for (int n = 0; n < 4; ++n) values.rows.load(args.v, value_start, n, at, n);
        }
    }
    EDGE_DEVICE void load_scales() {
        if constexpr (K::kRowScale) load_four(args.k, key_scale);
        if constexpr (V::kRowScale) load_four(args.v, value_scale);
    }
    EDGE_DEVICE void load_four(const EdgeKv& kv, float (&scale)[4]) {
        const float* all = static_cast<const float*>(kv.scale);
        uint32_t words[4];
        if (gathers) {
#pragma unroll
            for (int n = 0; n < 4; ++n) load_words<4>(all + gathered_row(4 * q + n), &words[n]);
        } else {
            load_words<16>(all + (row + 4 * q), words);
        }
#pragma unroll
        for (int n = 0; n < 4; ++n) scale[n] = float_of(words[n]);
    }

    EDGE_DEVICE static uint32_t larger_unit(uint32_t a, uint32_t b) { return a > b ? a : b; }

    // Scores of the tile to weights, as the a fragment that multiplies values, and all state brought up to
    // it.
    // whole: every row sees every key.
    template <bool whole>
    EDGE_DEVICE void weigh(int tile, const float (&scores)[tiles][2][4], uint32_t (&weights)[tiles][4]) {
        const float cap = capped ? product(args.softcap, kLog2e) : 0.0f;
        const float inverse_cap = capped ? product(reciprocal_fast(args.softcap), 2.0f * kLog2e) : 0.0f;
        uint32_t common = 0;
        if constexpr (V::kRowScale) {
            if (whole) common = unit_of(0xf);
        }
#pragma unroll
        for (int t = 0; t < tiles; ++t) {
            float shrink[2];
#pragma unroll
            for (int h = 0; h < 2; ++h) {
                Row& row = rows[t][h];
                float x[4] = {scores[t][0][2 * h], scores[t][0][2 * h + 1], scores[t][1][2 * h],
                              scores[t][1][2 * h + 1]};
                uint32_t seen = 0xf;
                if (!whole) {
                    seen = 0;
                    const int low = lowest(row.high);
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        const int key = tile + 4 * q + n;
                        if (key >= low && key <= row.high) seen |= 1u << n;
                    }
                }
#pragma unroll
                for (int n = 0; n < 4; ++n) {
                    if constexpr (K::kRowScale) x[n] = product(x[n], key_scale[n]);
                    x[n] = product(x[n], row.factor);
                    if constexpr (K::kRowScale || capped) x[n] = fused(x[n], 0.0f, x[n]);  // NaN for Inf
                    if constexpr (capped) x[n] = soft_capped(x[n], cap, inverse_cap);
                    if (!(seen >> n & 1)) x[n] = no_score();
                }
                float top = larger(larger(x[0], x[1]), larger(x[2], x[3]));
                top = larger(top, __shfl_xor_sync(kAll, top, 1));
                top = larger(top, __shfl_xor_sync(kAll, top, 2));
                top = larger(top, row.softmax.top);
                const float base = top == no_score() ? 0.0f : top;
                shrink[h] = exp2_flushed(row.softmax.top - base);
#pragma unroll
                for (int n = 0; n < 4; ++n) x[n] = exp2_flushed(x[n] - base);
                row.softmax.total = fused(row.softmax.total, shrink[h], (x[0] + x[1]) + (x[2] + x[3]));
                row.softmax.top = top;
                if constexpr (V::kRowScale) {
                    const uint32_t unit = larger_unit(row.unit, whole ? common : unit_of(seen));
                    const float down = float_of(0x7f000000u - unit);
                    shrink[h] = product(shrink[h], product(float_of(row.unit), down));
                    row.unit = unit;
#pragma unroll
                    for (int n = 0; n < 4; ++n) {
                        x[n] = product(x[n], product(value_scale[n], down));
                        if (!(seen >> n & 1)) x[n] = 0.0f;  // its scale may be anything
                    }
                }
                weights[t][h] = pack_halves(x[0], x[1]);
                weights[t][h + 2] = pack_halves(x[2], x[3]);
            }
            if (__any_sync(kAll, shrink[0] != 1.0f || shrink[1] != 1.0f)) {
#pragma unroll
                for (int b = 0; b < kBlocks; ++b)
#pragma unroll
                    for (int n = 0; n < 4; ++n) sums[t][b][n] = product(sums[t][b][n], shrink[n / 2]);
            }
        }
    }

    // Bits of the largest power of two not above the scales of the row's seen values.
    EDGE_DEVICE uint32_t unit_of(uint32_t seen) const {
        uint32_t unit = 0;
#pragma unroll
        for (int n = 0; n < 4; ++n)
            if (seen >> n & 1) unit = larger_unit(unit, bits_of(value_scale[n]) & 0x7f800000u);
        unit = larger_unit(unit, __shfl_xor_sync(kAll, unit, 1));
        return larger_unit(unit, __shfl_xor_sync(kAll, unit, 2));
    }
};

}  // namespace edge
