// SPDX-License-Identifier: Apache-2.0
//
// y = (quantize(x) @ kernel^T) * row_scale * scale: int8 products for few rows, and one by itself.
//
// Decoding reads every weight once for a handful of rows, so a product is as fast as
// memory delivers the kernel, provided that it is read in place and only once. XLA:CPU's
// own int8 products pack the kernel first, at every call.
//
// The dot-product instruction multiplies unsigned by signed bytes, so 128 is added to the
// kernel as it is read (by flipping a bit) and 128 times the sum of x's row taken off
// again. Where the CPU has matrix tiles (AMX), up to 16 rows cost what one does.
//
// All sums are of integers, hence exact in any order: a row's result depends neither on
// the rows beside it, nor on the number of threads, nor on the instructions used.

#include "int8_product.h"

#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>

#include "parallel.h"
#include "vector_math.h"
#include "xla/ffi/api/ffi.h"

namespace ospec {
namespace {

constexpr int64_t kChannels = 16;  // kernel rows whose sums are written together
constexpr int64_t kMaxRows = 8;    // rows of x in one block, whose sums stay in registers
constexpr int64_t kAlign = 64;     // bytes in a vector
// The kernel is fetched ahead into the second cache, and from there into the first one.
// By the first one's own size and lines in flight, a core gets no more than three
// quarters of what memory delivers.
constexpr int64_t kPrefetchBytes = 6144;
constexpr int64_t kNearBytes = 576;
// Bytes of the kernel that a thread claims at a time. They stay in the first cache while
// one block of rows after the other passes over them; a single block needs no such care.
constexpr int64_t kChunkBytes = 16 * 1024;
constexpr int64_t kSingleChunkBytes = 64 * 1024;

// Of many rows, blocks share channels that are packed once for all of them: so nothing is
// to be summed over lanes, and loads are few. Sums of a block stay in registers.
constexpr int64_t kMinPanelRows = 14;
constexpr int64_t kPanelRows = 13;     // rows in one block
constexpr int kPanelVectors = 2;       // vectors of `kChannels` in a panel
constexpr int64_t kPanelsAhead = 2;    // as the next ones are others' to take

constexpr int64_t kMaxTiles = 4;     // tiles of rows in one block
constexpr int64_t kMinTileRows = 3;  // fewer are as fast by vectors
constexpr int64_t kStepsAhead = 4;   // vectors of each channel that are fetched ahead

float largest_magnitude(const float* x, int64_t k) {
  __m512 largest = _mm512_setzero_ps();
  int64_t i = 0;
  for (; i + 16 <= k; i += 16)
    largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_loadu_ps(x + i)));
  __mmask16 rest = static_cast<__mmask16>((1u << (k - i)) - 1);
  largest = _mm512_max_ps(largest, _mm512_abs_ps(_mm512_maskz_loadu_ps(rest, x + i)));
  return _mm512_reduce_max_ps(largest);
}

// x / scale to the nearest integer, ties to even. A product with the reciprocal is several
// times as fast and off by less than 1e-4: it decides unless the quotient is that close to
// a tie.
inline __m512i round_ratio(__m512 x, __m512 scale, __m512 reciprocal) {
  __m512 ratio = _mm512_mul_ps(x, reciprocal);
  __m512i rounded = _mm512_cvtps_epi32(ratio);
  __m512 rest = _mm512_abs_ps(_mm512_sub_ps(ratio, _mm512_cvtepi32_ps(rounded)));
  if (_mm512_cmp_ps_mask(rest, _mm512_set1_ps(0.4999f), _CMP_NLT_UQ))
    return _mm512_cvtps_epi32(_mm512_div_ps(x, scale));
  return rounded;
}

