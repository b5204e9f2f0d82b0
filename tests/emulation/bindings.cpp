// The library's CUDA kernels with the operators' own arguments (csrc/operators.h), on CPU tensors.
// The tests put this module in the place of torch.ops.mlloss_cuda and run everything else
// unchanged.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <cstring>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

#include "controls.h"
#include "cuda/kernels.h"
#include "operators.h"

namespace py = pybind11;

namespace mlloss {

// A torch tensor as the operators see it.
class TensorView {
 public:
  TensorView() = default;

  explicit TensorView(py::handle tensor) {
    data_ = reinterpret_cast<void*>(tensor.attr("data_ptr")().cast<uintptr_t>());
    sizes_ = tensor.attr("shape").cast<std::vector<int64_t>>();
    strides_ = tensor.attr("stride")().cast<std::vector<int64_t>>();
    static const std::map<std::string, Element> kElements = {
        {"torch.bool", Element::kBool},         {"torch.uint8", Element::kUint8},
        {"torch.int8", Element::kInt8},         {"torch.int32", Element::kInt32},
        {"torch.int64", Element::kInt64},       {"torch.float16", Element::kHalf},
        {"torch.bfloat16", Element::kBFloat16}, {"torch.float32", Element::kFloat},
        {"torch.float64", Element::kDouble}};
    element_ = kElements.at(py::str(tensor.attr("dtype")));
  }

  void* data_ptr() const { return data_; }
  Element element() const { return element_; }
  int64_t dim() const { return static_cast<int64_t>(sizes_.size()); }
  int64_t size(int64_t dimension) const { return sizes_.at(dimension); }
  int64_t stride(int64_t dimension) const { return strides_.at(dimension); }
  int64_t numel() const {
    int64_t product = 1;
    for (const int64_t size : sizes_) product *= size;
    return product;
  }

 private:
  void* data_ = nullptr;
  std::vector<int64_t> sizes_, strides_;
  Element element_ = Element::kFloat;
};

struct EmulatedTensors {
  using Tensor = TensorView;

  static void check(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  }

  static Element element(const Tensor& tensor) { return tensor.element(); }
};

// Poisoned, as no kernel may rely on what it finds there; of exactly the size that was asked for,
// so that AddressSanitizer sees its end.
std::vector<unsigned char> scratch_memory(int64_t bytes) {
  return std::vector<unsigned char>(static_cast<size_t>(bytes), 0xff);
}

#define MLLOSS_KERNELS(name, ...)                                                             \
  struct name##_kernels : EmulatedTensors {                                                   \
    template <class Problem>                                                                  \
    static void forward(const Tensor&, const Problem& problem, const ForwardOutput& output) { \
      auto scratch = scratch_memory(cuda::name::workspace(problem));                          \
      emulation::check(cuda::name::forward(problem, output, scratch.data(), nullptr));        \
    }                                                                                         \
    template <class Problem>                                                                  \
    static void backward(const Tensor&, const Problem& problem, const BackwardInput& input,   \
                         const BackwardOutput& output) {                                      \
      emulation::check(cuda::name::backward(problem, input, output, nullptr));                \
    }                                                                                         \
  };

struct rescale_kernel : EmulatedTensors {
  static void rescale(const Tensor&, const RescaleProblem& problem) {
    emulation::check(cuda::rescale(problem, nullptr));
  }
};

struct step_kernel : EmulatedTensors {
  static void optimizer_step(const Tensor&, const StepProblem& problem) {
    emulation::check(cuda::optimizer_step(problem, nullptr));
  }
};

MLLOSS_POINTWISE_LOSSES(MLLOSS_KERNELS)
MLLOSS_ROWWISE_LOSSES(MLLOSS_KERNELS)
MLLOSS_ROW_SUMS(MLLOSS_KERNELS)
MLLOSS_POINTWISE_LOSSES(MLLOSS_POINTWISE_OPERATORS)
MLLOSS_ROWWISE_LOSSES(MLLOSS_ROWWISE_OPERATORS)
MLLOSS_ROW_SUMS(MLLOSS_ROWWISE_OPERATORS)

}  // namespace mlloss

template <>
struct pybind11::detail::type_caster<mlloss::TensorView> {
  PYBIND11_TYPE_CASTER(mlloss::TensorView, const_name("torch.Tensor"));

  bool load(handle source, bool) {
    if (!hasattr(source, "data_ptr")) return false;
    value = mlloss::TensorView(source);
    return true;
  }
};

PYBIND11_MODULE(mlloss_emulated, module) {
  mlloss::emulation::bind_controls(module);
  module.def("row_sums_out", &mlloss::row_sums_operators::forward);
  module.def("optimizer_step_", &mlloss::StepOperator<mlloss::step_kernel>::step);
  module.def("rescale_", &mlloss::RescaleOperator<mlloss::rescale_kernel>::rescale);
#define MLLOSS_BIND(name, ...)                                          \
  module.def(#name "_out", &mlloss::name##_operators::forward);         \
  module.def(#name "_inplace_out", &mlloss::name##_operators::inplace); \
  module.def(#name "_backward_out", &mlloss::name##_operators::backward);
  MLLOSS_POINTWISE_LOSSES(MLLOSS_BIND)
  MLLOSS_ROWWISE_LOSSES(MLLOSS_BIND)
#undef MLLOSS_BIND
}
