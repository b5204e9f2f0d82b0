// The CUDA operators: torch's tensors in, launchers of kernels.h called on torch's current stream.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda/kernels.h"
#include "operators.h"
#include "torch_tensor.h"

// Weak: the library has to load under a torch without CUDA too, which lacks this symbol. It is only
// called with CUDA tensors in hand.
extern "C" __attribute__((weak)) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** stream);

namespace mlloss {
namespace {

// The device of a tensor made current, and its current stream.
class CudaContext {
 public:
  explicit CudaContext(const torch::stable::Tensor& tensor) : guard_(tensor.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr,
                    "mlloss_cuda: this torch is built without CUDA");
    void* stream = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(
        aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_ = nullptr;
};

void check_cuda(cudaError_t error) {
  STD_TORCH_CHECK(error == cudaSuccess, "mlloss_cuda: CUDA error: ", cudaGetErrorString(error));
}

// From torch's caching allocator, which keeps memory alive until the stream is done with it.
torch::stable::Tensor scratch_memory(const torch::stable::Tensor& like, int64_t bytes) {
  return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
}

#define MLLOSS_KERNELS(name, ...)                                                                  \
  struct name##_kernels : TorchTensors {                                                           \
    template <class Problem>                                                                       \
    static void forward(const Tensor& input, const Problem& problem,                               \
                        const ForwardOutput& output) {                                             \
      const CudaContext context(input);                                                            \
      const Tensor scratch = scratch_memory(input, cuda::name::workspace(problem));                \
      check_cuda(cuda::name::forward(problem, output, scratch.data_ptr(), context.stream()));      \
    }                                                                                              \
    template <class Problem>                                                                       \
    static void backward(const Tensor& tensor, const Problem& problem, const BackwardInput& input, \
                         const BackwardOutput& output) {                                           \
      const CudaContext context(tensor);                                                           \
      check_cuda(cuda::name::backward(problem, input, output, context.stream()));                  \
    }                                                                                              \
  };

struct rescale_kernel : TorchTensors {
  static void rescale(const Tensor& gradient, const RescaleProblem& problem) {
    const CudaContext context(gradient);
    check_cuda(cuda::rescale(problem, context.stream()));
  }
};

struct step_kernel : TorchTensors {
  static void optimizer_step(const Tensor& weight, const StepProblem& problem) {
    const CudaContext context(weight);
    check_cuda(cuda::optimizer_step(problem, context.stream()));
  }
};

MLLOSS_POINTWISE_LOSSES(MLLOSS_KERNELS)
MLLOSS_ROWWISE_LOSSES(MLLOSS_KERNELS)
MLLOSS_ROW_SUMS(MLLOSS_KERNELS)
MLLOSS_POINTWISE_LOSSES(MLLOSS_POINTWISE_OPERATORS)
MLLOSS_ROWWISE_LOSSES(MLLOSS_ROWWISE_OPERATORS)
MLLOSS_ROW_SUMS(MLLOSS_ROWWISE_OPERATORS)

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CUDA, m) {
#define MLLOSS_REGISTER(name, ...)                                             \
  m.impl(#name "_out", TORCH_BOX(&mlloss::name##_operators::forward));         \
  m.impl(#name "_inplace_out", TORCH_BOX(&mlloss::name##_operators::inplace)); \
  m.impl(#name "_backward_out", TORCH_BOX(&mlloss::name##_operators::backward));
  MLLOSS_POINTWISE_LOSSES(MLLOSS_REGISTER)
  MLLOSS_ROWWISE_LOSSES(MLLOSS_REGISTER)
#undef MLLOSS_REGISTER
  m.impl("row_sums_out", TORCH_BOX(&mlloss::row_sums_operators::forward));
  m.impl("optimizer_step_", TORCH_BOX(&mlloss::StepOperator<mlloss::step_kernel>::step));
  m.impl("rescale_", TORCH_BOX(&mlloss::RescaleOperator<mlloss::rescale_kernel>::rescale));
}
