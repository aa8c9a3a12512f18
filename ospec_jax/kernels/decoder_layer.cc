// SPDX-License-Identifier: Apache-2.0
//
// A whole decoder layer in one call: norms, int8 products, rotary embedding, cache,
// attention and feed-forward block; where it is the last one, the head, too.
//
// Drafts have layers of other kinds. Attention may read two rows side by side, each with
// a norm of its own, of which the second one goes on as the residual, normed or not.
// Whatever a model has not is an empty array.
//
// Threads are woken once for all of it, and no small operation is handed over between
// two products. Each row of each part is computed by itself, in an order that follows
// from the row alone, so a token's bits do not depend on the tokens beside it.

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "int8_product.h"
#include "parallel.h"
#include "softmax_attention.h"
#include "vector_math.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;
using F32 = ffi::Buffer<ffi::F32>;
using S8 = ffi::Buffer<ffi::S8>;

namespace {

// Queries, keys and values of new tokens, and where these go.
struct Heads {
  float* qkv;          // [b, t, heads + 2 * kv_heads, e]
  const float* cos;    // [b, t, e]
  const float* sin;    // [b, t, e]
  const float* bias;   // [(heads + 2 * kv_heads) * e], or null
  const float* q_gain; // [e], or null
  const float* k_gain; // [e], or null
  const int32_t* starts;  // [b]
  float* keys;         // [b, kv_heads, e, s]
  float* values;       // [b, kv_heads, s, e]
  int64_t batch, t, heads, kv_heads, e, s;
  float eps;
};

// Rotates the queries and keys of one key-value head, and writes its cache.
void prepare_head(const Heads& a, int64_t b, int64_t h) {
  const int64_t group = a.heads / a.kv_heads;
  // As XLA does, so that all tokens find a slot.
  const int64_t start = std::clamp<int64_t>(a.starts[b], 0, a.s - a.t);
  float* keys = a.keys + (b * a.kv_heads + h) * a.e * a.s + start;
  float* values = a.values + ((b * a.kv_heads + h) * a.s + start) * a.e;
  // The channels of a key lie far from each other.
  for (int64_t i = 0; i < a.e; ++i) _mm_prefetch(keys + i * a.s, _MM_HINT_T0);
  for (int64_t t = 0; t < a.t; ++t) {
    const int64_t row = b * a.t + t;
    float* first = a.qkv + row * (a.heads + 2 * a.kv_heads) * a.e;
    auto biased = [&](int64_t head) {
      float* x = first + head * a.e;
      if (a.bias)
        for (int64_t i = 0; i < a.e; ++i) x[i] += a.bias[head * a.e + i];
      return x;
    };
    auto rotated = [&](int64_t head, const float* gain) {
      float* x = biased(head);
      if (gain) ospec::rms_norm(x, gain, a.eps, a.e, x);
      ospec::rotate(x, a.cos + row * a.e, a.sin + row * a.e, a.e, x);
      return x;
    };
    for (int64_t i = 0; i < group; ++i) rotated(h * group + i, a.q_gain);
    const float* key = rotated(a.heads + h, a.k_gain);
    const float* value = biased(a.heads + a.kv_heads + h);
    for (int64_t i = 0; i < a.e; ++i) keys[i * a.s + t] = key[i];
    std::copy(value, value + a.e, values + t * a.e);
  }
}

// Memory that a call needs beside its arguments and results.
struct LayerScratch {
  ospec::ProductScratch products[5];
  ospec::Buffer residual, qkv, scores, attended, hidden, both;
};

ospec::Product product(ospec::ProductScratch& scratch, int64_t m, S8 kernel, F32 scale,
                       const float* residual, float* y, bool has_tiles) {
  ospec::Product p;
  p.m = m;
  p.n = kernel.dimensions()[0];
  p.k = kernel.dimensions()[1];
  p.kernel = kernel.typed_data();
  p.scale = scale.typed_data();
  p.residual = residual;
  p.y = y;
  p.has_tiles = has_tiles;
  ospec::allocate(p, scratch);
  return p;
}

// Null for what a model has not.
const float* optional(F32 x) { return x.element_count() ? x.typed_data() : nullptr; }

ffi::Error DecoderLayer(ffi::ThreadPool pool, float eps, bool has_tiles,
                        bool has_normed_residual, F32 x, F32 cos, F32 sin, F32 bias,
                        F32 keys, F32 values, ffi::Buffer<ffi::S32> starts,
                        F32 input_gain, S8 qkv_kernel, F32 qkv_scale, F32 qkv_bias,
                        F32 q_gain, F32 k_gain, S8 o_kernel, F32 o_scale, F32 post_gain,
                        S8 gate_up_kernel, F32 gate_up_scale, S8 down_kernel,
                        F32 down_scale, F32 beside, F32 beside_gain, F32 final_gain,
                        S8 head_kernel, F32 head_scale, ffi::ResultBuffer<ffi::F32> out,
                        ffi::ResultBuffer<ffi::F32> new_keys,
                        ffi::ResultBuffer<ffi::F32> new_values,
                        ffi::ResultBuffer<ffi::F32> logits) {
  thread_local LayerScratch scratch;
  const int64_t batch = x.dimensions()[0], t = x.dimensions()[1], d = x.dimensions()[2];
  const int64_t m = batch * t, f = down_kernel.dimensions()[1];
  const int64_t width = o_kernel.dimensions()[1];

  Heads heads;
  heads.qkv = scratch.qkv.of<float>(m * qkv_kernel.dimensions()[0]);
  heads.cos = cos.typed_data();
  heads.sin = sin.typed_data();
  heads.bias = optional(qkv_bias);
  heads.q_gain = optional(q_gain);
  heads.k_gain = optional(k_gain);
  heads.starts = starts.typed_data();
  heads.keys = new_keys->typed_data();
  heads.values = new_values->typed_data();
  heads.batch = batch;
  heads.t = t;
  heads.kv_heads = keys.dimensions()[1];
  heads.e = keys.dimensions()[2];
  heads.s = keys.dimensions()[3];
  heads.heads = width / heads.e;
  heads.eps = eps;
  // The results share the arguments' memory unless somebody else still reads these.
  if (heads.keys != keys.typed_data())
    std::copy_n(keys.typed_data(), keys.element_count(), heads.keys);
  if (heads.values != values.typed_data())
    std::copy_n(values.typed_data(), values.element_count(), heads.values);

  ospec::Attention attention;
  attention.queries = heads.qkv;
  attention.keys = heads.keys;
  attention.values = heads.values;
  attention.bias = bias.typed_data();
  attention.out = scratch.attended.of<float>(m * width);
  attention.batch = batch;
  attention.t = t;
  attention.heads = heads.heads;
  attention.kv_heads = heads.kv_heads;
  attention.e = heads.e;
  attention.s = heads.s;
  attention.row_stride = qkv_kernel.dimensions()[0];
  ospec::find_slots(attention);
  ospec::divide(attention, pool.num_threads(), scratch.scores);

  const float* rows = x.typed_data();
  float* residual = has_normed_residual ? scratch.residual.of<float>(m * d) : nullptr;
  float* attended = attention.out;
  float* hidden = scratch.hidden.of<float>(m * d);
  float* both = scratch.both.of<float>(m * 2 * f);
  auto& s = scratch.products;
  auto qkv = product(s[0], m, qkv_kernel, qkv_scale, nullptr, heads.qkv, has_tiles);
  auto o = product(s[1], m, o_kernel, o_scale, residual ? residual : rows, hidden,
                   has_tiles);
  auto gate_up = product(s[2], m, gate_up_kernel, gate_up_scale, nullptr, both, has_tiles);
  auto down =
      product(s[3], m, down_kernel, down_scale, hidden, out->typed_data(), has_tiles);

  // What attention reads: another row in front of x's own, where there is one. Then both
  // are normed.
  const float* first = optional(beside);
  const float* first_gain = optional(beside_gain);
  const int64_t first_width = first ? beside.dimensions()[2] : 0;
  auto own_row = ospec::normed_rows(rows, optional(input_gain), eps, d);
  auto joined_row = [=](int64_t row, float* place) -> const float* {
    const float* own = own_row(row, place + first_width);
    if (residual) std::copy(own, own + d, residual + row * d);
    if (!first) return own;
    ospec::rms_norm(first + row * first_width, first_gain, eps, first_width, place);
    return place;
  };
  auto attended_row = [=](int64_t row, float*) -> const float* {
    return attended + row * width;
  };
  auto gated_row = [=](int64_t row, float* place) -> const float* {
    const float* gate = both + row * 2 * f;
    ospec::swiglu(gate, gate + f, f, place);
    return place;
  };

  std::vector<ospec::Phase> phases = {
      ospec::quantize(qkv, joined_row),
      ospec::multiply(qkv),
  };
  const int64_t num_heads = batch * heads.kv_heads;
  auto prepare = [&heads](int64_t i) {
    prepare_head(heads, i / heads.kv_heads, i % heads.kv_heads);
  };
  const std::vector<ospec::Phase> attend = ospec::attend(attention);
  if (attend[0].num_chunks == num_heads) {
    // One chunk a head: nothing needs to wait between the two.
    auto run = [prepare, attend](int64_t i) {
      prepare(i);
      attend[0].run(i);
    };
    phases.push_back({num_heads, run});
  } else {
    phases.push_back({num_heads, prepare});
    phases.insert(phases.end(), attend.begin(), attend.end());
  }
  phases.push_back(ospec::quantize(o, attended_row));
  phases.push_back(ospec::multiply(o));
  phases.push_back(ospec::quantize(
      gate_up, ospec::normed_rows(hidden, post_gain.typed_data(), eps, d)));
  phases.push_back(ospec::multiply(gate_up));
  phases.push_back(ospec::quantize(down, gated_row));
  phases.push_back(ospec::multiply(down));
  bool is_parallel = ospec::is_large(gate_up) || ospec::is_large(attention);
  ospec::Product head;
  if (head_kernel.element_count()) {
    head = product(s[4], m, head_kernel, head_scale, nullptr, logits->typed_data(),
                   has_tiles);
    phases.push_back(ospec::quantize(
        head, ospec::normed_rows(out->typed_data(), optional(final_gain), eps, d)));
    phases.push_back(ospec::multiply(head));
    is_parallel = is_parallel || ospec::is_large(head);
  }
  ospec::run_phases(pool, is_parallel, std::move(phases));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OspecDecoderLayer, DecoderLayer,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("has_tiles")
                                  .Attr<bool>("has_normed_residual")
                                  .Arg<F32>()  // x
                                  .Arg<F32>()  // cos
                                  .Arg<F32>()  // sin
                                  .Arg<F32>()  // bias
                                  .Arg<F32>()  // keys
                                  .Arg<F32>()  // values
                                  .Arg<ffi::Buffer<ffi::S32>>()  // starts
                                  .Arg<F32>()  // input_gain
                                  .Arg<S8>()   // qkv_kernel
                                  .Arg<F32>()  // qkv_scale
                                  .Arg<F32>()  // qkv_bias
                                  .Arg<F32>()  // q_gain
                                  .Arg<F32>()  // k_gain
                                  .Arg<S8>()   // o_kernel
                                  .Arg<F32>()  // o_scale
                                  .Arg<F32>()  // post_gain
                                  .Arg<S8>()   // gate_up_kernel
                                  .Arg<F32>()  // gate_up_scale
                                  .Arg<S8>()   // down_kernel
                                  .Arg<F32>()  // down_scale
                                  .Arg<F32>()  // beside
                                  .Arg<F32>()  // beside_gain
                                  .Arg<F32>()  // final_gain
                                  .Arg<S8>()   // head_kernel
                                  .Arg<F32>()  // head_scale
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>()
                                  .Ret<F32>());
