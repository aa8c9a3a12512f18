// SPDX-License-Identifier: Apache-2.0
//
// Functions of 16 numbers at a time, and of rows of them.

#ifndef OSPEC_JAX_KERNELS_VECTOR_MATH_H_
#define OSPEC_JAX_KERNELS_VECTOR_MATH_H_

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <type_traits>
#include <utility>

namespace ospec {

template <class Body, int... I>
[[gnu::always_inline]] inline void each_of(Body body, std::integer_sequence<int, I...>) {
  (body(std::integral_constant<int, I>{}), ...);
}

// Calls body(0) to body(N - 1), written out. A loop that the compiler unrolls late would
// leave arrays of sums in memory instead of in registers.
template <int N, class Body>
[[gnu::always_inline]] inline void each(Body body) {
  each_of(body, std::make_integer_sequence<int, N>{});
}

constexpr int64_t kLanes = 16;

// Which lanes hold numbers when so many are left.
inline __mmask16 lanes_of(int64_t left) {
  return left < kLanes ? static_cast<__mmask16>((1u << left) - 1) : __mmask16{0xffff};
}

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

// Writes x / sqrt(mean(x^2) + eps) * gain, for a row of k numbers; `out` may be `x`.
inline void rms_norm(const float* x, const float* gain, float eps, int64_t k, float* out) {
  __m512 squares = _mm512_setzero_ps();
  for (int64_t i = 0; i < k; i += kLanes) {
    __m512 v = _mm512_maskz_loadu_ps(lanes_of(k - i), x + i);
    squares = _mm512_add_ps(squares, _mm512_mul_ps(v, v));
  }
  float mean = _mm512_reduce_add_ps(squares) / static_cast<float>(k);
  const __m512 factor = _mm512_set1_ps(1.0f / std::sqrt(mean + eps));
  for (int64_t i = 0; i < k; i += kLanes) {
    __mmask16 lanes = lanes_of(k - i);
    __m512 v = _mm512_mul_ps(_mm512_maskz_loadu_ps(lanes, x + i), factor);
    v = _mm512_mul_ps(v, _mm512_maskz_loadu_ps(lanes, gain + i));
    _mm512_mask_storeu_ps(out + i, lanes, v);
  }
}

// Writes silu(gate) * up, for a row of k numbers.
inline void swiglu(const float* gate, const float* up, int64_t k, float* out) {
  const __m512 one = _mm512_set1_ps(1.0f);
  for (int64_t i = 0; i < k; i += kLanes) {
    __mmask16 lanes = lanes_of(k - i);
    __m512 x = _mm512_maskz_loadu_ps(lanes, gate + i);
    // Of a number far from zero only this exponential cannot overflow.
    __m512 e = exponential(_mm512_sub_ps(_mm512_setzero_ps(), _mm512_abs_ps(x)));
    __mmask16 is_negative = _mm512_cmp_ps_mask(x, _mm512_setzero_ps(), _CMP_LT_OQ);
    __m512 top = _mm512_mask_mov_ps(one, is_negative, e);
    __m512 silu = _mm512_mul_ps(x, _mm512_div_ps(top, _mm512_add_ps(one, e)));
    __m512 y = _mm512_mul_ps(silu, _mm512_maskz_loadu_ps(lanes, up + i));
    _mm512_mask_storeu_ps(out + i, lanes, y);
  }
}

// Turns a head of e numbers: each in its first half with its partner in the second.
inline void rotate(const float* x, const float* cos, const float* sin, int64_t e,
                   float* out) {
  const int64_t half = e / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    __mmask16 lanes = lanes_of(half - i);
    auto load = [lanes](const float* from) { return _mm512_maskz_loadu_ps(lanes, from); };
    __m512 a = load(x + i), b = load(x + half + i);
    __m512 first = _mm512_sub_ps(_mm512_mul_ps(a, load(cos + i)),
                                 _mm512_mul_ps(b, load(sin + i)));
    __m512 second = _mm512_add_ps(_mm512_mul_ps(b, load(cos + half + i)),
                                  _mm512_mul_ps(a, load(sin + half + i)));
    _mm512_mask_storeu_ps(out + i, lanes, first);
    _mm512_mask_storeu_ps(out + half + i, lanes, second);
  }
}

}  // namespace ospec

#endif  // OSPEC_JAX_KERNELS_VECTOR_MATH_H_
