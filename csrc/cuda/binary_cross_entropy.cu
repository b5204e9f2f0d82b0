// Binary cross-entropy of probabilities on the GPU.
#include "math/binary_cross_entropy.h"

#include "cuda/kernels.h"
#include "cuda/pointwise.cuh"

MLLOSS_POINTWISE_LAUNCHERS(binary_cross_entropy, BinaryCrossEntropy)
