// y = W x for trellis codes in packing n16k4 and int8 activations. A row is a lane, and a code's predecessors
// are those of the lanes before it, so that a level takes a few moves of lanes and seven tables of sixteen
// bytes. Exact int32 dots inside a group, groups summed in f32 in ascending order by fma.
#include "code_quads.h"
#include "group_sums.h"
#include "linear.h"
#include "shared_planes.h"
#include "trellis.h"

namespace edge {
namespace EDGE_ISA {
namespace {

// What the rows after a panel need to know of one of its quads: `codes`, and with codes of 2 bits also the
// pairs of a code and the one before it.
struct Known {
    u8x64 codes, pairs;
};

template <int kBits>
struct Trellis {
    static constexpr int kLow = kBits == 4 ? 4 : 2, kHigh = kBits - kLow;
    static constexpr int64_t kLowBytes = kLow * kChunk * kPanel / 8;  // of a chunk
    static constexpr int64_t kHighBytes = kHigh * kChunk * kPanel / 8;
    static constexpr const uint8_t (&kMix)[4][16] = EDGE_TCQ_MIX[kBits - 2];
    static constexpr const uint8_t (&kSums)[3][16] = EDGE_TCQ_SUMS[kBits - 2];

    template <int kQuad>
    EDGE_INLINE u8x64 quad(const uint8_t* low, const uint8_t* high) {
        const u8x64 w = quad_bits<kLow, kQuad, 0>(low);
        if constexpr (kHigh > 0) return bit_or(w, quad_bits<kHigh, kQuad, kLow>(high));
        return w;
    }

    // The quad of the panel before. Pairs of its first row are wrong, and not needed.
    template <int kQuad>
    EDGE_INLINE Known before(const uint8_t* low, const uint8_t* high) {
        const u8x64 w = quad<kQuad>(low, high);
        if constexpr (kBits == 2) return {w, bit_or(w, shift_bytes<2>(rows_down<1>(w, w)))};
        return {w, w};
    }

