// y = W x for float and table weights in packing n16: a row is a lane, so the sum over inputs is one
// ascending chain of fma in f32 on every path. Activations stay f32.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

struct F32 {
    static constexpr int kBytes = 4;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct F16 {
    static constexpr int kBytes = 2;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_f16(p); }
};
struct BF16 {
    static constexpr int kBytes = 2;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_bf16(p); }
};
struct E4M3 {
    static constexpr int kBytes = 1;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_e4m3(p); }
};
struct E5M2 {
    static constexpr int kBytes = 1;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_e5m2(p); }
};

constexpr int64_t kPrefetch = 1024;

EDGE_INLINE f32x16 scaled(const edge_matrix& w, int64_t panel, f32x16 y) {
    const float* scale = static_cast<const float*>(w.scale);
    if (w.scale_per == EDGE_SCALE_ROW) return mul(y, load(scale + panel * kPanel));
    if (w.scale_per == EDGE_SCALE_TENSOR) return mul(y, set1(scale[0]));
    return y;
}

// P panels together hide the latency of the fma chain when there are few tokens.
template <class Item, int T, int P>
void block(const LinearArgs& p, int64_t panel, int64_t token) {
    const int64_t padded = (p.weight->cols + p.weight->group - 1) / p.weight->group * p.weight->group;
    const int64_t panel_bytes = padded * kPanel * Item::kBytes, cols = p.weight->cols;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + panel * panel_bytes;
    const float* x = p.x + token * p.x_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t k = 0; k < cols; ++k, q += kPanel * Item::kBytes) {
        for (int i = 0; i < P; ++i) {
            const f32x16 w = Item::at(q + i * panel_bytes);
            __builtin_prefetch(q + i * panel_bytes + kPrefetch);
            for (int t = 0; t < T; ++t) acc[i][t] = fma(w, set1(x[t * p.x_stride + k]), acc[i][t]);
        }
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t)
            finish(p, (panel + i) * kPanel, p.weight->rows, token + t,
                   scaled(*p.weight, panel + i, acc[i][t]));
}

// A group's table values are summed first, inputs j and j + 32 in turn, then scaled once.
struct NF4 {
    static constexpr int kBytes = 0;  // less than one
    static constexpr int kGroup = 64;
};

template <int T, int P>
void block_nf4(const LinearArgs& p, int64_t panel, int64_t token) {
    constexpr int kHalf = NF4::kGroup / 2;
    const int64_t cols = p.weight->cols, groups = (cols + NF4::kGroup - 1) / NF4::kGroup;
    const int64_t panel_bytes = groups * kHalf * kPanel;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + panel * panel_bytes;
    const char* scale = static_cast<const char*>(p.weight->scale) + panel * groups * kPanel * 2;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    float padded[T][NF4::kGroup];
    for (int64_t g = 0; g < groups; ++g) {
        const float* x = p.x + token * p.x_stride + g * NF4::kGroup;
        int64_t stride = p.x_stride;
        if ((g + 1) * NF4::kGroup > cols) {  // the last inputs do not exist: read zeros for them
            const int64_t n = cols - g * NF4::kGroup;
            for (int t = 0; t < T; ++t)
                for (int64_t j = 0; j < NF4::kGroup; ++j) padded[t][j] = j < n ? x[t * stride + j] : 0.0f;
            x = padded[0];
            stride = NF4::kGroup;
        }
        f32x16 sum[P][T];
        for (int i = 0; i < P; ++i)
            for (int t = 0; t < T; ++t) sum[i][t] = zero16();
        for (int j = 0; j < kHalf; ++j, q += kPanel) {
            for (int i = 0; i < P; ++i) {
                f32x16 low, high;
                load_table(q + i * panel_bytes, EDGE_NF4, &low, &high);
                for (int t = 0; t < T; ++t) {
                    sum[i][t] = fma(low, set1(x[t * stride + j]), sum[i][t]);
                    sum[i][t] = fma(high, set1(x[t * stride + j + kHalf]), sum[i][t]);
                }
            }
            __builtin_prefetch(q + kPrefetch);
        }
        for (int i = 0; i < P; ++i) {
            const f32x16 s = load_f16(scale + (i * groups + g) * kPanel * 2);
            for (int t = 0; t < T; ++t) acc[i][t] = fma(sum[i][t], s, acc[i][t]);
        }
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, p.weight->rows, token + t, acc[i][t]);
}

template <class Item, int T, int P>
EDGE_INLINE void run_block(const LinearArgs& p, int64_t panel, int64_t token) {
    if constexpr (Item::kBytes == 0) {
        block_nf4<T, P>(p, panel, token);
    } else {
        block<Item, T, P>(p, panel, token);
    }
}

template <class Item, int T, int P>
void panels(const LinearArgs& p, int64_t begin, int64_t end, int64_t token) {
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) run_block<Item, T, P>(p, panel, token);
    for (; panel < end; ++panel) run_block<Item, T, 1>(p, panel, token);
}

template <class Item>
void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    int64_t t = 0;
    for (; t + kTokenBlock <= p.tokens; t += kTokenBlock) panels<Item, kTokenBlock, 1>(p, begin, end, t);
    if (kTokenBlock > 4 && t + 4 <= p.tokens) {
        panels<Item, 4, 1>(p, begin, end, t);
        t += 4;
    }
    if (t + 2 <= p.tokens) {
        panels<Item, 2, 2>(p, begin, end, t);
        t += 2;
    }
    if (t < p.tokens) panels<Item, 1, 4>(p, begin, end, t);
}

}  // namespace

LinearKernel float_kernel(const edge_matrix& w) {
    if (w.zero != nullptr || w.group != 64) return nullptr;
    const bool grouped = w.scale_per == EDGE_SCALE_GROUP;
    if (grouped != (w.encoding == EDGE_ENC_NF4)) return nullptr;
    switch (w.encoding) {
        case EDGE_ENC_F32:
            return linear<F32>;
        case EDGE_ENC_F16:
            return linear<F16>;
        case EDGE_ENC_BF16:
            return linear<BF16>;
        case EDGE_ENC_E4M3:
            return linear<E4M3>;
        case EDGE_ENC_E5M2:
            return linear<E5M2>;
        case EDGE_ENC_NF4:
            return linear<NF4>;
        default:
            return nullptr;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
