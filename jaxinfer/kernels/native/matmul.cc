// y = x w^T: rows [M, K] times weights [N, K], both as they lie in memory; or groups of rows, each times its own
// weights.
//
// A few rows (decode) are bound by reading the weights: each is read once, as dot products along k. Many rows
// (prefill) are bound by arithmetic: some weight rows at a time are transposed into a panel that stays in the
// second-level cache, and multiplied without a sum over lanes.
//
// The two ways add up a row's products in different orders. With `stable`, every row takes the first way, so that its
// result has the same bits however many rows there are; and rows of zeros at the end (padding) are not computed.

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "parallel.h"
#include "rotate.h"
#include "simd.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;

// Measured on two cores of a Zen 5 with weights of 2 MB to 65 MB; see docs/results/cpu.md.
constexpr int64_t kFewRows = 32;  // up to here as dot products
constexpr int64_t kColumns = 48;  // of a panel, and of one task
constexpr int kPanelRows = 8;     // rows of x that are multiplied with a panel at a time
constexpr int kDotRows = 4, kDotColumns = 4;

template <int N>
using Constant = std::integral_constant<int, N>;

template <typename Kind>
inline const char* Row(const typename Kind::Element* base, int64_t row, int64_t k) {
  return reinterpret_cast<const char*>(base + row * k);
}

// Dot products of R rows of x with C rows of w. `ahead`: prefetches the bytes of w that lie so far ahead; 0: nothing.
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
    // What is left of 16 columns in each lane is put together before lanes are added. It is not set to zero as a whole
    // (32 kB), which took an eighth of the time of a single row.
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

// The same through a panel; at most kColumns weight rows.
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

// Rows of x that are multiplied with one matrix.
struct Group {
  int64_t first;   // of its rows in x
  int64_t rows;
  int64_t result;  // the row of y that is made of the first
  int64_t matrix;  // the first row of w that it has
};

// All of x w^T; `make_emit(group, begin)` gives the function that takes the results of one task.
template <typename Kind, typename MakeEmit>
void Matmul(ffi::ThreadPool& pool, const typename Kind::Element* x, const typename Kind::Element* w,
            const std::vector<Group>& groups, int64_t n, int64_t k, bool stable, const MakeEmit& make_emit) {
  const int64_t tasks = (n + kColumns - 1) / kColumns;
  ParallelFor(pool, groups.size() * tasks, [&](int64_t task) {
    const Group& group = groups[task / tasks];
    const int64_t begin = task % tasks * kColumns, end = std::min(n, begin + kColumns);
    const auto* rows = x + group.first * k;
    const auto* matrix = w + group.matrix * k;
    auto emit = make_emit(group, begin);
    if (group.rows > kFewRows && !stable) {
      ManyRows<Kind>(rows, matrix, group.rows, k, begin, end, emit);
      return;
    }
    for (int64_t first = 0; first < group.rows; first += kFewRows) {
      auto part = [&, first](int64_t row, int64_t column, auto sums, __mmask16 mask) {
        emit(first + row, column, sums, mask);
      };
      FewRows<Kind>(rows + first * k, matrix, std::min(kFewRows, group.rows - first), k, begin, end, part);
    }
  });
}

template <typename Kind, typename Out>
void Floats(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const std::vector<Group>& groups,
            int64_t n, bool stable, Out* y) {
  using Element = typename Kind::Element;
  const int64_t k = x.dimensions()[1];
  Matmul<Kind>(pool, static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(w.untyped_data()),
               groups, n, k, stable, [=](const Group& group, int64_t) {
                 return [=, to = y + group.result * n](int64_t row, int64_t column, __m512 sums, __mmask16 mask) {
                   Store(to + row * n + column, sums, mask);
                 };
               });
}

