// y = W x for codes of 2 to 6 bits in packing n16k4 and int8 activations: exact int32 dots inside a group,
// groups summed in f32 in ascending order by fma. Nothing here depends on how many tokens or panels share a
// call.
#include "linear.h"
#include "shared_planes.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int64_t kChunk = 32;  // inputs whose codes are decoded together: eight quads of four

// kLow bits of a code in the first plane, kHigh in the second; kE2M1: codes are looked up.
template <int kLowBits, int kHighBits, bool kE2M1>
struct Codes {
    static constexpr int kLow = kLowBits, kHigh = kHighBits;

    // Bits of quad kQuad from a plane of kBits a code, as bits from kTo up. A chunk's bytes are kBits blocks
    // of 64, `step` blocks apart; the first quads have the lowest bits.
    template <int kBits, int kQuad, int kTo>
    EDGE_INLINE u8x64 bits(const uint8_t* p, int64_t step) {
        constexpr int kShift = kTo - kBits * (kQuad / kBits);
        const u8x64 w = load_codes(p + 64 * step * (kQuad % kBits));
        return bit_and(shift_bytes<kShift>(w), ((1 << kBits) - 1) << kTo);
    }

    template <int kQuad>
    EDGE_INLINE u8x64 quad(const uint8_t* low, const uint8_t* high, int64_t step) {
        const u8x64 w = bits<kLow, kQuad, 0>(low, step);
        if constexpr (kE2M1) return look_up(w, kE2M1Codes);
        if constexpr (kHigh > 0) return bit_or(w, bits<kHigh, kQuad, kLow>(high, step));
        return w;
    }

    // E2M1 by code, doubled and 12 added.
    static constexpr uint8_t kE2M1Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

// The codes of P panels, beginning with one's; strides in bytes.
struct Planes {
    const uint8_t *low, *high;
    int64_t low_stride, high_stride, step;
};

// sum += one quad of a chunk times the activations of T tokens
template <class C, int kQuad, int P, int T>
EDGE_STEP void dot_quad(const Planes& w, const int8_t* a, i32x16 (&sum)[P][T]) {
    for (int i = 0; i < P; ++i) {
        const uint8_t *low = w.low + i * w.low_stride, *high = w.high + i * w.high_stride;
        if constexpr (kQuad < C::kLow) __builtin_prefetch(low + 64 * w.step * kQuad + kPrefetch<T>);
        if constexpr (kQuad < C::kHigh)
            __builtin_prefetch(high + 64 * w.step * kQuad + kPrefetch<T> / C::kLow * C::kHigh);
        const u8x64 codes = C::template quad<kQuad>(low, high, w.step);
        for (int t = 0; t < T; ++t)
            sum[i][t] = dot_codes(sum[i][t], codes, a + 4 * (T * (kQuad * w.step) + t));
    }
}

// The quads kFirst..kEnd-1 of a chunk.
template <class C, int kFirst, int kEnd, int P, int T>
EDGE_INLINE void dot(const Planes& w, const int8_t* a, i32x16 (&sum)[P][T]) {
    if constexpr (kFirst < kEnd) {
        dot_quad<C, kFirst>(w, a, sum);
        dot<C, kFirst + 1, kEnd>(w, a, sum);
    }
}

// Starts the sums of a group: by -offset * the sum of the activations' codes, or zero points times that.
template <int P, int T>
EDGE_STEP void begin(const SharedPlanes& s, int64_t panel, int64_t group, const int32_t* a_sum,
                     i32x16 (&sum)[P][T]) {
    for (int i = 0; i < P; ++i) {
        if (s.kind == SharedPlanes::kF16Zero) {
            const i32x16 zero = load_u8(s.zero + s.at(panel + i, group));
            for (int t = 0; t < T; ++t) sum[i][t] = mul(zero, set1(a_sum[t]));
        } else {
            for (int t = 0; t < T; ++t) sum[i][t] = set1(s.has_min() ? 0 : a_sum[t]);
        }
    }
}

// acc += a_scale * (scale * sum - least * the activations' sum); a_sum is minus that where there is a least.
template <int P, int T>
EDGE_STEP void end(const SharedPlanes& s, int64_t panel, int64_t group, const float* a_scale,
                   const int32_t* a_sum, const i32x16 (&sum)[P][T], f32x16 (&acc)[P][T]) {
    for (int i = 0; i < P; ++i) {
        f32x16 least = zero16();
        const f32x16 scale = load_scale(s, panel + i, group, &least);
        for (int t = 0; t < T; ++t)
            acc[i][t] = fma(to_f32(sum[i][t]), mul(set1(a_scale[t]), scale), acc[i][t]);
        if (s.has_min())
            for (int t = 0; t < T; ++t)
                acc[i][t] = fma(set1(static_cast<float>(a_sum[t])), mul(set1(a_scale[t]), least), acc[i][t]);
    }
}

// P panels times T tokens. kPair: two groups of 16 to a chunk, else a group is whole chunks.
template <class C, bool kPair, int P, int T>
EDGE_INLINE void block(const LinearArgs& p, int64_t panel, int64_t token) {
    const edge_matrix& m = *p.weight;
    const int64_t unit = kPair ? kChunk : m.group, units = (m.cols + unit - 1) / unit;
    const SharedPlanes s(m, units * unit);
    Planes w{};
    w.step = unit / kChunk;
    w.low_stride = units * unit * kPanel * C::kLow / 8;
    w.high_stride = units * unit * kPanel * C::kHigh / 8;
    w.low = static_cast<const uint8_t*>(m.codes) + panel * w.low_stride;
    w.high = static_cast<const uint8_t*>(m.high) + panel * w.high_stride;
    const int8_t* a = p.codes + token * p.code_stride;
    const float* a_scale = p.scales + token * p.group_stride;
    const int32_t* a_sum = p.sums + token * p.group_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t g = 0; g < s.groups; ++g, a_scale += T, a_sum += T) {
        i32x16 sum[P][T];
        begin(s, panel, g, a_sum, sum);
        if constexpr (kPair) {
            dot<C, 0, 4>(w, a, sum);
            end(s, panel, g, a_scale, a_sum, sum, acc);
            ++g, a_scale += T, a_sum += T;
            begin(s, panel, g, a_sum, sum);
            dot<C, 4, 8>(w, a, sum);
        } else {
            Planes chunk = w;
            for (int64_t c = 0; c < w.step; ++c, chunk.low += 64, chunk.high += 64)
                dot<C, 0, 8>(chunk, a + 4 * T * c, sum);
        }
        end(s, panel, g, a_scale, a_sum, sum, acc);
        w.low += unit * kPanel * C::kLow / 8;
        w.high += unit * kPanel * C::kHigh / 8;
        a += unit * T;
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, m.rows, token + t, acc[i][t]);
}

