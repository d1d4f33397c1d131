// The vectors of `vectors.h` as two AVX2 registers each: lanes 0 to 7 are the low one, 8 to 15 the high one. A `Dot` is
// a single register, as there are only 16 of them.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstring>

namespace jaxinfer {

inline constexpr bool kAVX512 = false;
inline constexpr int kRegisters = 2;  // of a vector

struct Floats {
  __m256 low, high;
};
struct Words {  // of 32 bits, or pairs of 16, or quadruples of 8
  __m256i low, high;
};
using Mask = uint16_t;
using Dot = __m256i;
using DotFloats = __m256;

inline Mask FirstLanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<Mask>((1u << count) - 1);
}

// All bits of the lanes that a mask has.
inline Words Bits(Mask mask) {
  const __m256i low = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128), high = _mm256_slli_epi32(low, 8);
  const __m256i all = _mm256_set1_epi32(mask);
  return {_mm256_cmpeq_epi32(_mm256_and_si256(all, low), low), _mm256_cmpeq_epi32(_mm256_and_si256(all, high), high)};
}

inline Words AsWords(Floats x) { return {_mm256_castps_si256(x.low), _mm256_castps_si256(x.high)}; }
inline Floats AsFloats(Words x) { return {_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high)}; }
inline Floats Set(float x) { return {_mm256_set1_ps(x), _mm256_set1_ps(x)}; }
inline Words SetWords(int x) { return {_mm256_set1_epi32(x), _mm256_set1_epi32(x)}; }
inline Words SetShorts(int16_t x) { return {_mm256_set1_epi16(x), _mm256_set1_epi16(x)}; }
inline Words SetEach128(__m128i x) { return {_mm256_broadcastsi128_si256(x), _mm256_broadcastsi128_si256(x)}; }

inline Dot SetDot(int x) { return _mm256_set1_epi32(x); }
inline __m256& Register(Floats& x, int i) { return i ? x.high : x.low; }
inline __m256i& Register(Words& x, int i) { return i ? x.high : x.low; }

// Memory. `Load` and `Store` of floats and bfloat16 leave out lanes that a mask has not, which load as zero.
inline Floats LoadAll(const float* in) { return {_mm256_loadu_ps(in), _mm256_loadu_ps(in + 8)}; }
inline void StoreAll(void* out, Floats x) {
  _mm256_storeu_ps(static_cast<float*>(out), x.low);
  _mm256_storeu_ps(static_cast<float*>(out) + 8, x.high);
}
inline Words LoadWords(const void* in) {
  const auto* from = static_cast<const __m256i*>(in);
  return {_mm256_loadu_si256(from), _mm256_loadu_si256(from + 1)};
}
inline void StoreWords(void* out, Words x) {
  _mm256_storeu_si256(static_cast<__m256i*>(out), x.low);
  _mm256_storeu_si256(static_cast<__m256i*>(out) + 1, x.high);
}
inline Floats Load(const float* in, Mask mask) {
  if (mask == 0xffff) return LoadAll(in);
  const Words bits = Bits(mask);
  return {_mm256_maskload_ps(in, bits.low), _mm256_maskload_ps(in + 8, bits.high)};
}
inline void Store(float* out, Floats x, Mask mask) {
  if (mask == 0xffff) return StoreAll(out, x);
  const Words bits = Bits(mask);
  _mm256_maskstore_ps(out, bits.low, x.low);
  _mm256_maskstore_ps(out + 8, bits.high, x.high);
}

