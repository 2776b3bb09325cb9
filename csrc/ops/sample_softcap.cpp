// The operator under `softcapped_logits` on a GPU (dflash_ext/ops/softcap.py).
#include "common/tensor.h"
#include "sample/kernels.h"

namespace dflash {
namespace {

constexpr const char* kOp = "softcapped_logits";

// The logits are overwritten: bfloat16 and float16 by float16 numbers, float32 by float32.
void run_softcap([[maybe_unused]] Tensor logits, [[maybe_unused]] double softcap) {
#ifdef DFLASH_EXT_CUDA
  check(logits.is_contiguous(), kOp, ": the logits must be contiguous");
  check(softcap > 0, kOp, ": softcap is ", softcap, "; a number above 0 is needed");
  const SoftcapParams p{dtype_of(kOp, "logits", logits), logits.numel(), logits.data_ptr(), float(softcap)};
  if (p.count == 0) return;
  const CudaScope cuda(logits);
  check_launch(kOp, softcap_sm80(p, cuda.stream()));
#else
  fail(kOp, ": this build has no CUDA kernel for it (`dflash-ext doctor` shows what was built)");
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(dflash_ext, m) { m.def("softcap_(Tensor(a!) logits, float softcap) -> ()"); }

STABLE_TORCH_LIBRARY_IMPL(dflash_ext, CUDA, m) { m.impl("softcap_", TORCH_BOX(&run_softcap)); }

}  // namespace dflash