template <class C, bool kPair, int T>
void panels(const LinearArgs& p, int64_t begin, int64_t end, int64_t token) {
    constexpr int P = kPanels<T>;
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) block<C, kPair, P, T>(p, panel, token);
    if constexpr (P > 1)
        for (; panel < end; ++panel) block<C, kPair, 1, T>(p, panel, token);
}

template <class C, bool kPair>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    for_token_blocks(p.tokens, [&](auto tokens, int64_t token) {
        panels<C, kPair, decltype(tokens)::value>(p, begin, end, token);
    });
}

template <int kLow, int kHigh, bool kE2M1 = false>
LinearKernel either(const edge_matrix& w) {
    using C = Codes<kLow, kHigh, kE2M1>;
    return w.group == 16 ? linear<C, true> : linear<C, false>;
}

}  // namespace

LinearKernel bits_kernel(const edge_matrix& w) {
    if (w.scale_per != EDGE_SCALE_GROUP || SharedPlanes::kind_of(w) == SharedPlanes::kUnknown) return nullptr;
    if (w.group != 16 && w.group != 32 && w.group != 64 && w.group != 128) return nullptr;
    switch (w.encoding) {
        case EDGE_ENC_U2:
        case EDGE_ENC_U2O2:
        case EDGE_ENC_U2O4:
            return w.high_bits == 0 ? either<2, 0>(w) : w.high_bits == 1 ? either<2, 1>(w) : nullptr;
        case EDGE_ENC_U4:
        case EDGE_ENC_U4O8:
        case EDGE_ENC_U4O16:
        case EDGE_ENC_U4O32:
            return w.high_bits == 0   ? either<4, 0>(w)
                   : w.high_bits == 1 ? either<4, 1>(w)
                   : w.high_bits == 2 ? either<4, 2>(w)
                                      : nullptr;
        case EDGE_ENC_E2M1:
            return w.high_bits == 0 ? either<4, 0, true>(w) : nullptr;
        default:
            return nullptr;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