// Rounds a row to `out`, zeros behind it up to `padded_k`, and returns its sum.
int32_t round_row(const float* x, int64_t k, int64_t padded_k, float scale, int8_t* out) {
  const __m512 divisor = _mm512_set1_ps(scale);
  const __m512 reciprocal = _mm512_set1_ps(1.0f / scale);
  __m512i sum = _mm512_setzero_si512();
  for (int64_t i = 0; i < padded_k; i += 16) {
    int64_t left = std::max<int64_t>(k - i, 0);
    __mmask16 mask = left < 16 ? static_cast<__mmask16>((1u << left) - 1) : 0xffff;
    __m512i rounded = round_ratio(_mm512_maskz_loadu_ps(mask, x + i), divisor, reciprocal);
    sum = _mm512_add_epi32(sum, rounded);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + i), _mm512_cvtepi32_epi8(rounded));
  }
  return _mm512_reduce_add_epi32(sum);
}

// Adds the products of R rows with one channel, each in the lanes of a vector.
//
// The channel is read strictly in its order in memory, and the next one behind it, which
// is what hardware prefetchers follow.
template <int R, bool kFirst>
[[gnu::always_inline]] inline void add_products(const Product& p, const int8_t* x,
                                                const int8_t* weights,
                                                __m512i (&sums)[kMaxRows]) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int64_t whole = p.k / kAlign * kAlign;
  __m512i acc[R];
  auto add = [&](int64_t i, __m512i w) __attribute__((always_inline)) {
    w = _mm512_xor_si512(w, flip);
    each<R>([&](auto r) {
      acc[r] = _mm512_dpbusd_epi32(acc[r], w, _mm512_load_si512(x + r * p.padded_k + i));
      // Without this some compilers move all sums elsewhere and back at every vector.
      asm("" : "+v"(acc[r]));
    });
  };
  each<R>([&](auto r) { acc[r] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < whole; i += kAlign) {
    if (kFirst) {
      _mm_prefetch(weights + i + kPrefetchBytes, _MM_HINT_T1);
      _mm_prefetch(weights + i + kNearBytes, _MM_HINT_T0);
    }
    add(i, _mm512_loadu_si512(weights + i));
  }
  if (whole < p.k) {
    const __mmask64 is_real = ~__mmask64{0} >> (kAlign - (p.k - whole));
    add(whole, _mm512_maskz_loadu_epi8(is_real, weights + whole));
  }
  each<R>([&](auto r) { sums[r] = acc[r]; });
  each<kMaxRows - R>([&](auto r) { sums[R + r] = _mm512_setzero_si512(); });
}

// Sums the lanes of eight vectors a, ..., h to {a, b, c, d, e, f, g, h} twice: each half
// of the result holds one half of every sum, in the order abcd, abcd, efgh, efgh.
[[gnu::always_inline]] inline __m512i sum_lanes(const __m512i (&v)[kMaxRows]) {
  auto pair = [](__m512i x, __m512i y) __attribute__((always_inline)) {
    return _mm512_add_epi32(_mm512_unpacklo_epi32(x, y), _mm512_unpackhi_epi32(x, y));
  };
  auto four = [&](__m512i a, __m512i b, __m512i c,
                  __m512i d) __attribute__((always_inline)) {
    const __m512i ab = pair(a, b), cd = pair(c, d);
    return _mm512_add_epi32(_mm512_unpacklo_epi64(ab, cd),
                            _mm512_unpackhi_epi64(ab, cd));
  };
  const __m512i first = four(v[0], v[1], v[2], v[3]);
  const __m512i second = four(v[4], v[5], v[6], v[7]);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x44),
                          _mm512_shuffle_i32x4(first, second, 0xee));
}

// Sums of R rows with two channels: eight of the first, eight of the second.
template <int R, bool kFirst>
[[gnu::always_inline]] inline __m512i two_channels(const Product& p, const int8_t* x,
                                                   const int8_t* weights) {
  __m512i sums[kMaxRows];
  add_products<R, kFirst>(p, x, weights, sums);
  const __m512i first = sum_lanes(sums);
  add_products<R, kFirst>(p, x, weights + p.k, sums);
  const __m512i second = sum_lanes(sums);
  return _mm512_add_epi32(_mm512_shuffle_i32x4(first, second, 0x88),
                          _mm512_shuffle_i32x4(first, second, 0xdd));
}

