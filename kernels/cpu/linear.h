// What the integer and the float matrix kernels share.
#pragma once

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

// Adds the bias and stores the rows of one panel that exist.
EDGE_INLINE void finish(const LinearArgs& p, int64_t row, int64_t rows, int64_t token, f32x16 y) {
    const int64_t n = rows - row;
    if (p.bias != nullptr) y = add(y, load_first(p.bias + row, n));
    store_first(p.out + token * p.out_stride + row, y, n);
}

int32_t code_offset(int encoding);
LinearKernel int_kernel(const edge_matrix& weight);
LinearKernel float_kernel(const edge_matrix& weight);
LinearKernel outlier_kernel(const edge_matrix& weight);  // an integer matrix with outlier columns

}  // namespace EDGE_ISA
}  // namespace edge
