// The scheduler of the CPU stand-in. Every CUDA thread is a fiber with a stack of its own; one fiber
// runs until it waits for others (a warp operation, a barrier of its block) or ends, and the schedule
// says which of those that can go on is next. Blocks run one after the other.
//
// Never compiled with a sanitizer: the kernels are, and the scheduler tells the sanitizers' runtimes
// of its fibers through weak symbols. ThreadSanitizer is told that switching orders nothing and that
// barriers do, so it reports a missing barrier even when the schedule hid it.

#include "simt.h"

#include <dlfcn.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>

#include <algorithm>
#include <numeric>
#include <string>
#include <vector>

#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#define WEAK __attribute__((weak))
extern "C" {
WEAK void __sanitizer_start_switch_fiber(void** save, const void* bottom, size_t size);
WEAK void __sanitizer_finish_switch_fiber(void* save, const void** bottom, size_t* size);
WEAK void __asan_poison_memory_region(const volatile void* address, size_t size);
WEAK void __asan_unpoison_memory_region(const volatile void* address, size_t size);
WEAK void* __tsan_get_current_fiber();
WEAK void* __tsan_create_fiber(unsigned flags);
WEAK void __tsan_switch_to_fiber(void* fiber, unsigned flags);
WEAK void __tsan_acquire(void* token);
WEAK void __tsan_release(void* token);
}

uint3 threadIdx, blockIdx, blockDim, gridDim;

namespace {

using simt::WarpOp;
using Here = std::source_location;

constexpr unsigned WARP = 32;
constexpr size_t STACK = 64 * 1024;
constexpr size_t GUARD = 4096;
// The most shared memory that a block has on any chip.
constexpr size_t SHARED = 228 * 1024;
constexpr size_t RED_ZONE = 64;

enum class State { READY, AT_WARP_OP, AT_BLOCK_BARRIER, ENDED };

struct Block;

struct Fiber {
    void* stack_pointer = nullptr;
    char* stack = nullptr;
    Block* block = nullptr;
    unsigned thread = 0;
    State state = State::READY;
    Here here;
    // The warp operation it waits in.
    WarpOp op = WarpOp::SYNC;
    uint32_t mask = 0;
    unsigned argument = 0;
    uint64_t value = 0, result = 0;
    // The sanitizers' names for it.
    void* fake_stack = nullptr;
    void* tsan = nullptr;
#if !defined(__x86_64__)
    ucontext_t context;
#endif
};

// A barrier's address, to ThreadSanitizer, alternating so that one round is not taken for the next.
struct Round {
    char tokens[2];
    unsigned number = 0;

    void* token() { return &tokens[number & 1]; }
};

struct Warp {
    uint32_t alive = 0;
    Round round;
};

struct SharedVariable {
    const void* key;
    size_t offset;
};

struct Block {
    uint3 index;
    unsigned alive, waiting;
    Round round;
    Fiber* fibers;
    std::vector<Warp> warps;
    char* shared;
    size_t shared_used;
    std::vector<SharedVariable> variables;
};

enum Order : int { FIFO, LIFO, RANDOM };

struct Scheduler {
    const simt::Kernel* kernel;
    const void* args;
    Order order;
    uint64_t random;
    unsigned threads;
    size_t dynamic_shared;  // bytes

    Block block;  // the running one
    std::vector<Fiber> fibers;

    std::vector<Fiber*> ready;  // a ring
    size_t head, tail;

    Fiber host;
    Fiber* current;
    // The sanitizers' token for start and end of a block.
    char start, end;

