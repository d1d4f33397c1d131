// Parallel loop on XLA's own thread pool, so that no other threads compete with it.

#pragma once

#include <algorithm>
#include <atomic>
#include <memory>
#include <thread>
#include <utility>
#include <vector>

#include <immintrin.h>

#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

inline constexpr int kSpins = 1000;

// Runs body(i) for i in [0, count) and returns when all have run. Each thread starts with its own contiguous part, for
// locality, and then takes work from other parts. The caller takes part, so it never waits for a thread that has not
// started.
template <typename Body>
void ParallelFor(xla::ffi::ThreadPool& pool, int64_t count, const Body& body) {
  const int64_t threads = std::min<int64_t>(pool.num_threads(), count);
  struct alignas(64) Part {
    std::atomic<int64_t> next;
    int64_t end;
  };
  struct State {
    explicit State(int64_t threads) : parts(threads) {}
    std::vector<Part> parts;
    std::atomic<int64_t> begun{0}, done{0};
  };
  auto state = std::make_shared<State>(threads);
  for (int64_t p = 0; p < threads; ++p) {
    state->parts[p].next = p * count / threads;
    state->parts[p].end = (p + 1) * count / threads;
  }
  // A thread that starts late finds no work and does not use `body`, which may be out of scope.
  auto work = [state, threads, &body] {
    const int64_t own = state->begun.fetch_add(1);
    for (int64_t p = 0; p < threads; ++p) {
      Part& part = state->parts[(own + p) % threads];
      for (int64_t i; (i = part.next.fetch_add(1)) < part.end;) {
        body(i);
        state->done.fetch_add(1, std::memory_order_release);
      }
    }
  };
  for (int64_t i = 1; i < threads; ++i) pool.Schedule(decltype(work)(work));
  work();
  // Other threads finish soon, unless the machine is oversubscribed: then yield the processor to them.
  for (int turn = 0; state->done.load(std::memory_order_acquire) < count; ++turn) {
    if (turn < kSpins) _mm_pause();
    else std::this_thread::yield();
  }
}

}  // namespace jaxinfer
