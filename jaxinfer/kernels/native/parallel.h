// A loop over the threads of XLA's own pool, so that no others compete with it.

#pragma once

#include <atomic>
#include <memory>
#include <thread>
#include <utility>

#include <immintrin.h>

#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

inline constexpr int kSpins = 1000;

// Runs body(i) for i in [0, count); returns when all have run. Threads take the next index as they come free. The
// caller takes part, so that it never waits for a thread that has not begun.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  struct State {
    std::atomic<int64_t> next{0}, done{0};
  };
  auto state = std::make_shared<State>();
  // A thread that begins late finds nothing left, and does not touch `body`, which may be gone.
  auto work = [state, count, &body] {
    for (int64_t i; (i = state->next.fetch_add(1)) < count;) {
      body(i);
      state->done.fetch_add(1, std::memory_order_release);
    }
  };
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(decltype(work)(work));
  work();
  // The others are about to be done, unless the machine has more to do than processors: then they need this one.
  for (int turn = 0; state->done.load(std::memory_order_acquire) < count; ++turn) {
    if (turn < kSpins) _mm_pause();
    else std::this_thread::yield();
  }
}

}  // namespace jaxinfer
