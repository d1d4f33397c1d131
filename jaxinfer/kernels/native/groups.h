// Groups of rows that are multiplied with a matrix of their own, such as those of an expert.

#pragma once

#include <vector>

#include "rows.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {

// Rows of x that are multiplied with one matrix.
struct Group {
  int64_t first;   // first of its rows in x
  int64_t rows;    // number of its rows
  int64_t result;  // row of y of the first row
  int64_t matrix;  // first row of w of its matrix
};

// One group of all rows of x with the rows of w from `first` on. With `stable`, trailing rows of zeros are left out.
inline std::vector<Group> OneGroup(const xla::ffi::AnyBuffer& x, int64_t first, bool stable,
                                   xla::ffi::Result<xla::ffi::AnyBuffer>& y) {
  const int64_t live = RowsToCompute(x, stable, y);
  if (live == 0) return {};
  return {{0, live, 0, first}};
}

// Groups of rows [offsets[e], offsets[e + 1]) with matrix e, which has n rows; empty groups are left out.
inline std::vector<Group> Groups(const xla::ffi::Buffer<xla::ffi::S32>& offsets, int64_t n) {
  const int32_t* at = offsets.typed_data();
  std::vector<Group> groups;
  for (int64_t e = 0; e + 1 < offsets.dimensions()[0]; ++e)
    if (at[e] < at[e + 1]) groups.push_back({at[e], at[e + 1] - at[e], at[e], e * n});
  return groups;
}

}  // namespace jaxinfer
