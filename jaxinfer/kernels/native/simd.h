// Vectors of one AVX-512 register, packed operands, and the product of a few rows with a packed panel.
//
// A panel holds `n` output columns (keys, or rows of a weight) for all of the inner dimension k, transposed:
// word [kk][j] has the E elements kk * E .. of column j that one multiply-add instruction takes at a time
// (E = 2 for bfloat16, 4 for int8, 1 for float32), so that a lane of a register is a column.

#pragma once

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

namespace jaxinfer {

inline constexpr int kLanes = 16;

// bfloat16 is the upper half of a float32.
struct BF16 {
  uint16_t bits;
};

inline float ToFloat(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline __m512 ToFloat(__m256i x) { return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(x), 16)); }
inline __m256i ToBF16(__m512 x) { return (__m256i)_mm512_cvtneps_pbh(x); }

// Each kind of operands defines the elements per word, the conversion of the right operand's words when they are loaded
// (`Right`), and the multiply-add of words.
struct KindBF16 {
  using Element = BF16;
  using Sum = __m512;
  static constexpr int kPerWord = 2;
  static __m512i Right(__m512i b) { return b; }
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Sum MultiplyAdd(Sum sum, __m512i a, __m512i b) { return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b); }
};

struct KindF32 {
  using Element = float;
  using Sum = __m512;
  static constexpr int kPerWord = 1;
  static __m512i Right(__m512i b) { return b; }
  static Sum Zero() { return _mm512_setzero_ps(); }
  static Sum MultiplyAdd(Sum sum, __m512i a, __m512i b) {
    return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(b), sum);
  }
};

// The instruction multiplies unsigned by signed bytes, so 128 is added to the right operand. The caller subtracts 128
// times the sum of the left operand's row from the result; int32 may wrap around before, and the difference is exact.
struct KindInt8 {
  using Element = int8_t;
  using Sum = __m512i;
  static constexpr int kPerWord = 4;
  static __m512i Right(__m512i b) { return _mm512_xor_si512(b, _mm512_set1_epi8(-128)); }
  static Sum Zero() { return _mm512_setzero_si512(); }
  static Sum MultiplyAdd(Sum sum, __m512i a, __m512i b) { return _mm512_dpbusd_epi32(sum, b, a); }
};

inline __mmask16 FirstLanes(int64_t count) {
  return count >= kLanes ? 0xffff : count <= 0 ? 0 : static_cast<__mmask16>((1u << count) - 1);
}

// Loads the words of a row from `word` on; bytes from `bytes` of the row on read as zero.
inline __m512i LoadWords(const char* row, int64_t word, int64_t bytes) {
  const int64_t left = bytes - word * 4;
  if (left >= 64) return _mm512_loadu_si512(row + word * 4);
  if (left <= 0) return _mm512_setzero_si512();
  return _mm512_maskz_loadu_epi8((1ull << left) - 1, row + word * 4);
}

