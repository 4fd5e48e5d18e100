// Sixteen keys or values at a time, decoded from the cache to f32.
#pragma once

#include "half.h"
#include "kernels.h"
#include "vec16.h"

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

// Sixteen keys of a page whose K is per channel, token `at` of it onwards, as columns: tile (head_dim,
// kTile). `row` is the page's first channel.
void decode_columns(const edge_kv& kv, int64_t row, int at, int head_dim, float* tile) {
    const uint8_t* q = kv.codes + row * kv.row_bytes;
    const char* scale = static_cast<const char*>(kv.scale) + 2 * row;
    int c = 0;
    for (; c + 16 <= head_dim; c += 16) {
        float scales[16];
        store(scales, load_f16(scale + 2 * c));
        if (kv.encoding == EDGE_ENC_I8) {
            for (int i = 0; i < 16; ++i)
                store(tile + (c + i) * kTile,
                      mul(to_f32(load_i8(q + (c + i) * kv.row_bytes + at)), set1(scales[i])));
            continue;
        }
        float zeros[16];
        store(zeros, to_f32(load_u8(kv.zero + row + c)));
        const int together =
            16 / kv.row_bytes;  // a load takes 32 codes: two channels of 16 tokens, one of 32
        for (int i = 0; i < 16; i += together) {
            const i32x16 both = load_u8(q + (c + i) * kv.row_bytes);
            float codes[32];
            store_pairs(codes, to_f32(bit_and(both, set1(15))), to_f32(shift_right<4>(both)));
            for (int n = 0; n < together; ++n)
                store(tile + (c + i + n) * kTile,
                      mul(sub(load(codes + 16 * n + at), set1(zeros[i + n])), set1(scales[i + n])));
        }
    }
    for (; c < head_dim; ++c) {
        for (int j = 0; j < kTile; ++j) {
            const uint8_t* code = q + c * kv.row_bytes;
            float v;
            if (kv.encoding == EDGE_ENC_I8) {
                v = static_cast<float>(static_cast<int8_t>(code[at + j]));
            } else {
                const int both = code[(at + j) / 2];
                v = static_cast<float>((j % 2 == 0 ? both & 15 : both >> 4) -
                                       static_cast<int>(kv.zero[row + c]));
            }
            tile[c * kTile + j] = v * half_at(scale, c);
        }
    }
}

// Touches the next tile's keys or values, which the hardware cannot foresee: pages lie anywhere.
EDGE_INLINE void prefetch_tile(const edge_kv& kv, int64_t row) {
    const uint8_t* q = kv.codes + row * kv.row_bytes;
    for (int i = 0; i < kTile * kv.row_bytes; i += 64) __builtin_prefetch(q + i);
}

// The same for the keys of a page whose K is per channel.
EDGE_INLINE void prefetch_page(const edge_kv& kv, int64_t row, int head_dim) {
    const uint8_t* q = kv.codes + row * kv.row_bytes;
    for (int i = 0; i < head_dim * kv.row_bytes; i += 64) __builtin_prefetch(q + i);
}

}  // namespace
}  // namespace EDGE_ISA
}  // namespace edge
