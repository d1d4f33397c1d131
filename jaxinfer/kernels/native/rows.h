// Padding at the end of a step's rows.

#pragma once

#include <cstring>

#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

// Number of rows of x without trailing rows of zeros. NaN is not zero; -0 is, as negative weights of a norm make it of
// padding.
inline int64_t LiveRows(const xla::ffi::AnyBuffer& x) {
  const Words magnitude = x.element_type() == xla::ffi::DataType::BF16 ? SetShorts(0x7fff)
                                                                         : SetWords(0x7fffffff);
  const auto* bytes = static_cast<const char*>(x.untyped_data());
  const int64_t size = x.dimensions()[0] ? static_cast<int64_t>(x.size_bytes()) / x.dimensions()[0] : 0;
  for (int64_t row = x.dimensions()[0]; row > 0; --row)
    for (int64_t at = 0; at < size; at += 64)
      if (AnyBits(LoadWords(bytes + (row - 1) * size, at / 4, size), magnitude)) return row;
  return 0;
}

// Number of rows of x to compute: all, or with `stable` those before trailing rows of zeros, whose results are set to
// zero here.
inline int64_t RowsToCompute(const xla::ffi::AnyBuffer& x, bool stable, xla::ffi::Result<xla::ffi::AnyBuffer>& y) {
  const int64_t all = x.dimensions()[0], live = stable ? LiveRows(x) : all;
  if (live < all) {
    const int64_t size = static_cast<int64_t>(y->size_bytes()) / all;
    std::memset(static_cast<char*>(y->untyped_data()) + live * size, 0, (all - live) * size);
  }
  return live;
}

}  // namespace jaxinfer
