// Multi-label categorical cross-entropy (ZLPR) on the CPU.
#include "math/multilabel_categorical_crossentropy.h"

#include "cpu/kernels.h"
#include "cpu/rowwise.h"

MLLOSS_ROWWISE_KERNELS(multilabel_categorical_crossentropy, MultilabelCategoricalCrossentropy)
