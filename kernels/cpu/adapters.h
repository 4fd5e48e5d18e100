// Low-rank adapters that sequences of a step may use, and the work that they add to its linears.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "batch.h"
#include "edge_cpu.h"
#include "kernels.h"
#include "stages.h"

namespace edge {

struct Adapter {
    std::vector<edge_low_rank> of_op;  // one for each op of the program; rank 0 = it has no update
    float* u;                          // (tokens, stride): A x of the linears of one stage
    int64_t stride;
    std::vector<uint32_t> chunks;  // of each stage: pieces of kRankRows that its longest A has
};

// Consecutive rows of a step with the same adapter.
struct AdapterRows {
    const Adapter* adapter;
    int64_t first, count;
};

class Adapters {
  public:
    Adapters(const edge_program& program, const std::vector<edge_op>& ops, const std::vector<Stage>& stages);

    // Puts an adapter under a number, or takes it away (nullptr). Throws std::bad_alloc.
    void set(int32_t number, const edge_adapter* adapter);
    // Finds the rows of the step that use one, whose numbers must be in use.
    void take(const StepBatch& batch);

    // Units of work of a stage of A x; may be called while the answer changes.
    uint32_t units(uint32_t stage) const { return units_[stage].load(std::memory_order_relaxed); }
    // One unit of u = A x for the linears that `stage` prepares.
    void run_in(const Kernels& kernels, uint32_t stage, uint32_t unit, const float* logit_rows) const;
    // Adds B u to the panels [begin, end) of every row that has an update of the op.
    void run_out(const Kernels& kernels, const edge_op& op, int64_t begin, int64_t end) const;

  private:
    const std::vector<AdapterRows>& rows(bool logits) const { return logits ? logit_rows_ : token_rows_; }
    void find(std::vector<AdapterRows>* rows, const StepBatch& batch, const int32_t* tokens, int32_t count);

    const std::vector<edge_op>& ops_;
    const std::vector<Stage>& stages_;
    const size_t most_rows_;
    std::vector<std::unique_ptr<Adapter>> loaded_;
    std::vector<AdapterRows> token_rows_, logit_rows_;
    std::vector<uint32_t> chunks_;  // of each stage in this step
    std::unique_ptr<std::atomic<uint32_t>[]> units_;
    bool active_ = false;  // some unit count is not 0
};

}  // namespace edge
