// y = x w^T for rows x [M, K] and weights w [N, K] in codes of 4 bits or FP8, or grouped: groups of rows, each times
// its own weights. Values are (code - zero) * scale with a scale and, for 4 bits, a zero point for each group of
// columns of a row or, where scales are the exponents of MXFP4, floats of 4 bits (e2m1) times 2^(scale - 127). Byte i
// of a row has the codes of columns 2i (low half) and 2i + 1, or that of column i in FP8.
//
// Codes become values of x's type in registers (`packed_codes.h`). Words are shifted, not unpacked: a register of words
// gives several registers with, for 4 bits, every fourth or eighth column. So x is brought into that order once, and
// lane i of the sums has columns 8i .. 8i + 7 of each 128, in FP8 4i .. 4i + 3 of each 64: groups of a multiple of 8
// columns need no sum over lanes. Products and their sums are in float32, and the scale multiplies sums, so that a
// weight is never rounded.

#include <vector>

#include "groups.h"
#include "packed_codes.h"
#include "parallel.h"
#include "products.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kAhead = 8;    // rows of w between a load and its prefetch
constexpr int kTileColumns = 2;  // rows of w multiplied at a time

// Operands of a product, and the number of blocks and groups of a row.
struct Weights {
  const uint8_t* codes;
  const void* scales;
  ffi::DataType scale_type;
  const uint8_t* zeros;  // null if all are 8, and for floats
  int64_t k, bytes, block, blocks, group, groups;  // columns, bytes of a row, columns of a register of codes

  const float* Values() const { return scale_type == ffi::DataType::U8 ? kFloats : kIntegers; }

  Floats Scales(int64_t row, int64_t group, Mask mask) const {
    const int64_t at = row * groups + group;
    if (scale_type == ffi::DataType::F32) return Load(static_cast<const float*>(scales) + at, mask);
    if (scale_type == ffi::DataType::BF16) return Load(static_cast<const BF16*>(scales) + at, mask);
    if (scale_type == ffi::DataType::U8) {  // the bits of an exponent; 255 is NaN
      const Words e = BytesToWords(LoadBytes(mask, static_cast<const uint8_t*>(scales) + at));
      return AsFloats(SelectEqual(e, 255, SetWords(0x7fc00000), ShiftLeft<23>(e)));
    }
    return HalfToFloat(LoadShorts(mask, static_cast<const uint16_t*>(scales) + at));
  }
};

bool IsFP8(const ffi::AnyBuffer& codes) { return codes.element_type() == ffi::DataType::F8E4M3FN; }

Weights Operands(const ffi::AnyBuffer& codes, const ffi::AnyBuffer& scales, const ffi::AnyBuffer& zeros,
                 int64_t group) {
  const int64_t bytes = codes.dimensions().back(), per_byte = IsFP8(codes) ? 1 : 2, k = bytes * per_byte;
  const auto* z = zeros.element_count() ? static_cast<const uint8_t*>(zeros.untyped_data()) : nullptr;
  return {static_cast<const uint8_t*>(codes.untyped_data()), scales.untyped_data(), scales.element_type(), z, k, bytes,
          64 * per_byte, (bytes + 63) / 64, group, scales.dimensions().back()};
}

// The groups of the lanes of each block: the first of them, and each lane's distance from it.
class Lanes {
 public:
  explicit Lanes(const Weights& w) : first_(w.blocks), lanes_(w.blocks * kLanes) {
    for (int64_t b = 0; b < w.blocks; ++b) {
      first_[b] = b * w.block / w.group;
      for (int64_t i = 0; i < kLanes; ++i)
        lanes_[b * kLanes + i] =
            std::min(w.groups - 1, (b * kLanes + i) * (w.block / kLanes) / w.group) - first_[b];
    }
  }

  // The values of a block's lanes, of values by group; kLanes more than there are groups can be read.
  Floats Of(const float* values, int64_t block) const {
    return LookUp(LoadWords(lanes_.data() + block * kLanes),
                                 LoadAll(values + first_[block]));
  }

 private:
  std::vector<int32_t> first_, lanes_;
};

// Rows of x in the order of the codes, and the sums of each lane's columns.
template <typename Kind>
struct Ordered {
  std::vector<char> rows;
  std::vector<float> sums;  // for zero points other than 8
  int64_t size;             // bytes of a row

