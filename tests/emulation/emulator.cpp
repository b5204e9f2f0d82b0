// The scheduler behind emulator.h.
//
// One cluster of blocks runs at a time, most often a single block. Each of its threads that has to
// wait somewhere owns a fiber, a stack to switch to; a thread that runs to its end without waiting
// leaves its fiber to the next thread, so that kernels without barriers cost no switches at all. A
// thread that waits hands over to the next ready one directly.
//
// Never compiled with -fsanitize=thread: the scheduler moves between fibers in ways that look like
// data races, and its own accesses have to stay invisible. Calls into the sanitizer's runtime tell
// it what the kernel's barriers order. The stack switch is announced to AddressSanitizer likewise.
#include "emulator.h"

#include <sys/mman.h>

#include <array>
#include <cstdio>
#include <deque>
#include <exception>
#include <map>
#include <memory>
#include <mutex>
#include <new>
#include <numeric>
#include <utility>
#include <vector>

#ifndef __x86_64__
#include <ucontext.h>
#endif
#ifdef __SANITIZE_ADDRESS__
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
#include <sanitizer/tsan_interface.h>
#endif

uint3 threadIdx;
uint3 blockIdx;
dim3 blockDim;
dim3 gridDim;

namespace mlloss::emulation {
namespace {

constexpr int kLanes = 32;
constexpr unsigned kMaxThreadsPerBlock = 1024;
constexpr unsigned kMaxGridYZ = 65535;
constexpr std::size_t kStackBytes = 256 << 10;
constexpr std::size_t kPageBytes = 4096;
constexpr std::size_t kCacheLineBytes = 64;
// What a kernel may declare statically; more has to be requested at the launch.
constexpr std::size_t kMaxSharedBytes = 48 << 10;
// Around every shared array: what a warp that is one element too far writes, 4 bytes per lane.
constexpr std::size_t kRedZoneBytes = 128;
constexpr std::size_t kArenaBytes = 2 * kMaxSharedBytes + kMaxDeviceSharedBytes;
// Launches that are remembered for tests that ask.
constexpr std::size_t kMaxRecordedLaunches = 1000;
constexpr unsigned char kSharedMemoryFill = 0xff;
constexpr unsigned char kRedZoneFill = 0xa5;

#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
constexpr bool kThreadSanitizer = true;
#else
constexpr bool kThreadSanitizer = false;
#endif

// Different masks that the lanes of one warp may give to __syncwarp.
constexpr std::size_t kMaxWarpMasks = 16;

// Clusters of one launch that ThreadSanitizer treats as running at the same time, if each is of one
// block. Every block more makes its vector clocks longer; larger clusters have several anyway.
constexpr std::size_t kConcurrentBlocks = kThreadSanitizer ? 2 : 1;

// ---- ThreadSanitizer ----------------------------------------------------------------------------
// Each emulated thread is one of its fibers. Nothing is ordered by switching, only by these calls.
// What the scheduler itself does while a fiber runs must not allocate: malloc and free are
// intercepted.

void release([[maybe_unused]] void* object) {
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
  __tsan_release(object);
#endif
}

void acquire([[maybe_unused]] void* object) {
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
  __tsan_acquire(object);
#endif
}

// Not memset, which ThreadSanitizer intercepts and would take for a write by the current thread.
void fill_unseen(unsigned char* memory, unsigned char value, std::size_t bytes) {
  if constexpr (kThreadSanitizer) {
    for (volatile unsigned char* byte = memory; byte != memory + bytes; ++byte) *byte = value;
  } else {
    std::memset(memory, value, bytes);
  }
}

// ---- Fibers -------------------------------------------------------------------------------------

#ifdef __x86_64__
extern "C" void mlloss_emulation_switch_stack(void** save_here, void* resume_from);
// Keeps what a called function must keep, then continues where the other stack was left. An own
// switch costs a few nanoseconds; swapcontext makes a system call for the signal mask. The jump at
// the end is a return, but one that the processor's stack of return addresses could only predict
// wrongly.
asm(R"(
.text
.p2align 4
.hidden mlloss_emulation_switch_stack
.globl mlloss_emulation_switch_stack
.type mlloss_emulation_switch_stack, @function
mlloss_emulation_switch_stack:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  popq %rcx
  jmp *%rcx
.size mlloss_emulation_switch_stack, .-mlloss_emulation_switch_stack
)");
constexpr std::size_t kRegistersSaved = 6;
#endif

// A place to continue at: a stack with what the processor and the sanitizers need to know about it.
struct Fiber {
  char* stack = nullptr;  // lowest address
  std::size_t stack_bytes = 0;
#ifdef __x86_64__
  void* stack_pointer = nullptr;
#else
  ucontext_t context = {};
#endif
  void* fake_stack = nullptr;  // AddressSanitizer's
  void* tsan_fiber = nullptr;
};

Fiber* switched_from = nullptr;

// First thing to do on a stack that has just been switched to.
__forceinline__ void finish_switch([[maybe_unused]] Fiber& arrived) {
#ifdef __SANITIZE_ADDRESS__
  const void* stack = nullptr;
  std::size_t stack_bytes = 0;
  __sanitizer_finish_switch_fiber(arrived.fake_stack, &stack, &stack_bytes);
  // How the bounds of the host thread's own stack become known.
  switched_from->stack = static_cast<char*>(const_cast<void*>(stack));
  switched_from->stack_bytes = stack_bytes;
#endif
}

// `last_time`: nothing will continue on the stack that is being left. Inlined, like all that lies
// between it and the kernel: every return after a switch is one that the processor predicts
// wrongly.
__forceinline__ void switch_fiber(Fiber& from, Fiber& to, [[maybe_unused]] bool last_time = false) {
  switched_from = &from;
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
  __tsan_switch_to_fiber(to.tsan_fiber, __tsan_switch_to_fiber_no_sync);
#endif
#ifdef __SANITIZE_ADDRESS__
  __sanitizer_start_switch_fiber(last_time ? nullptr : &from.fake_stack, to.stack, to.stack_bytes);
#endif
#ifdef __x86_64__
  mlloss_emulation_switch_stack(&from.stack_pointer, to.stack_pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  finish_switch(from);
}

// Points the fiber at the beginning of `entry`, which must not return.
void prepare_fiber(Fiber& fiber, void (*entry)()) {
  fiber.fake_stack = nullptr;
#ifdef __x86_64__
  char* top = fiber.stack + fiber.stack_bytes;
  void** stack_pointer = reinterpret_cast<void**>(top);
  *--stack_pointer = nullptr;  // return address of `entry`: where debuggers stop walking
  *--stack_pointer = reinterpret_cast<void*>(entry);
  for (std::size_t i = 0; i < kRegistersSaved; ++i) *--stack_pointer = nullptr;
  fiber.stack_pointer = stack_pointer;
#else
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack;
  fiber.context.uc_stack.ss_size = fiber.stack_bytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, entry, 0);
#endif
}

void start_tsan_fiber([[maybe_unused]] Fiber& fiber) {
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
  fiber.tsan_fiber = __tsan_create_fiber(0);
#endif
}

// Fibers are kept for the life of the process: mapping a stack costs more than most launches.
Fiber* create_fiber() {
  static std::vector<std::unique_ptr<Fiber>> fibers;
  // A guard page below makes an overflow a segmentation fault instead of silent damage.
  void* mapping = mmap(nullptr, kPageBytes + kStackBytes, PROT_READ | PROT_WRITE,
                       MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (mapping == MAP_FAILED) throw std::bad_alloc();
  if (mprotect(mapping, kPageBytes, PROT_NONE) != 0) throw std::bad_alloc();
  Fiber* fiber = fibers.emplace_back(std::make_unique<Fiber>()).get();
  fiber->stack = static_cast<char*>(mapping) + kPageBytes;
  // Stacks that all begin at the same offset in a page would compete for the same few cache lines.
  constexpr std::size_t kStride = 5 * kCacheLineBytes;
  fiber->stack_bytes = kStackBytes - fibers.size() * kStride % kPageBytes;
  start_tsan_fiber(*fiber);
  return fiber;
}

// ---- What the threads of a block wait for -------------------------------------------------------

enum class State : std::uint8_t {
  ready,
  at_block_barrier,
  at_cluster_barrier,
  at_warp_collective,
  returned
};

struct Block;

struct Thread {
  Block* block = nullptr;
  uint3 index = {};
  unsigned linear_index = 0;
  State state = State::ready;
  bool has_fenced_memory = false;
  Fiber* fiber = nullptr;  // null until the thread starts

  // While waiting:
  const char* intrinsic = nullptr;
  Location where;
  WarpOperation operation = WarpOperation::sync;
  unsigned mask = 0;
  int source_lane = 0;
  std::uint64_t value = 0;  // given, then received
};

// What ThreadSanitizer orders a barrier by. Threads that have left the barrier may reach the next
// one before the others have left; they must not be seen by those, hence two objects in turn.
struct BarrierOrder {
  std::array<char, 2> objects = {};
  unsigned phase = 0;
  void* current() { return &objects[phase]; }
  void* previous() { return &objects[phase ^ 1]; }
  void next() { phase ^= 1; }
};

struct Warp {
  unsigned live = 0;
  unsigned waiting = 0;
  // By mask: lanes that share a mask have met equally often.
  struct {
    unsigned mask = 0;
    BarrierOrder order;
  } mask_orders[kMaxWarpMasks];
};

struct Block {
  uint3 index = {};
  unsigned rank = 0;  // in its cluster
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  unsigned live = 0;
  unsigned waiting = 0;
  bool predicate = false;       // collected by the barrier that is filling up
  bool last_predicate = false;  // of the barrier that has been passed
  Thread* first_waiting = nullptr;
  BarrierOrder barrier_order;
  BarrierOrder succession;  // of the blocks in this place: each comes after the one before

  // Shared memory
  struct SharedArray {
    std::size_t begin;
    std::size_t bytes;
    const SharedArrayTag* tag;  // nullptr: the dynamic one
  };
  std::unique_ptr<unsigned char[]> arena;
  std::size_t arena_used = 0;
  std::vector<SharedArray> arrays;
  void* dynamic = nullptr;
  std::uint64_t serial = 0;  // which SharedArrayTag entries belong to this block

  std::vector<Fiber*> fibers;  // ThreadSanitizer: the fiber of each thread index
};

// Order of threads and blocks.
struct Schedule {
  ThreadOrder order = ThreadOrder::ascending;
  std::uint64_t seed = 0;
};

class SmallRandom {  // splitmix64
 public:
  explicit SmallRandom(std::uint64_t seed) : state_(seed) {}
  std::uint64_t next() {
    std::uint64_t z = state_ += 0x9e3779b97f4a7c15u;
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
  }
  std::size_t below(std::size_t bound) { return ((next() >> 32) * bound) >> 32; }

 private:
  std::uint64_t state_;
};

// Literals that the linker has merged are equal at a glance.
bool same_text(const char* a, const char* b) { return a == b || std::strcmp(a, b) == 0; }

std::string describe(const Location& where) {
  return std::string(where.file_name()) + ":" + std::to_string(where.line());
}

std::string describe(const uint3& index) {
  return "(" + std::to_string(index.x) + ", " + std::to_string(index.y) + ", " +
         std::to_string(index.z) + ")";
}

std::string describe_mask(unsigned mask) {
  char text[16];
  std::snprintf(text, sizeof text, "0x%08x", mask);
  return text;
}

// ---- The machine --------------------------------------------------------------------------------

class Machine {
 public:
  cudaError_t run(const Launch& launch, KernelBody body);
  std::size_t static_shared_bytes(const void* kernel, KernelBody body);
  void set_schedule(Schedule schedule) { schedule_ = schedule; }
  std::uint64_t launches() const { return launches_; }
  std::vector<LaunchRecord> take_launches() { return std::exchange(records_, {}); }

  std::uint64_t warp_collective(WarpOperation operation, const char* intrinsic, unsigned mask,
                                std::uint64_t value, int source_lane, const Location& where);
  bool block_barrier(const char* intrinsic, bool predicate, const Location& where);
  void cluster_barrier(const Location& where);
  void* shared_memory(SharedArrayTag& tag, std::size_t bytes, std::size_t alignment);
  void* dynamic_shared_memory() { return block_->dynamic; }
  const void* shared_of_block(const void* address, std::size_t bytes, int rank,
                              const Location& where);
  int cluster_blocks() const { return static_cast<int>(cluster_); }
  int cluster_rank() const { return static_cast<int>(block_->rank); }
  Device& device() { return device_; }
  Thread& running() { return *running_; }
  [[noreturn]] void fail(const std::string& what, const Thread& thread, const Location& where);

 private:
  static void fiber_entry();
  void run_threads();
  bool run_one_thread();
  void begin_launch(const Launch& launch, KernelBody body);
  void run_cluster(std::size_t first_place, std::uint64_t first_block);
  void start_block(Block& block, uint3 index, unsigned rank);
  void abandon(Block& block);
  void check_red_zones(const Block& block);
  unsigned char* take_shared(Block& block, const SharedArrayTag* tag, std::size_t bytes,
                             std::size_t alignment);

  Thread& take_ready();
  void make_running(Thread& thread);
  void resume(Thread& thread, Fiber& from, bool last_time = false);
  void wait();
  void make_ready(Block& block, unsigned first_thread, unsigned count, State waiting_in,
                  unsigned mask);
  void pass_block_barrier();
  void pass_cluster_barrier();
  BarrierOrder& warp_order(Warp& warp, unsigned mask);
  bool try_pass_warp_collective(Warp& warp, unsigned warp_index, unsigned mask);
  void thread_returned();
  Fiber* fiber_for(const Thread& thread);
  void put_back(Fiber* fiber);

  [[noreturn]] void fail_deadlocked() const;
  std::string context() const;
  std::string waiting_threads() const;

  Schedule schedule_;
  SmallRandom random_{0};
  std::uint64_t launches_ = 0;
  std::uint64_t block_serial_ = 0;
  std::vector<LaunchRecord> records_;
  std::map<const void*, std::size_t> static_shared_bytes_;  // by kernel
  std::mutex one_launch_at_a_time_;
  Device device_;

  const char* kernel_name_ = nullptr;
  KernelBody body_ = {};
  std::size_t dynamic_bytes_ = 0;
  std::deque<Block> blocks_;            // places for the blocks that run at the same time
  std::vector<Block*> cluster_places_;  // those of the cluster that runs, by rank
  unsigned cluster_ = 1;                // blocks of a cluster
  unsigned cluster_live_ = 0;           // threads, of all its blocks
  unsigned cluster_waiting_ = 0;
  BarrierOrder cluster_order_;
  Block* block_ = nullptr;  // of the running thread
  Thread* running_ = nullptr;
  std::vector<Thread*> ready_;  // taken from the back
  std::vector<Fiber*> idle_fibers_;
  Fiber host_;
  std::exception_ptr failure_;
  char launch_start_ = 0;  // ThreadSanitizer: the host comes before all threads,
  char launch_end_ = 0;    // and after them
};

Machine machine;

std::string Machine::context() const {
  return std::string("kernel ") + kernel_name_ + ", block " + describe(blockIdx);
}

// `where` comes first, as compilers have it, so that editors can jump there.
void Machine::fail(const std::string& what, const Thread& thread, const Location& where) {
  throw Error(describe(where) + ": " + what + " [" + context() + ", thread " +
              describe(thread.index) + "]");
}

std::string Machine::waiting_threads() const {
  std::map<std::string, unsigned> groups;
  for (const Block* block : cluster_places_) {
    for (const Thread& thread : block->threads) {
      std::string group = "returned";
      if (thread.state != State::returned) {
        group = std::string("at ") + thread.intrinsic + ", " + describe(thread.where);
        if (thread.state == State::at_warp_collective) {
          group += ", warp " + std::to_string(thread.linear_index / kLanes) + ", mask " +
                   describe_mask(thread.mask);
        }
      }
      if (cluster_ > 1) group += ", block " + describe(block->index);
      ++groups[group];
    }
  }
  std::string text;
  for (const auto& [group, count] : groups) {
    text += "\n  " + std::to_string(count) + (count == 1 ? " thread " : " threads ") + group;
  }
  return text;
}

// ---- Choosing who runs --------------------------------------------------------------------------

__forceinline__ Thread& Machine::take_ready() {
  if (ready_.empty()) fail_deadlocked();
  if (schedule_.order == ThreadOrder::shuffled) {
    std::swap(ready_.back(), ready_[random_.below(ready_.size())]);
  }
  Thread* thread = ready_.back();
  ready_.pop_back();
  return *thread;
}

// Everything that can be passed has been: what is left waits for something that cannot come.
void Machine::fail_deadlocked() const {
  const Thread* stuck = nullptr;
  for (const Block* block : cluster_places_) {
    for (const Thread& thread : block->threads) {
      if (stuck == nullptr && thread.state != State::returned) stuck = &thread;
    }
  }
  throw Error(describe(stuck->where) +
              ": deadlock: not reached by all threads it waits for, or their masks disagree [" +
              context() + "]" + waiting_threads());
}

// Newly ready threads go before those that have been ready for longer, so that one warp gets as far
// ahead of the others as the kernel lets it.
void Machine::make_ready(Block& block, unsigned first_thread, unsigned count, State waiting_in,
                         unsigned mask) {
  const bool descending = schedule_.order == ThreadOrder::descending;
  for (unsigned i = 0; i < count; ++i) {
    const unsigned offset = descending ? i : count - 1 - i;
    Thread& thread = block.threads[first_thread + offset];
    if (thread.state != waiting_in) continue;
    if (waiting_in == State::at_warp_collective && !(mask >> offset & 1)) continue;
    thread.state = State::ready;
    ready_.push_back(&thread);
  }
}

__forceinline__ void Machine::make_running(Thread& thread) {
  running_ = &thread;
  threadIdx = thread.index;
  if (block_ == thread.block) return;
  block_ = thread.block;
  blockIdx = block_->index;
}

Fiber* Machine::fiber_for(const Thread& thread) {
  std::vector<Fiber*>& fibers = kThreadSanitizer ? block_->fibers : idle_fibers_;
  // A stack that changed hands would show as a race between its owners.
  if constexpr (kThreadSanitizer) return fibers[thread.linear_index];
  if (fibers.empty()) return create_fiber();
  Fiber* fiber = fibers.back();
  fibers.pop_back();
  return fiber;
}

void Machine::put_back(Fiber* fiber) {
  if constexpr (!kThreadSanitizer) idle_fibers_.push_back(fiber);
}

__forceinline__ void Machine::resume(Thread& thread, Fiber& from, bool last_time) {
  make_running(thread);
  if (thread.fiber == nullptr) {
    thread.fiber = fiber_for(thread);
    prepare_fiber(*thread.fiber, fiber_entry);
  }
  switch_fiber(from, *thread.fiber, last_time);
}

__forceinline__ void Machine::wait() {
  Thread& self = *running_;
  Thread& next = take_ready();
  if (&next != &self) resume(next, *self.fiber);
}

// ---- Life of a thread ---------------------------------------------------------------------------

void Machine::fiber_entry() { machine.run_threads(); }

// Returns false if the launch has failed or the cluster is done.
bool Machine::run_one_thread() {
  try {
    acquire(&launch_start_);
    acquire(block_->succession.previous());
    body_.call(body_.closure);
    thread_returned();
    if (cluster_live_ == 0) return false;
    make_running(take_ready());
    return true;
  } catch (...) {
    failure_ = std::current_exception();
    return false;
  }
}

// Runs threads on this fiber until one turns up that has a fiber of its own.
void Machine::run_threads() {
  Fiber& fiber = *running_->fiber;
  finish_switch(fiber);
  for (;;) {
    Block& own = *running_->block;
    const bool more = run_one_thread();
    release(own.succession.current());
    release(&launch_end_);
    if (!more) {
      put_back(&fiber);
      switch_fiber(fiber, host_, true);
    } else if (running_->fiber != nullptr || kThreadSanitizer) {
      put_back(&fiber);
      resume(*running_, fiber, true);
    } else {
      running_->fiber = &fiber;
    }
  }
}

void Machine::thread_returned() {
  Thread& thread = *running_;
  thread.state = State::returned;
  --block_->live;
  const unsigned warp_index = thread.linear_index / kLanes;
  Warp& warp = block_->warps[warp_index];
  warp.live &= ~(1u << thread.linear_index % kLanes);
  // The others may have been waiting for this thread alone.
  if (warp.waiting != 0) {
    for (int lane = 0; lane < kLanes; ++lane) {
      if (!(warp.waiting >> lane & 1)) continue;
      const unsigned mask = block_->threads[warp_index * kLanes + lane].mask;
      try_pass_warp_collective(warp, warp_index, mask);
    }
  }
  if (block_->waiting != 0 && block_->waiting == block_->live) pass_block_barrier();
  --cluster_live_;
  if (cluster_waiting_ != 0 && cluster_waiting_ == cluster_live_) pass_cluster_barrier();
}

// ---- Barriers -----------------------------------------------------------------------------------

bool Machine::block_barrier(const char* intrinsic, bool predicate, const Location& where) {
  Thread& self = *running_;
  Block& block = *block_;
  self.intrinsic = intrinsic;
  self.where = where;
  if (block.waiting == 0) {
    block.first_waiting = &self;
    block.predicate = false;
  } else {
    const Thread& first = *block.first_waiting;
    if (first.where.line() != where.line() || !same_text(first.intrinsic, intrinsic) ||
        !same_text(first.where.file_name(), where.file_name())) {
      fail(std::string("threads of a block meet at different barriers: this one at ") + intrinsic +
               ", thread " + describe(first.index) + " at " + first.intrinsic + ", " +
               describe(first.where),
           self, where);
    }
  }
  block.predicate |= predicate;
  self.state = State::at_block_barrier;
  void* order = block.barrier_order.current();
  release(order);
  if (++block.waiting == block.live) pass_block_barrier();
  wait();
  acquire(order);
  return block.last_predicate;
}

void Machine::pass_block_barrier() {
  Block& block = *block_;
  block.waiting = 0;
  block.last_predicate = block.predicate;
  block.barrier_order.next();
  make_ready(block, 0, block.threads.size(), State::at_block_barrier, 0);
}

void Machine::cluster_barrier(const Location& where) {
  Thread& self = *running_;
  self.intrinsic = "cluster_barrier";
  self.where = where;
  self.state = State::at_cluster_barrier;
  void* order = cluster_order_.current();
  release(order);
  if (++cluster_waiting_ == cluster_live_) pass_cluster_barrier();
  wait();
  acquire(order);
}

void Machine::pass_cluster_barrier() {
  cluster_waiting_ = 0;
  cluster_order_.next();
  const bool descending = schedule_.order == ThreadOrder::descending;
  for (unsigned i = 0; i < cluster_; ++i) {
    Block& block = *cluster_places_[descending ? i : cluster_ - 1 - i];
    make_ready(block, 0, block.threads.size(), State::at_cluster_barrier, 0);
  }
}

BarrierOrder& Machine::warp_order(Warp& warp, unsigned mask) {
  for (auto& entry : warp.mask_orders) {
    if (entry.mask == 0) entry.mask = mask;
    if (entry.mask == mask) return entry.order;
  }
  throw Error("more than " + std::to_string(kMaxWarpMasks) +
              " different masks for __syncwarp in one warp [" + context() + "]");
}

std::uint64_t Machine::warp_collective(WarpOperation operation, const char* intrinsic,
                                       unsigned mask, std::uint64_t value, int source_lane,
                                       const Location& where) {
  Thread& self = *running_;
  const unsigned warp_index = self.linear_index / kLanes;
  const unsigned lane_bit = 1u << self.linear_index % kLanes;
  Warp& warp = block_->warps[warp_index];
  if (!(mask & lane_bit)) {
    fail(std::string("lane ") + std::to_string(lane_index()) + " calls " + intrinsic +
             " but is not in its mask " + describe_mask(mask),
         self, where);
  }
  self.state = State::at_warp_collective;
  self.intrinsic = intrinsic;
  self.where = where;
  self.operation = operation;
  self.mask = mask;
  self.value = value;
  self.source_lane = source_lane;
  warp.waiting |= lane_bit;

  void* order = nullptr;
  if constexpr (kThreadSanitizer) {
    // Only this one is a memory barrier: values pass through shuffles and votes, memory does not.
    if (operation == WarpOperation::sync) order = warp_order(warp, mask).current();
    if (order != nullptr) release(order);
  }
  try_pass_warp_collective(warp, warp_index, mask);
  wait();
  if (order != nullptr) acquire(order);
  return self.value;
}

bool Machine::try_pass_warp_collective(Warp& warp, unsigned warp_index, unsigned mask) {
  const unsigned group = mask & warp.live;
  if (group == 0 || (warp.waiting & group) != group) return false;
  Thread* lanes = &block_->threads[warp_index * kLanes];
  const auto for_each_lane = [group](auto&& action) {
    for (unsigned rest = group; rest != 0; rest &= rest - 1) action(std::countr_zero(rest));
  };

  const Thread& first = lanes[std::countr_zero(group)];
  bool same_mask = true;
  for_each_lane([&](int lane) { same_mask &= lanes[lane].mask == mask; });
  if (!same_mask) return false;
  for_each_lane([&](int lane) {
    const Thread& thread = lanes[lane];
    if (!same_text(thread.intrinsic, first.intrinsic)) {
      fail("lanes of a warp meet at different intrinsics: this one at " +
               std::string(thread.intrinsic) + ", thread " + describe(first.index) + " at " +
               first.intrinsic + ", " + describe(first.where),
           thread, thread.where);
    }
  });

  // All results before anybody continues: a lane that runs ahead may give its next value.
  std::array<std::uint64_t, kLanes> given = {};
  std::uint64_t ballot = 0;
  std::uint64_t sum = 0;
  for_each_lane([&](int lane) {
    given[lane] = lanes[lane].value;
    ballot |= given[lane] << lane;
    sum += given[lane];
  });
  for_each_lane([&](int lane) {
    Thread& thread = lanes[lane];
    switch (thread.operation) {
      case WarpOperation::sync:
        break;
      case WarpOperation::ballot:
        thread.value = ballot;
        break;
      case WarpOperation::add:
        thread.value = sum;
        break;
      case WarpOperation::shuffle:
        if (!(group >> thread.source_lane & 1)) {
          const bool in_mask = mask >> thread.source_lane & 1;
          fail("lane " + std::to_string(lane) + " reads lane " +
                   std::to_string(thread.source_lane) + " by " + thread.intrinsic + ", which " +
                   (in_mask ? "has returned or does not exist"
                            : "is outside the mask " + describe_mask(mask)),
               thread, thread.where);
        }
        thread.value = given[thread.source_lane];
        break;
    }
  });

  if (kThreadSanitizer && first.operation == WarpOperation::sync) warp_order(warp, mask).next();
  warp.waiting &= ~group;
  const unsigned first_thread = warp_index * kLanes;
  const unsigned count =
      std::min<unsigned>(kLanes, static_cast<unsigned>(block_->threads.size()) - first_thread);
  make_ready(*block_, first_thread, count, State::at_warp_collective, group);
  return true;
}

// ---- Shared memory ------------------------------------------------------------------------------

// What a block has declared so far.
std::size_t static_bytes_of(const Block& block) {
  std::size_t bytes = 0;
  for (const auto& array : block.arrays) bytes += array.tag != nullptr ? array.bytes : 0;
  return bytes;
}

void* Machine::shared_memory(SharedArrayTag& tag, std::size_t bytes, std::size_t alignment) {
  Block& block = *block_;
  if (tag.block_serial == block.serial) return tag.memory;
  tag.block_serial = block.serial;
  const auto declared = std::find_if(block.arrays.begin(), block.arrays.end(),
                                     [&](const auto& array) { return array.tag == &tag; });
  if (declared != block.arrays.end()) {
    tag.memory = block.arena.get() + declared->begin;
    return tag.memory;
  }
  const std::size_t used = static_bytes_of(block) + bytes;
  if (used > kMaxSharedBytes) {
    throw Error("more than " + std::to_string(kMaxSharedBytes) +
                " bytes of static shared memory [" + context() + "]");
  }
  if (dynamic_bytes_ != 0 && used + dynamic_bytes_ > device_.shared_bytes) {
    throw Error("more than " + std::to_string(device_.shared_bytes) +
                " bytes of shared memory, static and dynamic [" + context() + "]");
  }
  tag.memory = take_shared(block, &tag, bytes, alignment);
  return tag.memory;
}

// The same place in another block of the cluster.
const void* Machine::shared_of_block(const void* address, std::size_t bytes, int rank,
                                     const Location& where) {
  const auto* own = static_cast<const unsigned char*>(address);
  const auto offset = static_cast<std::size_t>(own - block_->arena.get());
  const auto array = std::find_if(block_->arrays.begin(), block_->arrays.end(),
                                  [&](const Block::SharedArray& each) {
                                    return own >= block_->arena.get() && offset >= each.begin &&
                                           offset + bytes <= each.begin + each.bytes;
                                  });
  if (array == block_->arrays.end()) {
    fail("what is read from another block is not in shared memory", *running_, where);
  }
  if (rank < 0 || rank >= cluster_blocks()) {
    fail(
        "a cluster of " + std::to_string(cluster_) + " blocks has no block " + std::to_string(rank),
        *running_, where);
  }
  Block& other = *cluster_places_[rank];
  if (other.live == 0) {
    fail("reads shared memory of block " + describe(other.index) + ", which has returned",
         *running_, where);
  }
  // Where that block has not come to the declaration yet, nothing has been written either.
  const auto there = std::find_if(other.arrays.begin(), other.arrays.end(),
                                  [&](const auto& each) { return each.tag == array->tag; });
  const std::size_t begin =
      there != other.arrays.end()
          ? there->begin
          : take_shared(other, array->tag, array->bytes, kMaxSharedAlignment) - other.arena.get();
  return other.arena.get() + begin + (offset - array->begin);
}

unsigned char* Machine::take_shared(Block& block, const SharedArrayTag* tag, std::size_t bytes,
                                    std::size_t alignment) {
  // No better aligned than the type asks for (but to 8 bytes, as AddressSanitizer's shadow has it),
  // so that a wide access to an array of a narrow type shows as misaligned.
  std::size_t begin = block.arena_used + 2 * kRedZoneBytes;  // the last array's and this one's
  begin = (begin + kMaxSharedAlignment - 1) / kMaxSharedAlignment * kMaxSharedAlignment;
  if (alignment <= 8) begin += 8;
  if (begin + bytes + kRedZoneBytes > kArenaBytes) {
    throw Error("too many shared arrays [" + context() + "]");
  }
  block.arena_used = begin + bytes;
  block.arrays.push_back({begin, bytes, tag});
  unsigned char* memory = block.arena.get() + begin;
#ifdef __SANITIZE_ADDRESS__
  __asan_unpoison_memory_region(memory, bytes);
#else
  fill_unseen(memory - kRedZoneBytes, kRedZoneFill, kRedZoneBytes);
  fill_unseen(memory + bytes, kRedZoneFill, kRedZoneBytes);
#endif
  fill_unseen(memory, kSharedMemoryFill, bytes);
  return memory;
}

void Machine::check_red_zones([[maybe_unused]] const Block& block) {
#ifndef __SANITIZE_ADDRESS__
  const auto intact = [](const unsigned char* zone) {
    return std::all_of(zone, zone + kRedZoneBytes,
                       [](unsigned char byte) { return byte == kRedZoneFill; });
  };
  for (const Block::SharedArray& array : block.arrays) {
    const unsigned char* memory = block.arena.get() + array.begin;
    if (!intact(memory - kRedZoneBytes) || !intact(memory + array.bytes)) {
      throw Error("a write beside a shared array of " + std::to_string(array.bytes) + " bytes [" +
                  context() + "]; AddressSanitizer knows where");
    }
  }
#endif
}

// ---- Blocks and launches ------------------------------------------------------------------------

void Machine::start_block(Block& block, uint3 index, unsigned rank) {
  block.index = index;
  block.rank = rank;
  const unsigned count = blockDim.x * blockDim.y * blockDim.z;
  block.threads.assign(count, Thread{});
  block.warps.assign((count + kLanes - 1) / kLanes, Warp{});
  block.live = count;
  cluster_live_ += count;
  block.waiting = 0;
  block.serial = ++block_serial_;
  block.succession.next();
  if (!block.arena) block.arena = std::make_unique<unsigned char[]>(kArenaBytes);
  block.arena_used = 0;
  block.arrays.clear();
#ifdef __SANITIZE_ADDRESS__
  __asan_poison_memory_region(block.arena.get(), kArenaBytes);
#endif
  block.dynamic = dynamic_bytes_ == 0
                      ? nullptr
                      : take_shared(block, nullptr, dynamic_bytes_, kMaxSharedAlignment);
  uint3 thread_index = {0, 0, 0};
  for (unsigned i = 0; i < count; ++i) {
    Thread& thread = block.threads[i];
    thread.block = &block;
    thread.index = thread_index;
    thread.linear_index = i;
    block.warps[i / kLanes].live |= 1u << i % kLanes;
    if (++thread_index.x == blockDim.x) {
      thread_index.x = 0;
      if (++thread_index.y == blockDim.y) {
        thread_index.y = 0;
        ++thread_index.z;
      }
    }
  }
  if constexpr (kThreadSanitizer) {
    // All that would be allocated later, while a fiber runs.
    while (block.fibers.size() < count) block.fibers.push_back(create_fiber());
    block.arrays.reserve(kArenaBytes / (2 * kRedZoneBytes));
    ready_.reserve(cluster_ * count);
  }
  make_ready(block, 0, count, State::ready, 0);
}

// Blocks of a cluster are neighbours in the direction of x, as on the GPU.
void Machine::run_cluster(std::size_t first_place, std::uint64_t first_block) {
  cluster_places_.clear();
  for (unsigned rank = 0; rank < cluster_; ++rank) {
    cluster_places_.push_back(&blocks_[first_place + rank]);
  }
  cluster_live_ = cluster_waiting_ = 0;
  block_ = nullptr;
  failure_ = nullptr;
  ready_.clear();
  // What becomes ready last runs first.
  const bool descending = schedule_.order == ThreadOrder::descending;
  for (unsigned i = 0; i < cluster_; ++i) {
    const unsigned rank = descending ? i : cluster_ - 1 - i;
    const std::uint64_t linear = first_block + rank;
    start_block(*cluster_places_[rank],
                {static_cast<unsigned>(linear % gridDim.x),
                 static_cast<unsigned>(linear / gridDim.x % gridDim.y),
                 static_cast<unsigned>(linear / gridDim.x / gridDim.y)},
                rank);
  }
  resume(take_ready(), host_);
  if (failure_) {
    for (Block* block : cluster_places_) abandon(*block);
    std::rethrow_exception(std::exchange(failure_, nullptr));
  }
  for (const Block* block : cluster_places_) check_red_zones(*block);
}

// Takes back the fibers of threads that will never continue.
void Machine::abandon(Block& block) {
  for (Thread& thread : block.threads) {
    const bool left_its_fiber = thread.state == State::returned || &thread == running_;
    if (thread.fiber == nullptr || left_its_fiber) continue;
    Fiber& fiber = *thread.fiber;
#ifdef __SANITIZE_ADDRESS__
    __asan_unpoison_memory_region(fiber.stack, fiber.stack_bytes);
#endif
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
    // What the thread has written so far comes before whatever the host does with that memory.
    __tsan_switch_to_fiber(fiber.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    release(&launch_end_);
    __tsan_switch_to_fiber(host_.tsan_fiber, __tsan_switch_to_fiber_no_sync);
    // Its shadow call stack still holds the kernel's frames.
    __tsan_destroy_fiber(fiber.tsan_fiber);
    start_tsan_fiber(fiber);
#endif
    put_back(&fiber);
  }
  acquire(&launch_end_);
}

bool is_valid_launch(dim3 grid, dim3 block) {
  const std::uint64_t threads = std::uint64_t{block.x} * block.y * block.z;
  return grid.x >= 1 && grid.x <= 0x7fffffffu && grid.y >= 1 && grid.y <= kMaxGridYZ &&
         grid.z >= 1 && grid.z <= kMaxGridYZ && block.z <= 64 && threads >= 1 &&
         threads <= kMaxThreadsPerBlock;
}

void Machine::begin_launch(const Launch& launch, KernelBody body) {
  kernel_name_ = launch.kernel_name;
  body_ = body;
  dynamic_bytes_ = launch.dynamic_bytes;
  cluster_ = launch.cluster;
  gridDim = launch.grid;
  blockDim = launch.block;
#ifdef MLLOSS_EMULATION_THREAD_SANITIZER
  host_.tsan_fiber = __tsan_get_current_fiber();
#endif
  release(&launch_start_);
  random_ = SmallRandom(schedule_.seed);
  const std::size_t places = std::max<std::size_t>(cluster_, kConcurrentBlocks);
  while (blocks_.size() < places) blocks_.emplace_back();
}

cudaError_t Machine::run(const Launch& launch, KernelBody body) {
  const dim3 grid = launch.grid;
  if (!is_valid_launch(grid, launch.block)) return cudaErrorInvalidConfiguration;
  if (launch.dynamic_bytes > device_.shared_bytes) return cudaErrorInvalidValue;
  if (launch.cluster < 1 || launch.cluster > device_.cluster_blocks ||
      grid.x % launch.cluster != 0) {
    return cudaErrorInvalidClusterSize;
  }
  const std::lock_guard lock(one_launch_at_a_time_);
  begin_launch(launch, body);

  const std::uint64_t count = std::uint64_t{grid.x} * grid.y * grid.z / cluster_;
  std::vector<std::uint64_t> shuffled;
  if (schedule_.order == ThreadOrder::shuffled) {
    shuffled.resize(count);
    std::iota(shuffled.begin(), shuffled.end(), 0);
    for (std::uint64_t i = 1; i < count; ++i) {
      std::swap(shuffled[i], shuffled[random_.below(i + 1)]);
    }
  }
  for (std::uint64_t i = 0; i < count; ++i) {
    std::uint64_t cluster = i;
    if (schedule_.order == ThreadOrder::descending) cluster = count - 1 - i;
    if (schedule_.order == ThreadOrder::shuffled) cluster = shuffled[i];
    run_cluster(cluster_ > 1 ? 0 : i % kConcurrentBlocks, cluster * cluster_);
  }
  acquire(&launch_end_);
  ++launches_;
  if (records_.size() < kMaxRecordedLaunches) {
    records_.push_back({launch.kernel_name, grid, launch.block, launch.cluster,
                        static_bytes_of(blocks_[0]), dynamic_bytes_});
  }
  return cudaSuccess;
}

// A kernel's arrays are known once one of its threads has come by their declarations.
std::size_t Machine::static_shared_bytes(const void* kernel, KernelBody body) {
  const std::lock_guard lock(one_launch_at_a_time_);
  const auto [known, is_new] = static_shared_bytes_.try_emplace(kernel, 0);
  if (is_new) {
    begin_launch({"static_shared_bytes", dim3(1), dim3(1), 1, 0}, body);
    run_cluster(0, 0);
    acquire(&launch_end_);
    known->second = static_bytes_of(blocks_[0]);
  }
  return known->second;
}

}  // namespace

// ---- What emulator.h declares -------------------------------------------------------------------

cudaError_t run_grid(const Launch& launch, KernelBody body) { return machine.run(launch, body); }

std::size_t static_shared_bytes(const void* kernel, KernelBody body) {
  return machine.static_shared_bytes(kernel, body);
}

void set_thread_order(ThreadOrder order, std::uint64_t seed) {
  machine.set_schedule({order, seed});
}

std::uint64_t launch_count() { return machine.launches(); }

std::vector<LaunchRecord> take_launches() { return machine.take_launches(); }

void set_device(Device device) {
  if (device.shared_bytes > kMaxDeviceSharedBytes || device.cluster_blocks < 1 ||
      device.multiprocessors < 1) {
    throw Error("there is no such GPU");
  }
  device.number = machine.device().number + 1;
  machine.device() = device;
}

Device device() { return machine.device(); }

int blocks_of_cluster() { return machine.cluster_blocks(); }
int rank_in_cluster() { return machine.cluster_rank(); }
void wait_for_cluster(const Location& where) { machine.cluster_barrier(where); }

const void* shared_of_block(const void* address, std::size_t bytes, int rank,
                            const Location& where) {
  return machine.shared_of_block(address, bytes, rank, where);
}

void* dynamic_shared_memory() { return machine.dynamic_shared_memory(); }

void* shared_memory(SharedArrayTag& tag, std::size_t bytes, std::size_t alignment) {
  return machine.shared_memory(tag, bytes, alignment);
}

std::uint64_t warp_collective(WarpOperation operation, const char* intrinsic, unsigned mask,
                              std::uint64_t value, int source_lane, const Location& where) {
  return machine.warp_collective(operation, intrinsic, mask, value, source_lane, where);
}

bool block_barrier(const char* intrinsic, bool predicate, const Location& where) {
  return machine.block_barrier(intrinsic, predicate, where);
}

int lane_index() { return static_cast<int>(machine.running().linear_index % kLanes); }
void fence_memory() { machine.running().has_fenced_memory = true; }
bool has_fenced_memory() { return machine.running().has_fenced_memory; }
void trap(const Location& where) { machine.fail("__trap", machine.running(), where); }

}  // namespace mlloss::emulation

// ---- The CUDA runtime's functions that launchers call -------------------------------------------
// Defined here so that nothing has to be linked; host memory is device memory.

cudaError_t cudaGetLastError() { return cudaSuccess; }
cudaError_t cudaPeekAtLastError() { return cudaSuccess; }

const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess:
      return "no error";
    case cudaErrorInvalidClusterSize:
      return "invalid cluster size";
    case cudaErrorInvalidValue:
      return "invalid argument";
    default:
      return "invalid configuration argument";
  }
}

