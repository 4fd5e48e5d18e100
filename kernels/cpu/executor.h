// A program whose stages a team of threads walks together, once for each step.
#pragma once

#include <atomic>
#include <memory>
#include <vector>

#include "adapters.h"
#include "batch.h"
#include "edge_cpu.h"
#include "kernels.h"
#include "open_pages.h"
#include "pool.h"
#include "stages.h"

namespace edge {

class Executor final : public Work {
  public:
    // Throws std::invalid_argument when a weight's format has no kernel.
    Executor(const edge_program& program, const Kernels& kernels);
    int forward(edge_batch* batch);
    // See edge_cpu_chain.
    int chain(edge_batch* batch, int32_t count, int32_t* out);
    // Copies keys and values of one sequence from places to places, in all layers.
    void move(const int32_t* pages, const int32_t* sources, const int32_t* targets, int32_t count);

    // See edge_cpu_set_adapter. Throws std::bad_alloc.
    void set_adapter(int32_t number, const edge_adapter* adapter) { adapters_.set(number, adapter); }

  private:
    int64_t row(const edge_cache& cache, const int32_t* pages, int64_t head, int32_t place) const;
    uint32_t units(uint32_t stage) const override;
    void run(int thread, uint32_t stage, uint32_t unit) override;
    void run_step(const TokenStep& step, int64_t token);
    void run_op(const edge_op& op, int64_t token);
    void write_row(const edge_kv& kv, int64_t row, const float* x, int n);
    void run_linear(const Stage& stage, uint32_t unit, int64_t tokens);
    int32_t head_parts(const edge_op& op, int32_t blocks) const;
    void run_close(const edge_op& attention, uint32_t unit);
    void run_attention(const edge_op& op, int thread, uint32_t unit);
    void fail(int status);

    const edge_program program_;
    const Kernels& kernels_;
    std::vector<edge_op> ops_;
    std::vector<edge_op> tables_;
    std::vector<edge_cache> cache_;
    std::vector<Stage> stages_;
    StepBatch batch_;
    OpenPages open_;
    Adapters adapters_;
    std::vector<int32_t> chain_tokens_, chain_positions_;  // (max_sequences) of the running step of a chain
    std::vector<int32_t> paths_;  // (threads, max_tokens): where the keys of a bent block lie
    std::atomic<int> status_{EDGE_OK};
    // Sizes of the batch; a thread that comes late may read them after its run has ended.
    std::atomic<int32_t> tokens_{0}, logit_rows_{0}, block_count_{0}, closing_count_{0};
    std::unique_ptr<Pool> pool_;  // last: its threads use all of the above
};

}  // namespace edge
