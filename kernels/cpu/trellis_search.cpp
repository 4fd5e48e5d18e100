// The codes of a trellis format that miss given values least: Viterbi's algorithm, twice round a circle of
// rows. edge_runtime/engine/formats/trellis.py says it in numpy.
#include <algorithm>

#include "kernels.h"
#include "trellis.h"
#include "vec16.h"

namespace edge {
namespace EDGE_ISA {
namespace {

constexpr int kWindow = 12;
constexpr float kBias = 1e9f;  // above every path's error, in squared levels

// f32 level of every window.
template <int kBits>
const float* levels() {
    struct Table {
        float level[1 << kWindow];
        Table() {
            for (int w = 0; w < 1 << kWindow; ++w)
                level[w] = static_cast<float>(trellis_sum(kBits, w) - EDGE_TCQ_ZERO) * 0.5f;
        }
    };
    static const Table table;
    return table.level;
}

// One circle of rows: `steps` whole panels, of which the last ones may lie beyond the matrix.
template <int kBits>
class Circle {
  public:
    explicit Circle(int steps) : steps_(steps), level_(levels<kBits>()) {}

    void search(const float* target, const float* weight, int rows, uint8_t* codes, float* levels) {
        const int half = steps_ / 2;
        std::fill(metric_, metric_ + kStates, 0.0f);
        for (int t = 0; t < steps_; ++t) step(target, weight, rows, (half + t) % steps_, t);
        int state = static_cast<int>(std::min_element(metric_, metric_ + kStates) - metric_);
        for (int t = steps_ - 1; t >= steps_ - half; --t) state = before(state, t);
        const int closing = state;
        std::fill(metric_, metric_ + kStates, kBias);
        metric_[closing] = 0.0f;
        for (int t = 0; t < steps_; ++t) step(target, weight, rows, t, t);
        for (int t = steps_ - 1; t >= 0; --t) {
            const int oldest = back_[t * kStates + state];
            if (t < rows) {
                codes[t] = static_cast<uint8_t>(state & (kCodes - 1));
                levels[t] = level_[oldest * kStates + state];
            }
            state = before(state, t);
        }
    }

  private:
    static constexpr int kCodes = 1 << kBits, kStates = 1 << (kWindow - kBits);
    static constexpr int kTails = kStates / kCodes;  // states but for the code that is forgotten next
    static constexpr int kTogether = 16 / kCodes;    // tails whose new states fill a vector

    // The least errors of all states after a row. Of a state's predecessors only the oldest code differs; it
    // is kept in the lowest bits of the error, which are too small to matter, so that the least has it with
    // it.
    void step(const float* target, const float* weight, int rows, int row, int t) {
        const bool beyond = row >= rows;
        const f32x16 y = set1(beyond ? 0.0f : target[row]), w = set1(beyond ? 0.0f : weight[row]);
        const i32x16 keep = set1(~(kCodes - 1));
        uint8_t* back = back_ + t * kStates;
        f32x16 least = set1(4 * kBias);
        for (int tail = 0; tail < kTails; tail += kTogether) {
            f32x16 best = set1(4 * kBias);
            for (int oldest = 0; oldest < kCodes; ++oldest) {
                const int from = oldest * kTails + tail;
                const f32x16 d = sub(y, load(level_ + from * kCodes));
                const f32x16 error = fma(mul(d, w), d, load_repeated<kCodes>(metric_ + from));
                best = min(as_f32(bit_or(bit_and(as_i32(error), keep), set1(oldest))), best);
            }
            store_u8(back + tail * kCodes, bit_and(as_i32(best), set1(kCodes - 1)));
            best = as_f32(bit_and(as_i32(best), keep));
            store(next_ + tail * kCodes, best);
            least = min(best, least);
        }
        const f32x16 lowest = set1(-max_lanes(sub(zero16(), least)));
        for (int s = 0; s < kStates; s += 16) store(metric_ + s, sub(load(next_ + s), lowest));
        if (beyond)
            for (int s = 0; s < kStates; ++s)
                if (s % kCodes != 0) metric_[s] = kBias;
    }

    int before(int state, int t) const { return back_[t * kStates + state] * kTails + (state >> kBits); }

    int steps_;
    const float* level_;
    float metric_[kStates + 16], next_[kStates];  // a vector is read that begins at any state
    uint8_t back_[EDGE_TCQ_RUN * kStates];
};

template <int kBits>
void search(const TrellisArgs& p) {
    for (int64_t first = 0; first < p.rows; first += EDGE_TCQ_RUN) {
        const int rows = static_cast<int>(std::min<int64_t>(EDGE_TCQ_RUN, p.rows - first));
        Circle<kBits> circle((rows + kPanel - 1) / kPanel * kPanel);
        for (int64_t c = 0; c < p.chains; ++c) {
            const int64_t at = c * p.rows + first;
            circle.search(p.targets + at, p.weights + at, rows, p.codes + at, p.levels + at);
        }
    }
}

}  // namespace

void trellis_search(const TrellisArgs& p) {
    switch (p.bits) {
        case 2:
            return search<2>(p);
        case 3:
            return search<3>(p);
        default:
            return search<4>(p);
    }
}

}  // namespace EDGE_ISA
}  // namespace edge
