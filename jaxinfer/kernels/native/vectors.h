// Vectors of 16 lanes in one vocabulary for two instruction sets: AVX-512 with its instructions for bfloat16 and int8,
// or AVX2, where a vector is two registers. A library has one of them, which its flags of compilation choose.
//
// A `Dot` is the vector of dot products along rows: one register.

#pragma once

#include <immintrin.h>

#include <cstdint>

namespace jaxinfer {

inline constexpr int kLanes = 16;

// bfloat16 is the upper half of a float32.
struct BF16 {
  uint16_t bits;
};

}  // namespace jaxinfer

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512VL__) && defined(__AVX512DQ__) && \
    defined(__AVX512BF16__) && defined(__AVX512VNNI__)
#include "vectors_avx512.h"
#else
#include "vectors_avx2.h"
#endif
