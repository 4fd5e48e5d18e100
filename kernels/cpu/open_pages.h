// Keys that are not quantized yet, where K is per channel (KIVI, Liu et al. 2024): which a step reads, where
// it keeps them, and which pages it fills and so quantizes.
//
// A token sees the keys of its own page as they came and those of earlier pages quantized. Keys of the
// running step lie in scratch; of earlier steps, in the sequence's slot, which keeps OPEN_PAGES pages: those
// of the step's last two pages, where a roll-back may land, and of the page in which the step began, so that
// a step that failed can be run again.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "edge_cpu.h"

namespace edge {

class OpenPages {
  public:
    static constexpr int kPages = EDGE_OPEN_PAGES;  // of a slot

    // A sequence's tokens in a step: rows first.. of the batch, at positions position.. of its sequence.
    struct Run {
        int32_t first, count, position;
        int32_t first_page, last_page;  // of its positions
        int32_t entry[3];               // where the keys of first_page, last_page - 1 and last_page are kept
    };
    struct Closing {  // a page that the step fills
        int32_t sequence, page;
    };

    // Takes nothing where no cache is per channel.
    explicit OpenPages(const edge_program& program);
    bool any() const { return any_; }

    // Finds the runs of a batch whose indices are proved. Returns an edge_status, batch->index and value then
    // say what is wrong; a step that is refused changes nothing.
    int begin(edge_batch* batch);
    const Run& run(int32_t sequence) const { return runs_[static_cast<size_t>(sequence)]; }
    const std::vector<Closing>& closings() const { return closings_; }

    // Keeps the keys x (kv_heads * head_dim) of token t in scratch and, where its page is kept, in its slot.
    void append(const edge_batch& batch, const edge_cache& cache, int32_t t, const float* x) const;
    // Unquantized keys (page_tokens, kv_heads * head_dim) of a page that the run writes to, as far as it
    // goes.
    const float* keys(const edge_cache& cache, const Run& run, int32_t page) const;
    // Quantizes one kv head of a page that the step fills. Returns an edge_status.
    int close(const edge_batch& batch, const edge_cache& cache, const Closing& closing, int32_t head) const;

  private:
    int find_runs(edge_batch* batch);
    int32_t held(int32_t slot, int32_t page) const;  // entry that holds the page of the arena, or -1
    void keep(int32_t slot, const int32_t* table, Run* run);
    static int64_t width(const edge_cache& cache) {
        return static_cast<int64_t>(cache.kv_heads) * cache.head_dim;
    }

    const bool any_;
    const int32_t page_tokens_, slots_;
    float* const fresh_;
    std::vector<int32_t> pages_;  // (slots, kPages): the page of the arena that each entry holds, -1 none
    std::vector<Run> runs_;       // of each sequence in the batch; count 0 = none
    std::vector<Closing> closings_;
    std::vector<uint8_t> taken_;  // slots, while a batch is looked through
};

}  // namespace edge
