#include "batch.h"

#include <algorithm>
#include <climits>

#include "kernels.h"

namespace edge {

StepBatch::StepBatch(const edge_program& program)
    : program_(program),
      has_inputs_(program.op_count > 0 && program.ops[0].kind == EDGE_OP_INPUT),
      by_page_(program.cache_count > 0 && program.cache[0].k.per_channel != 0),
      last_place_(static_cast<size_t>(program.max_sequences)),
      root_(static_cast<size_t>(program.max_tokens)),
      bend_(static_cast<size_t>(program.max_tokens)) {
    blocks_.reserve(static_cast<size_t>(program.max_tokens));
    for (int32_t i = 0; i < program.op_count; ++i) {
        const edge_op& op = program.ops[i];
        if (op.kind != EDGE_OP_ATTENTION) continue;
        widest_window_ = std::max(widest_window_, op.window > 0 ? op.window : program.context);
    }
}

int StepBatch::take(edge_batch* batch) {
    batch_ = batch;
    int bad = check_sizes();
    std::fill(last_place_.begin(), last_place_.end(), -1);
    for (int32_t t = 0; bad == EDGE_OK && t < batch->token_count; ++t) {
        batch->index = t;
        bad = check_token(t);
    }
    if (bad == EDGE_OK) bad = check_logit_rows();
    if (bad == EDGE_OK) find_blocks();
    return bad;
}

int StepBatch::check_sizes() {
    const int32_t counts[3] = {batch_->token_count, batch_->logit_count, batch_->sequence_count};
    const int32_t most[3] = {program_.max_tokens, program_.max_logits, program_.max_sequences};
    for (int i = 0; i < 3; ++i) {
        if (counts[i] < (i == 0 ? 1 : 0) || counts[i] > most[i] || batch_->pages_per_sequence < 0) {
            batch_->index = i;
            batch_->value = counts[i];
            return EDGE_BAD_SIZE;
        }
    }
    return EDGE_OK;
}

int StepBatch::check_token(int32_t t) {
    int32_t& value = batch_->value;
    value = batch_->tokens[t];
    if (!has_inputs_ && (value < 0 || value >= program_.vocab)) return EDGE_BAD_TOKEN;
    value = batch_->sequence[t];
    if (value < 0 || value >= batch_->sequence_count) return EDGE_BAD_SEQUENCE;
    value = batch_->positions[t];
    if (value < 0 || value >= program_.context) return EDGE_BAD_POSITION;
    return program_.cache_count == 0 ? EDGE_OK : check_place(t);
}

// The token's ancestors, its own place, and a page for every place that it reads or writes.
int StepBatch::check_place(int32_t t) {
    int32_t& value = batch_->value;
    const bool tree = batch_->parents != nullptr;
    const int32_t sequence = batch_->sequence[t], position = batch_->positions[t], own = place(t);
    int32_t root = position, bend = own == position ? INT_MAX : position;
    if (tree && batch_->parents[t] != -1) {
        const int32_t parent = value = batch_->parents[t];
        if (parent < 0 || parent >= t || batch_->sequence[parent] != sequence) return EDGE_BAD_PARENT;
        if (batch_->positions[parent] != position - 1) return EDGE_BAD_PARENT;
        root = root_[static_cast<size_t>(parent)];
        bend = std::min(bend, bend_[static_cast<size_t>(parent)]);
    }
    root_[static_cast<size_t>(t)] = root;
    bend_[static_cast<size_t>(t)] = bend;
    value = own;
    // Below `root` lie keys that the token itself sees
    if (own < root || own >= program_.context || own / program_.page_tokens >= batch_->pages_per_sequence)
        return tree ? EDGE_BAD_PLACE : EDGE_BAD_POSITION;
    int32_t& last = last_place_[static_cast<size_t>(sequence)];
    if (own <= last) {  // out of order: look for a second one
        for (int32_t other = 0; other < t; ++other)
            if (batch_->sequence[other] == sequence && place(other) == own) return EDGE_TWICE;
    }
    last = std::max(last, own);
    // Every page from the earliest that the widest window reaches to the last key that was there before
    const int32_t* table = pages(t);
    const int32_t first = std::max(0, position - widest_window_ + 1) / program_.page_tokens;
    const int32_t end = (root + program_.page_tokens - 1) / program_.page_tokens;
    for (int32_t i = first; i < end; ++i) {
        value = table[i];
        if (value < 0 || value >= program_.pages) return EDGE_BAD_PAGE;
    }
    value = table[own / program_.page_tokens];
    return value < 0 || value >= program_.pages ? EDGE_BAD_PAGE : EDGE_OK;
}

int StepBatch::check_logit_rows() {
    for (int32_t i = 0; i < batch_->logit_count; ++i) {
        batch_->index = i;
        batch_->value = batch_->logit_rows[i];
        if (batch_->value < 0 || batch_->value >= batch_->token_count) return EDGE_BAD_LOGIT_ROW;
        if (i > 0 && batch_->value <= batch_->logit_rows[i - 1]) return EDGE_BAD_LOGIT_ROW;
    }
    return EDGE_OK;
}

void StepBatch::find_blocks() {
    blocks_.clear();
    const edge_batch& b = *batch_;
    const auto joins = [&](int32_t t) {
        if (b.sequence[t] != b.sequence[t - 1] || b.positions[t] != b.positions[t - 1] + 1) return false;
        if (by_page_ && b.positions[t] % program_.page_tokens == 0)
            return false;  // sees other keys quantized
        if (b.parents == nullptr || b.parents[t] == t - 1) return true;
        // Both see the cache below them; the later one must find the earlier one at its position
        return b.parents[t] == -1 && b.parents[t - 1] == -1 && b.places[t - 1] == b.positions[t - 1];
    };
    for (int32_t t = 0; t < b.token_count; ++t) {
        if (!blocks_.empty() && blocks_.back().count < kAttentionTokens && joins(t)) {
            ++blocks_.back().count;
        } else {
            blocks_.push_back({t, 1});
        }
    }
}

void StepBatch::path(const Block& block, int32_t* places) const {
    int32_t t = block.first + block.count - 1;
    const int32_t bend = bend_[static_cast<size_t>(t)];
    for (int32_t position = batch_->positions[t]; position >= bend; --position) {
        places[position - bend] = place(t);
        t = batch_->parents[t];
    }
}

}  // namespace edge
