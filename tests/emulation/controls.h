// What every module of emulated kernels offers beside its kernels.
#pragma once

#include <pybind11/pybind11.h>

#include <cstdint>
#include <stdexcept>
#include <string>

#include "emulator.h"

namespace mlloss::emulation {

// Adds to `module`:
//   EmulationError                  the RuntimeError raised for what the emulator finds
//   set_thread_order(order, seed=0) "ascending" (as at first), "descending" or "shuffled", from now
//                                   on
//   launch_count()                  kernels run to their end so far
//   set_dynamic_shared_memory(bytes) what a launch may ask for
//   MAX_DYNAMIC_SHARED_MEMORY        the same at first
inline void bind_controls(pybind11::module_& module) {
  pybind11::register_local_exception<Error>(module, "EmulationError", PyExc_RuntimeError);
  module.def(
      "set_thread_order",
      [](const std::string& order, std::uint64_t seed) {
        if (order == "ascending") {
          set_thread_order(ThreadOrder::ascending, seed);
        } else if (order == "descending") {
          set_thread_order(ThreadOrder::descending, seed);
        } else if (order == "shuffled") {
          set_thread_order(ThreadOrder::shuffled, seed);
        } else {
          throw std::invalid_argument("no thread order '" + order + "'");
        }
      },
      pybind11::arg("order"), pybind11::arg("seed") = 0);
  module.def("launch_count", &launch_count);
  module.def("set_dynamic_shared_memory", &set_dynamic_shared_memory);
  module.attr("MAX_DYNAMIC_SHARED_MEMORY") = kMaxDynamicSharedBytes;
}

// For what a launcher returns.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace mlloss::emulation
