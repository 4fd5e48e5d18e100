// Device memory on the host: every allocation between guards, poison where nothing was written yet and where
// it was freed. A kernel that writes beside an allocation, or into a freed one, is found when it has run, at
// the next synchronisation, at cuMemFree, or when a test asks; with AddressSanitizer at once, and so are
// reads. With EDGE_FAKE_PROTECT=1 host code that takes a device address for its own dies of it.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <deque>

#include "emulator/fake_device.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

namespace fake {

constexpr size_t kGuardBytes = 4096, kQuarantine = 64 << 20, kPoison = 64 << 20;
// NaN as f32 and as f16, out of all range as bf16
constexpr uint32_t kGuardWord = 0xffc3feb1u, kFreshWord = 0xffd3fed1u, kFreedWord = 0xffe3fee1u;

struct Block {
    char* memory; /* guard, data, guard; mapped for itself */
    size_t bytes, mapped;
    char* data() const { return memory + kGuardBytes; }
    uintptr_t address() const { return reinterpret_cast<uintptr_t>(data()); }
};

inline std::map<uintptr_t, Block> blocks;  // by address
inline std::deque<Block> freed;
inline size_t used_bytes = 0, freed_bytes = 0;
inline std::map<uintptr_t, size_t> pinned;   // registered host memory: address -> bytes
inline std::map<uintptr_t, void*> host_own;  // that of it which was allocated here

// Device memory can be touched while one of these lives.
inline int accesses = 0;
inline void protect(int how) {
    for (const auto& [address, block] : blocks) mprotect(block.memory, block.mapped, how);
    for (const Block& block : freed) mprotect(block.memory, block.mapped, how);
}
struct Access {
    const bool wanted = number("EDGE_FAKE_PROTECT", 0) != 0;
    static inline bool hidden = false;
    Access() {
        if (accesses++ == 0 && hidden) protect(PROT_READ | PROT_WRITE);
    }
    ~Access() {
        if (--accesses != 0 || (!wanted && !hidden)) return;
        hidden = wanted;
        if (hidden) protect(PROT_NONE);
    }
    Access(const Access&) = delete;
    Access& operator=(const Access&) = delete;
};

#if defined(__SANITIZE_ADDRESS__)
constexpr bool kSanitized = true;
inline void forbid(char* from, size_t n) { __asan_poison_memory_region(from, n); }
inline void allow(char* from, size_t n) { __asan_unpoison_memory_region(from, n); }
#else
constexpr bool kSanitized = false;
inline void forbid(char*, size_t) {}
inline void allow(char*, size_t) {}
#endif

inline void fill_words(char* from, char* to, uint32_t word) {
    for (; from + 4 <= to; from += 4) std::memcpy(from, &word, 4);
    std::memcpy(from, &word, static_cast<size_t>(to - from));
}
// First byte of [from, to) that is no more what `fill_words` wrote, or NULL.
inline const char* first_changed(const char* from, const char* to, uint32_t word) {
    for (const char* p = from; p < to; p += 4) {
        const size_t n = to - p < 4 ? static_cast<size_t>(to - p) : 4;
        if (std::memcmp(p, &word, n) == 0) continue;
        for (size_t i = 0; i < n; ++i)
            if (p[i] != reinterpret_cast<const char*>(&word)[i]) return p + i;
    }
    return nullptr;
}

inline Result check_block(const Block& block) {
    if (kSanitized) return kOk;  // a touch of a guard has ended the process
    static char untouched[kGuardBytes];
    if (untouched[0] == 0) fill_words(untouched, untouched + kGuardBytes, kGuardWord);
    char* end = block.data() + block.bytes;
    const bool before = std::memcmp(block.memory, untouched, kGuardBytes) == 0;
    if (before && std::memcmp(end, untouched, kGuardBytes) == 0) return kOk;
    const char* wrong = before ? first_changed(end, end + kGuardBytes, kGuardWord)
                               : first_changed(block.memory, block.data(), kGuardWord);
    return raise_fault(kIllegalAddress, "byte %td of an allocation of %zu bytes was written, beside it",
                       wrong - block.data(), block.bytes);
}
inline Result check_freed(const Block& block) {
    if (kSanitized) return kOk;
    const char* wrong = first_changed(block.data(), block.data() + block.bytes, kFreedWord);
    if (wrong == nullptr) return kOk;
    return raise_fault(kIllegalAddress, "byte %td of %zu bytes was written after they were freed",
                       wrong - block.data(), block.bytes);
}
inline Result check_guards() {
    const Access access;
    for (const auto& [address, block] : blocks)
        if (Result r = check_block(block)) return r;
    return kOk;
}
inline Result check_memory() {
    const Access access;
    if (Result r = check_guards()) return r;
    for (const Block& block : freed)
        if (Result r = check_freed(block)) return r;
    return kOk;
}

inline Result allocate(size_t bytes, uintptr_t* out) {
    if (bytes == 0) return kInvalidValue;
    const size_t total = memory_bytes();
    if (bytes > total || used_bytes > total - bytes) return kOutOfMemory;
    const auto largest = static_cast<size_t>(number("EDGE_FAKE_LARGEST", 0));
    if (largest != 0 && bytes > largest) return kOutOfMemory;
    const Access access;
    const size_t mapped = (kGuardBytes * 2 + bytes + 4095) / 4096 * 4096;
    void* memory = mmap(nullptr, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) return kOutOfMemory;
    const Block block{static_cast<char*>(memory), bytes, mapped};
    char* end = block.data() + bytes;
    fill_words(block.memory, block.data(), kGuardWord);
    // Of a large block only the beginning, so that it takes no more of the machine's memory than is used
    fill_words(block.data(), block.data() + std::min(bytes, kPoison), kFreshWord);
    fill_words(end, end + kGuardBytes, kGuardWord);
    forbid(block.memory, kGuardBytes);
    forbid(end, static_cast<size_t>(block.memory + mapped - end));
    used_bytes += bytes;
    blocks[block.address()] = block;
    *out = block.address();
    return kOk;
}

inline void unmap(const Block& block) {
    allow(block.memory, block.mapped);
    munmap(block.memory, block.mapped);
}

inline Result release(uintptr_t address) {
    const auto found = blocks.find(address);
    if (found == blocks.end()) return kInvalidValue;
    const Access access;
    const Block block = found->second;
    const Result wrong = check_block(block);
    blocks.erase(found);
    used_bytes -= block.bytes;
    if (block.bytes > kQuarantine) {
        unmap(block);
        return wrong;
    }
    fill_words(block.data(), block.data() + block.bytes, kFreedWord);
    forbid(block.data(), block.bytes);
    freed.push_back(block);
    freed_bytes += block.bytes;
    Result late = kOk;
    while (freed_bytes > kQuarantine) {
        const Block old = freed.front();
        freed.pop_front();
        freed_bytes -= old.bytes;
        if (late == kOk) late = check_freed(old);
        unmap(old);
    }
    return wrong != kOk ? wrong : late;
}

// All of it, the freed too, unmapped.
inline void release_all() {
    while (!blocks.empty()) release(blocks.begin()->first);
    for (const Block& block : freed) unmap(block);
    freed.clear();
    freed_bytes = 0;
}

inline bool within(uintptr_t address, size_t bytes) {
    auto it = blocks.upper_bound(address);
    if (it == blocks.begin()) return false;
    --it;
    const size_t offset = address - it->first;
    return offset <= it->second.bytes && bytes <= it->second.bytes - offset;
}

inline bool is_pinned(const void* host, size_t bytes) {
    const auto address = reinterpret_cast<uintptr_t>(host);
    auto it = pinned.upper_bound(address);
    if (it == pinned.begin()) return false;
    --it;
    const size_t offset = address - it->first;
    return offset <= it->second && bytes <= it->second - offset;
}
inline bool overlaps_pinned(uintptr_t address, size_t bytes) {
    auto it = pinned.lower_bound(address + bytes);
    return it != pinned.begin() && (--it)->first + it->second > address;
}

}  // namespace fake
