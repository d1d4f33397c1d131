// Attention over the paged cache, for decode (tiles of one query) and prefill.
//
// A tile is a number of queries of one sequence; together with the G query heads of a kv head they are the rows that
// share keys and values. For each kChunk key positions: gather keys and values of live positions into panels (zeros for
// others, so that stale memory is never used), compute scores = rows x keys, an online softmax (arXiv:2205.14135), and
// accumulate weights x values. Of a quantised cache codes are gathered; scales of keys multiply scores, those of values
// weights. Reference: jaxinfer.kernels.attention.paged.reference.

#include <cmath>
#include <limits>
#include <type_traits>
#include <vector>

#include "codes.h"
#include "parallel.h"
#include "simd.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;

constexpr int kChunk = 128;                // key positions per iteration
constexpr int kRows = 6;                   // rows multiplied with a panel together
constexpr int kFewer = 4;                  // likewise for remaining rows
constexpr int kPanel = kAVX512 ? 4 : 1;    // vectors of a panel multiplied at a time
constexpr int kWide = kPanel * kLanes;     // columns of those vectors
constexpr int64_t kTilesPerThread = 4;     // with this many tiles a task is a tile, else one kv head of a tile
constexpr float kLog2e = 1.44269504f;
constexpr float kLeast = -1e30f;           // initial maximum: finite, so that -inf - kLeast is -inf

struct Scoring {
  float scale, softcap;  // softcap 0: no softcap
  int64_t window;        // 0: no window
  bool chunked;          // the window is one of chunks side by side, and does not slide
};

template <typename Stored>
struct KVCache {
  Stored *keys, *values;             // null values: the first value_dim columns of the keys (MLA)
  BF16 *key_scales, *value_scales;   // null unless the elements are codes
  int64_t blocks, heads, block, dim, value_dim;
  int64_t wide;  // scales that a head has room for, of which it uses the first

  int64_t At(int64_t id, int64_t head, int64_t offset) const { return (id * heads + head) * block + offset; }
  const Stored* Key(int64_t place) const { return keys + place * dim; }
  const Stored* Value(int64_t place) const { return values ? values + place * value_dim : Key(place); }
};

// Per-thread buffers. Weights and sums are those of the kind of the panels, which may be wider than queries.
template <typename Kind>
struct Scratch {
  std::vector<uint32_t> keys, values, queries;
  std::vector<float> sums;    // [rows, stride]
  std::vector<float> tops, totals;
  alignas(64) float scores[kRows][kChunk];
  alignas(64) typename Kind::Element weights[kRows][kChunk];
  alignas(64) float key_scales[kChunk], value_scales[kChunk];
};

struct Tile {
  int64_t row, start, position, count, first, end;  // queries may see keys [first, end)
};

inline int64_t RoundUp(int64_t x, int64_t to) { return (x + to - 1) / to * to; }

// Interleaves the values of two positions, so that a word holds the same column of each.
inline void PackValuePairs(const BF16* const rows[2], int64_t dim, uint32_t* line) {
  for (int64_t d = 0; d < dim; d += kLanes) {
    const Mask mask = FirstLanes(dim - d);
    Words pair = rows[0] ? ShortsToWords(LoadShorts(mask, rows[0] + d)) : SetWords(0);
    if (rows[1]) {
      const Words second = ShortsToWords(LoadShorts(mask, rows[1] + d));
      pair = Or(pair, ShiftLeft<16>(second));
    }
    StoreWords(line + d, pair);
  }
}

// The values of one position as floats.
template <typename Element>
inline void PackValues(const Element* row, int64_t dim, uint32_t* line) {
  for (int64_t d = 0; d < dim; d += kLanes) StoreAll(line + d, row ? Load(row + d, FirstLanes(dim - d)) : Set(0));
}

// Computes the cache index of key positions [first, first + kChunk); -1 outside [begin, end).
template <typename Stored>
void Find(const KVCache<Stored>& cache, const int32_t* table, int64_t head, int64_t first, int64_t begin, int64_t end,
          int64_t places[kChunk]) {
  for (int64_t i = 0; i < kChunk; ++i) {
    const int64_t at = first + i;
    if (at < begin || at >= end) {
      places[i] = -1;
      continue;
    }
    const int64_t id = std::min<int64_t>(std::max<int64_t>(table[at / cache.block], 0), cache.blocks - 1);
    places[i] = cache.At(id, head, at % cache.block);
  }
}

inline void Prefetch(const void* row, int64_t bytes) {
  for (int64_t at = 0; at < bytes; at += 64) _mm_prefetch(static_cast<const char*>(row) + at, _MM_HINT_T0);
}

