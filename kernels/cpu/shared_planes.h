// What the weights of a group share in formats of integer codes: a scale, and in some a minimum or zero
// point, one lane for each row of a panel. See edge_runtime/engine/formats/integer.py, kquant.py and
// microscaling.py for the formats, engine/packing.py for the order.
#pragma once

#include "kernels.h"
#include "vec16.h"

namespace edge {
namespace EDGE_ISA {

struct SharedPlanes {
    enum Kind { kF16, kF16Zero, kF16Min, kI8, kU8Min, kU4Min, kE4M3, kE8M0, kUnknown } kind;
    const uint8_t *scale, *zero, *min, *super, *super_min;
    int64_t groups, supers;  // of a panel, padding included
    int super_shift;         // log2 of the groups of a super-block
    float whole;             // scale of the tensor, times 1/2 where codes are doubled

    // width: columns with padding
    SharedPlanes(const edge_matrix& w, int64_t width)
        : kind(kind_of(w)),
          scale(static_cast<const uint8_t*>(w.scale)),
          zero(w.zero),
          min(static_cast<const uint8_t*>(w.min)),
          super(static_cast<const uint8_t*>(w.super)),
          super_min(static_cast<const uint8_t*>(w.super_min)),
          groups((width + w.group - 1) / w.group),
          supers((width + EDGE_SUPER - 1) / EDGE_SUPER),
          super_shift(w.group == 16 ? 4 : 3),
          whole(0.5f) {
        if (kind == kE4M3) whole *= *static_cast<const float*>(w.super);
    }

    static Kind kind_of(const edge_matrix& w) {
        switch (w.scale_encoding) {
            case EDGE_ENC_F16:
                return w.zero != nullptr ? kF16Zero : w.min != nullptr ? kF16Min : kF16;
            case EDGE_ENC_I8:
                return kI8;
            case EDGE_ENC_U8:
                return kU8Min;
            case EDGE_ENC_U4U4:
                return kU4Min;
            case EDGE_ENC_E4M3:
                return kE4M3;
            case EDGE_ENC_E8M0:
                return kE8M0;
            default:
                return kUnknown;
        }
    }

    static bool has_least(Kind kind) { return kind == kF16Min || kind == kU8Min || kind == kU4Min; }

    int64_t at(int64_t panel, int64_t group) const { return (panel * groups + group) * kPanel; }
    int64_t super_at(int64_t panel, int64_t group) const {
        return (panel * supers + (group >> super_shift)) * kPanel * 2;
    }
};

// f32 scales of a group, of kinds without minima.
EDGE_STEP f32x16 load_scale(const SharedPlanes& s, int64_t panel, int64_t group) {
    const int64_t at = s.at(panel, group);
    switch (s.kind) {
        case SharedPlanes::kI8:
            return mul(to_f32(load_i8(s.scale + at)), load_f16(s.super + s.super_at(panel, group)));
        case SharedPlanes::kE4M3:
            return mul(load_e4m3(s.scale + at), set1(s.whole));
        case SharedPlanes::kE8M0: {  // the exponent of an f32; that of 2^-127 is denormal
            const i32x16 bits = max(shift_left<23>(load_u8(s.scale + at)), set1(1 << 22));
            return mul(as_f32(bits), set1(s.whole));
        }
        default:
            return load_f16(s.scale + 2 * at);
    }
}

// f32 scales of a group, and what is subtracted of its values, of kinds with minima.
EDGE_STEP f32x16 load_scale_and_least(const SharedPlanes& s, int64_t panel, int64_t group, f32x16* least) {
    const int64_t at = s.at(panel, group), block = s.super_at(panel, group);
    switch (s.kind) {
        case SharedPlanes::kU8Min:
            *least = mul(to_f32(load_u8(s.min + at)), load_f16(s.super_min + block));
            return mul(to_f32(load_u8(s.scale + at)), load_f16(s.super + block));
        case SharedPlanes::kU4Min: {
            const i32x16 both = load_u8(s.scale + at);
            *least = mul(to_f32(shift_right<4>(both)), load_f16(s.super_min + block));
            return mul(to_f32(bit_and(both, set1(15))), load_f16(s.super + block));
        }
        default:
            *least = sub(zero16(), load_f16(s.min + 2 * at));
            return load_f16(s.scale + 2 * at);
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