void AnyFloats(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
               const std::vector<Group>& groups, bool stable, ffi::Result<ffi::AnyBuffer>& y) {
  const bool half = x.element_type() == ffi::DataType::BF16;
  void* out = y->untyped_data();
  const int64_t n = y->dimensions()[1];
  const bool rounded = y->element_type() == ffi::DataType::BF16;
  if (rounded) Floats<KindBF16>(pool, x, w, groups, n, stable, static_cast<BF16*>(out));
  else if (half) Floats<KindBF16>(pool, x, w, groups, n, stable, static_cast<float*>(out));
  else Floats<KindF32>(pool, x, w, groups, n, stable, static_cast<float*>(out));
}

// The number of rows of x up to the last that is not all zeros; NaN is not zero.
int64_t LiveRows(const ffi::AnyBuffer& x) {
  const auto* bytes = static_cast<const char*>(x.untyped_data());
  const int64_t size = x.dimensions()[0] ? static_cast<int64_t>(x.size_bytes()) / x.dimensions()[0] : 0;
  for (int64_t row = x.dimensions()[0]; row > 0; --row)
    for (int64_t at = 0; at < size; at += 64) {
      const int64_t left = std::min<int64_t>(64, size - at);
      const __mmask64 mask = left == 64 ? ~0ull : (1ull << left) - 1;
      const __m512i x64 = _mm512_maskz_loadu_epi8(mask, bytes + (row - 1) * size + at);
      if (_mm512_test_epi8_mask(x64, x64)) return row;
    }
  return 0;
}

// All rows of x times the rows of w from `first` on. With `stable`, the results of rows of zeros at the end are set
// here.
std::vector<Group> OneGroup(const ffi::AnyBuffer& x, int64_t first, bool stable, ffi::Result<ffi::AnyBuffer>& y) {
  const int64_t all = x.dimensions()[0], live = stable ? LiveRows(x) : all;
  if (live < all) {
    const int64_t size = static_cast<int64_t>(y->size_bytes()) / all;
    std::memset(static_cast<char*>(y->untyped_data()) + live * size, 0, (all - live) * size);
  }
  if (live == 0) return {};
  return {{0, live, 0, first}};
}

// Rows [offsets[e], offsets[e + 1]) times matrix e of n rows; those without rows are left out.
std::vector<Group> Groups(const ffi::Buffer<ffi::S32>& offsets, int64_t n) {
  const int32_t* at = offsets.typed_data();
  std::vector<Group> groups;
  for (int64_t e = 0; e + 1 < offsets.dimensions()[0]; ++e)
    if (at[e] < at[e + 1]) groups.push_back({at[e], at[e + 1] - at[e], at[e], e * n});
  return groups;
}

ffi::Error MatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Result<ffi::AnyBuffer> y,
                      int64_t first, bool stable) {
  AnyFloats(pool, x, w, OneGroup(x, first, stable, y), stable, y);
  return ffi::Error::Success();
}

ffi::Error GroupedMatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::S32> offsets,
                             ffi::Result<ffi::AnyBuffer> y, bool stable) {
  AnyFloats(pool, x, w, Groups(offsets, y->dimensions()[1]), stable, y);
  return ffi::Error::Success();
}

// A quantised row's scale, and the sum of its values.
struct Quantised {
  float scale;
  int32_t sum;
};

// Quantises a rotated row: q = round(x / scale) with scale = max |x| / 127, which is NaN where a value is not finite.
Quantised QuantiseRow(const float* x, int64_t k, int8_t* q) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  // As integers, NaN is larger than any number, so that it is not lost.
  __m512i top = _mm512_setzero_si512(), sums = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += kLanes)
    top = _mm512_max_epi32(top, _mm512_and_si512(_mm512_castps_si512(Load(x + i, FirstLanes(k - i))), magnitude));
  const float most = _mm512_cvtss_f32(_mm512_castsi512_ps(_mm512_set1_epi32(_mm512_reduce_max_epi32(top))));
  const float scale = std::isfinite(most) ? most * (1.0f / 127.0f) : std::numeric_limits<float>::quiet_NaN();
  const __m512 inverse = _mm512_set1_ps(scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f);
  for (int64_t i = 0; i < k; i += kLanes) {
    const __mmask16 mask = FirstLanes(k - i);
    const __m512i rounded = _mm512_cvtps_epi32(_mm512_mul_ps(Load(x + i, mask), inverse));
    sums = _mm512_add_epi32(sums, rounded);
    _mm_mask_storeu_epi8(q + i, mask, _mm512_cvtepi32_epi8(rounded));
  }
  return {scale, _mm512_reduce_add_epi32(sums)};
}