    char* report;
    size_t report_bytes;
    bool failed;
} S;

// Memory that outlives a launch.
std::vector<char*> stacks, shared_memories;
std::vector<void*> tsan_fibers;
const simt::Kernel* kernels;

void acquire(void* token) {
    if (__tsan_acquire) __tsan_acquire(token);
}
void release(void* token) {
    if (__tsan_release) __tsan_release(token);
}

uint64_t next_random() {
    S.random ^= S.random << 13;
    S.random ^= S.random >> 7;
    S.random ^= S.random << 17;
    return S.random;
}

// ---- switching stacks ----

extern "C" void simt_run_fiber();

#if defined(__x86_64__)
extern "C" void simt_switch_stack(void** save, void* to);
// Keeps what the calling convention says a function keeps.
asm(R"(
.text
.globl simt_switch_stack
.type simt_switch_stack, @function
simt_switch_stack:
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
    ret
.size simt_switch_stack, .-simt_switch_stack
)");

void prepare(Fiber& fiber) {
    // Six registers, the address to "return" to, and a word that aligns the stack as after a call.
    void** top = reinterpret_cast<void**>(fiber.stack + STACK) - 2;
    *top = reinterpret_cast<void*>(simt_run_fiber);
    top -= 6;
    std::fill(top, top + 6, nullptr);
    fiber.stack_pointer = top;
}

void switch_stack(Fiber* from, Fiber* to) {
    simt_switch_stack(&from->stack_pointer, to->stack_pointer);
}
#else
void prepare(Fiber& fiber) {
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack;
    fiber.context.uc_stack.ss_size = STACK;
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, simt_run_fiber, 0);
}

void switch_stack(Fiber* from, Fiber* to) { swapcontext(&from->context, &to->context); }
#endif

void switch_to(Fiber* to) {
    Fiber* from = S.current;
    if (from == to) return;
    S.current = to;
    if (to->block) {
        threadIdx = {to->thread, 0, 0};
        blockIdx = to->block->index;
    }
    if (__sanitizer_start_switch_fiber) {
        void** save = from->state == State::ENDED ? nullptr : &from->fake_stack;
        __sanitizer_start_switch_fiber(save, to->stack, to->stack ? STACK : 0);
    }
    if (__tsan_switch_to_fiber) {
        const unsigned no_order = 1;
        __tsan_switch_to_fiber(to->tsan, no_order);
    }
    switch_stack(from, to);
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(from->fake_stack, nullptr, nullptr);
    }
}

// ---- reports ----

void append(const char* format, ...) __attribute__((format(printf, 1, 2)));
void append(const char* format, ...) {
    const size_t used = strlen(S.report);
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(S.report + used, S.report_bytes - used, format, arguments);
    va_end(arguments);
}

void append_thread(const Fiber& fiber) {
    append("block %u thread %u", fiber.block->index.x, fiber.thread);
}

void append_line(const Here& here) {
    const char* slash = strrchr(here.file_name(), '/');
    append(" at %s:%u", slash ? slash + 1 : here.file_name(), unsigned(here.line()));
}

// Leaves all fibers where they are and goes back to the host.
[[noreturn]] void abandon() {
    S.failed = true;
    switch_to(&S.host);
    abort();
}

[[noreturn]] void fail(const char* what, const Fiber& fiber, const Fiber* other = nullptr) {
    append("%s: ", what);
    append_thread(fiber);
    append_line(fiber.here);
    if (other) {
        append(", ");
        append_thread(*other);
        append_line(other->here);
    }
    abandon();
}

[[noreturn]] void deadlock() {
    append("deadlock, no thread can go on:");
    const char* waiting[] = {"ready", "in a warp operation", "at __syncthreads", "ended"};
    // Threads that wait at the same place are one line.
    for (unsigned first = 0, t = 0; t < S.threads; t = first) {
        const Fiber& fiber = S.fibers[t];
        const auto same = [&](const Fiber& o) {
            return o.state == fiber.state &&
                   (o.state == State::ENDED || o.here.line() == fiber.here.line());
        };
        while (first < S.threads && same(S.fibers[first])) first++;
        append("\n  %u thread(s) from ", first - t);
        append_thread(fiber);
        append(" %s", waiting[int(fiber.state)]);
        if (fiber.state != State::ENDED) append_line(fiber.here);
    }
    abandon();
}