cudaError_t cudaMemsetAsync(void* memory, int value, std::size_t bytes, cudaStream_t) {
  std::memset(memory, value, bytes);
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind,
                            cudaStream_t) {
  std::memcpy(to, from, bytes);
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  *device = mlloss::emulation::machine.device().number;
  return cudaSuccess;
}

cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }

cudaError_t cudaOccupancyMaxActiveClusters(int* clusters, const void*,
                                           const cudaLaunchConfig_t* config) {
  unsigned blocks = 1;
  for (unsigned i = 0; i < config->numAttrs; ++i) {
    const cudaLaunchAttribute& attribute = config->attrs[i];
    if (attribute.id == cudaLaunchAttributeClusterDimension) blocks = attribute.val.clusterDim.x;
  }
  *clusters = blocks <= mlloss::emulation::machine.device().cluster_blocks ? 1 : 0;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int /*device*/) {
  constexpr int kCacheBytes = 64 << 10;
  switch (attribute) {
    case cudaDevAttrMultiProcessorCount:
      *value = mlloss::emulation::machine.device().multiprocessors;
      return cudaSuccess;
    case cudaDevAttrL2CacheSize:
      *value = kCacheBytes;
      return cudaSuccess;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(mlloss::emulation::machine.device().shared_bytes);
      return cudaSuccess;
    default:
      return cudaErrorInvalidValue;
  }
}
