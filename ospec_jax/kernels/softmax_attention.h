// SPDX-License-Identifier: Apache-2.0
//
// Softmax attention of few queries over a cache, in float32.
//
// A query's sums run over the slots strictly one after the other, so that neither the
// queries beside it nor the exact zeros of masked slots, wherever they lie, change its
// bits. Slots in front of the first one that anybody attends to, and behind the last one,
// are not read at all.

#ifndef OSPEC_JAX_KERNELS_SOFTMAX_ATTENTION_H_
#define OSPEC_JAX_KERNELS_SOFTMAX_ATTENTION_H_

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector_math.h"

namespace ospec {
// Each source file that includes this has its own copy.
namespace {

// Queries in one block, which reads the cache once. Few of them take four vectors of slots
// or channels at a time, many take two, so that the sums stay in registers.
constexpr int64_t kMaxQueries = 12;
constexpr int64_t kMaxWideQueries = 4;
constexpr int64_t kSlotsAhead = 16;        // whose values are fetched ahead
constexpr float kMasked = -1e29f;          // biases below it exclude a slot
constexpr int64_t kMinParallelSums = 600000;  // multiplications worth waking a thread for

// Slots that are read, in whole vectors.
struct Range {
  int64_t first, end;
};

struct Attention {
  const float* queries;  // [b, t, heads, e], `row_stride` from token to token
  const float* keys;     // [b, h, e, s]
  const float* values;   // [b, h, s, e]
  const float* bias;     // [b, t, s]
  float* out;            // [b, t, heads, e]
  int64_t batch, t, heads, kv_heads, e, s;
  int64_t row_stride;
  float scale;
  std::vector<Range> slots;  // [b]

