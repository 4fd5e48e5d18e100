#include "adapters.h"

#include <algorithm>

namespace edge {
namespace {

constexpr int64_t kRows = 8;  // of one unit of work: they share a load of A

}  // namespace

Adapters::Adapters(const edge_program& program, const std::vector<edge_op>& ops,
                   const std::vector<Stage>& stages)
    : ops_(ops),
      stages_(stages),
      most_rows_(static_cast<size_t>(std::max(program.max_tokens, program.max_logits))),
      chunks_(stages.size()),
      units_(std::make_unique<std::atomic<uint32_t>[]>(stages.size())) {
    for (size_t i = 0; i < stages.size(); ++i) units_[i].store(0);
}

void Adapters::set(int32_t number, const edge_adapter* adapter) {
    const auto at = static_cast<size_t>(number);
    if (adapter == nullptr) {
        loaded_[at].reset();
        return;
    }
    auto made = std::make_unique<Adapter>();
    made->of_op.resize(ops_.size());
    made->u = adapter->u;
    made->stride = adapter->stride;
    for (int32_t i = 0; i < adapter->count; ++i)
        made->of_op[static_cast<size_t>(adapter->items[i].op)] = adapter->items[i];
    for (const Stage& stage : stages_) {
        int32_t longest = 0;
        if (stage.kind == Stage::kLowRank)
            for (const LinearUnit& linear : stage.linears)
                longest = std::max(longest, made->of_op[static_cast<size_t>(linear.op - ops_.data())].rank);
        made->chunks.push_back(static_cast<uint32_t>((longest + kRankRows - 1) / kRankRows));
    }
    token_rows_.reserve(most_rows_);
    logit_rows_.reserve(most_rows_);
    if (loaded_.size() <= at) loaded_.resize(at + 1);
    loaded_[at] = std::move(made);
}

void Adapters::take(const StepBatch& batch) {
    token_rows_.clear();
    logit_rows_.clear();
    if (batch->adapters != nullptr) {
        find(&token_rows_, batch, nullptr, batch->token_count);
        find(&logit_rows_, batch, batch->logit_rows, batch->logit_count);
    }
    if (token_rows_.empty() && !active_) return;
    active_ = !token_rows_.empty();
    for (size_t i = 0; i < stages_.size(); ++i) {
        const Stage& stage = stages_[i];
        if (stage.kind != Stage::kLowRank) continue;
        const std::vector<AdapterRows>& blocks = rows(stage.linears[0].op->kind == EDGE_OP_LOGITS);
        uint32_t chunks = 0;
        for (const AdapterRows& block : blocks) chunks = std::max(chunks, block.adapter->chunks[i]);
        chunks_[i] = chunks;
        units_[i].store(static_cast<uint32_t>(blocks.size() * stage.linears.size()) * chunks);
    }
}

// `tokens` are the step's rows in question; nullptr = all.
void Adapters::find(std::vector<AdapterRows>* rows, const StepBatch& batch, const int32_t* tokens,
                    int32_t count) {
    for (int32_t i = 0; i < count; ++i) {
        const int32_t number = batch->adapters[batch->sequence[tokens == nullptr ? i : tokens[i]]];
        if (number < 0) continue;
        const Adapter* adapter = loaded_[static_cast<size_t>(number)].get();
        AdapterRows* last = rows->empty() ? nullptr : &rows->back();
        if (last != nullptr && last->adapter == adapter && last->first + last->count == i &&
            last->count < kRows) {
            ++last->count;
        } else {
            rows->push_back({adapter, i, 1});
        }
    }
}

void Adapters::run_in(const Kernels& kernels, uint32_t stage, uint32_t unit, const float* logit_rows) const {
    const std::vector<LinearUnit>& linears = stages_[stage].linears;
    const uint32_t chunks = chunks_[stage], chunk = unit % chunks, item = unit / chunks;
    const edge_op& op = *linears[item % linears.size()].op;
    const bool logits = op.kind == EDGE_OP_LOGITS;
    const AdapterRows& block = rows(logits)[item / linears.size()];
    const edge_low_rank& low = block.adapter->of_op[static_cast<size_t>(&op - ops_.data())];
    const int64_t begin = static_cast<int64_t>(chunk) * kRankRows;
    if (begin >= low.rank) return;
    LowRankArgs args{};
    args.weight = low.a;
    args.x = (logits ? logit_rows : op.x) + block.first * op.x_width;
    args.x_stride = op.x_width;
    args.u = block.adapter->u + block.first * block.adapter->stride + low.offset;
    args.u_stride = block.adapter->stride;
    args.tokens = block.count;
    args.cols = op.weight.cols;
    kernels.low_rank_in(args, begin, begin + kRankRows);
}

void Adapters::run_out(const Kernels& kernels, const edge_op& op, int64_t begin, int64_t end) const {
    for (const AdapterRows& block : rows(op.kind == EDGE_OP_LOGITS)) {
        const edge_low_rank& low = block.adapter->of_op[static_cast<size_t>(&op - ops_.data())];
        if (low.rank == 0) continue;
        LowRankArgs args{};
        args.weight = low.b;
        args.u = block.adapter->u + block.first * block.adapter->stride + low.offset;
        args.u_stride = block.adapter->stride;
        args.out = op.out + block.first * op.out_width;
        args.out_stride = op.out_width;
        args.tokens = block.count;
        args.rank = low.rank;
        args.rows = op.weight.rows;
        args.scale = low.scale;
        kernels.low_rank_out(args, begin, end);
    }
}

}  // namespace edge