// `block`: the columns of a block of x that is rotated.
template <typename In, typename Out>
void Int8(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w, const float* scales,
          const std::vector<Group>& groups, int64_t block, int64_t n, Out* y) {
  if (groups.empty()) return;
  const int64_t k = x.dimensions()[1], count = groups.back().first + groups.back().rows;
  std::vector<int8_t> values(count * k);
  std::vector<Quantised> rows(count);
  const auto* in = static_cast<const In*>(x.untyped_data());
  constexpr int64_t kRows = 16;
  ParallelFor(pool, (count + kRows - 1) / kRows, [&](int64_t task) {
    thread_local std::vector<float> rotated;
    rotated.resize(k);
    for (int64_t row = task * kRows; row < std::min(count, (task + 1) * kRows); ++row) {
      RotateRow(in + row * k, k, block, rotated.data());
      rows[row] = QuantiseRow(rotated.data(), k, values.data() + row * k);
    }
  });
  // Sums of integers are exact in any order.
  Matmul<KindInt8>(pool, values.data(), static_cast<const int8_t*>(w.untyped_data()), groups, n, k, false,
                   [&](const Group& group, int64_t) {
                     return [&](int64_t row, int64_t column, __m512i sums, __mmask16 mask) {
                       const Quantised& own = rows[group.first + row];
                       const __m512i added = _mm512_set1_epi32(128 * own.sum);
                       const __m512 exact = _mm512_cvtepi32_ps(_mm512_sub_epi32(sums, added));
                       const __m512 scaled = _mm512_mul_ps(exact, _mm512_set1_ps(own.scale));
                       const __m512 made = _mm512_mul_ps(scaled, Load(scales + group.matrix + column, mask));
                       Store(y + (group.result + row) * n + column, made, mask);
                     };
                   });
}

void AnyInt8(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
             const ffi::Buffer<ffi::F32>& scales, const std::vector<Group>& groups, int64_t block,
             ffi::Result<ffi::AnyBuffer>& y) {
  const bool half = x.element_type() == ffi::DataType::BF16;
  void* out = y->untyped_data();
  const float* s = scales.typed_data();
  const int64_t n = y->dimensions()[1];
  if (y->element_type() == ffi::DataType::BF16) Int8<BF16>(pool, x, w, s, groups, block, n, static_cast<BF16*>(out));
  else if (half) Int8<BF16>(pool, x, w, s, groups, block, n, static_cast<float*>(out));
  else Int8<float>(pool, x, w, s, groups, block, n, static_cast<float*>(out));
}

ffi::Error Int8MatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scales,
                          ffi::Result<ffi::AnyBuffer> y, int64_t first, int64_t block, bool stable) {
  AnyInt8(pool, x, w, scales, OneGroup(x, first, stable, y), block, y);
  return ffi::Error::Success();
}

ffi::Error GroupedInt8MatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer w, ffi::Buffer<ffi::F32> scales,
                                 ffi::Buffer<ffi::S32> offsets, ffi::Result<ffi::AnyBuffer> y, int64_t block) {
  AnyInt8(pool, x, w, scales, Groups(offsets, y->dimensions()[1]), block, y);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferMatmul, jaxinfer::MatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("first")
                                  .Attr<bool>("stable"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferInt8Matmul, jaxinfer::Int8MatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("block")
                                  .Attr<bool>("stable"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferGroupedMatmul, jaxinfer::GroupedMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<bool>("stable"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferGroupedInt8Matmul, jaxinfer::GroupedInt8MatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("block"));
