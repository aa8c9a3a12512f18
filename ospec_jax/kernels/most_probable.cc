// SPDX-License-Identifier: Apache-2.0
//
// The most probable entries of rows of logits, with their log-probabilities.
//
// A row is read twice: for its largest entries, and for the sum of its exponentials, lane
// by lane in the order of the row.

#include <algorithm>
#include <cmath>
#include <cstdint>

#include "parallel.h"
#include "vector_math.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kMinParallelEntries = 200000;  // entries worth waking a thread for

// Puts an entry behind those that are not smaller, and drops the last.
void insert(float x, int32_t id, int64_t last, float* values, int32_t* ids) {
  int64_t place = last;
  for (; place > 0 && x > values[place - 1]; --place) {
    values[place] = values[place - 1];
    ids[place] = ids[place - 1];
  }
  values[place] = x;
  ids[place] = id;
}

// The largest entries in falling order; of equal ones the first come first.
void find_largest(const float* x, int64_t n, int64_t count, float* values, int32_t* ids) {
  for (int64_t i = 0; i < count; ++i) insert(x[i], i, i, values, ids);
  for (int64_t i = count; i < n; i += ospec::kLanes) {
    const __mmask16 lanes = ospec::lanes_of(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    const __m512 least = _mm512_set1_ps(values[count - 1]);
    unsigned is_larger = _mm512_mask_cmp_ps_mask(lanes, v, least, _CMP_GT_OQ);
    for (; is_larger; is_larger &= is_larger - 1) {
      const int64_t place = i + __builtin_ctz(is_larger);
      if (x[place] > values[count - 1]) insert(x[place], place, count - 1, values, ids);
    }
  }
}

// log(sum(exp(x))) of a row whose largest entry is `top`.
float log_sum(const float* x, int64_t n, float top) {
  __m512 sums = _mm512_setzero_ps();
  for (int64_t i = 0; i < n; i += ospec::kLanes) {
    const __mmask16 lanes = ospec::lanes_of(n - i);
    const __m512 v = _mm512_maskz_loadu_ps(lanes, x + i);
    const __m512 weights = ospec::exponential(_mm512_sub_ps(v, _mm512_set1_ps(top)));
    sums = _mm512_mask_add_ps(sums, lanes, sums, weights);
  }
  return top + std::log(_mm512_reduce_add_ps(sums));
}

ffi::Error MostProbable(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> logits,
                        ffi::ResultBuffer<ffi::F32> log_probs,
                        ffi::ResultBuffer<ffi::S32> ids) {
  const int64_t rows = logits.dimensions()[0], n = logits.dimensions()[1];
  const int64_t count = ids->dimensions()[1];
  const float* x = logits.typed_data();
  float* values = log_probs->typed_data();
  int32_t* places = ids->typed_data();
  auto run = [=](int64_t row) {
    float* own = values + row * count;
    find_largest(x + row * n, n, count, own, places + row * count);
    const float total = log_sum(x + row * n, n, own[0]);
    for (int64_t i = 0; i < count; ++i) own[i] -= total;
  };
  ospec::run_phases(pool, rows * n >= kMinParallelEntries, {{rows, run}});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OspecMostProbable, MostProbable,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::S32>>());
