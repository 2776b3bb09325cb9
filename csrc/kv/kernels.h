// The launcher of the kv family's CUDA kernel. It returns null, or CUDA's error message.
#pragma once

#include "kv/params.h"

namespace dflash {

// The longest head that the kernel serves.
constexpr int64_t kMaxKvHeadDim = 512;

const char* kv_write_sm80(const KvWriteParams& params, void* stream);

}  // namespace dflash