// Writes a row's sums with 16 channels, scaled.
[[gnu::always_inline]] inline void write_row(const Product& p, __m512i sums, int64_t row,
                                             int64_t channel) {
  const int64_t place = row * p.n + channel;
  __m512 y = _mm512_mul_ps(_mm512_cvtepi32_ps(sums), _mm512_set1_ps(p.row_scale[row]));
  y = _mm512_mul_ps(y, _mm512_loadu_ps(p.scale + channel));
  if (p.residual) y = _mm512_add_ps(_mm512_loadu_ps(p.residual + place), y);
  _mm512_storeu_ps(p.y + place, y);
}

// R rows from `row` on times 16 channels from `channel` on. The first block of rows
// fetches the kernel ahead; the others find it in the cache.
template <int R, bool kFirst>
void block(const Product& p, int64_t row, int64_t channel) {
  constexpr int kPairs = kChannels / 2;
  const int8_t* x = p.x + row * p.padded_k;
  const int8_t* weights = p.kernel + channel * p.k;
  alignas(kAlign) int32_t pairs[kPairs][2 * kMaxRows];
  for (int i = 0; i < kPairs; ++i)
    _mm512_store_si512(pairs[i], two_channels<R, kFirst>(p, x, weights + 2 * i * p.k));

  // From rows within channels to channels within rows, four rows at a time: four channels
  // of each of them in a vector, then all 16 of one.
  each<(R + 3) / 4>([&](auto quarter) {
    const __m512i places = _mm512_add_epi32(
        _mm512_setr_epi32(0, 8, 16, 24, 1, 9, 17, 25, 2, 10, 18, 26, 3, 11, 19, 27),
        _mm512_set1_epi32(4 * quarter));
    auto four = [&](int i) __attribute__((always_inline)) {
      return _mm512_permutex2var_epi32(_mm512_load_si512(pairs[2 * i]), places,
                                       _mm512_load_si512(pairs[2 * i + 1]));
    };
    const __m512i a = four(0), b = four(1), c = four(2), d = four(3);
    const __m512i ab = _mm512_shuffle_i32x4(a, b, 0x44);
    const __m512i cd = _mm512_shuffle_i32x4(c, d, 0x44);
    const __m512i ab2 = _mm512_shuffle_i32x4(a, b, 0xee);
    const __m512i cd2 = _mm512_shuffle_i32x4(c, d, 0xee);
    const __m512i rows[4] = {
        _mm512_shuffle_i32x4(ab, cd, 0x88), _mm512_shuffle_i32x4(ab, cd, 0xdd),
        _mm512_shuffle_i32x4(ab2, cd2, 0x88), _mm512_shuffle_i32x4(ab2, cd2, 0xdd)};
    each<4>([&](auto i) {
      constexpr int r = 4 * decltype(quarter)::value + decltype(i)::value;
      if constexpr (r < R) {
        const __m512i added = _mm512_set1_epi32(128 * p.row_sum[row + r]);
        write_row(p, _mm512_sub_epi32(rows[i], added), row + r, channel);
      }
    });
  });
}

template <bool kFirst>
void block_of(int64_t rows, const Product& p, int64_t row, int64_t channel) {
  each<kMaxRows>([&](auto r) {
    if (rows == r + 1) block<r + 1, kFirst>(p, row, channel);
  });
}

