// Weight formats as the matrix kernels see them: how a lane's share of packing m16 (engine/mma_order.py)
// becomes fragments, and what scales them. A format is one instance of Weights<...>; device_code.py names it
// from the format table.
#pragma once

#include "code_planes.cuh"
#include "shared_items.cuh"

namespace edge {

constexpr int kPanel = 16;      // rows of a panel
constexpr int kTokenBlock = 8;  // tokens of a fragment

// What one scale covers and how it is stored. kFolded: an E4M3 scale of 16 values, multiplied into them.
// Shift: what is added to code * scale, a minimum. Super (formats/kquant.py): whole numbers times an f16 of
// 256 weights; signed scales, or scales and minima, in a byte each or in one.
enum class Scale {
    kNone,
    kTensor,
    kRow,
    kHalf,
    kFloat,
    kDouble,
    kE8m0,
    kFolded,
    kHalfShift,
    kSuper,
    kSuperShift,
    kSuperNibbles
};

static constexpr float kE2m1[8] = {0.0f, 0.5f, 1.0f, 1.5f, 2.0f, 3.0f, 4.0f, 6.0f};

EDGE_DEVICE float e4m3_value(uint32_t code) {
    const uint32_t sign = (code & 128) << 24, exponent = code >> 3 & 15, mantissa = code & 7;
    const float size = exponent == 0 ? static_cast<float>(mantissa) * 0x1p-9f
                                     : float_of((exponent + 120) << 23 | mantissa << 20);
    return float_of(bits_of(size) | sign);
}

// Byte `at` of a word as a number, `less` subtracted: exact, and no conversion, which GPUs are slow at.
EDGE_DEVICE float byte_value(uint32_t word, int at, float less) {
    return float_of(byte_perm(word, 0x4b000000u, 0x7650u | at)) - (0x1p23f + less);
}
// The same times an f16 value: exact, as the number has 8 bits; 0 has no sign.
EDGE_DEVICE float byte_times(uint32_t word, int at, float by) {
    return fused(float_of(byte_perm(word, 0x4b000000u, 0x7650u | at)), by, -0x1p23f * by);
}

// The bytes `low` and `high` of a word, E4M3 codes, as two f16: exact.
EDGE_DEVICE uint32_t e4m3_halves(uint32_t word, uint32_t low, uint32_t high) {
    const uint32_t upper = byte_perm(word, 0, 0x404u | low << 4 | high << 12);
    return half2_mul((upper & 0x80008000u) | (upper & 0x7f007f00u) >> 1, 0x5c005c00u);  // times 2^8
}
EDGE_DEVICE uint32_t e5m2_halves(uint32_t word, int first) {
    return byte_perm(word, 0, first == 0 ? 0x1404 : 0x3424);
}

template <Code kCode, Scale kScale, int kGroupColumns>
struct Weights {
    static constexpr CodeShape kShape = shape_of(kCode);
    static constexpr bool kInteger = kShape.integer, kUnsigned = kInteger && kCode != Code::kInt8;
    static constexpr int kOffset = kShape.offset;
    static constexpr bool kSuper =
        kScale == Scale::kSuper || kScale == Scale::kSuperShift || kScale == Scale::kSuperNibbles;
    static constexpr bool kShift =
        kScale == Scale::kHalfShift || kScale == Scale::kSuperShift || kScale == Scale::kSuperNibbles;
    static constexpr bool kZero = kUnsigned && kOffset == 0 && !kShift;  // a zero point a group
    static constexpr bool kSums = kZero || kShift || kOffset != 0;
    static constexpr bool kBfloat = kCode == Code::kBfloat;
    static constexpr bool kTable = kCode == Code::kNf4 || kCode == Code::kE2m1;
    static constexpr bool kGrouped = kScale == Scale::kHalf || kScale == Scale::kFloat ||
                                     kScale == Scale::kDouble || kScale == Scale::kE8m0 || kShift || kSuper;
    static constexpr int kGroup = kGroupColumns;  // of weights that share a scale; of inputs for integers
    static constexpr int kUnit = kGroup > kPartColumns ? kGroup : kPartColumns;  // columns taken at once
    static constexpr int kParts = kUnit / kPartColumns;
    static constexpr int kStep = kInteger && kGroup > 16 ? 32 : 16;  // columns of an mma
    static constexpr int kWords = kInteger && kStep == 16 ? 2 : 4;   // of its fragment of weights
    static constexpr int kSteps = kUnit / kStep;
    static constexpr int kGroups = kUnit / kGroup;  // in a unit
    static constexpr int kGroupSteps = kGroup / kStep;
    static constexpr int kInputs = kUnit / (kInteger ? 64 : 32);  // 16-byte loads of a token's inputs

