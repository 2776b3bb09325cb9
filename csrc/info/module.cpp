// dflash_ext._C: facts about the build and its kernels. No tensor ever comes here, and no operator needs it.
#include <cxxabi.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <string>
#include <vector>

namespace py = pybind11;

namespace {

struct KernelResources {
  const char* symbol;
  const char* arch;
  int threads;  // the launch bound
  int registers;
  int shared_bytes;  // static; dynamic shared memory is chosen at launch
  int local_bytes;   // stack frame
  int spill_bytes;   // stores + loads
  int occupancy;     // percent of a multiprocessor's warps, dynamic shared memory not counted
};

const std::vector<KernelResources> kKernels = {
#include "kernel_table.inc"
};

std::string demangled(const char* symbol) {
  int status = 0;
  char* name = abi::__cxa_demangle(symbol, nullptr, nullptr, &status);
  std::string result = status == 0 ? name : symbol;
  std::free(name);
  return result;
}

py::list kernels() {
  py::list rows;
  for (const auto& k : kKernels) {
    py::dict row;
    row["name"] = demangled(k.symbol);
    row["arch"] = k.arch;
    row["threads"] = k.threads;
    row["registers"] = k.registers;
    row["shared_bytes"] = k.shared_bytes;
    row["local_bytes"] = k.local_bytes;
    row["spill_bytes"] = k.spill_bytes;
    row["occupancy"] = k.occupancy;
    rows.append(row);
  }
  return rows;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about how dflash_ext was built.";
  m.attr("version") = DFLASH_EXT_VERSION;
  m.attr("compiler") = DFLASH_EXT_COMPILER;
  m.attr("cuda_version") = DFLASH_EXT_CUDA_VERSION;
  m.attr("cuda_archs") = DFLASH_EXT_CUDA_ARCHS;
  m.attr("cpu_isas") = DFLASH_EXT_CPU_ISAS;
  m.def("kernels", &kernels,
        "One dict per CUDA kernel and architecture: name, arch, threads (launch bound), registers, shared_bytes "
        "(static), local_bytes, spill_bytes, occupancy (percent of a multiprocessor's warps, dynamic shared memory not "
        "counted). Read from the toolchain at build time, so no GPU is needed.");
}
