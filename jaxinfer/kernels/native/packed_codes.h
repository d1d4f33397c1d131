// Codes of packed weights as values of x's type: which columns each register has, and x in the same order
// (`packed_matmul.cc`).

#pragma once

#include "codes.h"
#include "simd.h"

namespace jaxinfer {

// Each kind gives the type of x, the registers of a block of codes (`kParts`), and how `Part` makes them.

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
  static Words Table(const float values[16]) {
    return ShortTable(values);
  }
  template <int P>
  static Words Part(Words codes, Words table) {
    return LookUpShorts(ShiftShortsRight<4 * P>(codes), table);
  }
  static Floats MultiplyAdd(Floats sum, Words a, Words b) {
    return MultiplyAddBF16(sum, a, b);
  }
  // Values of columns 8i + p of a block, in lanes i -> its parts.
  static void StoreParts(const Floats values[8], BF16* to) {
    // Columns 4i + p are 8i + p and 8i + 4 + p.
    for (int p = 0; p < 4; ++p) StoreWords(to + p * 32, RoundPairs(values[p], values[p + 4]));
  }
  // x [128], of which `count` exist -> its parts, 64 bytes each.
  static void Order(const BF16* x, int64_t count, char* to) {
    const auto* words = reinterpret_cast<const char*>(x);
    for (int64_t q = 0; q < 4; ++q) {
      const Words v = LoadWords(words, q * kLanes, count * 2);
      auto store = [&](int p, __m128i part) {
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + p * 64 + q * 16), part);
      };
      store(0, EveryFourth<0>(v));
      store(1, EveryFourth<1>(v));
      store(2, EveryFourth<2>(v));
      store(3, EveryFourth<3>(v));
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
  static Words Table(const float values[16]) { return LoadWords(values); }
  template <int P>
  static Words Part(Words codes, Words table) {
    return LookUp(ShiftRight<4 * P>(codes), table);
  }
  static Floats MultiplyAdd(Floats sum, Words a, Words b) {
    return MultiplyAddF32(sum, a, b);
  }
  static void StoreParts(const Floats values[8], float* to) {
    for (int p = 0; p < 8; ++p) StoreAll(to + p * kLanes, values[p]);
  }
  static void Order(const float* x, int64_t count, char* to) {
    static constexpr int32_t kColumns[16] = {0, 8, 16, 24, 32, 40, 48, 56, 64, 72, 80, 88, 96, 104, 112, 120};
    const Words lanes = LoadWords(kColumns);
    for (int p = 0; p < 8; ++p) {
      const Mask mask = FirstLanes((count - p + 7) / 8);
      const Floats part = Gather(mask, lanes, x + p);
      StoreAll(to + p * 64, part);
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
  static Words Table(const float*) { return SetWords(0); }
  template <int P>
  static Words Part(Words codes, Words) {
    return AsWords(ByteToFloat<P>(FP8Code{}, codes));
  }
  static Floats MultiplyAdd(Floats sum, Words a, Words b) { return PackedF32::MultiplyAdd(sum, a, b); }
  static void StoreParts(const Floats values[4], float* to) {
    for (int p = 0; p < 4; ++p) StoreAll(to + p * kLanes, values[p]);
  }
  // x [64], of which `count` exist -> columns 4i + p.
  static void Order(const float* x, int64_t count, char* to) {
    static constexpr int32_t kColumns[16] = {0, 4, 8, 12, 16, 20, 24, 28, 32, 36, 40, 44, 48, 52, 56, 60};
    const Words lanes = LoadWords(kColumns);
    for (int p = 0; p < 4; ++p) {
      const Mask mask = FirstLanes((count - p + 3) / 4);
      const Floats part = Gather(mask, lanes, x + p);
      StoreAll(to + p * 64, part);
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
  static Words Table(const float*) { return SetWords(0); }
  template <int P>
  static Words Part(Words codes, Words) {
    return BytesToPair<P>(FP8Code{}, codes);
  }
  static Floats MultiplyAdd(Floats sum, Words a, Words b) { return PackedBF16::MultiplyAdd(sum, a, b); }
  static void StoreParts(const Floats values[4], BF16* to) {
    for (int p = 0; p < 2; ++p) StoreWords(to + p * 32, RoundPairs(values[2 * p], values[2 * p + 1]));
  }
  // x [64], of which `count` exist -> columns 4i + 2p and 4i + 2p + 1.
  static void Order(const BF16* x, int64_t count, char* to) {
    const auto* words = reinterpret_cast<const char*>(x);
    const Words low = LoadWords(words, 0, count * 2), high = LoadWords(words, kLanes, count * 2);
    StoreWords(to, EveryOther<0>(low, high));
    StoreWords(to + 64, EveryOther<1>(low, high));
  }
};

}  // namespace jaxinfer
