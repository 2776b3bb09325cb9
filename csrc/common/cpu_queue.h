// Kernels of several operators that run one after another on the same threads.
//
// Waking a thread takes longer than many kernels of a decoding step take. While a queue is open, the kernels of
// operators wait in it. run() wakes the threads once. They take ranges of the first kernel until none is left, wait
// until all of its ranges are done, and go on to the next.
#pragma once

#include <torch/csrc/stable/c/shim.h>

#include <atomic>
#include <deque>
#include <functional>
#include <thread>
#include <utility>

#include "common/check.h"

namespace dflash {

class CpuQueue {
 public:
  CpuQueue() { open_ = this; }
  CpuQueue(const CpuQueue&) = delete;
  ~CpuQueue() { open_ = nullptr; }

  // The queue that is open on this thread, or null.
  static CpuQueue* open() { return open_; }

  // A kernel that runs over [0, count) in ranges of at least `grain`.
  void add(std::function<void(int64_t begin, int64_t end)> kernel, int64_t count, int64_t grain) {
    kernels_.emplace_back(std::move(kernel), count, grain);
  }

  // Calls f when the kernels have run. What f holds lives until then.
  void afterwards(std::function<void()> f) { afterwards_.push_back(std::move(f)); }

  // Runs the kernels on the threads that torch.set_num_threads allows.
  void run() {
    uint32_t threads = 1;
    check(torch_get_num_threads(&threads) == 0, "torch's get_num_threads failed");
    for (Kernel& kernel : kernels_) {
      // Two ranges for each thread: a thread whose processor is taken away holds up no more than one of them.
      const int64_t share = (kernel.count + 2 * threads - 1) / (2 * threads);
      kernel.range = share > kernel.grain ? share : kernel.grain;
    }
    const auto work = [](int64_t, int64_t, void* queue) {
      for (Kernel& kernel : static_cast<CpuQueue*>(queue)->kernels_) kernel.work();
    };
    check(torch_parallel_for(0, threads, 1, work, this) == 0, "torch's parallel_for failed");
    kernels_.clear();
    for (const auto& f : std::exchange(afterwards_, {})) f();
  }

 private:
  struct Kernel {
    Kernel(std::function<void(int64_t, int64_t)> function, int64_t count, int64_t grain)
        : function(std::move(function)), count(count), grain(grain) {}

    void work() {
      for (int64_t begin; (begin = taken.fetch_add(range, std::memory_order_relaxed)) < count;) {
        const int64_t end = begin + range < count ? begin + range : count;
        function(begin, end);
        done.fetch_add(end - begin, std::memory_order_release);
      }
      // The thread that holds the last range may need this one's processor.
      for (int turn = 0; done.load(std::memory_order_acquire) < count; ++turn) {
        if (turn >= kBusyTurns) std::this_thread::yield();
      }
    }

    static constexpr int kBusyTurns = 1 << 14;  // 10 to 20 us
    std::function<void(int64_t, int64_t)> function;
    int64_t count, grain, range = 1;
    std::atomic<int64_t> taken{0}, done{0};
  };

  inline static thread_local CpuQueue* open_ = nullptr;
  std::deque<Kernel> kernels_;
  std::deque<std::function<void()>> afterwards_;
};

// Calls f when the kernels of the operator have run, which is at once unless they wait in a queue.
template <class F>
void after_kernels(F f) {
  if (CpuQueue* queue = CpuQueue::open()) return queue->afterwards(std::move(f));
  f();
}

}  // namespace dflash
