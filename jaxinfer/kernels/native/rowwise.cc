// Operations on the rows (tokens) of activations between products: gated activations, RMSNorm with the addition before
// it, and rope with the norms of queries and keys. Each reads its operands once and writes results in their own dtype.
//
// A row's result depends on this row alone, sums are taken in one order, and zeros, as a step's padding has, are passed
// on without computing. All of these operations map a row of zeros to zeros.

#include <cmath>
#include <cstring>
#include <utility>
#include <vector>

#include "parallel.h"
#include "simd.h"
#include "xla/ffi/api/ffi.h"

namespace jaxinfer {
namespace {

namespace ffi = xla::ffi;

constexpr int64_t kTask = 8192;  // values of a task, at least

// Calls body(row) for all rows, each of `columns` values, in parallel.
template <typename Body>
void ForRows(ffi::ThreadPool& pool, int64_t rows, int64_t columns, const Body& body) {
  const int64_t each = std::max<int64_t>(1, kTask / std::max<int64_t>(1, columns));
  ParallelFor(pool, (rows + each - 1) / each, [&](int64_t task) {
    for (int64_t row = task * each; row < std::min(rows, (task + 1) * each); ++row) body(row);
  });
}

// Whether all lanes are 0 or -0.
inline bool Zeros(Words bits) { return !AnyBits(bits, SetWords(0x7fffffff)); }

// Rounds to an element's precision.
template <typename Element>
inline Floats Rounded(Floats x) {
  if constexpr (sizeof(Element) == 4) return x;
  else return ToFloat(ToBF16(x));
}

// x / (1 + e^-y): x times the logistic function of y.
inline Floats TimesLogistic(Floats x, Floats y) {
  return Div(x, Add(Set(1), Exp(Sub(Set(0), y))));
}

struct Silu {
  static Floats Of(Floats x) { return TimesLogistic(x, x); }
};

// x (1 + tanh(u)) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3) is x times the logistic function of 2 u.
struct GeluTanh {
  static Floats Of(Floats x) {
    const Floats inner = MulAdd(Mul(x, x), Set(0.0713548162726f), Set(1.59576912161f));
    return TimesLogistic(x, Mul(x, inner));
  }
};

// x times the distribution function of the normal distribution, which is e^(-x^2 / 2) t P(t) at -|x|, t = 1 / (1 + 0.35
// |x|), with a polynomial P of least relative error, 2e-7.
struct Gelu {
  static Floats Of(Floats x) {
    const Floats size = Abs(x), t = Div(Set(1), MulAdd(size, Set(0.35f), Set(1)));
    constexpr float kFactors[] = {0.1396214068f,  0.1398618817f,  0.1198327169f, 0.1055086702f, -0.02311155759f,
                                  0.1591768414f, -0.2557167113f, 0.1439729482f, -0.02914619446f};
    Floats p = Set(kFactors[8]);
    for (int i = 7; i >= 0; --i) p = MulAdd(p, t, Set(kFactors[i]));
    const Floats density = Exp(Mul(Mul(size, size), Set(-0.5f)));
    const Floats most = Min(Set(14), x);  // the second operand if it is NaN; infinity times zero were NaN
    const Floats below = Mul(most, Mul(density, Mul(p, t)));
    return SubWhere(below, Positive(x), x, below);
  }
};

struct Relu {
  static Floats Of(Floats x) { return Max(Set(0), x); }  // the second operand if it is NaN
};

struct SquaredRelu {
  static Floats Of(Floats x) { return Mul(Relu::Of(x), Relu::Of(x)); }
};

// Columns [first, first + columns) of the rows of a matrix.
struct Columns {
  const ffi::AnyBuffer& matrix;
  int64_t first;
  int64_t width() const { return matrix.dimensions().back(); }
  template <typename Element>
  const Element* Row(int64_t row) const {
    return static_cast<const Element*>(matrix.untyped_data()) + row * width() + first;
  }
};

template <typename Element, typename Activation>
void Gated(ffi::ThreadPool& pool, const Columns& gate, const Columns& up, int64_t rows, int64_t columns, Element* out) {
  ForRows(pool, rows, columns, [&](int64_t row) {
    const Element *g = gate.Row<Element>(row), *u = up.Row<Element>(row);
    Element* to = out + row * columns;
    for (int64_t i = 0; i < columns; i += kLanes) {
      const Mask mask = FirstLanes(columns - i);
      const Floats x = Load(g + i, mask), y = Load(u + i, mask);
      const bool zeros = Zeros(Or(AsWords(x), AsWords(y)));
      Store(to + i, zeros ? Set(0) : Mul(Activation::Of(x), y), mask);
    }
  });
}

enum Activations : int64_t { kSilu, kGeluTanh, kGelu, kRelu, kSquaredRelu };

template <typename Element>
ffi::Error GatedAs(ffi::ThreadPool& pool, int64_t activation, const Columns& gate, const Columns& up,
                   ffi::Result<ffi::AnyBuffer>& y) {
  const int64_t rows = y->dimensions()[0], columns = y->dimensions()[1];
  auto* out = static_cast<Element*>(y->untyped_data());
  switch (activation) {
    case kSilu: Gated<Element, Silu>(pool, gate, up, rows, columns, out); break;
    case kGeluTanh: Gated<Element, GeluTanh>(pool, gate, up, rows, columns, out); break;
    case kGelu: Gated<Element, Gelu>(pool, gate, up, rows, columns, out); break;
    case kRelu: Gated<Element, Relu>(pool, gate, up, rows, columns, out); break;
    case kSquaredRelu: Gated<Element, SquaredRelu>(pool, gate, up, rows, columns, out); break;
    default: return ffi::Error::InvalidArgument("unknown activation");
  }
  return ffi::Error::Success();
}

// y[t, i] = act(gate[t, gate_first + i]) up[t, up_first + i].
ffi::Error GatedImpl(ffi::ThreadPool pool, ffi::AnyBuffer gate, ffi::AnyBuffer up, ffi::Result<ffi::AnyBuffer> y,
                     int64_t activation, int64_t gate_first, int64_t up_first) {
  const Columns gates{gate, gate_first}, ups{up, up_first};
  const int64_t columns = y->dimensions()[1];
  if (gate_first + columns > gates.width() || up_first + columns > ups.width())
    return ffi::Error::InvalidArgument("columns of gate or up beyond their matrix");
  const bool half = y->element_type() == ffi::DataType::BF16;
  return half ? GatedAs<BF16>(pool, activation, gates, ups, y) : GatedAs<float>(pool, activation, gates, ups, y);
}

// How an RMSNorm's scale is stored and applied (`layers.norms.Scaling`).
struct Scaling {
  float eps, offset;
  bool wide;
};

// Normalises `count` values of x, rounded, into `out`, which may be float whatever the element is.
template <typename Element, typename Out>
void Normalise(const Element* x, const Element* scale, int64_t count, const Scaling& how, Out* out) {
  Floats sums[4] = {Set(0), Set(0), Set(0), Set(0)};
  for (int64_t i = 0; i < count; i += kLanes) {
    const Floats own = Load(x + i, FirstLanes(count - i));
    Floats& sum = sums[i / kLanes % 4];
    sum = MulAdd(own, own, sum);
  }
  const Floats both = Add(Add(sums[0], sums[1]), Add(sums[2], sums[3]));
  const float mean = SumOfLanes(both) / static_cast<float>(count);
  const Floats inverse = Set(1.0f / std::sqrt(mean + how.eps)), offset = Set(how.offset);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Mask mask = FirstLanes(count - i);
    Floats wide = Mul(Load(x + i, mask), inverse), by = Load(scale + i, mask);
    if (how.offset != 0) by = Add(offset, by);
    if (!how.wide) wide = Rounded<Element>(wide), by = Rounded<Element>(by);
    Store(out + i, Rounded<Element>(Mul(wide, by)), mask);
  }
}

// Sets sum = x + y, rounded, if y is given; returns whether the row that is to be normalised is all zeros.
template <typename Element>
bool AddRow(const Element* x, const Element* y, int64_t count, Element* sum) {
  Words any = SetWords(0);
  for (int64_t i = 0; i < count; i += kLanes) {
    const Mask mask = FirstLanes(count - i);
    Floats own = Load(x + i, mask);
    if (y) Store(sum + i, own = Rounded<Element>(Add(own, Load(y + i, mask))), mask);
    any = Or(any, AsWords(own));
  }
  return Zeros(any);
}

// Normalises rows of x, or of x + y, which is then stored in `sum`; y and sum may be null.
template <typename Element>
void NormaliseRows(ffi::ThreadPool& pool, const ffi::AnyBuffer& x, const void* y, const ffi::AnyBuffer& scale,
                   const Scaling& how, void* sum, ffi::Result<ffi::AnyBuffer>& normed) {
  const int64_t columns = scale.element_count(), rows = columns ? x.element_count() / columns : 0;
  const auto *xs = static_cast<const Element*>(x.untyped_data()), *ys = static_cast<const Element*>(y);
  const auto* scales = static_cast<const Element*>(scale.untyped_data());
  auto *sums = static_cast<Element*>(sum), *out = static_cast<Element*>(normed->untyped_data());
  ForRows(pool, rows, columns, [&](int64_t row) {
    const int64_t at = row * columns;
    const bool zeros = AddRow(xs + at, ys ? ys + at : nullptr, columns, sums + (ys ? at : 0));
    if (zeros) std::memset(out + at, 0, columns * sizeof(Element));
    else Normalise((ys ? sums : xs) + at, scales, columns, how, out + at);
  });
}

ffi::Error RmsNormImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer scale, ffi::Result<ffi::AnyBuffer> normed,
                       float eps, float offset, bool wide) {
  const Scaling how{eps, offset, wide};
  if (x.element_type() == ffi::DataType::BF16) NormaliseRows<BF16>(pool, x, nullptr, scale, how, nullptr, normed);
  else NormaliseRows<float>(pool, x, nullptr, scale, how, nullptr, normed);
  return ffi::Error::Success();
}

