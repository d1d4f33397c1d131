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
inline Words Pair(Floats low, Floats high) {
  const Words upper = And(AsWords(high), SetWords(0xffff0000));
  return Or(ShiftRight<16>(AsWords(low)), upper);
}

// e4m3 codes in the lower bytes of 32 lanes, to bfloat16.
inline Words FP8ToBF16(Words x) {
  const Words magnitude = And(x, SetShorts(0x7f));
  // Exponent and mantissa in their places; the bias of the exponent is 127 and not 7.
  Words y = AddShorts(ShiftShortsLeft<4>(magnitude), SetShorts(120 << 7));
  // Codes of exponent 0 are multiples of 2^-9. They are looked up: a thread may treat subnormal floats as zero.
  y = LookUpBelow8(y, magnitude, _mm_setr_epi16(0, 0x3b00, 0x3b80, 0x3bc0, 0x3c00, 0x3c20, 0x3c40, 0x3c60));
  return Or(y, ShiftShortsLeft<8>(AndNot(SetShorts(0x7f), x)));
}

// Byte `k` of each word, as a float.
template <int k>
inline Floats ByteToFloat(Int8Code, Words words) {
  return ToFloat(ShiftRightSigned<24>(ShiftLeft<24 - 8 * k>(words)));
}

template <int k>
inline Floats ByteToFloat(FP8Code, Words words) {
  const Words x = And(ShiftRight<8 * k>(words), SetWords(0xff));
  return AsFloats(ShiftLeft<16>(FP8ToBF16(x)));  // 0 in the upper lanes gives 0, and is shifted out
}

// Bytes 2 `half` and 2 `half` + 1 of each word, as two bfloat16.
template <int half>
inline Words BytesToPair(Int8Code, Words words) {
  return Pair(ByteToFloat<2 * half>(Int8Code{}, words), ByteToFloat<2 * half + 1>(Int8Code{}, words));
}

template <int half>
inline Words BytesToPair(FP8Code, Words words) {
  constexpr int kFirst = 2 * half, kZero = 0x80;
  const Words spread = SetEach128(_mm_setr_epi8(
      kFirst, kZero, kFirst + 1, kZero, kFirst + 4, kZero, kFirst + 5, kZero, kFirst + 8, kZero, kFirst + 9, kZero,
      kFirst + 12, kZero, kFirst + 13, kZero));
  return FP8ToBF16(ShuffleBytes(words, spread));
}

// Transposes 16 rows of `dim` codes into columns [0, 16) of a panel of a kind. A null row stands for one of zeroes.
template <typename Kind, typename Stored>
inline void PackCodeColumns(const Stored* const rows[16], int64_t dim, uint32_t* panel, int64_t stride) {
  for (int64_t word = 0; 4 * word < dim; word += kLanes) {
    Words r[16];
    for (int i = 0; i < 16; ++i)
      r[i] = rows[i] ? LoadWords(reinterpret_cast<const char*>(rows[i]), word, dim) : SetWords(0);
    Transpose16(r);
    const int64_t count = std::min<int64_t>(kLanes, (dim - 4 * word + 3) / 4);
    for (int64_t i = 0; i < count; ++i) {
      const int64_t left = dim - 4 * (word + i);
      uint32_t* line = panel + 4 / Kind::kPerWord * (word + i) * stride;
      if constexpr (Kind::kPerWord == 2) {
        StoreWords(line, BytesToPair<0>(Stored{}, r[i]));
        if (left > 2) StoreWords(line + stride, BytesToPair<1>(Stored{}, r[i]));
      } else {
        StoreAll(line, ByteToFloat<0>(Stored{}, r[i]));
        if (left > 1) StoreAll(line + stride, ByteToFloat<1>(Stored{}, r[i]));
        if (left > 2) StoreAll(line + 2 * stride, ByteToFloat<2>(Stored{}, r[i]));
        if (left > 3) StoreAll(line + 3 * stride, ByteToFloat<3>(Stored{}, r[i]));
      }
    }
  }
}

// Codes [at, at + 16) of a row of `dim`, zeros beyond and for a null row.
template <typename Stored>
inline __m128i LoadCodes(const Stored* row, int64_t at, int64_t dim) {
  if (!row) return _mm_setzero_si128();
  if (dim - at >= kLanes) return _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + at));
  return LoadBytes(FirstLanes(dim - at), row + at);
}

inline Words Interleave(Int8Code, __m128i a, __m128i b) {
  return Pair(ToFloat(SignedBytesToWords(a)), ToFloat(SignedBytesToWords(b)));
}

inline Words Interleave(FP8Code, __m128i a, __m128i b) {
  return FP8ToBF16(BytesToShorts(_mm256_set_m128i(_mm_unpackhi_epi8(a, b), _mm_unpacklo_epi8(a, b))));
}

// Interleaves the values of `Kind::kPerWord` positions, so that a word holds the same column of each.
template <typename Kind, typename Stored>
inline void PackValueCodes(const Stored* const rows[Kind::kPerWord], int64_t dim, uint32_t* line) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const __m128i first = LoadCodes(rows[0], d, dim);
    if constexpr (Kind::kPerWord == 1)
      StoreAll(line + d, ByteToFloat<0>(Stored{}, BytesToWords(first)));
    else StoreWords(line + d, Interleave(Stored{}, first, LoadCodes(rows[1], d, dim)));
  }
}

}  // namespace jaxinfer
