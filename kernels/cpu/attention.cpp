// Causal attention over quantized pages. Sixteen keys (a tile, at positions that are multiples of 16) are decoded
// to f32 once for all queries that share the kv head; softmax runs online over tiles in ascending order, so the
// result of a query depends on its own position and keys alone.
#include "half.h"
#include "kernels.h"
#include "math16.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int kTile = 16;

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
            case EDGE_ENC_F32: std::memcpy(out + i, q + 4 * i, 4); break;
            case EDGE_ENC_F16: out[i] = half_at(q, i); break;
            case EDGE_ENC_I8:
                out[i] = static_cast<float>(static_cast<int8_t>(q[i])) * static_cast<const float*>(kv.scale)[row];
                break;
            case EDGE_ENC_E4M3: out[i] = e4m3_to_float(q[i]) * static_cast<const float*>(kv.scale)[row]; break;
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


}  // namespace

void attention(const AttentionArgs& args) {
    const edge_op& op = *args.op;
    const edge_cache& cache = *args.cache;
    const int head_dim = cache.head_dim;
    const int64_t stride = (head_dim + 15) / 16 * 16;
    const int heads = args.head_end - args.head_begin;
    const int queries = heads * args.tokens;
    float* keys = args.scratch;  // (kTile, stride)
    float* values = keys + kTile * stride;
    float* q = values + kTile * stride;      // (queries, stride)
    float* acc = q + queries * stride;       // (queries, stride)
    float* weights = acc + queries * stride;  // (queries, 16): lanes of the softmax sum
    float* greatest = weights + queries * 16;  // (queries)
    const float minus_inf = -__builtin_inff();

    if (stride != head_dim) std::memset(keys, 0, static_cast<size_t>(2 * kTile * stride) * 4);
    for (int i = 0; i < queries; ++i) {
        const int64_t token = args.first + i / heads, head = args.head_begin + i % heads;
        std::memset(q + i * stride, 0, static_cast<size_t>(stride) * 4);
        std::memcpy(q + i * stride, op.x + token * op.x_width + head * head_dim, static_cast<size_t>(head_dim) * 4);
        std::memset(acc + i * stride, 0, static_cast<size_t>(stride) * 4);
        std::memset(weights + i * 16, 0, 64);
        greatest[i] = minus_inf;
    }
    float lane_index[16];
    for (int i = 0; i < 16; ++i) lane_index[i] = static_cast<float>(i);
    const f32x16 index = load(lane_index);
    const f32x16 scale = set1(op.scale), cap = set1(op.softcap), none = set1(minus_inf);

    const int last = args.positions[args.tokens - 1];
    int start = 0;
    if (op.window > 0 && args.positions[0] >= op.window) start = args.positions[0] - op.window + 1;
    for (int tile = start / kTile * kTile; tile <= last; tile += kTile) {
        const int64_t page = args.page_table[tile / args.page_tokens];
        const int64_t row = (page * cache.kv_heads + args.kv_head) * args.page_tokens + tile % args.page_tokens;
        const int count = last - tile + 1 < kTile ? last - tile + 1 : kTile;
        decode_tile(cache.k, row, count, head_dim, stride, keys);
        decode_tile(cache.v, row, count, head_dim, stride, values);
        for (int i = 0; i < queries; ++i) {
            const int position = args.positions[i / heads];
            int low = 0, high = position - tile + 1;  // keys low..high-1 of the tile are seen
            if (op.window > 0 && position - op.window + 1 > tile) low = position - op.window + 1 - tile;
            if (high > kTile) high = kTile;
            if (low >= high) continue;

            f32x16 dots[kTile];
            for (int j = 0; j < kTile; ++j) dots[j] = zero16();
            const float* query = q + i * stride;
            for (int64_t c = 0; c < stride; c += 16) {
                const f32x16 a = load(query + c);
                for (int j = 0; j < kTile; ++j) dots[j] = fma(a, load(keys + j * stride + c), dots[j]);
            }
            f32x16 s = mul(scale, sum_each(dots));
            if (op.softcap != 0.0f) s = mul(cap, tanh16(div(s, cap)));
            const bool partial = low > 0 || high < kTile;
            const mask16 above = greater(index, set1(static_cast<float>(low) - 0.5f));
            const mask16 below = greater(set1(static_cast<float>(high) - 0.5f), index);
            if (partial) s = select(above, select(below, s, none), none);

            float* sum = acc + i * stride;
            const float top = max_lanes(s);
            if (top > greatest[i]) {
                const f32x16 shrink = exp16(set1(greatest[i] - top));
                for (int64_t c = 0; c < stride; c += 16) store(sum + c, mul(load(sum + c), shrink));
                store(weights + i * 16, mul(load(weights + i * 16), shrink));
                greatest[i] = top;
            }
            f32x16 p = exp16(sub(s, set1(greatest[i])));
            if (partial) p = select(above, select(below, p, zero16()), zero16());
            store(weights + i * 16, add(load(weights + i * 16), p));
            float share[16];
            store(share, p);
            int64_t c = 0;
            for (; c + 64 <= stride; c += 64) {  // four chains of fma at a time
                f32x16 a0 = load(sum + c), a1 = load(sum + c + 16), a2 = load(sum + c + 32), a3 = load(sum + c + 48);
                for (int j = low; j < high; ++j) {
                    const f32x16 w = set1(share[j]);
                    const float* v = values + j * stride + c;
                    a0 = fma(w, load(v), a0);
                    a1 = fma(w, load(v + 16), a1);
                    a2 = fma(w, load(v + 32), a2);
                    a3 = fma(w, load(v + 48), a3);
                }
                store(sum + c, a0);
                store(sum + c + 16, a1);
                store(sum + c + 32, a2);
                store(sum + c + 48, a3);
            }
            for (; c < stride; c += 16) {
                f32x16 a = load(sum + c);
                for (int j = low; j < high; ++j) a = fma(set1(share[j]), load(values + j * stride + c), a);
                store(sum + c, a);
            }
        }
    }
    for (int i = 0; i < queries; ++i) {
        const int64_t token = args.first + i / heads, head = args.head_begin + i % heads;
        const f32x16 total = set1(sum_lanes(load(weights + i * 16)));
        float* out = op.out + token * op.out_width + head * head_dim;
        for (int64_t c = 0; c < head_dim; c += 16)
            store_first(out + c, div(load(acc + i * stride + c), total), head_dim - c);
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
