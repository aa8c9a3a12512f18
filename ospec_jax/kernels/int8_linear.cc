// SPDX-License-Identifier: Apache-2.0
//
// A single int8 product, see int8_product.h; of normed rows where there is a gain.

#include "int8_product.h"
#include "parallel.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

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
