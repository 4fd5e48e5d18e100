// The update of an adapter, out += scale * B (A x), beside any linear. A dot of A runs along the inputs in
// sixteen lanes, whose sum is a fixed tree; in B a row is a lane, as in the float weights. Each value is one
// ascending chain of fma in f32, whatever shares the call. Both lie in the order in which they are read.
#include "kernels.h"
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

// Rows of A computed together, so that enough sums are in flight, and tokens that share a load of them.
constexpr int kDots = kRegisters == 32 ? 8 : 4;
constexpr int kDotTokens = kRegisters == 32 ? 2 : 1;
constexpr int64_t kPrefetch = 1024;  // f16 values ahead
static_assert(kRankRows % kDots == 0, "a unit of work is whole blocks");

template <int T>
EDGE_INLINE void dots(const LowRankArgs& p, int64_t token, int64_t row) {
    const int64_t padded = (p.cols + 15) / 16 * 16;
    const uint16_t* a = p.weight + row / kRankRows * kRankRows * padded + row % kRankRows * 16;
    const float* x = p.x + token * p.x_stride;
    f32x16 acc[T][kDots];
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < kDots; ++i) acc[t][i] = zero16();
    for (int64_t k = 0; k < p.cols; k += 16, a += kRankRows * 16) {
        f32x16 v[T];
        for (int t = 0; t < T; ++t) v[t] = load_first(x + t * p.x_stride + k, p.cols - k);
        for (int i = 0; i < kDots; ++i) {
            const f32x16 w = load_f16(a + i * 16);
            if (i % 2 == 0) __builtin_prefetch(a + i * 16 + kPrefetch);
            for (int t = 0; t < T; ++t) acc[t][i] = fma(w, v[t], acc[t][i]);
        }
    }
    for (int t = 0; t < T; ++t)
        for (int i = 0; i < kDots; ++i) p.u[(token + t) * p.u_stride + row + i] = sum_lanes(acc[t][i]);
}

template <int T, int P>
EDGE_INLINE void add_panels(const LowRankArgs& p, int64_t token, int64_t panel) {
    const uint16_t* b = p.weight + panel * p.rank * kPanel;
    const float* u = p.u + token * p.u_stride;
    f32x16 acc[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) acc[i][t] = zero16();
    for (int64_t r = 0; r < p.rank; ++r) {
        for (int i = 0; i < P; ++i) {
            const f32x16 w = load_f16(b + (i * p.rank + r) * kPanel);
            if (T == 1 && r % 2 == 0) __builtin_prefetch(b + ((i + P) * p.rank + r) * kPanel);
            for (int t = 0; t < T; ++t) acc[i][t] = fma(w, set1(u[t * p.u_stride + r]), acc[i][t]);
        }
    }
    for (int i = 0; i < P; ++i) {
        const int64_t row = (panel + i) * kPanel, n = p.rows - row;
        for (int t = 0; t < T; ++t) {
            float* out = p.out + (token + t) * p.out_stride + row;
            store_first(out, fma(set1(p.scale), acc[i][t], load_first(out, n)), n);
        }
    }
}

template <int T>
void add_tokens(const LowRankArgs& p, int64_t token, int64_t begin, int64_t end) {
    constexpr int P = T == 1 ? 4 : 1;
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) add_panels<T, P>(p, token, panel);
    if constexpr (P > 1)
        for (; panel < end; ++panel) add_panels<T, 1>(p, token, panel);
}

}  // namespace

void low_rank_in(const LowRankArgs& p, int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; row += kDots) {
        int64_t t = 0;
        for (; t + kDotTokens <= p.tokens; t += kDotTokens) dots<kDotTokens>(p, t, row);
        for (; t < p.tokens; ++t) dots<1>(p, t, row);
    }
}

void low_rank_out(const LowRankArgs& p, int64_t begin, int64_t end) {
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) add_tokens<4>(p, t, begin, end);
    for (; t < p.tokens; ++t) add_tokens<1>(p, t, begin, end);
}

}  // namespace EDGE_ISA
}  // namespace edge
