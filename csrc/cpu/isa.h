// Run-time choice of the instruction set: a function marked MLLOSS_CLONES is compiled for AVX-512,
// AVX2 and the baseline, and the loader picks one. Helpers called in its loops must be marked
// MLLOSS_INLINE (always inlined) and lambdas MLLOSS_INLINE_LAMBDA, else they stay baseline code.
#pragma once

#define MLLOSS_INLINE inline __attribute__((always_inline))
#define MLLOSS_INLINE_LAMBDA __attribute__((always_inline))

#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__) && !defined(__clang__) && \
    __GNUC__ >= 12
#define MLLOSS_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define MLLOSS_CLONES
#endif
