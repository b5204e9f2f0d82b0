// What a loss is computed from, as plain structs of pointers, sizes and strides: shared by the CPU
// and the CUDA kernels, forward and backward. No torch, no CUDA.
#pragma once
#include <cstdint>

namespace mlloss {

enum class Element : int {
  kBool,
  kUint8,
  kInt8,
  kInt32,
  kInt64,
  kHalf,
  kBFloat16,
  kFloat,
  kDouble
};

// mlloss_cuda/targets.py has the same numbers.
enum class Format : int { kDense = 0, kSparse = 1, kPacked = 2, kObserved = 3 };

// mlloss_cuda/ops.py has the same numbers.
enum class Reduction : int {
  kNone = 0,
  kSum = 1,
  kMean = 2,
  kMeanNonzero = 3,
  kWeightedMean = 4,
  kBatchMean = 5,
  kNormalizer = 6,
};

// Numbers read by strides; a stride of 0 broadcasts. `data == nullptr` stands for all ones.
struct Strided {
  const void* data = nullptr;  // [N, C]
  Element element = Element::kFloat;
  int64_t row_stride = 0;     // in elements
  int64_t column_stride = 0;  // in elements
};

// A target or a mask. `data == nullptr` stands for a mask that uses everything. kObserved, of
// targets only: labels that are not listed are missing.
struct Labels {
  Format format = Format::kDense;
  // dense: [N, C]; sparse, observed: label ids [entries], negative = padding;
  // packed: words of 32 labels [N, C / 32 rounded up], the first label in the lowest bit
  const void* data = nullptr;
  Element element = Element::kBool;
  int64_t row_stride = 0;         // dense; packed: in words
  int64_t column_stride = 0;      // dense
  const void* offsets = nullptr;  // sparse, observed: [N + 1], element type as data
  const void* values = nullptr;   // sparse, observed: targets [entries], nullptr = all 1
  Element values_element = Element::kFloat;
  int64_t entries = 0;  // sparse, observed
};

constexpr int kWordBits = 32;  // labels in a word of packed labels

// What all losses share. Logits have unit stride within a row.
struct Problem {
  int64_t rows = 0;              // N
  int64_t columns = 0;           // C
  const void* logits = nullptr;  // [N, C]
  Element element = Element::kFloat;
  int64_t row_stride = 0;
  Labels target;
  Labels mask;
  bool has_ignored = false;  // dense targets equal to `ignored` (NaN: that are NaN) are masked
  double ignored = 0;
  Reduction reduction = Reduction::kMean;
  int64_t batch = 0;                   // the N of 'batchmean'; differs from rows when flattened
  const double* normalizer = nullptr;  // 0-d, for Reduction::kNormalizer
};

constexpr int kMaxParameters = 3;
constexpr int kMaxNumbers = 4;

struct PointwiseProblem : Problem {
  Strided weight;  // [N, C]
  Strided
      parameters[kMaxParameters];    // [N, C] each: constants of the loss, see its header in math/
  double numbers[kMaxNumbers] = {};  // constants of the loss that are the same for all elements
  double label_smoothing = 0;        // e: the target y becomes y (1 - e) + e / 2

