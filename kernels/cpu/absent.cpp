// Instruction sets that belong to another processor than the one this library was built for.
#include "kernels.h"

namespace edge {

#if !defined(__x86_64__)
const Kernels* avx2_kernels() { return nullptr; }
const Kernels* avx512_kernels() { return nullptr; }
#endif
#if !defined(__aarch64__)
const Kernels* neon_kernels() { return nullptr; }
#endif

}  // namespace edge
