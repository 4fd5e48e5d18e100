#include "executor.h"

#include <algorithm>
#include <cstring>
#include <stdexcept>

#include "codec.h"

namespace edge {
namespace {

constexpr int64_t kChunkBytes = 128 << 10;  // weights of one unit of work: stay in L2 while token blocks pass

int64_t panels_of(const edge_matrix& w) { return (w.rows + kPanel - 1) / kPanel; }

int64_t padded_cols(const edge_matrix& w) { return (w.cols + w.group - 1) / w.group * w.group; }

// Whether `b` reads the same activations as `a`, in the same codes.
bool shares_input(const edge_op& a, const edge_op& b) {
    if (b.kind != EDGE_OP_LINEAR || b.x != a.x) return false;
    if (quantizes(a.weight.encoding) != quantizes(b.weight.encoding)) return false;
    return !quantizes(a.weight.encoding) ||
           (a.weight.group == b.weight.group && a.weight.encoding == b.weight.encoding);
}

int64_t panel_bytes(const edge_matrix& w) {
    const int64_t items = padded_cols(w) * kPanel;
    switch (w.encoding) {
        case EDGE_ENC_F32:
            return items * 4;
        case EDGE_ENC_F16:
        case EDGE_ENC_BF16:
            return items * 2;
        case EDGE_ENC_U4O8:
        case EDGE_ENC_U4:
        case EDGE_ENC_NF4:
            return items / 2;
        default:
            return items;
    }
}

}  // namespace

Executor::Executor(const edge_program& program, const Kernels& kernels)
    : program_(program),
      kernels_(kernels),
      ops_(program.ops, program.ops + program.op_count),
      tables_(program.tables, program.tables + program.table_count),
      cache_(program.cache, program.cache + program.cache_count),
      blocks_(static_cast<size_t>(program.max_tokens)),
      last_position_(static_cast<size_t>(program.max_sequences)) {
    blocks_.clear();
    compile();
    pool_ = std::make_unique<Pool>(program.threads, static_cast<uint32_t>(stages_.size()), *this);
}

void Executor::compile() {
    for (const edge_op& op : ops_) {
        if (op.kind != EDGE_OP_ATTENTION) continue;
        if (static_cast<int64_t>(program_.max_tokens) * op.heads > Pool::kMaxUnits)
            throw std::invalid_argument("too many tokens in a step");
        widest_window_ = std::max(widest_window_, op.window > 0 ? op.window : program_.context);
    }
    Stage tokens{};
    tokens.kind = Stage::kTokens;
    for (const edge_op& table : tables_) tokens.steps.push_back({TokenStep::kAngles, &table});
    std::vector<Region> used;  // by the steps of `tokens`
    const auto flush = [&] {
        if (!tokens.steps.empty()) stages_.push_back(std::move(tokens));
        tokens = Stage{};
        tokens.kind = Stage::kTokens;
        used.clear();
    };
    const edge_op* const end = ops_.data() + ops_.size();
    for (const edge_op* op = ops_.data(); op < end; ++op) {
        if (op->kind != EDGE_OP_LINEAR && op->kind != EDGE_OP_ATTENTION && op->kind != EDGE_OP_LOGITS) {
            const Region out = region(op->out, op->out_width);
            // A dead buffer's bytes may be written again in another width: first all tokens must be done with
            // it.
            if (clashes(out, used)) flush();
            tokens.steps.push_back({TokenStep::kOp, op});
            used.push_back(region(op->x, op->x_width));
            used.push_back(region(op->y, op->x_width));
            used.push_back(out);
            continue;
        }
        const bool logits = op->kind == EDGE_OP_LOGITS;
        const bool quantized = op->kind != EDGE_OP_ATTENTION && quantizes(op->weight.encoding);
        if (quantized && !logits) tokens.steps.push_back({TokenStep::kQuantize, op});
        flush();
        if (op->kind == EDGE_OP_ATTENTION) {
            Stage stage{};
            stage.kind = Stage::kAttention;
            stage.attention = op;
            stages_.push_back(std::move(stage));
        } else if (logits) {
            Stage rows{};
            rows.kind = Stage::kLogitRows;
            rows.steps.push_back({TokenStep::kGather, op});
            if (quantized) rows.steps.push_back({TokenStep::kQuantize, op});
            stages_.push_back(std::move(rows));
            add_linears(op, op + 1, true);
        } else {  // matrices that read the same codes, or none, run together
            const edge_op* last = op + 1;
            std::vector<Region> outs = {region(op->out, op->out_width)};
            for (; last < end && shares_input(*op, *last); ++last) {
                const Region out = region(last->out, last->out_width);
                if (touches(out, outs)) break;
                outs.push_back(out);
            }
            add_linears(op, last, false);
            op = last - 1;
        }
    }
}

Executor::Region Executor::region(const float* buffer, int64_t width) const {
    return {buffer, buffer == nullptr ? nullptr : buffer + program_.max_tokens * width, width};
}

bool Executor::touches(const Region& a, const std::vector<Region>& others) {
    return std::any_of(others.begin(), others.end(),
                       [&](const Region& b) { return a.begin < b.end && b.begin < a.end; });
}

bool Executor::clashes(const Region& a, const std::vector<Region>& others) {
    return std::any_of(others.begin(), others.end(), [&](const Region& b) {
        return a.begin < b.end && b.begin < a.end && (a.begin != b.begin || a.width != b.width);
    });
}

void Executor::add_linears(const edge_op* begin, const edge_op* end, bool logits) {
    Stage stage{};
    stage.kind = logits ? Stage::kLogits : Stage::kLinear;
    for (const edge_op* op = begin; op < end; ++op) {
        const LinearKernel kernel = kernels_.linear(op->weight);
        if (kernel == nullptr) throw std::invalid_argument("no kernel for a weight's format");
        const int64_t panels = panels_of(op->weight);
        int64_t chunk = kChunkBytes / std::max<int64_t>(1, panel_bytes(op->weight));
        if (program_.threads > 1) chunk = std::min(chunk, panels / (4 * program_.threads));
        chunk = std::max<int64_t>(1, chunk);
        stage.linears.push_back({op, kernel, panels, chunk, stage.units});
        stage.units += static_cast<uint32_t>((panels + chunk - 1) / chunk);
    }
    stages_.push_back(std::move(stage));
}

int Executor::forward(edge_batch* batch) {
    const int bad = check(batch);
    if (bad != EDGE_OK) return bad;
    find_blocks(*batch);
    batch_ = batch;
    status_.store(EDGE_OK);
    tokens_.store(batch->token_count);
    logit_rows_.store(batch->logit_count);
    block_count_.store(static_cast<int32_t>(blocks_.size()));
    pool_->run();
    batch_ = nullptr;
    return status_.load();
}

int Executor::check(edge_batch* batch) {
    const int32_t counts[3] = {batch->token_count, batch->logit_count, batch->sequence_count};
    const int32_t most[3] = {program_.max_tokens, program_.max_logits, program_.max_sequences};
    for (int i = 0; i < 3; ++i) {
        if (counts[i] < (i == 0 ? 1 : 0) || counts[i] > most[i] || batch->pages_per_sequence < 0) {
            batch->index = i;
            batch->value = counts[i];
            return EDGE_BAD_SIZE;
        }
    }
    std::fill(last_position_.begin(), last_position_.end(), -1);
    for (int32_t t = 0; t < batch->token_count; ++t) {
        batch->index = t;
        const int bad = check_token(*batch, t, &batch->value);
        if (bad != EDGE_OK) return bad;
    }
    for (int32_t i = 0; i < batch->logit_count; ++i) {
        batch->index = i;
        batch->value = batch->logit_rows[i];
        if (batch->value < 0 || batch->value >= batch->token_count) return EDGE_BAD_LOGIT_ROW;
        if (i > 0 && batch->value <= batch->logit_rows[i - 1]) return EDGE_BAD_LOGIT_ROW;
    }
    return EDGE_OK;
}

int Executor::check_token(const edge_batch& batch, int32_t t, int32_t* value) {
    *value = batch.tokens[t];
    if (*value < 0 || *value >= program_.vocab) return EDGE_BAD_TOKEN;
    const int32_t sequence = *value = batch.sequence[t];
    if (sequence < 0 || sequence >= batch.sequence_count) return EDGE_BAD_SEQUENCE;
    const int32_t position = *value = batch.positions[t];
    if (position < 0 || position >= program_.context) return EDGE_BAD_POSITION;
    const int32_t page = position / program_.page_tokens;
    if (page >= batch.pages_per_sequence) return EDGE_BAD_POSITION;
    if (position <= last_position_[static_cast<size_t>(sequence)]) {  // out of order: look for a second one
        for (int32_t other = 0; other < t; ++other)
            if (batch.sequence[other] == sequence && batch.positions[other] == position) return EDGE_TWICE;
    }
    int32_t& last = last_position_[static_cast<size_t>(sequence)];
    last = std::max(last, position);
    // Every page from the earliest that the widest window reaches
    const int32_t first = std::max(0, position - widest_window_ + 1) / program_.page_tokens;
    const int32_t* table = batch.page_tables + static_cast<int64_t>(sequence) * batch.pages_per_sequence;
    for (int32_t i = first; i <= page; ++i) {
        *value = table[i];
        if (*value < 0 || *value >= program_.pages) return EDGE_BAD_PAGE;
    }
    return EDGE_OK;
}

void Executor::find_blocks(const edge_batch& batch) {
    blocks_.clear();
    for (int32_t t = 0; t < batch.token_count; ++t) {
        const bool joins = !blocks_.empty() && blocks_.back().count < kAttentionTokens &&
                           batch.sequence[t] == batch.sequence[t - 1] &&
                           batch.positions[t] == batch.positions[t - 1] + 1;
        if (joins) {
            ++blocks_.back().count;
        } else {
            blocks_.push_back({t, 1});
        }
    }
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
        case Stage::kLogits:
            return logit_rows_.load(std::memory_order_relaxed) == 0 ? 0 : s.units;
        case Stage::kLinear:
            return s.units;
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
        case Stage::kLinear:
            run_linear(s, unit, batch_->token_count);
            break;
        case Stage::kLogits:
            run_linear(s, unit, batch_->logit_count);
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
        case EDGE_OP_EMBED:
            read_row(op.weight, batch_->tokens[t], op.scale, out);
            break;
        case EDGE_OP_NORM_RMS:
        case EDGE_OP_NORM_LAYER:
            kernels_.norm(op, x, out);
            break;
        case EDGE_OP_ROPE:
            kernels_.rope(op, tables_[static_cast<size_t>(op.angles)].out + t * 2 * op.freqs, out);
            break;
        case EDGE_OP_ADD:
            kernels_.add(x, op.y + t * op.x_width, op.scale, out, op.x_width);
            break;
        case EDGE_OP_KV_APPEND: {
            const edge_cache& cache = cache_[static_cast<size_t>(op.layer)];
            const int32_t position = batch_->positions[t];
            const int32_t* table =
                batch_->page_tables + static_cast<int64_t>(batch_->sequence[t]) * batch_->pages_per_sequence;
            const int64_t page = table[position / program_.page_tokens];
            const float* v = op.y + t * op.x_width;
            for (int64_t head = 0; head < cache.kv_heads; ++head) {
                const int64_t row =
                    (page * cache.kv_heads + head) * program_.page_tokens + position % program_.page_tokens;
                const int k_status = write_kv_row(cache.k, row, x + head * cache.head_dim, cache.head_dim);
                const int v_status = write_kv_row(cache.v, row, v + head * cache.head_dim, cache.head_dim);
                if (k_status != EDGE_OK) fail(k_status);
                if (v_status != EDGE_OK) fail(v_status);
            }
            break;
        }
        default:
            kernels_.activation(op.kind, x, op.y == nullptr ? nullptr : op.y + t * op.x_width, out,
                                op.x_width);
    }
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

void Executor::run_attention(const edge_op& op, int thread, uint32_t unit) {
    const int32_t share = op.heads / op.kv_heads, blocks = static_cast<int32_t>(blocks_.size());
    const int32_t parts = head_parts(op, blocks);
    const int32_t item = static_cast<int32_t>(unit) / parts, part = static_cast<int32_t>(unit) % parts;
    const Block& block = blocks_[static_cast<size_t>(blocks - 1 - item / op.kv_heads)];  // longest first
    AttentionArgs args{};
    args.op = &op;
    args.cache = &cache_[static_cast<size_t>(op.layer)];
    args.page_table = batch_->page_tables +
                      static_cast<int64_t>(batch_->sequence[block.first]) * batch_->pages_per_sequence;
    args.positions = batch_->positions + block.first;
    args.first = block.first;
    args.tokens = block.count;
    args.kv_head = item % op.kv_heads;
    args.head_begin = args.kv_head * share + share * part / parts;
    args.head_end = args.kv_head * share + share * (part + 1) / parts;
    args.page_tokens = program_.page_tokens;
    args.scratch = program_.scratch.attention + thread * program_.scratch.attention_stride;
    kernels_.attention(args);
}

}  // namespace edge
