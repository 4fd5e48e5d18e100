// What the integer and the float matrix kernels share.
#pragma once

#include <type_traits>

#include "kernels.h"
#include "vec16.h"

namespace edge {
namespace EDGE_ISA {

#if defined(EDGE_VEC_AVX512)
constexpr int kRegisters = 32;  // vectors of sixteen lanes
#else
constexpr int kRegisters = 8;
#endif
// Tokens that share a load of weights.
constexpr int kTokenBlock = kRegisters == 32 ? 8 : 4;

// Bytes ahead; hides DRAM latency where the hardware prefetcher stops at pages. More tokens spend longer on a
// byte, but leave less room for loads to run ahead of the sums.
template <int T>
constexpr int kPrefetch = T >= 4   ? 4096
                          : T == 2 ? 2048
                                   : 1024;

// Panels computed together, so that several sums are in flight and one broadcast of inputs serves them all.
// Eight tokens have enough of their own: more would not fit the registers.
template <int T>
constexpr int kPanels = kRegisters == 32 && T == 4 ? 2 : 1;

// Calls run(std::integral_constant<int, T>, token) for each block of T tokens, as token_block() cuts them.
template <class Run>
EDGE_INLINE void for_token_blocks(int64_t tokens, const Run& run) {
    int64_t t = 0;
    for (; t + kTokenBlock <= tokens; t += kTokenBlock) run(std::integral_constant<int, kTokenBlock>(), t);
    if (kTokenBlock > 4 && t + 4 <= tokens) {
        run(std::integral_constant<int, 4>(), t);
        t += 4;
    }
    if (t + 2 <= tokens) {
        run(std::integral_constant<int, 2>(), t);
        t += 2;
    }
    if (t < tokens) run(std::integral_constant<int, 1>(), t);
}

// Adds the bias and stores the rows of one panel that exist.
EDGE_INLINE void finish(const LinearArgs& p, int64_t row, int64_t rows, int64_t token, f32x16 y) {
    const int64_t n = rows - row;
    if (p.bias != nullptr) y = add(y, load_first(p.bias + row, n));
    store_first(p.out + token * p.out_stride + row, y, n);
}

int32_t code_offset(int encoding);
LinearKernel int_kernel(const edge_matrix& weight);
LinearKernel bits_kernel(const edge_matrix& weight);
LinearKernel trellis_kernel(const edge_matrix& weight);
LinearKernel float_kernel(const edge_matrix& weight);
LinearKernel outlier_kernel(const edge_matrix& weight);  // an integer matrix with outlier columns

}  // namespace EDGE_ISA
}  // namespace edge
