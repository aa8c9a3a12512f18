// SPDX-License-Identifier: Apache-2.0
//
// y = (quantize(x) @ kernel^T) * row_scale * scale: int8 products for few rows.
//
// Decoding reads every weight once for a handful of rows, so a product is as fast as
// memory delivers the kernel, provided that it is read in place and only once. XLA:CPU's
// own int8 products pack the kernel first, at every call.
//
// The dot-product instruction multiplies unsigned by signed bytes, so 128 is added to the
// kernel as it is read (by flipping a bit) and 128 times the sum of x's row taken off
// again. All sums are of integers, hence exact in any order: a row's result depends
// neither on the rows beside it nor on the number of threads.

#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

constexpr int64_t kChannels = 4;  // kernel rows in one block
constexpr int64_t kMaxRows = 4;   // rows of x in one block; the sums stay in registers
constexpr int64_t kAlign = 64;    // bytes in a vector
// Blocks read several short runs of memory, which no hardware prefetcher follows.
constexpr int64_t kPrefetchBytes = 4096;
// Bytes of the kernel that a thread claims at a time. They stay in the first cache while
// one block of rows after the other passes over them; a single block needs no such care.
constexpr int64_t kChunkBytes = 16 * 1024;
constexpr int64_t kSingleChunkBytes = 64 * 1024;
constexpr int64_t kMinParallel = 1500000;   // multiplications worth waking a thread for

struct Product {
  const int8_t* x;         // [m, padded_k], zeros in the padding
  const int8_t* kernel;    // [n, k]
  const float* scale;      // [n]
  float* y;                // [m, n]
  int64_t m, n, k, padded_k;
  std::vector<int8_t> x_storage;
  std::vector<float> row_scale;  // [m]
  std::vector<int32_t> row_sum;  // [m]
};

// Sums the lanes of four vectors: {sum a, sum b, sum c, sum d}.
inline __m128i sum_lanes(__m512i a, __m512i b, __m512i c, __m512i d) {
  __m512i ab = _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
  __m512i cd = _mm512_add_epi32(_mm512_unpacklo_epi32(c, d), _mm512_unpackhi_epi32(c, d));
  __m512i all =
      _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd), _mm512_unpackhi_epi64(ab, cd));
  __m256i half = _mm256_add_epi32(_mm512_castsi512_si256(all),
                                  _mm512_extracti64x4_epi64(all, 1));
  return _mm_add_epi32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
}

float largest_magnitude(const float* x, int64_t k) {
  __m512 largest = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= k; i += 16)
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  __mmask16 rest = static_cast<__mmask16>((1u << (k - i)) - 1);
  largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(rest, x + i)));
  return _mm512_reduce_max_ps(largest);
}

int32_t round_row(const float* x, int64_t k, float scale, int8_t* out) {
  const __m512 divisor = _mm512_set1_ps(scale);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < k; i += 16) {
    int64_t left = k - i;
    __mmask16 mask = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : 0xffff;
    __m512 ratio = _mm512_div_ps(_mm512_maskz_loadu_ps(mask, x + i), divisor);
    // The conversion rounds to nearest, ties to even.
    __m512i rounded = _mm512_cvtps_epi32(ratio);
    sum = _mm512_add_epi32(sum, rounded);
    _mm_mask_storeu_epi8(out + i, mask, _mm512_cvtepi32_epi8(rounded));
  }
  return _mm512_reduce_add_epi32(sum);
}

// R rows from `row` on times four channels from `channel` on. The first block of rows
// fetches the kernel ahead; the others find it in the cache.
template <int R, bool kFirst>
void block(const Product& p, int64_t row, int64_t channel) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int8_t* x = p.x + row * p.padded_k;
  const int8_t* kernel = p.kernel + channel * p.k;
  __m512i acc[R][kChannels];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) acc[r][c] = _mm512_setzero_si512();
  for (int64_t i = 0; i < p.k; i += kAlign) {
    int64_t left = p.k - i;
    __mmask64 mask = ~__mmask64{0} >> (left < kAlign ? kAlign - left : 0);
    __m512i w[kChannels];
#pragma GCC unroll 8
    for (int c = 0; c < kChannels; ++c) {
      if (kFirst)
        _mm_prefetch(kernel + kChannels * i + kAlign * c + kPrefetchBytes, _MM_HINT_T0);
      w[c] = _mm512_xor_si512(_mm512_maskz_loadu_epi8(mask, kernel + c * p.k + i), flip);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      __m512i values = _mm512_load_si512(x + r * p.padded_k + i);
#pragma GCC unroll 8
      for (int c = 0; c < kChannels; ++c)
        acc[r][c] = _mm512_dpbusd_epi32(acc[r][c], w[c], values);
    }
  }
  __m128 scale = _mm_loadu_ps(p.scale + channel);
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
    __m128i total = sum_lanes(acc[r][0], acc[r][1], acc[r][2], acc[r][3]);
    total = _mm_sub_epi32(total, _mm_set1_epi32(128 * p.row_sum[row + r]));
    __m128 y = _mm_mul_ps(_mm_cvtepi32_ps(total), _mm_set1_ps(p.row_scale[row + r]));
    _mm_storeu_ps(p.y + (row + r) * p.n + channel, _mm_mul_ps(y, scale));
  }
}

