// y = W x for integer weights in packing n16k4 and int8 activations: exact int32 dots inside a group, groups
// summed in f32 in ascending order by fma. Nothing here depends on how many tokens or panels share a call.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int kPrefetch = 1024;  // bytes ahead; hides DRAM latency where the hardware prefetcher stops at pages

template <int kGroup>
struct Nibbles {
    static constexpr int kGroupBytes = kGroup / 2 * kPanel;

    template <int T>
    EDGE_INLINE void dot(const uint8_t* q, const int8_t* const (&a)[T], int64_t at, i32x16 (&sum)[T]) {
        for (int b = 0; b < kGroup / 8; ++b) {
            const u8x64 w = load_nibbles(q + 64 * b);
            __builtin_prefetch(q + 64 * b + kPrefetch);
            const u8x64 low = low_nibbles(w), high = high_nibbles(w);
            for (int t = 0; t < T; ++t) {
                sum[t] = dot_nibbles(sum[t], low, a[t] + at + 4 * b);
                sum[t] = dot_nibbles(sum[t], high, a[t] + at + 4 * b + kGroup / 2);
            }
        }
    }
};

template <int kGroup>
struct Bytes {
    static constexpr int kGroupBytes = kGroup * kPanel;

    template <int T>
    EDGE_INLINE void dot(const uint8_t* q, const int8_t* const (&a)[T], int64_t at, i32x16 (&sum)[T]) {
        for (int b = 0; b < kGroup / 4; ++b) {
            const u8x64 w = load_bytes(q + 64 * b);
            __builtin_prefetch(q + 64 * b + kPrefetch);
            for (int t = 0; t < T; ++t) sum[t] = dot_bytes(sum[t], w, a[t] + at + 4 * b);
        }
    }
};

// kOffset: what every code has too much; kZero: codes have a zero point per group and row instead;
// kRow: scales per row, applied once at the end.
template <class Codes, int kGroup, int kOffset, bool kZero, bool kRow, int T>
void block(const LinearArgs& p, int64_t begin, int64_t end, int64_t token) {
    const int64_t groups = (p.weight->cols + kGroup - 1) / kGroup;
    const int64_t rows = p.weight->rows;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + begin * groups * Codes::kGroupBytes;
    const char* scale = static_cast<const char*>(p.weight->scale) + begin * kPanel * (kRow ? 4 : 2 * groups);
    const uint8_t* zero = p.weight->zero + (kZero ? begin * groups * kPanel : 0);
    const int8_t* a[T];
    const float* a_scale[T];
    const int32_t* a_sum[T];
    for (int t = 0; t < T; ++t) {
        a[t] = p.codes + (token + t) * p.code_stride;
        a_scale[t] = p.scales + (token + t) * p.group_stride;
        a_sum[t] = p.sums + (token + t) * p.group_stride;
    }
    for (int64_t panel = begin; panel < end; ++panel) {
        f32x16 acc[T];
        for (int t = 0; t < T; ++t) acc[t] = zero16();
        for (int64_t g = 0; g < groups; ++g) {
            i32x16 sum[T];
            for (int t = 0; t < T; ++t) sum[t] = set1(kOffset == 0 ? 0 : -kOffset * a_sum[t][g]);
            Codes::template dot<T>(q, a, g * kGroup, sum);
            q += Codes::kGroupBytes;
            if constexpr (kZero) {
                const i32x16 z = load_u8(zero);
                zero += kPanel;
                for (int t = 0; t < T; ++t) sum[t] = sub(sum[t], mul(z, set1(a_sum[t][g])));
            }
            if constexpr (kRow) {
                for (int t = 0; t < T; ++t) acc[t] = fma(to_f32(sum[t]), set1(a_scale[t][g]), acc[t]);
            } else {
                const f32x16 s = load_f16(scale);
                scale += 2 * kPanel;
                for (int t = 0; t < T; ++t)
                    acc[t] = fma(to_f32(sum[t]), mul(set1(a_scale[t][g]), s), acc[t]);
            }
        }
        f32x16 row_scale = zero16();
        if constexpr (kRow) {
            row_scale = load(reinterpret_cast<const float*>(scale));
            scale += 4 * kPanel;
        }
        for (int t = 0; t < T; ++t) {
            const f32x16 y = kRow ? mul(acc[t], row_scale) : acc[t];
            finish(p, panel * kPanel, rows, token + t, y);
        }
    }
}

template <class Codes, int kGroup, int kOffset, bool kZero, bool kRow>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    int64_t t = 0;
    for (; t + kTokenBlock <= p.tokens; t += kTokenBlock)
        block<Codes, kGroup, kOffset, kZero, kRow, kTokenBlock>(p, begin, end, t);
    if (kTokenBlock > 4 && t + 4 <= p.tokens) {
        block<Codes, kGroup, kOffset, kZero, kRow, 4>(p, begin, end, t);
        t += 4;
    }
    if (t + 2 <= p.tokens) {
        block<Codes, kGroup, kOffset, kZero, kRow, 2>(p, begin, end, t);
        t += 2;
    }
    if (t < p.tokens) block<Codes, kGroup, kOffset, kZero, kRow, 1>(p, begin, end, t);
}

template <int kGroup>
LinearKernel grouped(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U4O8: return linear<Nibbles<kGroup>, kGroup, 8, false, false>;
        case EDGE_ENC_U4: return linear<Nibbles<kGroup>, kGroup, 0, true, false>;
        case EDGE_ENC_I8: return linear<Bytes<kGroup>, kGroup, kByteOffset, false, false>;
        default: return nullptr;
    }
}

}  // namespace

LinearKernel int_kernel(const edge_matrix& w) {
    if ((w.encoding == EDGE_ENC_U4) != (w.zero != nullptr)) return nullptr;
    if (w.scale_per == EDGE_SCALE_ROW && w.encoding == EDGE_ENC_I8 && w.group == 64)
        return linear<Bytes<64>, 64, kByteOffset, false, true>;
    if (w.scale_per != EDGE_SCALE_GROUP) return nullptr;
    switch (w.group) {
        case 32: return grouped<32>(w.encoding);
        case 64: return grouped<64>(w.encoding);
        case 128: return grouped<128>(w.encoding);
        default: return nullptr;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
