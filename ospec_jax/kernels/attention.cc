// SPDX-License-Identifier: Apache-2.0
//
// Attention alone, see softmax_attention.h.

#include "parallel.h"
#include "softmax_attention.h"
#include "xla/ffi/api/ffi.h"

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
