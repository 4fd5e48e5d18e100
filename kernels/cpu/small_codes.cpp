// One row of a matrix whose codes are smaller than a byte, one value at a time: what embeddings look up.
#include "codec.h"
#include "half.h"
#include "kernels.h"
#include "trellis.h"

namespace edge {
namespace {

constexpr float kE2M1[16] = {0.0f,  0.5f,  1.0f,  1.5f,  2.0f,  3.0f,  4.0f,  6.0f,
                             -0.0f, -0.5f, -1.0f, -1.5f, -2.0f, -3.0f, -4.0f, -6.0f};

// Where a weight lies.
struct Place {
    int64_t panel, lane, column;
};

// Bits of the weight from a plane of `bits` a code, see n16k4 in engine/packing.py.
int bits_at(const void* plane, int bits, const Place& p, int64_t width, int64_t run) {
    const int64_t part = run * bits / 8;  // inputs whose bits have the same place in their bytes
    const int64_t i = p.column % run, j = i % part;
    const uint8_t* q =
        static_cast<const uint8_t*>(plane) + (p.panel * width / run + p.column / run) * part * kPanel;
    return q[j / 4 * 64 + p.lane * 4 + j % 4] >> (i / part * bits) & ((1 << bits) - 1);
}

// Code of the weight, of both planes.
int code_at(const edge_matrix& w, const Place& p, int64_t width, int64_t run) {
    const int low = code_bits(w.encoding), code = bits_at(w.codes, low, p, width, run);
    return w.high_bits > 0 ? code | bits_at(w.high, w.high_bits, p, width, run) << low : code;
}

// Level of a trellis code.
float trellis_level(const edge_matrix& w, Place p, int64_t width, int64_t run) {
    const int bits = trellis_bits(w.encoding);
    int window = 0;
    for (int shift = 0; shift < 12; shift += bits) {
        window |= code_at(w, p, width, run) << shift;
        if (p.lane-- == 0) p = {panel_before(p.panel, (w.rows + kPanel - 1) / kPanel), kPanel - 1, p.column};
    }
    return static_cast<float>(trellis_sum(bits, window) - EDGE_TCQ_ZERO) * 0.5f;
}

// What a group shares, as the numpy codecs compute it: value = (code - zero) * scale - least.
struct Grid {
    float scale, least;
    int zero;
};

Grid grid_of(const edge_matrix& w, const Place& p, int64_t groups, int64_t supers, int64_t group) {
    const int64_t at = (p.panel * groups + group) * kPanel + p.lane;
    const int64_t block = (p.panel * supers + group * w.group / EDGE_SUPER) * kPanel + p.lane;
    const uint8_t* bytes = static_cast<const uint8_t*>(w.scale);
    const uint8_t* minima = static_cast<const uint8_t*>(w.min);
    Grid g{1.0f, 0.0f, 0};
    switch (w.scale_encoding) {
        case EDGE_ENC_I8:
            g.scale = half_at(w.super, block) * static_cast<float>(static_cast<int8_t>(bytes[at]));
            break;
        case EDGE_ENC_U8:
            g.scale = half_at(w.super, block) * static_cast<float>(bytes[at]);
            g.least = half_at(w.super_min, block) * static_cast<float>(minima[at]);
            break;
        case EDGE_ENC_U4U4:
            g.scale = half_at(w.super, block) * static_cast<float>(bytes[at] & 15);
            g.least = half_at(w.super_min, block) * static_cast<float>(bytes[at] >> 4);
            break;
        case EDGE_ENC_E4M3:
            g.scale = e4m3_to_float(bytes[at]) * *static_cast<const float*>(w.super);
            break;
        case EDGE_ENC_E8M0:
            g.scale = float_from_bits(bytes[at] == 0 ? 1u << 22 : static_cast<uint32_t>(bytes[at]) << 23);
            break;
        default:
            g.scale = half_at(w.scale, at);
            if (w.min != nullptr) g.least = -half_at(w.min, at);
            if (w.zero != nullptr) g.zero = w.zero[at];
    }
    return g;
}

int offset_of(int encoding) {
    switch (encoding) {
        case EDGE_ENC_U2O2:
            return 2;
        case EDGE_ENC_U2O4:
            return 4;
        case EDGE_ENC_U4O8:
            return 8;
        case EDGE_ENC_U4O16:
            return 16;
        case EDGE_ENC_U4O32:
            return 32;
        default:
            return 0;
    }
}

}  // namespace

void read_small_codes(const edge_matrix& w, int64_t row, float scale, float* out) {
    const int64_t unit = unit_of(w), width = (w.cols + unit - 1) / unit * unit;
    const int64_t groups = width / w.group, supers = (width + EDGE_SUPER - 1) / EDGE_SUPER;
    const bool whole_units = w.encoding == EDGE_ENC_U4 || w.encoding == EDGE_ENC_U4O8;
    const int64_t run = whole_units ? unit : EDGE_SMALLEST_UNIT;
    const int offset = offset_of(w.encoding);
    const bool trellis = trellis_bits(w.encoding) > 0;
    Grid grid{};
    for (int64_t k = 0; k < w.cols; ++k) {
        const Place p{row / kPanel, row % kPanel, k};
        if (k % w.group == 0) grid = grid_of(w, p, groups, supers, k / w.group);
        const int code = trellis ? 0 : code_at(w, p, width, run);
        const float v = trellis                       ? trellis_level(w, p, width, run)
                        : w.encoding == EDGE_ENC_E2M1 ? kE2M1[code]
                                                      : static_cast<float>(code - offset - grid.zero);
        // a value without a minimum keeps the sign of its 0
        const float value = grid.least == 0.0f ? v * grid.scale : v * grid.scale - grid.least;
        out[k] = value * scale;
    }
}

}  // namespace edge