    // Bytes of items that weights share; 0 where a format has none.
    static constexpr int kScaleBytes = kScale == Scale::kFloat                                 ? 4
                                       : kScale == Scale::kHalf || kScale == Scale::kHalfShift ? 2
                                       : kGrouped || kScale == Scale::kFolded                  ? 1
                                                                                               : 0;
    static constexpr int kShiftBytes = kScale == Scale::kHalfShift             ? 2
                                       : kZero || kScale == Scale::kSuperShift ? 1
                                                                               : 0;
    static constexpr int kSecondBytes = kScale == Scale::kDouble ? 4 : kSuper ? 2 : 0;
    static constexpr int kSuperMinBytes = kSuper && kShift ? 2 : 0;
    static constexpr int kSecondColumns = kScale == Scale::kDouble ? EDGE_SECOND : EDGE_SUPER;
    using ScaleItems = Items<kScaleBytes, kScaleBytes == 0 ? 0 : kGroups>;
    using ShiftItems = Items<kShiftBytes, kShiftBytes == 0 ? 0 : kGroups>;
    using SecondItems = Items<kSecondBytes, kSecondBytes == 0 ? 0 : 1>;
    using SuperMinItems = Items<kSuperMinBytes, kSuperMinBytes == 0 ? 0 : 1>;

    // A lane's part of a panel's unit as it is stored: codes of rows r and r + 8, and what they share.
    struct Unit {
        uint32_t codes[kParts * kShape.low];
        uint32_t high[kShape.high == 0 ? 1 : kParts * kShape.high];
        ScaleItems scale;
        ShiftItems shift;
        SecondItems second;
        SuperMinItems super_min;
        float offset;
    };

    static EDGE_DEVICE int seconds(int units) {
        return (units * kUnit + kSecondColumns - 1) / kSecondColumns;
    }

    static EDGE_DEVICE void fetch(Unit& u, const EdgeMatrix& m, int panel, int unit, int units) {
        const int64_t part = (static_cast<int64_t>(panel) * units + unit) * kParts;
        fetch_codes<kShape.low, kParts>(m.codes, part, u.codes);
        if constexpr (kShape.high > 0) fetch_codes<kShape.high, kParts>(m.high, part, u.high);
        if constexpr (kScaleBytes > 0) u.scale.fetch(m.scale, panel, unit, units);
        if constexpr (kShiftBytes > 0) u.shift.fetch(m.shift, panel, unit, units);
        const int second = unit * kUnit / kSecondColumns;
        if constexpr (kSecondBytes > 0) u.second.fetch(m.second, panel, second, seconds(units));
        if constexpr (kSuperMinBytes > 0) u.super_min.fetch(m.super_min, panel, second, seconds(units));
        if constexpr (kScale == Scale::kDouble) u.offset = *m.offset;
    }

    // The scale of a group of row r + 8 * half, and what is added to its codes times that.
    static EDGE_DEVICE float group_scale(const Unit& u, int half, int group) {
        uint32_t second = 0;
        if constexpr (kSecondBytes > 0) second = u.second.bits(half, 0);
        if constexpr (kSuper) {
            const int at = half * kGroups + group;
            return super_scale(u.scale.words[at / 4], at % 4, second);
        }
        return scale_of(u.scale.bits(half, group), second, u.offset);
    }
    static EDGE_DEVICE float group_shift(const Unit& u, int half, int group) {
        const int at = half * kGroups + group;
        if constexpr (kScale == Scale::kHalfShift) {
            return half_to_float(static_cast<uint16_t>(u.shift.bits(half, group)));
        } else if constexpr (kScale == Scale::kSuperShift) {
            return super_shift(u.shift.words[at / 4], at % 4, u.super_min.bits(half, 0));
        } else {
            return super_shift(u.scale.words[at / 4], at % 4, u.super_min.bits(half, 0));
        }
    }

    // From the bits of items, or from byte `at` of a word of them, and those of the item of more columns.
    static EDGE_DEVICE float scale_of(uint32_t bits, uint32_t second, float offset) {
        if constexpr (kScale == Scale::kFloat) return float_of(bits);
        if constexpr (kScale == Scale::kE8m0) return float_of(bits == 0 ? 0x00400000u : bits << 23);
        if constexpr (kScale == Scale::kDouble)  // formats/nf4_double.py
            return EDGE_DYNAMIC[bits] * float_of(second) + offset;
        return half_to_float(static_cast<uint16_t>(bits));
    }
    static EDGE_DEVICE float super_scale(uint32_t word, int at, uint32_t super) {
        const float by = half_to_float(static_cast<uint16_t>(super));
        if constexpr (kScale == Scale::kSuper) return byte_value(word ^ 0x80808080u, at, 128.0f) * by;
        return byte_times(kScale == Scale::kSuperNibbles ? word & 0x0f0f0f0fu : word, at, by);
    }
    static EDGE_DEVICE float super_shift(uint32_t word, int at, uint32_t super) {
        const float by = half_to_float(static_cast<uint16_t>(super));
        return byte_times(kScale == Scale::kSuperNibbles ? word >> 4 & 0x0f0f0f0fu : word, at, -by);
    }

