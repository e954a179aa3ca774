// Runs CUDA C++ kernels on the host, for tests. Each CUDA thread is a fiber, which runs until it waits: at a barrier, in a warp
// exchange, or in `spin`. Blocks that the GPU would run together (of a cluster, or of a whole cooperative launch) take turns,
// so that they can wait for each other. One host thread runs it all.
//
// It finds wrong indices, wrong layouts, participants that are missing, waits that never end, and with AddressSanitizer
// accesses outside what was allocated. It does not find data races between real threads (running the fibers in other orders
// finds some), and says nothing about speed. Dynamic shared memory is a heap buffer of exactly the launch's size, filled with
// 0xCB.
#pragma once
#include <cuda_runtime.h>  // types alone: dim3, float4, cudaStream_t
#if !defined(__x86_64__)
#include <ucontext.h>
#endif
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/common_interface_defs.h>
#endif

#include <algorithm>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <string>
#include <vector>

namespace cuda_on_cpu {

// drifting: forward, while some warps, or groups of four, stand still for a while and the others run ahead
enum class Order { forward, backward, shuffled, drifting };
inline Order order_of(const std::string& name) {
  return name == "backward"   ? Order::backward
         : name == "shuffled" ? Order::shuffled
         : name == "drifting" ? Order::drifting
                              : Order::forward;
}

// What tests choose, and what went wrong.
struct Settings {
  Order order = Order::forward;
  int processors = 3;  // multiprocessors of the device that the launchers see
  int capability = 90;
  std::string error;  // of the last launch
  long launches = 0;
};
inline Settings settings;

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 512 << 10;
#else
constexpr size_t kStack = 128 << 10;
#endif

#if defined(__x86_64__)
// Saves the callee-saved registers on the stack, swaps stacks, restores. No system call, unlike swapcontext.
extern "C" void cuda_on_cpu_switch(void** save, void* load);
#endif

struct Block;
struct Pending {  // a wgmma: done when it is waited for, as late as a GPU may do it
  std::function<void()> run;
  int group;  // -1: not committed yet
};

enum class Wait { none, block, named, warp, cluster };
constexpr int kPayload = 32;  // bytes a lane gives to a warp exchange

struct Fiber {
  Block* block = nullptr;
  uint3 thread{};
  int linear = 0;
  bool started = false, done = false;
  Wait wait = Wait::none;
  int barrier_id = 0, barrier_threads = 0;
  unsigned mask = 0;
  unsigned char give[kPayload];
  unsigned char (*gather)[kPayload] = nullptr;  // [32] of the lanes of `mask`
  std::vector<Pending> products;
  std::vector<std::vector<std::function<void()>>> copies;  // cp.async groups, oldest first; the last one is open
  int product_groups = 0;
#if defined(__x86_64__)
  void* stack_pointer = nullptr;
#else
  ucontext_t context;
#endif
  char* stack = nullptr;
  void* fake_stack = nullptr;
};

struct Gang;
struct Block {
  Gang* gang = nullptr;
  uint3 index{};
  unsigned rank = 0;  // in the gang
  std::vector<Fiber> fibers;
  unsigned char* shared = nullptr;  // 1024-byte aligned
  size_t shared_bytes = 0;
  int alive = 0, at_barrier = 0;
};
struct Gang {
  std::vector<std::unique_ptr<Block>> blocks;
  int alive = 0, at_cluster = 0;
};

struct State {
  Fiber* fiber = nullptr;
  dim3 grid{}, dim{};
  unsigned cluster = 1;
  std::function<void()> body;
#if defined(__x86_64__)
  void* scheduler = nullptr;
#else
  ucontext_t scheduler;
#endif
  void* fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
  bool progress = false;  // something other than spinning happened
  bool trapped = false;
};
inline State state;
inline std::vector<char*> free_stacks;

inline Fiber& self() { return *state.fiber; }

inline void to_scheduler(bool finished) {
  Fiber& f = self();
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(finished ? nullptr : &f.fake_stack, state.scheduler_stack, state.scheduler_size);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&f.stack_pointer, state.scheduler);
#else
  swapcontext(&f.context, &state.scheduler);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(f.fake_stack, nullptr, nullptr);
#endif
  (void)finished;
}

inline void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &state.scheduler_stack, &state.scheduler_size);
#endif
  state.body();
  Fiber& f = self();
  f.done = true;
  f.block->alive--, f.block->gang->alive--;
  to_scheduler(true);
  std::abort();  // a finished fiber is not resumed
}

