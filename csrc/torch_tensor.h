// What the backends of the product share: torch's stable tensors.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "problem.h"

namespace mlloss {

struct TorchTensors {
  using Tensor = torch::stable::Tensor;

  static void check(bool holds, const char* what) { STD_TORCH_CHECK(holds, "mlloss_cuda: ", what); }

  static Element element(const Tensor& tensor) {
    using torch::headeronly::ScalarType;
    switch (tensor.scalar_type()) {
      case ScalarType::Bool:
        return Element::kBool;
      case ScalarType::Byte:
        return Element::kUint8;
      case ScalarType::Char:
        return Element::kInt8;
      case ScalarType::Int:
        return Element::kInt32;
      case ScalarType::Long:
        return Element::kInt64;
      case ScalarType::Half:
        return Element::kHalf;
      case ScalarType::BFloat16:
        return Element::kBFloat16;
      case ScalarType::Float:
        return Element::kFloat;
      case ScalarType::Double:
        return Element::kDouble;
      default:
        STD_TORCH_CHECK(false, "mlloss_cuda: a tensor has an unsupported dtype");
    }
  }
};

}  // namespace mlloss
