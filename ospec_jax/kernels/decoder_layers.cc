// SPDX-License-Identifier: Apache-2.0
//
// Whole decoder layers in one call: norms, int8 products, rotary embedding, cache,
// attention and feed-forward block; behind the last one the head, too.
//
// Drafts have layers of other kinds. Attention may read two rows side by side, each with
// a norm of its own, of which the second one goes on as the residual, normed or not.
// Whatever a model has not is an empty array.
//
// Threads are woken once for all of it, and no small operation is handed over between
// two products. Layers follow each other without the host, which would have to hand over
// some dozen arrays for each. Each row of each part is computed by itself, in an order that follows
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
  int64_t all_t;       // with padding, which is not computed
  float eps;
};

// Rotates the queries and keys of one key-value head, and writes its cache.
void prepare_head(const Heads& a, int64_t b, int64_t h) {
  const int64_t group = a.heads / a.kv_heads;
  // As XLA does, so that all tokens find a slot.
  const int64_t start = std::clamp<int64_t>(a.starts[b], 0, a.s - a.all_t);
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

// Memory that a call needs beside its arguments and results. Layers take turns with it.
struct LayerScratch {
  ospec::ProductScratch products[5];
  ospec::Buffer stream, residual, qkv, scores, attended, hidden, both;
};

// A matrix of each layer, `[layers, n, k]`, and its scales, `[layers, n]`.
struct Kernels {
  S8 values;
  F32 scale;

  int64_t n() const { return values.dimensions()[1]; }
  int64_t k() const { return values.dimensions()[2]; }
};

ospec::Product product(ospec::ProductScratch& scratch, int64_t m, const Kernels& kernels,
                       int64_t layer, const float* residual, float* y, bool has_tiles) {
  ospec::Product p;
  p.m = m;
  p.n = kernels.n();
  p.k = kernels.k();
  p.kernel = kernels.values.typed_data() + layer * p.n * p.k;
  p.scale = kernels.scale.typed_data() + layer * p.n;
  p.residual = residual;
  p.y = y;
  p.has_tiles = has_tiles;
  ospec::allocate(p, scratch);
  return p;
}

// A layer's part of `[layers, ...]`; null for what a model has not.
const float* part(F32 x, int64_t layer = 0) {
  const int64_t count = x.element_count();
  return count ? x.typed_data() + layer * (count / x.dimensions()[0]) : nullptr;
}

// What all layers have, stacked.
struct Weights {
  F32 input_gain;
  Kernels qkv;
  F32 qkv_bias, q_gain, k_gain;
  Kernels o;
  F32 post_gain;
  Kernels gate_up, down;
};

// What the phases of one layer read; they are run later.
struct Layer {
  Heads heads;
  ospec::Attention attention;
  ospec::Product qkv, o, gate_up, down;
};

// Rows between the parts of a layer, which the next one writes anew.
struct Rows {
  float* residual;  // [m, d], the normed input where the residual stream begins with it
  float* attended;  // [m, width]
  float* hidden;    // [m, d]
  float* both;      // [m, 2 * f], gates and what they let through
};

// Another row in front of a layer's own; `rows` is null where there is none.
struct Beside {
  const float* rows;
  const float* gain;
  int64_t width;
};

// Appends the phases of layer `i`, which reads `rows` and writes `written`, both [m, d].
// `layer` holds its heads and attention but for what is the layer's own.
void append_layer(const Weights& weights, int64_t i, LayerScratch& scratch, Layer& layer,
                  const Rows& place, const Beside& beside, const float* rows,
                  float* written, bool has_tiles, std::vector<ospec::Phase>& phases) {
  Heads& heads = layer.heads;
  const int64_t d = weights.o.n(), f = weights.down.k(), width = weights.o.k();
  const int64_t m = heads.batch * heads.t;
  const int64_t layer_size = heads.batch * heads.kv_heads * heads.e * heads.s;
  const float eps = heads.eps;
  heads.bias = part(weights.qkv_bias, i);
  heads.q_gain = part(weights.q_gain, i);
  heads.k_gain = part(weights.k_gain, i);
  heads.keys += i * layer_size;
  heads.values += i * layer_size;
  layer.attention.keys = heads.keys;
  layer.attention.values = heads.values;

  auto multiplied = [&](int number, const Kernels& kernels, const float* added, float* y) {
    return product(scratch.products[number], m, kernels, i, added, y, has_tiles);
  };
  float* residual = place.residual;
  layer.qkv = multiplied(0, weights.qkv, nullptr, heads.qkv);
  layer.o = multiplied(1, weights.o, residual ? residual : rows, place.hidden);
  layer.gate_up = multiplied(2, weights.gate_up, nullptr, place.both);
  layer.down = multiplied(3, weights.down, place.hidden, written);

  // What attention reads: the row beside x's own, where there is one. Both are normed.
  auto own_row = ospec::normed_rows(rows, part(weights.input_gain, i), eps, d);
  auto joined_row = [=](int64_t row, float* free) -> const float* {
    const float* own = own_row(row, free + beside.width);
    if (residual) std::copy(own, own + d, residual + row * d);
    if (!beside.rows) return own;
    const float* first = beside.rows + row * beside.width;
    ospec::rms_norm(first, beside.gain, eps, beside.width, free);
    return free;
  };
  auto attended_row = [=](int64_t row, float*) -> const float* {
    return place.attended + row * width;
  };
  auto gated_row = [=](int64_t row, float* free) -> const float* {
    const float* gate = place.both + row * 2 * f;
    ospec::swiglu(gate, gate + f, f, free);
    return free;
  };

  phases.push_back(ospec::quantize(layer.qkv, joined_row));
  phases.push_back(ospec::multiply(layer.qkv));
  const int64_t num_heads = heads.batch * heads.kv_heads;
  auto prepare = [&heads](int64_t head) {
    prepare_head(heads, head / heads.kv_heads, head % heads.kv_heads);
  };
  const std::vector<ospec::Phase> attend = ospec::attend(layer.attention);
  if (attend[0].num_chunks == num_heads) {
    // One chunk a head: nothing needs to wait between the two.
    auto run = [prepare, attend](int64_t head) {
      prepare(head);
      attend[0].run(head);
    };
    phases.push_back({num_heads, run});
  } else {
    phases.push_back({num_heads, prepare});
    phases.insert(phases.end(), attend.begin(), attend.end());
  }
  phases.push_back(ospec::quantize(layer.o, attended_row));
  phases.push_back(ospec::multiply(layer.o));
  const float* post_gain = part(weights.post_gain, i);
  phases.push_back(
      ospec::quantize(layer.gate_up, ospec::normed_rows(place.hidden, post_gain, eps, d)));
  phases.push_back(ospec::multiply(layer.gate_up));
  phases.push_back(ospec::quantize(layer.down, gated_row));
  phases.push_back(ospec::multiply(layer.down));
}

// The results share the arguments' memory unless somebody else still reads these.
float* in_place(F32 old, ffi::ResultBuffer<ffi::F32>& result) {
  float* place = result->typed_data();
  if (place != old.typed_data())
    std::copy_n(old.typed_data(), old.element_count(), place);
  return place;
}

ffi::Error DecoderLayers(ffi::ThreadPool pool, float eps, bool has_tiles,
                         bool has_normed_residual, ffi::Span<const int64_t> taps, F32 x,
                         F32 cos, F32 sin, F32 bias, F32 keys, F32 values,
                         ffi::Buffer<ffi::S32> starts,
                         ffi::Buffer<ffi::S32> num_valid, F32 input_gain, S8 qkv_kernel,
                         F32 qkv_scale, F32 qkv_bias, F32 q_gain, F32 k_gain,
                         S8 o_kernel, F32 o_scale, F32 post_gain, S8 gate_up_kernel,
                         F32 gate_up_scale, S8 down_kernel, F32 down_scale, F32 beside,
                         F32 beside_gain, F32 final_gain, S8 head_kernel, F32 head_scale,
                         ffi::ResultBuffer<ffi::F32> out,
                         ffi::ResultBuffer<ffi::F32> new_keys,
                         ffi::ResultBuffer<ffi::F32> new_values,
                         ffi::ResultBuffer<ffi::F32> tapped,
                         ffi::ResultBuffer<ffi::F32> logits) {
  thread_local LayerScratch scratch;
  const Weights weights{
      input_gain, {qkv_kernel, qkv_scale},         qkv_bias, q_gain, k_gain,
      {o_kernel, o_scale}, post_gain, {gate_up_kernel, gate_up_scale},
      {down_kernel, down_scale}};
  const int64_t batch = x.dimensions()[0], width = weights.o.k();
  const int64_t all_t = x.dimensions()[1], d = x.dimensions()[2];
  // Padding behind a lone request's tokens is left out: rows of nothing but zeros.
  const bool has_padding = batch == 1 && num_valid.element_count();
  const int64_t t =
      has_padding ? std::clamp<int64_t>(num_valid.typed_data()[0], 1, all_t) : all_t;
  const int64_t m = batch * t, all_m = batch * all_t;
  auto clear_padding = [&](float* rows, int64_t width) {
    std::fill(rows + m * width, rows + all_m * width, 0.0f);
  };
  // There may be weights of more layers than are run.
  const int64_t num_layers = keys.dimensions()[0];
  Rows place;
  place.residual = has_normed_residual ? scratch.residual.of<float>(m * d) : nullptr;
  place.attended = scratch.attended.of<float>(m * width);
  place.hidden = scratch.hidden.of<float>(m * d);
  place.both = scratch.both.of<float>(m * weights.gate_up.n());
  const Beside in_front{part(beside), part(beside_gain),
                        beside.element_count() ? beside.dimensions()[2] : 0};

  Layer first;
  Heads& heads = first.heads;
  heads.qkv = scratch.qkv.of<float>(m * weights.qkv.n());
  heads.cos = cos.typed_data();
  heads.sin = sin.typed_data();
  heads.starts = starts.typed_data();
  heads.keys = in_place(keys, new_keys);
  heads.values = in_place(values, new_values);
  heads.batch = batch;
  heads.t = t;
  heads.all_t = all_t;
  heads.kv_heads = keys.dimensions()[2];
  heads.e = keys.dimensions()[3];
  heads.s = keys.dimensions()[4];
  heads.heads = width / heads.e;
  heads.eps = eps;

  ospec::Attention& attention = first.attention;
  attention.queries = heads.qkv;
  attention.bias = bias.typed_data();
  attention.out = place.attended;
  attention.batch = batch;
  attention.t = t;
  attention.heads = heads.heads;
  attention.kv_heads = heads.kv_heads;
  attention.e = heads.e;
  attention.s = heads.s;
  attention.row_stride = weights.qkv.n();
  ospec::find_slots(attention);
  ospec::divide(attention, pool.num_threads(), scratch.scores);

  std::vector<Layer> layers(num_layers, first);
  std::vector<ospec::Phase> phases;
  const float* rows = x.typed_data();
  for (int64_t i = 0; i < num_layers; ++i) {
    // A layer may write where it read: its input was needed before.
    float* written =
        i + 1 == num_layers ? out->typed_data() : scratch.stream.of<float>(m * d);
    for (size_t j = 0; j < taps.size(); ++j) {
      // A tap is the state that enters a layer; the one before writes it there.
      float* tap = tapped->typed_data() + j * all_m * d;
      if (taps[j] == i + 1) written = tap;
      if (taps[j] == 0 && i == 0) std::copy_n(rows, m * d, tap);
    }
    append_layer(weights, i, scratch, layers[i], place, in_front, rows, written, has_tiles,
                 phases);
    rows = written;
  }
  clear_padding(out->typed_data(), d);
  for (size_t j = 0; j < taps.size(); ++j)
    clear_padding(tapped->typed_data() + j * all_m * d, d);
  clear_padding(logits->typed_data(), logits->dimensions()[2]);

  bool is_parallel = ospec::is_large(layers[0].gate_up) || ospec::is_large(attention);
  ospec::Product head;
  if (head_kernel.element_count()) {
    head = product(scratch.products[4], m, {head_kernel, head_scale}, 0, nullptr,
                   logits->typed_data(), has_tiles);
    phases.push_back(
        ospec::quantize(head, ospec::normed_rows(rows, part(final_gain), eps, d)));
    phases.push_back(ospec::multiply(head));
    is_parallel = is_parallel || ospec::is_large(head);
  }
  ospec::run_phases(pool, is_parallel, std::move(phases));
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OspecDecoderLayers, DecoderLayers,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("has_tiles")
                                  .Attr<bool>("has_normed_residual")
                                  .Attr<ffi::Span<const int64_t>>("taps")
                                  .Arg<F32>()  // x
                                  .Arg<F32>()  // cos
                                  .Arg<F32>()  // sin
                                  .Arg<F32>()  // bias
                                  .Arg<F32>()  // keys
                                  .Arg<F32>()  // values
                                  .Arg<ffi::Buffer<ffi::S32>>()  // starts
                                  .Arg<ffi::Buffer<ffi::S32>>()  // num_valid
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
                                  .Ret<F32>()   // out
                                  .Ret<F32>()   // new_keys
                                  .Ret<F32>()   // new_values
                                  .Ret<F32>()   // tapped
                                  .Ret<F32>());  // logits
