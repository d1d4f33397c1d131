// Products of rows x [M, K] with a part of the weights w [N, K], both row-major: as dot products for a few rows, by a
// panel for many (`matmul.cc`).

#pragma once

#include <type_traits>
#include <vector>

#include "simd.h"

namespace jaxinfer {

// Measured on two cores of a Zen 5 with weights of 2 MB to 65 MB; see docs/results/cpu.md.
inline constexpr int64_t kFewRows = 32;  // maximum number of rows computed as dot products
inline constexpr int64_t kColumns = 48;  // columns of a panel, and of one task
inline constexpr int kPanelRows = 8;     // rows of x that are multiplied with a panel at a time
inline constexpr int kDotRows = 4, kDotColumns = 4;

template <int N>
using Constant = std::integral_constant<int, N>;

template <typename Kind>
inline const char* Row(const typename Kind::Element* base, int64_t row, int64_t k) {
  return reinterpret_cast<const char*>(base + row * k);
}

// Dot products of R rows of x with C rows of w. `ahead`: distance of prefetches of w in bytes; 0 for no prefetches.
template <typename Kind, int R, int C>
inline void Dots(const char* const x[R], const char* const w[C], int64_t bytes, int64_t ahead,
                 typename Kind::Sum out[R][C]) {
  typename Kind::Sum sums[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) sums[r][c] = Kind::Zero();
  const int64_t whole = bytes / 64 * 64;
  for (int64_t at = 0; at < whole; at += 64) {
    __m512i b[C];
    for (int c = 0; c < C; ++c) b[c] = Kind::Right(_mm512_loadu_si512(w[c] + at));
    if (ahead)
      for (int c = 0; c < C; ++c) _mm_prefetch(w[c] + at + ahead, _MM_HINT_T0);
    for (int r = 0; r < R; ++r) {
      const __m512i a = _mm512_loadu_si512(x[r] + at);
      for (int c = 0; c < C; ++c) sums[r][c] = Kind::MultiplyAdd(sums[r][c], a, b[c]);
    }
  }
  if (whole < bytes) {
    for (int c = 0; c < C; ++c) {
      const __m512i b = Kind::Right(LoadWords(w[c], whole / 4, bytes));
      for (int r = 0; r < R; ++r) sums[r][c] = Kind::MultiplyAdd(sums[r][c], LoadWords(x[r], whole / 4, bytes), b);
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
    typename Kind::Sum totals[kFewRows][kLanes];
    const int64_t columns = std::min<int64_t>(kLanes, end - column);
    if (columns < kLanes) std::fill_n(&totals[0][0], m * kLanes, Kind::Zero());
    for (int64_t c = 0; c < columns; c += kDotColumns) {
      const char* ws[kDotColumns];
      for (int i = 0; i < kDotColumns; ++i) ws[i] = Row<Kind>(w, std::min(column + c + i, end - 1), k);
      auto run = [&](int64_t row, auto count) {
        constexpr int R = decltype(count)::value;
        const char* xs[R];
        typename Kind::Sum sums[R][kDotColumns];
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

// As FewRows, for many rows of x: packs the weight rows [begin, end), at most kColumns, into a panel.
template <typename Kind, typename Emit>
void ManyRows(const typename Kind::Element* x, const typename Kind::Element* w, int64_t m, int64_t k, int64_t begin,
              int64_t end, Emit& emit) {
  constexpr int NV = kColumns / kLanes;
  const int64_t bytes = k * sizeof(typename Kind::Element), words = bytes / 4;
  thread_local std::vector<uint32_t> panel;
  panel.resize(words * kColumns);
  for (int64_t c = 0; c < kColumns; c += kLanes) {
    const char* rows[kLanes];
    for (int i = 0; i < kLanes; ++i) rows[i] = begin + c + i < end ? Row<Kind>(w, begin + c + i, k) : nullptr;
    PackColumns<Kind>(rows, words, bytes, panel.data() + c, kColumns);
  }
  auto run = [&](int64_t row, auto count) {
    constexpr int R = decltype(count)::value;
    const uint32_t* a[R];
    typename Kind::Sum sums[R][NV];
    for (int r = 0; r < R; ++r) {
      a[r] = reinterpret_cast<const uint32_t*>(Row<Kind>(x, row + r, k));
      for (int v = 0; v < NV; ++v) sums[r][v] = Kind::Zero();
    }
    RowsTimesPanel<Kind, R, NV>(a, panel.data(), kColumns, words, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < NV; ++v)
        emit(row + r, begin + v * kLanes, sums[r][v], FirstLanes(end - begin - v * kLanes));
  };
  int64_t row = 0;
  for (; row + kPanelRows <= m; row += kPanelRows) run(row, Constant<kPanelRows>{});
  for (; row + 2 <= m; row += 2) run(row, Constant<2>{});
  if (row < m) run(row, Constant<1>{});
}

}  // namespace jaxinfer
