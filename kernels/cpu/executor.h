// A program cut into stages that a team of threads walks together.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "edge_cpu.h"
#include "kernels.h"
#include "pool.h"

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
    enum Kind { kTokens, kLinear, kAttention, kLogitRows, kLogits } kind;
    std::vector<TokenStep> steps;
    std::vector<LinearUnit> linears;
    uint32_t units = 0;
    const edge_op* attention = nullptr;
};

class Executor final : public Work {
  public:
    // Throws std::invalid_argument when a weight's format has no kernel.
    Executor(const edge_program& program, const Kernels& kernels);
    int forward(edge_batch* batch);

  private:
    struct Block {  // consecutive tokens of one sequence
        int32_t first, count;
    };

    // The bytes of a buffer for all tokens of the largest step.
    struct Region {
        const float *begin, *end;
        int64_t width;
    };
    Region region(const float* buffer, int64_t width) const;
    static bool touches(const Region& a, const std::vector<Region>& others);
    // Touches with another token stride or start, so that one token's row lies over another's.
    static bool clashes(const Region& a, const std::vector<Region>& others);

    void compile();
    void add_linears(const edge_op* begin, const edge_op* end, bool logits);
    int check(edge_batch* batch);
    int check_token(const edge_batch& batch, int32_t t, int32_t* value);
    void find_blocks(const edge_batch& batch);

    uint32_t units(uint32_t stage) const override;
    void run(int thread, uint32_t stage, uint32_t unit) override;
    void run_step(const TokenStep& step, int64_t token);
    void run_op(const edge_op& op, int64_t token);
    void run_linear(const Stage& stage, uint32_t unit, int64_t tokens);
    int32_t head_parts(const edge_op& op, int32_t blocks) const;
    void run_attention(const edge_op& op, int thread, uint32_t unit);
    void fail(int status);

    const edge_program program_;
    const Kernels& kernels_;
    std::vector<edge_op> ops_;
    std::vector<edge_op> tables_;
    std::vector<edge_cache> cache_;
    std::vector<Stage> stages_;
    std::vector<Block> blocks_;
    int32_t widest_window_ = 1;           // keys that some attention sees
    std::vector<int32_t> last_position_;  // of each sequence in the batch being checked
    const edge_batch* batch_ = nullptr;
    std::atomic<int> status_{EDGE_OK};
    // Sizes of the batch; a thread that comes late may read them after its run has ended.
    std::atomic<int32_t> tokens_{0}, logit_rows_{0}, block_count_{0};
    std::unique_ptr<Pool> pool_;  // last: its threads use all of the above
};

}  // namespace edge