// Turns 16 vectors of 16 numbers: each in its vector's place within the numbers' own.
[[gnu::always_inline]] inline void transpose(__m512i (&v)[kChannels]) {
  __m512i w[kChannels];
  each<kChannels / 2>([&](auto i) {
    w[2 * i] = _mm512_unpacklo_epi32(v[2 * i], v[2 * i + 1]);
    w[2 * i + 1] = _mm512_unpackhi_epi32(v[2 * i], v[2 * i + 1]);
  });
  each<kChannels / 4>([&](auto i) {
    each<2>([&](auto half) {
      const __m512i a = w[4 * i + half], b = w[4 * i + 2 + half];
      v[4 * i + 2 * half] = _mm512_unpacklo_epi64(a, b);
      v[4 * i + 2 * half + 1] = _mm512_unpackhi_epi64(a, b);
    });
  });
  // Four numbers of four vectors lie together now, in quarters.
  each<4>([&](auto i) {
    const __m512i ab = _mm512_shuffle_i32x4(v[i], v[4 + i], 0x44);
    const __m512i ab2 = _mm512_shuffle_i32x4(v[i], v[4 + i], 0xee);
    const __m512i cd = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0x44);
    const __m512i cd2 = _mm512_shuffle_i32x4(v[8 + i], v[12 + i], 0xee);
    w[i] = _mm512_shuffle_i32x4(ab, cd, 0x88);
    w[4 + i] = _mm512_shuffle_i32x4(ab, cd, 0xdd);
    w[8 + i] = _mm512_shuffle_i32x4(ab2, cd2, 0x88);
    w[12 + i] = _mm512_shuffle_i32x4(ab2, cd2, 0xdd);
  });
  each<kChannels>([&](auto i) { v[i] = w[i]; });
}

// Packs 16 channels as `[padded_k / 4, 16, 4]` unsigned bytes, `stride` bytes from four
// columns to the next four.
void pack_channels(const Product& p, int64_t channel, int64_t stride, int8_t* packed) {
  const __m512i flip = _mm512_set1_epi8(static_cast<char>(0x80));
  const int8_t* weights = p.kernel + channel * p.k;
  for (int64_t i = 0; i < p.k; i += kAlign) {
    const int64_t num_missing = std::max<int64_t>(kAlign - (p.k - i), 0);
    const __mmask64 is_real = ~__mmask64{0} >> num_missing;
    __m512i v[kChannels];
    each<kChannels>(
        [&](auto c) { v[c] = _mm512_maskz_loadu_epi8(is_real, weights + c * p.k + i); });
    transpose(v);
    int8_t* out = packed + i / 4 * stride;
    each<kChannels>([&](auto c) {
      _mm512_store_si512(out + c * stride, _mm512_xor_si512(v[c], flip));
    });
  }
}

// R rows from `row` on times C vectors of channels, packed, from `channel` on. Fetches
// what lies `ahead`, `step` bytes with every four columns.
//
// Unless everything is inlined by force some compilers keep the sums in memory.
template <int R, int C>
[[gnu::noinline]] void panel_block(const Product& p, const int8_t* packed, int64_t row,
                                   int64_t channel, const int8_t* ahead, int64_t step) {
#define INLINED __attribute__((always_inline))
  const int8_t* x = p.x + row * p.padded_k;
  __m512i acc[R * C];
  each<R * C>([&](auto i) INLINED { acc[i] = _mm512_setzero_si512(); });
  for (int64_t i = 0; i < p.padded_k; i += 4) {
    __m512i w[C];
    _mm_prefetch(ahead, _MM_HINT_T1);
    ahead += step;
    each<C>([&](auto c) INLINED {
      w[c] = _mm512_load_si512(packed + (i / 4 * C + c) * kAlign);
    });
    each<R>([&](auto r) INLINED {
      int32_t four;
      __builtin_memcpy(&four, x + r * p.padded_k + i, 4);
      const __m512i columns = _mm512_set1_epi32(four);
      each<C>([&](auto c) INLINED {
        constexpr int j = decltype(r)::value * C + decltype(c)::value;
        acc[j] = _mm512_dpbusd_epi32(acc[j], w[c], columns);
        asm("" : "+v"(acc[j]));
      });
    });
  }
  each<R>([&](auto r) INLINED {
    const __m512i added = _mm512_set1_epi32(128 * p.row_sum[row + r]);
    each<C>([&](auto c) INLINED {
      constexpr int j = decltype(r)::value * C + decltype(c)::value;
      write_row(p, _mm512_sub_epi32(acc[j], added), row + r, channel + c * kChannels);
    });
  });
#undef INLINED
}

