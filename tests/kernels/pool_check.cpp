// Walks many runs on several threads and checks that every unit ran once, after every unit of the stages
// before.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "pool.h"

namespace {

constexpr uint32_t kStages = 7;

class Check final : public edge::Work {
  public:
    void prepare(uint32_t size) {
        size_.store(size);
        for (uint32_t s = 0; s < kStages; ++s) counts_[s].assign(units(s), 0);
        plain_ = 0;
    }
    uint32_t units(uint32_t stage) const override {
        const uint32_t size = size_.load(std::memory_order_relaxed);
        return stage % 3 == 2 ? (size % 2 == 0 ? 0 : 1) : size + stage;  // some stages are empty
    }
    void run(int, uint32_t stage, uint32_t unit) override {
        ++counts_[stage][unit];  // not atomic: a second owner would be a race
        for (uint32_t s = 0; s < stage; ++s)
            for (const int count : counts_[s])
                if (count != 1) fail("a unit ran before the stage before it was done");
        if (units(stage) == 1) ++plain_;
    }
    void verify() const {
        for (const std::vector<int>& stage : counts_)
            for (const int count : stage)
                if (count != 1) fail("a unit did not run exactly once");
    }

  private:
    [[noreturn]] static void fail(const char* what) {
        std::printf("%s\n", what);
        std::exit(1);
    }
    std::atomic<uint32_t> size_{0};
    std::vector<int> counts_[kStages];
    int plain_ = 0;
};

}  // namespace

int main() {
    for (const int threads : {1, 2, 5}) {
        Check check;
        check.prepare(1);
        edge::Pool pool(threads, kStages, check);
        for (uint32_t i = 0; i < 400; ++i) {
            check.prepare(i % 9 + 1);
            pool.run();
            check.verify();
        }
    }
    edge::Pool idle(3, kStages, *new Check);  // never run; must end all the same
    std::printf("ok\n");
    return 0;
}
