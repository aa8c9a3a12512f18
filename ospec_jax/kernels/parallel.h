// SPDX-License-Identifier: Apache-2.0
//
// Shares chunks of work among XLA's own threads.

#ifndef OSPEC_JAX_KERNELS_PARALLEL_H_
#define OSPEC_JAX_KERNELS_PARALLEL_H_

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include "xla/ffi/api/ffi.h"

namespace ospec {

// Chunks that may run in any order, and at once.
struct Phase {
  int64_t num_chunks;
  std::function<void(int64_t)> run;
};

// Phases one after the other: none begins before all chunks of the one before are done.
class Work {
 public:
  explicit Work(std::vector<Phase> phases)
      : phases_(std::move(phases)), progress_(phases_.size()) {}

  void take_chunks() {
    for (size_t i = 0; i < phases_.size(); ++i) {
      const int64_t num_chunks = phases_[i].num_chunks;
      for (int64_t chunk; (chunk = progress_[i].next.fetch_add(1)) < num_chunks;) {
        phases_[i].run(chunk);
        progress_[i].num_done.fetch_add(1, std::memory_order_release);
      }
      for (int spin = 0;
           progress_[i].num_done.load(std::memory_order_acquire) < num_chunks; ++spin)
        if (spin > 1000) std::this_thread::yield();
    }
  }

 private:
  struct alignas(64) Progress {
    std::atomic<int64_t> next{0};
    std::atomic<int64_t> num_done{0};
  };

  std::vector<Phase> phases_;
  std::vector<Progress> progress_;
};

// Runs all phases. The caller works, too, so nothing waits for a thread that is busy
// elsewhere; one that starts late finds no chunk left.
inline void run_phases(xla::ffi::ThreadPool& pool, bool is_parallel,
                       std::vector<Phase> phases) {
  int64_t widest = 1;
  for (const Phase& phase : phases) widest = std::max(widest, phase.num_chunks);
  auto work = std::make_shared<Work>(std::move(phases));
  int64_t threads = is_parallel ? pool.num_threads() : 1;
  for (int64_t i = 1; i < std::min(threads, widest); ++i)
    pool.Schedule([work] { work->take_chunks(); });
  work->take_chunks();
}

// Memory that a thread keeps from one call to the next.
class Buffer {
 public:
  // Place for so many values, which begins at a whole vector of 64 bytes.
  template <class T>
  T* of(int64_t count) {
    const size_t size = count * sizeof(T) + 64;
    if (bytes_.size() < size) bytes_.resize(size);
    auto address = reinterpret_cast<uintptr_t>(bytes_.data());
    return reinterpret_cast<T*>(bytes_.data() + (64 - address % 64) % 64);
  }

 private:
  std::vector<char> bytes_;
};

}  // namespace ospec

#endif  // OSPEC_JAX_KERNELS_PARALLEL_H_