  bool has_parameters() const {
    for (const Strided& parameter : parameters) {
      if (parameter.data != nullptr) return true;
    }
    return false;
  }
};

struct RowwiseProblem : Problem {
  Strided threshold;  // [N]: row_stride only; no data: the loss has none
  Strided weight;     // [N]: row_stride only
};

// Results of a forward pass. `loss` and `statistics` are double for double logits, else float.
struct ForwardOutput {
  void* loss = nullptr;        // 0-d, or [N, C] (pointwise), [N] (row-wise) for Reduction::kNone
  void* statistics = nullptr;  // row-wise: [N, 4]
  double* scale = nullptr;  // 0-d: what the gradient of the sum is multiplied by (1 / denominator)
  // One pass: what the gradient is written to as well, or nullptr. It is that of the reduced loss,
  // times `gradient_scale`.
  void* gradient = nullptr;  // [N, C], element type and row stride of the logits; may be the logits
  const double* gradient_scale = nullptr;  // 0-d, nullptr = 1
  void* gradient_threshold = nullptr;      // row-wise: [N], element type of the statistics
};

struct BackwardInput {
  Strided grad_output;            // 0-d (strides 0), or the shape of an unreduced loss
  const double* scale = nullptr;  // 0-d
  const void* statistics = nullptr;
};

struct BackwardOutput {
  void* grad_input = nullptr;      // [N, C], contiguous, element type of the logits
  void* grad_threshold = nullptr;  // [N], element type of the statistics; or nullptr
};

// A gradient that was written in the forward pass, to be multiplied by what comes from above.
struct RescaleProblem {
  int64_t rows = 0;          // N
  int64_t columns = 0;       // C
  void* gradient = nullptr;  // [N, C], unit stride within a row
  Element element = Element::kFloat;
  int64_t row_stride = 0;
  const void* grad_output = nullptr;  // 0-d
  Element grad_output_element = Element::kFloat;
  const double* gradient_scale = nullptr;  // 0-d, what it holds already; nullptr = 1
};

// mlloss_cuda/optimizer.py has the same numbers.
enum class Rule : int { kSgd = 0, kAdagrad = 1, kAdamW = 2 };
enum class Rounding : int { kNearest = 0, kStochastic = 1, kKahan = 2 };

// One step of an optimizer, see math/optimizer_step.h. All arrays are contiguous; states and
// arithmetic are double for double weights, else float.
struct StepProblem {
  int64_t rows = 0;
  int64_t columns = 0;
  void* weight = nullptr;  // [rows, columns]
  Element element = Element::kFloat;
  const void* gradient = nullptr;  // [rows, columns]
  Element gradient_element = Element::kFloat;
  void* first = nullptr;     // sgd: momentum, or nullptr; adamw: [rows, columns]
  void* second = nullptr;    // adamw: [rows, columns]; adagrad: [rows]
  void* residual = nullptr;  // Rounding::kKahan: [rows, columns], element type of the weight
  Rule rule = Rule::kSgd;
  Rounding rounding = Rounding::kNearest;
  double lr = 0;
  double weight_decay = 0;
  double momentum = 0;  // sgd: momentum; adamw: beta1
  double beta2 = 0;
  double eps = 0;
  double gradient_factor = 1;  // what the gradient is multiplied by first
  int64_t step = 0;            // from 1 on
  uint64_t seed = 0;           // of stochastic rounding
  int64_t first_element = 0;   // the number of weight[0] among all weights
};

inline bool is_dense(const Labels& labels) {
  return labels.data != nullptr && labels.format == Format::kDense;
}

// A [N, C] array that is one long row: contiguous, or the same number everywhere.
inline bool is_flat(const Strided& array, int64_t columns) {
  return array.data == nullptr || (array.row_stride == 0 && array.column_stride == 0) ||
         (array.row_stride == columns && array.column_stride == 1);
}

inline bool is_flat(const Labels& labels, int64_t columns) {
  if (labels.data == nullptr) return true;
  if (labels.format == Format::kPacked) return labels.row_stride * kWordBits == columns;
  return labels.format == Format::kDense && labels.row_stride == columns &&
         labels.column_stride == 1;
}

// Treats the whole matrix as a single row where nothing depends on rows: short rows then cost no
// more than long ones. `grad_output` may be nullptr.
inline void flatten(PointwiseProblem& problem, const Strided* grad_output) {
  const int64_t columns = problem.columns;
  if (problem.rows <= 1 || problem.row_stride != columns || !is_flat(problem.target, columns) ||
      !is_flat(problem.mask, columns) || !is_flat(problem.weight, columns) ||
      (grad_output != nullptr && !is_flat(*grad_output, columns))) {
    return;
  }
  for (const Strided& parameter : problem.parameters) {
    if (!is_flat(parameter, columns)) return;
  }
  problem.columns = problem.rows * columns;
  problem.rows = 1;
  problem.row_stride = problem.columns;
}

inline void flatten(RescaleProblem& problem) {
  if (problem.row_stride != problem.columns) return;
  problem.columns *= problem.rows;
  problem.row_stride = problem.columns;
  problem.rows = 1;
}

}  // namespace mlloss