// All rows times C vectors of channels.
template <int C>
void panel(const Product& p, int64_t channel) {
  thread_local Buffer buffer;
  int8_t* packed = buffer.of<int8_t>(C * kChannels * p.padded_k);
  for (int64_t c = 0; c < C; ++c)
    pack_channels(p, channel + c * kChannels, C * kAlign, packed + c * kAlign);
  const int64_t num_blocks = (p.m + kPanelRows - 1) / kPanelRows;
  // Each block fetches its share of a later panel.
  const int64_t bytes = C * kChannels * p.k;
  const int8_t* later = p.kernel + channel * p.k + kPanelsAhead * bytes;
  const int64_t step = 4 * C * kChannels / num_blocks;
  for (int64_t i = 0; i < num_blocks; ++i) {
    const int64_t row = p.m * i / num_blocks, count = p.m * (i + 1) / num_blocks - row;
    // Blocks of so many rows differ by one at most: none has less than half of the most.
    each<kPanelRows - kMinPanelRows / 2 + 1>([&](auto r) {
      constexpr int R = decltype(r)::value + kMinPanelRows / 2;
      if (count != R) return;
      panel_block<R, C>(p, packed, row, channel, later + i * bytes / num_blocks, step);
    });
  }
}

// Channels from `begin` on by panels; returns where it stopped for want of whole vectors.
int64_t panelled_channels(const Product& p, int64_t begin, int64_t end) {
  constexpr int64_t kWide = kPanelVectors * kChannels;
  for (; begin + kWide <= end; begin += kWide) panel<kPanelVectors>(p, begin);
  for (; begin + kChannels <= end; begin += kChannels) panel<1>(p, begin);
  return begin;
}

// The kernel's rows that are no whole block.
void channels_left(const Product& p, int64_t begin, int64_t end) {
  for (int64_t channel = begin; channel < end; ++channel)
    for (int64_t row = 0; row < p.m; ++row) {
      const int8_t *x = p.x + row * p.padded_k, *w = p.kernel + channel * p.k;
      int32_t sum = 0;
      for (int64_t i = 0; i < p.k; ++i) sum += static_cast<int32_t>(x[i]) * w[i];
      float y = static_cast<float>(sum) * p.row_scale[row] * p.scale[channel];
      int64_t place = row * p.n + channel;
      p.y[place] = p.residual ? p.residual[place] + y : y;
    }
}

#ifdef __AMX_INT8__

// Which registers of tiles hold what: sums 0 to 3, the kernel 4 and 5, x 6 and 7.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t bytes[16] = {};
  uint8_t rows[16] = {};

  explicit TileConfig(int64_t width) {
    for (int i = 0; i < 8; ++i) {
      bytes[i] = i == 4 || i == 5 ? 64 : 4 * width;
      rows[i] = kTile;
    }
  }
};

// Linux gives a process tiles when it asks for them.
bool may_use_tiles() {
  constexpr int kRequest = 0x1023, kTileData = 18;
  static const bool is_granted = syscall(SYS_arch_prctl, kRequest, kTileData) == 0;
  return is_granted;
}

