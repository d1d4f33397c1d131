// Packed operands, the product of a few rows with a packed panel, and exponentials.
//
// A panel holds `n` output columns (keys, or rows of a weight) for all of the inner dimension k, transposed:
// word [kk][j] has the E elements kk * E .. of column j that one multiply-add takes at a time (E = 2 for bfloat16, 4
// for int8, 1 for float32), so that a lane of a vector is a column.

#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "vectors.h"

namespace jaxinfer {

inline float ToFloat(BF16 x) {
  const uint32_t bits = static_cast<uint32_t>(x.bits) << 16;
  float wide;
  std::memcpy(&wide, &bits, sizeof(wide));
  return wide;
}
inline Floats ToFloat(__m256i x) { return AsFloats(ShiftLeft<16>(ShortsToWords(x))); }
inline void Store(BF16* out, Floats x, Mask mask) { StoreShorts(out, mask, ToBF16(x)); }
inline Floats Load(const BF16* in, Mask mask) { return ToFloat(LoadShorts(mask, in)); }

// Each kind of operands defines the elements per word, the conversion of the right operand's words when they are loaded
// (`Right`), the multiply-add of words, and the kind of panels: without an instruction for pairs of bfloat16 panels are
// float32, so that they are widened once and not for each row.
struct KindF32 {
  using Element = float;
  using Panel = KindF32;
  using Sum = Floats;
  using DotSum = DotFloats;
  static constexpr int kPerWord = 1;
  template <typename V>
  static V Right(V b) { return b; }
  template <typename S, typename V>
  static S MultiplyAdd(S sum, V a, V b) { return MultiplyAddF32(sum, a, b); }
};

struct KindBF16 {
  using Element = BF16;
  using Panel = std::conditional_t<kAVX512, KindBF16, KindF32>;
  using Sum = Floats;
  using DotSum = DotFloats;
  static constexpr int kPerWord = 2;
  template <typename V>
  static V Right(V b) { return b; }
  template <typename S, typename V>
  static S MultiplyAdd(S sum, V a, V b) { return MultiplyAddBF16(sum, a, b); }
};

struct KindInt8 {
  using Element = int8_t;
  using Panel = KindInt8;
  using Sum = Words;
  using DotSum = Dot;
  static constexpr int kPerWord = 4;
  template <typename V>
  static V Right(V b) { return Int8Right(b); }
  template <typename S, typename V>
  static S MultiplyAdd(S sum, V a, V b) { return MultiplyAddInt8(sum, a, b); }
};

// Transposes 16 rows of `count` elements into columns [0, 16) of a panel whose lines are `stride` words long, as the
// right operand of a kind, which may be wider. A null row stands for one of zeroes.
template <typename Kind, typename Element>
inline void PackColumns(const Element* const rows[16], int64_t count, uint32_t* panel, int64_t stride) {
  constexpr bool kWiden = !std::is_same_v<Element, typename Kind::Element>;
  const int64_t bytes = count * sizeof(Element), words = count / Kind::kPerWord;
  for (int64_t word = 0; word < words; word += kLanes) {
    Words r[16];
    for (int i = 0; i < 16; ++i) {
      if (!rows[i]) r[i] = SetWords(0);
      else if constexpr (kWiden) r[i] = AsWords(Load(rows[i] + word, FirstLanes(words - word)));
      else r[i] = LoadWords(reinterpret_cast<const char*>(rows[i]), word, bytes);
    }
    for (int i = 0; i < 16; ++i) r[i] = Kind::Right(r[i]);
    Transpose16(r);
    const int64_t lines = std::min<int64_t>(kLanes, words - word);
    for (int64_t i = 0; i < lines; ++i) StoreWords(panel + (word + i) * stride, r[i]);
  }
}

// sums[r][v] += row r of `a` (words, broadcast) times vectors [0, NV) of the panel.
template <typename Kind, int R, int NV>
inline void RowsTimesPanel(const uint32_t* const a[R], const uint32_t* panel, int64_t stride, int64_t words,
                           typename Kind::Sum sums[R][NV]) {
  constexpr int N = NV * kRegisters;
  typename Kind::DotSum acc[R][N];
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) acc[r][i] = Register(sums[r][i / kRegisters], i % kRegisters);
  for (int64_t word = 0; word < words; ++word, panel += stride) {
    Dot b[N];
    for (int i = 0; i < N; ++i) b[i] = LoadDot(reinterpret_cast<const char*>(panel) + i * sizeof(Dot));
    for (int r = 0; r < R; ++r) {
      const Dot x = SetDot(static_cast<int>(a[r][word]));
      for (int i = 0; i < N; ++i) acc[r][i] = Kind::MultiplyAdd(acc[r][i], x, b[i]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int i = 0; i < N; ++i) Register(sums[r][i / kRegisters], i % kRegisters) = acc[r][i];
}

// 2^(n + r) by a polynomial of least relative error for r in [-1/2, 1/2]. The error is about one unit in the last place
// of float32, and for bfloat16 a hundredth of its own unit.
template <typename Element>
inline Floats Power(Floats n, Floats r) {
  auto next = [&](Floats p, float c) { return MulAdd(p, r, Set(c)); };
  Floats p;
  if constexpr (sizeof(Element) == 4) {
    p = next(Set(1.534581243e-4f), 1.339993090e-3f);
    p = next(next(next(p, 9.618489072e-3f), 5.550328642e-2f), 2.402264625e-1f);
    p = next(next(p, 6.931471825e-1f), 1.0f);
  } else {
    p = next(next(Set(5.517166853e-2f), 2.426111251e-1f), 6.932609677e-1f);
    p = next(p, 9.999280572e-1f);
  }
  return TimesPower(p, n);
}

// 2^x; NaN stays NaN.
template <typename Element>
inline Floats Exp2(Floats x) {
  // max and min return the second operand if either is NaN. Attention weights are at most one.
  x = Max(Set(-127.0f), x);
  if constexpr (sizeof(Element) == 4) x = Min(Set(128.0f), x);
  const Floats n = Round(x);
  return Power<Element>(n, Sub(x, n));
}

// e^x in float32's precision; NaN stays NaN, and results beyond the largest number are infinite.
inline Floats Exp(Floats x) {
  x = Min(Set(89.0f), Max(Set(-104.0f), x));
  const Floats log2e = Set(1.44269504f), n = Round(Mul(x, log2e));
  // ln 2 in two parts, of which the first times n is exact.
  Floats r = NegMulAdd(n, Set(0.693359375f), x);
  r = NegMulAdd(n, Set(-2.12194440e-4f), r);
  return Power<float>(n, Mul(r, log2e));
}

}  // namespace jaxinfer