inline void resume(Fiber& f) {
  state.fiber = &f;
  if (!f.started) {
    f.started = true;
    if (free_stacks.empty()) {
      f.stack = static_cast<char*>(std::aligned_alloc(4096, kStack));
    } else {
      f.stack = free_stacks.back(), free_stacks.pop_back();
    }
#if defined(__x86_64__)
    void** top = reinterpret_cast<void**>(f.stack + kStack) - 2;  // keeps the stack 16-byte aligned at the entry
    top[0] = reinterpret_cast<void*>(&fiber_main);
    top[1] = nullptr;
    f.stack_pointer = top - 6;  // six registers below the return address
    std::memset(top - 6, 0, 6 * sizeof(void*));
#else
    getcontext(&f.context);
    f.context.uc_stack.ss_sp = f.stack, f.context.uc_stack.ss_size = kStack, f.context.uc_link = nullptr;
    makecontext(&f.context, fiber_main, 0);
#endif
  }
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&state.fake_stack, f.stack, kStack);
#endif
#if defined(__x86_64__)
  cuda_on_cpu_switch(&state.scheduler, f.stack_pointer);
#else
  swapcontext(&state.scheduler, &f.context);
#endif
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(state.fake_stack, nullptr, nullptr);
#endif
  if (f.done) free_stacks.push_back(f.stack), f.stack = nullptr;
}

// ---- waiting. The last participant to arrive releases the others and goes on.

inline void release(Fiber& f) { f.wait = Wait::none, state.progress = true; }
inline void wait_here() {
  while (self().wait != Wait::none) to_scheduler(false);
}

inline void block_barrier() {
  Fiber& f = self();
  Block& b = *f.block;
  f.wait = Wait::block;
  if (++b.at_barrier == b.alive) {
    // exited threads do not take part, as on a GPU
    b.at_barrier = 0;
    for (Fiber& other : b.fibers) {
      if (other.wait == Wait::block) release(other);
    }
  }
  wait_here();
}
// Threads that meet at one barrier with other ideas of their number wait for ever: on a GPU anything may happen.
inline void named_barrier(int id, int threads) {
  Fiber& f = self();
  f.wait = Wait::named, f.barrier_id = id, f.barrier_threads = threads;
  int here = 0, agreed = 0;
  for (Fiber& other : f.block->fibers) {
    if (other.done || other.wait != Wait::named || other.barrier_id != id) continue;
    here++, agreed += other.barrier_threads == threads;
  }
  const bool all = here == threads && agreed == threads;
  for (Fiber& other : f.block->fibers) {
    if (other.done || other.wait != Wait::named || other.barrier_id != id) continue;
    if (all) release(other);
    if (here != agreed) other.barrier_threads = 0;
  }
  wait_here();
}
inline void gang_barrier() {
  Fiber& f = self();
  Gang& g = *f.block->gang;
  f.wait = Wait::cluster;
  if (++g.at_cluster == g.alive) {
    g.at_cluster = 0;
    for (auto& b : g.blocks) {
      for (Fiber& other : b->fibers) {
        if (other.wait == Wait::cluster) release(other);
      }
    }
  }
  wait_here();
}
inline void spin_once() { to_scheduler(false); }
// Ends the launch.
inline void trap() {
  state.trapped = true;
  to_scheduler(false);
}

// Every lane of `mask` gives `size` bytes; all of them get what all gave, at [lane].
inline void exchange(unsigned mask, const void* give, size_t size, unsigned char (*gather)[kPayload]) {
  Fiber& f = self();
  const int first = f.linear / 32 * 32, lanes = std::min<int>(32, int(f.block->fibers.size()) - first);
  std::memcpy(f.give, give, size);
  f.gather = gather, f.mask = mask, f.wait = Wait::warp;
  bool all = (mask >> (f.linear - first) & 1) != 0;
  for (int l = 0; l < lanes && all; l++) {
    const Fiber& other = f.block->fibers[size_t(first + l)];
    if (mask >> l & 1) all = !other.done && other.wait == Wait::warp && other.mask == mask;
  }
  if (all) {
    for (int l = 0; l < lanes; l++) {
      if (!(mask >> l & 1)) continue;
      Fiber& other = f.block->fibers[size_t(first + l)];
      for (int from = 0; from < lanes; from++) {
        if (mask >> from & 1) std::memcpy(other.gather[from], f.block->fibers[size_t(first + from)].give, size);
      }
      release(other);
    }
  }
  wait_here();
}

inline const char* describe(const Fiber& f) {
  if (!f.started) return "not started";
  switch (f.wait) {
    case Wait::none: return "spinning";
    case Wait::block: return "waiting at __syncthreads";
    case Wait::named: return "waiting at a named barrier";
    case Wait::warp: return "waiting in a warp exchange";
    case Wait::cluster: return "waiting at a cluster barrier";
  }
  return "";
}

