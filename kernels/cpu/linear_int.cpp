// y = W x for int4 and int8 weights in packing n16k4 and int8 activations (linear_bits.cpp has other codes):
// exact int32 dots inside a group, groups summed in f32 in ascending order by fma. Nothing here depends on
// how many tokens or panels share a call.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

template <int kGroup>
struct Nibbles {
    static constexpr int kGroupBytes = kGroup / 2 * kPanel;

    // q: the group's codes of the first panel; the next panel's lie `stride` bytes on
    template <int P, int T>
    EDGE_INLINE void dot(const uint8_t* q, int64_t stride, const int8_t* a, i32x16 (&sum)[P][T]) {
        for (int b = 0; b < kGroup / 8; ++b) {
            u8x64 low[P], high[P];
            for (int i = 0; i < P; ++i) {
                const u8x64 w = load_codes(q + i * stride + 64 * b);
                __builtin_prefetch(q + i * stride + 64 * b + kPrefetch<T>);
                low[i] = bit_and(w, 15);
                high[i] = bit_and(shift_bytes<-4>(w), 15);
            }
            for (int t = 0; t < T; ++t) {
                const int8_t* first = a + 4 * (T * b + t);
                const int8_t* second = a + 4 * (T * (b + kGroup / 8) + t);
                for (int i = 0; i < P; ++i) sum[i][t] = dot_codes(sum[i][t], low[i], first);
                for (int i = 0; i < P; ++i) sum[i][t] = dot_codes(sum[i][t], high[i], second);
            }
        }
    }
};

template <int kGroup>
struct Bytes {
    static constexpr int kGroupBytes = kGroup * kPanel;

    template <int P, int T>
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
};

// P panels times T tokens. kZero: codes have a zero point per group and row, else an offset that is in the
// sums; kRow: scales per row, applied once at the end.
template <class Codes, int kGroup, bool kZero, bool kRow, int P, int T>
EDGE_INLINE void block(const LinearArgs& p, int64_t panel, int64_t token) {
    const int64_t groups = (p.weight->cols + kGroup - 1) / kGroup;
    const int64_t stride = groups * Codes::kGroupBytes;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + panel * stride;
    const char* scale = static_cast<const char*>(p.weight->scale) + panel * kPanel * (kRow ? 4 : 2 * groups);
    const uint8_t* zero = p.weight->zero + (kZero ? panel * groups * kPanel : 0);
    const int8_t* a = p.codes + token * p.code_stride;
    const float* a_scale = p.scales + token * p.group_stride;
    const int32_t* a_sum = p.sums + token * p.group_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t g = 0; g < groups; ++g) {
        i32x16 sum[P][T];
        for (int i = 0; i < P; ++i) {
            if constexpr (kZero) {
                const i32x16 z = load_u8(zero + i * groups * kPanel);
                for (int t = 0; t < T; ++t) sum[i][t] = mul(z, set1(a_sum[t]));
            } else {
                for (int t = 0; t < T; ++t) sum[i][t] = set1(a_sum[t]);
            }
        }
        Codes::template dot<P, T>(q, stride, a, sum);
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
        q += Codes::kGroupBytes;
        zero += kZero ? kPanel : 0;
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

template <class Codes, int kGroup, bool kZero, bool kRow, int T>
void panels(const LinearArgs& p, int64_t begin, int64_t end, int64_t token) {
    constexpr int P = kPanels<T>;
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) block<Codes, kGroup, kZero, kRow, P, T>(p, panel, token);
    if constexpr (P > 1)
        for (; panel < end; ++panel) block<Codes, kGroup, kZero, kRow, 1, T>(p, panel, token);
}

template <class Codes, int kGroup, bool kZero, bool kRow>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    for_token_blocks(p.tokens, [&](auto tokens, int64_t token) {
        panels<Codes, kGroup, kZero, kRow, decltype(tokens)::value>(p, begin, end, token);
    });
}

template <int kGroup>
LinearKernel grouped(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U4O8:
            return linear<Nibbles<kGroup>, kGroup, false, false>;
        case EDGE_ENC_U4:
            return linear<Nibbles<kGroup>, kGroup, true, false>;
        case EDGE_ENC_I8:
            return linear<Bytes<kGroup>, kGroup, false, false>;
        default:
            return nullptr;
    }
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
        case EDGE_ENC_TCQ2:
        case EDGE_ENC_TCQ3:
        case EDGE_ENC_TCQ4:
            return EDGE_TCQ_ZERO;
        case EDGE_ENC_I8:
            return kByteOffset;
        default:
            return 0;
    }
}

LinearKernel int_kernel(const edge_matrix& w) {
    if ((w.encoding == EDGE_ENC_U4) != (w.zero != nullptr)) return nullptr;
    if (w.scale_per == EDGE_SCALE_ROW && w.encoding == EDGE_ENC_I8 && w.group == 64)
        return linear<Bytes<64>, 64, false, true>;
    if (w.scale_per != EDGE_SCALE_GROUP) return nullptr;
    switch (w.group) {
        case 32:
            return grouped<32>(w.encoding);
        case 64:
            return grouped<64>(w.encoding);
        case 128:
            return grouped<128>(w.encoding);
        default:
            return nullptr;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
