// Ops on one token's row: quantization of activations, norms, activations, rotation, sums.
#include "kernels.h"
#include "linear.h"
#include "math16.h"
#include "trellis.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int32_t kInfBits = 0x7f800000;
constexpr float kTiny = 0x1p-126f;  // formats/scaled.py: f32 scales are never denormal

// Sixteen codes as four units of four inputs.
EDGE_INLINE void store_codes(const QuantizeArgs& p, int64_t at, i32x16 code) {
    if (p.block == 1) {
        store_i8(p.codes + at, code);
        return;
    }
    int8_t units[16];
    store_i8(units, code);
    for (int u = 0; u < 4; ++u) std::memcpy(p.codes + (at + 4 * u) * p.block, units + 4 * u, 4);
}

// scale = absmax / 127, code = round_half_even(x / scale); a zero group has scale 0.
bool quantize(const QuantizeArgs& p) {
    int32_t worst = 0;
    const int32_t *skip = p.skip, *const skip_end = p.skip + p.skips;
    for (int64_t at = 0; at < p.padded; at += p.group) {
        f32x16 v[8];  // group <= 128
        i32x16 top = set1(0);
        const int parts = p.group / 16;
        const float* x = p.x + at;
        float kept[128];
        if (skip != skip_end && *skip >= 0 && *skip < at + p.group) {
            for (int64_t i = 0; i < p.group; ++i) kept[i] = at + i < p.n ? x[i] : 0.0f;
            for (; skip != skip_end && *skip >= 0 && *skip < at + p.group; ++skip) {
                const int32_t size = bits_of(kept[*skip - at]) & 0x7fffffff;
                worst = size > worst ? size : worst;  // NaN and Inf are found here too
                kept[*skip - at] = 0.0f;
            }
            x = kept;
        }
        for (int i = 0; i < parts; ++i) {
            const int64_t left = p.n - at - 16 * i;
            v[i] = left > 0 ? load_first(x + 16 * i, left) : zero16();
            top = max(top, as_i32(abs16(v[i])));
        }
        const int32_t absmax = max_lanes(top);
        worst = absmax > worst ? absmax : worst;
        const float scale = float_of(absmax) / 127.0f;
        i32x16 sum = set1(0);
        const f32x16 divisor = set1(scale > 0.0f ? scale : __builtin_inff());
        for (int i = 0; i < parts; ++i) {
            // this order drops a NaN, so that the codes are in range whatever was found
            const f32x16 y = max(min(round_even(div(v[i], divisor)), set1(127.0f)), set1(-127.0f));
            const i32x16 code = to_i32(y);
            sum = add(sum, code);
            store_codes(p, at + 16 * i, code);
        }
        p.scales[at / p.group * p.block] = scale;
        p.sums[at / p.group * p.block] = -p.offset * sum_lanes(sum);
    }
    return worst < kInfBits;
}

bool norm(const edge_op& op, const float* x, float* out) {
    bool finite = true;
    const int64_t n = op.group != 0 ? op.group : op.x_width;
    for (int64_t start = 0; start < op.x_width; start += n, x += n, out += n) {
        const float count = static_cast<float>(n);
        f32x16 total = zero16();
        float mean = 0.0f;
        if (op.kind == EDGE_OP_NORM_LAYER) {
            for (int64_t i = 0; i < n; i += 16) total = add(total, load_first(x + i, n - i));
            mean = sum_lanes(total) / count;
            total = zero16();
        }
        const f32x16 middle = set1(mean);
        for (int64_t i = 0; i < n; i += 16) {
            f32x16 v = load_first(x + i, n - i);
            // Only layer norm subtracts, and its last lanes beyond n must stay 0.
            if (op.kind == EDGE_OP_NORM_LAYER) {
                float lanes[16];
                store(lanes, sub(v, middle));
                v = load_first(lanes, n - i);
            }
            total = fma(v, v, total);
        }
        const float square = sum_lanes(total) / count + op.eps;
        finite = finite && square < __builtin_inff();  // false of a NaN
        const f32x16 inverse = set1(1.0f / __builtin_sqrtf(square));
        for (int64_t i = 0; i < n; i += 16) {
            f32x16 v = load_first(x + i, n - i);
            if (op.kind == EDGE_OP_NORM_LAYER) v = sub(v, middle);
            v = mul(mul(v, inverse), load_first(op.vec + i, n - i));
            if (op.bias != nullptr) v = add(v, load_first(op.bias + i, n - i));
            store_first(out + i, v, n - i);
        }
    }
    return finite;
}

