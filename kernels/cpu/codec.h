// Rows of stored formats, one value at a time: reading an embedding row, writing a key or value.
#pragma once

#include <cstdint>

#include "edge_cpu.h"

namespace edge {

// out[k] = weight[row][k] * scale, from packing n16k4 or n16.
void read_row(const edge_matrix& weight, int64_t row, float scale, float* out);

// The same where codes are smaller than a byte.
void read_small_codes(const edge_matrix& weight, int64_t row, float scale, float* out);

bool all_finite(const float* x, int64_t n);

// Encodes x (head_dim, or page_tokens where K is per channel) as row `row` of a cache side, bit for bit as
// the numpy codec. Returns an edge_status.
int write_kv_row(const edge_kv& kv, int64_t row, const float* x, int n);

// Copies one row of a cache side over another.
void copy_kv_row(const edge_kv& kv, int64_t from, int64_t to);

// cos and sin of position * inv_freq (a product in f32), times scale: (2 * n).
void fill_angles(const float* inv_freq, int n, int32_t position, float scale, float* out);

}  // namespace edge
