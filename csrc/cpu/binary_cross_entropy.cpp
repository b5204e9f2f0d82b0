// Binary cross-entropy of probabilities on the CPU.
#include "math/binary_cross_entropy.h"

#include "cpu/kernels.h"
#include "cpu/pointwise.h"

MLLOSS_POINTWISE_KERNELS(binary_cross_entropy, BinaryCrossEntropy)
