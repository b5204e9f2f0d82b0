// Sigmoid cross-entropy on the GPU.
#include "math/sigmoid_cross_entropy.h"

#include "cuda/kernels.h"
#include "cuda/pointwise.cuh"

MLLOSS_POINTWISE_LAUNCHERS(sigmoid_cross_entropy, SigmoidCrossEntropy)
