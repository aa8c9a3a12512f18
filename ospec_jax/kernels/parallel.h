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

#include "xla/ffi/api/ffi.h"

namespace ospec {

struct Work {
  std::function<void(int64_t)> run;
  int64_t num_chunks;
  std::atomic<int64_t> next{0};
  std::atomic<int64_t> num_done{0};

  void take_chunks() {
    for (int64_t chunk; (chunk = next.fetch_add(1)) < num_chunks;) {
      run(chunk);
      num_done.fetch_add(1, std::memory_order_release);
    }
  }
};

// Calls run(0) to run(num_chunks - 1). The caller works, too, so nothing waits for a
// thread that is busy elsewhere; one that starts late finds no chunk left.
inline void share(xla::ffi::ThreadPool& pool, int64_t num_chunks, bool is_parallel,
                  std::function<void(int64_t)> run) {
  auto work = std::make_shared<Work>();
  work->run = std::move(run);
  work->num_chunks = num_chunks;
  int64_t threads = is_parallel ? pool.num_threads() : 1;
  for (int64_t i = 1; i < std::min(threads, num_chunks); ++i)
    pool.Schedule([work] { work->take_chunks(); });
  work->take_chunks();
  for (int spin = 0; work->num_done.load(std::memory_order_acquire) < num_chunks; ++spin)
    if (spin > 1000) std::this_thread::yield();
}

}  // namespace ospec

#endif  // OSPEC_JAX_KERNELS_PARALLEL_H_