  Ordered(ffi::ThreadPool& pool, const typename Kind::Element* x, int64_t m, const Weights& w, bool summed)
      : rows(m * w.blocks * Kind::kParts * 64 + 64),
        sums(summed ? m * w.blocks * kLanes : 0),
        size(w.blocks * Kind::kParts * 64) {
    const Words ones = SetWords(sizeof(typename Kind::Element) == 2 ? 0x3f803f80 : 0x3f800000);
    auto order = [&](int64_t row) {
      for (int64_t b = 0; b < w.blocks; ++b) {
        char* to = Row(row) + b * Kind::kParts * 64;
        Kind::Order(x + row * w.k + b * w.block, std::min(w.block, w.k - b * w.block), to);
        if (sums.empty()) continue;
        Floats sum = Set(0);
        for (int p = 0; p < Kind::kParts; ++p) sum = Kind::MultiplyAdd(sum, LoadWords(to + p * 64), ones);
        StoreAll(sums.data() + (row * w.blocks + b) * kLanes, sum);
      }
    };
    if (m == 1) order(0);
    else ParallelFor(pool, m, order);
  }

  // The rows begin at a multiple of 64 bytes.
  char* Row(int64_t row) { return rows.data() + (-reinterpret_cast<uintptr_t>(rows.data()) & 63) + row * size; }
};

// Scales, and 8 - zero, of some rows of w by group.
struct Factors {
  std::vector<float> scales, zeros;
  int64_t stride = 0;

  void Read(const Weights& w, int64_t first, int64_t count) {
    stride = w.groups + 2 * kLanes;
    scales.resize(count * stride);
    zeros.resize(w.zeros ? count * stride : 0);
    for (int64_t c = 0; c < count; ++c)
      for (int64_t g = 0; g < w.groups; g += kLanes) {
        const Mask mask = FirstLanes(w.groups - g);
        StoreAll(scales.data() + c * stride + g, w.Scales(first + c, g, mask));
        if (!w.zeros) continue;
        const Words z = BytesToWords(LoadBytes(mask, w.zeros + (first + c) * w.groups + g));
        StoreAll(zeros.data() + c * stride + g, ToFloat(Sub(SetWords(8), z)));
      }
  }
};

template <typename Kind, int... P>
inline void Values(Words codes, Words table, Words values[Kind::kParts], std::integer_sequence<int, P...>) {
  ((values[P] = Kind::template Part<P>(codes, table)), ...);
}

// Sums of R rows of x times C rows of w, before their lanes are added.
template <typename Kind, int R, int C, bool Zeros>
inline void PackedDots(Ordered<Kind>& x, int64_t row, const Weights& w, int64_t column, const Factors& factors,
                 int64_t factor, const Lanes& lanes, bool prefetch, Floats out[R][C]) {
  const Words table = Kind::Table(w.Values());
  const char* xs[R];
  const float* sums[R];
  for (int r = 0; r < R; ++r) {
    xs[r] = x.Row(row + r);
    if constexpr (Zeros) sums[r] = x.sums.data() + (row + r) * w.blocks * kLanes;
  }
  Floats totals[R][C];  // not `out`, which would be written in every turn
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) totals[r][c] = Set(0);
  for (int64_t b = 0; b < w.blocks; ++b) {
    for (int c = 0; c < C; ++c) {
      const char* codes = reinterpret_cast<const char*>(w.codes) + (column + c) * w.bytes;
      if (prefetch) _mm_prefetch(codes + b * 64 + kAhead * w.bytes, _MM_HINT_T0);
      Words values[Kind::kParts];
      Values<Kind>(LoadWords(codes, b * kLanes, w.bytes), table, values,
                   std::make_integer_sequence<int, Kind::kParts>());
      const Floats scale = lanes.Of(factors.scales.data() + (factor + c) * factors.stride, b);
      Floats zero;
      if constexpr (Zeros) zero = lanes.Of(factors.zeros.data() + (factor + c) * factors.stride, b);
      for (int r = 0; r < R; ++r) {
        const char* part = xs[r] + b * Kind::kParts * 64;
        Floats sum = Set(0);
        if constexpr (Zeros) sum = Mul(zero, LoadAll(sums[r] + b * kLanes));
        for (int p = 0; p < Kind::kParts; ++p)
          sum = Kind::MultiplyAdd(sum, LoadWords(part + p * 64), values[p]);
        totals[r][c] = MulAdd(sum, scale, totals[r][c]);
      }
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r][c] = totals[r][c];
}

