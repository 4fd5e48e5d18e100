// CUDA C++ on the host, for tests: each thread of a block is a fiber, blocks run one after another. Covers what
// device.cuh and the kernels use: 1-D blocks, 3-D grids, shared memory, barriers, shuffles, votes, atomics and
// the fragments of mma. A barrier that not all live threads reach ends the process with a message.
#pragma once

#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <vector>

#define EDGE_DEVICE inline
#define EDGE_SHARED static  // blocks run one after another, so one copy is enough

struct Dim3 {
    unsigned x, y, z;
};

namespace emu {

struct Barrier {
    int arrived = 0;
    unsigned generation = 0;
};
struct WarpWords {
    uint32_t a[32][4], b[32][2];
};
struct Fiber {
    ucontext_t context;
    std::vector<char> stack;
    unsigned thread;
    bool done;
};
struct Warp {
    Barrier barrier;
    int live;
    uint64_t slots[32];
    WarpWords words;
};

inline Fiber* running;
inline ucontext_t scheduler;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline int live;
inline bool progress;
inline Dim3 grid, block_index, block_size;
inline char* dynamic;
inline void (*entry)(const void*);
inline const void* entry_args;

inline int lane() { return static_cast<int>(running->thread % 32); }
inline Warp& warp() { return warps[running->thread / 32]; }

inline void wait(Barrier& barrier, int need) {
    const unsigned generation = barrier.generation;
    if (++barrier.arrived >= need) {
        barrier.arrived = 0;
        ++barrier.generation;
        progress = true;
    }
    while (barrier.generation == generation) swapcontext(&running->context, &scheduler);
}

inline void sync_warp() { wait(warp().barrier, warp().live); }

inline void body() {
    entry(entry_args);
    Fiber* self = running;
    self->done = true;
    progress = true;
    --live;
    Warp& mine = warp();
    --mine.live;
    if (live > 0 && block.arrived >= live) {
        block.arrived = 0;
        ++block.generation;
    }
    if (mine.live > 0 && mine.barrier.arrived >= mine.live) {
        mine.barrier.arrived = 0;
        ++mine.barrier.generation;
    }
    swapcontext(&self->context, &scheduler);
}

template <class T>
T exchange(T value, int source) {
    static_assert(sizeof(T) <= 8);
    std::memcpy(&warp().slots[lane()], &value, sizeof value);
    sync_warp();
    T found;
    std::memcpy(&found, &warp().slots[source & 31], sizeof found);
    sync_warp();
    return found;
}

inline WarpWords share_fragments(const uint32_t (&a)[4], const uint32_t (&b)[2]) {
    WarpWords& w = warp().words;
    std::memcpy(w.a[lane()], a, sizeof a);
    std::memcpy(w.b[lane()], b, sizeof b);
    sync_warp();
    return w;
}
inline void fragments_done() { sync_warp(); }

inline void run_block() {
    const int n = static_cast<int>(block_size.x);
    if (static_cast<int>(fibers.size()) < n) fibers.resize(static_cast<size_t>(n));
    warps.assign(static_cast<size_t>((n + 31) / 32), Warp{});
    block = {};
    live = n;
    for (int i = 0; i < n; ++i) {
        Fiber& f = fibers[static_cast<size_t>(i)];
        if (f.stack.empty()) f.stack.resize(64 << 10);
        f.done = false;
        f.thread = static_cast<unsigned>(i);
        ++warps[static_cast<size_t>(i / 32)].live;
        getcontext(&f.context);
        f.context.uc_stack.ss_sp = f.stack.data();
        f.context.uc_stack.ss_size = f.stack.size();
        f.context.uc_link = nullptr;
        makecontext(&f.context, body, 0);
    }
    while (live > 0) {
        progress = false;
        for (int i = 0; i < n; ++i) {
            Fiber& f = fibers[static_cast<size_t>(i)];
            if (f.done) continue;
            running = &f;
            swapcontext(&scheduler, &f.context);
        }
        if (!progress && live > 0) {
            std::fprintf(stderr, "emulator: block %u,%u,%u is stuck: %d threads, %d at __syncthreads\n",
                         block_index.x, block_index.y, block_index.z, live, block.arrived);
            std::abort();
        }
    }
}

inline void launch(void (*kernel)(const void*), const void* args, Dim3 blocks, unsigned threads, size_t shared) {
    std::vector<char> memory(shared + 128);
    dynamic = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(memory.data()) + 127) & ~uintptr_t{127});
    entry = kernel;
    entry_args = args;
    grid = blocks;
    block_size = {threads, 1, 1};
    for (unsigned z = 0; z < blocks.z; ++z)
        for (unsigned y = 0; y < blocks.y; ++y)
            for (unsigned x = 0; x < blocks.x; ++x) {
                block_index = {x, y, z};
                std::memset(dynamic, 0xCD, shared);
                run_block();
            }
}

}  // namespace emu

#define threadIdx (Dim3{emu::running->thread, 0, 0})
#define blockIdx (emu::block_index)
#define blockDim (emu::block_size)
#define gridDim (emu::grid)

inline void __syncthreads() { emu::wait(emu::block, emu::live); }
inline void __syncwarp(uint32_t = 0xffffffffu) { emu::sync_warp(); }
template <class T>
T __shfl_sync(uint32_t, T value, int source) {
    return emu::exchange(value, source);
}
template <class T>
T __shfl_xor_sync(uint32_t, T value, int mask) {
    return emu::exchange(value, emu::lane() ^ mask);
}
inline uint32_t __ballot_sync(uint32_t, bool vote) {
    uint32_t all = 0;
    for (int i = 0; i < 32; ++i)
        if (emu::exchange(static_cast<int>(vote), i)) all |= 1u << i;
    return all;
}
template <class T>
T atomicOr(T* p, T value) {
    const T old = *p;
    *p |= value;
    return old;
}
template <class T>
T atomicAdd(T* p, T value) {
    const T old = *p;
    *p += value;
    return old;
}
template <class T>
T atomicMax(T* p, T value) {
    const T old = *p;
    if (value > old) *p = value;
    return old;
}

// What a test calls in place of a launch. `emu_<symbol>` runs it; `emu_size_<symbol>` is its record's size.
#define EDGE_KERNEL(symbol, threads, Args, ...)                                                             \
    extern "C" __attribute__((visibility("default"))) const size_t emu_size_##symbol = sizeof(Args);                                               \
    extern "C" __attribute__((visibility("default"))) const unsigned emu_threads_##symbol = threads;                                               \
    extern "C" __attribute__((visibility("default"))) void emu_##symbol(unsigned gx, unsigned gy, unsigned gz, size_t shared, const void* args) {  \
        emu::launch([](const void* a) { __VA_ARGS__(*static_cast<const Args*>(a)); }, args, {gx, gy, gz},   \
                    threads, shared);                                                                       \
    }

namespace edge {
EDGE_DEVICE char* dynamic_shared() { return emu::dynamic; }
}  // namespace edge