// There are no masks of 8 or 16 bits; these masks have the first lanes only, and bytes are copied.
inline int CountLanes(Mask mask) { return __builtin_popcount(mask); }
inline __m256i LoadShorts(Mask mask, const void* in) {
  __m256i x = _mm256_setzero_si256();
  if (mask == 0xffff) x = _mm256_loadu_si256(static_cast<const __m256i*>(in));
  else std::memcpy(&x, in, 2 * CountLanes(mask));
  return x;
}
inline void StoreShorts(void* out, Mask mask, __m256i x) {
  if (mask == 0xffff) _mm256_storeu_si256(static_cast<__m256i*>(out), x);
  else std::memcpy(out, &x, 2 * CountLanes(mask));
}
inline __m128i LoadBytes(Mask mask, const void* in) {
  __m128i x = _mm_setzero_si128();
  if (mask == 0xffff) x = _mm_loadu_si128(static_cast<const __m128i*>(in));
  else std::memcpy(&x, in, CountLanes(mask));
  return x;
}
inline void StoreBytes(void* out, Mask mask, __m128i x) {
  if (mask == 0xffff) _mm_storeu_si128(static_cast<__m128i*>(out), x);
  else std::memcpy(out, &x, CountLanes(mask));
}
inline Floats Gather(Mask mask, Words at, const float* from) {
  const Floats bits = AsFloats(Bits(mask));
  return {_mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, at.low, bits.low, 4),
          _mm256_mask_i32gather_ps(_mm256_setzero_ps(), from, at.high, bits.high, 4)};
}

// Loads the words of a row from `word` on; bytes from `bytes` of the row on read as zero.
inline Words LoadWords(const char* row, int64_t word, int64_t bytes) {
  const int64_t left = bytes - word * 4;
  if (left >= 64) return LoadWords(row + word * 4);
  Words x = SetWords(0);
  if (left > 0) std::memcpy(&x, row + word * 4, left);
  return x;
}