// Gathers the positions at `places` into panels, and prefetches those at `next`: blocks are scattered, so the hardware
// prefetcher cannot predict them.
template <typename Kind, typename Stored>
void Gather(const KVCache<Stored>& cache, const int64_t places[kChunk], const int64_t next[kChunk],
            Scratch<Kind>& scratch) {
  const int64_t bytes = cache.dim * sizeof(Stored);
  for (int64_t i = 0; i < kChunk; i += kLanes) {
    const Stored* rows[kLanes];
    for (int j = 0; j < kLanes; ++j) {
      rows[j] = places[i + j] < 0 ? nullptr : cache.Key(places[i + j]);
      if (next[i + j] >= 0) Prefetch(cache.Key(next[i + j]), bytes);
    }
    if constexpr (kIsCode<Stored>) {
      PackCodeColumns<Kind>(rows, cache.dim, scratch.keys.data() + i, kChunk);
    } else {
      PackColumns<Kind>(rows, cache.dim, scratch.keys.data() + i, kChunk);
    }
  }
  const int64_t stride = RoundUp(cache.value_dim, kWide);
  for (int64_t i = 0; i < kChunk; i += Kind::kPerWord) {
    const Stored* rows[Kind::kPerWord];
    for (int j = 0; j < Kind::kPerWord; ++j) {
      rows[j] = places[i + j] < 0 ? nullptr : cache.Value(places[i + j]);
      if (next[i + j] >= 0) Prefetch(cache.Value(next[i + j]), cache.value_dim * sizeof(Stored));
    }
    uint32_t* line = scratch.values.data() + i / Kind::kPerWord * stride;
    if constexpr (kIsCode<Stored>) PackValueCodes<Kind>(rows, cache.value_dim, line);
    else if constexpr (Kind::kPerWord == 2) PackValuePairs(rows, cache.value_dim, line);
    else PackValues(rows[0], cache.value_dim, line);
  }
  if constexpr (kIsCode<Stored>) {
    const BF16* own = cache.value_scales ? cache.value_scales : cache.key_scales;
    for (int64_t i = 0; i < kChunk; ++i) {
      const int64_t at = places[i];
      scratch.key_scales[i] = at < 0 ? 0 : ToFloat(cache.key_scales[at * cache.wide]);
      scratch.value_scales[i] = at < 0 ? 0 : ToFloat(own[at * cache.wide]);
      if (next[i] >= 0) {
        Prefetch(cache.key_scales + next[i] * cache.wide, sizeof(BF16));
        Prefetch(own + next[i] * cache.wide, sizeof(BF16));
      }
    }
  }
}

inline Floats Capped(Floats x, float cap) {  // cap * tanh(x / cap)
  const Floats e = Exp2<float>(Mul(x, Set(2.0f * kLog2e / cap)));
  const Floats one = Set(1.0f);
  const Floats t = Sub(one, Div(Set(2.0f), Add(e, one)));
  return Mul(t, Set(cap));
}

