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

struct CudaBackend : TorchTensors {
  // From torch's caching allocator, which keeps memory alive until the stream is done with it.
  static Tensor workspace(const Tensor& like, int64_t bytes) {
    return torch::stable::new_empty(like, {bytes}, torch::headeronly::ScalarType::Byte);
  }

  static void sigmoid_cross_entropy_forward(const Tensor& input, const PointwiseProblem& problem,
                                            double label_smoothing, const ForwardOutput& output) {
    const CudaContext context(input);
    const Tensor scratch = workspace(input, cuda::sigmoid_cross_entropy_workspace(problem));
    check_cuda(cuda::sigmoid_cross_entropy_forward(problem, label_smoothing, output,
                                                   scratch.data_ptr(), context.stream()));
  }

  static void sigmoid_cross_entropy_backward(const Tensor& tensor, const PointwiseProblem& problem,
                                             double label_smoothing, const BackwardInput& input,
                                             const BackwardOutput& output) {
    const CudaContext context(tensor);
    check_cuda(cuda::sigmoid_cross_entropy_backward(problem, label_smoothing, input, output,
                                                    context.stream()));
  }

  static void multilabel_categorical_crossentropy_forward(const Tensor& input,
                                                          const RowwiseProblem& problem,
                                                          const ForwardOutput& output) {
    const CudaContext context(input);
    const Tensor scratch =
        workspace(input, cuda::multilabel_categorical_crossentropy_workspace(problem));
    check_cuda(cuda::multilabel_categorical_crossentropy_forward(
        problem, output, scratch.data_ptr(), context.stream()));
  }

  static void multilabel_categorical_crossentropy_backward(const Tensor& tensor,
                                                           const RowwiseProblem& problem,
                                                           const BackwardInput& input,
                                                           const BackwardOutput& output) {
    const CudaContext context(tensor);
    check_cuda(cuda::multilabel_categorical_crossentropy_backward(problem, input, output,
                                                                  context.stream()));
  }
};

using Cuda = Operators<CudaBackend>;

}  // namespace
}  // namespace mlloss

STABLE_TORCH_LIBRARY_IMPL(mlloss_cuda, CUDA, m) {
  using mlloss::Cuda;
  m.impl("sigmoid_cross_entropy_out", TORCH_BOX(&Cuda::sigmoid_cross_entropy_out));
  m.impl("sigmoid_cross_entropy_backward_out",
         TORCH_BOX(&Cuda::sigmoid_cross_entropy_backward_out));
  m.impl("multilabel_categorical_crossentropy_out",
         TORCH_BOX(&Cuda::multilabel_categorical_crossentropy_out));
  m.impl("multilabel_categorical_crossentropy_backward_out",
         TORCH_BOX(&Cuda::multilabel_categorical_crossentropy_backward_out));
}
