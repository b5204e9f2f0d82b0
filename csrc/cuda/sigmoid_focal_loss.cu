// Sigmoid focal loss on the GPU.
#include "math/sigmoid_focal_loss.h"

#include "cuda/kernels.h"
#include "cuda/pointwise.cuh"

MLLOSS_POINTWISE_LAUNCHERS(sigmoid_focal_loss, SigmoidFocalLoss)
