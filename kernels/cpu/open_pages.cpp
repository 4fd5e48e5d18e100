#include "open_pages.h"

#include <algorithm>
#include <cstring>

#include "codec.h"

namespace edge {

OpenPages::OpenPages(const edge_program& program)
    : any_(program.cache_count > 0 && program.cache[0].k.per_channel != 0),
      page_tokens_(program.page_tokens),
      slots_(program.max_sequences),
      fresh_(program.scratch.fresh) {
    if (!any_) return;
    const size_t slots = static_cast<size_t>(slots_);
    pages_.assign(slots * kPages, -1);
    runs_.resize(slots);
    taken_.resize(slots);
    const int32_t most = (program.max_tokens + page_tokens_ - 1) / page_tokens_ + program.max_sequences;
    closings_.reserve(static_cast<size_t>(most));
}

int32_t OpenPages::held(int32_t slot, int32_t page) const {
    for (int32_t i = slot * kPages; i < (slot + 1) * kPages; ++i)
        if (pages_[static_cast<size_t>(i)] == page) return i;
    return -1;
}

int OpenPages::find_runs(edge_batch* batch) {
    std::fill(runs_.begin(), runs_.end(), Run{});
    std::fill(taken_.begin(), taken_.end(), uint8_t{0});
    for (int32_t t = 0; t < batch->token_count; ++t) {
        const int32_t sequence = batch->sequence[t], position = batch->positions[t];
        Run& run = runs_[static_cast<size_t>(sequence)];
        batch->index = t;
        batch->value = position;
        if (run.count > 0) {
            if (t != run.first + run.count || position != run.position + run.count) return EDGE_BAD_RUN;
            ++run.count;
            continue;
        }
        run.first = t;
        run.count = 1;
        run.position = position;
        const int32_t slot = batch->slots == nullptr ? sequence : batch->slots[sequence];
        if (slot < 0 || slot >= slots_ || taken_[static_cast<size_t>(slot)] != 0) {
            batch->index = sequence;
            batch->value = slot;
            return EDGE_BAD_SLOT;
        }
        taken_[static_cast<size_t>(slot)] = 1;
        const int32_t* table =
            batch->page_tables + static_cast<int64_t>(sequence) * batch->pages_per_sequence;
        if (position % page_tokens_ != 0 && held(slot, table[position / page_tokens_]) < 0)
            return EDGE_NOT_HELD;
    }
    return EDGE_OK;
}

int OpenPages::begin(edge_batch* batch) {
    closings_.clear();
    if (!any_) return EDGE_OK;
    const int bad = find_runs(batch);
    if (bad != EDGE_OK) return bad;
    for (int32_t sequence = 0; sequence < batch->sequence_count; ++sequence) {
        Run& run = runs_[static_cast<size_t>(sequence)];
        if (run.count == 0) continue;
        const int32_t end = run.position + run.count;
        run.first_page = run.position / page_tokens_;
        run.last_page = (end - 1) / page_tokens_;
        keep(batch->slots == nullptr ? sequence : batch->slots[sequence],
             batch->page_tables + static_cast<int64_t>(sequence) * batch->pages_per_sequence, &run);
        for (int32_t page = run.first_page; page < end / page_tokens_; ++page)
            closings_.push_back({sequence, page});
    }
    return EDGE_OK;
}

// Gives the first and the last two pages of a run an entry each. What gives way is an older page, but the one
// before the run only as the last: a draft that was run token by token may be rolled back into it.
void OpenPages::keep(int32_t slot, const int32_t* table, Run* run) {
    const int32_t wanted[3] = {run->first_page, std::max(run->first_page, run->last_page - 1),
                               run->last_page};
    const int32_t before = run->first_page > 0 ? table[run->first_page - 1] : -1;
    const auto is_wanted = [&](int32_t page) {
        return std::any_of(wanted, wanted + 3, [&](int32_t w) { return page == table[w]; });
    };
    for (int i = 0; i < 3; ++i) {
        const int32_t page = table[wanted[i]];
        int32_t entry = held(slot, page);
        for (int32_t e = slot * kPages; entry < 0 && e < (slot + 1) * kPages; ++e) {
            const int32_t old = pages_[static_cast<size_t>(e)];
            if (!is_wanted(old) && (old == -1 || old != before)) entry = e;
        }
        if (entry < 0) entry = held(slot, before);
        pages_[static_cast<size_t>(entry)] = page;
        run->entry[i] = entry;
    }
}

void OpenPages::append(const edge_batch& batch, const edge_cache& cache, int32_t t, const float* x) const {
    const int64_t n = width(cache);
    const size_t bytes = static_cast<size_t>(n) * sizeof(float);
    std::memcpy(fresh_ + t * n, x, bytes);
    const Run& run = runs_[static_cast<size_t>(batch.sequence[t])];
    const int32_t position = batch.positions[t], page = position / page_tokens_;
    int32_t entry = run.entry[0];
    if (page != run.first_page) {
        if (page < run.last_page - 1) return;
        entry = run.entry[page == run.last_page ? 2 : 1];
    }
    std::memcpy(cache.open + (static_cast<int64_t>(entry) * page_tokens_ + position % page_tokens_) * n, x,
                bytes);
}

const float* OpenPages::keys(const edge_cache& cache, const Run& run, int32_t page) const {
    const int64_t n = width(cache), start = static_cast<int64_t>(page) * page_tokens_;
    // The first page may have begun in an earlier step; its slot holds this step's part too
    if (start < run.position) return cache.open + static_cast<int64_t>(run.entry[0]) * page_tokens_ * n;
    return fresh_ + (run.first + start - run.position) * n;
}

int OpenPages::close(const edge_batch& batch, const edge_cache& cache, const Closing& closing,
                     int32_t head) const {
    const Run& run = runs_[static_cast<size_t>(closing.sequence)];
    const float* rows = keys(cache, run, closing.page) + static_cast<int64_t>(head) * cache.head_dim;
    const int64_t page =
        batch.page_tables[static_cast<int64_t>(closing.sequence) * batch.pages_per_sequence + closing.page];
    const int64_t first = (page * cache.kv_heads + head) * cache.head_dim;
    int status = EDGE_OK;
    for (int32_t c = 0; c < cache.head_dim; ++c) {
        float channel[EDGE_KV_PAGE_TOKENS_MAX];
        for (int32_t j = 0; j < page_tokens_; ++j) channel[j] = rows[j * width(cache) + c];
        const int found = write_kv_row(cache.k, first + c, channel, page_tokens_);
        if (found != EDGE_OK) status = found;
    }
    return status;
}

}  // namespace edge