template <bool kFirst>
void block_of(int64_t rows, const Product& p, int64_t row, int64_t channel) {
  switch (rows) {
    case 1: return block<1, kFirst>(p, row, channel);
    case 2: return block<2, kFirst>(p, row, channel);
    case 3: return block<3, kFirst>(p, row, channel);
    default: return block<4, kFirst>(p, row, channel);
  }
}

// The kernel's rows that are no whole block.
void channels_left(const Product& p, int64_t begin, int64_t end) {
  for (int64_t channel = begin; channel < end; ++channel)
    for (int64_t row = 0; row < p.m; ++row) {
      const int8_t *x = p.x + row * p.padded_k, *w = p.kernel + channel * p.k;
      int32_t sum = 0;
      for (int64_t i = 0; i < p.k; ++i) sum += static_cast<int32_t>(x[i]) * w[i];
      p.y[row * p.n + channel] =
          static_cast<float>(sum) * p.row_scale[row] * p.scale[channel];
    }
}

void channels(const Product& p, int64_t begin, int64_t end) {
  int64_t num_blocks = (p.m + kMaxRows - 1) / kMaxRows;
  int64_t whole = begin + (end - begin) / kChannels * kChannels;
  for (int64_t i = 0; i < num_blocks; ++i) {
    int64_t row = p.m * i / num_blocks, count = p.m * (i + 1) / num_blocks - row;
    for (int64_t channel = begin; channel < whole; channel += kChannels)
      i ? block_of<false>(count, p, row, channel) : block_of<true>(count, p, row, channel);
  }
  channels_left(p, whole, end);
}

void quantize(Product& p, const float* x) {
  p.x_storage.assign(p.m * p.padded_k + kAlign, 0);
  p.row_scale.resize(p.m);
  p.row_sum.resize(p.m);
  auto address = reinterpret_cast<uintptr_t>(p.x_storage.data());
  int8_t* out = p.x_storage.data() + (kAlign - address % kAlign) % kAlign;
  p.x = out;
  for (int64_t row = 0; row < p.m; ++row) {
    float largest = largest_magnitude(x + row * p.k, p.k);
    p.row_scale[row] = std::max(largest, 1e-12f) * (1.0f / 127.0f);
    p.row_sum[row] =
        round_row(x + row * p.k, p.k, p.row_scale[row], out + row * p.padded_k);
  }
}

ffi::Error Int8Linear(ffi::ThreadPool pool, ffi::Buffer<ffi::F32> x,
                      ffi::Buffer<ffi::S8> kernel, ffi::Buffer<ffi::F32> scale,
                      ffi::ResultBuffer<ffi::F32> y) {
  Product p;
  p.m = x.dimensions()[0];
  p.k = x.dimensions()[1];
  p.n = kernel.dimensions()[0];
  p.padded_k = (p.k + kAlign - 1) / kAlign * kAlign;
  p.kernel = kernel.typed_data();
  p.scale = scale.typed_data();
  p.y = y->typed_data();
  quantize(p, x.typed_data());
  int64_t bytes = p.m > kMaxRows ? kChunkBytes : kSingleChunkBytes;
  int64_t per_chunk = std::max<int64_t>(1, bytes / p.k / kChannels) * kChannels;
  auto run = [&p, per_chunk](int64_t chunk) {
    channels(p, chunk * per_chunk, std::min((chunk + 1) * per_chunk, p.n));
  };
  bool is_parallel = p.m * p.n * p.k >= kMinParallel;
  ospec::share(pool, (p.n + per_chunk - 1) / per_chunk, is_parallel, run);
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OspecInt8Linear, Int8Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
