/* What host and device code of the cuda backend share: the argument record of each kernel. A kernel takes one
 * record by value; edge_runtime/backends/cuda/records.py mirrors them. Addresses are device addresses. All
 * buffers of values are f32 rows (tokens, width) in C order.
 */
#ifndef EDGE_CUDA_H
#define EDGE_CUDA_H

#ifdef __CUDACC_RTC__
typedef signed char int8_t;
typedef unsigned char uint8_t;
typedef short int16_t;
typedef unsigned short uint16_t;
typedef int int32_t;
typedef unsigned int uint32_t;
typedef long long int64_t;
typedef unsigned long long uint64_t;
#else
#include <stdint.h>
#endif

#include "edge_formats.h" /* generated from the format table */

/* Bits of a step's status word, which kernels only ever raise (atomicOr). */
enum edge_cuda_status {
    EDGE_CUDA_NOT_FINITE = 1,   /* NaN or Inf in an activation, key, value or logit */
    EDGE_CUDA_OUT_OF_RANGE = 2, /* a key or value that the KV format cannot hold */
};

enum edge_cuda_count {
    EDGE_TOKENS,
    EDGE_SEQUENCES,
    EDGE_LOGITS,
    EDGE_TABLE_STRIDE,
    EDGE_CHAIN_STEP, /* steps of the running chain that `advance` has ended: the next row of its history */
    EDGE_COUNTS = 16
};

/* The running step, in device memory: what changes from step to step is read from here, so that a captured
 * graph serves every step of its size. Rows at and beyond counts[EDGE_TOKENS] hold nothing and are skipped.
 */
struct EdgeStep {
    int32_t* counts;         /* (EDGE_COUNTS), by edge_cuda_count */
    int32_t* tokens;         /* (T) ids */
    int32_t* positions;      /* (T) */
    const int32_t* sequence; /* (T) row of page_tables */
    int32_t* places;         /* (T) where the token's key lies; its position unless in a tree */
    const int32_t* parents;  /* (T) row of the token one position before, -1 = it is in the cache */
    const int32_t* bends;    /* (T) first position whose key lies where an ancestor was put, INT_MAX = none */
    const int32_t* page_tables; /* (S, counts[EDGE_TABLE_STRIDE]) page of each run of a sequence */
    const int32_t* logit_rows;  /* (L) */
    uint32_t* status;
};

/* Inputs of linear ops, made by a kernel of prepare.cuh from f32 rows: tokens in blocks of 8, each token's
 * columns in chunks of 64 bytes that lie as the mma fragments want them (linear.cuh).
 *   codes  [ceil(T/8)][chunks][8 tokens][64 bytes]
 *   scales [ceil(T/8)][groups][8 tokens] f32; groups = 1 where a token has one scale
 *   sums   [ceil(T/8)][groups][8 tokens] i32, of the codes of a group; NULL where no format of the readers
 *          has an offset or zero point
 */
struct EdgeInputs {
    uint8_t* codes;
    float* scales;
    int32_t* sums;
    int32_t chunks, groups;
};

/* Rows of values turned into inputs of linear ops, and on the way into what comes before: see prepare.cuh. */
struct EdgePrepare {
    EdgeStep step;
    EdgeInputs inputs;
    const float* x;
    const float* y;      /* up of a gated activation, or NULL */
    const float* weight; /* of a norm */
    const float* bias;   /* of a norm, or NULL */
    float* out;          /* where others read the values too, or NULL */
    int32_t width;
    float eps;
    int32_t rows; /* 0: the step's tokens; 1: its logit rows, gathered */
};

/* One matrix of a linear launch, as packed for mma (engine/packing.py: m16). */
struct EdgeMatrix {
    const uint8_t* codes;
    const uint8_t* high; /* bits of codes above those in `codes`, or NULL */
    const void* scale;
    const void* shift;  /* zero points, or minima (u8 or f16) */
    const void* second; /* nf4_g64_dq: scale2; nvfp4 and k-quants: super */
    const void* super_min;
    const float* offset;
    const float* bias; /* or NULL */
    float* out;
    const float* add;           /* or NULL: out = add + add_scale * (W x + bias) */
    float add_scale, scale_all; /* scale_all multiplies W x + bias (the logits op's scale) */
    int32_t rows, first_panel;  /* the launch's panels before this matrix's first */
    int32_t stride, unused;     /* values from one row of `out` and `add` to the next */
};

#define EDGE_MATRICES 4
struct EdgeLinear {
    EdgeStep step;
    EdgeInputs inputs;
    struct EdgeMatrix matrix[EDGE_MATRICES];
    int32_t count, units; /* matrices; units of packed columns in a row of each */
    int32_t row_count;    /* edge_cuda_count whose count says how many rows of inputs there are */
};