// Writes `count` rows of 16 channels; `sums` is [16 channels, 16 rows].
inline void write_tile(const Product& p, const int32_t* sums, int64_t row, int64_t count,
                       int64_t channel) {
  const __m512i places = _mm512_mullo_epi32(
      _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0),
      _mm512_set1_epi32(kTile));
  __m512 scale = _mm512_loadu_ps(p.scale + channel);
  for (int64_t r = 0; r < count; ++r) {
    __m512 total = _mm512_cvtepi32_ps(_mm512_i32gather_epi32(places, sums + r, 4));
    __m512 y = _mm512_mul_ps(total, _mm512_set1_ps(p.row_scale[row + r]));
    y = _mm512_mul_ps(y, scale);
    int64_t place = (row + r) * p.n + channel;
    if (p.residual) y = _mm512_add_ps(_mm512_loadu_ps(p.residual + place), y);
    _mm512_storeu_ps(p.y + place, y);
  }
}

// Puts four columns of each of four rows side by side, as a tile wants them:
// [rows, k] becomes [k / 4, rows, 4].
void pack_rows(const Product& p, int64_t first, int8_t* packed) {
  int8_t* out = packed + first / kTile * p.k * p.width + first % kTile * 4;
  const int8_t* rows[4];
  for (int64_t i = 0; i < 4; ++i)
    // Rows beyond the last are multiplied like others, but written nowhere.
    rows[i] = p.x + std::min(first + i, p.m - 1) * p.padded_k;
  auto load = [](const int8_t* x) {
    return _mm_load_si128(reinterpret_cast<const __m128i*>(x));
  };
  for (int64_t k = 0; k < p.k; k += 16) {
    __m128i a = load(rows[0] + k), b = load(rows[1] + k);
    __m128i c = load(rows[2] + k), d = load(rows[3] + k);
    __m128i ab = _mm_unpacklo_epi32(a, b), ab2 = _mm_unpackhi_epi32(a, b);
    __m128i cd = _mm_unpacklo_epi32(c, d), cd2 = _mm_unpackhi_epi32(c, d);
    __m128i words[4] = {_mm_unpacklo_epi64(ab, cd), _mm_unpackhi_epi64(ab, cd),
                        _mm_unpacklo_epi64(ab2, cd2), _mm_unpackhi_epi64(ab2, cd2)};
    for (int64_t i = 0; i < 4; ++i)
      _mm_storeu_si128(reinterpret_cast<__m128i*>(out + (k + 4 * i) * p.width), words[i]);
  }
}

// The rows as tiles read them, [tiles, k / 64, 16, width, 4]. Each thread packs them for
// itself, at its first channels of a product: that takes less time than the lines of
// memory would that several threads write to.
const int8_t* packed_rows(const Product& p) {
  thread_local Buffer buffer;
  thread_local int64_t number = -1;
  const int64_t num_tiles = (p.m + kTile - 1) / kTile;
  int8_t* packed = buffer.of<int8_t>(num_tiles * p.width * p.k);
  if (number != p.number)
    for (int64_t row = 0; row < p.m; row += 4) pack_rows(p, row, packed);
  number = p.number;
  return packed;
}

// 16 channels by up to 16 rows. Even and odd parts of the sums go to registers of their
// own, so that one product need not wait for the one before it.
void one_tile(const Product& p, const int8_t* packed, int64_t channel) {
  const int8_t* kernel = p.kernel + channel * p.k;
  const int64_t stride = 4 * p.width, bytes = kTile * stride;
  const int64_t steps = p.k / kAlign;
  alignas(64) int32_t even[kTile * kTile], odd[kTile * kTile];
  _tile_zero(0);
  _tile_zero(1);
  for (int64_t i = 0; i < steps; ++i) {
    // Fetched in the order in which it is read, over the end of these 16 channels.
    const int64_t next = i + kStepsAhead;
    const int8_t* ahead =
        kernel + next * kAlign + (next < steps ? 0 : (kTile - 1) * p.k);
    for (int64_t c = 0; c < kTile; ++c) _mm_prefetch(ahead + c * p.k, _MM_HINT_T0);
    const int8_t* x = packed + i * bytes;
    if (i % 2 == 0) {
      _tile_loadd(4, kernel + i * kAlign, p.k);
      _tile_loadd(6, x, stride);
      _tile_dpbssd(0, 4, 6);
    } else {
      _tile_loadd(5, kernel + i * kAlign, p.k);
      _tile_loadd(7, x, stride);
      _tile_dpbssd(1, 5, 7);
    }
  }
  _tile_stored(0, even, 4 * kTile);
  _tile_stored(1, odd, 4 * kTile);
  for (int64_t i = 0; i < kTile * kTile; i += kTile)
    _mm512_store_si512(even + i, _mm512_add_epi32(_mm512_load_si512(even + i),
                                                  _mm512_load_si512(odd + i)));
  write_tile(p, even, 0, p.m, channel);
}

