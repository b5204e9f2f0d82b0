// The hottest loops, written with the instructions of AVX-512 and of AVX2: those of losses that are
// softplus(z) per element, and the sums and gradients of row-wise losses, for fp32, bf16 and fp16
// logits. What they do not take, and every other CPU, goes through the loops of pointwise.h and
// rowwise.h, which are the specification of these.
#pragma once
#include <algorithm>
#include <cmath>
#include <limits>

#include "cpu/tiles.h"
#include "math/multilabel_categorical_crossentropy.h"

namespace mlloss::cpu {

// What the elements of a tile are multiplied by. Arrays of kTile elements, or nullptr: ones.
struct Factors {
  const float* weight;    // 0 leaves an element out
  const float* positive;  // of positives, beside the weight
};

// What the whole part of a power is multiplied out of, see math/power.h.
struct WholePower {
  float ones, twos, fours;  // each 0 or 1
};

// See math/sigmoid_focal_loss.h.
struct FocalConstants {
  float positive_factor, negative_factor;
  float gamma;
  WholePower power;
};

// See math/asymmetric_loss.h.
struct AsymmetricConstants {
  WholePower negative_power, positive_power;
  float negative_slope, positive_slope;
  float clip, rest;
  float logit_high, logit_low;
};

// See math/binary_cross_entropy.h.
struct ProbabilityConstants {
  float eps, most, least;
};

// A sum of losses over tiles, on its way: those of softplus wait as what their logarithms are to be
// taken of, until there are enough for the CPU to take many at once.
struct LossSum {
  static constexpr int kTiles = 8, kProducts = 32, kLinear = 16;

  double total = 0;
  int tiles = 0;
  alignas(64) float products[kTiles][kProducts];
  alignas(64) float linear[kTiles][kLinear];
};

// A sum of e^x over what has been seen of one side of a row, as e^shift * sum. The shift was the
// largest x of some tile and is raised only when one is so much larger that floats might overflow:
// so there is seldom anything to rescale. In parts that are put together at the end.
struct RunningSum {
  static constexpr float kNear = 32;
  static constexpr float kNoShift = -std::numeric_limits<float>::max();
  static constexpr int kLargest = 16, kParts = 8;

  float shift = kNoShift;
  alignas(64) float largest[kLargest];
  alignas(64) double sum[kParts] = {};

  RunningSum() { std::fill_n(largest, kLargest, -kInfinity<float>); }

  bool has_shift() const { return shift != kNoShift; }

  void raise(float value) {
    if (value <= shift + kNear) return;
    const double factor = std::exp(static_cast<double>(shift) - value);
    for (double& part : sum) part *= factor;
    shift = value;
  }

  ScaledSum<double> scaled() const {
    const float own_largest = *std::max_element(largest, largest + kLargest);
    double total = 0;
    for (const double part : sum) total += part;
    // Nothing was added: the total is 0, or NaN.
    if (own_largest == -kInfinity<float>) return {own_largest, total};
    return {own_largest, total * std::exp(static_cast<double>(shift) - own_largest)};
  }
};

struct RunningSums {
  RunningSum positive, negative;

  RowSums<double> scaled() const { return {positive.scaled(), negative.scaled()}; }
};

// They read `stored` and `element` of a tile rather than its `logits`, and write gradients of that
// element type. Tiles may be wide for softplus of hard targets without weights, for
// exponentials and for counting.
// `stream`: past the caches, for outputs that do not fit into them anyway.
struct VectorKernels {
  // Sums of losses over a tile are added to what comes from the tiles before; `total` is what there
  // is in the end.
  double (*total)(LossSum* sum);
  // Softplus without weights.
  void (*softplus_sum)(const Tile<float>& tile, LossSum* sum);
  void (*softplus_gradients)(const Tile<float>& tile, float scale, bool stream, void* gradients);
  // The same with constants of the elements, for hard targets.
  void (*weighted_softplus_sum)(const Tile<float>& tile, const Factors& factors, LossSum* sum);
  void (*weighted_softplus_gradients)(const Tile<float>& tile, const Factors& factors, float scale,
                                      bool stream, void* gradients);
  // Other losses of elements, for hard targets.
  void (*focal_sum)(const Tile<float>& tile, const Factors& factors, const FocalConstants& loss,
                    LossSum* sum);
  void (*focal_gradients)(const Tile<float>& tile, const Factors& factors,
                          const FocalConstants& loss, float scale, bool stream, void* gradients);
  void (*asymmetric_sum)(const Tile<float>& tile, const Factors& factors,
                         const AsymmetricConstants& loss, LossSum* sum);
  void (*asymmetric_gradients)(const Tile<float>& tile, const Factors& factors,
                               const AsymmetricConstants& loss, float scale, bool stream,
                               void* gradients);
  void (*probability_sum)(const Tile<float>& tile, const Factors& factors,
                          const ProbabilityConstants& loss, LossSum* sum);
  void (*probability_gradients)(const Tile<float>& tile, const Factors& factors,
                                const ProbabilityConstants& loss, float scale, bool stream,
                                void* gradients);
  // For hard targets. The first adds to sums over the tiles before, part by part of kTile elements
  // up to one in which infinite logits need the other loops; returns how many elements it took. The
  // second returns false, with nothing written, if all need the other loops.
  int (*exponential_sums)(const Tile<float>& tile, RunningSums* sums);
  bool (*exponential_gradients)(const Tile<float>& tile, const RowStatistics<float>& statistics,
                                float scale, bool stream, void* gradients);
  // How many elements of a masked tile are observed.
  int64_t (*count_observed)(const Tile<float>& tile);
  // Makes what was streamed visible to other threads; to be called by the thread that wrote it.
  void (*fence)();
};

// Those of this CPU, or nullptr. The environment variable ATEN_CPU_CAPABILITY (default, avx2 or
// avx512), with which torch's own kernels are limited to an instruction set, limits these too.
const VectorKernels* vector_kernels();

// Outputs of at least as many bytes are streamed: more than the caches of one socket usually hold.
constexpr int64_t kStreamedBytes = int64_t(1) << 26;

// Whether to stream the gradient of a problem.
inline bool is_streamed(const Problem& problem) {
  return problem.rows * problem.columns * element_size(problem.element) >= kStreamedBytes;
}

}  // namespace mlloss::cpu