// 16 registers of 16 words -> their transpose, in place.
inline void Transpose16(__m512i r[16]) {
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

// Transposes up to 16 rows of `words` words (`bytes` bytes, zero beyond) into columns [0, 16) of a panel whose
// lines are `stride` words long, as the right operand of a kind. A null row stands for one of zeroes.
template <typename Kind>
inline void PackColumns(const char* const rows[16], int64_t words, int64_t bytes, uint32_t* panel, int64_t stride) {
  for (int64_t word = 0; word < words; word += kLanes) {
    __m512i r[16];
    for (int i = 0; i < 16; ++i) r[i] = rows[i] ? LoadWords(rows[i], word, bytes) : _mm512_setzero_si512();
    for (int i = 0; i < 16; ++i) r[i] = Kind::Right(r[i]);
    Transpose16(r);
    const int64_t count = std::min<int64_t>(kLanes, words - word);
    for (int64_t i = 0; i < count; ++i) _mm512_storeu_si512(panel + (word + i) * stride, r[i]);
  }
}

// sums[r][v] += row r of `a` (words, broadcast) times vectors [0, NV) of the panel.
template <typename Kind, int R, int NV>
inline void RowsTimesPanel(const uint32_t* const a[R], const uint32_t* panel, int64_t stride, int64_t words,
                           typename Kind::Sum sums[R][NV]) {
  typename Kind::Sum acc[R][NV];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) acc[r][v] = sums[r][v];
  for (int64_t word = 0; word < words; ++word, panel += stride) {
    __m512i b[NV];
    for (int v = 0; v < NV; ++v) b[v] = _mm512_loadu_si512(panel + v * kLanes);
    for (int r = 0; r < R; ++r) {
      const __m512i x = _mm512_set1_epi32(static_cast<int>(a[r][word]));
      for (int v = 0; v < NV; ++v) acc[r][v] = Kind::MultiplyAdd(acc[r][v], x, b[v]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < NV; ++v) sums[r][v] = acc[r][v];
}

// Sums the lanes of each of 16 registers; the sums are the lanes of the result.
inline __m512 SumLanes(const __m512 x[16]) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = _mm512_castps_si512(x[i]);
  Transpose16(r);
  __m512 sum = _mm512_castsi512_ps(r[0]);
  for (int i = 1; i < 16; ++i) sum = _mm512_add_ps(sum, _mm512_castsi512_ps(r[i]));
  return sum;
}

inline __m512i SumLanes(const __m512i x[16]) {
  __m512i r[16];
  for (int i = 0; i < 16; ++i) r[i] = x[i];
  Transpose16(r);
  for (int i = 1; i < 16; ++i) r[0] = _mm512_add_epi32(r[0], r[i]);
  return r[0];
}

inline void Store(float* out, __m512 x, __mmask16 mask) { _mm512_mask_storeu_ps(out, mask, x); }
inline void Store(BF16* out, __m512 x, __mmask16 mask) { _mm256_mask_storeu_epi16(out, mask, ToBF16(x)); }
inline __m512 Load(const float* in, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, in); }
inline __m512 Load(const BF16* in, __mmask16 mask) { return ToFloat(_mm256_maskz_loadu_epi16(mask, in)); }

// 2^(n + r) by a polynomial of least relative error for r in [-1/2, 1/2]. The error is about one unit in the last place
// of float32, and for bfloat16 a hundredth of its own unit.
template <typename Element>
inline __m512 Power(__m512 n, __m512 r) {
  auto next = [&](__m512 p, float c) { return _mm512_fmadd_ps(p, r, _mm512_set1_ps(c)); };
  __m512 p;
  if constexpr (sizeof(Element) == 4) {
    p = next(_mm512_set1_ps(1.534581243e-4f), 1.339993090e-3f);
    p = next(next(next(p, 9.618489072e-3f), 5.550328642e-2f), 2.402264625e-1f);
    p = next(next(p, 6.931471825e-1f), 1.0f);
  } else {
    p = next(next(_mm512_set1_ps(5.517166853e-2f), 2.426111251e-1f), 6.932609677e-1f);
    p = next(p, 9.999280572e-1f);
  }
  return _mm512_scalef_ps(p, n);
}

// 2^x; NaN stays NaN.
template <typename Element>
inline __m512 Exp2(__m512 x) {
  // max and min return the second operand if either is NaN. Attention weights are at most one.
  x = _mm512_max_ps(_mm512_set1_ps(-127.0f), x);
  if constexpr (sizeof(Element) == 4) x = _mm512_min_ps(_mm512_set1_ps(128.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, 0);
  return Power<Element>(n, _mm512_sub_ps(x, n));
}

// e^x in float32's precision; NaN stays NaN, and results beyond the largest number are infinite.
inline __m512 Exp(__m512 x) {
  x = _mm512_min_ps(_mm512_set1_ps(89.0f), _mm512_max_ps(_mm512_set1_ps(-104.0f), x));
  const __m512 log2e = _mm512_set1_ps(1.44269504f), n = _mm512_roundscale_ps(_mm512_mul_ps(x, log2e), 0);
  // ln 2 in two parts, of which the first times n is exact.
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  return Power<float>(n, _mm512_mul_ps(r, log2e));
}

}  // namespace jaxinfer
