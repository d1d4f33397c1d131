// The vectors of `vectors.h` as one AVX-512 register each.

#pragma once

#include <immintrin.h>

namespace jaxinfer {

inline constexpr bool kAVX512 = true;
inline constexpr int kRegisters = 1;  // of a vector

using Floats = __m512;
using Words = __m512i;  // of 32 bits, or pairs of 16, or quadruples of 8
using Mask = __mmask16;
using Dot = __m512i;
using DotFloats = __m512;

inline Mask FirstLanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<Mask>((1u << count) - 1);
}

inline Words AsWords(Floats x) { return _mm512_castps_si512(x); }
inline Floats AsFloats(Words x) { return _mm512_castsi512_ps(x); }
inline Floats Set(float x) { return _mm512_set1_ps(x); }
inline Words SetWords(int x) { return _mm512_set1_epi32(x); }
inline Words SetShorts(int16_t x) { return _mm512_set1_epi16(x); }
inline Words SetEach128(__m128i x) { return _mm512_broadcast_i32x4(x); }

inline Dot SetDot(int x) { return _mm512_set1_epi32(x); }
template <typename V>
inline V& Register(V& x, int) { return x; }

// Memory. `Load` and `Store` of floats and bfloat16 leave out lanes that a mask has not, which load as zero.
inline Floats LoadAll(const float* in) { return _mm512_loadu_ps(in); }
inline void StoreAll(void* out, Floats x) { _mm512_storeu_ps(out, x); }
inline Words LoadWords(const void* in) { return _mm512_loadu_si512(in); }
inline void StoreWords(void* out, Words x) { _mm512_storeu_si512(out, x); }
inline Floats Load(const float* in, Mask mask) { return _mm512_maskz_loadu_ps(mask, in); }
inline void Store(float* out, Floats x, Mask mask) { _mm512_mask_storeu_ps(out, mask, x); }
inline __m256i LoadShorts(Mask mask, const void* in) { return _mm256_maskz_loadu_epi16(mask, in); }
inline void StoreShorts(void* out, Mask mask, __m256i x) { _mm256_mask_storeu_epi16(out, mask, x); }
inline __m128i LoadBytes(Mask mask, const void* in) { return _mm_maskz_loadu_epi8(mask, in); }
inline void StoreBytes(void* out, Mask mask, __m128i x) { _mm_mask_storeu_epi8(out, mask, x); }
inline Floats Gather(Mask mask, Words at, const float* from) {
  return _mm512_mask_i32gather_ps(_mm512_setzero_ps(), mask, at, from, 4);
}

// Loads the words of a row from `word` on; bytes from `bytes` of the row on read as zero.
inline Words LoadWords(const char* row, int64_t word, int64_t bytes) {
  const int64_t left = bytes - word * 4;
  if (left >= 64) return _mm512_loadu_si512(row + word * 4);
  if (left <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi8((1ull << left) - 1, row + word * 4);
}

// Arithmetic. `Max` and `Min` return the second operand if either is NaN.
inline Floats Add(Floats a, Floats b) { return _mm512_add_ps(a, b); }
inline Floats Sub(Floats a, Floats b) { return _mm512_sub_ps(a, b); }
inline Floats Mul(Floats a, Floats b) { return _mm512_mul_ps(a, b); }
inline Floats Div(Floats a, Floats b) { return _mm512_div_ps(a, b); }
inline Floats Max(Floats a, Floats b) { return _mm512_max_ps(a, b); }
inline Floats Min(Floats a, Floats b) { return _mm512_min_ps(a, b); }
inline Floats Abs(Floats x) { return _mm512_abs_ps(x); }
inline Floats MulAdd(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a, b, c); }
inline Floats NegMulAdd(Floats a, Floats b, Floats c) { return _mm512_fnmadd_ps(a, b, c); }
inline Floats Round(Floats x) { return _mm512_roundscale_ps(x, 0); }
inline Floats TimesPower(Floats x, Floats n) { return _mm512_scalef_ps(x, n); }  // x 2^n
inline Words Add(Words a, Words b) { return _mm512_add_epi32(a, b); }
inline Words Sub(Words a, Words b) { return _mm512_sub_epi32(a, b); }
inline Words Max(Words a, Words b) { return _mm512_max_epi32(a, b); }
inline Words And(Words a, Words b) { return _mm512_and_si512(a, b); }
inline Words AndNot(Words a, Words b) { return _mm512_andnot_si512(a, b); }
inline Words Or(Words a, Words b) { return _mm512_or_si512(a, b); }
template <int N>
inline Words ShiftLeft(Words x) { return _mm512_slli_epi32(x, N); }
template <int N>
inline Words ShiftRight(Words x) { return _mm512_srli_epi32(x, N); }
template <int N>
inline Words ShiftRightSigned(Words x) { return _mm512_srai_epi32(x, N); }
template <int N>
inline Words ShiftShortsLeft(Words x) { return _mm512_slli_epi16(x, N); }
template <int N>
inline Words ShiftShortsRight(Words x) { return _mm512_srli_epi16(x, N); }
inline Words AddShorts(Words a, Words b) { return _mm512_add_epi16(a, b); }

