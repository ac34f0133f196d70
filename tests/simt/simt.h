// A test-only SIMT emulator: CUDA kernels compiled as host C++ and run block by block, one fiber per CUDA thread.
//
// What it checks while it runs
// - Barriers and warp collectives are rendezvous: lanes at different ones, or waiting for lanes that never come, are
//   reported as divergence or deadlock with block, thread and source line.
// - Shared memory starts as NaN and lies between protected addresses, as do buffers from simt_allocate: touching the
//   byte after the end, or any that a 32-bit index reaches, is reported with block and thread.
// - cp.async lands as late as allowed (lazy: at the wait) or as early (eager: at the issue); fibers and blocks run
//   forward, in reverse, in random order, or one warp at a time (greedy). A kernel is right when all agree.
// - `skip_line` leaves out the barrier or wait of one source line, so that a test can see its absence being noticed.
//
// It knows nothing of speed, registers, memory ordering between blocks, or the rounding inside a tensor core.
#pragma once

#include <setjmp.h>
#include <signal.h>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct alignas(8) uint2 {
  unsigned x, y;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
struct __half {
  uint16_t bits;
};

using cudaStream_t = void*;
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16 };

namespace simt {

constexpr int kWarp = 32;
constexpr unsigned kFullMask = 0xffffffffu;
constexpr unsigned kMaxThreads = 1024;
constexpr size_t kStackBytes = 64 << 10;
constexpr size_t kSharedLimit = 99 << 10;    // The smallest of the supported architectures (sm_120).
constexpr size_t kSlotBytes = 64;            // The largest value that lanes exchange.
constexpr size_t kReach = size_t{64} << 30;  // As far as a 32-bit index of 16-byte words gets.

enum class Order : int { kForward = 0, kReverse = 1, kRandom = 2 };

struct Options {
  Order order = Order::kForward;
  bool greedy = false;  // Run one warp up to its block barrier before the next one starts.
  bool lazy = true;     // cp.async lands at the wait, not at the issue.
  unsigned seed = 0;    // Of Order::kRandom.
  int skip_line = 0;    // Source line whose barriers and waits are left out.
  int processors = 4;   // What cudaDevAttrMultiProcessorCount answers.
};
inline Options options;

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Memory that ends (or starts, `at_end` = false) flush with protected addresses; filled with 0xFF, a NaN in every type.
// The protected addresses, `guard` bytes on either side, cost nothing. They reach far: a kernel without its barrier may
// store at an index that is any number, and must not hit what belongs to the process.
class GuardedMemory {
 public:
  GuardedMemory(size_t bytes, bool at_end, size_t guard = kReach) : bytes_(bytes) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t inner = (bytes + page - 1) / page * page;
    mapped_ = inner + 2 * guard;
    base_ = static_cast<unsigned char*>(
        mmap(nullptr, mapped_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
    if (base_ == MAP_FAILED) throw std::bad_alloc();
    unsigned char* const first = base_ + guard;
    if (inner != 0 && mprotect(first, inner, PROT_READ | PROT_WRITE) != 0) throw std::bad_alloc();
    data_ = at_end ? first + inner - bytes : first;
    std::memset(first, 0xFF, inner);
  }
  ~GuardedMemory() { munmap(base_, mapped_); }
  GuardedMemory(const GuardedMemory&) = delete;
  GuardedMemory& operator=(const GuardedMemory&) = delete;

  unsigned char* data() const { return data_; }
  size_t bytes() const { return bytes_; }
  bool near(const void* address) const {
    return address >= base_ && address < static_cast<const void*>(base_ + mapped_);
  }

 private:
  unsigned char *base_, *data_;
  size_t bytes_, mapped_;
};

inline std::map<void*, std::unique_ptr<GuardedMemory>> buffers;  // What simt_allocate handed out.
inline std::deque<GuardedMemory> stacks;                         // Of the threads of a block; kept for the next one.

enum class State { kReady, kBarrier, kWarp, kDone };

struct Copy {
  void* to;
  const void* from;
  int size, bytes, group;
};

struct Fiber {
  ucontext_t start;
  jmp_buf at;
  bool started = false;
  State state = State::kReady;
  const char* waits_in = "";
  int line = 0, index = 0, groups = 0;
  std::vector<Copy> copies;
};

// One meeting of the lanes of a mask. Two sets of slots: a lane may reach the next meeting before another read this
// one.
struct Rendezvous {
  const char* name = "";
  int line = 0, generation = 0;
  unsigned arrived = 0;
  alignas(16) unsigned char slots[2][kWarp][kSlotBytes];
};

struct Block {
  dim3 grid, index;
  std::deque<Fiber> fibers;
  std::vector<std::map<unsigned, Rendezvous>> warps;  // Open and past meetings by mask.
  std::function<void()> kernel;
  const GuardedMemory* shared = nullptr;
};

inline Block* block = nullptr;
inline Fiber* fiber = nullptr;  // The running one; null while the scheduler runs.
inline jmp_buf scheduler;
inline char failure[512];

inline int lane() { return fiber->index % kWarp; }
inline unsigned char* shared_memory() { return block->shared->data(); }

inline std::string place(const Fiber& f) {
  const dim3& b = block->index;
  char text[96];
  std::snprintf(text, sizeof text, "block (%u, %u, %u), thread %d", b.x, b.y, b.z, f.index);
  return text;
}

// Ends the launch with an error; called on a fiber, whose stack is abandoned.
[[noreturn]] inline void fail(const std::string& what, int line) {
  std::snprintf(failure, sizeof failure, "simt: %s: %s, line %d", what.c_str(), place(*fiber).c_str(), line);
  _longjmp(scheduler, 1);
}

inline void require_aligned(const void* pointer, size_t bytes, const char* name, int line) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes != 0) fail(std::string(name) + ": misaligned address", line);
}