// Up to kLanes rows of w from `column` on times up to kFewRows rows of x from `first` on, into y [rows, stride].
template <typename Kind, bool Zeros, typename Out>
void Tile(Ordered<Kind>& x, int64_t first, int64_t m, const Weights& w, int64_t column, int64_t columns,
          const Factors& factors, int64_t factor, const Lanes& lanes, Out* y, int64_t stride) {
  Floats totals[kFewRows][kLanes];
  if (columns < kLanes) std::fill_n(&totals[0][0], m * kLanes, Set(0));
  auto run = [&](int64_t row, int64_t c, auto rows, auto count) {
    constexpr int R = decltype(rows)::value, C = decltype(count)::value;
    Floats sums[R][C];
    PackedDots<Kind, R, C, Zeros>(x, first + row, w, column + c, factors, factor + c, lanes, row == 0, sums);
    for (int r = 0; r < R; ++r)
      for (int i = 0; i < C; ++i) totals[row + r][c + i] = sums[r][i];
  };
  auto all = [&](int64_t c, auto count) {
    int64_t row = 0;
    for (; row + kDotRows <= m; row += kDotRows) run(row, c, Constant<kDotRows>{}, count);
    for (; row + 2 <= m; row += 2) run(row, c, Constant<2>{}, count);
    if (row < m) run(row, c, Constant<1>{}, count);
  };
  int64_t c = 0;
  for (; c + kTileColumns <= columns; c += kTileColumns) all(c, Constant<kTileColumns>{});
  for (; c < columns; ++c) all(c, Constant<1>{});
  for (int64_t row = 0; row < m; ++row) Store(y + row * stride, SumLanes(totals[row]), FirstLanes(columns));
}

// Some columns of a group's product: `count` rows of w from `column` on times its rows of x, by codes; y is the result
// of the first of them.
template <typename Kind, bool Zeros, typename Out>
void Direct(Ordered<Kind>& x, const Group& group, const Weights& w, const Lanes& lanes, int64_t column, int64_t count,
            Out* y, int64_t n) {
  thread_local Factors factors;
  factors.Read(w, column, count);
  for (int64_t row = 0; row < group.rows; row += kFewRows)
    for (int64_t at = 0; at < count; at += kLanes)
      Tile<Kind, Zeros>(x, group.first + row, std::min(kFewRows, group.rows - row), w, column + at,
                        std::min<int64_t>(kLanes, count - at), factors, at, lanes, y + row * n + at, n);
}

// A row of w as values of x's type, in the order of the rows of x.
template <typename Kind>
void UnpackRow(const Weights& w, const Lanes& lanes, int64_t row, const Factors& factors, int64_t factor,
               typename Kind::Element* out) {
  using Wide = typename Kind::Wide;
  constexpr int P = Wide::kParts;
  const Words table = Wide::Table(w.Values());
  const auto* codes = reinterpret_cast<const char*>(w.codes) + row * w.bytes;
  for (int64_t b = 0; b < w.blocks; ++b) {
    Words found[P];
    Floats values[P];
    Values<Wide>(LoadWords(codes, b * kLanes, w.bytes), table, found, std::make_integer_sequence<int, P>());
    const Floats scale = lanes.Of(factors.scales.data() + factor * factors.stride, b);
    const Floats zero = w.zeros ? lanes.Of(factors.zeros.data() + factor * factors.stride, b) : Set(0);
    for (int p = 0; p < P; ++p)
      values[p] = Mul(Add(AsFloats(found[p]), zero), scale);
    Kind::StoreParts(values, out + b * w.block);
  }
}

// As Direct, but unpacks the rows of w, and multiplies them as `matmul.cc` does.
template <typename Kind, typename Out>
void Unpacked(Ordered<Kind>& x, const Group& group, const Weights& w, const Lanes& lanes, int64_t column, int64_t count,
              Out* y, int64_t n) {
  using Element = typename Kind::Element;
  thread_local Factors factors;
  thread_local std::vector<Element> values;
  const int64_t k = w.blocks * w.block;
  values.resize(count * k);
  factors.Read(w, column, count);
  for (int64_t c = 0; c < count; ++c) UnpackRow<Kind>(w, lanes, column + c, factors, c, values.data() + c * k);
  const auto* rows = reinterpret_cast<const Element*>(x.Row(group.first));
  auto emit = [&](int64_t row, int64_t at, Floats sums, Mask mask) { Store(y + row * n + at, sums, mask); };
  if (group.rows > kFewRows) ManyRows<typename Kind::Unpacked>(rows, values.data(), group.rows, k, 0, count, emit);
  else FewRows<typename Kind::Unpacked>(rows, values.data(), group.rows, k, 0, count, emit);
}

