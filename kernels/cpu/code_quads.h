// Codes of 1 to 4 bits of packing n16k4, read four inputs of sixteen rows at a time.
#pragma once

#include "vec16.h"

namespace edge {
namespace EDGE_ISA {

constexpr int64_t kChunk = 32;  // inputs whose codes are decoded together: eight quads of four

// Bits of quad kQuad from a plane of kBits a code, as bits from kTo up. A chunk's bytes are kBits blocks of
// 64; the first quads have the lowest bits.
template <int kBits, int kQuad, int kTo>
EDGE_INLINE u8x64 quad_bits(const uint8_t* p) {
    constexpr int kShift = kTo - kBits * (kQuad / kBits);
    return bit_and(shift_bytes<kShift>(load_codes(p + 64 * (kQuad % kBits))), ((1 << kBits) - 1) << kTo);
}

}  // namespace EDGE_ISA
}  // namespace edge
