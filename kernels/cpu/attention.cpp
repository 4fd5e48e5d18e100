// Causal attention over quantized pages. Sixteen keys (a tile, at positions that are multiples of 16) are
// decoded to f32 once for all queries that share the kv head; softmax runs online over tiles in ascending
// order, so the result of a query depends on its own position and keys alone.
#include <climits>

#include "kernels.h"
#include "kv_tiles.h"
#include "linear.h"
#include "math16.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int kQueryBlock = kRegisters == 32 ? 4 : 1;  // that share a load of values

// sum[c] += share[j] * values[j][c] in ascending j, for Q queries at once.
template <int Q>
EDGE_INLINE void mix(const float* values, int64_t stride, const float* share, float* sum, int low, int high) {
    int64_t c = 0;
    for (; c + 64 <= stride; c += 64) {
        f32x16 a[Q][4];
        for (int i = 0; i < Q; ++i)
            for (int n = 0; n < 4; ++n) a[i][n] = load(sum + i * stride + c + 16 * n);
        for (int j = low; j < high; ++j) {
            const float* v = values + j * stride + c;
            for (int n = 0; n < 4; ++n) {
                const f32x16 part = load(v + 16 * n);
                for (int i = 0; i < Q; ++i) a[i][n] = fma(set1(share[i * kTile + j]), part, a[i][n]);
            }
        }
        for (int i = 0; i < Q; ++i)
            for (int n = 0; n < 4; ++n) store(sum + i * stride + c + 16 * n, a[i][n]);
    }
    for (; c < stride; c += 16) {
        f32x16 a[Q];
        for (int i = 0; i < Q; ++i) a[i] = load(sum + i * stride + c);
        for (int j = low; j < high; ++j) {
            const f32x16 part = load(values + j * stride + c);
            for (int i = 0; i < Q; ++i) a[i] = fma(set1(share[i * kTile + j]), part, a[i]);
        }
        for (int i = 0; i < Q; ++i) store(sum + i * stride + c, a[i]);
    }
}

// What one item of work keeps between tiles, all in the thread's scratch.
struct State {
    float* keys;      // (kTile, stride)
    float* values;    // (kTile, stride)
    float* q;         // (queries, stride)
    float* sum;       // (queries, stride): values mixed so far
    float* shares;    // (queries, kTile): softmax numerators of the tile
    float* totals;    // (queries, 16): lanes of the softmax denominator
    float* greatest;  // (queries): running maximum of the scores
};

// Keys low..high-1 of the tile at `tile` are seen from `position`.
struct Seen {
    int low, high;
};
EDGE_INLINE Seen seen_from(int position, int tile, int window) {
    int low = 0, high = position - tile + 1;
    if (window > 0 && position - window + 1 > tile) low = position - window + 1 - tile;
    if (high > kTile) high = kTile;
    return {low, high};
}

// q . key of the tile's keys, one a lane: keys as rows (kTile, stride), or as columns (head_dim, kTile).
EDGE_INLINE f32x16 dot_rows(const float* q, const float* keys, int64_t stride) {
    f32x16 dots[kTile];
    for (int j = 0; j < kTile; ++j) dots[j] = zero16();
    for (int64_t c = 0; c < stride; c += 16) {
        const f32x16 a = load(q + c);
        for (int j = 0; j < kTile; ++j) dots[j] = fma(a, load(keys + j * stride + c), dots[j]);
    }
    return sum_each(dots);
}

EDGE_INLINE f32x16 dot_columns(const float* q, const float* keys, int head_dim) {
    f32x16 sums[4] = {zero16(), zero16(), zero16(), zero16()};
    int c = 0;
    for (; c + 4 <= head_dim; c += 4)
        for (int n = 0; n < 4; ++n) sums[n] = fma(set1(q[c + n]), load(keys + (c + n) * kTile), sums[n]);
    for (; c < head_dim; ++c) sums[0] = fma(set1(q[c]), load(keys + c * kTile), sums[0]);
    return add(add(sums[0], sums[1]), add(sums[2], sums[3]));
}

// Scores of query i against the tile's keys, and the softmax state brought up to them.
EDGE_INLINE void score(const edge_op& op, const State& s, int64_t stride, int i, Seen seen, f32x16 index,
                       f32x16 dots) {
    f32x16 x = infinite_to_nan(mul(set1(op.scale), dots));
    if (op.softcap != 0.0f) x = mul(set1(op.softcap), tanh16(div(x, set1(op.softcap))));
    const bool partial = seen.low > 0 || seen.high < kTile;
    const mask16 above = greater(index, set1(static_cast<float>(seen.low) - 0.5f));
    const mask16 below = greater(set1(static_cast<float>(seen.high) - 0.5f), index);
    if (partial) {
        const f32x16 none = set1(-__builtin_inff());
        x = select(above, select(below, x, none), none);
    }
    f32x16 total = load(s.totals + i * 16);
    const float top = max_lanes(x);
    if (top > s.greatest[i]) {
        const f32x16 shrink = exp16(set1(s.greatest[i] - top));
        float* sum = s.sum + i * stride;
        for (int64_t c = 0; c < stride; c += 16) store(sum + c, mul(load(sum + c), shrink));
        total = mul(total, shrink);
        s.greatest[i] = top;
    }
    f32x16 p = exp16(sub(x, set1(s.greatest[i])));
    if (partial) p = select(above, select(below, p, zero16()), zero16());
    store(s.totals + i * 16, add(total, p));
    store(s.shares + i * kTile, p);
}

}  // namespace

