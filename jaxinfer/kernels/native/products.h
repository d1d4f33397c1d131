// Products of rows x [M, K] with a part of the weights w [N, K], both row-major: as dot products for a few rows, by a
// panel for many (`matmul.cc`).

#pragma once

#include <type_traits>
#include <vector>

#include "simd.h"

namespace jaxinfer {

// Measured on two cores of a Zen 5 with weights of 2 MB to 65 MB; see docs/results/cpu.md. With AVX2 there are 16
// registers of half the width, which must hold the sums.
inline constexpr int64_t kFewRows = kAVX512 ? 32 : 16;       // maximum number of rows computed as dot products
inline constexpr int64_t kColumns = 48;                      // columns of a panel, and of one task
inline constexpr int kPanelRows = kAVX512 ? 8 : 6;           // rows of x that are multiplied with a panel at a time
inline constexpr int kPanelVectors = kAVX512 ? 3 : 1;        // vectors of the panel that they are multiplied with
inline constexpr int64_t kPanelWords = kAVX512 ? 1 << 20 : 1024;  // words of a column packed at a time
inline constexpr int kDotRows = kAVX512 ? 4 : 2, kDotColumns = 4;

template <int N>
using Constant = std::integral_constant<int, N>;

template <typename Kind>
inline const char* Row(const typename Kind::Element* base, int64_t row, int64_t k) {
  return reinterpret_cast<const char*>(base + row * k);
}

// Dot products of R rows of x with C rows of w. `ahead`: distance of prefetches of w in bytes; 0 for no prefetches.
template <typename Kind, int R, int C>
inline void Dots(const char* const x[R], const char* const w[C], int64_t bytes, int64_t ahead,
                 typename Kind::DotSum out[R][C]) {
  typename Kind::DotSum sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = typename Kind::DotSum{};
  constexpr int64_t kStep = sizeof(Dot);
  const int64_t whole = bytes / kStep * kStep;
  for (int64_t at = 0; at < whole; at += kStep) {
    Dot b[C];
    for (int c = 0; c < C; ++c) b[c] = Kind::Right(LoadDot(w[c] + at));
    if (ahead)
      for (int c = 0; c < C; ++c) _mm_prefetch(w[c] + at + ahead, _MM_HINT_T0);
    for (int r = 0; r < R; ++r) {
      const Dot a = LoadDot(x[r] + at);
      for (int c = 0; c < C; ++c) sums[r][c] = Kind::MultiplyAdd(sums[r][c], a, b[c]);
    }
  }
  if (whole < bytes) {
    for (int c = 0; c < C; ++c) {
      const Dot b = Kind::Right(LoadDot(w[c], whole, bytes));
      for (int r = 0; r < R; ++r) sums[r][c] = Kind::MultiplyAdd(sums[r][c], LoadDot(x[r], whole, bytes), b);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = sums[r][c];
}

// Weight rows [begin, end) times all rows of x, as dot products. `emit(row, column, sums, mask)` takes 16 columns.
template <typename Kind, typename Emit>
void FewRows(const typename Kind::Element* x, const typename Kind::Element* w, int64_t m, int64_t k, int64_t begin,
             int64_t end, Emit& emit) {
  const int64_t bytes = k * sizeof(typename Kind::Element);
  // With a single row the processor's own prefetcher is faster, except for int8: four rows of 1024 columns are a page,
  // where that prefetcher stops.
  constexpr bool kInt8 = sizeof(typename Kind::Element) == 1;
  const int64_t ahead = kInt8 ? 2 * kDotColumns * bytes : m > 1 ? kDotColumns * bytes : 0;
  for (int64_t column = begin; column < end; column += kLanes) {
    // Partial sums of 16 columns, one register each, are collected before their lanes are added. The array (32 kB) is
    // not zeroed as a whole, which took an eighth of the time of a single row.
    typename Kind::DotSum totals[kFewRows][kLanes];
    const int64_t columns = std::min<int64_t>(kLanes, end - column);
    if (columns < kLanes) std::fill_n(&totals[0][0], m * kLanes, typename Kind::DotSum{});
    for (int64_t c = 0; c < columns; c += kDotColumns) {
      const char* ws[kDotColumns];
      for (int i = 0; i < kDotColumns; ++i) ws[i] = Row<Kind>(w, std::min(column + c + i, end - 1), k);
      auto run = [&](int64_t row, auto count) {
        constexpr int R = decltype(count)::value;
        const char* xs[R];
        typename Kind::DotSum sums[R][kDotColumns];
        for (int r = 0; r < R; ++r) xs[r] = Row<Kind>(x, row + r, k);
        Dots<Kind, R, kDotColumns>(xs, ws, bytes, row == 0 ? ahead : 0, sums);
        for (int r = 0; r < R; ++r)
          for (int i = 0; i < kDotColumns; ++i) totals[row + r][c + i] = sums[r][i];
      };
      int64_t row = 0;
      for (; row + kDotRows <= m; row += kDotRows) run(row, Constant<kDotRows>{});
      for (; row + 2 <= m; row += 2) run(row, Constant<2>{});
      if (row < m) run(row, Constant<1>{});
    }
    for (int64_t row = 0; row < m; ++row) emit(row, column, SumLanes(totals[row]), FirstLanes(columns));
  }
}

// Elements [first, first + count) of rows of x as the left operands of a panel. With AVX2 floats are copied into
// `buffer`, widened: beginning at multiples of 4096 bytes, as rows often do, they would share lines of the first-level
// cache.
template <typename Kind, int R>
inline void PanelRows(const typename Kind::Element* x, int64_t k, int64_t first, int64_t count,
                      std::vector<uint32_t>& buffer, const uint32_t* a[R]) {
  if constexpr (kAVX512 || std::is_same_v<Kind, KindInt8>) {
    for (int r = 0; r < R; ++r) a[r] = reinterpret_cast<const uint32_t*>(x + r * k + first);
  } else {
    const int64_t stride = (count + 2 * kLanes - 1) / kLanes * kLanes;
    buffer.resize(R * stride);
    for (int r = 0; r < R; ++r) {
      uint32_t* to = buffer.data() + r * stride;
      const typename Kind::Element* from = x + r * k + first;
      for (int64_t i = 0; i < count; i += kLanes) StoreAll(to + i, Load(from + i, FirstLanes(count - i)));
      a[r] = to;
    }
  }
}

// As FewRows, for many rows of x: packs the weight rows [begin, end), at most kColumns, into a panel, or part after
// part of their elements, so that it stays in the second-level cache.
template <typename Kind, typename Emit>
void ManyRows(const typename Kind::Element* x, const typename Kind::Element* w, int64_t m, int64_t k, int64_t begin,
              int64_t end, Emit& emit) {
  using Panel = typename Kind::Panel;
  using Sum = typename Panel::Sum;
  constexpr int NV = kPanelVectors;
  const int64_t part = std::min(k, kPanelWords * Panel::kPerWord);
  thread_local std::vector<uint32_t> buffer, copied;
  thread_local std::vector<Sum> kept;  // sums of the parts before
  buffer.resize(part / Panel::kPerWord * kColumns + kLanes);
  if (part < k) kept.resize(m * (kColumns / kLanes));
  uint32_t* panel = buffer.data() + (-reinterpret_cast<uintptr_t>(buffer.data()) & 63) / sizeof(uint32_t);
  for (int64_t first = 0; first < k; first += part) {
    const int64_t count = std::min(part, k - first);
    for (int64_t c = 0; c < kColumns; c += kLanes) {
      const typename Kind::Element* rows[kLanes];
      for (int i = 0; i < kLanes; ++i)
        rows[i] = begin + c + i < end ? w + (begin + c + i) * k + first : nullptr;
      PackColumns<Panel>(rows, count, panel + c, kColumns);
    }
    auto run = [&](int64_t row, auto rows) {
      constexpr int R = decltype(rows)::value;
      const uint32_t* a[R];
      PanelRows<Kind, R>(x + row * k, k, first, count, copied, a);
      for (int64_t c = 0; c < kColumns; c += NV * kLanes) {
        Sum sums[R][NV] = {};
        auto own = [&](int r, int v) -> Sum& { return kept[(row + r) * (kColumns / kLanes) + c / kLanes + v]; };
        if (first > 0)
          for (int r = 0; r < R; ++r)
            for (int v = 0; v < NV; ++v) sums[r][v] = own(r, v);
        RowsTimesPanel<Panel, R, NV>(a, panel + c, kColumns, count / Panel::kPerWord, sums);
        for (int r = 0; r < R; ++r)
          for (int v = 0; v < NV; ++v) {
            const int64_t column = begin + c + v * kLanes;
            if (first + count < k) own(r, v) = sums[r][v];
            else emit(row + r, column, sums[r][v], FirstLanes(end - column));
          }
      }
    };
    int64_t row = 0;
    for (; row + kPanelRows <= m; row += kPanelRows) run(row, Constant<kPanelRows>{});
    for (; row + 2 <= m; row += 2) run(row, Constant<2>{});
    if (row < m) run(row, Constant<1>{});
  }
}

}  // namespace jaxinfer
