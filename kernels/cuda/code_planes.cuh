// Planes of codes in packing m16 (engine/mma_order.py), 64 columns of a panel at a time: a part, `bits` words
// of a lane. A code of two planes has its lower bits in the first one.
#pragma once

#include "device.cuh"

namespace edge {

constexpr int kPartColumns = 64;

// Integers of so many bits, from 0 up or with an offset, floats, and indices of tables.
enum class Code {
    kInt2,
    kInt2Offset,
    kInt3,
    kInt3Offset,
    kInt4,
    kInt4Offset,
    kInt5,
    kInt5Offset,
    kInt6Offset,
    kInt8,
    kHalf,
    kBfloat,
    kE4m3,
    kE5m2,
    kNf4,
    kE2m1
};

struct CodeShape {
    int low, high;  // bits in the first plane and the second
    int offset;     // a code u is the integer u - offset
    bool integer;
};

EDGE_DEVICE constexpr CodeShape shape_of(Code code) {
    switch (code) {
        case Code::kInt2:
            return {2, 0, 0, true};
        case Code::kInt2Offset:
            return {2, 0, 2, true};
        case Code::kInt3:
            return {2, 1, 0, true};
        case Code::kInt3Offset:
            return {2, 1, 4, true};
        case Code::kInt4:
            return {4, 0, 0, true};
        case Code::kInt4Offset:
            return {4, 0, 8, true};
        case Code::kInt5:
            return {4, 1, 0, true};
        case Code::kInt5Offset:
            return {4, 1, 16, true};
        case Code::kInt6Offset:
            return {4, 2, 32, true};
        case Code::kInt8:
            return {8, 0, 0, true};
        case Code::kHalf:
        case Code::kBfloat:
            return {16, 0, 0, false};
        case Code::kE4m3:
        case Code::kE5m2:
            return {8, 0, 0, false};
        default:
            return {4, 0, 0, false};
    }
}

// A lane's words of kParts parts, the first of them number `part` of the plane.
template <int kBits, int kParts>
EDGE_DEVICE void fetch_codes(const uint8_t* plane, int64_t part, uint32_t* words) {
    constexpr int kBytes = kBits < 4 ? 4 * kBits : 16, kLoads = kParts * 4 * kBits / kBytes;
    const uint8_t* at = plane + part * (4 * kBits * kWarp) + lane() * kBytes;
#pragma unroll
    for (int i = 0; i < kLoads; ++i)
        load_weights<kBytes, true>(at + i * kWarp * kBytes, words + i * kBytes / 4);
}

// Word w of the fragment of columns 32m .. 32m + 31 of a part, integers: a byte a code, its bits from `to`
// up.
template <int kBits>
EDGE_DEVICE uint32_t code_word(const uint32_t* words, int part, int m, int w, int to) {
    if constexpr (kBits == 8) return words[part * 8 + m * 4 + w];
    const int place = kBits == 4 ? w : kBits == 2 ? m : 0;
    const int from = kBits == 4 ? 4 * m : kBits == 2 ? 2 * w : 4 * m + w;  // lowest bit in its byte
    const uint32_t word = words[part * kBits + place];
    return (from > to ? word >> (from - to) : word << (to - from)) & ((1u << kBits) - 1) * 0x01010101u << to;
}

// The code of one weight, integers; `part` is the one that its column lies in.
template <int kBits>
EDGE_DEVICE uint32_t code_bits(const uint8_t* plane, int64_t part, int row, int column) {
    const int m = column / 32 % 2, half = column / 16 % 2, q = column / 4 % 4, i = column % 4;
    const int lanes = row % 8 * 4 + q, w = row / 8 % 2 + 2 * half;
    const uint8_t* at = plane + part * (4 * kBits * kWarp);
    if constexpr (kBits == 8) return at[(m * kWarp + lanes) * 16 + w * 4 + i];
    const int place = kBits == 4 ? w : kBits == 2 ? m : 0;
    const int from = kBits == 4 ? 4 * m : kBits == 2 ? 2 * w : 4 * m + w;
    return at[(lanes * kBits + place) * 4 + i] >> from & ((1u << kBits) - 1);
}

}  // namespace edge
