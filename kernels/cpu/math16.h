// exp, tanh and erf on sixteen lanes: the same operations, so the same bits, on every instruction set.
#pragma once

#include "vec16.h"

namespace edge {
namespace EDGE_ISA {

// Cephes expf: 2^n * p(r), |r| <= ln2/2, within 2 ulp; saturates instead of under- or overflowing; exp(0)
// = 1.
EDGE_INLINE f32x16 exp16(f32x16 x) {
    x = min(set1(88.3762589f), max(set1(-87.3365402f), x));  // this order keeps a NaN
    const f32x16 n = round_even(mul(x, set1(1.44269504f)));
    f32x16 r = fma(n, set1(-0.693359375f), x);
    r = fma(n, set1(2.12194440e-4f), r);
    f32x16 p = set1(1.9875691500e-4f);
    p = fma(p, r, set1(1.3981999507e-3f));
    p = fma(p, r, set1(8.3334519073e-3f));
    p = fma(p, r, set1(4.1665795894e-2f));
    p = fma(p, r, set1(1.6666665459e-1f));
    p = fma(p, r, set1(5.0000001201e-1f));
    p = add(fma(p, mul(r, r), r), set1(1.0f));
    const i32x16 power = shift_left<23>(add(to_i32(n), set1(127)));
    return mul(p, as_f32(power));
}

EDGE_INLINE f32x16 abs16(f32x16 x) { return as_f32(bit_and(as_i32(x), set1(0x7fffffff))); }
EDGE_INLINE f32x16 copy_sign(f32x16 magnitude, f32x16 sign) {
    return as_f32(bit_or(as_i32(magnitude), bit_and(as_i32(sign), set1(INT32_MIN))));
}

// x, but NaN for Inf, which a maximum, a soft cap or exp(-Inf) would lose. Finite values keep their bits.
EDGE_INLINE f32x16 infinite_to_nan(f32x16 x) { return fma(x, zero16(), x); }

// Cephes tanhf: a polynomial below 0.625, else 1 - 2 / (exp(2|x|) + 1).
EDGE_INLINE f32x16 tanh16(f32x16 x) {
    const f32x16 a = abs16(x), z = mul(x, x);
    f32x16 p = set1(-5.70498872745e-3f);
    p = fma(p, z, set1(2.06390887954e-2f));
    p = fma(p, z, set1(-5.37397155531e-2f));
    p = fma(p, z, set1(1.33314422036e-1f));
    p = fma(p, z, set1(-3.33332819422e-1f));
    const f32x16 small = fma(mul(p, z), x, x);
    const f32x16 e = add(exp16(add(a, a)), set1(1.0f));
    const f32x16 large = copy_sign(sub(set1(1.0f), div(set1(2.0f), e)), x);
    return select(greater(a, set1(0.625f)), large, small);
}

// erf by two minimax polynomials meeting at 475/512, within 2 ulp.
EDGE_INLINE f32x16 erf16(f32x16 x) {
    const f32x16 t = abs16(x), s = mul(x, x);
    f32x16 u = fma(set1(-3.88396438e-3f), t, set1(2.42546219e-2f));
    f32x16 r = fma(set1(-1.72853470e-5f), t, set1(3.83197126e-4f));
    r = fma(r, s, u);
    r = fma(r, t, set1(-1.06777877e-1f));
    r = fma(r, t, set1(-6.34846687e-1f));
    r = fma(r, t, set1(-1.28717512e-1f));
    r = sub(mul(r, t), t);
    const f32x16 large = copy_sign(sub(set1(1.0f), exp16(r)), x);
    f32x16 p = set1(-5.96761703e-4f);
    p = fma(p, s, set1(4.99119423e-3f));
    p = fma(p, s, set1(-2.67681349e-2f));
    p = fma(p, s, set1(1.12819925e-1f));
    p = fma(p, s, set1(-3.76125336e-1f));
    p = fma(p, s, set1(1.28379166e-1f));
    return select(greater(t, set1(0.927734375f)), large, fma(p, x, x));
}

// exp(r) of a large |x| saturates, so x of any size gives +-1; NaN falls through both branches.

}  // namespace EDGE_ISA
}  // namespace edge