  int64_t group() const { return heads / kv_heads; }
  // Where the r-th query of a key-value head lies.
  const float* query(int64_t b, int64_t h, int64_t r) const {
    return queries + (b * t + r / group()) * row_stride + (h * group() + r % group()) * e;
  }
  float* result(int64_t b, int64_t h, int64_t r) const {
    return out + ((b * t + r / group()) * heads + h * group() + r % group()) * e;
  }
};

// Scores of R scaled queries `[R, e]` over V vectors of slots, without the bias.
template <int R, int V>
inline void score(const Attention& a, const float* queries, const float* keys,
                  int64_t slot, float* scores) {
  __m512 acc[R][V];
  each<R * V>([&](auto i) { acc[i / V][i % V] = _mm512_setzero_ps(); });
  for (int64_t i = 0; i < a.e; ++i) {
    __m512 k[V];
    const float* row = keys + i * a.s + slot;
    each<V>([&](auto v) {
      k[v] = _mm512_loadu_ps(row + v * kLanes);
      // Slots of one channel are a short run of memory: the next ones are fetched here.
      _mm_prefetch(row + (V + v) * kLanes, _MM_HINT_T0);
    });
    each<R>([&](auto r) {
      __m512 q = _mm512_set1_ps(queries[r * a.e + i]);
      each<V>([&](auto v) { acc[r][v] = _mm512_fmadd_ps(q, k[v], acc[r][v]); });
    });
  }
  each<R * V>([&](auto i) {
    float* out = scores + i / V * a.s + slot + i % V * kLanes;
    _mm512_storeu_ps(out, acc[i / V][i % V]);
  });
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

// Sums each query's weights. The sums of R queries go on side by side.
template <int R>
inline void add_weights(const Attention& a, const float* weights, Range slots,
                        float* totals) {
  float total[R] = {};
  for (int64_t i = slots.first; i < slots.end; ++i)
    each<R>([&](auto r) { total[r] += weights[r * a.s + i]; });
  std::copy(total, total + R, totals);
}

// Adds up V vectors of the values' channels, from `channel` on, by R queries' weights.
template <int R, int V>
inline void mix(const Attention& a, const float* weights, const float* totals,
                const float* values, Range slots, int64_t channel, float* const* out) {
  __m512 acc[R][V];
  each<R * V>([&](auto i) { acc[i / V][i % V] = _mm512_setzero_ps(); });
  for (int64_t i = slots.first; i < slots.end; ++i) {
    __m512 x[V];
    each<V>([&](auto v) {
      const float* place = values + i * a.e + channel + v * kLanes;
      x[v] = _mm512_loadu_ps(place);
      _mm_prefetch(place + kSlotsAhead * a.e, _MM_HINT_T0);
    });
    each<R>([&](auto r) {
      __m512 w = _mm512_set1_ps(weights[r * a.s + i]);
      each<V>([&](auto v) { acc[r][v] = _mm512_fmadd_ps(w, x[v], acc[r][v]); });
    });
  }
  each<R * V>([&](auto i) {
    __m512 total = _mm512_set1_ps(totals[i / V]);
    _mm512_storeu_ps(out[i / V] + channel + i % V * kLanes,
                     _mm512_div_ps(acc[i / V][i % V], total));
  });
}

template <int R>
void attend_block(const Attention& a, int64_t b, int64_t h, int64_t row) {
  const float* keys = a.keys + (b * a.kv_heads + h) * a.e * a.s;
  const float* values = a.values + (b * a.kv_heads + h) * a.s * a.e;
  Range slots = a.slots[b];
  thread_local std::vector<float> queries, scores;
  queries.resize(R * a.e);
  scores.resize(R * a.s);
  constexpr int V = R <= kMaxWideQueries ? 4 : 2;
  float* out[R];
  float totals[R];
  for (int r = 0; r < R; ++r) {
    const float* query = a.query(b, h, row + r);
    for (int64_t i = 0; i < a.e; ++i) queries[r * a.e + i] = query[i] * a.scale;
    out[r] = a.result(b, h, row + r);
  }
  int64_t slot = slots.first;
  for (; slot + V * kLanes <= slots.end; slot += V * kLanes)
    score<R, V>(a, queries.data(), keys, slot, scores.data());
  for (; slot < slots.end; slot += kLanes)
    score<R, 1>(a, queries.data(), keys, slot, scores.data());
  for (int r = 0; r < R; ++r) {
    const float* bias = a.bias + (b * a.t + (row + r) / a.group()) * a.s;
    exponentiate(bias, slots, scores.data() + r * a.s);
  }
  add_weights<R>(a, scores.data(), slots, totals);
  int64_t channel = 0;
  for (; channel + V * kLanes <= a.e; channel += V * kLanes)
    mix<R, V>(a, scores.data(), totals, values, slots, channel, out);
  for (; channel < a.e; channel += kLanes)
    mix<R, 1>(a, scores.data(), totals, values, slots, channel, out);
}

void attend_rows(const Attention& a, int64_t b, int64_t h, int64_t row, int64_t count) {
  each<kMaxQueries>([&](auto i) {
    if (count == i + 1) attend_block<i + 1>(a, b, h, row);
  });
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

// Finds out which slots are read. All other fields must be set before.
void find_slots(Attention& a) {
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.e)));
  a.slots.clear();
  for (int64_t b = 0; b < a.batch; ++b)
    a.slots.push_back(used_slots(a.bias + b * a.t * a.s, a.t, a.s));
}

// Attends, some queries of one key-value head a chunk. `a` must outlive the phase.
Phase attend(const Attention& a) {
  const int64_t num_rows = a.t * a.group();
  const int64_t num_blocks = (num_rows + kMaxQueries - 1) / kMaxQueries;
  auto run = [&a, num_rows, num_blocks](int64_t chunk) {
    // Threads begin with different heads, so that not all wait for the same memory.
    const int64_t num_heads = a.batch * a.kv_heads, head = chunk % num_heads;
    const int64_t i = chunk / num_heads, row = num_rows * i / num_blocks;
    const int64_t count = num_rows * (i + 1) / num_blocks - row;
    attend_rows(a, head / a.kv_heads, head % a.kv_heads, row, count);
  };
  return {a.batch * a.kv_heads * num_blocks, run};
}

// Whether attention is worth waking a thread for.
bool is_large(const Attention& a) {
  int64_t num_slots = 0;
  for (Range slots : a.slots) num_slots += slots.end - slots.first;
  return 2 * num_slots * a.t * a.heads * a.e >= kMinParallelSums;
}

}  // namespace
}  // namespace ospec

#endif  // OSPEC_JAX_KERNELS_SOFTMAX_ATTENTION_H_
