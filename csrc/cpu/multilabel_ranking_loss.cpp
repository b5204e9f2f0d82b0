// Multi-label ranking loss (LSEP) on the CPU.
#include "math/multilabel_ranking_loss.h"

#include "cpu/kernels.h"
#include "cpu/rowwise.h"

MLLOSS_ROWWISE_KERNELS(multilabel_ranking_loss, MultilabelRankingLoss)
