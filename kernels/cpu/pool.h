// A team of threads that walks a fixed list of stages, each cut into units of work.
//
// A stage ends when its units are done, not when every thread has come by: a thread that the system has put
// aside holds nobody up unless it holds a unit, and finds the current stage when it wakes. Waiting spins
// briefly, then yields, then sleeps, so that a busy machine is not kept from its other work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace edge {

class Work {
  public:
    // May be called between runs and while the answer changes; only the current run's answer is used.
    virtual uint32_t units(uint32_t stage) const = 0;
    // Each unit of a stage runs once, on any thread, after every unit of the stages before.
    virtual void run(int thread, uint32_t stage, uint32_t unit) = 0;

  protected:
    ~Work() = default;
};

class Pool {
  public:
    static constexpr int64_t kMaxUnits = (int64_t{1} << 26) - 1;  // of one stage

    // Starts threads - 1 threads; run() lends its own. A run has `stages` stages.
    Pool(int threads, uint32_t stages, Work& work);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Walks all stages once. Not to be called by two threads at once.
    void run();

  private:
    void walk(int thread);
    void advance(uint64_t phase);
    void wait_change(uint64_t phase);
    void stop();

    // `stages_` is the rest between runs.
    uint32_t stage_of(uint64_t phase) const { return static_cast<uint32_t>(phase % (stages_ + uint64_t{1})); }

    const int threads_;
    Work& work_;
    const uint32_t stages_;
    // Phase (counts the stages of all runs, and one rest after each run), then the next unit of it.
    alignas(64) std::atomic<uint64_t> ticket_;
    alignas(64) std::atomic<uint32_t> done_{0};
    alignas(64) std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> team_;
};

}  // namespace edge
