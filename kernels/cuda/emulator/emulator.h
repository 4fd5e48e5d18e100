// CUDA C++ on the host, for tests: each thread of a block is a fiber, blocks run one after another. Covers
// what device.cuh and the kernels use: 1-D blocks, 3-D grids, shared memory, barriers, shuffles and votes of
// whole warps, atomics and the fragments of mma. What a GPU leaves undefined (block.h) ends a launch with a
// message.
#pragma once

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "emulator/launch.h"

#if defined(__aarch64__)
#define _Float16 emu::Half
#endif

#define EDGE_DEVICE inline
#define EDGE_SHARED static  // blocks run one after another, so one copy is enough

#define threadIdx (emu::state.thread)
#define blockIdx (emu::state.block)
#define blockDim (emu::state.size)
#define gridDim (emu::state.blocks)

// Where a call stands, as a default argument of what is called
#define EDGE_EMU_WHERE const char *file = __builtin_FILE(), int line = __builtin_LINE()

namespace emu {

inline int lane() { return state.lane; }

inline void check_mask(uint32_t mask, const char* what, const char* file, int line) {
    if (mask != 0xffffffffu)
        fail("%s (%s:%d) with mask %#x: the emulator knows whole warps only", what, base(file), line, mask);
}

// The value of another lane. Slots alternate, so who is late finds what was put there for it.
template <class T>
inline T exchange(const char* what, uint32_t mask, T value, int source, const char* file, int line) {
    static_assert(sizeof(T) <= 8);
    check_mask(mask, what, file, line);
    uint64_t* slots = state.warp->slots[state.warp->meetings & 1];
    std::memcpy(&slots[state.lane], &value, sizeof value);
    meet({what, file, line, true});
    std::memcpy(&value, &slots[source & 31], sizeof value);
    return value;
}

inline uint32_t vote(const char* what, uint32_t mask, bool yes, const char* file, int line) {
    check_mask(mask, what, file, line);
    const uint32_t* votes = &state.warp->votes[state.warp->meetings & 1];
    state.warp->votes[state.warp->meetings & 1] |= static_cast<uint32_t>(yes) << state.lane;
    meet({what, file, line, false});
    return *votes;
}

// d += a b by the whole warp: `product` does it for all lanes at once.
template <class D>
inline void multiply(D (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], void (*product)(Fragments&),
                     const char* file, int line) {
    Fragments* w = &state.warp->fragments[state.warp->meetings & 1];
    std::memcpy(w->a[state.lane], a, sizeof a);
    std::memcpy(w->b[state.lane], b, sizeof b);
    std::memcpy(w->d.i[state.lane], d, sizeof d);
    if (arrive({"mma", file, line, true})) product(*w);
    pass();
    std::memcpy(d, w->d.i[state.lane], sizeof d);
}

template <bool kUnsigned>
inline void mma_i8(int32_t (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EDGE_EMU_WHERE) {
    multiply(d, a, b, product_i8<kUnsigned>, file, line);
}
// m16n8k16 on bytes is m16n8k32 without its last 16 columns.
template <bool kUnsigned>
inline void mma_i8_k16(int32_t (&d)[4], const uint32_t (&a)[2], const uint32_t (&b)[1], EDGE_EMU_WHERE) {
    const uint32_t wide_a[4] = {a[0], a[1], 0, 0}, wide_b[2] = {b[0], 0};
    multiply(d, wide_a, wide_b, product_i8<kUnsigned>, file, line);
}
template <bool kBfloat>
inline void mma_f16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], EDGE_EMU_WHERE) {
    multiply(d, a, b, product_f16<kBfloat>, file, line);
}

}  // namespace emu

