// Multi-label ranking loss (LSEP) on the GPU.
#include "math/multilabel_ranking_loss.h"

#include "cuda/kernels.h"
#include "cuda/rowwise.cuh"

MLLOSS_ROWWISE_LAUNCHERS(multilabel_ranking_loss, MultilabelRankingLoss)
