// A program cut into stages; every unit of a stage may run at once, and a stage waits for the one before.
#pragma once

#include <vector>

#include "edge_cpu.h"
#include "kernels.h"

namespace edge {

// Work on one token's row; consecutive steps need no barrier because a token stays with one thread.
struct TokenStep {
    enum Kind { kOp, kAngles, kQuantize, kGather } kind;
    const edge_op* op;
};

struct LinearUnit {
    const edge_op* op;
    LinearKernel kernel;
    int64_t panels, chunk;  // panels in all, panels of one unit of work
    uint32_t first_unit;    // of the stage
};

struct Stage {
    // kLowRank: A x of adapters, for the linears of the stage that follows
    enum Kind { kTokens, kLowRank, kLinear, kClose, kAttention, kLogitRows, kLogits } kind;
    std::vector<TokenStep> steps;
    std::vector<LinearUnit> linears;
    uint32_t units = 0;
    const edge_op* attention = nullptr;  // also of kClose, which quantizes the pages that the step fills
};

int64_t padded_cols(const edge_matrix& w);

// `ops` and `tables` must outlive the stages. Throws std::invalid_argument when a weight's format has no
// kernel.
std::vector<Stage> compile(const edge_program& program, const std::vector<edge_op>& ops,
                           const std::vector<edge_op>& tables, const Kernels& kernels);

}  // namespace edge