ffi::Error AddRmsNormImpl(ffi::ThreadPool pool, ffi::AnyBuffer x, ffi::AnyBuffer y, ffi::AnyBuffer scale,
                          ffi::Result<ffi::AnyBuffer> sum, ffi::Result<ffi::AnyBuffer> normed, float eps, float offset,
                          bool wide) {
  const Scaling how{eps, offset, wide};
  void* made = sum->untyped_data();
  if (x.element_type() == ffi::DataType::BF16) NormaliseRows<BF16>(pool, x, y.untyped_data(), scale, how, made, normed);
  else NormaliseRows<float>(pool, x, y.untyped_data(), scale, how, made, normed);
  return ffi::Error::Success();
}

// Rotates one head's columns i against i + half, or 2 i against 2 i + 1, which are then stored as i and i + half; cos
// and sin are rounded already.
template <typename Element>
void Rotate(float* x, const float* cos, const float* sin, int64_t half, int64_t dim, bool interleaved, float* pairs,
            Element* out) {
  const float* from = x;
  if (interleaved) {
    for (int64_t i = 0; i < half; ++i) pairs[i] = x[2 * i], pairs[half + i] = x[2 * i + 1];
    from = pairs;
  }
  for (int64_t i = 0; i < half; i += kLanes) {
    const Mask mask = FirstLanes(half - i);
    const Floats a = Load(from + i, mask), b = Load(from + half + i, mask), c = Load(cos + i, mask);
    const Floats s = Load(sin + i, mask);
    Store(out + i, Sub(Mul(a, c), Mul(b, s)), mask);
    Store(out + half + i, Add(Mul(b, c), Mul(a, s)), mask);
  }
  for (int64_t i = 2 * half; i < dim; i += kLanes) {
    const Mask mask = FirstLanes(dim - i);
    Store(out + i, Load(x + i, mask), mask);
  }
}

