// Sigmoid cross-entropy on the CPU.
#include "math/sigmoid_cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

MLLOSS_POINTWISE_KERNELS(sigmoid_cross_entropy, SigmoidCrossEntropy)
