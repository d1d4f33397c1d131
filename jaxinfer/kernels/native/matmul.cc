// y = x w^T for rows x [M, K] and weights w [N, K], both row-major; or grouped: groups of rows, each times its own
// weights.
//
// A few rows (decode) are bound by reading the weights: each is read once, as dot products along k. Many rows
// (prefill) are bound by arithmetic: some weight rows at a time are transposed into a panel that stays in the
// second-level cache, and multiplied without a sum over lanes.
//
// Dot products and panels sum a row's products in different orders. With `stable`, dot products are used for any number
// of rows, so that a row's result has the same bits beside any others, and trailing rows of zeros (padding) are
// skipped.

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "groups.h"
#include "parallel.h"
#include "products.h"
#include "rotate.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;

// Computes x w^T of all groups in parallel; `make_emit(group, begin)` returns the function that stores the results of
// one task.
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
      auto part = [&, first](int64_t row, int64_t column, auto sums, Mask mask) {
        emit(first + row, column, sums, mask);
      };
      FewRows<Kind>(rows + first * k, matrix, std::min(kFewRows, group.rows - first), k, begin, end, part);
    }
  });
}

template <typename Kind, typename Out>
void FloatProducts(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const ffi::AnyBuffer& w,
                   const std::vector<Group>& groups, int64_t n, bool stable, Out* y) {
  using Element = typename Kind::Element;
  const int64_t k = x.dimensions()[1];
  Matmul<Kind>(pool, static_cast<const Element*>(x.untyped_data()), static_cast<const Element*>(w.untyped_data()),
               groups, n, k, stable, [=](const Group& group, int64_t) {
                 return [=, to = y + group.result * n](int64_t row, int64_t column, Floats sums, Mask mask) {
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
  if (rounded) FloatProducts<KindBF16>(pool, x, w, groups, n, stable, static_cast<BF16*>(out));
  else if (half) FloatProducts<KindBF16>(pool, x, w, groups, n, stable, static_cast<float*>(out));
  else FloatProducts<KindF32>(pool, x, w, groups, n, stable, static_cast<float*>(out));
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
  const Words magnitude = SetWords(0x7fffffff);
  // Compares bit patterns as integers, in which NaN is above all numbers, so that the maximum is NaN if any is.
  Words top = SetWords(0), sums = SetWords(0);
  for (int64_t i = 0; i < k; i += kLanes)
    top = Max(top, And(AsWords(Load(x + i, FirstLanes(k - i))), magnitude));
  const int bits = MaxOfLanes(top);
  float most;
  std::memcpy(&most, &bits, sizeof(most));
  const float scale = std::isfinite(most) ? most * (1.0f / 127.0f) : std::numeric_limits<float>::quiet_NaN();
  const Floats inverse = Set(scale >= std::numeric_limits<float>::min() ? 1.0f / scale : 0.0f);
  for (int64_t i = 0; i < k; i += kLanes) {
    const Mask mask = FirstLanes(k - i);
    const Words rounded = ToIntegers(Mul(Load(x + i, mask), inverse));
    sums = Add(sums, rounded);
    StoreBytes(q + i, mask, WordsToBytes(rounded));
  }
  return {scale, SumOfLanes(sums)};
}

// Quantises the rotated rows of x and computes their products. `block`: columns of a rotated block.
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
                     return [&](int64_t row, int64_t column, Words sums, Mask mask) {
                       const Quantised& own = rows[group.first + row];
                       const Words added = SetWords(kInt8Added * own.sum);
                       const Floats exact = ToFloat(Sub(sums, added));
                       const Floats scaled = Mul(exact, Set(own.scale));
                       const Floats made = Mul(scaled, Load(scales + group.matrix + column, mask));
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