inline void yield(State state, const char* name, int line) {
  fiber->state = state;
  fiber->waits_in = name;
  fiber->line = line;
  if (_setjmp(fiber->at) == 0) _longjmp(scheduler, 1);
}

inline void sync_block(int line) {
  if (line != options.skip_line) yield(State::kBarrier, "__syncthreads", line);
}

// The lanes of `mask` meet; the last to arrive calls finish(values), indexed by lane; each returns its own value.
template <typename Value, typename Finish>
Value exchange(unsigned mask, const Value& value, const char* name, int line, Finish finish) {
  static_assert(sizeof(Value) <= kSlotBytes && std::is_trivially_copyable_v<Value>);
  auto& meetings = block->warps[fiber->index / kWarp];
  if (!(mask >> lane() & 1)) fail(std::string(name) + ": the calling lane is not in the mask", line);
  for (const auto& [other, meeting] : meetings) {
    if (meeting.arrived == 0 || !(other >> lane() & 1)) continue;
    if (other != mask || meeting.line != line || std::strcmp(meeting.name, name) != 0)
      fail(std::string("divergence: ") + name + " while other lanes of the warp wait in " + meeting.name + ", line " +
               std::to_string(meeting.line),
           line);
  }
  Rendezvous& meeting = meetings[mask];
  auto& slots = meeting.slots[meeting.generation % 2];
  unsigned char* mine = slots[lane()];
  meeting.name = name;
  meeting.line = line;
  meeting.arrived |= 1u << lane();
  std::memcpy(mine, &value, sizeof(Value));
  if (meeting.arrived != mask) {
    yield(State::kWarp, name, line);
  } else {
    Value values[kWarp];
    for (int l = 0; l < kWarp; ++l) std::memcpy(&values[l], slots[l], sizeof(Value));
    finish(values);
    for (int l = 0; l < kWarp; ++l) std::memcpy(slots[l], &values[l], sizeof(Value));
    meeting.arrived = 0;
    ++meeting.generation;
    const size_t first = static_cast<size_t>(fiber->index / kWarp * kWarp);
    for (size_t l = 0; l < kWarp && first + l < block->fibers.size(); ++l)
      if ((mask >> l & 1) && &block->fibers[first + l] != fiber) block->fibers[first + l].state = State::kReady;
  }
  Value result;
  std::memcpy(&result, mine, sizeof(Value));
  return result;
}

inline void land(const Copy& copy) {
  std::memset(copy.to, 0, static_cast<size_t>(copy.size));
  std::memcpy(copy.to, copy.from, static_cast<size_t>(copy.bytes));
}