// Processes R rows of a tile against one chunk, of which row r sees positions [low[r], high[r]); with `kAll` all of it.
// Scores and maxima are in base 2.
template <typename Kind, int R, bool kAll, bool kScaled>
void Turn(const uint32_t* const q[R], const int64_t low[R], const int64_t high[R], int64_t row, int64_t words,
          int64_t stride, const Scoring& scoring, Scratch<Kind>& scratch) {
  using Sum = typename Kind::Sum;
  const Floats never = Set(-std::numeric_limits<float>::infinity());
  const Floats scale = Set(scoring.softcap > 0 ? scoring.scale : scoring.scale * kLog2e);
  auto seen = [&](int r, int64_t lane) {
    return static_cast<Mask>(FirstLanes(high[r] - lane) & ~FirstLanes(low[r] - lane));
  };
  Floats most[R];
  for (int r = 0; r < R; ++r) most[r] = Set(scratch.tops[row + r]);
  for (int64_t c = 0; c < kChunk; c += kWide) {
    Sum sums[R][kPanel] = {};
    RowsTimesPanel<Kind, R, kPanel>(q, scratch.keys.data() + c, kChunk, words, sums);
    for (int r = 0; r < R; ++r) {
      for (int v = 0; v < kPanel; ++v) {
        Floats x = Mul(sums[r][v], scale);
        if constexpr (kScaled) x = Mul(x, LoadAll(scratch.key_scales + c + v * kLanes));
        if (scoring.softcap > 0) x = Mul(Capped(x, scoring.softcap), Set(kLog2e));
        if (!kAll) x = Select(seen(r, c + v * kLanes), never, x);
        StoreAll(scratch.scores[r] + c + v * kLanes, x);
        most[r] = Max(x, most[r]);  // max ignores NaN, which still enters through the weights
      }
    }
  }
  alignas(64) float tops[kLanes] = {}, peaks[kLanes] = {}, shrink[kLanes];
  for (int r = 0; r < R; ++r) {
    tops[r] = scratch.tops[row + r];
    peaks[r] = scratch.tops[row + r] = MaxOfLanes(most[r]);
  }
  StoreAll(shrink, Exp2<float>(Sub(LoadAll(tops), LoadAll(peaks))));
  const uint32_t* weights[R];
  for (int r = 0; r < R; ++r) {
    const Floats peak = Set(peaks[r]);
    Floats sum = Set(0);
    for (int64_t i = 0; i < kChunk; i += kLanes) {
      Floats w = Exp2<typename Kind::Element>(Sub(LoadAll(scratch.scores[r] + i), peak));
      if (!kAll) w = KeepLanes(seen(r, i), w);
      sum = Add(sum, w);
      if constexpr (kScaled) w = Mul(w, LoadAll(scratch.value_scales + i));
      Store(scratch.weights[r] + i, w, 0xffff);
    }
    scratch.totals[row + r] = scratch.totals[row + r] * shrink[r] + SumOfLanes(sum);
    weights[r] = reinterpret_cast<const uint32_t*>(scratch.weights[r]);
  }
  for (int64_t d = 0; d < stride; d += kWide) {
    Sum sums[R][kPanel];
    float* kept = scratch.sums.data() + row * stride + d;
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kPanel; ++v)
        sums[r][v] = Mul(LoadAll(kept + r * stride + v * kLanes), Set(shrink[r]));
    RowsTimesPanel<Kind, R, kPanel>(weights, scratch.values.data() + d, stride, kChunk / Kind::kPerWord, sums);
    for (int r = 0; r < R; ++r)
      for (int v = 0; v < kPanel; ++v) StoreAll(kept + r * stride + v * kLanes, sums[r][v]);
  }
}

// Processes the queries of a tile for the G query heads of one kv head. `more`: the next kv head is processed next.
template <typename Kind, typename In, typename Stored>
void Attend(const In* q, const KVCache<Stored>& cache, const int32_t* table, const Tile& tile, int64_t heads,
            int64_t head, bool more, const Scoring& scoring, const float* sinks, In* out) {
  constexpr bool kWiden = !std::is_same_v<In, typename Kind::Element>;
  thread_local Scratch<Kind> scratch;
  const int64_t group = heads / cache.heads, rows = tile.count * group;
  const int64_t stride = RoundUp(cache.value_dim, kWide), words = cache.dim / Kind::kPerWord;
  scratch.keys.resize(words * kChunk);
  scratch.values.assign(kChunk / Kind::kPerWord * stride, 0);
  scratch.sums.assign(rows * stride, 0);
  scratch.tops.assign(rows, kLeast);
  scratch.totals.assign(rows, 0);
  auto place = [&](int64_t row) { return (tile.start + row / group) * heads + head * group + row % group; };
  const int64_t query = RoundUp(words, kLanes);
  if constexpr (kWiden) {
    scratch.queries.resize(rows * query);
    for (int64_t row = 0; row < rows; ++row)
      PackValues(q + place(row) * cache.dim, cache.dim, scratch.queries.data() + row * query);
  }
  if (sinks) {
    for (int64_t row = 0; row < rows; ++row) {
      scratch.tops[row] = sinks[head * group + row % group] * kLog2e;
      scratch.totals[row] = 1;
    }
  }
  auto first_key = [&](int64_t position) {
    if (!scoring.window) return int64_t{0};
    if (scoring.chunked) return position - position % scoring.window;
    return std::max<int64_t>(position - scoring.window + 1, 0);
  };
  const int64_t begin = std::max(first_key(tile.position), tile.first);
  const int64_t end = std::min(tile.position + tile.count, tile.end);
  int64_t found[2][kChunk];
  int64_t *places = found[0], *next = found[1];
  // Chunks begin at the same positions for every tile, so that a query's result does not depend on its tile.
  const int64_t start = begin / kChunk * kChunk;
  Find(cache, table, head, start, begin, end, places);
  for (int64_t first = start; first < end; first += kChunk, std::swap(places, next)) {
    const bool last = first + kChunk >= end;
    if (last && more) Find(cache, table, head + 1, start, begin, end, next);
    else Find(cache, table, head, first + kChunk, begin, end, next);
    Gather(cache, places, next, scratch);
    auto turn = [&](int64_t row, auto count) {
      constexpr int R = decltype(count)::value;
      const uint32_t* qs[R];
      int64_t low[R], high[R];
      for (int r = 0; r < R; ++r) {
        const int64_t position = tile.position + (row + r) / group;
        if constexpr (kWiden) qs[r] = scratch.queries.data() + (row + r) * query;
        else qs[r] = reinterpret_cast<const uint32_t*>(q + place(row + r) * cache.dim);
        low[r] = std::max(first_key(position), tile.first) - first;
        high[r] = std::min(position + 1, tile.end) - first;
      }
      const bool all = *std::max_element(low, low + R) <= 0 && *std::min_element(high, high + R) >= kChunk;
      if (all) Turn<Kind, R, true, kIsCode<Stored>>(qs, low, high, row, words, stride, scoring, scratch);
      else Turn<Kind, R, false, kIsCode<Stored>>(qs, low, high, row, words, stride, scoring, scratch);
    };
    int64_t row = 0;
    for (; row + kRows <= rows; row += kRows) turn(row, std::integral_constant<int, kRows>{});
    for (; row + kFewer <= rows; row += kFewer) turn(row, std::integral_constant<int, kFewer>{});
    for (; row < rows; ++row) turn(row, std::integral_constant<int, 1>{});
  }
  for (int64_t row = 0; row < rows; ++row) {
    const float* sums = scratch.sums.data() + row * stride;
    const Floats total = Set(scratch.totals[row]);
    for (int64_t d = 0; d < cache.value_dim; d += kLanes)
      Store(out + place(row) * cache.value_dim + d, Div(LoadAll(sums + d), total), FirstLanes(cache.value_dim - d));
  }
}

