// Rotary embedding (Su et al. 2021, half-split order) of queries and keys, and keys and values to their
// pages.
#pragma once

#include "kv_rows.cuh"

namespace edge {

// sin and cos by Cody-Waite reduction and Taylor-like polynomials in f64 (kernels/cpu/codec.cpp): good to the
// last bit of f32, and the same on every machine.
EDGE_DEVICE void sin_cos(double x, double& sine_of, double& cosine_of) {
    const double n = round_even(product(x, 0.63661977236758134308));
    double r = fused(n, -1.57079632673412561417e+00, x);
    r = fused(n, -6.07710050630396597660e-11, r);
    r = fused(n, -2.02226624879595063154e-21, r);
    const double z = product(r, r);
    double p = 1.58969099521155010221e-10;
    p = fused(p, z, -2.50507602534068634195e-08);
    p = fused(p, z, 2.75573137070700676789e-06);
    p = fused(p, z, -1.98412698298579493134e-04);
    p = fused(p, z, 8.33333333332248946124e-03);
    p = fused(p, z, -1.66666666666666324348e-01);
    const double sine = fused(product(p, z), r, r);
    double c = -1.13596475577881948265e-11;
    c = fused(c, z, 2.08757232129817482790e-09);
    c = fused(c, z, -2.75573143513906633035e-07);
    c = fused(c, z, 2.48015872894767294178e-05);
    c = fused(c, z, -1.38888888888741095749e-03);
    c = fused(c, z, 4.16666666666666019037e-02);
    c = fused(c, z, -0.5);
    const double cosine = fused(c, z, 1.0);
    const int quarter = static_cast<int>(static_cast<int64_t>(n) & 3);
    const double s = quarter % 2 ? cosine : sine, k = quarter % 2 ? sine : cosine;
    sine_of = quarter >= 2 ? -s : s;
    cosine_of = quarter == 1 || quarter == 2 ? -k : k;
}

// grid (ceil(tokens of the bucket * freqs / 128)), 128 threads: cosines and sines of the step's positions.
EDGE_DEVICE void angles(const EdgeAngles& args) {
    const int at = static_cast<int>(blockIdx.x * blockDim.x + threadIdx.x);
    const int token = at / args.freqs, i = at % args.freqs;
    if (token >= args.step.counts[EDGE_TOKENS]) return;
    // The angle is rounded to f32, as in the models' own code
    const float angle = product(static_cast<float>(args.step.positions[token]), args.inv_freq[i]);
    double sine, cosine;
    sin_cos(static_cast<double>(angle), sine, cosine);
    const double scale = static_cast<double>(args.scale);
    float* to = args.angles + int64_t{token} * 2 * args.freqs;
    to[i] = static_cast<float>(product(cosine, scale));
    to[args.freqs + i] = static_cast<float>(product(sine, scale));
}

constexpr int kAppendWarps = 4;

// One head of one token rotated: value i with value i + freqs, for i < freqs.
template <int head_dim>
EDGE_DEVICE void rotate(WarpRow<head_dim>& row, const float* from, const float* angles, int freqs) {
    row.load(from);
    if (angles == nullptr) return;
#pragma unroll
    for (int i = 0; i < WarpRow<head_dim>::kEach; ++i) {
        const int at = i * kWarp + lane();
        if (at >= 2 * freqs) continue;
        const bool second = at >= freqs;
        const float cosine = angles[second ? at - freqs : at], sine = angles[second ? at : at + freqs];
        const float other = from[second ? at - freqs : at + freqs];
        row.x[i] = fused(row.x[i], cosine, product(second ? other : -other, sine));
    }
}

// grid (tokens of the bucket, ceil((heads + 2 kv_heads) / 4)), 128 threads: a warp rotates a head of q in
// place, or of k in place, which it stores too, or stores one of v. heads is 0 where q is NULL.
template <class K, class V, int head_dim>
EDGE_DEVICE void rope_append(const EdgeRopeAppend& args) {
    const int token = static_cast<int>(blockIdx.x);
    int head = static_cast<int>(blockIdx.y) * kAppendWarps + warp();
    const int heads = args.q == nullptr ? 0 : args.heads;
    if (token >= args.step.counts[EDGE_TOKENS] || head >= heads + 2 * args.kv_heads) return;
    const float* angles = args.angles == nullptr ? nullptr : args.angles + int64_t{token} * 2 * args.freqs;
    WarpRow<head_dim> row;
    if (head < heads) {
        float* q = args.q + (int64_t{token} * heads + head) * head_dim;
        rotate(row, q, angles, args.freqs);
        __syncwarp();
        if (angles != nullptr) row.store(q);
        return;
    }
    head -= heads;
    const bool is_key = head < args.kv_heads;
    if (!is_key) head -= args.kv_heads;
    const int64_t from = (int64_t{token} * args.kv_heads + head) * head_dim;
    const int place = args.step.places[token];
    const int64_t table = int64_t{args.step.sequence[token]} * args.step.counts[EDGE_TABLE_STRIDE];
    const int64_t page = args.step.page_tables[table + place / args.page_tokens];
    const int64_t at = (page * args.kv_heads + head) * args.page_tokens + place % args.page_tokens;
    uint32_t wrong;
    if (is_key) {
        rotate(row, args.key + from, angles, args.freqs);
        __syncwarp();
        if (angles != nullptr) row.store(args.key + from);
        wrong = store_row<K>(args.k, at, row);
    } else {
        row.load(args.value + from);
        wrong = store_row<V>(args.v, at, row);
    }
    if (wrong != 0 && lane() == 0) raise_status(args.step, wrong);
}

// grid (tokens of the bucket, ceil(heads / 4)), 128 threads: heads of q rotated in place, and nothing else.
template <int head_dim>
EDGE_DEVICE void rope(const EdgeRopeAppend& args) {
    const int token = static_cast<int>(blockIdx.x);
    const int head = static_cast<int>(blockIdx.y) * kAppendWarps + warp();
    if (token >= args.step.counts[EDGE_TOKENS] || head >= args.heads) return;
    WarpRow<head_dim> row;
    float* q = args.q + (int64_t{token} * args.heads + head) * head_dim;
    rotate(row, q, args.angles + int64_t{token} * 2 * args.freqs, args.freqs);
    __syncwarp();
    row.store(q);
}

}  // namespace edge