inline void async_copy(void* shared, const void* global, int size, int bytes, int line) {
  require_aligned(shared, static_cast<size_t>(size), "cp.async destination", line);
  require_aligned(global, static_cast<size_t>(size), "cp.async source", line);
  const auto* to = static_cast<unsigned char*>(shared);
  if (to < shared_memory() || to + size > shared_memory() + block->shared->bytes())
    fail("cp.async destination is not in shared memory", line);
  if (bytes < 0 || bytes > size) fail("cp.async of " + std::to_string(bytes) + " bytes", line);
  const Copy copy{shared, global, size, bytes, fiber->groups};
  if (options.lazy)
    fiber->copies.push_back(copy);
  else
    land(copy);
}

inline void async_commit() { ++fiber->groups; }

inline void async_wait(int newest, int line) {
  if (line == options.skip_line) return;
  auto& copies = fiber->copies;
  const auto pending = std::stable_partition(copies.begin(), copies.end(),
                                             [&](const Copy& copy) { return copy.group >= fiber->groups - newest; });
  std::for_each(pending, copies.end(), land);
  copies.erase(pending, copies.end());
}

// Copies that nothing waited for never land: the latest moment there is.
inline void fiber_main() {
  block->kernel();
  yield(State::kDone, "", 0);
}

// A fault inside a kernel becomes an error of the launch; any other goes to whoever handled it before.
inline struct sigaction previous_handler;
inline void on_fault(int, siginfo_t* info, void*) {
  if (fiber == nullptr) {
    sigaction(SIGSEGV, &previous_handler, nullptr);
    return;
  }
  const auto* address = static_cast<const unsigned char*>(info->si_addr);
  char where[128] = "an address that belongs to no buffer";
  const auto describe = [&](const char* kind, const GuardedMemory& memory) {
    if (!memory.near(address)) return;
    std::snprintf(where, sizeof where, "%s of %zu bytes, at offset %td", kind, memory.bytes(), address - memory.data());
  };
  for (const auto& [data, memory] : buffers) describe("a buffer", *memory);
  describe("shared memory", *block->shared);
  describe("a thread's stack", stacks[fiber->index]);
  std::snprintf(failure, sizeof failure, "simt: out of bounds access: %s: %s", where, place(*fiber).c_str());
  _longjmp(scheduler, 1);
}

class FaultHandler {
 public:
  FaultHandler() : stack_(64 << 10) {
    stack_t stack{};
    stack.ss_sp = stack_.data();
    stack.ss_size = stack_.size();
    sigaltstack(&stack, &previous_stack_);
    struct sigaction action{};
    action.sa_sigaction = on_fault;
    action.sa_flags = SA_SIGINFO | SA_ONSTACK | SA_NODEFER;
    sigaction(SIGSEGV, &action, &previous_handler);
  }
  ~FaultHandler() {
    sigaction(SIGSEGV, &previous_handler, nullptr);
    sigaltstack(&previous_stack_, nullptr);
  }

 private:
  std::vector<char> stack_;
  stack_t previous_stack_{};
};

inline void resume(Fiber& next) {
  fiber = &next;
  if (_setjmp(scheduler) == 0) {
    if (next.started) _longjmp(next.at, 1);
    next.started = true;
    setcontext(&next.start);
  }
  fiber = nullptr;
  if (failure[0] != '\0') throw Error(failure);
}

class Scheduler {
 public:
  Scheduler() : random_(options.seed) {}

  std::vector<size_t> sequence(size_t count) {
    std::vector<size_t> order(count);
    std::iota(order.begin(), order.end(), size_t{0});
    if (options.order == Order::kReverse) std::reverse(order.begin(), order.end());
    if (options.order == Order::kRandom) std::shuffle(order.begin(), order.end(), random_);
    return order;
  }

  void run(Block& current) {
    block = &current;
    start();
    for (bool alive = true; alive;) {
      const bool progress = options.greedy ? pass_by_warp() : pass(0, block->fibers.size());
      alive = !release_barrier(progress);
    }
  }

