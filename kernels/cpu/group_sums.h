// How the exact sums of a group begin, and what they add to the rows: shared by kernels of small codes.
#pragma once

#include "shared_planes.h"
#include "vec16.h"

namespace edge {
namespace EDGE_ISA {

// How the codes of a group become values: (code - offset) * scale with the offset in the sums of the
// activations, (code - zero) * scale, or code * scale - least.
enum Form { kOffset, kZero, kLeast };

// Starts the sums of a group.
template <Form kForm, int P, int T>
EDGE_STEP void begin(const SharedPlanes& s, int64_t panel, int64_t group, const int32_t* a_sum,
                     i32x16 (&sum)[P][T]) {
    for (int i = 0; i < P; ++i) {
        if constexpr (kForm == kZero) {
            const i32x16 zero = load_u8(s.zero + s.at(panel + i, group));
            for (int t = 0; t < T; ++t) sum[i][t] = mul(zero, set1(a_sum[t]));
        } else {
            for (int t = 0; t < T; ++t) sum[i][t] = set1(kForm == kLeast ? 0 : a_sum[t]);
        }
    }
}

// acc += a_scale * (scale * sum - least * the activations' sum); a_sum is minus that where there is a least.
template <Form kForm, int P, int T>
EDGE_STEP void end(const SharedPlanes& s, int64_t panel, int64_t group, const float* a_scale,
                   const int32_t* a_sum, const i32x16 (&sum)[P][T], f32x16 (&acc)[P][T]) {
    for (int i = 0; i < P; ++i) {
        f32x16 least;
        const f32x16 scale = kForm == kLeast ? load_scale_and_least(s, panel + i, group, &least)
                                             : load_scale(s, panel + i, group);
        for (int t = 0; t < T; ++t) {
            acc[i][t] = fma(to_f32(sum[i][t]), mul(set1(a_scale[t]), scale), acc[i][t]);
            if constexpr (kForm == kLeast)
                acc[i][t] = fma(set1(static_cast<float>(a_sum[t])), mul(set1(a_scale[t]), least), acc[i][t]);
        }
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