    // What multiplies a whole row.
    static EDGE_DEVICE float row_scale(const EdgeMatrix& m, int row) {
        if constexpr (kScale == Scale::kRow) return static_cast<const float*>(m.scale)[row];
        if constexpr (kScale == Scale::kTensor) return *static_cast<const float*>(m.scale);
        if constexpr (kScale == Scale::kFolded) return *static_cast<const float*>(m.second);
        return 1.0f;
    }

    // The weights' fragment of one mma; `table`: two f16 for each byte of two codes.
    static EDGE_DEVICE void fragment(const Unit& u, int step, const uint32_t* table, uint32_t (&a)[kWords]) {
#pragma unroll
        for (int i = 0; i < kWords; ++i) {
            if constexpr (kInteger) {
                const int k = step * kStep, part = k / kPartColumns, m = k / 32 % 2, w = i + k / 16 % 2 * 2;
                a[i] = code_word<kShape.low>(u.codes, part, m, w, 0);
                if constexpr (kShape.high > 0) a[i] |= code_word<kShape.high>(u.high, part, m, w, kShape.low);
                continue;
            }
            constexpr int kLoadSteps = 16 / kShape.low;  // mma's of the codes of a load
            const uint32_t word = u.codes[step / kLoadSteps * 4 + i];
            const uint32_t part = step % kLoadSteps;
            if constexpr (kTable) {
                a[i] = table[word >> 8 * part & 255];
            } else if constexpr (kCode == Code::kE4m3) {
                a[i] = e4m3_halves(word, 2 * part, 2 * part + 1);
            } else if constexpr (kCode == Code::kE5m2) {
                a[i] = e5m2_halves(word, 2 * part);
            } else {
                a[i] = word;
            }
            if constexpr (kScale == Scale::kFolded) {
                const uint32_t byte = i % 2 * kGroups + step;
                a[i] = half2_mul(a[i], e4m3_halves(u.scale.words[byte / 4], byte % 4, byte % 4));
            }
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
        const int panel = row / kPanel, group = column / kGroup;
        const int64_t part = static_cast<int64_t>(panel) * units * kParts + column / kPartColumns;
        float v = 0.0f;
        if constexpr (kInteger) {
            int code = static_cast<int>(code_bits<kShape.low>(m.codes, part, row, column));
            if constexpr (kShape.high > 0)
                code |= static_cast<int>(code_bits<kShape.high>(m.high, part, row, column) << kShape.low);
            if constexpr (kCode == Code::kInt8) code = static_cast<int8_t>(code);
            if constexpr (kZero) code -= static_cast<int>(ShiftItems::of_row(m.shift, row, group, units));
            v = static_cast<float>(code - kOffset);
        } else {
            v = float_at(m.codes, part, row % kPanel, column % kPartColumns);
        }
        if constexpr (kScaleBytes == 0) return v * row_scale(m, row);
        uint32_t bits = 0, second = 0;
        if constexpr (kScaleBytes > 0) bits = ScaleItems::of_row(m.scale, row, group, units);
        if constexpr (kScale == Scale::kFolded) return v * (e4m3_value(bits) * row_scale(m, row));
        const int wide = column / kSecondColumns;
        if constexpr (kSecondBytes > 0) second = SecondItems::of_row(m.second, row, wide, seconds(units));
        if constexpr (kSuper) {
            v = product(v, super_scale(bits, 0, second));
        } else {
            v = product(v, scale_of(bits, second, kScale == Scale::kDouble ? *m.offset : 0.0f));
        }
        if constexpr (kShiftBytes > 0 && kShift) bits = ShiftItems::of_row(m.shift, row, group, units);
        if constexpr (kScale == Scale::kHalfShift) {
            v = v + half_to_float(static_cast<uint16_t>(bits));
        } else if constexpr (kShift) {
            v = v + super_shift(bits, 0, SuperMinItems::of_row(m.super_min, row, wide, seconds(units)));
        }
        return v;
    }

    // A code that is no integer: column `k` of a part's 64 in a row of the panel.
    static EDGE_DEVICE float float_at(const uint8_t* codes, int64_t part, int row, int k) {
        constexpr int kLoadSteps = 16 / kShape.low;
        const int load = k / 16 / kLoadSteps, step = k / 16 % kLoadSteps;
        const int half = k / 8 % 2, q = k / 2 % 4, i = k % 2, lanes = row % 8 * 4 + q,
                  word = row / 8 + 2 * half;
        const uint8_t* at = codes + ((part * (kShape.low / 4) + load) * kWarp + lanes) * 16 + word * 4;
        if constexpr (kCode == Code::kHalf) return half_to_float(reinterpret_cast<const uint16_t*>(at)[i]);
        if constexpr (kBfloat)
            return float_of(static_cast<uint32_t>(reinterpret_cast<const uint16_t*>(at)[i]) << 16);
        if constexpr (kCode == Code::kE4m3) return e4m3_value(at[2 * step + i]);
        if constexpr (kCode == Code::kE5m2)
            return half_to_float(static_cast<uint16_t>(static_cast<uint32_t>(at[2 * step + i]) << 8));
        return code_value(at[step] >> 4 * i & 15);
    }
};

}  // namespace edge
