// y = W x for integer weights in packing n16k4 and int8 activations: exact int32 dots inside a group, groups
// summed in f32 in ascending order by fma. Nothing here depends on how many tokens or panels share a call.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

// Bytes ahead; hides DRAM latency where the hardware prefetcher stops at pages. More tokens spend longer on a byte,
// but leave less room for loads to run ahead of the sums.
template <int T>
constexpr int kPrefetch = T >= 4 ? 4096 : T == 2 ? 2048 : 1024;

template <int kGroup>
struct Nibbles {
    static constexpr int kGroupBytes = kGroup / 2 * kPanel;

    template <int T>
    EDGE_INLINE void dot(const uint8_t* q, const int8_t* a, i32x16 (&sum)[T]) {
        for (int b = 0; b < kGroup / 8; ++b) {
            const u8x64 w = load_nibbles(q + 64 * b);
            __builtin_prefetch(q + 64 * b + kPrefetch<T>);
            const u8x64 low = low_nibbles(w), high = high_nibbles(w);
            for (int t = 0; t < T; ++t) {
                sum[t] = dot_nibbles(sum[t], low, a + 4 * (T * b + t));
                sum[t] = dot_nibbles(sum[t], high, a + 4 * (T * (b + kGroup / 8) + t));
            }
        }
    }
};

template <int kGroup>
struct Bytes {
    static constexpr int kGroupBytes = kGroup * kPanel;

    template <int T>
    EDGE_INLINE void dot(const uint8_t* q, const int8_t* a, i32x16 (&sum)[T]) {
        for (int b = 0; b < kGroup / 4; ++b) {
            const u8x64 w = load_bytes(q + 64 * b);
            __builtin_prefetch(q + 64 * b + kPrefetch<T>);
            for (int t = 0; t < T; ++t) sum[t] = dot_bytes(sum[t], w, a + 4 * (T * b + t));
        }
    }
};

// kZero: codes have a zero point per group and row, else an offset that is in the sums; kRow: scales per row,
// applied once at the end.
template <class Codes, int kGroup, bool kZero, bool kRow, int T>
void block(const LinearArgs& p, int64_t begin, int64_t end, int64_t token) {
    const int64_t groups = (p.weight->cols + kGroup - 1) / kGroup;
    const int64_t rows = p.weight->rows;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + begin * groups * Codes::kGroupBytes;
    const char* scale = static_cast<const char*>(p.weight->scale) + begin * kPanel * (kRow ? 4 : 2 * groups);
    const uint8_t* zero = p.weight->zero + (kZero ? begin * groups * kPanel : 0);
    for (int64_t panel = begin; panel < end; ++panel) {
        f32x16 acc[T];
        for (int t = 0; t < T; ++t) acc[t] = zero16();
        const int8_t* a = p.codes + token * p.code_stride;
        const float* a_scale = p.scales + token * p.group_stride;
        const int32_t* a_sum = p.sums + token * p.group_stride;
        for (int64_t g = 0; g < groups; ++g, a += kGroup * T, a_scale += T, a_sum += T) {
            i32x16 sum[T];
            if constexpr (kZero) {
                const i32x16 z = load_u8(zero);
                zero += kPanel;
                for (int t = 0; t < T; ++t) sum[t] = mul(z, set1(a_sum[t]));
            } else {
                for (int t = 0; t < T; ++t) sum[t] = set1(a_sum[t]);
            }
            Codes::template dot<T>(q, a, sum);
            q += Codes::kGroupBytes;
            if constexpr (kRow) {
                for (int t = 0; t < T; ++t) acc[t] = fma(to_f32(sum[t]), set1(a_scale[t]), acc[t]);
            } else {
                const f32x16 s = load_f16(scale);
                scale += 2 * kPanel;
                for (int t = 0; t < T; ++t)
                    acc[t] = fma(to_f32(sum[t]), mul(set1(a_scale[t]), s), acc[t]);
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

template <class Codes, int kGroup, bool kZero, bool kRow>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    int64_t t = 0;
    for (; t + kTokenBlock <= p.tokens; t += kTokenBlock)
        block<Codes, kGroup, kZero, kRow, kTokenBlock>(p, begin, end, t);
    if (kTokenBlock > 4 && t + 4 <= p.tokens) {
        block<Codes, kGroup, kZero, kRow, 4>(p, begin, end, t);
        t += 4;
    }
    if (t + 2 <= p.tokens) {
        block<Codes, kGroup, kZero, kRow, 2>(p, begin, end, t);
        t += 2;
    }
    if (t < p.tokens) block<Codes, kGroup, kZero, kRow, 1>(p, begin, end, t);
}

template <int kGroup>
LinearKernel grouped(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U4O8: return linear<Nibbles<kGroup>, kGroup, false, false>;
        case EDGE_ENC_U4: return linear<Nibbles<kGroup>, kGroup, true, false>;
        case EDGE_ENC_I8: return linear<Bytes<kGroup>, kGroup, false, false>;
        default: return nullptr;
    }
}

}  // namespace

int32_t code_offset(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U4O8: return 8;
        case EDGE_ENC_U4: return 1;  // times the zero point
        case EDGE_ENC_I8: return kByteOffset;
        default: return 0;
    }
}

LinearKernel int_kernel(const edge_matrix& w) {
    if ((w.encoding == EDGE_ENC_U4) != (w.zero != nullptr)) return nullptr;
    if (w.scale_per == EDGE_SCALE_ROW && w.encoding == EDGE_ENC_I8 && w.group == 64)
        return linear<Bytes<64>, 64, false, true>;
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
