// Weight formats as the matrix kernels see them: how a lane's 16 bytes of packing m16 (engine/mma_order.py)
// become fragments, and what scales them. A format is one instance of Weights<...>; device_code.py names it
// from the format table.
#pragma once

#include "device.cuh"

namespace edge {

constexpr int kPanel = 16;      // rows of a panel
constexpr int kTokenBlock = 8;  // tokens of a fragment
constexpr int kChunkBytes = 512;
constexpr int kUnitColumns = 64;

// What one scale covers and how it is stored; kFolded: an E4M3 scale of 16 values, multiplied into them.
enum class Scale { kNone, kTensor, kRow, kHalf, kFloat, kDouble, kE8m0, kFolded };
enum class Code { kInt4, kInt4Offset, kInt8, kHalf, kBfloat, kE4m3, kE5m2, kNf4, kE2m1 };

static constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

EDGE_DEVICE float e4m3_value(uint32_t code) {
    const uint32_t sign = (code & 128) << 24, exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9f
                                     : float_of((exponent + 120) << 23 | mantissa << 20);
    return float_of(bits_of(size) | sign);
}

// Two codes of a byte each, the `first` and the one after it, as two f16: exact.
EDGE_DEVICE uint32_t e4m3_halves(uint32_t word, int first) {
    const uint32_t high = byte_perm(word, 0, first == 0 ? 0x1404 : 0x3424);  // in the halves' upper bytes
    return half2_mul((high & 0x80008000u) | (high & 0x7f007f00u) >> 1, 0x5c005c00u);  // times 2^8
}
EDGE_DEVICE uint32_t e5m2_halves(uint32_t word, int first) {
    return byte_perm(word, 0, first == 0 ? 0x1404 : 0x3424);
}

template <Code kCode, Scale kScale, int kGroupColumns>
struct Weights {
    static constexpr bool kInteger =
        kCode == Code::kInt4 || kCode == Code::kInt4Offset || kCode == Code::kInt8;
    static constexpr bool kZero = kCode == Code::kInt4;  // a zero point a group
    static constexpr bool kSums = kZero || kCode == Code::kInt4Offset;
    static constexpr bool kBfloat = kCode == Code::kBfloat;
    static constexpr bool kTable = kCode == Code::kNf4 || kCode == Code::kE2m1;
    static constexpr int kBits = kCode == Code::kHalf || kCode == Code::kBfloat ? 16
                                 : kInteger && kCode != Code::kInt8 || kTable   ? 4
                                                                                : 8;
    static constexpr bool kGrouped = kScale == Scale::kHalf || kScale == Scale::kFloat ||
                                     kScale == Scale::kDouble || kScale == Scale::kE8m0;
    static constexpr int kGroup = kGroupColumns;  // of weights that share a scale; of inputs for integers
    static constexpr int kUnit = kGroup > kUnitColumns ? kGroup : kUnitColumns;  // columns taken at once
    static constexpr int kStep = kInteger ? 32 : 16;                             // columns of an mma
    static constexpr int kSteps = kUnit / kStep;
    static constexpr int kChunk = kChunkBytes * 8 / (kPanel * kBits);  // columns of a 16-byte load of a lane
    static constexpr int kLoads = kUnit / kChunk;
    static constexpr int kStepsPerLoad = kSteps / kLoads;
    static constexpr int kGroups = kUnit / kGroup;  // in a unit
    static constexpr int kGroupSteps = kGroup / kStep;
    // Panels of a warp of linear_tile: what registers hold without spilling.
    static constexpr int kTilePanels = kUnit == 64 && (kGroup == 64 || !kGrouped) ? 4 : 2;
    static constexpr int kInputs = kUnit / (kInteger ? 64 : 32);  // 16-byte loads of a token's inputs

    // A lane's part of a panel's unit: codes of rows r and r + 8, and what scales them.
    struct Unit {
        Words4 codes[kLoads];
        float scale[kGrouped ? kGroups : 1][2];
        uint32_t folded[kScale == Scale::kFolded ? kSteps : 1][2];  // both halves the scale
        int32_t zero[kZero ? kGroups : 1][2];
    };

    static EDGE_DEVICE float group_scale(const EdgeMatrix& m, int panel, int row, int group, int groups) {
        const int at = (panel * groups + group) * kPanel + row;
        if constexpr (kScale == Scale::kHalf) return half_to_float(static_cast<const uint16_t*>(m.scale)[at]);
        if constexpr (kScale == Scale::kFloat) return static_cast<const float*>(m.scale)[at];
        if constexpr (kScale == Scale::kFolded) return e4m3_value(static_cast<const uint8_t*>(m.scale)[at]);
        if constexpr (kScale == Scale::kE8m0) {
            const uint32_t power = static_cast<const uint8_t*>(m.scale)[at];
            return float_of(power == 0 ? 0x00400000u : power << 23);
        }
        if constexpr (kScale == Scale::kDouble) {  // formats/nf4_double.py
            constexpr int kShare = EDGE_SECOND / kGroup;
            const int seconds = (groups + kShare - 1) / kShare;
            const float second =
                static_cast<const float*>(m.second)[(panel * seconds + group / kShare) * kPanel + row];
            return EDGE_DYNAMIC[static_cast<const uint8_t*>(m.scale)[at]] * second + *m.offset;
        }
        return 1.0f;
    }

