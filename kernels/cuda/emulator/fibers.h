// Stacks to switch between, for the emulator: what each device thread runs on. A switch saves the registers
// that a call preserves and no more (ucontext makes two system calls); AddressSanitizer is told of each.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

#if defined(EDGE_EMU_UCONTEXT)
#include <ucontext.h>
#elif defined(__x86_64__)
asm(R"(
    .text
    .p2align 4
    .type edge_emu_switch, @function
edge_emu_switch:
    pushq %rbp
    pushq %rbx
    pushq %r12
    pushq %r13
    pushq %r14
    pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15
    popq %r14
    popq %r13
    popq %r12
    popq %rbx
    popq %rbp
    ret
    .size edge_emu_switch, . - edge_emu_switch
)");
#define EDGE_EMU_SAVED 7  // words at a resting stack pointer; the last is where to go on
#define EDGE_EMU_RETURN 6
#elif defined(__aarch64__)
asm(R"(
    .text
    .p2align 4
    .type edge_emu_switch, %function
edge_emu_switch:
    sub sp, sp, #160
    stp x19, x20, [sp]
    stp x21, x22, [sp, #16]
    stp x23, x24, [sp, #32]
    stp x25, x26, [sp, #48]
    stp x27, x28, [sp, #64]
    stp x29, x30, [sp, #80]
    stp d8, d9, [sp, #96]
    stp d10, d11, [sp, #112]
    stp d12, d13, [sp, #128]
    stp d14, d15, [sp, #144]
    mov x9, sp
    str x9, [x0]
    mov sp, x1
    ldp x19, x20, [sp]
    ldp x21, x22, [sp, #16]
    ldp x23, x24, [sp, #32]
    ldp x25, x26, [sp, #48]
    ldp x27, x28, [sp, #64]
    ldp x29, x30, [sp, #80]
    ldp d8, d9, [sp, #96]
    ldp d10, d11, [sp, #112]
    ldp d12, d13, [sp, #128]
    ldp d14, d15, [sp, #144]
    add sp, sp, #160
    ret
    .size edge_emu_switch, . - edge_emu_switch
)");
#define EDGE_EMU_SAVED 20
#define EDGE_EMU_RETURN 11
#else
#include <ucontext.h>
#endif

#ifdef EDGE_EMU_SAVED
extern "C" __attribute__((visibility("hidden"))) void edge_emu_switch(void** from, void* to);
#endif

namespace emu {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;
#else
constexpr size_t kStack = 64 << 10;
#endif

struct Fiber {
#ifdef EDGE_EMU_SAVED
    void* resting; /* stack pointer while another runs */
#else
    ucontext_t context;
#endif
    char* low; /* the stack; of the fiber that launched, known to AddressSanitizer alone */
    size_t bytes;
    void* fake; /* AddressSanitizer's */
    Fiber* next_free;
};

// A stack of its own above a page that must not be touched. `number` spreads the stacks' hot lines over the
// cache's sets, as stacks that lie 64 KiB apart would all use the same ones.
inline bool allocate(Fiber& fiber, int number) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    void* made = mmap(nullptr, kStack + page, PROT_READ | PROT_WRITE,
                      MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (made == MAP_FAILED) return false;
    mprotect(made, page, PROT_NONE);
    fiber.low = static_cast<char*>(made) + page;
    fiber.bytes = kStack - static_cast<size_t>(number % 32) * 128;
    return true;
}

// The fiber begins at `start`, which never returns, when it is next switched to.
inline void prepare(Fiber& fiber, void (*start)()) {
    fiber.fake = nullptr;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(fiber.low, fiber.bytes);  // frames that were left for good
#endif
#ifdef EDGE_EMU_SAVED
    // x86-64: as a call leaves it, 8 bytes off a multiple of 16 once `start` has been popped
    void** sp = reinterpret_cast<void**>(fiber.low + fiber.bytes) - EDGE_EMU_SAVED - EDGE_EMU_SAVED % 2;
    for (int i = 0; i < EDGE_EMU_SAVED + EDGE_EMU_SAVED % 2; ++i) sp[i] = nullptr;
    sp[EDGE_EMU_RETURN] = reinterpret_cast<void*>(start);
    fiber.resting = sp;
#else
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.low;
    fiber.context.uc_stack.ss_size = fiber.bytes;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, start, 0);
#endif
}

// What a fiber does first when it runs again. `from` is the one that ran before.
inline void landed([[maybe_unused]] Fiber& self, [[maybe_unused]] Fiber& from) {
#if defined(__SANITIZE_ADDRESS__)
    const void* low;
    size_t bytes;
    __sanitizer_finish_switch_fiber(self.fake, &low, &bytes);
    from.low = static_cast<char*>(const_cast<void*>(low));
    from.bytes = bytes;
#endif
}

inline void switch_to(Fiber& from, Fiber& to) {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&from.fake, to.low, to.bytes);
#endif
#ifdef EDGE_EMU_SAVED
    edge_emu_switch(&from.resting, to.resting);
#else
    swapcontext(&from.context, &to.context);
#endif
}

}  // namespace emu
