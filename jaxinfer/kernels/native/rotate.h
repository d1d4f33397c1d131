// Rows times a Hadamard matrix in blocks of columns, as `int8_matmul.rotate`: butterflies, log2(block) additions an
// element.

#pragma once

#include "simd.h"

namespace jaxinfer {

// x[i] + x[i ^ H] where bit H of i is not set, else x[i ^ H] - x[i].
template <int H>
inline Floats Butterfly(Floats x) {
  constexpr Mask kUpper[9] = {0, 0xaaaa, 0xcccc, 0, 0xf0f0, 0, 0, 0, 0xff00};
  const Floats other = Exchange<H>(x);
  return SubWhere(Add(x, other), kUpper[H], other, x);
}

// The stages within 16 lanes, of blocks of up to as many.
inline Floats RotateLanes(Floats x, int64_t block) {
  if (block > 1) x = Butterfly<1>(x);
  if (block > 2) x = Butterfly<2>(x);
  if (block > 4) x = Butterfly<4>(x);
  if (block > 8) x = Butterfly<8>(x);
  return x;
}

// Blocks of V registers, as many as the row has.
template <int V, typename In>
inline void RotateBlocks(const In* x, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += V * kLanes) {
    Floats r[V];
    for (int v = 0; v < V; ++v) r[v] = RotateLanes(Load(x + i + v * kLanes, 0xffff), kLanes);
    for (int half = 1; half < V; half *= 2) {
      for (int v = 0; v < V; ++v) {
        if (v & half) continue;
        const Floats a = r[v], b = r[v + half];
        r[v] = Add(a, b);
        r[v + half] = Sub(a, b);
      }
    }
    for (int v = 0; v < V; ++v) StoreAll(out + i + v * kLanes, r[v]);
  }
}

// Rotates a row of k columns; `block` divides k and is a power of two up to 128.
template <typename In>
void RotateRow(const In* x, int64_t k, int64_t block, float* out) {
  if (block == 128) return RotateBlocks<8>(x, k, out);
  if (block == 64) return RotateBlocks<4>(x, k, out);
  if (block == 32) return RotateBlocks<2>(x, k, out);
  for (int64_t i = 0; i < k; i += kLanes) {
    const Mask mask = FirstLanes(k - i);
    Store(out + i, RotateLanes(Load(x + i, mask), block), mask);
  }
}

}  // namespace jaxinfer
