// Trellis codes, see edge_runtime/engine/formats/trellis.py: the value of a weight depends on the newest
// codes down its column, twelve bits of them.
#pragma once

#include <cstdint>

#include "edge_cpu.h"

namespace edge {

// Bits of a trellis code, 0 for another encoding.
inline int trellis_bits(int encoding) {
    switch (encoding) {
        case EDGE_ENC_TCQ2:
            return 2;
        case EDGE_ENC_TCQ3:
            return 3;
        case EDGE_ENC_TCQ4:
            return 4;
        default:
            return 0;
    }
}

// Twice the level of a window, and EDGE_TCQ_ZERO more: 0..127.
inline int trellis_sum(int bits, int window) {
    const uint8_t (*mix)[16] = EDGE_TCQ_MIX[bits - 2];
    const uint8_t (*sums)[16] = EDGE_TCQ_SUMS[bits - 2];
    const int a = window & 15, b = window >> 4 & 15, c = window >> 8;
    const int s = b ^ mix[1][c];
    return (sums[0][a ^ mix[0][s]] + sums[1][mix[2][a ^ mix[3][c]] ^ b] + sums[2][s]) & 255;
}

// The panel that holds the rows before a panel's first: runs of EDGE_TCQ_RUN rows are circles.
inline int64_t panel_before(int64_t panel, int64_t panels) {
    constexpr int64_t kRun = EDGE_TCQ_RUN / EDGE_PANEL_ROWS;
    if (panel % kRun != 0) return panel - 1;
    const int64_t last = panel + kRun - 1;
    return last < panels ? last : panels - 1;
}

}  // namespace edge