// Runs the blocks of a gang to their end; false: one trapped, or they wait for something that never comes.
inline bool run_gang(Gang& gang) {
  std::vector<Fiber*> order;
  for (auto& b : gang.blocks) {
    for (Fiber& f : b->fibers) order.push_back(&f);
  }
  if (settings.order == Order::backward) std::reverse(order.begin(), order.end());
  unsigned seed = 12345;
  const auto draw = [&] { return (seed = seed * 1664525u + 1013904223u) >> 8; };
  unsigned still = 0;  // which ones stand still, by a hash; 0: none
  int rounds = 0;      // for how long
  const auto stands = [&](const Fiber& f) {
    const unsigned unit = f.block->rank * 1024u + unsigned(f.linear) / (still % 2 == 0 ? 32 : 128);
    return still != 0 && ((unit ^ still) * 2654435761u >> 28) % 2 == 0;
  };
  for (int idle = 0; gang.alive > 0;) {
    if (settings.order == Order::shuffled) {
      for (size_t i = order.size() - 1; i > 0; i--) std::swap(order[i], order[draw() % (i + 1)]);
    }
    if (settings.order == Order::drifting && --rounds <= 0) still = draw(), rounds = int(1 + draw() % 100);
    state.progress = false;
    const int before = gang.alive;
    for (Fiber* f : order) {
      if (!f->done && f->wait == Wait::none && !stands(*f)) {
        state.progress |= !f->started;
        resume(*f);
        if (state.trapped) {
          settings.error = "trap: thread " + std::to_string(f->linear) + " of block " + std::to_string(f->block->index.x);
          return false;
        }
        if (!f->done) state.progress |= f->wait != Wait::none;
      }
    }
    // a thread that exits can be the one that a barrier waited for
    for (auto& b : gang.blocks) {
      if (b->alive > 0 && b->at_barrier == b->alive) {
        b->at_barrier = 0;
        for (Fiber& f : b->fibers) {
          if (f.wait == Wait::block) release(f);
        }
      }
    }
    const bool stuck = !state.progress && gang.alive == before;
    idle = !stuck ? 0 : still == 0 ? idle + 1 : idle;
    if (stuck) still = 0, rounds = 2;  // a round of all of them
    if (idle > 1000) {
      for (Fiber* f : order) {
        if (f->done) continue;
        char text[160];
        std::snprintf(text, sizeof text, "deadlock: thread %d of block %u is %s while %d threads have not finished", f->linear,
                      f->block->index.x, describe(*f), gang.alive);
        settings.error = text;
        return false;
      }
    }
  }
  return true;
}

inline cudaError_t launch(dim3 grid, unsigned threads, size_t shared, unsigned cluster, bool cooperative,
                          std::function<void()> body) {
  settings.error.clear();
  settings.launches++;
  if (threads == 0 || threads > 1024 || grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.y > 65535 || grid.z > 65535) {
    settings.error = "launch with an empty or too large grid or block";
    return cudaErrorInvalidConfiguration;
  }
  if (shared > 227 * 1024 || grid.x % cluster != 0) {
    settings.error = "launch with too much shared memory, or a grid that is not a multiple of the cluster";
    return cudaErrorInvalidValue;
  }
  const size_t blocks = size_t(grid.x) * grid.y * grid.z;
  if (cooperative && blocks > size_t(settings.processors) * 8) {
    settings.error = "cooperative launch of more blocks than run together";
    return cudaErrorCooperativeLaunchTooLarge;
  }
  state.grid = grid, state.dim = dim3(threads), state.cluster = cluster, state.body = std::move(body), state.trapped = false;
  const size_t gang_size = cooperative ? blocks : cluster;
  bool good = true;
  for (size_t first = 0; first < blocks && good; first += gang_size) {
    const size_t at = settings.order == Order::backward ? blocks - gang_size - first : first;
    Gang gang;
    for (size_t i = 0; i < gang_size; i++) {
      auto b = std::make_unique<Block>();
      const size_t n = at + i;
      b->gang = &gang, b->rank = unsigned(i);
      b->index = {unsigned(n % grid.x), unsigned(n / grid.x % grid.y), unsigned(n / grid.x / grid.y)};
      b->shared_bytes = shared;
      // aligned_alloc may round its size up: ask for the exact one, and keep what lies beyond it out of bounds
      void* memory = nullptr;
      if (posix_memalign(&memory, 1024, std::max<size_t>(shared, 1)) != 0) std::abort();
      b->shared = static_cast<unsigned char*>(memory);
      std::memset(b->shared, 0xCB, std::max<size_t>(shared, 1));
      b->fibers.resize(threads);
      b->alive = int(threads);
      for (unsigned t = 0; t < threads; t++) {
        Fiber& f = b->fibers[t];
        f.block = b.get(), f.linear = int(t), f.thread = {t, 0, 0};
      }
      gang.alive += int(threads);
      gang.blocks.push_back(std::move(b));
    }
    good = run_gang(gang);
    for (auto& b : gang.blocks) {
      std::free(b->shared);
      for (Fiber& f : b->fibers) {
        if (f.stack != nullptr) std::free(f.stack);  // of a fiber that never ended
      }
    }
  }
  return good ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_cpu
