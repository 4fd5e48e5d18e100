// A batch proved to stay within what the executor was sized for, and where the keys of its tokens lie.
#pragma once

#include <cstddef>
#include <vector>

#include "edge_cpu.h"

namespace edge {

// Tokens in consecutive rows that attend together: one sequence, positions ascending by one, and what a token
// sees is a beginning of what the next one sees.
struct Block {
    int32_t first, count;
};

class StepBatch {
  public:
    explicit StepBatch(const edge_program& program);

    // Takes the batch for one step, or says in its index and value what is wrong. Returns an edge_status.
    int take(edge_batch* batch);
    const edge_batch& operator*() const { return *batch_; }
    const edge_batch* operator->() const { return batch_; }

    const std::vector<Block>& blocks() const { return blocks_; }
    const int32_t* pages(int32_t t) const {
        return batch_->page_tables + static_cast<int64_t>(batch_->sequence[t]) * batch_->pages_per_sequence;
    }
    // Where the key and value of a token are stored.
    int32_t place(int32_t t) const {
        return batch_->places == nullptr ? batch_->positions[t] : batch_->places[t];
    }
    // From this position up to its last token's, a block's keys lie where `path` says; below, at their
    // positions.
    int32_t bend(const Block& block) const {
        return bend_[static_cast<size_t>(block.first + block.count - 1)];
    }
    // Places of the positions from `bend` on, at most max_tokens.
    void path(const Block& block, int32_t* places) const;

  private:
    int check_sizes();
    int check_token(int32_t t);
    int check_place(int32_t t);
    int check_logit_rows();
    void find_blocks();

    const edge_program program_;
    const bool has_inputs_, by_page_;  // by_page_: K is per channel, blocks end with their page
    int32_t widest_window_ = 1;        // keys that some attention sees
    edge_batch* batch_ = nullptr;
    std::vector<int32_t> last_place_;  // of each sequence so far
    std::vector<int32_t> root_;        // position of a token's topmost ancestor in the step
    std::vector<int32_t> bend_;
    std::vector<Block> blocks_;
};

}  // namespace edge
