// Twins of mma.sync: the last lane of a warp to arrive computes the product of all, from the lanes'
// fragments. Layouts are the PTX ISA's (9.7.14.5): with r = lane / 4 and q = lane % 4, d holds rows r, r,
// r+8, r+8 at columns 2q, 2q+1.
#pragma once

#include <cstdint>
#include <cstring>

namespace emu {

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC before 13 has no _Float16 in C++ there
#else
typedef _Float16 Half;
#endif

struct Fragments {
    uint32_t a[32][4], b[32][2];
    union {
        float f[32][4];
        int32_t i[32][4];
    } d;
};

typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

// m16n8k32: a[0..3] hold rows r, r+8, r, r+8 at columns 4q..4q+3 and (a[2], a[3]) 16 more; b[0], b[1] column
// r at rows 4q..4q+3 and 16 more. Bytes of a unsigned or signed, of b signed.
template <bool kUnsigned>
void product_i8(Fragments& w) {
    Ints8 b[32], d[16];
    for (int col = 0; col < 8; ++col)
        for (int k = 0; k < 32; ++k)
            b[k][col] = static_cast<int8_t>(w.b[4 * col + k % 16 / 4][k / 16] >> 8 * (k % 4));
    const auto byte = [](uint32_t v) {
        return kUnsigned ? int32_t{static_cast<uint8_t>(v)} : static_cast<int8_t>(v);
    };
    for (int row = 0; row < 16; ++row) {
        for (int col = 0; col < 8; ++col) d[row][col] = w.d.i[4 * (row % 8) + col / 2][row / 8 * 2 + col % 2];
        for (int k = 0; k < 32; k += 4) {
            const uint32_t four = w.a[4 * (row % 8) + k % 16 / 4][row / 8 + k / 16 * 2];
            d[row] += byte(four) * b[k] + byte(four >> 8) * b[k + 1];
            d[row] += byte(four >> 16) * b[k + 2] + byte(four >> 24) * b[k + 3];
        }
        for (int col = 0; col < 8; ++col) w.d.i[4 * (row % 8) + col / 2][row / 8 * 2 + col % 2] = d[row][col];
    }
}

// m16n8k16: a[0..3] hold rows r, r+8, r, r+8 at columns 2q, 2q+1 and (a[2], a[3]) 8 more; b[0], b[1] column r
// at rows 2q, 2q+1 and 8 more. Products are exact in f32 and are added to d one after another, in the order
// of k.
template <bool kBfloat>
void product_f16(Fragments& w) {
    const auto value = [](uint32_t word) {
        const uint16_t half = static_cast<uint16_t>(word);
        if (kBfloat) return __builtin_bit_cast(float, static_cast<uint32_t>(half) << 16);
        return static_cast<float>(__builtin_bit_cast(Half, half));
    };
    float a[16][16];
    Floats8 b[16], d[16];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k)
            a[row][k] = value(w.a[4 * (row % 8) + k % 8 / 2][row / 8 + k / 8 * 2] >> 16 * (k % 2));
    for (int k = 0; k < 16; ++k)
        for (int col = 0; col < 8; ++col) b[k][col] = value(w.b[4 * col + k % 8 / 2][k / 8] >> 16 * (k % 2));
    for (int row = 0; row < 16; ++row)
        for (int col = 0; col < 8; ++col) d[row][col] = w.d.f[4 * (row % 8) + col / 2][row / 8 * 2 + col % 2];
    for (int row = 0; row < 16; ++row)
        for (int k = 0; k < 16; ++k) d[row] += a[row][k] * b[k];
    for (int row = 0; row < 16; ++row)
        for (int col = 0; col < 8; ++col) w.d.f[4 * (row % 8) + col / 2][row / 8 * 2 + col % 2] = d[row][col];
}

}  // namespace emu
