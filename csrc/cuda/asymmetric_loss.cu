// Asymmetric loss on the GPU.
#include "math/asymmetric_loss.h"

#include "cuda/kernels.h"
#include "cuda/pointwise.cuh"

MLLOSS_POINTWISE_LAUNCHERS(asymmetric_loss, AsymmetricLoss)
