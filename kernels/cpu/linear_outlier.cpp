// y = W x where W has f16 outlier columns beside its int8 codes (LLM.int8(), formats/int8_outlier.py). The
// codes of the activations leave these columns out; their products are added in f32, in ascending order, when
// the integer part is scaled.
#include "linear.h"

namespace edge {
namespace EDGE_ISA {
namespace {

// Slots of the index that are used: those before the first -1.
int64_t used(const edge_matrix& w) {
    int64_t n = 0;
    while (n < w.outliers && w.index[n] >= 0) ++n;
    return n;
}

// P panels together hide the latency of the chain of fma when there are few tokens.
template <int T, int P>
void add_columns(const LinearArgs& p, int64_t panel, int64_t token, int64_t n) {
    const edge_matrix& w = *p.weight;
    const char* columns = static_cast<const char*>(w.outlier);
    const float* x = p.x + token * p.x_stride;
    f32x16 y[P][T];
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t)
            y[i][t] = load_first(p.out + (token + t) * p.out_stride + (panel + i) * kPanel,
                                 w.rows - (panel + i) * kPanel);
    for (int64_t s = 0; s < n; ++s) {
        for (int i = 0; i < P; ++i) {
            const f32x16 column = load_f16(columns + ((panel + i) * w.outliers + s) * kPanel * 2);
            for (int t = 0; t < T; ++t) y[i][t] = fma(column, set1(x[t * p.x_stride + w.index[s]]), y[i][t]);
        }
    }
    for (int i = 0; i < P; ++i)
        for (int t = 0; t < T; ++t) finish(p, (panel + i) * kPanel, w.rows, token + t, y[i][t]);
}

template <int T, int P>
void panels(const LinearArgs& p, int64_t begin, int64_t end, int64_t token, int64_t n) {
    int64_t panel = begin;
    for (; panel + P <= end; panel += P) add_columns<T, P>(p, panel, token, n);
    for (; panel < end; ++panel) add_columns<T, 1>(p, panel, token, n);
}

void linear(const LinearArgs& p, int64_t begin, int64_t end) {
    LinearArgs plain = p;
    plain.bias = nullptr;  // comes last
    const LinearKernel integer = int_kernel(*p.weight);
    integer(plain, begin, end);
    const int64_t n = used(*p.weight);
    int64_t t = 0;
    for (; t + 4 <= p.tokens; t += 4) panels<4, 1>(p, begin, end, t, n);
    for (; t < p.tokens; ++t) panels<1, 4>(p, begin, end, t, n);
}

}  // namespace

LinearKernel outlier_kernel(const edge_matrix& w) { return int_kernel(w) == nullptr ? nullptr : linear; }

}  // namespace EDGE_ISA
}  // namespace edge
