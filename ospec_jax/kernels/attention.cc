// SPDX-License-Identifier: Apache-2.0
//
// Softmax attention of few queries over a cache, in float32, and XLA's call of it.
//
// A query's sums run over the slots strictly one after the other, so that neither the
// queries beside it nor the exact zeros of masked slots, wherever they lie, change its
// bits. Slots in front of the first one that anybody attends to, and behind the last one,
// are not read at all.

#include "softmax_attention.h"

#include <immintrin.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

#include "parallel.h"
#include "vector_math.h"
#include "xla/ffi/api/ffi.h"

namespace ospec {
namespace {

// Queries in one block, which reads the cache once. Few of them take four vectors of slots
// or channels at a time, many take two, so that the sums stay in registers.
constexpr int64_t kMaxQueries = 12;
constexpr int64_t kMaxWideQueries = 4;
// Keys and values are fetched ahead, so many slots at a time, into the second cache: the
// first one has no room for 64 channels' runs of keys, which lie far from each other.
constexpr int64_t kSlotsAhead = 64;
// With fewer slots, dividing a head costs more than it saves.
constexpr int64_t kMinDividedSlots = 128;
constexpr int64_t kMaxParts = 4;
constexpr float kMasked = -1e29f;          // biases below it exclude a slot
constexpr int64_t kMinParallelSums = 600000;  // multiplications worth waking a thread for

// Some queries of one key-value head, from `row` on.
struct Block {
  int64_t b, h, row, count;
};

// Threads begin with different heads, so that not all wait for the same memory.
Block block_at(const Attention& a, int64_t i) {
  const int64_t head = i % a.num_heads(), of_head = i / a.num_heads();
  const int64_t row = a.num_rows() * of_head / a.blocks();
  const int64_t end = a.num_rows() * (of_head + 1) / a.blocks();
  return {head / a.kv_heads, head % a.kv_heads, row, end - row};
}

inline void fetch(const float* place, int64_t count) {
  for (int64_t i = 0; i < count; i += kLanes) _mm_prefetch(place + i, _MM_HINT_T1);
}

// Scores of R scaled queries `[R, e]` over V vectors of slots, without the bias. Fetches
// the keys that many slots ahead.
//
// Not to be inlined: beside another loop some compilers keep sums in memory.
template <int R, int V>
[[gnu::noinline]] void score(const Attention& a, const float* queries, const float* keys,
                  int64_t slot, bool is_fetching, float* scores) {
  __m512 acc[R][V];
  each<R * V>([&](auto i) { acc[i / V][i % V] = _mm512_setzero_ps(); });
  for (int64_t i = 0; i < a.e; ++i) {
    __m512 k[V];
    const float* row = keys + i * a.s + slot;
    if (is_fetching) fetch(row + kSlotsAhead, kSlotsAhead);
    each<V>([&](auto v) { k[v] = _mm512_loadu_ps(row + v * kLanes); });
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

// Turns a query's scores into unnormalised weights, which may take their place.
void exponentiate(const float* scores, const float* bias, Range slots, float* weights) {
  __m512 top = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
  for (int64_t i = slots.first; i < slots.end; i += kLanes) {
    __m512 x = _mm512_add_ps(_mm512_loadu_ps(scores + i), _mm512_loadu_ps(bias + i));
    _mm512_storeu_ps(weights + i, x);
    top = _mm512_max_ps(top, x);
  }
  top = _mm512_set1_ps(_mm512_reduce_max_ps(top));
  for (int64_t i = slots.first; i < slots.end; i += kLanes) {
    __m512 x = _mm512_sub_ps(_mm512_loadu_ps(weights + i), top);
    _mm512_storeu_ps(weights + i, exponential(x));
  }
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
// Fetches so many channels of the slots ahead.
//
// Not to be inlined, as above.
template <int R, int V>
[[gnu::noinline]] void mix(const Attention& a, const float* weights, const float* totals,
                const float* values, Range slots, int64_t channel, int64_t num_ahead,
                float* const* out) {
  __m512 acc[R][V];
  each<R * V>([&](auto i) { acc[i / V][i % V] = _mm512_setzero_ps(); });
  for (int64_t i = slots.first; i < slots.end; ++i) {
    __m512 x[V];
    const float* place = values + i * a.e + channel;
    fetch(place + kSlotsAhead * a.e, num_ahead);
    each<V>([&](auto v) { x[v] = _mm512_loadu_ps(place + v * kLanes); });
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

// Writes the scores `[R, s]` of a block's queries over some slots.
template <int R>
void score_block(const Attention& a, const Block& block, Range slots, float* scores) {
  const float* keys = a.keys + (block.b * a.kv_heads + block.h) * a.e * a.s;
  thread_local std::vector<float> queries;
  queries.resize(R * a.e);
  for (int64_t i = 0; i < a.e; ++i) fetch(keys + i * a.s + slots.first, kSlotsAhead);
  for (int r = 0; r < R; ++r) {
    const float* query = a.query(block.b, block.h, block.row + r);
    for (int64_t i = 0; i < a.e; ++i) queries[r * a.e + i] = query[i] * a.scale;
  }

  constexpr int V = R <= kMaxWideQueries ? 4 : 2;
  int64_t slot = slots.first;
  auto is_fetching = [&] {
    return (slot - slots.first) % kSlotsAhead == 0 && slot + kSlotsAhead < slots.end;
  };
  for (; slot + V * kLanes <= slots.end; slot += V * kLanes)
    score<R, V>(a, queries.data(), keys, slot, is_fetching(), scores);
  for (; slot < slots.end; slot += kLanes)
    score<R, 1>(a, queries.data(), keys, slot, is_fetching(), scores);
}

// Writes some channels of a block's results. `weights` is `[R, s]`, and may be `scores`.
template <int R>
void mix_block(const Attention& a, const Block& block, Range channels, const float* scores,
               float* weights) {
  const float* values = a.values + (block.b * a.kv_heads + block.h) * a.s * a.e;
  const Range slots = a.slots[block.b];
  const int64_t num_channels = channels.end - channels.first;
  const int64_t last = std::min(slots.first + kSlotsAhead, slots.end);
  for (int64_t i = slots.first; i < last; ++i)
    fetch(values + i * a.e + channels.first, num_channels);
  float* out[R];
  float totals[R];
  for (int r = 0; r < R; ++r) {
    const int64_t row = block.row + r;
    const float* bias = a.bias + (block.b * a.t + row / a.group()) * a.s;
    exponentiate(scores + r * a.s, bias, slots, weights + r * a.s);
    out[r] = a.result(block.b, block.h, row);
  }
  add_weights<R>(a, weights, slots, totals);

  constexpr int V = R <= kMaxWideQueries ? 4 : 2;
  int64_t channel = channels.first;
  // Later channels find in the cache what the first ones fetched.
  auto num_ahead = [&] { return channel == channels.first ? num_channels : 0; };
  for (; channel + V * kLanes <= channels.end; channel += V * kLanes)
    mix<R, V>(a, weights, totals, values, slots, channel, num_ahead(), out);
  for (; channel + 2 * kLanes <= channels.end; channel += 2 * kLanes)
    mix<R, 2>(a, weights, totals, values, slots, channel, num_ahead(), out);
  for (; channel < channels.end; channel += kLanes)
    mix<R, 1>(a, weights, totals, values, slots, channel, num_ahead(), out);
}

// Calls body(the number of queries, known to the compiler).
template <class Body>
void with_count(int64_t count, Body body) {
  each<kMaxQueries>([&](auto i) {
    if (count == i + 1) body(std::integral_constant<int, i + 1>{});
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

// The part of some vectors that is a thread's.
inline Range part_of(Range all, int64_t part, int64_t parts) {
  const int64_t count = (all.end - all.first) / kLanes;
  return {all.first + count * part / parts * kLanes,
          all.first + count * (part + 1) / parts * kLanes};
}

}  // namespace

int64_t Attention::blocks() const { return (num_rows() + kMaxQueries - 1) / kMaxQueries; }

void find_slots(Attention& a) {
  a.scale = static_cast<float>(1.0 / std::sqrt(static_cast<double>(a.e)));
  a.slots.clear();
  for (int64_t b = 0; b < a.batch; ++b)
    a.slots.push_back(used_slots(a.bias + b * a.t * a.s, a.t, a.s));
}

void divide(Attention& a, int64_t num_threads, Buffer& scores) {
  const int64_t num_vectors = a.e / kLanes, num_blocks = a.num_heads() * a.blocks();
  a.parts = 1;
  for (Range slots : a.slots)
    if (slots.end - slots.first < kMinDividedSlots) return;

  auto idles = [&] {
    const int64_t chunks = num_blocks * a.parts;
    const int64_t rounds = (chunks + num_threads - 1) / num_threads;
    return 4 * rounds * num_threads > 5 * chunks;
  };
  while (idles() && 2 * a.parts <= kMaxParts && num_vectors % (2 * a.parts) == 0)
    a.parts *= 2;
  if (a.parts > 1) a.scores = scores.of<float>(num_blocks * kMaxQueries * a.s);
}

std::vector<Phase> attend(const Attention& a) {
  auto alone = [&a](int64_t chunk) {
    const Block block = block_at(a, chunk);
    thread_local Buffer buffer;
    float* scores = buffer.of<float>(kMaxQueries * a.s);
    with_count(block.count, [&](auto count) {
      score_block<count>(a, block, a.slots[block.b], scores);
      mix_block<count>(a, block, {0, a.e}, scores, scores);
    });
  };
  auto score_part = [&a](int64_t chunk) {
    const Block block = block_at(a, chunk / a.parts);
    float* scores = a.scores + chunk / a.parts * kMaxQueries * a.s;
    const Range slots = part_of(a.slots[block.b], chunk % a.parts, a.parts);
    with_count(block.count,
               [&](auto count) { score_block<count>(a, block, slots, scores); });
  };
  auto mix_part = [&a](int64_t chunk) {
    const Block block = block_at(a, chunk / a.parts);
    const float* scores = a.scores + chunk / a.parts * kMaxQueries * a.s;
    const Range channels = part_of({0, a.e}, chunk % a.parts, a.parts);
    thread_local Buffer buffer;
    float* weights = buffer.of<float>(kMaxQueries * a.s);
    with_count(block.count, [&](auto count) {
      mix_block<count>(a, block, channels, scores, weights);
    });
  };
  const int64_t chunks = a.num_heads() * a.blocks() * a.parts;
  if (a.parts == 1) return {{chunks, alone}};
  return {{chunks, score_part}, {chunks, mix_part}};
}

bool is_large(const Attention& a) {
  int64_t num_slots = 0;
  for (Range slots : a.slots) num_slots += slots.end - slots.first;
  return 2 * num_slots * a.t * a.heads * a.e >= kMinParallelSums;
}

}  // namespace ospec

namespace ffi = xla::ffi;

namespace {

ffi::Error Attend(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> queries,
                  ffi::Buffer<ffi::F32> keys, ffi::Buffer<ffi::F32> values,
                  ffi::Buffer<ffi::F32> bias, ffi::ResultBuffer<ffi::F32> out) {
  auto shape = queries.dimensions();
  ospec::Attention a;
  a.queries = queries.typed_data();
  a.keys = keys.typed_data();
  a.values = values.typed_data();
  a.bias = bias.typed_data();
  a.out = out->typed_data();
  a.batch = shape[0];
  a.t = shape[1];
  a.heads = shape[2];
  a.e = shape[3];
  a.kv_heads = keys.dimensions()[1];
  a.s = keys.dimensions()[3];
  a.row_stride = a.heads * a.e;
  thread_local ospec::Buffer scores;
  ospec::find_slots(a);
  ospec::divide(a, pool.num_threads(), scores);
  ospec::run_phases(pool, ospec::is_large(a), ospec::attend(a));
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
