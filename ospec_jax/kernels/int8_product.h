// SPDX-License-Identifier: Apache-2.0
//
// y = (quantize(x) @ kernel^T) * row_scale * scale: int8 products for few rows, as phases.
//
// int8_linear.cc has what they do, compiled once for all that include this.

#ifndef OSPEC_JAX_KERNELS_INT8_PRODUCT_H_
#define OSPEC_JAX_KERNELS_INT8_PRODUCT_H_

#include <algorithm>
#include <cstdint>

#include "parallel.h"
#include "vector_math.h"

namespace ospec {

constexpr int64_t kTile = 16;  // rows and channels of a tile
constexpr int64_t kMinParallel = 1500000;  // multiplications worth waking a thread for

struct Product {
  int8_t* x;               // [m, padded_k], zeros in the padding
  int64_t number;          // of this product alone
  const int8_t* kernel;    // [n, k]
  const float* scale;      // [n]
  const float* residual;   // [m, n], added to the product; or null
  float* y;                // [m, n]
  int64_t m, n, k, padded_k;
  bool has_tiles;
  int64_t width;           // rows in a tile of x
  float* row_scale;        // [m]
  int32_t* row_sum;        // [m]
};

// Memory of a product beside its arguments and result.
struct ProductScratch {
  Buffer x, row_scale, row_sum;
};

// Fills in what follows from a product's shape.
void allocate(Product& p, ProductScratch& scratch);

// Rounds a row of k numbers to its place, with its scale and sum.
void quantize_row(const Product& p, int64_t row, const float* x);

// Multiplies the quantised rows, some channels a chunk. The product must outlive the phase.
Phase multiply(const Product& p);

// Quantises the rows, one or a few a chunk.
//
// `make_row(row, place)` says where a row of k numbers lies: in memory of its own, or in
// the place for k numbers that it is offered. The product must outlive the phase.
template <class MakeRow>
Phase quantize(const Product& p, MakeRow make_row) {
  const int64_t per_chunk = p.m > kTile ? 4 : 1;
  auto run = [&p, make_row, per_chunk](int64_t chunk) {
    thread_local Buffer buffer;
    float* place = buffer.of<float>(p.k);
    const int64_t end = std::min((chunk + 1) * per_chunk, p.m);
    for (int64_t row = chunk * per_chunk; row < end; ++row)
      quantize_row(p, row, make_row(row, place));
  };
  return {(p.m + per_chunk - 1) / per_chunk, run};
}

// For `quantize`: rows of k numbers one after the other, normed; as they are where there
// is no gain.
inline auto normed_rows(const float* rows, const float* gain, float eps, int64_t k) {
  return [=](int64_t row, float* place) -> const float* {
    if (!gain) return rows + row * k;
    rms_norm(rows + row * k, gain, eps, k, place);
    return place;
  };
}

// Whether a product is worth waking a thread for.
inline bool is_large(const Product& p) { return p.m * p.n * p.k >= kMinParallel; }

}  // namespace ospec

#endif  // OSPEC_JAX_KERNELS_INT8_PRODUCT_H_
