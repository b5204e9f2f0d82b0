// Multi-label categorical cross-entropy (ZLPR) on the GPU.
#include "math/multilabel_categorical_crossentropy.h"

#include "cuda/kernels.h"
#include "cuda/rowwise.cuh"

MLLOSS_ROWWISE_LAUNCHERS(multilabel_categorical_crossentropy, MultilabelCategoricalCrossentropy)
