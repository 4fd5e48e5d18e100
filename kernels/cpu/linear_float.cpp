// y = W x for float and table weights in packing n16: a row is a lane, so the sum over inputs is one
// ascending chain of fma in f32 on every path. Activations stay f32.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

struct Ungrouped {
    static constexpr int kGroup = 0;
};
struct F32 : Ungrouped {
    static constexpr int kBytes = 4;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load(reinterpret_cast<const float*>(p)); }
};
struct F16 : Ungrouped {
    static constexpr int kBytes = 2;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_f16(p); }
};
struct BF16 : Ungrouped {
    static constexpr int kBytes = 2;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_bf16(p); }
};
struct E4M3 : Ungrouped {
    static constexpr int kBytes = 1;
    EDGE_INLINE f32x16 at(const uint8_t* p) { return load_e4m3(p); }
};
struct E5M2 : Ungrouped {
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

// E4M3 with a scale for every 128 inputs of a row: a group is summed first, then scaled once.
struct GroupedE4M3 : E4M3 {
    static constexpr int kGroup = 128;
};

template <class Item, int T, int P>
void block_grouped(const LinearArgs& p, int64_t panel, int64_t token) {
    const int64_t cols = p.weight->cols, groups = (cols + Item::kGroup - 1) / Item::kGroup;
    const int64_t panel_bytes = groups * Item::kGroup * kPanel * Item::kBytes;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + panel * panel_bytes;
    const float* scale = static_cast<const float*>(p.weight->scale) + panel * groups * kPanel;
    const float* x = p.x + token * p.x_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t g = 0; g < groups; ++g) {
        const int64_t end = (g + 1) * Item::kGroup < cols ? (g + 1) * Item::kGroup : cols;
        f32x16 sum[P][T];
        for (int i = 0; i < P; ++i)
            for (int t = 0; t < T; ++t) sum[i][t] = zero16();
        for (int64_t k = g * Item::kGroup; k < end; ++k, q += kPanel * Item::kBytes) {
            for (int i = 0; i < P; ++i) {
                const f32x16 w = Item::at(q + i * panel_bytes);
                __builtin_prefetch(q + i * panel_bytes + kPrefetch);
                for (int t = 0; t < T; ++t) sum[i][t] = fma(w, set1(x[t * p.x_stride + k]), sum[i][t]);
            }
        }
        for (int i = 0; i < P; ++i) {
            const f32x16 s = load(scale + (i * groups + g) * kPanel);
            for (int t = 0; t < T; ++t) acc[i][t] = fma(sum[i][t], s, acc[i][t]);
        }
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, p.weight->rows, token + t, acc[i][t]);
}

// Scales of group g of a panel of NF4 weights.
struct HalfScales {
    EDGE_INLINE f32x16 of(const edge_matrix& w, int64_t panel, int64_t groups, int64_t g) {
        return load_f16(static_cast<const char*>(w.scale) + (panel * groups + g) * kPanel * 2);
    }
};
struct FloatScales {
    EDGE_INLINE f32x16 of(const edge_matrix& w, int64_t panel, int64_t groups, int64_t g) {
        return load(static_cast<const float*>(w.scale) + (panel * groups + g) * kPanel);
    }
};
struct DoubleScales {  // formats/nf4_double.py: a product and a sum, each rounded
    EDGE_INLINE f32x16 of(const edge_matrix& w, int64_t panel, int64_t groups, int64_t g) {
        constexpr int64_t kShare = EDGE_SECOND / 64;
        const uint8_t* code = static_cast<const uint8_t*>(w.scale) + (panel * groups + g) * kPanel;
        const float* second = w.second + (panel * ((groups + kShare - 1) / kShare) + g / kShare) * kPanel;
        return add(mul(look_up_any(EDGE_DYNAMIC, load_u8(code)), load(second)), set1(*w.offset));
    }
};

// A group's table values are summed first, inputs j and j + 32 in turn, then scaled once.
template <class Scale>
struct NF4 {
    static constexpr int kBytes = 0;  // less than one
    static constexpr int kGroup = 64;
    using Scales = Scale;
};

template <class Item, int T, int P>
void block_nf4(const LinearArgs& p, int64_t panel, int64_t token) {
    constexpr int kHalf = Item::kGroup / 2;
    const int64_t cols = p.weight->cols, groups = (cols + Item::kGroup - 1) / Item::kGroup;
    const int64_t panel_bytes = groups * kHalf * kPanel;
    const uint8_t* q = static_cast<const uint8_t*>(p.weight->codes) + panel * panel_bytes;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    float padded[T][Item::kGroup];
    for (int64_t g = 0; g < groups; ++g) {
        const float* x = p.x + token * p.x_stride + g * Item::kGroup;
        int64_t stride = p.x_stride;
        if ((g + 1) * Item::kGroup > cols) {  // the last inputs do not exist: read zeros for them
            const int64_t n = cols - g * Item::kGroup;
            for (int t = 0; t < T; ++t)
                for (int64_t j = 0; j < Item::kGroup; ++j) padded[t][j] = j < n ? x[t * stride + j] : 0.0f;
            x = padded[0];
            stride = Item::kGroup;
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
            const f32x16 s = Item::Scales::of(*p.weight, panel + i, groups, g);
            for (int t = 0; t < T; ++t) acc[i][t] = fma(sum[i][t], s, acc[i][t]);
        }
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, p.weight->rows, token + t, acc[i][t]);
}

template <class Item, int T, int P>
EDGE_INLINE void run_block(const LinearArgs& p, int64_t panel, int64_t token) {
    if constexpr (Item::kBytes == 0) {
        block_nf4<Item, T, P>(p, panel, token);
    } else if constexpr (Item::kGroup > 0) {
        block_grouped<Item, T, P>(p, panel, token);
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

LinearKernel nf4_kernel(int scale_encoding) {
    switch (scale_encoding) {
        case EDGE_ENC_F16:
            return linear<NF4<HalfScales>>;
        case EDGE_ENC_F32:
            return linear<NF4<FloatScales>>;
        case EDGE_ENC_DYNAMIC8:
            return linear<NF4<DoubleScales>>;
        default:
            return nullptr;
    }
}

}  // namespace

LinearKernel float_kernel(const edge_matrix& w) {
    if (w.zero != nullptr) return nullptr;
    const bool grouped = w.scale_per == EDGE_SCALE_GROUP;
    if (w.group != (grouped && w.encoding == EDGE_ENC_E4M3 ? 128 : 64)) return nullptr;
    switch (w.encoding) {
        case EDGE_ENC_F32:
            return grouped ? nullptr : linear<F32>;
        case EDGE_ENC_F16:
            return grouped ? nullptr : linear<F16>;
        case EDGE_ENC_BF16:
            return grouped ? nullptr : linear<BF16>;
        case EDGE_ENC_E4M3:
            return grouped ? linear<GroupedE4M3> : linear<E4M3>;
        case EDGE_ENC_E5M2:
            return grouped ? nullptr : linear<E5M2>;
        case EDGE_ENC_NF4:
            return grouped ? nf4_kernel(w.scale_encoding) : nullptr;
        default:
            return nullptr;
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