// Over lanes.
inline float SumOfLanes(Floats x) { return _mm512_reduce_add_ps(x); }
inline float MaxOfLanes(Floats x) { return _mm512_reduce_max_ps(x); }
inline int SumOfLanes(Words x) { return _mm512_reduce_add_epi32(x); }
inline int MaxOfLanes(Words x) { return _mm512_reduce_max_epi32(x); }
inline bool AnyBits(Words x, Words of) { return _mm512_test_epi32_mask(x, of) != 0; }

// `x` in the lanes of the mask, elsewhere `otherwise` or zero.
inline Floats Select(Mask mask, Floats otherwise, Floats x) { return _mm512_mask_blend_ps(mask, otherwise, x); }
inline Floats KeepLanes(Mask mask, Floats x) { return _mm512_maskz_mov_ps(mask, x); }
inline Mask Positive(Floats x) { return _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_GT_OQ); }
inline Words SelectEqual(Words x, int value, Words equal, Words otherwise) {
  return _mm512_mask_mov_epi32(otherwise, _mm512_cmpeq_epi32_mask(x, _mm512_set1_epi32(value)), equal);
}
// a - b in the lanes of the mask, elsewhere `otherwise`.
inline Floats SubWhere(Floats otherwise, Mask mask, Floats a, Floats b) {
  return _mm512_mask_sub_ps(otherwise, mask, a, b);
}

