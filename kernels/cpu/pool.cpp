#include "pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace edge {
namespace {

constexpr int kSpins = 4000;  // about the length of a short stage
constexpr int kYields = 50;
constexpr int kUnitBits = 26;  // of a ticket
constexpr uint64_t kUnitMask = (uint64_t{1} << kUnitBits) - 1;
static_assert(Pool::kMaxUnits == kUnitMask, "a unit must fit its bits");
constexpr uint64_t kLastPhase = uint64_t{1} << (63 - kUnitBits);  // months of steps; then phases start again

inline void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield" ::: "memory");
#endif
}

// Denormals as IEEE says, whatever the host program set for its thread: results must not depend on it.
class FloatMode {
  public:
#if defined(__x86_64__)
    FloatMode() : saved_(_mm_getcsr()) { _mm_setcsr(0x1f80); }
    ~FloatMode() { _mm_setcsr(saved_); }

  private:
    unsigned saved_;
#elif defined(__aarch64__)
    FloatMode() {
        asm volatile("mrs %0, fpcr" : "=r"(saved_));
        asm volatile("msr fpcr, %0" ::"r"(static_cast<uint64_t>(0)));
    }
    ~FloatMode() { asm volatile("msr fpcr, %0" ::"r"(saved_)); }

  private:
    uint64_t saved_;
#endif
};

}  // namespace

Pool::Pool(int threads, uint32_t stages, Work& work)
    : threads_(threads), work_(work), stages_(stages), ticket_(uint64_t{stages} << kUnitBits) {
    try {
        for (int i = 1; i < threads; ++i) {
            team_.emplace_back([this, i] {
                while (!stop_.load()) {
                    walk(i);
                    wait_change(ticket_.load() >> kUnitBits);
                }
            });
        }
    } catch (...) {  // no more threads to be had: end those that started
        stop();
        throw;
    }
}

Pool::~Pool() { stop(); }

void Pool::stop() {
    {
        const std::lock_guard<std::mutex> lock(mutex_);
        stop_.store(true);
    }
    wake_.notify_all();
    for (std::thread& t : team_) t.join();
    team_.clear();
}

void Pool::run() {
    const uint64_t rest = ticket_.load() >> kUnitBits;
    advance(rest < kLastPhase ? rest : stages_);
    walk(0);
}

// Takes part until the run is over; a thread that comes late goes on where the others are.
void Pool::walk(int thread) {
    const FloatMode mode;
    for (;;) {
        uint64_t ticket = ticket_.load(std::memory_order_acquire);
        const uint64_t phase = ticket >> kUnitBits;
        const uint32_t stage = stage_of(phase);
        if (stage == stages_ || stop_.load(std::memory_order_relaxed)) return;
        const uint32_t units = work_.units(stage);
        const auto unit = static_cast<uint32_t>(ticket & kUnitMask);
        if (unit >= units) {
            wait_change(phase);
            continue;
        }
        // From here to done_ this thread holds a unit, so the stage and its run cannot end.
        if (!ticket_.compare_exchange_weak(ticket, ticket + 1, std::memory_order_acq_rel)) continue;
        work_.run(thread, stage, unit);
        if (done_.fetch_add(1, std::memory_order_acq_rel) + 1 == units) advance(phase);
    }
}

// Opens the next stage that has units, or the rest after the last.
void Pool::advance(uint64_t phase) {
    do {
        ++phase;
    } while (stage_of(phase) != stages_ && work_.units(stage_of(phase)) == 0);
    done_.store(0, std::memory_order_relaxed);
    ticket_.store(phase << kUnitBits);
    // Stores first and looks for sleepers second; a sleeper counts itself first and looks at the phase
    // second.
    if (sleepers_.load() > 0) {
        const std::lock_guard<std::mutex> lock(mutex_);
        wake_.notify_all();
    }
}

void Pool::wait_change(uint64_t phase) {
    for (int i = 0; i < kSpins; ++i) {
        if (ticket_.load(std::memory_order_acquire) >> kUnitBits != phase) return;
        relax();
    }
    for (int i = 0; i < kYields; ++i) {
        if (ticket_.load(std::memory_order_acquire) >> kUnitBits != phase) return;
        std::this_thread::yield();
    }
    std::unique_lock<std::mutex> lock(mutex_);
    sleepers_.fetch_add(1);
    wake_.wait(lock, [&] { return ticket_.load() >> kUnitBits != phase || stop_.load(); });
    sleepers_.fetch_sub(1);
}

}  // namespace edge
