// y = W x for codes of 2 to 6 bits in packing n16k4 and int8 activations: exact int32 dots inside a group,
// groups summed in f32 in ascending order by fma. Nothing here depends on how many tokens or panels share a
// call.
#include "code_quads.h"
#include "group_sums.h"
#include "linear.h"
#include "shared_planes.h"

namespace edge {
namespace EDGE_ISA {
namespace {

// kLow bits of a code in the first plane, kHigh in the second; kE2M1: codes are looked up.
template <int kLowBits, int kHighBits, bool kE2M1 = false>
struct Codes {
    static constexpr int kLow = kLowBits, kHigh = kHighBits;
    static constexpr int64_t kLowBytes = kLow * kChunk * kPanel / 8;  // of a chunk
    static constexpr int64_t kHighBytes = kHigh * kChunk * kPanel / 8;

    template <int kQuad>
    EDGE_INLINE u8x64 quad(const uint8_t* low, const uint8_t* high) {
        const u8x64 w = quad_bits<kLow, kQuad, 0>(low);
        if constexpr (kE2M1) return look_up(w, kE2M1Codes);
        if constexpr (kHigh > 0) return bit_or(w, quad_bits<kHigh, kQuad, kLow>(high));
        return w;
    }

    // E2M1 by code, doubled and 12 added.
    static constexpr uint8_t kE2M1Codes[16] = {12, 13, 14, 15, 16, 18, 20, 24, 12, 11, 10, 9, 8, 6, 4, 0};
};

// Where the codes of P panels lie, beginning with one's; strides in bytes.
struct Place {
    const uint8_t *low, *high;
    int64_t low_stride, high_stride;
};

// sum += one quad of a chunk times the activations of T tokens
template <class C, int kQuad, int P, int T>
EDGE_STEP void dot_quad(const Place& w, const int8_t* a, i32x16 (&sum)[P][T]) {
    u8x64 codes[P];
    for (int i = 0; i < P; ++i) {
        const uint8_t *low = w.low + i * w.low_stride, *high = w.high + i * w.high_stride;
        if constexpr (kQuad < C::kLow) __builtin_prefetch(low + 64 * kQuad + kPrefetch<T>);
        if constexpr (kQuad < C::kHigh)
            __builtin_prefetch(high + 64 * kQuad + kPrefetch<T> / C::kLow * C::kHigh);
        codes[i] = C::template quad<kQuad>(low, high);
    }
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < P; ++i) sum[i][t] = dot_codes(sum[i][t], codes[i], a + 4 * (T * kQuad + t));
}

// The quads kFirst..kEnd-1 of a chunk.
template <class C, int kFirst, int kEnd, int P, int T>
EDGE_INLINE void dot(const Place& w, const int8_t* a, i32x16 (&sum)[P][T]) {
    if constexpr (kFirst < kEnd) {
        dot_quad<C, kFirst>(w, a, sum);
        dot<C, kFirst + 1, kEnd>(w, a, sum);
    }
}

// P panels times T tokens. kPair: a chunk is two groups of 16, else a group is whole chunks.
template <class C, Form kForm, bool kPair, int P, int T>
EDGE_INLINE void block(const LinearArgs& p, int64_t panel, int64_t token) {
    const edge_matrix& m = *p.weight;
    const int64_t unit = unit_of(m), width = (m.cols + unit - 1) / unit * unit;
    const SharedPlanes s(m, width);
    Place w{};
    w.low_stride = width / kChunk * C::kLowBytes;
    w.high_stride = width / kChunk * C::kHighBytes;
    w.low = static_cast<const uint8_t*>(m.codes) + panel * w.low_stride;
    w.high = static_cast<const uint8_t*>(m.high) + panel * w.high_stride;
    const int8_t* a = p.codes + token * p.code_stride;
    const float* a_scale = p.scales + token * p.group_stride;
    const int32_t* a_sum = p.sums + token * p.group_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    const auto next_chunk = [&] {
        w.low += C::kLowBytes;
        w.high += C::kHighBytes;
        a += kChunk * T;
    };
    for (int64_t g = 0; g < s.groups; ++g, a_scale += T, a_sum += T) {
        i32x16 sum[P][T];
        begin<kForm>(s, panel, g, a_sum, sum);
        if constexpr (kPair) {
            dot<C, 0, 4>(w, a, sum);
            end<kForm>(s, panel, g, a_scale, a_sum, sum, acc);
            ++g, a_scale += T, a_sum += T;
            begin<kForm>(s, panel, g, a_sum, sum);
            dot<C, 4, 8>(w, a, sum);
            next_chunk();
        } else {
            for (int64_t c = 0; c < m.group; c += kChunk, next_chunk()) dot<C, 0, 8>(w, a, sum);
        }
        end<kForm>(s, panel, g, a_scale, a_sum, sum, acc);
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, m.rows, token + t, acc[i][t]);
}

template <class C, Form kForm, bool kPair>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    for_token_blocks(p.tokens, [&](auto tokens, int64_t token) {
        constexpr int T = decltype(tokens)::value, P = kPanels<T>;
        int64_t panel = begin;
        for (; panel + P <= end; panel += P) block<C, kForm, kPair, P, T>(p, panel, token);
        if constexpr (P > 1)
            for (; panel < end; ++panel) block<C, kForm, kPair, 1, T>(p, panel, token);
    });
}

struct Entry {
    int low, high;  // bits
    bool e2m1;
    Form form;
    bool pair;
    LinearKernel kernel;
};

template <class C, Form kForm, bool kPair, bool kE2M1 = false>
constexpr Entry entry() {
    return {C::kLow, C::kHigh, kE2M1, kForm, kPair, linear<C, kForm, kPair>};
}

constexpr Entry kEntries[] = {
    entry<Codes<2, 0>, kOffset, false>(),
    entry<Codes<2, 0>, kZero, false>(),
    entry<Codes<2, 0>, kLeast, true>(),  // q2_k
    entry<Codes<2, 1>, kOffset, false>(),
    entry<Codes<2, 1>, kZero, false>(),
    entry<Codes<2, 1>, kOffset, true>(),  // q3_k
    entry<Codes<4, 0>, kLeast, false>(),  // int4_g32_min, q4_k
    entry<Codes<4, 1>, kOffset, false>(),
    entry<Codes<4, 1>, kLeast, false>(),  // int5_g32_min, q5_k
    entry<Codes<4, 2>, kOffset, false>(),
    entry<Codes<4, 2>, kOffset, true>(),  // q6_k
    entry<Codes<4, 0, true>, kOffset, false, true>(),
    entry<Codes<4, 0, true>, kOffset, true, true>(),
};

}  // namespace

LinearKernel bits_kernel(const edge_matrix& w) {
    const SharedPlanes::Kind kind = SharedPlanes::kind_of(w);
    if (w.scale_per != EDGE_SCALE_GROUP || kind == SharedPlanes::kUnknown) return nullptr;
    if (w.group != 16 && w.group % kChunk != 0) return nullptr;
    const Form form = kind == SharedPlanes::kF16Zero  ? kZero
                      : SharedPlanes::has_least(kind) ? kLeast
                                                      : kOffset;
    const bool unsigned_codes = w.encoding == EDGE_ENC_U2 || w.encoding == EDGE_ENC_U4;
    if (unsigned_codes != (form != kOffset)) return nullptr;
    const bool e2m1 = w.encoding == EDGE_ENC_E2M1, pair = w.group == 16;
    for (const Entry& e : kEntries)
        if (e.low == code_bits(w.encoding) && e.high == w.high_bits && e.e2m1 == e2m1 && e.form == form &&
            e.pair == pair)
            return e.kernel;
    return nullptr;
}

}  // namespace EDGE_ISA
}  // namespace edge