// 16 channels by T tiles of 16 rows.
template <int T>
void some_tiles(const Product& p, const int8_t* packed, int64_t tile, int64_t channel) {
  const int8_t* kernel = p.kernel + channel * p.k;
  const int64_t bytes = 4 * kTile * kTile, tile_bytes = p.k / kAlign * bytes;
  const int8_t* x = packed + tile * tile_bytes;
  alignas(64) int32_t sums[kTile * kTile];
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int64_t i = 0; i < p.k / kAlign; ++i) {
    _tile_loadd(4, kernel + i * kAlign, p.k);
    _tile_loadd(6, x + i * bytes, 4 * kTile);
    _tile_dpbssd(0, 4, 6);
    if (T > 1) {
      _tile_loadd(7, x + tile_bytes + i * bytes, 4 * kTile);
      _tile_dpbssd(1, 4, 7);
    }
    if (T > 2) {
      _tile_loadd(6, x + 2 * tile_bytes + i * bytes, 4 * kTile);
      _tile_dpbssd(2, 4, 6);
    }
    if (T > 3) {
      _tile_loadd(7, x + 3 * tile_bytes + i * bytes, 4 * kTile);
      _tile_dpbssd(3, 4, 7);
    }
  }
  for (int64_t t = 0; t < T; ++t) {
    if (t == 0) _tile_stored(0, sums, 4 * kTile);
    if (t == 1) _tile_stored(1, sums, 4 * kTile);
    if (t == 2) _tile_stored(2, sums, 4 * kTile);
    if (t == 3) _tile_stored(3, sums, 4 * kTile);
    int64_t row = (tile + t) * kTile;
    write_tile(p, sums, row, std::min(kTile, p.m - row), channel);
  }
}

// Channels from `begin` on by tiles; returns where it stopped for want of whole tiles.
int64_t tiled_channels(const Product& p, int64_t begin, int64_t end) {
  const int8_t* packed = packed_rows(p);
  const TileConfig config(p.width);
  const int64_t num_tiles = (p.m + kTile - 1) / kTile;
  const int64_t whole = begin + (end - begin) / kTile * kTile;
  _tile_loadconfig(&config);
  for (int64_t tile = 0; tile < num_tiles; tile += kMaxTiles)
    for (int64_t channel = begin; channel < whole; channel += kTile) {
      if (num_tiles == 1) one_tile(p, packed, channel);
      else switch (num_tiles - tile) {
        case 1: some_tiles<1>(p, packed, tile, channel); break;
        case 2: some_tiles<2>(p, packed, tile, channel); break;
        case 3: some_tiles<3>(p, packed, tile, channel); break;
        default: some_tiles<4>(p, packed, tile, channel);
      }
    }
  _tile_release();
  return whole;
}

#else

bool may_use_tiles() { return false; }

int64_t tiled_channels(const Product& p, int64_t begin, int64_t end) { return begin; }

#endif