    // Sums of a quad, whose codes then are what is known of the panel before.
    EDGE_INLINE u8x64 sums(u8x64 w, Known& known) {
        u8x64 a, b, c;
        if constexpr (kBits == 4) {
            a = w;
            b = rows_down<1>(w, known.codes);
            c = rows_down<2>(w, known.codes);
        } else if constexpr (kBits == 3) {
            const u8x64 one = rows_down<1>(w, known.codes), two = rows_down<2>(w, known.codes),
                        three = rows_down<3>(w, known.codes);
            a = bit_or(w, bit_and(shift_bytes<3>(one), 8));
            b = bit_or(bit_and(shift_bytes<-1>(one), 3), bit_and(shift_bytes<2>(two), 12));
            c = bit_or(bit_and(shift_bytes<-2>(two), 1), shift_bytes<1>(three));
        } else {
            a = bit_or(w, shift_bytes<2>(rows_down<1>(w, known.codes)));
            b = rows_down<2>(a, known.pairs);
            c = rows_down<4>(a, known.pairs);
        }
        known = {w, a};
        const u8x64 s = bit_xor(b, look_up(c, kMix[1]));
        const u8x64 first = look_up(bit_xor(a, look_up(s, kMix[0])), kSums[0]);
        const u8x64 second = look_up(bit_xor(b, look_up(bit_xor(a, look_up(c, kMix[3])), kMix[2])), kSums[1]);
        return add_bytes(add_bytes(first, second), look_up(s, kSums[2]));
    }
};

// Where the codes of a panel lie, and those of the panel before it.
struct Place {
    const uint8_t *low, *high, *low_before, *high_before;
    int64_t low_stride, high_stride;
};

// sum += one quad of a chunk of P panels in a row times the activations of T tokens
template <class C, int kQuad, int P, int T>
EDGE_STEP void dot_quad(const Place& w, const int8_t* a, i32x16 (&sum)[P][T]) {
    Known known = C::template before<kQuad>(w.low_before, w.high_before);
    u8x64 codes[P];
    for (int i = 0; i < P; ++i) {
        const uint8_t *low = w.low + i * w.low_stride, *high = w.high + i * w.high_stride;
        if constexpr (kQuad < C::kLow) __builtin_prefetch(low + 64 * kQuad + kPrefetch<T>);
        if constexpr (kQuad < C::kHigh)
            __builtin_prefetch(high + 64 * kQuad + kPrefetch<T> / C::kLow * C::kHigh);
        codes[i] = C::sums(C::template quad<kQuad>(low, high), known);
    }
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < P; ++i) sum[i][t] = dot_codes(sum[i][t], codes[i], a + 4 * (T * kQuad + t));
}

template <class C, int kFirst, int P, int T>
EDGE_INLINE void dot(const Place& w, const int8_t* a, i32x16 (&sum)[P][T]) {
    if constexpr (kFirst < kChunk / 4) {
        dot_quad<C, kFirst>(w, a, sum);
        dot<C, kFirst + 1>(w, a, sum);
    }
}

// P panels of one run times T tokens.
template <class C, int P, int T>
EDGE_INLINE void block(const LinearArgs& p, int64_t panel, int64_t token) {
    const edge_matrix& m = *p.weight;
    const int64_t unit = unit_of(m), width = (m.cols + unit - 1) / unit * unit;
    const int64_t before = panel_before(panel, (m.rows + kPanel - 1) / kPanel);
    const SharedPlanes s(m, width);
    Place w{};
    w.low_stride = width / kChunk * C::kLowBytes;
    w.high_stride = width / kChunk * C::kHighBytes;
    w.low = static_cast<const uint8_t*>(m.codes) + panel * w.low_stride;
    w.high = static_cast<const uint8_t*>(m.high) + panel * w.high_stride;
    w.low_before = static_cast<const uint8_t*>(m.codes) + before * w.low_stride;
    w.high_before = static_cast<const uint8_t*>(m.high) + before * w.high_stride;
    const int8_t* a = p.codes + token * p.code_stride;
    const float* a_scale = p.scales + token * p.group_stride;
    const int32_t* a_sum = p.sums + token * p.group_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t g = 0; g < s.groups; ++g, a_scale += T, a_sum += T) {
        i32x16 sum[P][T];
        begin<kOffset>(s, panel, g, a_sum, sum);
        for (int64_t c = 0; c < m.group; c += kChunk, a += kChunk * T) {
            dot<C, 0>(w, a, sum);
            w.low += C::kLowBytes;
            w.high += C::kHighBytes;
            w.low_before += C::kLowBytes;
            w.high_before += C::kHighBytes;
        }
        end<kOffset>(s, panel, g, a_scale, a_sum, sum, acc);
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, m.rows, token + t, acc[i][t]);
}

// Panels computed together know each other's rows; more than a few tokens leave no registers for it.
template <int T>
constexpr int kTogether = T <= 2 ? 4 : kPanels<T>;

template <class C>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    for_token_blocks(p.tokens, [&](auto tokens, int64_t token) {
        constexpr int T = decltype(tokens)::value, P = kTogether<T>;
        static_assert(EDGE_TCQ_RUN / kPanel % P == 0,
                      "panels together are of one run where they begin at a P-th");
        int64_t panel = begin;
        if constexpr (P > 1) {
            for (; panel < end && panel % P != 0; ++panel) block<C, 1, T>(p, panel, token);
            for (; panel + P <= end; panel += P) block<C, P, T>(p, panel, token);
        }
        for (; panel < end; ++panel) block<C, 1, T>(p, panel, token);
    });
}

}  // namespace

LinearKernel trellis_kernel(const edge_matrix& w) {
    if (w.scale_per != EDGE_SCALE_GROUP || w.group % kChunk != 0) return nullptr;
    if (SharedPlanes::kind_of(w) != SharedPlanes::kE4M3) return nullptr;
    switch (trellis_bits(w.encoding)) {
        case 2:
            return linear<Trellis<2>>;
        case 3:
            return linear<Trellis<3>>;
        default:
            return linear<Trellis<4>>;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
