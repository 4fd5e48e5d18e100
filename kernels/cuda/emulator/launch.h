// A launch: its blocks one after another, shared memory poisoned before each and guarded behind.
#pragma once

#include <cstdlib>

#include "emulator/block.h"

// The library's .bss: the static shared arrays of its kernels
extern "C" __attribute__((visibility("hidden"))) char __bss_start[];
extern "C" __attribute__((visibility("hidden"))) char _end[];

namespace emu {

constexpr size_t kPoisonEach = 64 << 10;  // more static memory than this is poisoned once a launch only

inline int wanted_order() {
    const char* name = std::getenv("EDGE_EMU_ORDER");
    if (name == nullptr || *name == 0 || std::strcmp(name, "up") == 0) return 0;
    if (std::strcmp(name, "down") == 0) return 1;
    return std::strcmp(name, "shuffled") == 0 ? 2 : -1;
}

inline void poison_static() {
#if defined(__SANITIZE_ADDRESS__)
    for (char* p = __bss_start; p < _end; ++p)  // but not the red zones between arrays
        if (!__asan_address_is_poisoned(p)) *p = static_cast<char>(0xCD);
#else
    std::memset(__bss_start, 0xCD, static_cast<size_t>(_end - __bss_start));
#endif
}

// NULL, or what is wrong.
inline const char* run_blocks(int order, size_t shared) {
    const uint64_t count = uint64_t{state.blocks.x} * state.blocks.y * state.blocks.z;
    uint32_t* shuffled = nullptr;
    if (order == 2) {
        shuffled = static_cast<uint32_t*>(std::malloc(count * sizeof(uint32_t)));
        if (shuffled == nullptr) return "emulator: no memory for the order of blocks";
        fill_order(shuffled, static_cast<int>(count), order);
    }
    const bool poison_each = _end - __bss_start <= static_cast<ptrdiff_t>(kPoisonEach);
    if (!poison_each) poison_static();
    bool ran = true;
    for (uint64_t i = 0; i < count && ran; ++i) {
        const uint64_t at = shuffled != nullptr ? shuffled[i] : order == 1 ? count - 1 - i : i;
        const uint64_t row = at / state.blocks.x;
        state.block = {static_cast<unsigned>(at % state.blocks.x),
                       static_cast<unsigned>(row % state.blocks.y),
                       static_cast<unsigned>(row / state.blocks.y)};
        if (poison_each) poison_static();
        std::memset(state.dynamic, 0xCD, shared);
        std::memset(state.dynamic + shared, 0xA5, kGuard);
        ran = run_block(order);
        for (int j = 0; ran && j < kGuard; ++j)
            if (static_cast<uint8_t>(state.dynamic[shared + static_cast<size_t>(j)]) != 0xA5) {
                std::snprintf(
                    state.message, sizeof state.message,
                    "emulator: %s, block (%u, %u, %u): byte %d behind %zu bytes of dynamic shared memory "
                    "was written",
                    state.kernel, state.block.x, state.block.y, state.block.z, j, shared);
                ran = false;
            }
    }
    std::free(shuffled);
    return ran ? nullptr : state.message;
}

inline const char* launch(const char* name, void (*kernel)(const void*), const void* args, Dim3 blocks,
                          unsigned threads, size_t shared) {
    if (threads == 0 || threads > kMaxThreads) return "emulator: a block has 1 to 1024 threads";
    if (uint64_t{blocks.x} * blocks.y * blocks.z == 0) return "emulator: a grid has at least one block";
    if (uint64_t{blocks.x} * blocks.y * blocks.z > 0x7fffffff) return "emulator: more than 2**31 blocks";
    const int order = wanted_order();
    if (order < 0) return "emulator: EDGE_EMU_ORDER is neither up, down nor shuffled";
    if (state.busy) return "emulator: two threads launch kernels of one library at once";
    void* memory = nullptr;
    if (posix_memalign(&memory, 128, shared + kGuard) != 0) return "emulator: no memory for shared memory";
    state.busy = true;
    state.failed = false;
    state.kernel = name;
    state.entry = kernel;
    state.args = args;
    state.blocks = blocks;
    state.size = {threads, 1, 1};
    state.random = 0x9E3779B97F4A7C15u;
    state.dynamic = static_cast<char*>(memory);
    const char* wrong = run_blocks(order, shared);
    std::free(memory);
    state.busy = false;
    return wrong;
}

}  // namespace emu