// Arithmetic. `Max` and `Min` return the second operand if either is NaN.
inline Floats Add(Floats a, Floats b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
inline Floats Sub(Floats a, Floats b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
inline Floats Mul(Floats a, Floats b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
inline Floats Div(Floats a, Floats b) { return {_mm256_div_ps(a.low, b.low), _mm256_div_ps(a.high, b.high)}; }
inline Floats Max(Floats a, Floats b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
inline Floats Min(Floats a, Floats b) { return {_mm256_min_ps(a.low, b.low), _mm256_min_ps(a.high, b.high)}; }
inline Floats MulAdd(Floats a, Floats b, Floats c) {
  return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
}
inline Floats NegMulAdd(Floats a, Floats b, Floats c) {
  return {_mm256_fnmadd_ps(a.low, b.low, c.low), _mm256_fnmadd_ps(a.high, b.high, c.high)};
}
inline Floats Round(Floats x) {
  return {_mm256_round_ps(x.low, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC),
          _mm256_round_ps(x.high, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)};
}
inline Words Add(Words a, Words b) { return {_mm256_add_epi32(a.low, b.low), _mm256_add_epi32(a.high, b.high)}; }
inline Words Sub(Words a, Words b) { return {_mm256_sub_epi32(a.low, b.low), _mm256_sub_epi32(a.high, b.high)}; }
inline Words Max(Words a, Words b) { return {_mm256_max_epi32(a.low, b.low), _mm256_max_epi32(a.high, b.high)}; }
inline Words And(Words a, Words b) { return {_mm256_and_si256(a.low, b.low), _mm256_and_si256(a.high, b.high)}; }
inline Words AndNot(Words a, Words b) {
  return {_mm256_andnot_si256(a.low, b.low), _mm256_andnot_si256(a.high, b.high)};
}
inline Words Or(Words a, Words b) { return {_mm256_or_si256(a.low, b.low), _mm256_or_si256(a.high, b.high)}; }
inline Floats Abs(Floats x) { return AsFloats(And(AsWords(x), SetWords(0x7fffffff))); }
template <int N>
inline Words ShiftLeft(Words x) { return {_mm256_slli_epi32(x.low, N), _mm256_slli_epi32(x.high, N)}; }
template <int N>
inline Words ShiftRight(Words x) { return {_mm256_srli_epi32(x.low, N), _mm256_srli_epi32(x.high, N)}; }
template <int N>
inline Words ShiftRightSigned(Words x) { return {_mm256_srai_epi32(x.low, N), _mm256_srai_epi32(x.high, N)}; }
template <int N>
inline Words ShiftShortsLeft(Words x) { return {_mm256_slli_epi16(x.low, N), _mm256_slli_epi16(x.high, N)}; }
template <int N>
inline Words ShiftShortsRight(Words x) { return {_mm256_srli_epi16(x.low, N), _mm256_srli_epi16(x.high, N)}; }
inline Words AddShorts(Words a, Words b) { return {_mm256_add_epi16(a.low, b.low), _mm256_add_epi16(a.high, b.high)}; }

// x 2^n in two steps, as 2^n alone may be out of range where the product is not.
inline __m256 TimesPower(__m256 x, __m256 n) {
  const __m256i whole = _mm256_cvtps_epi32(n), half = _mm256_srai_epi32(whole, 1);
  auto power = [](__m256i e) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(e, _mm256_set1_epi32(127)), 23));
  };
  return _mm256_mul_ps(_mm256_mul_ps(x, power(half)), power(_mm256_sub_epi32(whole, half)));
}
inline Floats TimesPower(Floats x, Floats n) { return {TimesPower(x.low, n.low), TimesPower(x.high, n.high)}; }

// Over lanes.
inline float SumOfLanes(Floats x) {
  const __m256 eight = _mm256_add_ps(x.low, x.high);
  __m128 four = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(four, _mm_movehdup_ps(four)));
}
inline float MaxOfLanes(Floats x) {
  const __m256 eight = _mm256_max_ps(x.low, x.high);
  __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
  four = _mm_max_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_max_ss(four, _mm_movehdup_ps(four)));
}
inline int SumOfLanes(Words x) {
  const __m256i eight = _mm256_add_epi32(x.low, x.high);
  __m128i four = _mm_add_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_add_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_add_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline int MaxOfLanes(Words x) {
  const __m256i eight = _mm256_max_epi32(x.low, x.high);
  __m128i four = _mm_max_epi32(_mm256_castsi256_si128(eight), _mm256_extracti128_si256(eight, 1));
  four = _mm_max_epi32(four, _mm_shuffle_epi32(four, 0x4e));
  return _mm_cvtsi128_si32(_mm_max_epi32(four, _mm_shuffle_epi32(four, 0xb1)));
}
inline bool AnyBits(Words x, Words of) {
  const Words both = And(x, of);
  const __m256i any = _mm256_or_si256(both.low, both.high);
  return !_mm256_testz_si256(any, any);
}

// `x` in the lanes of the mask, elsewhere `otherwise` or zero.
inline Floats Select(Mask mask, Floats otherwise, Floats x) {
  const Floats bits = AsFloats(Bits(mask));
  return {_mm256_blendv_ps(otherwise.low, x.low, bits.low), _mm256_blendv_ps(otherwise.high, x.high, bits.high)};
}
inline Floats KeepLanes(Mask mask, Floats x) { return AsFloats(And(Bits(mask), AsWords(x))); }
inline Mask Positive(Floats x) {
  const __m256 zero = _mm256_setzero_ps();
  return static_cast<Mask>(_mm256_movemask_ps(_mm256_cmp_ps(x.low, zero, _CMP_GT_OQ)) |
                           _mm256_movemask_ps(_mm256_cmp_ps(x.high, zero, _CMP_GT_OQ)) << 8);
}
inline Words SelectEqual(Words x, int value, Words equal, Words otherwise) {
  const __m256i v = _mm256_set1_epi32(value);
  return {_mm256_blendv_epi8(otherwise.low, equal.low, _mm256_cmpeq_epi32(x.low, v)),
          _mm256_blendv_epi8(otherwise.high, equal.high, _mm256_cmpeq_epi32(x.high, v))};
}
// a - b in the lanes of the mask, elsewhere `otherwise`.
inline Floats SubWhere(Floats otherwise, Mask mask, Floats a, Floats b) { return Select(mask, otherwise, Sub(a, b)); }

// Conversions.
inline Floats ToFloat(Words x) { return {_mm256_cvtepi32_ps(x.low), _mm256_cvtepi32_ps(x.high)}; }
inline Words ToIntegers(Floats x) { return {_mm256_cvtps_epi32(x.low), _mm256_cvtps_epi32(x.high)}; }
inline Words ShortsToWords(__m256i x) {
  return {_mm256_cvtepu16_epi32(_mm256_castsi256_si128(x)), _mm256_cvtepu16_epi32(_mm256_extracti128_si256(x, 1))};
}
inline Words BytesToWords(__m128i x) { return {_mm256_cvtepu8_epi32(x), _mm256_cvtepu8_epi32(_mm_srli_si128(x, 8))}; }
inline Words SignedBytesToWords(__m128i x) {
  return {_mm256_cvtepi8_epi32(x), _mm256_cvtepi8_epi32(_mm_srli_si128(x, 8))};
}
inline Words BytesToShorts(__m256i x) {
  return {_mm256_cvtepu8_epi16(_mm256_castsi256_si128(x)), _mm256_cvtepu8_epi16(_mm256_extracti128_si256(x, 1))};
}
// The lowest bytes of words.
inline __m128i WordsToBytes(Words x) {
  const __m256i lowest = _mm256_set1_epi32(0xff);
  const __m256i shorts = _mm256_permute4x64_epi64(
      _mm256_packus_epi32(_mm256_and_si256(x.low, lowest), _mm256_and_si256(x.high, lowest)), 0xd8);
  return _mm_packus_epi16(_mm256_castsi256_si128(shorts), _mm256_extracti128_si256(shorts, 1));
}
inline Floats HalfToFloat(__m256i x) {
  return {_mm256_cvtph_ps(_mm256_castsi256_si128(x)), _mm256_cvtph_ps(_mm256_extracti128_si256(x, 1))};
}

// Rounds to bfloat16, to even, in the upper halves; the lower ones are not cleared. NaN stays NaN.
inline __m256i RoundUpper(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  const __m256i odd = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(bits, _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff)));
  const __m256i quiet = _mm256_or_si256(bits, _mm256_set1_epi32(0x400000));
  return _mm256_blendv_epi8(rounded, quiet, _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)));
}
inline __m256i ToBF16(Floats x) {
  const __m256i low = _mm256_srli_epi32(RoundUpper(x.low), 16), high = _mm256_srli_epi32(RoundUpper(x.high), 16);
  return _mm256_permute4x64_epi64(_mm256_packus_epi32(low, high), 0xd8);
}

