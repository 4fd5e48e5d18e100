// The table of kernels that each instruction set fills; executor.cpp calls nothing else of theirs.
#pragma once

#include <cstdint>

#include "edge_cpu.h"

namespace edge {

constexpr int kPanel = EDGE_PANEL_ROWS;  // rows of a packed panel, one a lane

// One matrix times `tokens` rows. Integer formats read codes, scales and sums; the others x.
struct LinearArgs {
    const edge_matrix* weight;
    const float* bias;
    float* out;           // (tokens, out_stride)
    const float* x;       // (tokens, x_stride)
    const int8_t* codes;  // (tokens, code_stride): x quantized per group, zero-padded
    const float* scales;  // (tokens, group_stride)
    const int32_t* sums;  // (tokens, group_stride): sum of the codes of each group
    int64_t out_stride, x_stride, code_stride, group_stride, tokens;
};

// Computes the panels [begin, end) for all tokens. A result depends on nothing but its token and row.
using LinearKernel = void (*)(const LinearArgs& args, int64_t begin, int64_t end);

// Queries of consecutive tokens of one sequence that share one kv head.
constexpr int kAttentionTokens = 4;

struct AttentionArgs {
    const edge_op* op;
    const edge_cache* cache;
    const int32_t* page_table;  // of the sequence
    const int32_t* positions;   // of the tokens
    int64_t first;              // row of the first token in q and out
    int tokens;                 // 1..kAttentionTokens, positions ascending by one
    int kv_head, head_begin, head_end;  // query heads, all of kv_head's group
    int page_tokens;
    float* scratch;
};

struct Kernels {
    int simd;  // edge_simd
    // The kernel for a weight's format, or nullptr.
    LinearKernel (*linear)(const edge_matrix& weight);
    // x (n) -> codes, scales and sums of every group up to `padded`; false on NaN or Inf.
    bool (*quantize)(const float* x, int64_t n, int group, int64_t padded, int8_t* codes, float* scales,
                     int32_t* sums);
    void (*norm)(const edge_op& op, const float* x, float* out);
    void (*activation)(int kind, const float* x, const float* up, float* out, int64_t n);
    void (*add)(const float* a, const float* b, float scale, float* out, int64_t n);
    // cs: cos then sin of each frequency
    void (*rope)(const edge_op& op, const float* cs, float* x);
    void (*attention)(const AttentionArgs& args);
    // y[i] = softcap(scale * y[i]) in place; false on NaN or Inf.
    bool (*finish_logits)(float* y, int64_t n, float scale, float softcap);
};

// nullptr where the library was built for another processor.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// f32 values of scratch for one attention item.
int64_t attention_floats(int heads_per_kv, int head_dim);

inline bool quantizes(int encoding) {
    return encoding == EDGE_ENC_I8 || encoding == EDGE_ENC_U4O8 || encoding == EDGE_ENC_U4;
}

}  // namespace edge
