// The table of kernels that each instruction set fills; executor.cpp calls nothing else of theirs.
#pragma once

#include <cstdint>

#include "edge_cpu.h"

namespace edge {

constexpr int kPanel = EDGE_PANEL_ROWS;  // rows of a packed panel, one a lane

// Tokens that a kernel computes together: as many blocks of the largest size as there are, then 4, 2 and 1.
struct TokenBlock {
    int64_t first, size;
};

inline TokenBlock token_block(int64_t token, int64_t tokens, int64_t largest) {
    int64_t first = 0;
    for (int64_t size = largest; size > 1; size /= 2) {
        const int64_t end = first + (tokens - first) / size * size;
        if (token < end) return {first + (token - first) / size * size, size};
        first = end;
    }
    return {token, 1};
}

// One matrix times `tokens` rows. Integer formats read codes, scales and sums; the others x.
// The codes of a block of tokens lie together as [k / 4][token of the block][4 inputs], its scales and sums
// as [group][token of the block], so that one pointer with constant offsets reaches all of them.
struct LinearArgs {
    const edge_matrix* weight;
    const float* bias;
    float* out;      // (tokens, out_stride)
    const float* x;  // (tokens, x_stride)
    const int8_t*
        codes;  // x quantized per group, zero-padded; a block starts at its first token * code_stride
    const float* scales;  // a block starts at its first token * group_stride
    const int32_t* sums;  // -offset * the sum of the codes of each group
    int64_t out_stride, x_stride, code_stride, group_stride, tokens;
};

// Computes the panels [begin, end) for all tokens. A result depends on nothing but its token and row.
using LinearKernel = void (*)(const LinearArgs& args, int64_t begin, int64_t end);

// Queries of consecutive tokens of one sequence that share one kv head.
constexpr int kAttentionTokens = 4;

struct AttentionArgs {
    const edge_op* op;
    const edge_cache* cache;
    const int32_t* page_table;          // of the sequence
    const int32_t* positions;           // of the tokens
    int64_t first;                      // row of the first token in q and out
    int tokens;                         // 1..kAttentionTokens, positions ascending by one
    const int32_t* path;                // places of the keys at positions bend, bend + 1, ...; nullptr = none
    int bend;                           // below it keys lie at their positions
    int kv_head, head_begin, head_end;  // query heads, all of kv_head's group
    int page_tokens;
    float* scratch;
    // Where K is per channel: the keys of the tokens' page, which is one for all, as they came: rows of
    // kv_heads
    // * head_dim values, beginning with kv_head's.
    const float* open;
};

// x (n) of one token -> codes, scales and sums of every group up to `padded`; false on NaN or Inf.
struct QuantizeArgs {
    const float* x;
    int64_t n, padded;
    int group;
    int32_t offset;
    const int32_t* skip;  // (skips) columns that get the code 0, ascending; -1 ends them before
    int64_t skips;
    int64_t block;  // tokens of the token's block; the pointers are those of the token's first four codes
    int8_t* codes;
    float* scales;
    int32_t* sums;
};

constexpr int kRankRows = EDGE_RANK_ROWS;  // of A in one unit of work

// A low-rank update of consecutive tokens with one adapter: u = A x, out += scale * B u.
struct LowRankArgs {
    const uint16_t* weight;  // A: [rank / 8][cols / 16][8 rows][16]; B: [rows / 16][rank][16 rows]; f16
    const float* x;          // (tokens, x_stride)
    float* u;                // (tokens, u_stride)
    float* out;              // (tokens, out_stride)
    int64_t x_stride, u_stride, out_stride, tokens;
    int64_t cols, rank, rows;
    float scale;
};

// The trellis codes of `bits`, and their levels, that miss the targets least, see
// trellis_search.cpp: the sum over each
// chain of weights * (target - level)^2. All (chains, rows).
struct TrellisArgs {
    int bits;
    int64_t rows, chains;
    const float *targets, *weights;
    uint8_t* codes;
    float* levels;
};

struct Kernels {
    int simd;  // edge_simd
    // The kernel for a weight's format, or nullptr.
    LinearKernel (*linear)(const edge_matrix& weight);
    int64_t largest_block;  // of tokens
    // What the kernels of an encoding want each code's sum multiplied by.
    int32_t (*offset)(int encoding);
    bool (*quantize)(const QuantizeArgs& args);
    // false when a mean square is not finite: NaN or Inf in x, or squares beyond f32, which would give zeros.
    bool (*norm)(const edge_op& op, const float* x, float* out);
    void (*activation)(int kind, const float* x, const float* up, float* out, int64_t n);
    void (*add)(const float* a, const float* b, float scale, float* out, int64_t n);
    // To E4M3 or int8 with a scale, or with the row's own where it is 0; false on NaN or Inf.
    bool (*round)(int kind, float scale, const float* x, float* out, int64_t n);
    // cs: cos then sin of each frequency
    void (*rope)(const edge_op& op, const float* cs, float* x);
    void (*attention)(const AttentionArgs& args);
    // u of the rows [begin, end) of A, whole kRankRows
    void (*low_rank_in)(const LowRankArgs& args, int64_t begin, int64_t end);
    // the panels [begin, end) of B
    void (*low_rank_out)(const LowRankArgs& args, int64_t begin, int64_t end);
    // y[i] = softcap(scale * y[i]) in place; false on NaN or Inf.
    bool (*finish_logits)(float* y, int64_t n, float scale, float softcap);
    // A row of an int8 cache side, n whole vectors; false on NaN or Inf, and nothing is written.
    bool (*write_i8_row)(const float* x, int n, int8_t* codes, float* scale);
    // The first of the greatest of n finite values.
    int32_t (*argmax)(const float* y, int64_t n);
    void (*trellis_search)(const TrellisArgs& args);
};

// nullptr where the library was built for another processor.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* neon_kernels();

// f32 values of scratch for one attention item.
int64_t attention_floats(int heads_per_kv, int head_dim);

// Bits of an item of a plane of codes, 0 for an encoding that is none.
inline int code_bits(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U2:
        case EDGE_ENC_U2O2:
        case EDGE_ENC_U2O4:
        case EDGE_ENC_TCQ2:
        case EDGE_ENC_TCQ3:
            return 2;
        case EDGE_ENC_U4:
        case EDGE_ENC_U4O8:
        case EDGE_ENC_U4O16:
        case EDGE_ENC_U4O32:
        case EDGE_ENC_E2M1:
        case EDGE_ENC_TCQ4:
        case EDGE_ENC_NF4:
            return 4;
        case EDGE_ENC_I8:
        case EDGE_ENC_E4M3:
        case EDGE_ENC_E5M2:
            return 8;
        case EDGE_ENC_F16:
        case EDGE_ENC_BF16:
            return 16;
        case EDGE_ENC_F32:
            return 32;
        default:
            return 0;
    }
}

// Whether kernels multiply codes of this encoding with int8 activations.
inline bool quantizes(int encoding) {
    const int bits = code_bits(encoding);
    return encoding == EDGE_ENC_I8 || ((bits == 2 || bits == 4) && encoding != EDGE_ENC_NF4);
}

// Columns that a packed row is padded to a multiple of, see engine/packing.py.
inline int64_t unit_of(const edge_matrix& w) {
    return w.group > EDGE_SMALLEST_UNIT ? w.group : EDGE_SMALLEST_UNIT;
}

}  // namespace edge