// Two vectors as pairs of bfloat16, the first in the lower halves.
inline Words RoundPairs(Floats low, Floats high) {
  auto pair = [](__m256 a, __m256 b) {
    return _mm256_blend_epi16(_mm256_srli_epi32(RoundUpper(a), 16), RoundUpper(b), 0xaa);
  };
  return {pair(low.low, high.low), pair(low.high, high.high)};
}

// Permutations. Lane i exchanges with lane i ^ H.
template <int H>
inline Floats Exchange(Floats x) {
  if constexpr (H == 1) return {_mm256_permute_ps(x.low, 0xb1), _mm256_permute_ps(x.high, 0xb1)};
  else if constexpr (H == 2) return {_mm256_permute_ps(x.low, 0x4e), _mm256_permute_ps(x.high, 0x4e)};
  else if constexpr (H == 4)
    return {_mm256_permute2f128_ps(x.low, x.low, 1), _mm256_permute2f128_ps(x.high, x.high, 1)};
  else return {x.high, x.low};
}
inline __m256 LookUp(__m256i at, Floats table) {
  const __m256 upper = _mm256_castsi256_ps(_mm256_slli_epi32(at, 28));  // bit 3 is the sign
  return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, at), _mm256_permutevar8x32_ps(table.high, at), upper);
}
inline Floats LookUp(Words at, Floats table) { return {LookUp(at.low, table), LookUp(at.high, table)}; }  // by 4 bits
inline Words LookUp(Words at, Words table) { return AsWords(LookUp(at, AsFloats(table))); }
inline Words ShuffleBytes(Words x, Words at) {  // within 128 bits
  return {_mm256_shuffle_epi8(x.low, at.low), _mm256_shuffle_epi8(x.high, at.high)};
}

