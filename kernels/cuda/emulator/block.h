// One block's threads on fibers. A thread runs until it must wait for others; then the next of its warp runs,
// and when none of the warp can, another warp. A thread that ends hands its fiber to the next that has not
// begun, so a kernel that never waits runs on one stack. In which order threads and blocks run is
// EDGE_EMU_ORDER's: up (the default), down or shuffled.
//
// What breaks CUDA's rules ends the launch with a message: a barrier or an exchange that not all reach, that
// is reached from different places, or by a warp some of whose lanes have ended or never were; writes beside
// the dynamic shared memory. Shared memory is full of 0xCD when a block begins.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <cstring>

#include "emulator/fibers.h"
#include "emulator/mma.h"

struct Dim3 {
    unsigned x, y, z;
};

namespace emu {

constexpr int kMaxThreads = 1024, kMaxWarps = 32, kGuard = 64;

struct Site {
    const char* what;
    const char* file;
    int line;
    bool whole;  // of lanes: all 32 must take part
};

// Threads of a warp by place: the order in which they run. Slots by lane.
struct Warp {
    uint32_t ready, waiting, at_block, live;  // bits of places
    unsigned meetings;                        // of the warp; two sets of slots serve alternately
    Site site;
    uint8_t lanes[32];  // by place
    uint32_t votes[2];
    uint64_t slots[2][32];
    Fragments fragments[2];
    Fiber* fibers[32];  // where those that have begun are
};

struct State {
    // the thread that runs
    Dim3 thread;
    int lane, place;
    Warp* warp;
    Fiber* fiber;
    Fiber* previous;  // ran before it
    // its block
    Dim3 block, blocks, size;
    uint32_t runnable;  // bits of warps
    int warp_count, live, at_barrier;
    Site barrier;
    char* dynamic;
    void (*entry)(const void*);
    const void* args;
    uint64_t random;
    // the launch
    const char* kernel;
    bool busy, failed;
    char message[1024];
    uint64_t switches;
    // kept from launch to launch
    Fiber main;
    Fiber fibers[kMaxThreads];
    int made;
    Fiber* free_fibers;
    int warp_order[kMaxWarps];  // index of a warp by its place in `warps`
    Warp warps[kMaxWarps];
};

// Outside .bss, which then holds the shared arrays of kernels and nothing else
__attribute__((section("edge_emulator"))) static State state = {};

void run_threads();

inline void become(Warp* warp, int place) {
    state.warp = warp;
    state.place = place;
    state.lane = warp->lanes[place];
    state.thread.x = static_cast<unsigned>(state.warp_order[warp - state.warps] * 32 + state.lane);
}

inline void jump(Fiber* to) {
    Fiber* self = state.fiber;
    state.previous = self;
    state.fiber = to;
    ++state.switches;
    switch_to(*self, *to);
    landed(*self, *state.previous);
}

[[noreturn]] __attribute__((format(printf, 1, 2), cold, noinline)) inline void fail(const char* format, ...) {
    int used =
        std::snprintf(state.message, sizeof state.message, "emulator: %s, block (%u, %u, %u): ", state.kernel,
                      state.block.x, state.block.y, state.block.z);
    va_list list;
    va_start(list, format);
    std::vsnprintf(state.message + used, sizeof state.message - static_cast<size_t>(used), format, list);
    va_end(list);
    state.failed = true;
    jump(&state.main);
    std::abort();  // a fiber of a failed launch is never resumed
}

inline const char* base(const char* path) {
    const char* slash = std::strrchr(path, '/');
    return slash != nullptr ? slash + 1 : path;
}

[[noreturn]] __attribute__((cold, noinline)) inline void fail_stuck() {
    char text[600];
    int used = 0;
    const auto add = [&](const char* format, auto... values) {
        if (used < static_cast<int>(sizeof text))
            used += std::snprintf(text + used, sizeof text - static_cast<size_t>(used), format, values...);
    };
    if (state.at_barrier > 0)
        add("; %d at %s (%s:%d)", state.at_barrier, state.barrier.what, base(state.barrier.file),
            state.barrier.line);
    for (int i = 0; i < state.warp_count; ++i) {
        const Warp& w = state.warps[i];
        if (w.waiting != 0)
            add("; %d of warp %d at %s (%s:%d)", __builtin_popcount(w.waiting), state.warp_order[i],
                w.site.what, base(w.site.file), w.site.line);
    }
    fail("%d of %u threads wait for ever%s", state.live, state.size.x, text);
}

// Bits of places have the least first, so the lowest bit is who runs next.
inline void choose() {
    Warp* warp = state.warp;
    if (warp == nullptr || warp->ready == 0) {
        if (warp != nullptr) state.runnable &= ~(1u << (warp - state.warps));
        if (state.runnable == 0) {
            state.warp = nullptr;
            return;
        }
        warp = state.warps + __builtin_ctz(state.runnable);
    }
    become(warp, __builtin_ctz(warp->ready));
}

// The running thread lets others run until it is chosen again: of its own warp, or of the first that has any.
inline void pause(bool of_first) {
    Warp* warp = state.warp;
    const int place = state.place;
    warp->fibers[place] = state.fiber;
    if (of_first) state.warp = nullptr;
    choose();
    if (state.warp == warp && state.place == place) return;
    if (state.warp == nullptr) {
        state.warp = warp;
        fail_stuck();
    }
    Fiber* to = state.warp->fibers[state.place];
    if (to == nullptr) {
        to = state.free_fibers;
        if (to == nullptr) {
            to = &state.fibers[state.made];
            if (!allocate(*to, state.made)) fail("no memory for the stack of thread %u", state.thread.x);
            ++state.made;
            prepare(*to, run_threads);
        } else {
            state.free_fibers = to->next_free;
        }
    }
    jump(to);
}

inline bool same(const Site& a, const Site& b) {
    return a.line == b.line && (a.what == b.what || std::strcmp(a.what, b.what) == 0);
}

inline void release(Warp& warp) {
    warp.ready |= warp.waiting;
    warp.waiting = 0;
    warp.votes[++warp.meetings & 1] = 0;
    state.runnable |= 1u << (&warp - state.warps);
}

// A lane comes to where all live lanes of its warp must meet; true for the last, who may do something for
// all. `pass` must follow.
__attribute__((noinline)) inline bool arrive(const Site& site) {
    Warp& warp = *state.warp;
    if (warp.waiting == 0) {
        warp.site = site;
        if (site.whole && warp.live != 0xffffffffu)
            fail("%s (%s:%d) by a warp of %d lanes: all 32 must be alive", site.what, base(site.file),
                 site.line, __builtin_popcount(warp.live));
    } else if (!same(site, warp.site)) {
        fail("thread %u is at %s (%s:%d) while lanes of its warp are at %s (%s:%d)", state.thread.x,
             site.what, base(site.file), site.line, warp.site.what, base(warp.site.file), warp.site.line);
    }
    const uint32_t bit = 1u << state.place;
    warp.waiting |= bit;
    warp.ready &= ~bit;
    return warp.waiting == warp.live;
}

// Waits for the others; the last lets all go on.
__attribute__((noinline)) inline void pass() {
    Warp& warp = *state.warp;
    if (warp.waiting == warp.live) release(warp);
    pause(false);
}

inline void meet(const Site& site) {
    arrive(site);
    pass();
}

inline void open_barrier() {
    for (int i = 0; i < state.warp_count; ++i) {
        Warp& warp = state.warps[i];
        if (warp.at_block == 0) continue;
        warp.ready |= warp.at_block;
        warp.at_block = 0;
        state.runnable |= 1u << i;
    }
    state.at_barrier = 0;
}

__attribute__((noinline)) inline void wait_for_block(const Site& site) {
    Warp& warp = *state.warp;
    if (state.at_barrier == 0) {
        state.barrier = site;
    } else if (!same(site, state.barrier)) {
        fail("thread %u is at %s (%s:%d) while others are at %s:%d", state.thread.x, site.what,
             base(site.file), site.line, base(state.barrier.file), state.barrier.line);
    }
    const uint32_t bit = 1u << state.place;
    warp.ready &= ~bit;
    warp.at_block |= bit;
    const bool last = ++state.at_barrier == state.live;
    if (last) open_barrier();
    pause(last);
}

inline void finish_thread() {
    Warp& warp = *state.warp;
    const uint32_t bit = 1u << state.place;
    warp.ready &= ~bit;
    warp.live &= ~bit;
    --state.live;
    if (warp.waiting != 0) {
        if (warp.site.whole)
            fail("thread %u ended while lanes of its warp are at %s (%s:%d)", state.thread.x, warp.site.what,
                 base(warp.site.file), warp.site.line);
        if (warp.waiting == warp.live) release(warp);
    }
    if (state.at_barrier > 0 && state.at_barrier == state.live) open_barrier();
}

// A fiber's whole life: it takes threads that have not begun, and rests on the free list while there are
// none.
inline void run_threads() {
    landed(*state.fiber, *state.previous);
    for (;;) {
        state.entry(state.args);
        finish_thread();
        choose();
        Fiber* to = &state.main;
        if (state.warp != nullptr) {
            to = state.warp->fibers[state.place];
            if (to == nullptr) continue;
        } else if (state.live > 0) {
            state.warp = state.warps;
            fail_stuck();
        }
        state.fiber->next_free = state.free_fibers;
        state.free_fibers = state.fiber;
        jump(to);
    }
}

inline uint32_t random_below(uint32_t n) {
    state.random = state.random * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>((state.random >> 33) % n);
}

// Index at a place of `n` in the launch's order: 0 up, 1 down, 2 shuffled.
template <class T>
inline void fill_order(T* out, int n, int order) {
    for (int i = 0; i < n; ++i) out[i] = static_cast<T>(order == 1 ? n - 1 - i : i);
    if (order != 2) return;
    for (int i = n - 1; i > 0; --i) {
        const uint32_t j = random_below(static_cast<uint32_t>(i) + 1);
        const T kept = out[i];
        out[i] = out[j];
        out[j] = kept;
    }
}

inline void start_block(int order) {
    const int threads = static_cast<int>(state.size.x);
    state.warp_count = (threads + 31) / 32;
    fill_order(state.warp_order, state.warp_count, order);
    for (int i = 0; i < state.warp_count; ++i) {
        Warp& warp = state.warps[i];
        const int first = state.warp_order[i] * 32, lanes = threads - first < 32 ? threads - first : 32;
        warp.live = warp.ready = lanes == 32 ? 0xffffffffu : (1u << lanes) - 1;
        warp.waiting = warp.at_block = 0;
        warp.meetings = 0;
        warp.votes[0] = 0;
        fill_order(warp.lanes, lanes, order);
        std::memset(warp.fibers, 0, sizeof warp.fibers);
    }
    state.runnable = state.warp_count == 32 ? 0xffffffffu : (1u << state.warp_count) - 1;
    state.live = threads;
    state.at_barrier = 0;
    state.warp = nullptr;
}

// Runs the block `state.block`; false when it failed.
inline bool run_block(int order) {
    start_block(order);
    state.fiber = &state.main;
    choose();
    Fiber* first = state.free_fibers;
    if (first != nullptr) {
        state.free_fibers = first->next_free;
    } else {
        first = &state.fibers[0];
        if (!allocate(*first, 0)) {
            std::snprintf(state.message, sizeof state.message, "emulator: no memory for a stack");
            return false;
        }
        state.made = 1;
        prepare(*first, run_threads);
    }
    jump(first);
    if (!state.failed) return true;
    state.free_fibers = nullptr;  // what ran on them is lost
    for (int i = 0; i < state.made; ++i) {
        prepare(state.fibers[i], run_threads);
        state.fibers[i].next_free = state.free_fibers;
        state.free_fibers = &state.fibers[i];
    }
    return false;
}

}  // namespace emu
