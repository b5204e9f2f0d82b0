// Asymmetric loss on the CPU.
#include "math/asymmetric_loss.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

MLLOSS_POINTWISE_KERNELS(asymmetric_loss, AsymmetricLoss)