// Queries and keys of rows [q | k | v], normalised by head if there are scales, and rotated; and values, which are
// copied.
template <typename Element>
void TurnRows(ffi::ThreadPool& pool, const ffi::AnyBuffer& qkv, const ffi::AnyBuffer& cos, const ffi::AnyBuffer& sin,
              const ffi::AnyBuffer& q_scale, const ffi::AnyBuffer& k_scale, ffi::Result<ffi::AnyBuffer>& q,
              ffi::Result<ffi::AnyBuffer>& k, ffi::Result<ffi::AnyBuffer>& v, const Scaling& how, bool interleaved) {
  const int64_t rows = qkv.dimensions()[0], columns = qkv.dimensions()[1], half = cos.dimensions()[1];
  const int64_t dim = q->dimensions()[2], queries = q->dimensions()[1], keys = k->dimensions()[1];
  const auto* in = static_cast<const Element*>(qkv.untyped_data());
  auto data = [](auto& buffer) { return static_cast<Element*>(buffer->untyped_data()); };
  auto scale = [](auto& own) {
    return own.element_count() ? static_cast<const Element*>(own.untyped_data()) : nullptr;
  };
  const Element *q_scales = scale(q_scale), *k_scales = scale(k_scale);
  ForRows(pool, rows, columns, [&](int64_t row) {
    const Element* from = in + row * columns;
    auto turn = [&](const Element* scales, int64_t heads, Element* out, const float* angles, float* head) {
      for (int64_t h = 0; h < heads; ++h, from += dim, out += dim) {
        if (scales) Normalise(from, scales, dim, how, head);
        else
          for (int64_t i = 0; i < dim; i += kLanes) {
            const Mask mask = FirstLanes(dim - i);
            Store(head + i, Load(from + i, mask), mask);
          }
        Rotate(head, angles, angles + half, half, dim, interleaved, head + dim, out);
      }
    };
    Element *to_q = data(q) + row * queries * dim, *to_k = data(k) + row * keys * dim;
    Element* to_v = data(v) + row * keys * dim;
    Words any = SetWords(0);
    for (int64_t i = 0; i < columns; i += kLanes)
      any = Or(any, AsWords(Load(from + i, FirstLanes(columns - i))));
    if (Zeros(any)) {
      std::memset(to_q, 0, queries * dim * sizeof(Element));
      std::memset(to_k, 0, keys * dim * sizeof(Element));
      std::memset(to_v, 0, keys * dim * sizeof(Element));
      return;
    }
    thread_local std::vector<float> buffer;
    buffer.resize(2 * half + 2 * dim);
    const auto *c = static_cast<const float*>(cos.untyped_data()) + row * half,
               *s = static_cast<const float*>(sin.untyped_data()) + row * half;
    for (int64_t i = 0; i < half; i += kLanes) {
      const Mask mask = FirstLanes(half - i);
      Store(buffer.data() + i, Rounded<Element>(Load(c + i, mask)), mask);
      Store(buffer.data() + half + i, Rounded<Element>(Load(s + i, mask)), mask);
    }
    turn(q_scales, queries, to_q, buffer.data(), buffer.data() + 2 * half);
    turn(k_scales, keys, to_k, buffer.data(), buffer.data() + 2 * half);
    std::memcpy(to_v, from, keys * dim * sizeof(Element));
  });
}