// ---- the schedule ----

void make_ready(Fiber* fiber) {
    fiber->state = State::READY;
    S.ready[S.tail++ % S.ready.size()] = fiber;
}

Fiber* take_ready() {
    const size_t size = S.ready.size();
    if (S.head == S.tail) return nullptr;
    if (S.order == LIFO) return S.ready[--S.tail % size];
    if (S.order == RANDOM) {
        std::swap(S.ready[S.head % size],
                  S.ready[(S.head + next_random() % (S.tail - S.head)) % size]);
    }
    return S.ready[S.head++ % size];
}

void run_next() {
    if (Fiber* next = take_ready()) return switch_to(next);
    if (S.block.alive) deadlock();
    switch_to(&S.host);
}

void finish_block_barrier(Block& block) {
    block.waiting = 0;
    block.round.number++;
    for (unsigned t = 0; t < S.threads; t++) {
        if (block.fibers[t].state == State::AT_BLOCK_BARRIER) make_ready(&block.fibers[t]);
    }
}

// Does the operation for all lanes of the fiber's mask, if all have come.
void try_warp_op(Fiber& fiber) {
    Warp& warp = fiber.block->warps[fiber.thread / WARP];
    Fiber* lanes = fiber.block->fibers + fiber.thread / WARP * WARP;
    if (fiber.mask & ~warp.alive) {
        fail("a warp operation names a lane that has ended or never was", fiber);
    }
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!(fiber.mask >> lane & 1)) continue;
        const Fiber& other = lanes[lane];
        if (other.state != State::AT_WARP_OP) return;
        const bool same_op = other.op == fiber.op && other.mask == fiber.mask &&
                             other.here.line() == fiber.here.line();
        if (!same_op) fail("lanes of a warp are in different operations", fiber, &other);
    }
    uint32_t ballot = 0;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (fiber.mask >> lane & 1 && lanes[lane].value) ballot |= 1u << lane;
    }
    warp.round.number++;
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!(fiber.mask >> lane & 1)) continue;
        Fiber& self = lanes[lane];
        unsigned source = lane;
        switch (self.op) {
            case WarpOp::SHUFFLE:
                source = self.argument % WARP;
                break;
            case WarpOp::SHUFFLE_UP:
                source = lane >= self.argument ? lane - self.argument : lane;
                break;
            case WarpOp::SHUFFLE_DOWN:
                source = lane + self.argument < WARP ? lane + self.argument : lane;
                break;
            case WarpOp::SHUFFLE_XOR:
                source = (lane ^ self.argument) % WARP;
                break;
            case WarpOp::BALLOT:
            case WarpOp::SYNC:
                break;
        }
        if (!(fiber.mask >> source & 1)) fail("a shuffle reads a lane outside its mask", self);
        self.result = self.op == WarpOp::BALLOT ? ballot : lanes[source].value;
        make_ready(&self);
    }
}

void end_thread(Fiber& fiber) {
    Block& block = *fiber.block;
    fiber.state = State::ENDED;
    block.warps[fiber.thread / WARP].alive &= ~(1u << fiber.thread % WARP);
    block.alive--;
    // As on the device, a barrier waits for the threads that are left.
    if (block.alive && block.waiting == block.alive) finish_block_barrier(block);
    run_next();
    abort();
}

extern "C" void simt_run_fiber() {
    if (__sanitizer_finish_switch_fiber) __sanitizer_finish_switch_fiber(nullptr, nullptr, nullptr);
    acquire(&S.start);
    S.kernel->run(S.args);
    release(&S.end);
    end_thread(*S.current);
}

// ---- launching ----

