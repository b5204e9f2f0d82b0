// One step of an optimizer for one weight w with gradient g, and how the result becomes an element
// of low precision.
//
//   sgd      g' = g + wd w,  m = mu m + g',  w = w - lr m           (torch.optim.SGD)
//   adagrad  g' = g + wd w,  a = a + mean of g'^2 over the row,
//            w = w - lr g' / (sqrt(a) + eps)                        (one state per row)
//   adamw    w' = w - lr wd w,  m = b1 m + (1 - b1) g,  v = b2 v + (1 - b2) g^2,
//            w = w' - lr / c1 m / (sqrt(v / c2) + eps)              (torch.optim.AdamW)
//
// c1 = 1 - b1^t and c2 = 1 - b2^t at step t. Row-wise Adagrad: Gupta et al., "Training
// Recommender Systems at Scale", arXiv:2010.11305 (as for embeddings in FBGEMM). AdamW: Loshchilov
// and Hutter, arXiv:1711.05101.
#pragma once
#include <cstdint>

#include "math/scalar.h"
#include "problem.h"

namespace mlloss {

// Numbers of a step in the type of the arithmetic.
template <class Real>
struct StepConstants {
  Real lr, weight_decay;
  Real momentum, one_minus_momentum;  // mu or b1
  Real beta2, one_minus_beta2;
  Real eps;
  Real gradient_factor;
  Real first_correction, second_correction;  // 1 / c1, 1 / sqrt(c2)

  explicit StepConstants(const StepProblem& problem)
      : lr(Real(problem.lr)),
        weight_decay(Real(problem.weight_decay)),
        momentum(Real(problem.momentum)),
        one_minus_momentum(Real(1 - problem.momentum)),
        beta2(Real(problem.beta2)),
        one_minus_beta2(Real(1 - problem.beta2)),
        eps(Real(problem.eps)),
        gradient_factor(Real(problem.gradient_factor)),
        first_correction(Real(1 / (1 - std::pow(problem.momentum, double(problem.step))))),
        second_correction(Real(1 / std::sqrt(1 - std::pow(problem.beta2, double(problem.step))))) {}
};

// g'.
template <class Real>
MLLOSS_MATH Real decayed_gradient(const StepConstants<Real>& constants, Real weight,
                                  Real gradient) {
  return constants.gradient_factor * gradient + constants.weight_decay * weight;
}

template <class Real>
MLLOSS_MATH Real sgd_step(const StepConstants<Real>& constants, Real weight, Real gradient,
                          Real* momentum) {
  Real direction = decayed_gradient(constants, weight, gradient);
  if (momentum != nullptr) {
    direction = constants.momentum * *momentum + direction;
    *momentum = direction;
  }
  return weight - constants.lr * direction;
}

// What an element adds to the squares of its row.
template <class Real>
MLLOSS_MATH Real adagrad_square(const StepConstants<Real>& constants, Real weight, Real gradient) {
  const Real direction = decayed_gradient(constants, weight, gradient);
  return direction * direction;
}

// lr / (sqrt(a) + eps), of the row.
template <class Real>
MLLOSS_MATH Real adagrad_rate(const StepConstants<Real>& constants, Real squares) {
  return constants.lr / (Real(std::sqrt(squares)) + constants.eps);
}

template <class Real>
MLLOSS_MATH Real adagrad_step(const StepConstants<Real>& constants, Real weight, Real gradient,
                              Real rate) {
  return weight - rate * decayed_gradient(constants, weight, gradient);
}

template <class Real>
MLLOSS_MATH Real adamw_step(const StepConstants<Real>& constants, Real weight, Real gradient,
                            Real* first, Real* second) {
  const Real own = constants.gradient_factor * gradient;
  *first = constants.momentum * *first + constants.one_minus_momentum * own;
  *second = constants.beta2 * *second + constants.one_minus_beta2 * own * own;
  const Real divisor = Real(std::sqrt(*second)) * constants.second_correction + constants.eps;
  const Real decayed = weight - constants.lr * constants.weight_decay * weight;
  return decayed - constants.lr * constants.first_correction * *first / divisor;
}

// ---- Stochastic rounding ----
// x becomes one of its two neighbours, the nearer one more often, so that its mean is x. The random
// bits are a function of seed, step and the element's number alone.

MLLOSS_MATH uint32_t mixed_bits(uint32_t bits) {
  bits = (bits ^ (bits >> 16)) * 0x85ebca6bu;
  bits = (bits ^ (bits >> 13)) * 0xc2b2ae35u;
  return bits ^ (bits >> 16);
}

MLLOSS_MATH uint64_t mixed_bits(uint64_t bits) {
  bits = (bits ^ (bits >> 30)) * 0xbf58476d1ce4e5b9u;
  bits = (bits ^ (bits >> 27)) * 0x94d049bb133111ebu;
  return bits ^ (bits >> 31);
}

struct RandomBits {
  uint32_t low_key, high_key;

  MLLOSS_MATH RandomBits(uint64_t seed, uint64_t step) {
    constexpr uint64_t kGolden = 0x9e3779b97f4a7c15u;
    const uint64_t key = mixed_bits(mixed_bits(seed + kGolden) + kGolden * (step + 1));
    low_key = static_cast<uint32_t>(key);
    high_key = static_cast<uint32_t>(key >> 32);
  }

  // Of the element whose number has these halves.
  MLLOSS_MATH uint32_t of(uint32_t low, uint32_t high) const {
    return mixed_bits(mixed_bits(low + low_key) ^ (high * 0x9e3779b1u + high_key));
  }
};

// Both return a float that the format holds, or one that is not finite or beyond its largest
// number, which is for ordinary rounding.
MLLOSS_MATH float rounded_to_bf16(float value, uint32_t random) {
  const auto bits = static_cast<uint32_t>(bits_from_float(value));
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  return is_finite ? float_from_bits((bits + (random & 0xffffu)) & 0xffff0000u) : value;
}

MLLOSS_MATH float rounded_to_fp16(float value, uint32_t random) {
  const auto bits = static_cast<uint32_t>(bits_from_float(value));
  const bool is_finite = (bits & 0x7f800000u) != 0x7f800000u;
  // Below 2^-14, neighbours are steps of 2^-24 apart.
  const float steps = absolute(value) * 16777216.0f;
  const float whole = static_cast<float>(static_cast<int32_t>(steps < 2048.0f ? steps : 0.0f));
  const float fraction = static_cast<float>(random >> 8) * 5.9604645e-8f;
  const float small = (whole + (steps - whole > fraction ? 1.0f : 0.0f)) * 5.9604645e-8f;
  const float normal = float_from_bits((bits + (random & 0x1fffu)) & 0xffffe000u);
  const bool is_small = steps < 1024.0f;
  return is_small ? (value < 0 ? -small : small) : is_finite ? normal : value;
}

}  // namespace mlloss