template <typename Kind, typename Out>
void Product(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const Weights& w, const std::vector<Group>& groups,
             int64_t n, bool stable, Out* y) {
  if (groups.empty()) return;
  const int64_t rows = groups.back().first + groups.back().rows, tasks = (n + kColumns - 1) / kColumns;
  Ordered<Kind> ordered(pool, static_cast<const typename Kind::Element*>(x.untyped_data()), rows, w, w.zeros);
  const Lanes lanes(w);
  ParallelFor(pool, groups.size() * tasks, [&](int64_t task) {
    const Group& group = groups[task / tasks];
    const int64_t begin = task % tasks * kColumns, count = std::min(kColumns, n - begin);
    const int64_t column = group.matrix + begin;
    Out* to = y + group.result * n + begin;
    if (group.rows > Kind::kDirectRows && !stable) Unpacked<Kind>(ordered, group, w, lanes, column, count, to, n);
    else if (Kind::kZeros && w.zeros) Direct<Kind, Kind::kZeros>(ordered, group, w, lanes, column, count, to, n);
    else Direct<Kind, false>(ordered, group, w, lanes, column, count, to, n);
  });
}

void AnyProduct(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const Weights& w, const std::vector<Group>& groups,
                bool stable, ffi::Result<ffi::AnyBuffer>& y) {
  const int64_t n = y->dimensions()[1];
  void* out = y->untyped_data();
  const bool half = x.element_type() == ffi::DataType::BF16, rounded = y->element_type() == ffi::DataType::BF16;
  auto run = [&](auto packed, auto fp8, auto* to) {
    if (w.block == 64) Product<decltype(fp8)>(pool, x, w, groups, n, stable, to);
    else Product<decltype(packed)>(pool, x, w, groups, n, stable, to);
  };
  if (rounded) run(PackedBF16{}, FP8BF16{}, static_cast<BF16*>(out));
  else if (half) run(PackedBF16{}, FP8BF16{}, static_cast<float*>(out));
  else run(PackedF32{}, FP8F32{}, static_cast<float*>(out));
}

ffi::Error PackedMatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                            ffi::AnyBuffer zeros, ffi::Result<ffi::AnyBuffer> y, int64_t first, int64_t group,
                            bool stable) {
  AnyProduct(pool, x, Operands(codes, scales, zeros, group), OneGroup(x, first, stable, y), stable, y);
  return ffi::Error::Success();
}

ffi::Error GroupedPackedMatmulImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer codes, ffi::AnyBuffer scales,
                                   ffi::AnyBuffer zeros, ffi::Buffer<ffi::S32> offsets,
                                   ffi::Result<ffi::AnyBuffer> y, int64_t group, bool stable) {
  AnyProduct(pool, x, Operands(codes, scales, zeros, group), Groups(offsets, y->dimensions()[1]), stable, y);
  return ffi::Error::Success();
}

// The rows of w, in the order in which rows of x of this type are multiplied with them.
ffi::Error UnpackImpl(ffi::ThreadPool pool, ffi::AnyBuffer codes, ffi::AnyBuffer scales, ffi::AnyBuffer zeros,
                      ffi::Result<ffi::Buffer<ffi::BF16>> y, int64_t first, int64_t group) {
  const Weights w = Operands(codes, scales, zeros, group);
  const Lanes lanes(w);
  const int64_t n = y->dimensions()[0];
  ParallelFor(pool, (n + kLanes - 1) / kLanes, [&](int64_t task) {
    thread_local Factors factors;
    const int64_t begin = task * kLanes, end = std::min<int64_t>(n, begin + kLanes);
    factors.Read(w, first + begin, end - begin);
    auto* out = static_cast<BF16*>(y->untyped_data());
    for (int64_t row = begin; row < end; ++row)
      UnpackRow<PackedBF16>(w, lanes, first + row, factors, row - begin, out + row * w.blocks * w.block);
  });
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferPackedMatmul, jaxinfer::PackedMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("stable"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferGroupedPackedMatmul, jaxinfer::GroupedPackedMatmulImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("group")
                                  .Attr<bool>("stable"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferUnpack, jaxinfer::UnpackImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Attr<int64_t>("first")
                                  .Attr<int64_t>("group"));
