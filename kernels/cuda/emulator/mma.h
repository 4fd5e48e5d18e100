// Twins of mma.sync: the last lane of a warp to arrive computes the product of all, from the lanes'
// fragments. Layouts are the PTX ISA's (9.7.14.5): with r = lane / 4 and q = lane % 4, d holds rows r, r,
// r+8, r+8 at columns 2q, 2q+1.
#pragma once

#include <cstdint>
#include <cstring>
#if defined(__F16C__) && defined(__AVX2__)
#include <immintrin.h>
#endif

namespace emu {

#if defined(__aarch64__)
typedef __fp16 Half;  // GCC before 13 has no _Float16 in C++ there
#else
typedef _Float16 Half;
#endif
typedef float Floats8 __attribute__((vector_size(32)));
typedef int32_t Ints8 __attribute__((vector_size(32)));

struct Fragments {
    uint32_t a[32][4], b[32][2];
    union {
        float f[32][4];
        int32_t i[32][4];
    } d;
};

// Rows of d as vectors of 8 columns, out of the lanes and back. (Vectors are made of words and not copied
// into by parts, which a processor would wait for.)
template <class T, class Vector>
void gather(const T (&d)[32][4], Vector (&rows)[16]) {
    for (int row = 0; row < 16; ++row) {
        const T(*lanes)[4] = d + 4 * (row % 8);
        const int i = row / 8 * 2;
        rows[row] = Vector{lanes[0][i], lanes[0][i + 1], lanes[1][i], lanes[1][i + 1],
                           lanes[2][i], lanes[2][i + 1], lanes[3][i], lanes[3][i + 1]};
    }
}
template <class T, class Vector>
void scatter(const Vector (&rows)[16], T (&d)[32][4]) {
    for (int row = 0; row < 16; ++row)
#pragma GCC unroll 8
        for (int col = 0; col < 8; ++col) d[4 * (row % 8) + col / 2][row / 8 * 2 + col % 2] = rows[row][col];
}

// m16n8k32: a[0..3] hold rows r, r+8, r, r+8 at columns 4q..4q+3 and (a[2], a[3]) 16 more; b[0], b[1] column
// r at rows 4q..4q+3 and 16 more. Bytes of a unsigned or signed, of b signed.
template <bool kUnsigned>
void product_i8(Fragments& w) {
    typedef uint32_t Words8 __attribute__((vector_size(32)));
    Ints8 b[4][8], d[16];  // b by byte of a word, then by word
    gather(w.d.i, d);
    for (int word = 0; word < 8; ++word) {
        const auto at = [&](int col) { return static_cast<int32_t>(w.b[4 * col + word % 4][word / 4]); };
        const Ints8 four{at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) b[i][word] = (four << (24 - 8 * i)) >> 24;
    }
    for (int row = 0; row < 16; ++row) {
        const uint32_t (*lanes)[4] = w.a + 4 * (row % 8);
        const int low = row / 8, high = low + 2;
        const Words8 words{lanes[0][low],  lanes[1][low],  lanes[2][low],  lanes[3][low],
                           lanes[0][high], lanes[1][high], lanes[2][high], lanes[3][high]};
        Ints8 sum[2] = {d[row], {}};
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i) {
            const Ints8 shifted = (Ints8)(words << (24 - 8 * i));
            const Ints8 a = kUnsigned ? (Ints8)((Words8)shifted >> 24) : shifted >> 24;
#pragma GCC unroll 8
            for (int word = 0; word < 8; ++word) sum[word % 2] += a[word] * b[i][word];
        }
        d[row] = sum[0] + sum[1];
    }
    scatter(d, w.d.i);
}

// Eight f16 or bf16, two in each word, as f32.
template <bool kBfloat>
Floats8 widen(uint32_t x, uint32_t y, uint32_t z, uint32_t w) {
    const auto one = [](uint32_t word) {
        if (kBfloat) return __builtin_bit_cast(float, word << 16);
        return static_cast<float>(__builtin_bit_cast(Half, static_cast<uint16_t>(word)));
    };
#if defined(__F16C__) && defined(__AVX2__)
    if constexpr (!kBfloat)
        return _mm256_cvtph_ps(_mm_setr_epi32(static_cast<int>(x), static_cast<int>(y), static_cast<int>(z),
                                              static_cast<int>(w)));
#endif
    return Floats8{one(x), one(x >> 16), one(y), one(y >> 16), one(z), one(z >> 16), one(w), one(w >> 16)};
}

// m16n8k16: a[0..3] hold rows r, r+8, r, r+8 at columns 2q, 2q+1 and (a[2], a[3]) 8 more; b[0], b[1] column r
// at rows 2q, 2q+1 and 8 more. Products are exact in f32 and are added to d one after another, in the order
// of k.
template <bool kBfloat>
void product_f16(Fragments& w) {
    Floats8 d[16];
    gather(w.d.f, d);
    for (int high = 0; high < 2; ++high) {  // k below 8 and above
        Floats8 a[16], c[8];
        for (int row = 0; row < 16; ++row) {
            const uint32_t (*lanes)[4] = w.a + 4 * (row % 8);
            const int i = row / 8 + 2 * high;
            a[row] = widen<kBfloat>(lanes[0][i], lanes[1][i], lanes[2][i], lanes[3][i]);
        }
        for (int col = 0; col < 8; ++col) {
            const uint32_t (*lanes)[2] = w.b + 4 * col;
            c[col] = widen<kBfloat>(lanes[0][high], lanes[1][high], lanes[2][high], lanes[3][high]);
        }
        Floats8 b[8];
#pragma GCC unroll 8
        for (int k = 0; k < 8; ++k)
            b[k] = Floats8{c[0][k], c[1][k], c[2][k], c[3][k], c[4][k], c[5][k], c[6][k], c[7][k]};
        for (int row = 0; row < 16; ++row)
#pragma GCC unroll 8
            for (int k = 0; k < 8; ++k) d[row] += a[row][k] * b[k];
    }
    scatter(d, w.d.f);
}

}  // namespace emu
