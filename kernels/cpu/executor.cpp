#include "executor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "codec.h"

namespace edge {

Executor::Executor(const edge_program& program, const Kernels& kernels)
    : program_(program),
      kernels_(kernels),
      ops_(program.ops, program.ops + program.op_count),
      tables_(program.tables, program.tables + program.table_count),
      cache_(program.cache, program.cache + program.cache_count),
      stages_(compile(program, ops_, tables_, kernels)),
      batch_(program),
      open_(program),
      adapters_(program, ops_, stages_),
      chain_tokens_(static_cast<size_t>(program.max_sequences)),
      chain_positions_(static_cast<size_t>(program.max_sequences)),
      paths_(static_cast<size_t>(program.threads) * static_cast<size_t>(program.max_tokens)) {
    for (const edge_op& op : ops_)
        if (op.kind == EDGE_OP_ATTENTION &&
            static_cast<int64_t>(program.max_tokens) * op.heads > Pool::kMaxUnits)
            throw std::invalid_argument("too many tokens in a step");
    pool_ = std::make_unique<Pool>(program.threads, static_cast<uint32_t>(stages_.size()), *this);
}

int Executor::forward(edge_batch* batch) {
    int bad = batch_.take(batch);
    if (bad == EDGE_OK) bad = open_.begin(batch);
    if (bad != EDGE_OK) return bad;
    adapters_.take(batch_);
    status_.store(EDGE_OK);
    tokens_.store(batch->token_count);
    logit_rows_.store(batch->logit_count);
    block_count_.store(static_cast<int32_t>(batch_.blocks().size()));
    closing_count_.store(static_cast<int32_t>(open_.closings().size()));
    pool_->run();
    return status_.load();
}

int Executor::chain(edge_batch* batch, int32_t count, int32_t* out) {
    const int32_t n = batch->token_count;
    if (n > program_.max_sequences || batch->logit_count != n) {
        batch->index = 1;
        batch->value = batch->logit_count;
        return EDGE_BAD_SIZE;
    }
    std::copy(batch->tokens, batch->tokens + n, chain_tokens_.begin());
    std::copy(batch->positions, batch->positions + n, chain_positions_.begin());
    edge_batch step = *batch;
    step.tokens = chain_tokens_.data();
    step.positions = chain_positions_.data();
    for (int32_t i = 0; i < count; ++i, out += n) {
        const int status = forward(&step);
        batch->index = step.index;
        batch->value = step.value;
        if (status != EDGE_OK) return status;
        for (int32_t t = 0; t < n; ++t) {
            const auto at = static_cast<size_t>(t);
            out[t] = chain_tokens_[at] =
                kernels_.argmax(program_.scratch.logits + int64_t{t} * program_.vocab, program_.vocab);
            ++chain_positions_[at];
        }
    }
    return EDGE_OK;
}

void Executor::move(const int32_t* pages, const int32_t* sources, const int32_t* targets, int32_t count) {
    for (const edge_cache& cache : cache_) {
        for (int64_t head = 0; head < cache.kv_heads; ++head) {
            for (int32_t i = 0; i < count; ++i) {
                const int64_t from = row(cache, pages, head, sources[i]),
                              to = row(cache, pages, head, targets[i]);
                copy_kv_row(cache.k, from, to);
                copy_kv_row(cache.v, from, to);
            }
        }
    }
}

// Of a kv head's key or value at a place of the sequence with those pages.
int64_t Executor::row(const edge_cache& cache, const int32_t* pages, int64_t head, int32_t place) const {
    const int64_t page = pages[place / program_.page_tokens];
    return (page * cache.kv_heads + head) * program_.page_tokens + place % program_.page_tokens;
}

void Executor::fail(int status) {
    int none = EDGE_OK;
    status_.compare_exchange_strong(none, status);
}

uint32_t Executor::units(uint32_t stage) const {
    const Stage& s = stages_[stage];
    switch (s.kind) {
        case Stage::kTokens:
            return static_cast<uint32_t>(tokens_.load(std::memory_order_relaxed));
        case Stage::kLogitRows:
            return static_cast<uint32_t>(logit_rows_.load(std::memory_order_relaxed));
        case Stage::kLowRank:
            return adapters_.units(stage);
        case Stage::kLogits:
            return logit_rows_.load(std::memory_order_relaxed) == 0 ? 0 : s.units;
        case Stage::kLinear:
            return s.units;
        case Stage::kClose:
            return static_cast<uint32_t>(closing_count_.load(std::memory_order_relaxed) *
                                         s.attention->kv_heads);
        default: {
            const int32_t blocks = block_count_.load(std::memory_order_relaxed);
            return static_cast<uint32_t>(blocks * s.attention->kv_heads * head_parts(*s.attention, blocks));
        }
    }
}

void Executor::run(int thread, uint32_t stage, uint32_t unit) {
    const Stage& s = stages_[stage];
    switch (s.kind) {
        case Stage::kTokens:
        case Stage::kLogitRows:
            for (const TokenStep& step : s.steps) run_step(step, unit);
            break;
        case Stage::kLowRank:
            adapters_.run_in(kernels_, stage, unit, program_.scratch.rows);
            break;
        case Stage::kLinear:
            run_linear(s, unit, batch_->token_count);
            break;
        case Stage::kLogits:
            run_linear(s, unit, batch_->logit_count);
            break;
        case Stage::kClose:
            run_close(*s.attention, unit);
            break;
        case Stage::kAttention:
            run_attention(*s.attention, thread, unit);
            break;
    }
}

void Executor::run_step(const TokenStep& step, int64_t t) {
    const edge_op& op = *step.op;
    const edge_scratch& s = program_.scratch;
    switch (step.kind) {
        case TokenStep::kOp:
            run_op(op, t);
            break;
        case TokenStep::kAngles:
            fill_angles(op.vec, op.freqs, batch_->positions[t], op.scale, op.out + t * 2 * op.freqs);
            break;
        case TokenStep::kGather:
            std::memcpy(s.rows + t * op.x_width, op.x + batch_->logit_rows[t] * op.x_width,
                        static_cast<size_t>(op.x_width) * 4);
            break;
        case TokenStep::kQuantize: {
            const float* x = op.kind == EDGE_OP_LOGITS ? s.rows : op.x;
            const int64_t tokens = op.kind == EDGE_OP_LOGITS ? batch_->logit_count : batch_->token_count;
            const TokenBlock block = token_block(t, tokens, kernels_.largest_block);
            const int64_t lane = t - block.first;
            QuantizeArgs args{};
            args.x = x + t * op.x_width;
            args.n = op.x_width;
            args.padded = padded_cols(op.weight);
            args.group = op.weight.group;
            args.offset = kernels_.offset(op.weight.encoding);
            args.skip = op.weight.index;
            args.skips = op.weight.outliers;
            args.block = block.size;
            args.codes = s.codes + block.first * s.code_stride + 4 * lane;
            args.scales = s.scales + block.first * s.group_stride + lane;
            args.sums = s.sums + block.first * s.group_stride + lane;
            if (!kernels_.quantize(args)) fail(EDGE_NOT_FINITE);
            break;
        }
    }
}

void Executor::run_op(const edge_op& op, int64_t t) {
    const float* x = op.x + t * op.x_width;
    float* out = op.out + t * op.out_width;
    switch (op.kind) {
        case EDGE_OP_EMBED: {
            const int64_t row = batch_->tokens[t] - op.first;
            if (row >= 0 && row < op.weight.rows) read_row(op.weight, row, op.scale, out);
            break;
        }
        case EDGE_OP_INPUT: {
            const float* input = batch_->inputs + t * op.out_width;
            if (!all_finite(input, op.out_width)) return fail(EDGE_NOT_FINITE);
            std::memcpy(out, input, static_cast<size_t>(op.out_width) * 4);
            break;
        }
        case EDGE_OP_NORM_RMS:
        case EDGE_OP_NORM_LAYER:
            if (!kernels_.norm(op, x, out)) fail(EDGE_NOT_FINITE);
            break;
        case EDGE_OP_ROPE:
            kernels_.rope(op, tables_[static_cast<size_t>(op.angles)].out + t * 2 * op.freqs, out);
            break;
        case EDGE_OP_ADD:
            kernels_.add(x, op.y + t * op.x_width, op.scale, out, op.x_width);
            break;
        case EDGE_OP_GATHER:
            if (!all_finite(x, op.x_width)) return fail(EDGE_NOT_FINITE);  // also where it is not chosen
            for (int64_t j = 0; j < op.out_width; ++j) out[j] = x[static_cast<int64_t>(op.vec[j])];
            break;
        case EDGE_OP_ROUND_E4M3:
        case EDGE_OP_ROUND_I8:
            if (!kernels_.round(op.kind, op.scale, x, out, op.x_width)) fail(EDGE_NOT_FINITE);
            break;
        case EDGE_OP_KV_APPEND: {
            const edge_cache& cache = cache_[static_cast<size_t>(op.layer)];
            const int32_t token = static_cast<int32_t>(t);
            const float* v = op.y + t * op.x_width;
            if (cache.k.per_channel) {
                if (!all_finite(x, op.x_width)) fail(EDGE_NOT_FINITE);
                open_.append(*batch_, cache, token, x);
            }
            for (int64_t head = 0; head < cache.kv_heads; ++head) {
                const int64_t at = row(cache, batch_.pages(token), head, batch_.place(token));
                if (!cache.k.per_channel) write_row(cache.k, at, x + head * cache.head_dim, cache.head_dim);
                write_row(cache.v, at, v + head * cache.head_dim, cache.head_dim);
            }
            break;
        }
        default:
            kernels_.activation(op.kind, x, op.y == nullptr ? nullptr : op.y + t * op.x_width, out,
                                op.x_width);
    }
}

void Executor::write_row(const edge_kv& kv, int64_t row, const float* x, int n) {
    int status = EDGE_OK;
    if (kv.encoding == EDGE_ENC_I8 && n % 16 == 0) {
        int8_t* codes = reinterpret_cast<int8_t*>(kv.codes + row * kv.row_bytes);
        if (!kernels_.write_i8_row(x, n, codes, static_cast<float*>(kv.scale) + row))
            status = EDGE_NOT_FINITE;
    } else {
        status = write_kv_row(kv, row, x, n);
    }
    if (status != EDGE_OK) fail(status);
}

void Executor::run_linear(const Stage& stage, uint32_t unit, int64_t tokens) {
    const edge_scratch& s = program_.scratch;
    size_t at = 0;
    while (at + 1 < stage.linears.size() && unit >= stage.linears[at + 1].first_unit) ++at;
    const LinearUnit& linear = stage.linears[at];
    const edge_op& op = *linear.op;
    const bool logits = stage.kind == Stage::kLogits;
    LinearArgs args{};
    args.weight = &op.weight;
    args.bias = op.bias;
    args.out = op.out;
    args.x = logits ? s.rows : op.x;
    args.codes = s.codes;
    args.scales = s.scales;
    args.sums = s.sums;
    args.out_stride = op.out_width;
    args.x_stride = op.x_width;
    args.code_stride = s.code_stride;
    args.group_stride = s.group_stride;
    args.tokens = tokens;
    const int64_t begin = (unit - linear.first_unit) * linear.chunk;
    const int64_t end = std::min(begin + linear.chunk, linear.panels);
    linear.kernel(args, begin, end);
    adapters_.run_out(kernels_, op, begin, end);
    if (!logits) return;
    const int64_t row = begin * kPanel, rows = std::min(end * kPanel, op.weight.rows) - row;
    for (int64_t t = 0; t < tokens; ++t)
        if (!kernels_.finish_logits(op.out + t * op.out_width + row, rows, op.scale, op.softcap))
            fail(EDGE_NOT_FINITE);
}

// With fewer items than threads the query heads of a kv head are shared out as well.
int32_t Executor::head_parts(const edge_op& op, int32_t blocks) const {
    const int32_t items = blocks * op.kv_heads;
    if (items == 0 || items >= program_.threads) return 1;
    return std::min(op.heads / op.kv_heads, program_.threads / items);
}

void Executor::run_close(const edge_op& attention, uint32_t unit) {
    const uint32_t heads = static_cast<uint32_t>(attention.kv_heads);
    const int status = open_.close(*batch_, cache_[static_cast<size_t>(attention.layer)],
                                   open_.closings()[unit / heads], static_cast<int32_t>(unit % heads));
    if (status != EDGE_OK) fail(status);
}

void Executor::run_attention(const edge_op& op, int thread, uint32_t unit) {
    const int32_t share = op.heads / op.kv_heads, blocks = static_cast<int32_t>(batch_.blocks().size());
    const int32_t parts = head_parts(op, blocks);
    const int32_t item = static_cast<int32_t>(unit) / parts, part = static_cast<int32_t>(unit) % parts;
    const Block& block =
        batch_.blocks()[static_cast<size_t>(blocks - 1 - item / op.kv_heads)];  // longest first
    AttentionArgs args{};
    args.op = &op;
    args.cache = &cache_[static_cast<size_t>(op.layer)];
    args.page_table = batch_.pages(block.first);
    args.positions = batch_->positions + block.first;
    args.first = block.first;
    args.tokens = block.count;
    args.bend = batch_.bend(block);
    if (args.bend <= args.positions[block.count - 1]) {
        int32_t* path = paths_.data() + static_cast<int64_t>(thread) * program_.max_tokens;
        batch_.path(block, path);
        args.path = path;
    }
    args.kv_head = item % op.kv_heads;
    args.head_begin = args.kv_head * share + share * part / parts;
    args.head_end = args.kv_head * share + share * (part + 1) / parts;
    args.page_tokens = program_.page_tokens;
    args.scratch = program_.scratch.attention + thread * program_.scratch.attention_stride;
    if (open_.any()) {
        const OpenPages::Run& run = open_.run(batch_->sequence[block.first]);
        args.open = open_.keys(*args.cache, run, args.positions[0] / program_.page_tokens) +
                    static_cast<int64_t>(args.kv_head) * args.cache->head_dim;
    }
    kernels_.attention(args);
}

}  // namespace edge