// A table of the upper halves of 16 floats, which are looked up by the lowest 4 bits of each 16: their lower bytes, and
// their upper ones.
inline Words ShortTable(const float values[16]) {
  uint8_t bytes[2][16];
  for (int i = 0; i < 16; ++i) {
    uint32_t bits;
    std::memcpy(&bits, values + i, sizeof(bits));
    bytes[0][i] = bits >> 16 & 0xff;
    bytes[1][i] = bits >> 24;
  }
  auto each = [](const uint8_t* from) {
    return _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
  };
  return {each(bytes[0]), each(bytes[1])};
}
inline __m256i LookUpShorts(__m256i at, Words table) {  // an index with its highest bit gives zero
  const __m256i four = _mm256_and_si256(at, _mm256_set1_epi16(0xf));
  const __m256i lower = _mm256_shuffle_epi8(table.low, _mm256_or_si256(four, _mm256_set1_epi16(-0x8000)));
  const __m256i upper = _mm256_or_si256(_mm256_slli_epi16(four, 8), _mm256_set1_epi16(0x80));
  return _mm256_or_si256(lower, _mm256_shuffle_epi8(table.high, upper));
}
inline Words LookUpShorts(Words at, Words table) { return {LookUpShorts(at.low, table), LookUpShorts(at.high, table)}; }

// y, but where x, of 16 bits, is below 8, value x of the table.
inline __m256i LookUpBelow8(__m256i y, __m256i x, __m128i table) {
  const __m256i small = _mm256_cmpgt_epi16(_mm256_set1_epi16(8), x);
  const __m256i bytes = _mm256_add_epi16(_mm256_mullo_epi16(x, _mm256_set1_epi16(0x202)), _mm256_set1_epi16(0x100));
  return _mm256_blendv_epi8(y, _mm256_shuffle_epi8(_mm256_broadcastsi128_si256(table), bytes), small);
}
inline Words LookUpBelow8(Words y, Words x, __m128i table) {
  return {LookUpBelow8(y.low, x.low, table), LookUpBelow8(y.high, x.high, table)};
}

// Every fourth of 32 values of 16 bits from the one of index P on.
template <int P>
inline __m128i EveryFourth(Words x) {
  const __m256i at = _mm256_broadcastsi128_si256(_mm_setr_epi8(2 * P, 2 * P + 1, 8 + 2 * P, 9 + 2 * P, -1, -1, -1, -1,
                                                               -1, -1, -1, -1, -1, -1, -1, -1));
  const __m256i pairs = _mm256_unpacklo_epi32(_mm256_shuffle_epi8(x.low, at), _mm256_shuffle_epi8(x.high, at));
  // Words 0 and 1 of its halves: of the low register's first half, of the high one's, and those of the second halves.
  const __m128i first = _mm256_castsi256_si128(pairs), second = _mm256_extracti128_si256(pairs, 1);
  return _mm_shuffle_epi32(_mm_unpacklo_epi64(first, second), 0xd8);
}

// Every other of the words of two vectors from the one of index P on.
template <int P>
inline Words EveryOther(Words low, Words high) {
  auto pick = [](Words x) {
    const __m256 both = _mm256_shuffle_ps(_mm256_castsi256_ps(x.low), _mm256_castsi256_ps(x.high), P ? 0xdd : 0x88);
    return _mm256_permute4x64_epi64(_mm256_castps_si256(both), 0xd8);
  };
  return {pick(low), pick(high)};
}

// 8 registers of 8 words -> their transpose, in place.
inline void Transpose8(__m256i r[8]) {
  __m256i t[8];
  for (int i = 0; i < 8; i += 2) {
    t[i] = _mm256_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm256_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 8; i += 4) {
    r[i] = _mm256_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm256_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm256_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm256_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x20);
    t[i + 4] = _mm256_permute2x128_si256(r[i], r[i + 4], 0x31);
  }
  for (int i = 0; i < 8; ++i) r[i] = t[i];
}

