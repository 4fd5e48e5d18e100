// Rows of the cache moved, after a tree of tokens was verified: its accepted path goes to its positions.
#pragma once

#include "kv_fragments.cuh"

namespace edge {

// A lane copies the same items of every row, one row after another, so that none is overwritten before it is
// read.
template <class Item>
EDGE_DEVICE void move_rows(const EdgeMove& args, void* plane, int head, int items) {
    Item* all = static_cast<Item*>(plane);
    const auto row = [&](int place) {
        const int64_t page = args.pages[place / args.page_tokens];
        return all + ((page * args.kv_heads + head) * args.page_tokens + place % args.page_tokens) * items;
    };
    for (int n = 0; n < args.count; ++n) {
        const Item* from = row(args.sources[n]);
        Item* to = row(args.targets[n]);
        for (int i = lane(); i < items; i += kWarp) to[i] = from[i];
    }
}

template <class Format, int head_dim>
EDGE_DEVICE void move_side(const EdgeMove& args, const EdgeKv& kv, int head) {
    constexpr int kBytes = Format::row_bytes(head_dim);
    if constexpr (kBytes % 4 == 0)
        move_rows<uint32_t>(args, kv.codes, head, kBytes / 4);
    else
        move_rows<uint8_t>(args, kv.codes, head, kBytes);
    if constexpr (Format::kRowScale) move_rows<float>(args, kv.scale, head, 1);
    if constexpr (Format::kGroups) {
        move_rows<uint16_t>(args, kv.scale, head, Format::groups(head_dim));
        move_rows<uint8_t>(args, kv.zero, head, Format::groups(head_dim));
    }
}

// grid (2 kv_heads), 32 threads: heads of K, then of V.
template <class K, class V, int head_dim>
EDGE_DEVICE void kv_move(const EdgeMove& args) {
    const int head = static_cast<int>(blockIdx.x);
    if (head < args.kv_heads)
        move_side<K, head_dim>(args, args.k, head);
    else
        move_side<V, head_dim>(args, args.v, head - args.kv_heads);
}

}  // namespace edge