// Conversions.
inline Floats ToFloat(Words x) { return _mm512_cvtepi32_ps(x); }
inline Words ToIntegers(Floats x) { return _mm512_cvtps_epi32(x); }
inline Words ShortsToWords(__m256i x) { return _mm512_cvtepu16_epi32(x); }
inline Words BytesToWords(__m128i x) { return _mm512_cvtepu8_epi32(x); }
inline Words SignedBytesToWords(__m128i x) { return _mm512_cvtepi8_epi32(x); }
inline Words BytesToShorts(__m256i x) { return _mm512_cvtepu8_epi16(x); }
inline __m128i WordsToBytes(Words x) { return _mm512_cvtepi32_epi8(x); }
inline Floats HalfToFloat(__m256i x) { return _mm512_cvtph_ps(x); }
inline __m256i ToBF16(Floats x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Two vectors as pairs of bfloat16, the first in the lower halves.
inline Words RoundPairs(Floats low, Floats high) {
  alignas(64) static constexpr uint16_t kOrder[32] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                      8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return _mm512_permutexvar_epi16(_mm512_load_si512(kOrder), (__m512i)_mm512_cvtne2ps_pbh(high, low));
}

// Permutations. Lane i exchanges with lane i ^ H.
template <int H>
inline Floats Exchange(Floats x) {
  if constexpr (H == 1) return _mm512_permute_ps(x, 0xb1);
  else if constexpr (H == 2) return _mm512_permute_ps(x, 0x4e);
  else if constexpr (H == 4) return _mm512_shuffle_f32x4(x, x, 0xb1);
  else return _mm512_shuffle_f32x4(x, x, 0x4e);
}
inline Floats LookUp(Words at, Floats table) { return _mm512_permutexvar_ps(at, table); }  // by the lowest 4 bits
inline Words LookUp(Words at, Words table) { return _mm512_permutexvar_epi32(at, table); }
inline Words ShuffleBytes(Words x, Words at) { return _mm512_shuffle_epi8(x, at); }  // within 128 bits

// A table of the upper halves of 16 floats, which are looked up by the lowest 4 bits of each 16.
inline Words ShortTable(const float values[16]) {
  return _mm512_broadcast_i64x4(_mm512_cvtepi32_epi16(_mm512_srli_epi32(_mm512_loadu_si512(values), 16)));
}
inline Words LookUpShorts(Words at, Words table) { return _mm512_permutexvar_epi16(at, table); }

// y, but where x, of 16 bits, is below 8, value x of the table.
inline Words LookUpBelow8(Words y, Words x, __m128i table) {
  const __mmask32 small = _mm512_cmplt_epu16_mask(x, _mm512_set1_epi16(8));
  return _mm512_mask_permutexvar_epi16(y, small, x, _mm512_castsi128_si512(table));
}

// Every fourth of 32 values of 16 bits from the one of index P on.
template <int P>
inline __m128i EveryFourth(Words x) { return _mm512_cvtepi64_epi16(_mm512_srli_epi64(x, 16 * P)); }

// Every other of the words of two vectors from the one of index P on.
template <int P>
inline Words EveryOther(Words low, Words high) {
  const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
  return _mm512_permutex2var_epi32(low, _mm512_add_epi32(even, _mm512_set1_epi32(P)), high);
}

// 16 vectors of 16 words -> their transpose, in place.
inline void Transpose16(Words r[16]) {
  __m512i t[16];
  for (int i = 0; i < 16; i += 2) {
    t[i] = _mm512_unpacklo_epi32(r[i], r[i + 1]);
    t[i + 1] = _mm512_unpackhi_epi32(r[i], r[i + 1]);
  }
  for (int i = 0; i < 16; i += 4) {
    r[i] = _mm512_unpacklo_epi64(t[i], t[i + 2]);
    r[i + 1] = _mm512_unpackhi_epi64(t[i], t[i + 2]);
    r[i + 2] = _mm512_unpacklo_epi64(t[i + 1], t[i + 3]);
    r[i + 3] = _mm512_unpackhi_epi64(t[i + 1], t[i + 3]);
  }
  for (int i = 0; i < 4; ++i) {
    t[i] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0x88);
    t[i + 4] = _mm512_shuffle_i32x4(r[i], r[i + 4], 0xdd);
    t[i + 8] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0x88);
    t[i + 12] = _mm512_shuffle_i32x4(r[i + 8], r[i + 12], 0xdd);
  }
  for (int i = 0; i < 4; ++i) {
    r[i] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0x88);
    r[i + 8] = _mm512_shuffle_i32x4(t[i], t[i + 8], 0xdd);
    r[i + 4] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0x88);
    r[i + 12] = _mm512_shuffle_i32x4(t[i + 4], t[i + 12], 0xdd);
  }
}

// Sums the lanes of each of 16 vectors; the sums are the lanes of the result.
inline Floats SumLanes(const DotFloats x[16]) {
  Words r[16];
  for (int i = 0; i < 16; ++i) r[i] = AsWords(x[i]);
  Transpose16(r);
  Floats sum = AsFloats(r[0]);
  for (int i = 1; i < 16; ++i) sum = Add(sum, AsFloats(r[i]));
  return sum;
}

inline Words SumLanes(const Dot x[16]) {
  Words r[16];
  for (int i = 0; i < 16; ++i) r[i] = x[i];
  Transpose16(r);
  for (int i = 1; i < 16; ++i) r[0] = Add(r[0], r[i]);
  return r[0];
}

// Products of one register of words.
inline Dot LoadDot(const char* row) { return _mm512_loadu_si512(row); }
inline Dot LoadDot(const char* row, int64_t at, int64_t bytes) { return LoadWords(row, at / 4, bytes); }
inline DotFloats MultiplyAddBF16(DotFloats sum, Dot a, Dot b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}
inline DotFloats MultiplyAddF32(DotFloats sum, Dot a, Dot b) { return MulAdd(AsFloats(a), AsFloats(b), sum); }

// The instruction multiplies unsigned by signed bytes, so 128 is added to the right operand. The caller subtracts 128
// times the sum of the left operand's row from the result; int32 may wrap around before, and the difference is exact.
inline constexpr int kInt8Added = 128;
inline Dot Int8Right(Dot b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }
inline Dot MultiplyAddInt8(Dot sum, Dot a, Dot b) { return _mm512_dpbusd_epi32(sum, b, a); }

}  // namespace jaxinfer
