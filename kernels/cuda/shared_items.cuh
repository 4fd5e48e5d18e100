// What weights of a row share (scales, zero points, minima) in packing m16 (engine/mma_order.py):
// [panel][run][8 rows r][row r, row r + 8][items of a run], where a run is a unit of columns, or what one
// item covers where that is more.
#pragma once

#include "device.cuh"

namespace edge {

// The items of a run for a lane's two rows, as they are stored: made into numbers where they are used, so
// that nothing waits for them before.
template <int kBytes, int kCount>
struct Items {
    static constexpr int kAll = 2 * kCount * kBytes;
    uint32_t words[(kAll + 3) / 4];

    EDGE_DEVICE void fetch(const void* plane, int panel, int run, int runs) {
        const int64_t at = (panel * runs + run) * 8 + lane() / 4;
        load_weights<kAll, false>(static_cast<const uint8_t*>(plane) + at * kAll, words);
    }
    // Bits of an item of row r + 8 * half.
    EDGE_DEVICE uint32_t bits(int half, int item) const {
        const int at = (half * kCount + item) * kBytes;
        const uint32_t word = words[at / 4] >> at % 4 * 8;
        return kBytes == 4 ? word : word & ((1u << kBytes % 4 * 8) - 1);
    }
    // The same of one row, out of memory.
    static EDGE_DEVICE uint32_t of_row(const void* plane, int row, int item, int runs) {
        const int in_panel = row % 16, run = item / kCount;
        const int at =
            (((row / 16 * runs + run) * 8 + in_panel % 8) * 2 + in_panel / 8) * kCount + item % kCount;
        if constexpr (kBytes == 4) return static_cast<const uint32_t*>(plane)[at];
        if constexpr (kBytes == 2) return static_cast<const uint16_t*>(plane)[at];
        return static_cast<const uint8_t*>(plane)[at];
    }
};

template <>
struct Items<0, 0> {};  // a plane that a format does not have

}  // namespace edge
