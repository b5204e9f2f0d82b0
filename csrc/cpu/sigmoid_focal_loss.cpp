// Sigmoid focal loss on the CPU.
#include "math/sigmoid_focal_loss.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

MLLOSS_POINTWISE_KERNELS(sigmoid_focal_loss, SigmoidFocalLoss)