 private:
  void start() {
    std::memset(shared_memory(), 0xFF, block->shared->bytes());
    for (size_t i = 0; i < block->fibers.size(); ++i) {
      Fiber& f = block->fibers[i] = Fiber{};
      f.index = static_cast<int>(i);
      getcontext(&f.start);
      if (i == stacks.size()) stacks.emplace_back(kStackBytes, /*at_end=*/true, /*guard=*/kStackBytes);
      f.start.uc_stack.ss_sp = stacks[i].data();
      f.start.uc_stack.ss_size = kStackBytes;
      f.start.uc_link = nullptr;
      makecontext(&f.start, fiber_main, 0);
    }
    for (auto& meetings : block->warps) meetings.clear();
  }

  // Runs every ready fiber of [first, last) once; true when there was one.
  bool pass(size_t first, size_t last) {
    bool progress = false;
    for (const size_t i : sequence(last - first)) {
      Fiber& f = block->fibers[first + i];
      if (f.state != State::kReady) continue;
      resume(f);
      progress = true;
    }
    return progress;
  }

  bool pass_by_warp() {
    bool progress = false;
    for (const size_t warp : sequence(block->warps.size())) {
      const size_t first = warp * kWarp, last = std::min(first + kWarp, block->fibers.size());
      while (pass(first, last)) progress = true;
    }
    return progress;
  }

  // Opens the block barrier when every live fiber stands at it; true when none is alive.
  static bool release_barrier(bool progress) {
    const Fiber *at_barrier = nullptr, *elsewhere = nullptr, *runnable = nullptr;
    for (const Fiber& f : block->fibers) {
      if (f.state == State::kReady) runnable = &f;
      if (f.state == State::kWarp) elsewhere = &f;
      if (f.state != State::kBarrier) continue;
      if (at_barrier != nullptr && at_barrier->line != f.line) stuck("divergent __syncthreads", *at_barrier, f);
      at_barrier = &f;
    }
    if (runnable != nullptr) return false;
    if (elsewhere == nullptr && at_barrier == nullptr) return true;
    if (elsewhere == nullptr) {
      for (Fiber& f : block->fibers)
        if (f.state == State::kBarrier) f.state = State::kReady;
    } else if (!progress) {
      stuck("deadlock", *elsewhere, at_barrier != nullptr ? *at_barrier : *elsewhere);
    }
    return false;
  }

  [[noreturn]] static void stuck(const char* what, const Fiber& a, const Fiber& b) {
    const auto waits = [](const Fiber& f) {
      return place(f) + " waits in " + f.waits_in + ", line " + std::to_string(f.line);
    };
    throw Error(std::string("simt: ") + what + ": " + waits(a) + (&a == &b ? "" : "; " + waits(b)));
  }

  std::mt19937 random_;
};

inline cudaError_t launch(dim3 grid, unsigned threads, size_t shared_bytes, std::function<void()> kernel) {
  if (shared_bytes > kSharedLimit || threads == 0 || threads > kMaxThreads) return cudaErrorInvalidValue;
  if (grid.y > 65535 || grid.z > 65535 || grid.x > 0x7fffffffu) return cudaErrorInvalidValue;
  FaultHandler handler;
  Scheduler schedule;
  shared_bytes = (shared_bytes + 15) / 16 * 16;
  const GuardedMemory shared(shared_bytes, /*at_end=*/true);
  Block current;
  current.grid = grid;
  current.fibers.resize(threads);
  current.warps.resize((threads + kWarp - 1) / kWarp);
  current.kernel = std::move(kernel);
  current.shared = &shared;
  failure[0] = '\0';
  for (const size_t i : schedule.sequence(size_t{grid.x} * grid.y * grid.z)) {
    current.index = dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                         static_cast<unsigned>(i / grid.x / grid.y));
    schedule.run(current);
  }
  return cudaSuccess;
}

inline dim3 thread_index() { return dim3(static_cast<unsigned>(fiber->index), 0, 0); }
inline dim3 block_size() { return dim3(static_cast<unsigned>(block->fibers.size())); }