inline void __syncthreads(EDGE_EMU_WHERE) { emu::wait_for_block({"__syncthreads", file, line, false}); }
inline void __syncwarp(uint32_t mask = 0xffffffffu, EDGE_EMU_WHERE) {
    emu::check_mask(mask, "__syncwarp", file, line);
    emu::meet({"__syncwarp", file, line, false});
}
template <class T>
inline T __shfl_sync(uint32_t mask, T value, int source, EDGE_EMU_WHERE) {
    return emu::exchange("__shfl_sync", mask, value, source, file, line);
}
template <class T>
inline T __shfl_xor_sync(uint32_t mask, T value, int bits, EDGE_EMU_WHERE) {
    return emu::exchange("__shfl_xor_sync", mask, value, emu::lane() ^ bits, file, line);
}
template <class T>
inline T __shfl_up_sync(uint32_t mask, T value, int by, EDGE_EMU_WHERE) {
    const int source = emu::lane() - by;
    return emu::exchange("__shfl_up_sync", mask, value, source < 0 ? emu::lane() : source, file, line);
}
template <class T>
inline T __shfl_down_sync(uint32_t mask, T value, int by, EDGE_EMU_WHERE) {
    const int source = emu::lane() + by;
    return emu::exchange("__shfl_down_sync", mask, value, source > 31 ? emu::lane() : source, file, line);
}
inline uint32_t __ballot_sync(uint32_t mask, bool yes, EDGE_EMU_WHERE) {
    return emu::vote("__ballot_sync", mask, yes, file, line);
}
inline bool __any_sync(uint32_t mask, bool yes, EDGE_EMU_WHERE) {
    return emu::vote("__any_sync", mask, yes, file, line) != 0;
}
inline bool __all_sync(uint32_t mask, bool yes, EDGE_EMU_WHERE) {
    return emu::vote("__all_sync", mask, !yes, file, line) == 0;
}

// Threads take turns only where they wait, so nothing comes between these.
template <class T>
inline T atomicOr(T* p, T value) {
    const T old = *p;
    *p = old | value;
    return old;
}
template <class T>
inline T atomicAdd(T* p, T value) {
    const T old = *p;
    *p = old + value;
    return old;
}
template <class T>
inline T atomicMax(T* p, T value) {
    const T old = *p;
    if (value > old) *p = value;
    return old;
}
template <class T>
inline T atomicMin(T* p, T value) {
    const T old = *p;
    if (value < old) *p = value;
    return old;
}
inline void __threadfence() {}

inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __clz(uint32_t x) { return x == 0 ? 32 : __builtin_clz(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }

// The harness puts a translation unit into a namespace without a name, as AddressSanitizer guards no array of
// an inline function with external linkage; exports stand outside of it.
#ifdef EDGE_EMU_UNNAMED
#define EDGE_EMU_OUTSIDE }
#define EDGE_EMU_INSIDE namespace {
#else
#define EDGE_EMU_OUTSIDE
#define EDGE_EMU_INSIDE
#endif

// What a test calls in place of a launch: `emu_<symbol>` runs it and gives NULL or what is wrong;
// `emu_size_<symbol>` is its record's size, `emu_threads_<symbol>` that of its blocks.
#define EDGE_EMU_EXPORT extern "C" __attribute__((visibility("default")))
#define EDGE_KERNEL(symbol, threads, Args, ...)                                                      \
    EDGE_EMU_OUTSIDE                                                                                 \
    EDGE_EMU_EXPORT const size_t emu_size_##symbol = sizeof(Args);                                   \
    EDGE_EMU_EXPORT const unsigned emu_threads_##symbol = threads;                                   \
    EDGE_EMU_EXPORT const char* emu_##symbol(unsigned x, unsigned y, unsigned z, size_t shared,      \
                                             const void* record) {                                   \
        return emu::launch(                                                                          \
            #symbol, [](const void* args) { __VA_ARGS__(*static_cast<const Args*>(args)); }, record, \
            {x, y, z}, threads, shared);                                                             \
    }                                                                                                \
    EDGE_EMU_INSIDE

// Fibers switched since the library was loaded, for measurements.
EDGE_EMU_EXPORT uint64_t emu_switches() { return emu::state.switches; }

inline char* dynamic_shared() { return emu::state.dynamic; }
