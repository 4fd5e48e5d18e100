// y = W x for int8 weights in packing n16k4 and int8 activations (linear_bits.cpp has smaller codes): exact
// int32 dots inside a group, groups summed in f32 in ascending order by fma. Nothing here depends on how many
// tokens or panels share a call.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

// q: the group's codes of the first panel; the next panel's lie `stride` bytes on
template <int kGroup, int P, int T>
EDGE_INLINE void dot(const uint8_t* q, int64_t stride, const int8_t* a, i32x16 (&sum)[P][T]) {
    for (int b = 0; b < kGroup / 4; ++b) {
        u8x64 w[P];
        for (int i = 0; i < P; ++i) {
            w[i] = load_bytes(q + i * stride + 64 * b);
            __builtin_prefetch(q + i * stride + 64 * b + kPrefetch<T>);
        }
        for (int t = 0; t < T; ++t)
            for (int i = 0; i < P; ++i) sum[i][t] = dot_bytes(sum[i][t], w[i], a + 4 * (T * b + t));
    }
}

// P panels times T tokens. kRow: scales per row, applied once at the end.
template <int kGroup, bool kRow, int P, int T>
EDGE_INLINE void block(const LinearArgs& p, int64_t panel, int64_t token) {
    const int64_t groups = (p.weight->cols + kGroup - 1) / kGroup;
    const int64_t stride = groups * kGroup * kPanel;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + panel * stride;
    const char* scale = static_cast<const char*>(p.weight->scale) + panel * kPanel * (kRow ? 4 : 2 * groups);
    const int8_t* a = p.codes + token * p.code_stride;
    const float* a_scale = p.scales + token * p.group_stride;
    const int32_t* a_sum = p.sums + token * p.group_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t g = 0; g < groups; ++g) {
        i32x16 sum[P][T];
        for (int i = 0; i < P; ++i)
            for (int t = 0; t < T; ++t) sum[i][t] = set1(a_sum[t]);
        dot<kGroup, P, T>(q, stride, a, sum);
        for (int i = 0; i < P; ++i) {
            if constexpr (kRow) {
                for (int t = 0; t < T; ++t) acc[i][t] = fma(to_f32(sum[i][t]), set1(a_scale[t]), acc[i][t]);
            } else {
                const char* own = scale + i * groups * kPanel * 2;
                const f32x16 s = load_f16(own);
                __builtin_prefetch(own + kPrefetch<T> / 16);
                for (int t = 0; t < T; ++t)
                    acc[i][t] = fma(to_f32(sum[i][t]), mul(set1(a_scale[t]), s), acc[i][t]);
            }
        }
        q += kGroup * kPanel;
        scale += kRow ? 0 : 2 * kPanel;
        a += kGroup * T;
        a_scale += T;
        a_sum += T;
    }
    for (int i = 0; i < P; ++i) {
        f32x16 row_scale = zero16();
        if constexpr (kRow) row_scale = load(reinterpret_cast<const float*>(scale) + i * kPanel);
        for (int t = 0; t < T; ++t)
            finish(p, (panel + i) * kPanel, p.weight->rows, token + t,
                   kRow ? mul(acc[i][t], row_scale) : acc[i][t]);
    }
}

template <int kGroup, bool kRow, int T>
void panels(const LinearArgs& p, int64_t begin, int64_t end, int64_t token) {
    constexpr int P = kPanels<T>;
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) block<kGroup, kRow, P, T>(p, panel, token);
    if constexpr (P > 1)
        for (; panel < end; ++panel) block<kGroup, kRow, 1, T>(p, panel, token);
}

template <int kGroup, bool kRow>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    for_token_blocks(p.tokens, [&](auto tokens, int64_t token) {
        panels<kGroup, kRow, decltype(tokens)::value>(p, begin, end, token);
    });
}

}  // namespace

int32_t code_offset(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U2:
        case EDGE_ENC_U4:
            return 1;  // times the zero point or minimum
        case EDGE_ENC_U2O2:
            return 2;
        case EDGE_ENC_U2O4:
            return 4;
        case EDGE_ENC_U4O8:
            return 8;
        case EDGE_ENC_U4O16:
            return 16;
        case EDGE_ENC_U4O32:
            return 32;
        case EDGE_ENC_E2M1:
            return 12;  // linear_bits.cpp looks codes up as 12 more than their doubled values
        case EDGE_ENC_I8:
            return kByteOffset;
        default:
            return 0;
    }
}

LinearKernel byte_kernel(const edge_matrix& w) {
    if (w.encoding != EDGE_ENC_I8) return nullptr;
    if (w.scale_per == EDGE_SCALE_ROW && w.group == 64) return linear<64, true>;
    if (w.scale_per != EDGE_SCALE_GROUP) return nullptr;
    switch (w.group) {
        case 32:
            return linear<32, false>;
        case 64:
            return linear<64, false>;
        case 128:
            return linear<128, false>;
        default:
            return nullptr;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
