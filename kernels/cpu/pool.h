// A team of threads that runs one job at a time and meets at barriers. Waiting spins briefly, then yields,
// then sleeps, so that a busy machine is not kept from its other work.
#pragma once

#include <atomic>
#include <condition_variable>
#include <cstdint>
#include <functional>
#include <mutex>
#include <thread>
#include <vector>

namespace edge {

class Pool {
  public:
    // `job(thread)` runs on every thread of a run(); threads - 1 are started here.
    Pool(int threads, std::function<void(int)> job);
    ~Pool();
    Pool(const Pool&) = delete;
    Pool& operator=(const Pool&) = delete;

    int threads() const { return threads_; }
    // Runs the job on all threads; the job must end with a barrier.
    void run();
    // All threads arrive before any leaves; the counter of take() starts again at 0.
    void barrier();
    // The next unit of work of this phase, each given once.
    int64_t take() { return counter_.fetch_add(1, std::memory_order_relaxed); }

  private:
    void wait_change(const std::atomic<uint32_t>& word, uint32_t old);
    void change(std::atomic<uint32_t>& word, uint32_t value);

    const int threads_;
    const std::function<void(int)> job_;
    alignas(64) std::atomic<int64_t> counter_{0};
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<uint32_t> generation_{0};
    alignas(64) std::atomic<uint32_t> started_{0};
    std::atomic<int> sleepers_{0};
    std::atomic<bool> stop_{false};
    std::mutex mutex_;
    std::condition_variable wake_;
    std::vector<std::thread> team_;
};

}  // namespace edge
