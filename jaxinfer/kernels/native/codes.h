// Elements of a quantised cache, one byte each: conversion to the operands of a product.
// See jaxinfer/kernels/attention/quantised_cache.py.

#pragma once

#include "simd.h"

namespace jaxinfer {

struct Int8Code {
  int8_t bits;
};
struct FP8Code {  // e4m3: sign, 4 bits of exponent, 3 of mantissa; 0x7f is NaN, here 480: its scale is NaN as well
  uint8_t bits;
};

template <typename Stored>
inline constexpr bool kIsCode = false;
template <>
inline constexpr bool kIsCode<Int8Code> = true;
template <>
inline constexpr bool kIsCode<FP8Code> = true;

// bfloat16 holds codes exactly: the lower halves of their float32 are zero.
inline __m512i Pair(__m512 low, __m512 high) {
  const __m512i upper = _mm512_and_si512(_mm512_castps_si512(high), _mm512_set1_epi32(0xffff0000));
  return _mm512_or_si512(_mm512_srli_epi32(_mm512_castps_si512(low), 16), upper);
}

// e4m3 codes in the lower bytes of 32 lanes, to bfloat16.
inline __m512i FP8ToBF16(__m512i x) {
  const __m512i magnitude = _mm512_and_si512(x, _mm512_set1_epi16(0x7f));
  // Exponent and mantissa in their places; the bias of the exponent is 127 and not 7.
  __m512i y = _mm512_add_epi16(_mm512_slli_epi16(magnitude, 4), _mm512_set1_epi16(120 << 7));
  // Codes of exponent 0 are multiples of 2^-9. They are looked up: a thread may treat subnormal floats as zero.
  const __m512i table = _mm512_castsi128_si512(
      _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  const __mmask32 small = _mm512_cmplt_epu16_mask(magnitude, _mm512_set1_epi16(8));
  y = _mm512_mask_permutexvar_epi16(y, small, magnitude, table);
  return _mm512_or_si512(y, _mm512_slli_epi16(_mm512_andnot_si512(_mm512_set1_epi16(0x7f), x), 8));
}

// Byte `k` of each word, as a float.
template <int k>
inline __m512 ByteToFloat(Int8Code, __m512i words) {
  return _mm512_cvtepi32_ps(_mm512_srai_epi32(k == 3 ? words : _mm512_slli_epi32(words, 24 - 8 * k), 24));
}

template <int k>
inline __m512 ByteToFloat(FP8Code, __m512i words) {
  const __m512i x = _mm512_and_si512(_mm512_srli_epi32(words, 8 * k), _mm512_set1_epi32(0xff));
  return _mm512_castsi512_ps(_mm512_slli_epi32(FP8ToBF16(x), 16));  // 0 in the upper lanes gives 0, and is shifted out
}

// Bytes 2 `half` and 2 `half` + 1 of each word, as two bfloat16.
template <int half>
inline __m512i BytesToPair(Int8Code, __m512i words) {
  return Pair(ByteToFloat<2 * half>(Int8Code{}, words), ByteToFloat<2 * half + 1>(Int8Code{}, words));
}

template <int half>
inline __m512i BytesToPair(FP8Code, __m512i words) {
  constexpr int kFirst = 2 * half, kZero = 0x80;
  const __m512i spread = _mm512_broadcast_i32x4(_mm_setr_epi8(
      kFirst, kZero, kFirst + 1, kZero, kFirst + 4, kZero, kFirst + 5, kZero, kFirst + 8, kZero, kFirst + 9, kZero,
      kFirst + 12, kZero, kFirst + 13, kZero));
  return FP8ToBF16(_mm512_shuffle_epi8(words, spread));
}

// Transposes 16 rows of `dim` codes into columns [0, 16) of a panel of a kind. A null row stands for one of zeroes.
template <typename Kind, typename Stored>
inline void PackCodeColumns(const Stored* const rows[16], int64_t dim, uint32_t* panel, int64_t stride) {
  for (int64_t word = 0; 4 * word < dim; word += kLanes) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i)
      r[i] = rows[i] ? LoadWords(reinterpret_cast<const char*>(rows[i]), word, dim) : _mm512_setzero_si512();
    Transpose16(r);
    const int64_t count = std::min<int64_t>(kLanes, (dim - 4 * word + 3) / 4);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t left = dim - 4 * (word + i);
      uint32_t* line = panel + 4 / Kind::kPerWord * (word + i) * stride;
      if constexpr (Kind::kPerWord == 2) {
        _mm512_storeu_si512(line, BytesToPair<0>(Stored{}, r[i]));
        if (left > 2) _mm512_storeu_si512(line + stride, BytesToPair<1>(Stored{}, r[i]));
      } else {
        _mm512_storeu_ps(line, ByteToFloat<0>(Stored{}, r[i]));
        if (left > 1) _mm512_storeu_ps(line + stride, ByteToFloat<1>(Stored{}, r[i]));
        if (left > 2) _mm512_storeu_ps(line + 2 * stride, ByteToFloat<2>(Stored{}, r[i]));
        if (left > 3) _mm512_storeu_ps(line + 3 * stride, ByteToFloat<3>(Stored{}, r[i]));
      }
    }
  }
}

// Codes [at, at + 16) of a row of `dim`, zeros beyond and for a null row.
template <typename Stored>
inline __m128i LoadCodes(const Stored* row, int64_t at, int64_t dim) {
  if (!row) return _mm_setzero_si128();
  if (dim - at >= kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at));
  return _mm_maskz_loadu_epi8(FirstLanes(dim - at), row + at);
}

inline __m512i Interleave(Int8Code, __m128i a, __m128i b) {
  return Pair(_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(a)), _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(b)));
}

inline __m512i Interleave(FP8Code, __m128i a, __m128i b) {
  return FP8ToBF16(_mm512_cvtepu8_epi16(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b))));
}

// Interleaves the values of `Kind::kPerWord` positions, so that a word holds the same column of each.
template <typename Kind, typename Stored>
inline void PackValueCodes(const Stored* const rows[Kind::kPerWord], int64_t dim, uint32_t* line) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const __m128i first = LoadCodes(rows[0], d, dim);
    if constexpr (Kind::kPerWord == 1)
      _mm512_storeu_ps(line + d, ByteToFloat<0>(Stored{}, _mm512_cvtepu8_epi32(first)));
    else _mm512_storeu_si512(line + d, Interleave(Stored{}, first, LoadCodes(rows[1], d, dim)));
  }
}

}  // namespace jaxinfer