EDGE_INLINE f32x16 activate(int kind, f32x16 x) {
    const f32x16 one = set1(1.0f);
    switch (kind) {
        case EDGE_OP_SILU:
            return div(x, add(one, exp16(sub(zero16(), x))));
        case EDGE_OP_GELU:
            return mul(mul(set1(0.5f), x), add(one, erf16(mul(x, set1(0.70710678118654752f)))));
        case EDGE_OP_GELU_TANH: {
            const f32x16 cube = mul(mul(x, x), x);
            const f32x16 inner = mul(set1(0.79788456080286536f), add(x, mul(set1(0.044715f), cube)));
            return mul(mul(set1(0.5f), x), add(one, tanh16(inner)));
        }
        default:
            return max(zero16(), infinite_to_nan(x));  // which keeps a NaN
    }
}

template <int kKind>
void activation_of(const float* x, const float* up, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 y = activate(kKind, load_first(x + i, n - i));
        if (up != nullptr) y = mul(y, load_first(up + i, n - i));
        store_first(out + i, y, n - i);
    }
}

void activation(int kind, const float* x, const float* up, float* out, int64_t n) {
    switch (kind) {
        case EDGE_OP_SILU:
            return activation_of<EDGE_OP_SILU>(x, up, out, n);
        case EDGE_OP_GELU:
            return activation_of<EDGE_OP_GELU>(x, up, out, n);
        case EDGE_OP_GELU_TANH:
            return activation_of<EDGE_OP_GELU_TANH>(x, up, out, n);
        default:
            return activation_of<EDGE_OP_RELU>(x, up, out, n);
    }
}

void add_rows(const float* a, const float* b, float scale, float* out, int64_t n) {
    const f32x16 s = set1(scale);
    for (int64_t i = 0; i < n; i += 16)
        store_first(out + i, add(load_first(a + i, n - i), mul(s, load_first(b + i, n - i))), n - i);
}

// formats/scaled.py: f32_scale
float scale_of(float absmax, float largest) {
    if (absmax == 0.0f) return 0.0f;
    const float scale = absmax / largest > kTiny ? absmax / largest : kTiny;
    return scale * largest < __builtin_inff() ? scale : float_of(bits_of(scale) - 1);
}

// formats/fp8.py: nearest even of |y| <= 448, as a value.
EDGE_INLINE f32x16 to_e4m3(f32x16 y) {
    const f32x16 a = min(abs16(y), set1(448.0f));
    const i32x16 bits = as_i32(a);
    const i32x16 up = add(add(bits, bit_and(shift_right<20>(bits), set1(1))), set1(0x7ffff));
    const f32x16 normal = as_f32(bit_and(up, set1(~0xfffff)));
    const f32x16 tiny = mul(round_even(mul(a, set1(0x1p9f))), set1(0x1p-9f));
    return copy_sign(select(greater(set1(0x1p-6f), a), tiny, normal), y);
}

template <bool kE4M3>
bool round_to(float scale, const float* x, float* out, int64_t n) {
    i32x16 top = set1(0);
    for (int64_t i = 0; i < n; i += 16) top = max(top, as_i32(abs16(load_first(x + i, n - i))));
    const int32_t absmax = max_lanes(top);
    if (absmax >= kInfBits) return false;
    if (scale == 0.0f) scale = scale_of(float_of(absmax), kE4M3 ? 448.0f : 127.0f);
    const f32x16 divisor = set1(scale > 0.0f ? scale : __builtin_inff());
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 y = div(load_first(x + i, n - i), divisor);
        if constexpr (kE4M3) {
            y = to_e4m3(y);
        } else {  // by way of integers, which have no -0
            y = to_f32(to_i32(max(min(round_even(y), set1(127.0f)), set1(-127.0f))));
        }
        store_first(out + i, mul(y, set1(scale)), n - i);
    }
    return true;
}