void attention(const AttentionArgs& args) {
    const edge_op& op = *args.op;
    const edge_cache& cache = *args.cache;
    const int head_dim = cache.head_dim;
    const int64_t stride = (head_dim + 15) / 16 * 16;
    const int heads = args.head_end - args.head_begin;
    const int queries = heads * args.tokens;
    State s{};
    s.keys = args.scratch;
    s.values = s.keys + kTile * stride;
    s.q = s.values + kTile * stride;
    s.sum = s.q + queries * stride;
    s.shares = s.sum + queries * stride;
    s.totals = s.shares + queries * kTile;
    s.greatest = s.totals + queries * 16;

    const size_t row_bytes = static_cast<size_t>(head_dim) * 4,
                 stride_bytes = static_cast<size_t>(stride) * 4;
    if (stride != head_dim) std::memset(s.keys, 0, 2 * kTile * stride_bytes);
    for (int i = 0; i < queries; ++i) {
        const int64_t token = args.first + i / heads, head = args.head_begin + i % heads;
        std::memset(s.q + i * stride, 0, stride_bytes);
        std::memcpy(s.q + i * stride, op.x + token * op.x_width + head * head_dim, row_bytes);
        std::memset(s.sum + i * stride, 0, stride_bytes);
        std::memset(s.totals + i * 16, 0, 64);
        s.greatest[i] = -__builtin_inff();
    }
    float lane_index[16];
    for (int i = 0; i < 16; ++i) lane_index[i] = static_cast<float>(i);
    const f32x16 index = load(lane_index);
    const auto row_of = [&](int place) {
        const int64_t page = args.page_table[place / args.page_tokens];
        return (page * cache.kv_heads + args.kv_head) * args.page_tokens + place % args.page_tokens;
    };
    const int bend = args.path == nullptr ? INT_MAX : args.bend;

    const bool channels = cache.k.per_channel != 0;
    const int own = args.positions[0] / args.page_tokens * args.page_tokens;  // the page seen unquantized
    const int64_t open_stride = static_cast<int64_t>(cache.kv_heads) * head_dim;
    const auto channel_of = [&](int tile) {  // the row of a tile's first channel
        const int64_t page = args.page_table[tile / args.page_tokens];
        return (page * cache.kv_heads + args.kv_head) * head_dim;
    };
    const int last = args.positions[args.tokens - 1];
    int start = 0;
    if (op.window > 0 && args.positions[0] >= op.window) start = args.positions[0] - op.window + 1;
    for (int tile = start / kTile * kTile; tile <= last; tile += kTile) {
        if (tile + kTile <= last && tile + kTile < bend) {
            const int64_t next = row_of(tile + kTile);
            if (!channels) {
                prefetch_tile(cache.k, next);
            } else if (tile + kTile < own && (tile + kTile) % args.page_tokens == 0) {
                prefetch_page(cache.k, channel_of(tile + kTile), head_dim);
            }
            prefetch_tile(cache.v, next);
        }
        const int count = last - tile + 1 < kTile ? last - tile + 1 : kTile;
        const bool columns = channels && tile < own;
        if (channels) {
            decode_tile(cache.v, row_of(tile), count, head_dim, stride, s.values);
            if (columns) decode_columns(cache.k, channel_of(tile), tile % args.page_tokens, head_dim, s.keys);
            for (int j = 0; !columns && j < count; ++j) {
                std::memcpy(s.keys + j * stride, args.open + (tile - own + j) * open_stride, row_bytes);
                std::memset(s.keys + j * stride + head_dim, 0, stride_bytes - row_bytes);
            }
        } else if (tile + count <= bend) {
            const int64_t row = row_of(tile);
            decode_tile(cache.k, row, count, head_dim, stride, s.keys);
            decode_tile(cache.v, row, count, head_dim, stride, s.values);
        } else {  // the same tile of positions, gathered; those before `start` may have no page
            for (int j = start > tile ? start - tile : 0; j < count; ++j) {
                const int64_t row = row_of(tile + j < bend ? tile + j : args.path[tile + j - bend]);
                decode_tile(cache.k, row, 1, head_dim, stride, s.keys + j * stride);
                decode_tile(cache.v, row, 1, head_dim, stride, s.values + j * stride);
            }
        }
        for (int i = 0; i < queries; ++i) {
            const Seen seen = seen_from(args.positions[i / heads], tile, op.window);
            if (seen.low >= seen.high) continue;
            const float* q = s.q + i * stride;
            score(op, s, stride, i, seen, index,
                  columns ? dot_columns(q, s.keys, head_dim) : dot_rows(q, s.keys, stride));
        }
        for (int i = 0; i < queries;) {  // queries of one token see the same keys
            const Seen seen = seen_from(args.positions[i / heads], tile, op.window);
            const int left = heads - i % heads;
            const int together = left >= kQueryBlock ? kQueryBlock : 1;
            float* sum = s.sum + i * stride;
            const float* shares = s.shares + i * kTile;
            if (seen.low < seen.high) {
                if (together > 1) {
                    mix<kQueryBlock>(s.values, stride, shares, sum, seen.low, seen.high);
                } else {
                    mix<1>(s.values, stride, shares, sum, seen.low, seen.high);
                }
            }
            i += together;
        }
    }
    for (int i = 0; i < queries; ++i) {
        const int64_t token = args.first + i / heads, head = args.head_begin + i % heads;
        const f32x16 total = set1(sum_lanes(load(s.totals + i * 16)));
        float* out = op.out + token * op.out_width + head * head_dim;
        for (int64_t c = 0; c < head_dim; c += 16)
            store_first(out + c, div(load(s.sum + i * stride + c), total), head_dim - c);
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
