#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <memory>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "controls.h"
#include "selftest.h"

namespace py = pybind11;
using mlloss::emulation::check;
using namespace mlloss::selftest;

namespace {

// Of exactly this size, so that AddressSanitizer sees its end.
template <typename T>
std::unique_ptr<T[]> device_copy(const auto& values) {
  auto copy = std::make_unique<T[]>(values.size());
  for (std::size_t i = 0; i < values.size(); ++i) copy[i] = T(values[i]);
  return copy;
}

template <typename T>
float run_sum(const std::vector<float>& values, int blocks, Fault fault) {
  const auto input = device_copy<T>(values);
  std::vector<float> partials(blocks);
  unsigned tickets = 0;
  float result = 0.0f;
  check(sum<T>(input.get(), static_cast<int64_t>(values.size()), partials.data(), &tickets, &result,
               blocks, fault, nullptr));
  return result;
}

float sum_of(const std::vector<float>& values, const std::string& dtype, int blocks, Fault fault) {
  if (dtype == "float16") return run_sum<__half>(values, blocks, fault);
  if (dtype == "bfloat16") return run_sum<__nv_bfloat16>(values, blocks, fault);
  return run_sum<float>(values, blocks, fault);
}

int distinct(const std::vector<int>& labels, Fault fault) {
  int result = -1;
  check(count_distinct(labels.data(), static_cast<int>(labels.size()), &result, fault, nullptr));
  return result;
}

// A kernel from floats to as many floats.
template <auto kernel>
std::vector<float> transform(const std::vector<float>& values, Fault fault) {
  const auto input = device_copy<float>(values);
  std::vector<float> output(values.size());
  check(kernel(input.get(), output.data(), static_cast<int>(values.size()), fault, nullptr));
  return output;
}

std::vector<int> intrinsics(const std::vector<int>& values, Fault fault) {
  std::vector<int> results(kWarpResults);
  check(warp_intrinsics(values.data(), results.data(), fault, nullptr));
  return results;
}

std::tuple<int, int, int, unsigned long long> statistics(const std::vector<int>& values,
                                                         Fault fault) {
  std::vector<int> results = {0, std::numeric_limits<int>::min(), 0};
  unsigned long long sum = 0;
  check(atomic_statistics(values.data(), static_cast<int>(values.size()), results.data(), &sum,
                          fault, nullptr));
  return {results[0], results[1], results[2], sum};
}

std::vector<float> rotated(const std::vector<float>& values, int cluster, Fault fault) {
  const auto input = device_copy<float>(values);
  std::vector<float> output(values.size());
  check(rotate_in_clusters(input.get(), output.data(), static_cast<int>(values.size()), cluster,
                           fault, nullptr));
  return output;
}

int shared_memory_use(int64_t dynamic_bytes) {
  int result = 0;
  check(use_shared_memory(dynamic_bytes, &result, nullptr));
  return result;
}

std::tuple<int64_t, int, int> limits() {
  const mlloss::KernelLimits limits = limits_of_use_shared_memory();
  return {limits.shared_bytes, limits.cluster_blocks, limits.multiprocessors};
}

std::vector<float> unwritten() {
  std::vector<float> results(64);
  check(read_unwritten(results.data(), nullptr));
  return results;
}

std::vector<int> execution_order(std::tuple<int, int, int> grid, std::tuple<int, int, int> block) {
  const auto to_dim3 = [](auto t) { return dim3(std::get<0>(t), std::get<1>(t), std::get<2>(t)); };
  const dim3 blocks = to_dim3(grid);
  const dim3 threads = to_dim3(block);
  std::vector<int> order(blocks.x * blocks.y * blocks.z * threads.x * threads.y * threads.z);
  int next = 0;
  check(record_order(order.data(), &next, blocks, threads, nullptr));
  return order;
}

}  // namespace

PYBIND11_MODULE(emulation_selftest, module) {
  mlloss::emulation::bind_controls(module);
  py::enum_<Fault>(module, "Fault")
      .value("none", Fault::none)
      .value("global_read_out_of_bounds", Fault::global_read_out_of_bounds)
      .value("shared_write_out_of_bounds", Fault::shared_write_out_of_bounds)
      .value("shared_index_out_of_bounds", Fault::shared_index_out_of_bounds)
      .value("misaligned_load", Fault::misaligned_load)
      .value("missing_barrier", Fault::missing_barrier)
      .value("missing_warp_barrier", Fault::missing_warp_barrier)
      .value("missing_fence", Fault::missing_fence)
      .value("different_barriers", Fault::different_barriers)
      .value("unreachable_barrier", Fault::unreachable_barrier)
      .value("different_intrinsics", Fault::different_intrinsics)
      .value("different_masks", Fault::different_masks)
      .value("lane_outside_its_mask", Fault::lane_outside_its_mask)
      .value("read_from_outside_mask", Fault::read_from_outside_mask)
      .value("read_from_returned_lane", Fault::read_from_returned_lane)
      .value("blocks_write_same_word", Fault::blocks_write_same_word)
      .value("missing_cluster_barrier", Fault::missing_cluster_barrier)
      .value("missing_last_cluster_barrier", Fault::missing_last_cluster_barrier)
      .value("unreachable_cluster_barrier", Fault::unreachable_cluster_barrier)
      .value("read_beyond_cluster", Fault::read_beyond_cluster)
      .value("read_unshared", Fault::read_unshared);
  const auto fault = py::arg("fault") = Fault::none;
  module.def("sum", &sum_of, py::arg("values"), py::arg("dtype") = "float32", py::arg("blocks") = 3,
             fault);
  module.def("count_distinct", &distinct, py::arg("labels"), fault);
  module.def("reverse_in_blocks", &transform<reverse_in_blocks>, py::arg("values"), fault);
  module.def("reverse_in_warps", &transform<reverse_in_warps>, py::arg("values"), fault);
  module.def("copy_wide", &transform<copy_wide>, py::arg("values"), fault);
  module.def("warp_intrinsics", &intrinsics, py::arg("values"), fault);
  module.def("atomic_statistics", &statistics, py::arg("values"), fault);
  module.def("rotate_in_clusters", &rotated, py::arg("values"), py::arg("cluster") = 4, fault);
  module.def("use_shared_memory", &shared_memory_use, py::arg("dynamic_bytes"));
  module.def("limits_of_use_shared_memory", &limits);
  module.attr("STATIC_BYTES") = kStaticBytes;
  module.def("read_unwritten", &unwritten);
  module.def("execution_order", &execution_order, py::arg("grid"), py::arg("block"));
}