bool round_row(int kind, float scale, const float* x, float* out, int64_t n) {
    return kind == EDGE_OP_ROUND_E4M3 ? round_to<true>(scale, x, out, n) : round_to<false>(scale, x, out, n);
}

// Value i pairs with value i + freqs (half-split order); those past 2 * freqs do not rotate.
void rope(const edge_op& op, const float* cs, float* x) {
    const int64_t n = op.freqs;
    for (int64_t head = 0; head < op.x_width; head += op.head_dim) {
        float* a = x + head;
        float* b = a + n;
        for (int64_t i = 0; i < n; i += 16) {
            const int64_t left = n - i;
            const f32x16 c = load_first(cs + i, left), s = load_first(cs + n + i, left);
            const f32x16 p = load_first(a + i, left), q = load_first(b + i, left);
            store_first(a + i, sub(mul(p, c), mul(q, s)), left);
            store_first(b + i, add(mul(q, c), mul(p, s)), left);
        }
    }
}

bool finish_logits(float* y, int64_t n, float scale, float softcap) {
    i32x16 top = set1(0);
    const f32x16 cap = set1(softcap), s = set1(scale);
    for (int64_t i = 0; i < n; i += 16) {
        f32x16 v = mul(s, load_first(y + i, n - i));
        top = max(top, as_i32(abs16(v)));
        if (softcap != 0.0f) v = mul(cap, tanh16(div(v, cap)));
        store_first(y + i, v, n - i);
    }
    return max_lanes(top) < kInfBits;
}

// The bits of write_kv_row in codec.cpp, which takes one value at a time and any n.
bool write_i8_row(const float* x, int n, int8_t* codes, float* scale) {
    i32x16 top = set1(0);
    for (int i = 0; i < n; i += 16) top = max(top, as_i32(abs16(load(x + i))));
    const int32_t absmax = max_lanes(top);
    if (absmax >= kInfBits) return false;
    const float wanted = float_of(absmax) / 127.0f;
    *scale = wanted > 0.0f && wanted < kTiny ? kTiny : wanted;
    const f32x16 divisor = set1(*scale > 0.0f ? *scale : __builtin_inff());
    for (int i = 0; i < n; i += 16) {
        const f32x16 y = round_even(div(load(x + i), divisor));
        store_i8(codes + i, to_i32(max(min(y, set1(127.0f)), set1(-127.0f))));
    }
    return true;
}

int32_t argmax(const float* y, int64_t n) {
    float top = y[0];
    const int64_t whole = n / 16 * 16;
    if (whole > 0) {
        f32x16 best = load(y);
        for (int64_t i = 16; i < whole; i += 16) best = max(best, load(y + i));
        top = max_lanes(best);
    }
    for (int64_t i = whole; i < n; ++i) top = y[i] > top ? y[i] : top;
    int64_t at = 0;
    while (y[at] != top) ++at;
    return static_cast<int32_t>(at);
}

LinearKernel linear(const edge_matrix& weight) {
    if (weight.outlier != nullptr) return outlier_kernel(weight);
    if (!quantizes(weight.encoding)) return float_kernel(weight);
    if (trellis_bits(weight.encoding) > 0) return trellis_kernel(weight);
    const LinearKernel kernel = int_kernel(weight);
    return kernel != nullptr ? kernel : bits_kernel(weight);
}

}  // namespace

void attention(const AttentionArgs& args);
void low_rank_in(const LowRankArgs& args, int64_t begin, int64_t end);
void low_rank_out(const LowRankArgs& args, int64_t begin, int64_t end);
void trellis_search(const TrellisArgs& args);

const Kernels* table() {
    static constexpr Kernels kernels = {EDGE_SIMD, linear,        kTokenBlock,  code_offset,   quantize,
                                        norm,      activation,    add_rows,     round_row,     rope,
                                        attention, low_rank_in,   low_rank_out, finish_logits, write_i8_row,
                                        argmax,    trellis_search};
    return &kernels;
}

}  // namespace EDGE_ISA
}  // namespace edge

namespace edge {

const Kernels* EDGE_TABLE_NAME() { return EDGE_ISA::table(); }

}  // namespace edge