struct Step {
  ffi::AnyBuffer q, k, v;
  ffi::Buffer<ffi::BF16> k_scales, v_scales;  // empty unless the cache is quantised, as k and v are then
  ffi::Buffer<ffi::S32> blocks, offsets, tables, tiles, count;
  ffi::Buffer<ffi::F32> sinks;  // empty: no sinks
};

// Copies one head of a token, if the cache has the array.
template <typename Element>
inline void Keep(Element* array, int64_t place, const void* given, int64_t from, int64_t width) {
  if (array)
    std::memcpy(array + place * width, static_cast<const Element*>(given) + from * width, width * sizeof(Element));
}

template <typename Stored>
void Write(const Step& step, const KVCache<Stored>& cache) {
  for (int64_t t = 0; t < step.k.dimensions()[0]; ++t) {
    const int64_t id = step.blocks.typed_data()[t];
    if (id < 0 || id >= cache.blocks) continue;
    for (int64_t head = 0; head < cache.heads; ++head) {
      const int64_t place = cache.At(id, head, step.offsets.typed_data()[t]), from = t * cache.heads + head;
      Keep(cache.keys, place, step.k.untyped_data(), from, cache.dim);
      Keep(cache.values, place, step.v.untyped_data(), from, cache.value_dim);
      Keep(cache.key_scales, place * cache.wide, step.k_scales.untyped_data(), from, 1);
      Keep(cache.value_scales, place * cache.wide, step.v_scales.untyped_data(), from, 1);
    }
  }
}

template <typename Kind, typename In, typename Stored>
void Run(ffi::ThreadPool& pool, const Step& step, const Scoring& scoring, const KVCache<Stored>& cache, void* result) {
  Write(step, cache);
  const int64_t heads = step.q.dimensions()[1], width = step.tables.dimensions()[1];
  const int64_t tiles = std::min<int64_t>(step.count.typed_data()[0], step.tiles.dimensions()[0]);
  const float* sinks = step.sinks.element_count() ? step.sinks.typed_data() : nullptr;
  auto* out = static_cast<In*>(result);
  std::memset(out, 0, step.q.dimensions()[0] * heads * cache.value_dim * sizeof(In));
  // With enough tiles for all threads, one thread processes all heads of a tile, which are adjacent in a block.
  const int64_t together = tiles >= kTilesPerThread * pool.num_threads() ? cache.heads : 1;
  const int64_t parts = cache.heads / together;
  ParallelFor(pool, tiles * parts, [&](int64_t task) {
    // Later tiles of a prompt see more keys and take longer: process them first.
    const int32_t* t = step.tiles.typed_data() + (tiles - 1 - task / parts) * 6;
    const Tile tile{t[0], t[1], t[2], t[3], t[4], t[5]};
    if (tile.count <= 0 || tile.end <= tile.first) return;
    const auto* q = static_cast<const In*>(step.q.untyped_data());
    const int32_t* table = step.tables.typed_data() + tile.row * width;
    for (int64_t i = 0; i < together; ++i)
      Attend<Kind>(q, cache, table, tile, heads, task % parts * together + i, i + 1 < together, scoring, sinks, out);
  });
}

