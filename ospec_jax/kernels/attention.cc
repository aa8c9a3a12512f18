// SPDX-License-Identifier: Apache-2.0
//
// Softmax attention of few queries over a cache, in float32.
//
// A query's sums run over the slots strictly one after the other, so that neither the
// queries beside it nor the exact zeros of masked slots, wherever they lie, change its
// bits. Slots in front of the first one that anybody attends to, and behind the last one,
// are not read at all.

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kLanes = 16;
constexpr int64_t kMaxRows = 4;            // queries in one block
constexpr int64_t kVectors = 4;            // vectors of slots or channels in one block
constexpr float kMasked = -1e29f;          // biases below it exclude a slot
constexpr int64_t kMinParallel = 600000;   // multiplications worth waking a thread for

// Slots that are read, in whole vectors.
struct Range {
  int64_t first, end;
};

struct Attention {
  const float* queries;  // [b, t, heads, e]
  const float* keys;     // [b, h, e, s]
  const float* values;   // [b, h, s, e]
  const float* bias;     // [b, t, s]
  float* out;            // [b, t, heads, e]
  int64_t t, heads, kv_heads, e, s;
  float scale;
  std::vector<Range> slots;  // [b]

  int64_t group() const { return heads / kv_heads; }
  // Where the r-th query of a key-value head lies, in queries and in out.
  int64_t offset(int64_t b, int64_t h, int64_t r) const {
    return ((b * t + r / group()) * heads + h * group() + r % group()) * e;
  }
};

// exp(x) for x <= 0, to about an ulp; exactly zero far below.
inline __m512 exponential(__m512 x) {
  __mmask16 is_normal = _mm512_cmp_ps_mask(x, _mm512_set1_ps(-87.0f), _CMP_GE_OQ);
  __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 0);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.0f / 720);
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 120));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 24));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f / 6));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(0.5f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(1.0f));
  return _mm512_maskz_scalef_ps(is_normal, y, n);
}