// 16 vectors of 16 words -> their transpose, in place.
inline void Transpose16(Words r[16]) {
  __m256i parts[2][2][8];  // [words of the low or high register][rows 0 to 7 or 8 to 15]
  for (int i = 0; i < 16; ++i) {
    parts[0][i / 8][i % 8] = r[i].low;
    parts[1][i / 8][i % 8] = r[i].high;
  }
  for (auto& half : parts)
    for (auto& part : half) Transpose8(part);
  for (int i = 0; i < 16; ++i) r[i] = {parts[i / 8][0][i % 8], parts[i / 8][1][i % 8]};
}

// Sums the lanes of each of 16 registers; the sums are the lanes of the result.
inline Floats SumLanes(const DotFloats x[16]) {
  __m256 sums[2];
  for (int half = 0; half < 2; ++half) {
    __m256i r[8];
    for (int i = 0; i < 8; ++i) r[i] = _mm256_castps_si256(x[8 * half + i]);
    Transpose8(r);
    sums[half] = _mm256_castsi256_ps(r[0]);
    for (int i = 1; i < 8; ++i) sums[half] = _mm256_add_ps(sums[half], _mm256_castsi256_ps(r[i]));
  }
  return {sums[0], sums[1]};
}

inline Words SumLanes(const Dot x[16]) {
  __m256i sums[2];
  for (int half = 0; half < 2; ++half) {
    __m256i r[8];
    for (int i = 0; i < 8; ++i) r[i] = x[8 * half + i];
    Transpose8(r);
    sums[half] = r[0];
    for (int i = 1; i < 8; ++i) sums[half] = _mm256_add_epi32(sums[half], r[i]);
  }
  return {sums[0], sums[1]};
}

inline Floats SumLanes(const Floats x[16]) {
  DotFloats eight[16];
  for (int i = 0; i < 16; ++i) eight[i] = _mm256_add_ps(x[i].low, x[i].high);
  return SumLanes(eight);
}

// Products of words, of one register or two. bfloat16 is widened: the products are those of float32.
inline Dot LoadDot(const char* row) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)); }
inline Dot LoadDot(const char* row, int64_t at, int64_t bytes) {
  Dot x = _mm256_setzero_si256();
  if (bytes - at >= 32) x = LoadDot(row + at);
  else if (bytes > at) std::memcpy(&x, row + at, bytes - at);
  return x;
}
inline DotFloats MultiplyAddF32(DotFloats sum, Dot a, Dot b) {
  return _mm256_fmadd_ps(_mm256_castsi256_ps(a), _mm256_castsi256_ps(b), sum);
}
inline DotFloats MultiplyAddBF16(DotFloats sum, Dot a, Dot b) {
  const __m256i upper = _mm256_set1_epi32(0xffff0000);
  sum = MultiplyAddF32(sum, _mm256_slli_epi32(a, 16), _mm256_slli_epi32(b, 16));
  return MultiplyAddF32(sum, _mm256_and_si256(a, upper), _mm256_and_si256(b, upper));
}

// The instruction multiplies unsigned by signed bytes and adds pairs in 16 bits: the sign of the right operand moves to
// the left one, whose values are at most 127, so that no sum overflows.
inline constexpr int kInt8Added = 0;
inline Dot Int8Right(Dot b) { return b; }
inline Words Int8Right(Words b) { return b; }
inline Dot MultiplyAddInt8(Dot sum, Dot a, Dot b) {
  const __m256i pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(b), _mm256_sign_epi8(a, b));
  return _mm256_add_epi32(sum, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)));
}

inline Floats MultiplyAddF32(Floats sum, Words a, Words b) { return MulAdd(AsFloats(a), AsFloats(b), sum); }
inline Floats MultiplyAddBF16(Floats sum, Words a, Words b) {
  return {MultiplyAddBF16(sum.low, a.low, b.low), MultiplyAddBF16(sum.high, a.high, b.high)};
}
inline Words MultiplyAddInt8(Words sum, Words a, Words b) {
  return {MultiplyAddInt8(sum.low, a.low, b.low), MultiplyAddInt8(sum.high, a.high, b.high)};
}

}  // namespace jaxinfer