void channels(const Product& p, int64_t begin, int64_t end) {
  if (p.has_tiles)
    begin = tiled_channels(p, begin, end);
  else if (p.m >= kMinPanelRows)
    begin = panelled_channels(p, begin, end);
  int64_t num_blocks = (p.m + kMaxRows - 1) / kMaxRows;
  int64_t whole = begin + (end - begin) / kChannels * kChannels;
  for (int64_t i = 0; i < num_blocks; ++i) {
    int64_t row = p.m * i / num_blocks, count = p.m * (i + 1) / num_blocks - row;
    for (int64_t channel = begin; channel < whole; channel += kChannels)
      i ? block_of<false>(count, p, row, channel) : block_of<true>(count, p, row, channel);
  }
  channels_left(p, whole, end);
}

}  // namespace

void allocate(Product& p, ProductScratch& scratch) {
  p.padded_k = (p.k + kAlign - 1) / kAlign * kAlign;
  p.has_tiles =
      p.has_tiles && p.m >= kMinTileRows && p.k % kAlign == 0 && may_use_tiles();
  p.width = p.m > kTile ? kTile : (p.m + 3) / 4 * 4;
  static std::atomic<int64_t> number{0};
  p.number = number.fetch_add(1);
  p.x = scratch.x.of<int8_t>(p.m * p.padded_k);
  p.row_scale = scratch.row_scale.of<float>(p.m);
  p.row_sum = scratch.row_sum.of<int32_t>(p.m);
}

void quantize_row(const Product& p, int64_t row, const float* x) {
  float largest = largest_magnitude(x, p.k);
  p.row_scale[row] = std::max(largest, 1e-12f) * (1.0f / 127.0f);
  p.row_sum[row] =
      round_row(x, p.k, p.padded_k, p.row_scale[row], p.x + row * p.padded_k);
}

Phase multiply(const Product& p) {
  const int64_t most = p.has_tiles ? kTile * kMaxTiles : kMaxRows;
  const int64_t bytes = p.m > most ? kChunkBytes : kSingleChunkBytes;
  const bool has_panels = !p.has_tiles && p.m >= kMinPanelRows;
  const int64_t unit = has_panels ? kPanelVectors * kChannels : kChannels;
  const int64_t per_chunk = std::max<int64_t>(1, bytes / p.k / unit) * unit;
  auto run = [&p, per_chunk](int64_t chunk) {
    channels(p, chunk * per_chunk, std::min((chunk + 1) * per_chunk, p.n));
  };
  return {(p.n + per_chunk - 1) / per_chunk, run};
}

}  // namespace ospec

namespace ffi = xla::ffi;

namespace {

// Of normed rows where there is a gain.
ffi::Error Int8Linear(ffi::ThreadPool pool, float eps, bool has_tiles,
                      ffi::Buffer<ffi::F32> x, ffi::Buffer<ffi::S8> kernel,
                      ffi::Buffer<ffi::F32> scale, ffi::Buffer<ffi::F32> gain,
                      ffi::ResultBuffer<ffi::F32> y) {
  thread_local ospec::ProductScratch scratch;
  ospec::Product p;
  p.m = x.dimensions()[0];
  p.k = x.dimensions()[1];
  p.n = kernel.dimensions()[0];
  p.kernel = kernel.typed_data();
  p.scale = scale.typed_data();
  p.residual = nullptr;
  p.y = y->typed_data();
  p.has_tiles = has_tiles;
  ospec::allocate(p, scratch);
  const float* own_gain = gain.element_count() ? gain.typed_data() : nullptr;
  auto rows = ospec::normed_rows(x.typed_data(), own_gain, eps, p.k);
  ospec::run_phases(pool, ospec::is_large(p),
                    {ospec::quantize(p, rows), ospec::multiply(p)});
  return ffi::Error::Success();
}

}  // namespace

XLA_FFI_DEFINE_HANDLER_SYMBOL(OspecInt8Linear, Int8Linear,
                              ffi::Ffi::Bind()
                                  .Ctx<ffi::ThreadPool>()
                                  .Attr<float>("eps")
                                  .Attr<bool>("has_tiles")
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::S8>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Arg<ffi::Buffer<ffi::F32>>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