// Scores of R scaled queries `[R, e]` over V vectors of slots, without the bias.
template <int R, int V>
inline void score(const Attention& a, const float* queries, const float* keys,
                  int64_t slot, float* scores) {
  __m512 acc[R][V];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t i = 0; i < a.e; ++i) {
    __m512 k[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) k[v] = _mm512_loadu_ps(keys + i * a.s + slot + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m512 q = _mm512_set1_ps(queries[r * a.e + i]);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(q, k[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      _mm512_storeu_ps(scores + r * a.s + slot + v * kLanes, acc[r][v]);
}

// Turns a query's scores into unnormalised weights.
void exponentiate(const float* bias, Range slots, float* scores) {
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = slots.first; i < slots.end; i += kLanes) {
    __m512 x = _mm512_add_ps(_mm512_loadu_ps(scores + i), _mm512_loadu_ps(bias + i));
    _mm512_storeu_ps(scores + i, x);
    top = _mm512_max_ps(top, x);
  }
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  for (int64_t i = slots.first; i < slots.end; i += kLanes)
    _mm512_storeu_ps(scores + i, exponential(_mm512_sub_ps(_mm512_loadu_ps(scores + i), top)));
}

// Adds up V vectors of the values' channels, from `channel` on, by R queries' weights.
template <int R, int V>
inline void mix(const Attention& a, const float* weights, const float* values,
                Range slots, int64_t channel, float* const* out) {
  __m512 acc[R][V];
  float total[R] = {};
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) acc[r][v] = _mm512_setzero_ps();
  for (int64_t i = slots.first; i < slots.end; ++i) {
    __m512 x[V];
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      x[v] = _mm512_loadu_ps(values + i * a.e + channel + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      float weight = weights[r * a.s + i];
      total[r] += weight;
      __m512 w = _mm512_set1_ps(weight);
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) acc[r][v] = _mm512_fmadd_ps(w, x[v], acc[r][v]);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v)
      _mm512_storeu_ps(out[r] + channel + v * kLanes,
                       _mm512_div_ps(acc[r][v], _mm512_set1_ps(total[r])));
}

template <int R>
void block(const Attention& a, int64_t b, int64_t h, int64_t row) {
  const float* keys = a.keys + (b * a.kv_heads + h) * a.e * a.s;
  const float* values = a.values + (b * a.kv_heads + h) * a.s * a.e;
  Range slots = a.slots[b];
  thread_local std::vector<float> queries, scores;
  queries.resize(R * a.e);
  scores.resize(R * a.s);
  float* out[R];
  for (int r = 0; r < R; ++r) {
    const float* query = a.queries + a.offset(b, h, row + r);
    for (int64_t i = 0; i < a.e; ++i) queries[r * a.e + i] = query[i] * a.scale;
    out[r] = a.out + a.offset(b, h, row + r);
  }
  int64_t slot = slots.first;
  for (; slot + kVectors * kLanes <= slots.end; slot += kVectors * kLanes)
    score<R, kVectors>(a, queries.data(), keys, slot, scores.data());
  for (; slot < slots.end; slot += kLanes)
    score<R, 1>(a, queries.data(), keys, slot, scores.data());
  for (int r = 0; r < R; ++r) {
    const float* bias = a.bias + (b * a.t + (row + r) / a.group()) * a.s;
    exponentiate(bias, slots, scores.data() + r * a.s);
  }
  int64_t channel = 0;
  for (; channel + kVectors * kLanes <= a.e; channel += kVectors * kLanes)
    mix<R, kVectors>(a, scores.data(), values, slots, channel, out);
  for (; channel < a.e; channel += kLanes)
    mix<R, 1>(a, scores.data(), values, slots, channel, out);
}

void rows(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t count) {
  switch (count) {
    case 1: return block<1>(a, b, h, row);
    case 2: return block<2>(a, b, h, row);
    case 3: return block<3>(a, b, h, row);
    default: return block<4>(a, b, h, row);
  }
}

// Whether some query of a request attends to a slot of the vector that begins at `slot`.
bool is_used(const float* bias, int64_t t, int64_t s, int64_t slot) {
  for (int64_t row = 0; row < t; ++row) {
    __m512 x = _mm512_loadu_ps(bias + row * s + slot);
    if (_mm512_cmp_ps_mask(x, _mm512_set1_ps(kMasked), _CMP_GT_OQ)) return true;
  }
  return false;
}

// From the first slot that some query of a request attends to up to the last one.
Range used_slots(const float* bias, int64_t t, int64_t s) {
  Range slots{0, s};
  while (slots.end > kLanes && !is_used(bias, t, s, slots.end - kLanes)) slots.end -= kLanes;
  while (slots.first < slots.end - kLanes && !is_used(bias, t, s, slots.first))
    slots.first += kLanes;
  return slots;
}

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries,
                  ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
                  ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> out) {
  auto shape = queries.dimensions();
  Attention a;
  a.queries = queries.typed_data();
  a.keys = keys.typed_data();
  a.values = values.typed_data();
  a.bias = bias.typed_data();
  a.out = out->typed_data();
  int64_t batch = shape[0];
  a.t = shape[1];
  a.heads = shape[2];
  a.e = shape[3];
  a.kv_heads = keys.dimensions()[1];
  a.s = keys.dimensions()[3];
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.e)));
  int64_t num_slots = 0;
  for (int64_t b = 0; b < batch; ++b) {
    a.slots.push_back(used_slots(a.bias + b * a.t * a.s, a.t, a.s));
    num_slots += a.slots.back().end - a.slots.back().first;
  }
  int64_t num_rows = a.t * a.group();
  int64_t num_blocks = (num_rows + kMaxRows - 1) / kMaxRows;
  auto run = [&a, num_rows, num_blocks](int64_t chunk) {
    int64_t b = chunk / num_blocks / a.kv_heads, h = chunk / num_blocks % a.kv_heads;
    int64_t i = chunk % num_blocks, row = num_rows * i / num_blocks;
    rows(a, b, h, row, num_rows * (i + 1) / num_blocks - row);
  };
  bool is_parallel = 2 * num_slots * num_rows * a.kv_heads * a.e >= kMinParallel;
  ospec::share(pool, batch * a.kv_heads * num_blocks, is_parallel, run);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OspecAttention, Attend,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
