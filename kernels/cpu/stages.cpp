#include "stages.h"

#include <algorithm>
#include <stdexcept>

namespace edge {
namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // weights of one unit of work: stay in L2 while token blocks pass

int64_t panels_of(const edge_matrix& w) { return (w.rows + kPanel - 1) / kPanel; }

// Whether the same columns are left out of the codes of both.
bool same_outliers(const edge_matrix& a, const edge_matrix& b) {
    return a.outliers == b.outliers && std::equal(a.index, a.index + a.outliers, b.index);
}

// Whether `b` reads the same activations as `a`, in the same codes.
bool shares_input(const edge_op& a, const edge_op& b) {
    if (b.kind != a.kind || b.x != a.x) return false;
    if (quantizes(a.weight.encoding) != quantizes(b.weight.encoding)) return false;
    return !quantizes(a.weight.encoding) ||
           (a.weight.group == b.weight.group && a.weight.encoding == b.weight.encoding &&
            same_outliers(a.weight, b.weight));
}

int64_t panel_bytes(const edge_matrix& w) {
    return padded_cols(w) * kPanel * (code_bits(w.encoding) + w.high_bits) / 8;
}

// The bytes of a buffer for all tokens of the largest step.
struct Region {
    const float *begin, *end;
    int64_t width;
};

Region region(const edge_program& program, const float* buffer, int64_t width) {
    return {buffer, buffer == nullptr ? nullptr : buffer + program.max_tokens * width, width};
}

bool touches(const Region& a, const std::vector<Region>& others) {
    return std::any_of(others.begin(), others.end(),
                       [&](const Region& b) { return a.begin < b.end && b.begin < a.end; });
}

// Touches with another token stride or start, so that one token's row lies over another's.
bool clashes(const Region& a, const std::vector<Region>& others) {
    return std::any_of(others.begin(), others.end(), [&](const Region& b) {
        return a.begin < b.end && b.begin < a.end && (a.begin != b.begin || a.width != b.width);
    });
}

void push_linear(std::vector<Stage>* stages, const edge_op* begin, const edge_op* end, int threads,
                 const Kernels& kernels) {
    Stage stage{};
    stage.kind = begin->kind == EDGE_OP_LOGITS ? Stage::kLogits : Stage::kLinear;
    for (const edge_op* op = begin; op < end; ++op) {
        const LinearKernel kernel = kernels.linear(op->weight);
        if (kernel == nullptr) throw std::invalid_argument("no kernel for a weight's format");
        const int64_t panels = panels_of(op->weight);
        int64_t chunk = kChunkBytes / std::max<int64_t>(1, panel_bytes(op->weight));
        if (threads > 1) chunk = std::min(chunk, panels / (4 * threads));
        chunk = std::max<int64_t>(1, chunk);
        stage.linears.push_back({op, kernel, panels, chunk, stage.units});
        stage.units += static_cast<uint32_t>((panels + chunk - 1) / chunk);
    }
    Stage low_rank{};
    low_rank.kind = Stage::kLowRank;
    low_rank.linears = stage.linears;
    stages->push_back(std::move(low_rank));
    stages->push_back(std::move(stage));
}

}  // namespace

int64_t padded_cols(const edge_matrix& w) { return (w.cols + unit_of(w) - 1) / unit_of(w) * unit_of(w); }

std::vector<Stage> compile(const edge_program& program, const std::vector<edge_op>& ops,
                           const std::vector<edge_op>& tables, const Kernels& kernels) {
    std::vector<Stage> stages;
    Stage tokens{};
    tokens.kind = Stage::kTokens;
    for (const edge_op& table : tables) tokens.steps.push_back({TokenStep::kAngles, &table});
    std::vector<Region> used;  // by the steps of `tokens`
    const auto flush = [&] {
        if (!tokens.steps.empty()) stages.push_back(std::move(tokens));
        tokens = Stage{};
        tokens.kind = Stage::kTokens;
        used.clear();
    };
    const edge_op* const end = ops.data() + ops.size();
    for (const edge_op* op = ops.data(); op < end; ++op) {
        if (op->kind != EDGE_OP_LINEAR && op->kind != EDGE_OP_ATTENTION && op->kind != EDGE_OP_LOGITS) {
            const Region out = region(program, op->out, op->out_width);
            // A dead buffer's bytes may be written again in another width: first all tokens must be done with
            // it.
            if (clashes(out, used)) flush();
            tokens.steps.push_back({TokenStep::kOp, op});
            used.push_back(region(program, op->x, op->x_width));
            used.push_back(region(program, op->y, op->x_width));
            used.push_back(out);
            continue;
        }
        const bool logits = op->kind == EDGE_OP_LOGITS;
        const bool quantized = op->kind != EDGE_OP_ATTENTION && quantizes(op->weight.encoding);
        if (quantized && !logits) tokens.steps.push_back({TokenStep::kQuantize, op});
        flush();
        if (op->kind == EDGE_OP_ATTENTION) {
            Stage stage{};
            stage.attention = op;
            if (program.cache[op->layer].k.per_channel) {
                stage.kind = Stage::kClose;
                stages.push_back(stage);
            }
            stage.kind = Stage::kAttention;
            stages.push_back(std::move(stage));
        } else if (logits) {
            Stage rows{};
            rows.kind = Stage::kLogitRows;
            rows.steps.push_back({TokenStep::kGather, op});
            if (quantized) rows.steps.push_back({TokenStep::kQuantize, op});
            stages.push_back(std::move(rows));
            const edge_op* last = op + 1;
            while (last < end && shares_input(*op, *last)) ++last;
            push_linear(&stages, op, last, program.threads, kernels);
            op = last - 1;
        } else {  // matrices that read the same codes, or none, run together
            const edge_op* last = op + 1;
            std::vector<Region> outs = {region(program, op->out, op->out_width)};
            for (; last < end && shares_input(*op, *last); ++last) {
                const Region out = region(program, last->out, last->out_width);
                if (touches(out, outs)) break;
                outs.push_back(out);
            }
            push_linear(&stages, op, last, program.threads, kernels);
            op = last - 1;
        }
    }
    return stages;
}

}  // namespace edge
