// SPDX-License-Identifier: Apache-2.0
//
// Softmax attention of few queries over a cache, in float32, as phases.
//
// attention.cc has what they do, compiled once for all that include this.

#ifndef OSPEC_JAX_KERNELS_SOFTMAX_ATTENTION_H_
#define OSPEC_JAX_KERNELS_SOFTMAX_ATTENTION_H_

#include <cstdint>
#include <vector>

#include "parallel.h"

namespace ospec {

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
  int64_t parts;  // of a block of queries
  float* scores;  // [heads, blocks, `kMaxQueries`, s] where there are several parts

  int64_t num_heads() const { return batch * kv_heads; }
  int64_t num_rows() const { return t * group(); }
  // Of a key-value head's queries.
  int64_t blocks() const;

  int64_t group() const { return heads / kv_heads; }
  // Where the r-th query of a key-value head lies.
  const float* query(int64_t b, int64_t h, int64_t r) const {
    return queries + (b * t + r / group()) * row_stride + (h * group() + r % group()) * e;
  }
  float* result(int64_t b, int64_t h, int64_t r) const {
    return out + ((b * t + r / group()) * heads + h * group() + r % group()) * e;
  }
};

// Finds out which slots are read. All other fields must be set before.
void find_slots(Attention& a);

// Divides blocks into parts, with slots or channels of their own, where there are so few
// that some thread would have nothing to do for much of the time. No sum depends on it.
// `scores` keeps what parts share for as long as the attention lasts.
void divide(Attention& a, int64_t num_threads, Buffer& scores);

// Attends, a block or a part of one a chunk. `a` must outlive the phases.
std::vector<Phase> attend(const Attention& a);

// Whether attention is worth waking a thread for.
bool is_large(const Attention& a);

}  // namespace ospec

#endif  // OSPEC_JAX_KERNELS_SOFTMAX_ATTENTION_H_
