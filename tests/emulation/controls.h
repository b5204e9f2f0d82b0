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
//   take_launches()                 [(kernel, blocks, blocks of a cluster, bytes of static and of
//                                   dynamic shared memory)] since the last call
//   set_device(shared_bytes, cluster_blocks, multiprocessors)
//                                   what the GPU has, of each what it has at first if left out
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
  module.def("take_launches", [] {
    pybind11::list launches;
    for (const LaunchRecord& each : take_launches()) {
      launches.append(pybind11::make_tuple(each.kernel_name, each.grid.x, each.cluster,
                                           each.static_bytes, each.dynamic_bytes));
    }
    return launches;
  });
  constexpr Device kUsual;
  module.def(
      "set_device",
      [](std::size_t shared_bytes, unsigned cluster_blocks, int multiprocessors) {
        set_device({0, shared_bytes, cluster_blocks, multiprocessors});
      },
      pybind11::kw_only(), pybind11::arg("shared_bytes") = kUsual.shared_bytes,
      pybind11::arg("cluster_blocks") = kUsual.cluster_blocks,
      pybind11::arg("multiprocessors") = kUsual.multiprocessors);
}

// For what a launcher returns.
inline void check(cudaError_t error) {
  if (error != cudaSuccess) throw std::runtime_error(cudaGetErrorString(error));
}

}  // namespace mlloss::emulation
