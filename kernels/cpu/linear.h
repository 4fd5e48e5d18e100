// What the integer and the float matrix kernels share.
#pragma once

#include "kernels.h"
#include "vec16.h"

namespace edge {
namespace EDGE_ISA {

#if defined(EDGE_VEC_AVX512) || defined(EDGE_VEC_NEON)
constexpr int kTokenBlock = 8;  // tokens that share a load of weights; 32 registers
#else
constexpr int kTokenBlock = 4;
#endif

// Adds the bias and stores the rows of one panel that exist.
EDGE_INLINE void finish(const LinearArgs& p, int64_t row, int64_t rows, int64_t token, f32x16 y) {
    const int64_t n = rows - row;
    if (p.bias != nullptr) y = add(y, load_first(p.bias + row, n));
    store_first(p.out + token * p.out_stride + row, y, n);
}

int32_t code_offset(int encoding);
LinearKernel int_kernel(const edge_matrix& weight);
LinearKernel float_kernel(const edge_matrix& weight);

}  // namespace EDGE_ISA
}  // namespace edge