char* pooled(std::vector<char*>& pool, size_t index, size_t bytes) {
    while (pool.size() <= index) {
        // Pages without access on both sides end an overrun at once.
        const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
        void* map = mmap(nullptr, bytes + 2 * GUARD, PROT_NONE, flags, -1, 0);
        if (map == MAP_FAILED) abort();
        char* memory = static_cast<char*>(map) + GUARD;
        mprotect(memory, bytes, PROT_READ | PROT_WRITE);
        pool.push_back(memory);
    }
    return pool[index];
}

void start_block(unsigned index) {
    Block& block = S.block;
    S.head = S.tail = 0;
    block = Block{};
    block.index = {index, 0, 0};
    block.alive = S.threads;
    block.fibers = S.fibers.data();
    block.warps.assign((S.threads + WARP - 1) / WARP, Warp{});
    block.shared = pooled(shared_memories, 0, SHARED);
    if (__asan_poison_memory_region) __asan_poison_memory_region(block.shared, SHARED);
    for (unsigned t = 0; t < S.threads; t++) {
        Fiber& fiber = block.fibers[t];
        fiber = Fiber{};
        fiber.block = &block;
        fiber.thread = t;
        fiber.stack = pooled(stacks, t, STACK);
        block.warps[t / WARP].alive |= 1u << t % WARP;
        if (__tsan_create_fiber) {
            while (tsan_fibers.size() <= t) tsan_fibers.push_back(__tsan_create_fiber(0));
            fiber.tsan = tsan_fibers[t];
        }
        prepare(fiber);
        make_ready(&fiber);
    }
}

// A bug is planted in the kernels of one file; those of others that a call needs have none.
const simt::Kernel* find(const char* variant, const char* name) {
    const simt::Kernel* sound = nullptr;
    for (const simt::Kernel* k = kernels; k; k = k->next) {
        if (strcmp(k->name, name)) continue;
        if (!strcmp(k->variant, variant)) return k;
        if (!*k->variant) sound = k;
    }
    return sound;
}

}  // namespace

simt::Kernel::Kernel(const char* variant, const char* name, unsigned max_threads, size_t args_bytes,
                     void (*run)(const void*))
    : variant(variant),
      name(name),
      max_threads(max_threads),
      args_bytes(args_bytes),
      run(run),
      next(kernels) {
    kernels = this;
}

uint64_t simt::warp_op(WarpOp op, uint32_t mask, uint64_t value, unsigned argument,
                       const Here& here) {
    Fiber& self = *S.current;
    self.op = op;
    self.mask = mask;
    self.value = value;
    self.argument = argument;
    self.here = here;
    self.state = State::AT_WARP_OP;
    if (!(mask >> self.thread % WARP & 1)) ::fail("a lane is not in its own mask", self);
    // Shuffles and ballots order no memory, on the device as here.
    void* token = self.block->warps[self.thread / WARP].round.token();
    if (op == WarpOp::SYNC) release(token);
    try_warp_op(self);
    run_next();
    if (op == WarpOp::SYNC) acquire(token);
    return self.result;
}

void simt::block_sync(const Here& here) {
    Fiber& self = *S.current;
    Block& block = *self.block;
    self.here = here;
    if (block.waiting) {
        for (unsigned t = 0; t < S.threads; t++) {
            const Fiber& other = block.fibers[t];
            if (other.state != State::AT_BLOCK_BARRIER) continue;
            if (other.here.line() != here.line()) {
                ::fail("threads of a block are at different barriers", self, &other);
            }
            break;
        }
    }
    self.state = State::AT_BLOCK_BARRIER;
    void* token = block.round.token();
    release(token);
    if (++block.waiting == block.alive) finish_block_barrier(block);
    run_next();
    acquire(token);
}