/* An adapter in device memory: this, then an EdgeUpdate for each linear and logits op of the program. */
struct EdgeAdapter {
    float* u;       /* (largest step, stride): A x of one launch's matrices */
    int64_t stride; /* a multiple of 8 */
    int64_t unused[2];
};
struct EdgeUpdate {
    const void* a; /* f16 (rank padded to 8, cols padded to 8) */
    const void* b; /* f16 [ceil(rows / 32)][ceil(rank / 8)][32 rows][8 columns] */
    float scale;
    int32_t rank;   /* 0 = none */
    int32_t offset; /* of A x in a row of u, a multiple of 8 */
    int32_t unused;
};

/* The updates of a linear launch's matrices, see low_rank.cuh. */
struct EdgeUpdated {
    float* out; /* (rows of x, stride), of which `rows` from here on */
    float scale;
    int32_t op;                /* number of the op among the program's linear and logits ops */
    int32_t rows, first_panel; /* panels of 32 rows, of the launch, before this matrix's first */
    int32_t stride, unused;
};
struct EdgeLowRank {
    EdgeStep step;
    const struct EdgeAdapter* const* adapters; /* (S) of each sequence, or NULL */
    const float* x;
    struct EdgeUpdated matrix[EDGE_MATRICES];
    int32_t count, panels; /* matrices; panels of all */
    int32_t cols;
    int32_t row_count; /* edge_cuda_count whose count says how many rows x has */
};

struct EdgeEmbed {
    EdgeStep step;
    struct EdgeMatrix matrix;
    float* out;
    int32_t cols, units;
    float scale;
    int32_t first; /* the id of the matrix's first row; rows of other ids stay as they are */
};

/* norm without linear readers, activation, add, gather, round: one row of out from one row of x and y. */
struct EdgeRow {
    EdgeStep step;
    const float* x;
    const float* y;
    float* out;
    const float* weight; /* norm weight; columns of gather, f32 */
    const float* bias;
    int32_t x_width, out_width, group;
    float eps, scale;
    int32_t unused;
};

struct EdgeAngles {
    EdgeStep step;
    const float* inv_freq;
    float* angles; /* (T, 2 * freqs): cosines, then sines */
    int32_t freqs;
    float scale;
};

/* One side of a cache slot: pages [page][kv head][page_tokens] rows of head_dim values, planes as in kv.py.
 */
struct EdgeKv {
    uint8_t* codes;
    void* scale;
    uint8_t* zero;
};

/* Rotation of q and k, and the keys and values of the step stored: one launch. */
struct EdgeRopeAppend {
    EdgeStep step;
    EdgeKv k, v;
    float* q;   /* rotated in place; NULL where only keys and values are stored */
    float* key; /* rotated in place too */
    const float* value;
    const float* angles; /* of q and k alike; NULL for no rotation */
    int32_t heads, kv_heads, freqs, page_tokens;
};

/* Rows of keys and values copied from places to places of a sequence, in this order: both ascend, and none
 * moves up. */
struct EdgeMove {
    EdgeKv k, v;
    const int32_t* pages;   /* the sequence's row of page tables */
    const int32_t* sources; /* (count) places */
    const int32_t* targets;
    int32_t count, kv_heads, page_tokens, unused;
};

/* Attention, see attention.cuh. `partial` has for each (token of the bucket, head) chunks * head_dim sums and
 * (2 * chunks + 3) / 4 * 4 f32 of softmax; NULL in the looped form.
 */
#define EDGE_ATTENTION_CHUNK 256 /* positions whose keys are summed up by themselves */
struct EdgeAttention {
    EdgeStep step;
    EdgeKv k, v;
    const float* q;
    float* out; /* may be q */
    float* partial;
    int32_t heads, kv_heads, page_tokens;
    int32_t chunks;       /* of the longest context that the launch may meet */
    int32_t window;       /* 0 = none */
    float scale, softcap; /* softcap only in kernels that have one */
};

/* Logits (L, vocab) brought to their end in place (check, soft cap), and their likeliest tokens: sample.cuh.
 */
#define EDGE_SLICE 4096     /* logits of a row that one block looks at */
#define EDGE_SLICES_MAX 128 /* of a row */
#define EDGE_TOP_MAX 72     /* greatest k: one more than top-k of 64 keeps, and then some */
struct EdgeSample {
    EdgeStep step;
    float* logits;
    int32_t* tokens;  /* (L) likeliest; lowest id of equals */
    float* top;       /* (L, k) values, descending; NULL where k is 0 */
    int32_t* top_ids; /* (L, k) */
    uint64_t* keys;   /* (L, max(k, 1), slices), scratch: the likeliest of each slice */
    int32_t*
        history; /* (steps, L) tokens of a chain, or NULL; `advance` writes row counts[EDGE_CHAIN_STEP] */
    int32_t vocab, k, slices; /* slices = ceil(vocab / EDGE_SLICE); 0 <= k <= min(vocab, EDGE_TOP_MAX) */
    float softcap;            /* 0 = none */
};

#endif
