// Page faults of a fresh output cost more than computing it: the 4 KiB pages of a 256 MiB gradient
// are 65,536 faults, about 100 ms, where the kernel itself takes 16 ms (one thread of an AMD EPYC,
// Linux with transparent huge pages on `madvise`, its usual default). bench/run.py shows the
// difference as "copy" and "copy, backward to new memory".
#pragma once
#include <cstdint>

#ifdef __linux__
#include <sys/mman.h>
#endif

namespace mlloss::cpu {

// Asks for 2 MiB pages for an output that is about to be written. A hint: it takes no more memory,
// changes nothing where pages are there already, and its failure does not matter.
inline void prefer_huge_pages([[maybe_unused]] void* output, [[maybe_unused]] int64_t bytes) {
#ifdef MADV_HUGEPAGE
  constexpr uintptr_t kHugePage = uintptr_t(1) << 21;
  // Whole pages within the output only: what lies around it belongs to others.
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(output) + kHugePage - 1) / kHugePage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(output) + bytes) / kHugePage;
  if (begin < end) {
    madvise(reinterpret_cast<void*>(begin * kHugePage), (end - begin) * kHugePage, MADV_HUGEPAGE);
  }
#endif
}

// Starts fetching what will be read next: with this much arithmetic per cache line, the hardware
// prefetcher alone does not keep up with the forward loops.
inline void prefetch_range(const char* data, int64_t bytes) {
  for (int64_t line = 0; line < bytes; line += 64) __builtin_prefetch(data + line, 0, 3);
}

}  // namespace mlloss::cpu