    // What multiplies a whole row.
    static EDGE_DEVICE float row_scale(const EdgeMatrix& m, int row) {
        if constexpr (kScale == Scale::kRow) return static_cast<const float*>(m.scale)[row];
        if constexpr (kScale == Scale::kTensor) return *static_cast<const float*>(m.scale);
        if constexpr (kScale == Scale::kFolded) return *static_cast<const float*>(m.second);
        return 1.0f;
    }

    static EDGE_DEVICE void fetch(Unit& u, const EdgeMatrix& m, int panel, int unit, int units) {
        const uint8_t* at = m.codes + (static_cast<int64_t>(panel) * units + unit) * kLoads * kChunkBytes;
#pragma unroll
        for (int i = 0; i < kLoads; ++i) u.codes[i] = load_weights(at + i * kChunkBytes + lane() * 16);
        const int r = lane() / 4;
        if constexpr (kGrouped) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
                for (int h = 0; h < 2; ++h)
                    u.scale[g][h] = group_scale(m, panel, r + 8 * h, unit * kGroups + g, units * kGroups);
        }
        if constexpr (kScale == Scale::kFolded) {
#pragma unroll
            for (int s = 0; s < kSteps; ++s)
                for (int h = 0; h < 2; ++h)
                    u.folded[s][h] =
                        float_to_half(group_scale(m, panel, r + 8 * h, unit * kSteps + s, units * kSteps)) *
                        0x10001u;
        }
        if constexpr (kZero) {
#pragma unroll
            for (int g = 0; g < kGroups; ++g)
                for (int h = 0; h < 2; ++h)
                    u.zero[g][h] = m.zero[((panel * units + unit) * kGroups + g) * kPanel + r + 8 * h];
        }
    }

    // The weights' fragment of one mma; `table`: two f16 for each byte of two codes.
    static EDGE_DEVICE void fragment(const Unit& u, int step, const uint32_t* table, uint32_t (&a)[4]) {
        const Words4& c = u.codes[step / kStepsPerLoad];
        const uint32_t words[4] = {c.x, c.y, c.z, c.w};
        const int part = step % kStepsPerLoad;
#pragma unroll
        for (int w = 0; w < 4; ++w) {
            if constexpr (kTable) {
                a[w] = table[words[w] >> 8 * part & 255];
            } else if constexpr (kBits == 4) {
                a[w] = words[w] >> 4 * part & 0x0f0f0f0fu;
            } else if constexpr (kCode == Code::kE4m3) {
                a[w] = e4m3_halves(words[w], 2 * part);
            } else if constexpr (kCode == Code::kE5m2) {
                a[w] = e5m2_halves(words[w], 2 * part);
            } else {
                a[w] = words[w];
            }
            if constexpr (kScale == Scale::kFolded) a[w] = half2_mul(a[w], u.folded[step][w & 1]);
        }
    }

    // All threads of a block fill it, then wait.
    static EDGE_DEVICE void fill_table(uint32_t* table) {
        if constexpr (kTable) {
            for (int i = static_cast<int>(threadIdx.x); i < 256; i += static_cast<int>(blockDim.x))
                table[i] = pack_halves(code_value(i & 15), code_value(i >> 4));
            __syncthreads();
        }
    }

    static EDGE_DEVICE float code_value(int code) {
        if constexpr (kCode == Code::kNf4) return EDGE_NF4[code];
        return code < 8 ? kE2m1[code] : -kE2m1[code - 8];
    }

    // The value of one weight, as the format's codec gives it.
    static EDGE_DEVICE float value(const EdgeMatrix& m, int row, int column, int units) {
        const int panel = row / kPanel, in_panel = row % kPanel, k = column % kChunk;
        const int span = kInteger ? 4 : 2;  // columns that a lane has side by side
        const int half = k / (4 * span) % 2, q = k / span % 4, i = k % span, step = k / kStep;
        const int lanes = in_panel % 8 * 4 + q, word = in_panel / 8 + 2 * half;
        const int64_t load = static_cast<int64_t>(panel) * units * kLoads + column / kChunk;
        const uint8_t* at = m.codes + load * kChunkBytes + lanes * 16 + word * 4;
        float v = 0.0f;
        if constexpr (kCode == Code::kHalf) v = half_to_float(reinterpret_cast<const uint16_t*>(at)[i]);
        if constexpr (kBfloat)
            v = float_of(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at)[i]) << 16);
        if constexpr (kCode == Code::kInt8) v = static_cast<float>(static_cast<int8_t>(at[i]));
        if constexpr (kCode == Code::kE4m3) v = e4m3_value(at[2 * step + i]);
        if constexpr (kCode == Code::kE5m2)
            v = half_to_float(static_cast<uint16_t>(static_cast<uint32_t>(at[2 * step + i]) << 8));
        if constexpr (kTable) v = code_value(at[step] >> 4 * i & 15);
        const int group = column / kGroup, groups = units * kGroups;
        if constexpr (kInteger && kBits == 4) {
            const int zero = kZero ? m.zero[(panel * groups + group) * kPanel + in_panel] : 8;
            v = static_cast<float>((at[i] >> 4 * step & 15) - zero);
        }
        if constexpr (kScale == Scale::kFolded)
            return v * (group_scale(m, panel, in_panel, group, groups) * row_scale(m, row));
        if constexpr (kGrouped) return v * group_scale(m, panel, in_panel, group, groups);
        return v * row_scale(m, row);
    }
};

}  // namespace edge
