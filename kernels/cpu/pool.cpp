#include "pool.h"

#include <utility>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edge {
namespace {

constexpr int kSpins = 4000;  // about the length of a short phase
constexpr int kYields = 50;

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield" ::: "memory");
#endif
}

}  // namespace

Pool::Pool(int threads, std::function<void(int)> job) : threads_(threads), job_(std::move(job)) {
    try {
        for (int i = 1; i < threads; ++i) {
            team_.emplace_back([this, i] {
                uint32_t seen = 0;
                for (;;) {
                    wait_change(started_, seen);
                    ++seen;
                    if (stop_.load()) return;
                    job_(i);
                }
            });
        }
    } catch (...) {  // no more threads to be had: end those that started
        stop_.store(true);
        change(started_, started_.load() + 1);
        for (std::thread& t : team_) t.join();
        throw;
    }
}

Pool::~Pool() {
    stop_.store(true);
    change(started_, started_.load() + 1);
    for (std::thread& t : team_) t.join();
}

void Pool::run() {
    counter_.store(0, std::memory_order_relaxed);
    if (threads_ > 1) change(started_, started_.load() + 1);
    job_(0);
}

void Pool::barrier() {
    if (threads_ == 1) {
        counter_.store(0, std::memory_order_relaxed);
        return;
    }
    const uint32_t generation = generation_.load();
    if (arrived_.fetch_add(1) + 1 == threads_) {
        arrived_.store(0);
        counter_.store(0);
        change(generation_, generation + 1);
    } else {
        wait_change(generation_, generation);
    }
}

void Pool::wait_change(const std::atomic<uint32_t>& word, uint32_t old) {
    for (int i = 0; i < kSpins; ++i) {
        if (word.load(std::memory_order_acquire) != old) return;
        relax();
    }
    for (int i = 0; i < kYields; ++i) {
        if (word.load(std::memory_order_acquire) != old) return;
        std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return word.load() != old; });
    sleepers_.fetch_sub(1);
}

// Stores first and looks for sleepers second; a sleeper counts itself first and looks at the word second.
void Pool::change(std::atomic<uint32_t>& word, uint32_t value) {
    word.store(value);
    if (sleepers_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
}

}  // namespace edge