ffi::Error TurnImpl(ffi::ThreadPool pool, ffi::AnyBuffer qkv, ffi::AnyBuffer cos, ffi::AnyBuffer sin,
                    ffi::AnyBuffer q_scale, ffi::AnyBuffer k_scale, ffi::Result<ffi::AnyBuffer> q,
                    ffi::Result<ffi::AnyBuffer> k, ffi::Result<ffi::AnyBuffer> v, float eps, float offset, bool wide,
                    bool interleaved) {
  const int64_t dim = q->dimensions()[2], heads = q->dimensions()[1] + 2 * k->dimensions()[1];
  if (heads * dim != qkv.dimensions()[1] || 2 * cos.dimensions()[1] > dim)
    return ffi::Error::InvalidArgument("columns of q, k and v differ from their matrix, or more are rotated");
  if (q_scale.element_type() != qkv.element_type() || k_scale.element_type() != qkv.element_type())
    return ffi::Error::InvalidArgument("scales are of another dtype than queries and keys");
  const Scaling how{eps, offset, wide};
  if (qkv.element_type() == ffi::DataType::BF16)
    TurnRows<BF16>(pool, qkv, cos, sin, q_scale, k_scale, q, k, v, how, interleaved);
  else TurnRows<float>(pool, qkv, cos, sin, q_scale, k_scale, q, k, v, how, interleaved);
  return ffi::Error::Success();
}

}  // namespace
}  // namespace jaxinfer

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferGated, jaxinfer::GatedImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<int64_t>("activation")
                                  .Attr<int64_t>("gate_first")
                                  .Attr<int64_t>("up_first"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferRmsNorm, jaxinfer::RmsNormImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Attr<bool>("wide"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferAddRmsNorm, jaxinfer::AddRmsNormImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Attr<bool>("wide"));

XLA_FFI_DEFINE_HANDLER_SYMBOL(JaxinferTurn, jaxinfer::TurnImpl,
                              xla::ffi::Ffi::Bind()
                                  .Ctx<xla::ffi::ThreadPool>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Arg<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Ret<xla::ffi::AnyBuffer>()
                                  .Attr<float>("eps")
                                  .Attr<float>("offset")
                                  .Attr<bool>("wide")
                                  .Attr<bool>("interleaved"));
