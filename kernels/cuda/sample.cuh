// The end of a step: logits checked and capped, the likeliest tokens of each row, and the next step of a
// chain.
//   finish_logits  grid (slices, rows): each block looks at EDGE_SLICE logits
//   pick_tokens    grid rows: the best of the slices
//   advance        one block: the tokens picked become the step's, at the next positions
// Blocks have kRowThreads threads. What is picked is exact: in descending order, equals by their lowest id.
#pragma once

#include "math.cuh"
#include "row_vectors.cuh"

namespace edge {

// Keys in the order of (value, lower id); no key of a logit is 0.
EDGE_DEVICE uint64_t key_of(float value, int id) {
    const uint32_t bits = value == 0.0f ? 0 : bits_of(value);  // -0 equals 0
    const uint32_t order = bits >> 31 != 0 ? ~bits : bits | 0x80000000u;
    return static_cast<uint64_t>(order) << 32 | ~static_cast<uint32_t>(id);
}
EDGE_DEVICE float value_of(uint64_t key) {
    const uint32_t order = static_cast<uint32_t>(key >> 32);
    return float_of(order >> 31 != 0 ? order & 0x7fffffffu : ~order);
}
EDGE_DEVICE int32_t id_of(uint64_t key) { return static_cast<int32_t>(~static_cast<uint32_t>(key)); }

EDGE_DEVICE uint64_t larger(uint64_t a, uint64_t b) { return a > b ? a : b; }

// The k greatest of a block's keys, descending, to out[0], out[stride], ...; 0 where there are fewer. Keys
// are distinct, but for 0 = none; k <= EDGE_TOP_MAX, at least 1.
template <int kItems>
EDGE_DEVICE void greatest(const uint64_t (&keys)[kItems], int k, uint64_t* out, int stride) {
    EDGE_SHARED uint64_t tops[kRowThreads];
    EDGE_SHARED uint64_t found[EDGE_TOP_MAX * kItems];
    EDGE_SHARED uint64_t least;
    EDGE_SHARED uint32_t count;
    const int thread = static_cast<int>(threadIdx.x);
    uint64_t top = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) top = larger(top, keys[i]);
    if (k == 1) {
        top = row_merge<kRowThreads>(top, tops, [](uint64_t a, uint64_t b) { return larger(a, b); });
        if (thread == 0) out[0] = top;
        return;
    }
    // Of the threads' own greatest keys the k-th greatest bounds the k-th greatest of all from below; the k
    // threads at or above it have all keys that can be among the k greatest, so that `found` holds them.
    tops[thread] = top;
    if (thread == 0) {
        least = 0;
        count = 0;
    }
    __syncthreads();
    int above = 0;
#pragma unroll 8
    for (int i = 0; i < kRowThreads; ++i) above += tops[i] > top;
    if (above == k - 1) least = top;
    __syncthreads();
    const uint64_t bound = larger(least, uint64_t{1});
    if (top >= bound) {
#pragma unroll
        for (int i = 0; i < kItems; ++i)
            if (keys[i] >= bound) found[atomicAdd(&count, 1u)] = keys[i];
    }
    __syncthreads();
    // Their order is by chance, their ranks are not.
    const int candidates = static_cast<int>(count);
    for (int c = thread; c < candidates; c += kRowThreads) {
        const uint64_t key = found[c];
        int rank = 0;
#pragma unroll 8
        for (int i = 0; i < candidates; ++i) rank += found[i] > key;
        if (rank < k) out[rank * stride] = key;
    }
    for (int c = candidates + thread; c < k; c += kRowThreads) out[c * stride] = 0;
}

EDGE_DEVICE int keys_of_slice(const EdgeSample& p) { return p.k > 1 ? p.k : 1; }

// Checks and caps the logits of a slice in place, and gives its greatest keys. Raises NOT_FINITE.
EDGE_DEVICE void finish_logits(const EdgeSample& p) {
    constexpr int kItems = EDGE_SLICE / kRowThreads;
    const int row = static_cast<int>(blockIdx.y), slice = static_cast<int>(blockIdx.x);
    if (row >= p.step.counts[EDGE_LOGITS]) return;
    float* logits = p.logits + static_cast<int64_t>(row) * p.vocab;
    const int first = slice * EDGE_SLICE + static_cast<int>(threadIdx.x);
    float values[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const int id = first + i * kRowThreads;
        values[i] = id < p.vocab ? logits[id] : 0.0f;
    }
    uint64_t keys[kItems];
    uint32_t worst = 0;
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const int id = first + i * kRowThreads;
        worst = larger(worst, magnitude(values[i]));  // before the cap, which would make Inf finite
        if (p.softcap != 0.0f && id < p.vocab) {
            values[i] = product(p.softcap, tanh_of(quotient(values[i], p.softcap)));
            logits[id] = values[i];
        }
        keys[i] = id < p.vocab ? key_of(values[i], id) : 0;
    }
    if (worst >= kInfinite) raise_status(p.step, EDGE_CUDA_NOT_FINITE);
    const int k = keys_of_slice(p);
    greatest(keys, k, p.keys + static_cast<int64_t>(row) * k * p.slices + slice, p.slices);
}

// tokens, top and top_ids of a row from the keys of its slices. The best of all slices come first in memory,
// so that the threads' own greatest keys are near the greatest of all.
EDGE_DEVICE void pick_tokens(const EdgeSample& p) {
    constexpr int kItems = EDGE_TOP_MAX * EDGE_SLICES_MAX / kRowThreads;
    EDGE_SHARED uint64_t best[EDGE_TOP_MAX];
    const int row = static_cast<int>(blockIdx.x);
    if (row >= p.step.counts[EDGE_LOGITS]) return;
    const int k = keys_of_slice(p), count = k * p.slices;
    const uint64_t* from = p.keys + static_cast<int64_t>(row) * count;
    uint64_t keys[kItems];
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
        const int at = static_cast<int>(threadIdx.x) + i * kRowThreads;
        keys[i] = at < count ? from[at] : 0;
    }
    greatest(keys, k, best, 1);
    __syncthreads();
    if (threadIdx.x == 0) p.tokens[row] = id_of(best[0]);
    const int i = static_cast<int>(threadIdx.x);
    if (i < p.k) {
        p.top[static_cast<int64_t>(row) * p.k + i] = value_of(best[i]);
        p.top_ids[static_cast<int64_t>(row) * p.k + i] = id_of(best[i]);
    }
}

// A chain's next step: of each row of logits the token becomes the one of its sequence, one position further.
// One block, after `pick_tokens`.
EDGE_DEVICE void advance(const EdgeSample& p) {
    const EdgeStep& step = p.step;
    const int rows = step.counts[EDGE_LOGITS], at = step.counts[EDGE_CHAIN_STEP];
    for (int row = static_cast<int>(threadIdx.x); row < rows; row += kRowThreads) {
        const int32_t token = p.tokens[row], t = step.logit_rows[row];
        step.tokens[t] = token;
        step.positions[t] += 1;
        if (step.places != step.positions) step.places[t] += 1;
        if (p.history != nullptr) p.history[static_cast<int64_t>(at) * rows + row] = token;
    }
    __syncthreads();
    if (threadIdx.x == 0) step.counts[EDGE_CHAIN_STEP] = at + 1;
}

}  // namespace edge
