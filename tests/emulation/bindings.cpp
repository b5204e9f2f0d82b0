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

struct EmulatedBackend {
  using Tensor = TensorView;

  static void check(bool holds, const char* what) {
    if (!holds) throw std::invalid_argument(what);
  }

  static Element element(const Tensor& tensor) { return tensor.element(); }

  // Poisoned, as no kernel may rely on what it finds there; of exactly the size that was asked for,
  // so that AddressSanitizer sees its end.
  static std::vector<unsigned char> workspace(int64_t bytes) {
    return std::vector<unsigned char>(static_cast<size_t>(bytes), 0xff);
  }

  static void sigmoid_cross_entropy_forward(const Tensor&, const PointwiseProblem& problem,
                                            double label_smoothing, const ForwardOutput& output) {
    auto scratch = workspace(cuda::sigmoid_cross_entropy_workspace(problem));
    emulation::check(cuda::sigmoid_cross_entropy_forward(problem, label_smoothing, output,
                                                         scratch.data(), nullptr));
  }

  static void sigmoid_cross_entropy_backward(const Tensor&, const PointwiseProblem& problem,
                                             double label_smoothing, const BackwardInput& input,
                                             const BackwardOutput& output) {
    emulation::check(
        cuda::sigmoid_cross_entropy_backward(problem, label_smoothing, input, output, nullptr));
  }

  static void multilabel_categorical_crossentropy_forward(const Tensor&,
                                                          const RowwiseProblem& problem,
                                                          const ForwardOutput& output) {
    auto scratch = workspace(cuda::multilabel_categorical_crossentropy_workspace(problem));
    emulation::check(cuda::multilabel_categorical_crossentropy_forward(problem, output,
                                                                       scratch.data(), nullptr));
  }

  static void multilabel_categorical_crossentropy_backward(const Tensor&,
                                                           const RowwiseProblem& problem,
                                                           const BackwardInput& input,
                                                           const BackwardOutput& output) {
    emulation::check(
        cuda::multilabel_categorical_crossentropy_backward(problem, input, output, nullptr));
  }
};

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
  using Emulated = mlloss::Operators<mlloss::EmulatedBackend>;
  mlloss::emulation::bind_controls(module);
  module.def("sigmoid_cross_entropy_out", &Emulated::sigmoid_cross_entropy_out);
  module.def("sigmoid_cross_entropy_backward_out", &Emulated::sigmoid_cross_entropy_backward_out);
  module.def("multilabel_categorical_crossentropy_out",
             &Emulated::multilabel_categorical_crossentropy_out);
  module.def("multilabel_categorical_crossentropy_backward_out",
             &Emulated::multilabel_categorical_crossentropy_backward_out);
}