void* simt::shared(const void* key, size_t bytes) {
    Block& block = *S.current->block;
    for (const SharedVariable& variable : block.variables) {
        if (variable.key == key) return block.shared + variable.offset;
    }
    const size_t offset = (block.shared_used + RED_ZONE + 15) / 16 * 16;
    if (offset + bytes + RED_ZONE > SHARED) ::fail("out of shared memory", *S.current);
    block.variables.push_back({key, offset});
    block.shared_used = offset + bytes;
    char* memory = block.shared + offset;
    if (__asan_unpoison_memory_region) __asan_unpoison_memory_region(memory, bytes);
    // By hand: ThreadSanitizer takes a memset for an access of this thread's.
    for (size_t i = 0; i < bytes; i++) static_cast<volatile char*>(memory)[i] = char(0xff);
    return memory;
}

void* simt::dynamic_shared() { return shared(&S.dynamic_shared, S.dynamic_shared); }

void simt::fail(const char* what, const Here& here) {
    S.current->here = here;
    ::fail(what, *S.current);
}

// Runs a kernel to its end. Returns 0, or 1 with a text in `report`. One launch at a time.
extern "C" int simt_run(const char* variant, const char* name, unsigned grid, unsigned threads,
                        size_t dynamic_shared, const void* args, size_t args_bytes, int order,
                        uint64_t seed, char* report, size_t report_bytes) {
    // The caller sees to it that launches do not overlap, with locks that ThreadSanitizer does not see.
    struct Turn {
        Turn() { acquire(&S); }
        ~Turn() { release(&S); }
    } turn;
    S.report = report;
    S.report_bytes = report_bytes;
    *report = 0;
    S.kernel = find(variant, name);
    if (!S.kernel) return append("no kernel of that name"), 1;
    if (S.kernel->args_bytes != args_bytes) {
        append("its arguments take %zu bytes, %zu were given", S.kernel->args_bytes, args_bytes);
        return 1;
    }
    if (threads == 0 || threads > S.kernel->max_threads) {
        return append("blocks of %u threads, at most %u", threads, S.kernel->max_threads), 1;
    }
    if (grid == 0) return append("a grid of no blocks"), 1;

    if (S.failed && __asan_unpoison_memory_region) {
        // The frames of abandoned fibers were never left.
        for (char* stack : stacks) __asan_unpoison_memory_region(stack, STACK);
    }
    S.failed = false;
    S.args = args;
    S.order = Order(order);
    S.random = seed * 2 + 0x9e3779b97f4a7c15;
    S.threads = threads;
    S.dynamic_shared = dynamic_shared;
    S.fibers.assign(threads, Fiber{});
    S.ready.assign(S.fibers.size(), nullptr);
    S.host = Fiber{};
    S.host.tsan = __tsan_get_current_fiber ? __tsan_get_current_fiber() : nullptr;
    S.current = &S.host;
    gridDim = {grid, 1, 1};
    blockDim = {threads, 1, 1};

    std::vector<unsigned> blocks(grid);
    std::iota(blocks.begin(), blocks.end(), 0u);
    if (S.order == LIFO) std::reverse(blocks.begin(), blocks.end());
    if (S.order == RANDOM) {
        for (size_t i = blocks.size(); i > 1; i--)
            std::swap(blocks[i - 1], blocks[next_random() % i]);
    }
    for (unsigned index : blocks) {
        start_block(index);
        release(&S.start);
        run_next();
        acquire(&S.end);
        if (S.failed) return 1;
    }
    return 0;
}

// That, or the same function of the library that PPO_KERNELS_SIMT names, whose kernels are compiled
// with a sanitizer; see build.rs.
extern "C" decltype(simt_run)* simt_launcher() {
    const char* name = getenv("PPO_KERNELS_SIMT");
    if (!name || !*name) return simt_run;
    const std::string path = std::string(SIMT_LIBRARIES "/simt_") + name + ".so";
    void* library = dlopen(path.c_str(), RTLD_NOW);
    void* run = library ? dlsym(library, "simt_run") : nullptr;
    if (!run) {
        fprintf(stderr, "PPO_KERNELS_SIMT: %s\n", dlerror());
        abort();
    }
    return reinterpret_cast<decltype(simt_run)*>(run);
}