template <typename Value>
Value shuffle(unsigned mask, Value value, int source, const char* name, int line) {
  struct Item {
    Value value;
    int source;
  };
  return exchange(mask, Item{value, source}, name, line,
                  [mask](Item(&items)[kWarp]) {
                    Value out[kWarp];
                    for (int l = 0; l < kWarp; ++l)
                      out[l] = mask >> l & 1 ? items[items[l].source & (kWarp - 1)].value : Value{};
                    for (int l = 0; l < kWarp; ++l) items[l].value = out[l];
                  })
      .value;
}

inline unsigned ballot(unsigned mask, bool predicate, int line) {
  return exchange(mask, unsigned{predicate}, "__ballot_sync", line, [mask](unsigned (&items)[kWarp]) {
    unsigned bits = 0;
    for (int l = 0; l < kWarp; ++l) bits |= (mask >> l & 1 ? items[l] : 0u) << l;
    std::fill(std::begin(items), std::end(items), bits);
  });
}

// Of the eight bytes of b:a, those that the four lowest digits of `selector` name. Its sign mode is not in use here.
inline unsigned permute_bytes(unsigned a, unsigned b, unsigned selector, int line) {
  if (selector & 0x8888) fail("prmt: a selector with its sign bit set", line);
  const uint64_t bytes = static_cast<uint64_t>(b) << 32 | a;
  unsigned out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<unsigned>(bytes >> 8 * (selector >> 4 * i & 7) & 0xff) << 8 * i;
  return out;
}

inline void sync_warp(int line) {
  if (line != options.skip_line) ballot(kFullMask, true, line);
}

inline float to_float(__nv_bfloat16 value) {
  const uint32_t bits = static_cast<uint32_t>(value.bits) << 16;
  float out;
  std::memcpy(&out, &bits, sizeof out);
  return out;
}

inline float to_float(__half value) {
  _Float16 out;
  std::memcpy(&out, &value, sizeof out);
  return static_cast<float>(out);
}

inline __nv_bfloat16 to_bfloat16(float value) {  // To nearest, ties to even; NaN stays NaN.
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  if (std::isnan(value)) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline __half to_half(float value) {
  const _Float16 out = static_cast<_Float16>(value);
  __half result;
  std::memcpy(&result, &out, sizeof result);
  return result;
}

}  // namespace simt

#define threadIdx (simt::thread_index())
#define blockIdx (simt::block->index)
#define blockDim (simt::block_size())
#define gridDim (simt::block->grid)
#define __syncthreads() simt::sync_block(__LINE__)
#define __syncwarp() simt::sync_warp(__LINE__)
#define __ballot_sync(mask, predicate) simt::ballot(mask, predicate, __LINE__)
#define __shfl_sync(mask, value, source) simt::shuffle(mask, value, source, "__shfl_sync", __LINE__)
#define __shfl_xor_sync(mask, value, bits) \
  simt::shuffle(mask, value, simt::lane() ^ (bits), "__shfl_xor_sync", __LINE__)
#define __shfl_up_sync(mask, value, lanes) \
  simt::shuffle(mask, value, simt::lane() - (simt::lane() < (lanes) ? 0 : (lanes)), "__shfl_up_sync", __LINE__)

template <typename T>
T __ldg(const T* pointer) {
  return *pointer;
}
template <typename T>
void __stcs(T* pointer, T value) {
  *pointer = value;
}
inline int __popc(unsigned value) { return __builtin_popcount(value); }
inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((static_cast<uint64_t>(high) << 32 | low) >> (bits & 31));
}

// Threads take turns, so these are atomic.
inline unsigned long long atomicAdd(unsigned long long* target, unsigned long long value) {
  const unsigned long long before = *target;
  *target += value;
  return before;
}
inline unsigned long long atomicMin(unsigned long long* target, unsigned long long value) {
  const unsigned long long before = *target;
  *target = std::min(before, value);
  return before;
}
inline float rsqrtf(float value) { return 1.0f / std::sqrt(value); }
inline float __bfloat162float(__nv_bfloat16 value) { return simt::to_float(value); }
inline __nv_bfloat16 __float2bfloat16(float value) { return simt::to_bfloat16(value); }
inline float __half2float(__half value) { return simt::to_float(value); }
inline __half __float2half(float value) { return simt::to_half(value); }

inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr, int) {
  *value = simt::options.processors;
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "invalid argument";
}
