// Causal attention over quantized pages. Sixteen keys (a tile, at positions that are multiples of 16) are
// decoded to f32 once for all queries that share the kv head; softmax runs online over tiles in ascending
// order, so the result of a query depends on its own position and keys alone.
#include <climits>

#include "half.h"
#include "kernels.h"
#include "linear.h"
#include "math16.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int kTile = 16;
constexpr int kQueryBlock = kRegisters == 32 ? 4 : 1;  // that share a load of values

// One row of whole 16-lane parts (32 for nibbles).
EDGE_INLINE void decode_row(const edge_kv& kv, int64_t row, int head_dim, float* out) {
    const uint8_t* q = kv.codes + row * kv.row_bytes;
    switch (kv.encoding) {
        case EDGE_ENC_F32:
            std::memcpy(out, q, static_cast<size_t>(head_dim) * 4);
            return;
        case EDGE_ENC_F16:
            for (int i = 0; i < head_dim; i += 16) store(out + i, load_f16(q + 2 * i));
            return;
        case EDGE_ENC_I8: {
            const f32x16 s = set1(static_cast<const float*>(kv.scale)[row]);
            for (int i = 0; i < head_dim; i += 16) store(out + i, mul(to_f32(load_i8(q + i)), s));
            return;
        }
        case EDGE_ENC_E4M3: {
            const f32x16 s = set1(static_cast<const float*>(kv.scale)[row]);
            for (int i = 0; i < head_dim; i += 16) store(out + i, mul(load_e4m3(q + i), s));
            return;
        }
        default:  // u4 with zero points in groups of 32: column 2j in the low nibble, 2j + 1 in the high one
            for (int g = 0; g < head_dim / 32; ++g) {
                const f32x16 s = set1(half_at(kv.scale, row * kv.row_scales + g));
                const i32x16 z = set1(static_cast<int32_t>(kv.zero[row * kv.row_scales + g]));
                const i32x16 both = load_u8(q + 16 * g);
                const i32x16 low = sub(bit_and(both, set1(15)), z);
                const i32x16 high = sub(shift_right<4>(both), z);
                store_pairs(out + 32 * g, mul(to_f32(low), s), mul(to_f32(high), s));
            }
    }
}

// The same values for a head_dim that is not whole vectors; never reads past the row.
void decode_row_slow(const edge_kv& kv, int64_t row, int head_dim, float* out) {
    const uint8_t* q = kv.codes + row * kv.row_bytes;
    for (int i = 0; i < head_dim; ++i) {
        switch (kv.encoding) {
            case EDGE_ENC_F32:
                std::memcpy(out + i, q + 4 * i, 4);
                break;
            case EDGE_ENC_F16:
                out[i] = half_at(q, i);
                break;
            case EDGE_ENC_I8:
                out[i] =
                    static_cast<float>(static_cast<int8_t>(q[i])) * static_cast<const float*>(kv.scale)[row];
                break;
            case EDGE_ENC_E4M3:
                out[i] = e4m3_to_float(q[i]) * static_cast<const float*>(kv.scale)[row];
                break;
            default: {
                const int64_t g = row * kv.row_scales + i / kv.group;
                const int code = i % 2 == 0 ? q[i / 2] & 15 : q[i / 2] >> 4;
                out[i] = static_cast<float>(code - static_cast<int>(kv.zero[g])) * half_at(kv.scale, g);
            }
        }
    }
}

void decode_tile(const edge_kv& kv, int64_t row, int count, int head_dim, int64_t stride, float* tile) {
    const bool whole = head_dim % (kv.encoding == EDGE_ENC_U4 ? 32 : 16) == 0;
    for (int j = 0; j < count; ++j) {
        if (whole) {
            decode_row(kv, row + j, head_dim, tile + j * stride);
        } else {
            decode_row_slow(kv, row + j, head_dim, tile + j * stride);
        }
    }
}

// Touches the next tile's keys or values, which the hardware cannot foresee: pages lie anywhere.
EDGE_INLINE void prefetch_tile(const edge_kv& kv, int64_t row) {
    const uint8_t* q = kv.codes + row * kv.row_bytes;
    for (int i = 0; i < kTile * kv.row_bytes; i += 64) __builtin_prefetch(q + i);
}

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

// Scores of query i against the tile's keys, and the softmax state brought up to them.
EDGE_INLINE void score(const edge_op& op, const State& s, int64_t stride, int i, Seen seen, f32x16 index) {
    f32x16 dots[kTile];
    for (int j = 0; j < kTile; ++j) dots[j] = zero16();
    for (int64_t c = 0; c < stride; c += 16) {
        const f32x16 a = load(s.q + i * stride + c);
        for (int j = 0; j < kTile; ++j) dots[j] = fma(a, load(s.keys + j * stride + c), dots[j]);
    }
    f32x16 x = mul(set1(op.scale), sum_each(dots));
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

    const int last = args.positions[args.tokens - 1];
    int start = 0;
    if (op.window > 0 && args.positions[0] >= op.window) start = args.positions[0] - op.window + 1;
    for (int tile = start / kTile * kTile; tile <= last; tile += kTile) {
        if (tile + kTile <= last && tile + kTile < bend) {
            const int64_t next = row_of(tile + kTile);
            prefetch_tile(cache.k, next);
            prefetch_tile(cache.v, next);
        }
        const int count = last - tile + 1 < kTile ? last - tile + 1 : kTile;
        if (tile + count <= bend) {
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
            if (seen.low < seen.high) score(op, s, stride, i, seen, index);
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