template <typename Element>
Element* Data(ffi::Result<ffi::AnyBuffer>& array) {
  return array->element_count() ? static_cast<Element*>(array->untyped_data()) : nullptr;
}

// The cache arrays are operands aliased to results.
ffi::Error AttentionImpl(ffi::ThreadPool pool, ffi::AnyBuffer q, ffi::AnyBuffer k, ffi::AnyBuffer v,
                         ffi::Buffer<ffi::BF16> k_scales, ffi::Buffer<ffi::BF16> v_scales,
                         ffi::Buffer<ffi::S32> blocks, ffi::Buffer<ffi::S32> offsets, ffi::Buffer<ffi::S32> tables,
                         ffi::Buffer<ffi::S32> tiles, ffi::Buffer<ffi::S32> count, ffi::Buffer<ffi::F32> sinks,
                         ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer, ffi::AnyBuffer,
                         ffi::Result<ffi::AnyBuffer> out, ffi::Result<ffi::AnyBuffer> keys,
                         ffi::Result<ffi::AnyBuffer> values, ffi::Result<ffi::AnyBuffer> key_scales,
                         ffi::Result<ffi::AnyBuffer> value_scales, float scale, float softcap, int64_t window,
                         int64_t chunked, int64_t heads, int64_t dim) {
  const Step step{q, k, v, k_scales, v_scales, blocks, offsets, tables, tiles, count, sinks};
  const Scoring scoring{scale, softcap, window, chunked != 0};
  // A layer may see the arrays with other heads than their shape has.
  const int64_t block = keys->dimensions()[2], blocks_seen = keys->element_count() / (heads * block * dim);
  auto run = [&](auto kind, auto stored) {
    using Stored = decltype(stored);
    const KVCache<Stored> cache{Data<Stored>(keys),     Data<Stored>(values), Data<BF16>(key_scales),
                                Data<BF16>(value_scales), blocks_seen,          heads,
                                block,                  dim,                  out->dimensions()[2],
                                dim / keys->dimensions()[3]};
    using Kind = decltype(kind);
    Run<typename Kind::Panel, typename Kind::Element, Stored>(pool, step, scoring, cache, out->untyped_data());
  };
  auto of_kind = [&](auto kind) {
    if (keys->element_type() == ffi::DataType::S8) run(kind, Int8Code{});
    else if (keys->element_type() == ffi::DataType::U8) run(kind, FP8Code{});
    else run(kind, typename decltype(kind)::Element{});
  };
  if (q.element_type() == ffi::DataType::BF16) of_kind(KindBF16{});
  else of_kind(KindF32{});
  return ffi::Error::Success();
}

// Copies block sources[i] of an array [N, ...] to targets[i] in place; targets >= N are padding and dropped.
ffi::Error CopyBlocksImpl(ffi::AnyBuffer, ffi::Buffer<ffi::S32> sources, ffi::Buffer<ffi::S32> targets,
                          ffi::Result<ffi::AnyBuffer> array) {
  const int64_t blocks = array->dimensions()[0], bytes = blocks ? array->size_bytes() / blocks : 0;
  char* base = static_cast<char*>(array->untyped_data());
  for (size_t i = 0; i < sources.element_count(); ++i) {
    const int64_t from = sources.typed_data()[i], to = targets.typed_data()[i];
    if (to >= 0 && to < blocks && from >= 0 && from < blocks)
      std::memcpy(base + to * bytes, base + from * bytes, bytes);
  }
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferCopyBlocks, jaxinfer::CopyBlocksImpl,
                              xla::ffi::Ffi::Bind()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Ret<xla::ffi::AnyBuffer>());

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferAttention, jaxinfer::AttentionImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::BF16>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::S32>>()
                                  .Arg<xla::ffi::Buffer<xla::ffi::F32>>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("scale")
                                  .Attr<float>("softcap")
                                  .Attr<int64_t>("window")
                                  .Attr<int64_t>("chunked")
                                  .Attr<int64_t>("heads")
                                  .Attr<int64_t>("dim"));
