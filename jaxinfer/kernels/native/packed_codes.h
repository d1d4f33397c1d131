// Codes of packed weights as values of x's type: which columns each register has, and x in the same order
// (`packed_matmul.cc`).

#pragma once

#include "codes.h"
#include "simd.h"

namespace jaxinfer {

// Each kind gives the type of x, the registers of a block of codes (`kParts`), and how `Part` makes them.

// Two registers as bfloat16 pairs, the first in the lower halves.
inline __m512i RoundPairs(__m512 low, __m512 high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// 4 bits: values of codes, before zero points and scales.
inline constexpr float kIntegers[16] = {-8, -7, -6, -5, -4, -3, -2, -1, 0, 1, 2, 3, 4, 5, 6, 7};
inline constexpr float kFloats[16] = {0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6};

// Tables are looked up by the low bits of a word, so that bits of its other codes do not matter.
struct PackedF32;

struct PackedBF16 {
  using Element = BF16;
  using Unpacked = KindBF16;
  using Wide = PackedF32;  // the same codes as float32
  static constexpr bool kZeros = true;
  static constexpr int kParts = 4;             // registers of a block
  static constexpr int64_t kDirectRows = 8;    // most rows of x multiplied with codes, not with unpacked rows of w
  static __m512i Table(const float values[16]) {
    const __m512i upper = _mm512_srli_epi32(_mm512_loadu_si512(values), 16);
    return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(upper));
  }
  template <int P>
  static __m512i Part(__m512i codes, __m512i table) {
    return _mm512_permutexvar_epi16(_mm512_srli_epi16(codes, 4 * P), table);
  }
  static __m512 MultiplyAdd(__m512 sum, __m512i a, __m512i b) {
    return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
  }
  // Values of columns 8i + p of a block, in lanes i -> its parts.
  static void StoreParts(const __m512 values[8], BF16* to) {
    // Columns 4i + p are 8i + p and 8i + 4 + p.
    for (int p = 0; p < 4; ++p) _mm512_storeu_si512(to + p * 32, RoundPairs(values[p], values[p + 4]));
  }
  // x [128], of which `count` exist -> its parts, 64 bytes each.
  static void Order(const BF16* x, int64_t count, char* to) {
    const auto* words = reinterpret_cast<const char*>(x);
    for (int64_t q = 0; q < 4; ++q) {
      const __m512i v = LoadWords(words, q * kLanes, count * 2);
      for (int p = 0; p < 4; ++p) {
        const __m128i part = _mm512_cvtepi64_epi16(_mm512_srl_epi64(v, _mm_cvtsi32_si128(16 * p)));
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * 64 + q * 16), part);
      }
    }
  }
};

struct PackedF32 {
  using Element = float;
  using Unpacked = KindF32;
  using Wide = PackedF32;
  static constexpr bool kZeros = true;
  static constexpr int kParts = 8;
  static constexpr int64_t kDirectRows = 4;
  static __m512i Table(const float values[16]) { return _mm512_loadu_si512(values); }
  template <int P>
  static __m512i Part(__m512i codes, __m512i table) {
    return _mm512_permutexvar_epi32(_mm512_srli_epi32(codes, 4 * P), table);
  }
  static __m512 MultiplyAdd(__m512 sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
  static void StoreParts(const __m512 values[8], float* to) {
    for (int p = 0; p < 8; ++p) _mm512_storeu_ps(to + p * kLanes, values[p]);
  }
  static void Order(const float* x, int64_t count, char* to) {
    const __m512i lanes = _mm512_setr_epi32(0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120);
    for (int p = 0; p < 8; ++p) {
      const __mmask16 mask = FirstLanes((count - p + 7) / 8);
      const __m512 part = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, lanes, x + p, 4);
      _mm512_storeu_ps(to + p * 64, part);
    }
  }
};

// FP8: byte i of a row is column i. A NaN counts as 480.
struct FP8F32 {
  using Element = float;
  using Unpacked = KindF32;
  using Wide = FP8F32;
  static constexpr bool kZeros = false;
  static constexpr int kParts = 4;
  static constexpr int64_t kDirectRows = 4;
  static __m512i Table(const float*) { return _mm512_setzero_si512(); }
  template <int P>
  static __m512i Part(__m512i codes, __m512i) {
    return _mm512_castps_si512(ByteToFloat<P>(FP8Code{}, codes));
  }
  static __m512 MultiplyAdd(__m512 sum, __m512i a, __m512i b) { return PackedF32::MultiplyAdd(sum, a, b); }
  static void StoreParts(const __m512 values[4], float* to) {
    for (int p = 0; p < 4; ++p) _mm512_storeu_ps(to + p * kLanes, values[p]);
  }
  // x [64], of which `count` exist -> columns 4i + p.
  static void Order(const float* x, int64_t count, char* to) {
    const __m512i lanes = _mm512_setr_epi32(0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60);
    for (int p = 0; p < 4; ++p) {
      const __mmask16 mask = FirstLanes((count - p + 3) / 4);
      const __m512 part = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, lanes, x + p, 4);
      _mm512_storeu_ps(to + p * 64, part);
    }
  }
};

struct FP8BF16 {
  using Element = BF16;
  using Unpacked = KindBF16;
  using Wide = FP8F32;
  static constexpr bool kZeros = false;
  static constexpr int kParts = 2;
  static constexpr int64_t kDirectRows = 8;
  static __m512i Table(const float*) { return _mm512_setzero_si512(); }
  template <int P>
  static __m512i Part(__m512i codes, __m512i) {
    return BytesToPair<P>(FP8Code{}, codes);
  }
  static __m512 MultiplyAdd(__m512 sum, __m512i a, __m512i b) { return PackedBF16::MultiplyAdd(sum, a, b); }
  static void StoreParts(const __m512 values[4], BF16* to) {
    for (int p = 0; p < 2; ++p) _mm512_storeu_si512(to + p * 32, RoundPairs(values[2 * p], values[2 * p + 1]));
  }
  // x [64], of which `count` exist -> columns 4i + 2p and 4i + 2p + 1.
  static void Order(const BF16* x, int64_t count, char* to) {
    const auto* words = reinterpret_cast<const char*>(x);
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512i low = LoadWords(words, 0, count * 2), high = LoadWords(words, kLanes, count * 2);
    for (int p = 0; p < 2; ++p) {
      const __m512i order = _mm512_add_epi32(even, _mm512_set1_epi32(p));
      _mm512_storeu_si512(to + p * 64, _mm512_permutex2var_epi32(low, order, high));
    }
  }
};

}  // namespace jaxinfer
