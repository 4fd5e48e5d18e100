/* C ABI of the cpu backend: POD records in, one call per forward pass. edge_runtime/backends/cpu.py mirrors
 * them.
 *
 * All memory (weights, KV arena, buffers, scratch) belongs to the caller; the library allocates only its own
 * handle and threads, both in edge_cpu_create.
 */
#ifndef EDGE_CPU_H
#define EDGE_CPU_H

#include <stdint.h>

#include "edge_formats.h" /* EDGE_ENC_*, generated from the format table */

#ifdef __cplusplus
extern "C" {
#endif

#define EDGE_CPU_VERSION 9 /* of these records; a change of a field or of what it points to raises it */

/* What one scale covers. Row and tensor scales are f32. */
enum edge_scale { EDGE_SCALE_NONE, EDGE_SCALE_GROUP, EDGE_SCALE_ROW, EDGE_SCALE_TENSOR };

enum edge_op_kind {
    EDGE_OP_EMBED,
    EDGE_OP_NORM_RMS,
    EDGE_OP_NORM_LAYER,
    EDGE_OP_LINEAR,
    EDGE_OP_ROPE,
    EDGE_OP_KV_APPEND,
    EDGE_OP_ATTENTION,
    EDGE_OP_SILU,
    EDGE_OP_GELU,
    EDGE_OP_GELU_TANH,
    EDGE_OP_RELU,
    EDGE_OP_ADD,
    EDGE_OP_LOGITS,
    EDGE_OP_INPUT, /* of the batch; only as the first op */
    EDGE_OP_GATHER,
    EDGE_OP_ROUND_E4M3, /* with op.scale, or the token's own where it is 0 */
    EDGE_OP_ROUND_I8,
};

enum edge_simd { EDGE_SIMD_AUTO, EDGE_SIMD_SCALAR, EDGE_SIMD_AVX2, EDGE_SIMD_AVX512, EDGE_SIMD_NEON };

enum edge_status {
    EDGE_OK = 0,
    EDGE_NOT_FINITE = 1,   /* NaN or Inf in an activation, key, value or logit */
    EDGE_OUT_OF_RANGE = 2, /* a key or value that the KV format cannot hold */
    EDGE_BAD_TOKEN = 3,    /* index = row of the batch, value = what was found */
    EDGE_BAD_POSITION = 4,
    EDGE_BAD_SEQUENCE = 5,
    EDGE_BAD_PAGE = 6,
    EDGE_BAD_LOGIT_ROW = 7,
    EDGE_TWICE = 8,       /* a second token at the same place of a sequence */
    EDGE_BAD_SIZE = 9,    /* index says which count: 0 tokens, 1 logit rows, 2 sequences */
    EDGE_BAD_PARENT = 10, /* no earlier row of the sequence, one position before */
    EDGE_BAD_PLACE = 11,  /* beyond the context or page table, or below what the token sees of the cache */
    /* Where K is per channel: */
    EDGE_BAD_SLOT = 12, /* index = sequence, value = its slot: out of range, or another sequence's */
    EDGE_BAD_RUN = 13,  /* a sequence's tokens are not one run of consecutive positions */
    EDGE_NOT_HELD = 14, /* the page that a run continues is not in its slot */
};

/* A packed matrix, see edge_runtime/engine/packing.py (n16k4 for integer codes, n16 for the others). */
typedef struct edge_matrix {
    const void* codes;
    const void* scale;
    const uint8_t* zero;
    int64_t rows, cols;
    int32_t encoding, scale_per; /* EDGE_ENC_* of the codes' lower bits, EDGE_SCALE_* */
    int32_t group, high_bits;    /* columns are padded to whole groups, and to 32 */
    const void* high;            /* higher bits of the codes, high_bits each; NULL when codes has all */
    const void* min;             /* minima of the groups */
    const void* super;     /* f16 of every EDGE_SUPER columns; with E4M3 scales one f32 for the tensor */
    const void* super_min; /* f16 of every EDGE_SUPER columns */
    const float* second;   /* with DYNAMIC8 scales: what multiplies them, one of every EDGE_SECOND columns */
    const float* offset;   /* and what is then added, one for the tensor */
    const void* outlier;   /* f16 columns [panel][outliers][16 rows] that the codes leave out, or NULL */
    const int32_t* index;  /* (outliers) their numbers, ascending, then -1 for none */
    int32_t outliers, scale_encoding; /* EDGE_ENC_* of the scales of groups */
} edge_matrix;

/* One side (k or v) of a cache slot; a row is one (page, kv head, token) of head_dim values, or per channel
 * one (page, kv head, channel) of page_tokens values with one scale. */
typedef struct edge_kv {
    uint8_t* codes;
    void* scale;
    uint8_t* zero;
    int32_t encoding, row_bytes, row_scales, group;
    int32_t per_channel, unused;
} edge_kv;

typedef struct edge_cache {
    edge_kv k, v;
    int32_t kv_heads, head_dim;
    float* open; /* unquantized keys of open pages where K is per channel, as kv.py's OpenArrays.pages */
} edge_cache;

/* One op. Buffers hold `width` f32 values per token; what an op does not use is zero. */
typedef struct edge_op {
    int32_t kind, layer;
    const float* x;
    const float* y; /* second input: v of kv_append, up of an activation, b of add */
    float* out;
    const float* vec; /* norm weight; inv_freq of rope; columns of gather */
    const float* bias;
    edge_matrix weight;
    int64_t x_width, out_width;
    int32_t group, heads, kv_heads, head_dim;
    int32_t window, freqs;     /* window 0 = none */
    float eps, scale, softcap; /* softcap 0 = none */
    int32_t angles;            /* rope: index of the cos/sin table in scratch.angles */
    int32_t first, unused;     /* embed: the id of the weight's first row; other ids leave out as it is */
} edge_op;

/* Regions of engine/memory.py's scratch_regions; all 64-byte aligned. */
typedef struct edge_scratch {
    int8_t* codes;    /* (tokens, code_stride) */
    float* scales;    /* (tokens, group_stride) */
    int32_t* sums;    /* (tokens, group_stride) */
    float* attention; /* (threads, attention_stride) */
    float* angles;    /* per table: (tokens, 2*freqs): cos then sin */
    float* rows;      /* (logits, hidden) */
    float* logits;    /* (logits, vocab) */
    float* fresh; /* (tokens, kv_heads * head_dim) of the layer at work: keys of the step, K per channel */
    int64_t code_stride, group_stride, attention_stride;
} edge_scratch;

typedef struct edge_program {
    const edge_op* ops;
    const edge_cache* cache;
    const edge_op* tables; /* one rope op for each cos/sin table */
    edge_scratch scratch;
    int32_t op_count, cache_count, table_count;
    int32_t vocab, context, page_tokens, pages;
    int32_t max_tokens, max_sequences, max_logits;
    int32_t threads, simd;
} edge_program;

typedef struct edge_batch {
    const int32_t* tokens;
    const int32_t* positions;
    const int32_t* sequence;
    const int32_t* page_tables; /* (sequences, pages_per_sequence) */
    const int32_t* logit_rows;
    const int32_t* parents;  /* of a tree of tokens: row of the token before, -1 = in the cache; or NULL */
    const int32_t* places;   /* where each token's key lies; NULL exactly when parents is: at its position */
    const int32_t* slots;    /* (sequences), NULL = the row; only read where K is per channel */
    const int32_t* adapters; /* (sequences) number of the adapter that each uses, -1 = none; or NULL */
    const float* inputs;     /* (tokens, width of the input op); NULL exactly when the program has none */
    int32_t token_count, sequence_count, pages_per_sequence, logit_count;
    int32_t index, value; /* out: what was wrong */
} edge_batch;

/* What an adapter adds to one linear or logits op: scale * B (A x). */
typedef struct edge_low_rank {
    int32_t op, rank; /* index of the op */
    int32_t offset;   /* of its A x in a row of edge_adapter.u, whole EDGE_RANK_ROWS */
    float scale;
    const uint16_t* a; /* f16 [rank / EDGE_RANK_ROWS][cols / 16][EDGE_RANK_ROWS][16], padded with zeros */
    const uint16_t* b; /* f16 [rows / 16][rank][16], padded with zeros */
} edge_low_rank;

typedef struct edge_adapter {
    const edge_low_rank* items;
    float* u; /* (max_tokens or max_logits if there are more, stride) */
    int64_t stride;
    int32_t count, unused;
} edge_adapter;

enum { EDGE_RANK_ROWS = 8 };

#pragma GCC visibility push(default)

/* Hash over every number format, edge_runtime.engine.formats.abi_hash(). */
uint64_t edge_cpu_abi(void);
/* EDGE_CPU_VERSION << 32 | sizeof(edge_op) << 16 | sizeof(edge_program): a stale mirror is refused. */
uint64_t edge_cpu_records(void);
/* Bit i set: SIMD path i of edge_simd runs on this CPU. */
uint32_t edge_cpu_features(void);
/* f32 values of attention scratch that one thread needs. */
int64_t edge_cpu_attention_floats(int32_t heads_per_kv, int32_t head_dim);

typedef struct edge_executor edge_executor;
/* NULL when a weight's format has no kernel, or memory or threads ran out. */
edge_executor* edge_cpu_create(const edge_program* program);
int32_t edge_cpu_forward(edge_executor* executor, edge_batch* batch);
/* `count` steps with one token and one row of logits for each sequence, the likeliest token of each fed to
 * the next step at the next position: out (count, tokens). Stops at the first step that fails. */
int32_t edge_cpu_chain(edge_executor* executor, edge_batch* batch, int32_t count, int32_t* out);
/* Keys and values of one sequence, from places to places; both ascend, sources[i] >= targets[i]. Unchecked.
 */
void edge_cpu_move(edge_executor* executor, const int32_t* pages, const int32_t* sources,
                   const int32_t* targets, int32_t count);
/* Puts an adapter under a number or, with NULL, takes it away. The library keeps the pointers, not the items.
 * Returns 0 when memory ran out. A batch may name only numbers in use. */
int32_t edge_cpu_set_adapter(edge_executor* executor, int32_t number, const edge_adapter* adapter);
void edge_cpu_destroy(edge_executor* executor);
/* Trellis codes of `bits` (2, 3 or 4) and their levels that miss the targets least: weights * (target -
 * level)^2 summed over each chain; all (chains, rows). With the kernels of `simd`. For the builder; keeps
 * nothing. Returns 0 where there are no such kernels. */
int32_t edge_cpu_trellis_search(int32_t bits, int64_t rows, int64_t chains, const float* targets,
                                const float* weights, uint8_t* codes, float* levels, int32_t simd);

#pragma GCC visibility pop

#ifdef __cplusplus
}
#endif
#endif
