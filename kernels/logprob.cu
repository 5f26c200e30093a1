// Fused log-softmax gather, forward and backward. src/logprob/mod.rs has the formulas and
// src/logprob/cuda.rs the launches.
//
//     x_j  = (z_j - max z) / temperature          s = sum e^{x_j}
//     logp = x_t - ln s                           p_j = e^{x_j} / s
//     H    = ln s - sum p_j x_j
//     dz_j = (g (1[j = t] - p_j) - h p_j (ln p_j + H)) / temperature
//
// logits and grad_logits are [rows, vocab] in f32, f16 or bf16, targets [rows] in u32 or i64, all else
// [rows] in f32; g and h are the upstream gradients of logp and H.
//
// Forward. A warp takes a row (forward_warp), or a block does (forward_block), or `parts` blocks do,
// each a range of columns. A thread runs over every `threads`-th vector of 16 bytes, with several
// loads in flight, and keeps a running (max, sum, weighted sum); those are merged over the warp by
// shuffles, over the block through shared memory, and over the parts in order: through the shared
// memory of a cluster, or, on chips without clusters, through `partials` and forward_merge. Which
// columns a thread takes, and so every bit of the result, depends on vocab and dtype alone: neither
// on the row's place in the batch nor on its alignment, nor on whether there are clusters.
//
// Backward. A warp or a block takes a range of a row's columns. No thread needs another.
//
// Bytes, with S of the logits: forward reads S, backward reads S and writes S. Rows that are ignored,
// and in the backward pass rows without upstream gradient, are not read.
//
// Numbers. Everything is in f32. exp is 2^y by the hardware, to 2 ulp. The maximum is subtracted
// before scaling, so an offset common to a row costs nothing. -inf is a probability of 0. NaN, +inf
// or -inf throughout make the row NaN. A target outside 0..vocab makes its row NaN and is never used
// as an index. Offsets are 64-bit, and the loops over rows make any number of rows fit any grid.

#include "common/softmax.cuh"
#include "common/vector.cuh"

// Vectors that a thread loads before it uses the first.
constexpr int IN_FLIGHT = 4;

// Rows whose targets are u32 or i64, and what is to be done with them.
struct Targets {
    const void* ids;
    int64_t ignore_index;
    int32_t wide;        // i64
    int32_t has_ignore;  // whether ignore_index counts
};

struct ForwardArgs {
    const void* logits;
    float* logp;
    float* entropy;  // or null
    float* max;      // or null
    float* log_sum;  // or null, as max
    Sums* partials;  // [rows, parts]; null: the parts are the blocks of a cluster
    Targets targets;
    int64_t rows;
    int64_t vocab;
    int32_t part_groups;  // vectors of columns in a part
    int32_t parts;
    float inverse_temperature;
};

struct BackwardArgs {
    const void* logits;
    const float* max;
    const float* log_sum;
    const float* entropy;
    const float* grad_logp;     // or null: zeros
    const float* grad_entropy;  // or null: zeros
    void* grad_logits;          // may be logits
    Targets targets;
    int64_t rows;
    int64_t vocab;
    int32_t chunks;         // ranges of columns of a row
    int32_t chunk_threads;  // a warp, or the whole block
    float inverse_temperature;
};

enum class Kind { TOKEN, IGNORED, BAD };

struct Target {
    Kind kind;
    int64_t column;  // of a TOKEN
};

static __device__ __forceinline__ Target target_of(const Targets& targets, int64_t row,
                                                   int64_t vocab) {
    const int64_t id = targets.wide ? static_cast<const int64_t*>(targets.ids)[row]
                                    : static_cast<const uint32_t*>(targets.ids)[row];
    if (targets.has_ignore && id == targets.ignore_index) return {Kind::IGNORED, 0};
    if (id < 0 || id >= vocab) return {Kind::BAD, 0};
    return {Kind::TOKEN, id};
}

// The sums over the groups first..end of a row that fall to one thread of `threads`.
template <class T, bool WEIGHTED>
static __device__ __forceinline__ Sums sum_groups(const Row<T>& row, int first, int end, int thread,
                                                  int threads, float scale) {
    Sums s = no_sums();
    float z[WIDTH<T>];
    for (int tile = first; tile < end; tile += IN_FLIGHT * threads) {
        const int mine = tile + thread;
        // The same for all threads, so that no warp takes both ways.
        if (row.inside(tile, tile + IN_FLIGHT * threads) && tile + IN_FLIGHT * threads <= end) {
            uint4 v[IN_FLIGHT];
            if (row.skip == 0) {
#pragma unroll
                for (int i = 0; i < IN_FLIGHT; i++) v[i] = row.load_aligned(mine + i * threads);
            } else {
#pragma unroll
                for (int i = 0; i < IN_FLIGHT; i++) v[i] = row.load_misaligned(mine + i * threads);
            }
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                unpack(v[i], z, T{});
                add<WEIGHTED>(s, z, scale);
            }
            continue;
        }
#pragma unroll 1
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int group = mine + i * threads;
            if (group >= end) break;
            if (!row.inside(group, group + 1)) {
                row.load_edge(group, z);
            } else if (row.skip == 0) {
                unpack(row.load_aligned(group), z, T{});
            } else {
                unpack(row.load_misaligned(group), z, T{});
            }
            add<WEIGHTED>(s, z, scale);
        }
    }
    return s;
}

template <class T>
static __device__ __forceinline__ Sums sum_groups(const ForwardArgs& args, int64_t row, int part,
                                                  int thread, int threads, float scale) {
    const Row<T> z(static_cast<const T*>(args.logits) + row * args.vocab, args.vocab);
    const int first = part * args.part_groups;
    const int end = min(first + args.part_groups, z.groups());
    return args.entropy ? sum_groups<T, true>(z, first, end, thread, threads, scale)
                        : sum_groups<T, false>(z, first, end, thread, threads, scale);
}

static __device__ __forceinline__ void write_row(const ForwardArgs& args, int64_t row, float logp,
                                                 float entropy, float max, float log_sum) {
    args.logp[row] = logp;
    if (args.entropy) args.entropy[row] = entropy;
    if (args.max) {
        args.max[row] = max;
        args.log_sum[row] = log_sum;
    }
}

// A row whose logits are not looked at.
static __device__ __forceinline__ void write_unread(const ForwardArgs& args, int64_t row, Kind kind) {
    const float value = kind == Kind::IGNORED ? 0.0f : NAN;
    write_row(args, row, value, value, -INFINITY, NAN);
}

template <class T>
static __device__ __forceinline__ void write_sums(const ForwardArgs& args, int64_t row,
                                                  int64_t target, Sums s) {
    const float log_sum = isfinite(s.max) ? logf(s.sum) : NAN;
    const float z = to_float(static_cast<const T*>(args.logits)[row * args.vocab + target]);
    const float logp = (z - s.max) * args.inverse_temperature - log_sum;
    const float entropy = log_sum - LN_2 * (s.weighted / s.sum);
    write_row(args, row, logp, entropy, s.max, log_sum);
}

// Block [warps x 32], a row a warp.
template <class T>
static __device__ __forceinline__ void forward_warp(const ForwardArgs& args) {
    const float scale = args.inverse_temperature * LOG2_E;
    const int lane = threadIdx.x % WARP;
    const int warps = blockDim.x / WARP;
    const int64_t first = int64_t(blockIdx.x) * warps + threadIdx.x / WARP;
    for (int64_t row = first; row < args.rows; row += int64_t(gridDim.x) * warps) {
        const Target target = target_of(args.targets, row, args.vocab);
        if (target.kind != Kind::TOKEN) {
            if (lane == 0) write_unread(args, row, target.kind);
            continue;
        }
        const Sums s = warp_merge(sum_groups<T>(args, row, 0, lane, WARP, scale), scale);
        if (lane == 0) write_sums<T>(args, row, target.column, s);
    }
}

// Block [threads], a part of a row a block; the grid is a multiple of the parts.
template <class T>
static __device__ __forceinline__ void forward_block(const ForwardArgs& args) {
    SHARED(Sums, warps, WARP);
    SHARED(Sums, part_sums, 1);
    const float scale = args.inverse_temperature * LOG2_E;
    const int part = blockIdx.x % args.parts;
    const int64_t step = gridDim.x / args.parts;
    for (int64_t row = blockIdx.x / args.parts; row < args.rows; row += step) {
        const Target target = target_of(args.targets, row, args.vocab);
        if (target.kind != Kind::TOKEN) {
            if (part == 0 && threadIdx.x == 0) write_unread(args, row, target.kind);
            continue;
        }
        Sums s = sum_groups<T>(args, row, part, threadIdx.x, blockDim.x, scale);
        s = block_merge(s, scale, warps);
        if (args.parts == 1) {
            if (threadIdx.x == 0) write_sums<T>(args, row, target.column, s);
        } else if (args.partials) {
            if (threadIdx.x == 0) args.partials[row * args.parts + part] = s;
        } else {
            if (threadIdx.x == 0) *part_sums = s;
            cluster_sync();
            if (part == 0 && threadIdx.x == 0) {
                for (int other = 1; other < args.parts; other++) {
                    s = merge(s, *in_cluster_block(part_sums, other), scale);
                }
                write_sums<T>(args, row, target.column, s);
            }
            // Until they were read, the other blocks must neither leave nor take their next row.
            cluster_sync();
        }
    }
}

// Block [threads], a row a thread: what rank 0 of a cluster does, where there are no clusters.
template <class T>
static __device__ __forceinline__ void forward_merge(const ForwardArgs& args) {
    const float scale = args.inverse_temperature * LOG2_E;
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t row = first; row < args.rows; row += int64_t(gridDim.x) * blockDim.x) {
        const Target target = target_of(args.targets, row, args.vocab);
        if (target.kind != Kind::TOKEN) continue;
        const Sums* parts = args.partials + row * args.parts;
        Sums s = parts[0];
        for (int part = 1; part < args.parts; part++) s = merge(s, parts[part], scale);
        write_sums<T>(args, row, target.column, s);
    }
}

// The gradient of one row as a function of the logit.
struct Slope {
    float max, log_sum, entropy;
    // Upstream gradients over the temperature.
    float grad_logp, grad_entropy;
    float inverse_temperature;

    // For every column but the target's: -p (g + h (ln p + H)).
    __device__ __forceinline__ float at(float z) const {
        const float ln_p = fmaf(z - max, inverse_temperature, -log_sum);
        const float p = exp2_fast(ln_p * LOG2_E);
        return -p * fmaf(grad_entropy, fmaxf(ln_p, FLOOR * LN_2) + entropy, grad_logp);
    }
};

// A vector of gradients. If the target is in it, at `target`, its gradient is formed in f32 before
// rounding: near p = 1 the two terms cancel.
template <class T>
static __device__ __forceinline__ uint4 gradients(const Slope& slope, uint4 logits, int64_t target) {
    float x[WIDTH<T>];
    unpack(logits, x, T{});
#pragma unroll
    for (int i = 0; i < WIDTH<T>; i++) x[i] = slope.at(x[i]);
    if (target >= 0 && target < WIDTH<T>) {
        const int at = int(target);
#pragma unroll
        for (int i = 0; i < WIDTH<T>; i++) x[i] = at == i ? x[i] + slope.grad_logp : x[i];
    }
    return pack(x, T{});
}

// Columns of a row on both sides of its aligned vectors.
template <class T>
struct Split {
    int head;         // columns before the first aligned vector
    int vectors;      // aligned vectors
    int64_t tail;     // the first column after them

    __device__ __forceinline__ Split(const T* in, const T* out, int64_t columns) {
        const uintptr_t to = reinterpret_cast<uintptr_t>(out);
        const uintptr_t from = reinterpret_cast<uintptr_t>(in);
        head = int(min(int64_t((16 - to % 16) % 16 / sizeof(T)), columns));
        // Rows that are aligned differently have no vectors in common: all columns are tail.
        if ((to ^ from) & 15) head = 0;
        vectors = (to ^ from) & 15 ? 0 : int((columns - head) / WIDTH<T>);
        tail = head + int64_t(vectors) * WIDTH<T>;
    }
};

// The part of a row's gradient that falls to one thread of `threads`, counted over all chunks.
template <class T>
static __device__ __forceinline__ void write_gradients(const Slope& slope, const T* in, T* out,
                                                       int64_t columns, int64_t target,
                                                       int chunk, int chunks, int thread,
                                                       int threads) {
    const Split<T> split(in, out, columns);
    const T* from = in + split.head;
    T* to = out + split.head;
    const int step = chunks * IN_FLIGHT * threads;
    for (int tile = chunk * IN_FLIGHT * threads; tile < split.vectors; tile += step) {
        uint4 v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int vector = tile + i * threads + thread;
            if (vector < split.vectors) v[i] = load_once(from + int64_t(vector) * WIDTH<T>);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int vector = tile + i * threads + thread;
            const int64_t first = int64_t(vector) * WIDTH<T>;
            if (vector < split.vectors) {
                store_once(to + first, gradients<T>(slope, v[i], target - split.head - first));
            }
        }
    }
    const int rank = chunk * threads + thread;
    const auto one = [&](int64_t column) {
        const float x = slope.at(to_float(in[column]));
        store(out + column, column == target ? x + slope.grad_logp : x);
    };
    if (rank < split.head) one(rank);
    for (int64_t i = split.tail + rank; i < columns; i += chunks * threads) one(i);
}

template <class T>
static __device__ __forceinline__ void write_zeros(T* out, int64_t columns, int chunk, int chunks,
                                                   int thread, int threads) {
    const Split<T> split(out, out, columns);
    const int rank = chunk * threads + thread, step = chunks * threads;
    for (int vector = rank; vector < split.vectors; vector += step) {
        store_once(out + split.head + int64_t(vector) * WIDTH<T>, make_uint4(0, 0, 0, 0));
    }
    if (rank < split.head) store(out + rank, 0.0f);
    for (int64_t i = split.tail + rank; i < columns; i += step) store(out + i, 0.0f);
}

// Block [threads], a chunk of a row a warp or a block.
template <class T>
static __device__ __forceinline__ void backward(const BackwardArgs& args) {
    const int threads = args.chunk_threads;
    const int thread = threadIdx.x % threads;
    const int64_t units = args.rows * args.chunks;
    const int64_t first = int64_t(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
    const int64_t step = int64_t(gridDim.x) * (blockDim.x / threads);
    for (int64_t unit = first; unit < units; unit += step) {
        const int64_t row = unit / args.chunks;
        const int chunk = int(unit % args.chunks);
        const T* in = static_cast<const T*>(args.logits) + row * args.vocab;
        T* out = static_cast<T*>(args.grad_logits) + row * args.vocab;
        const Target target = target_of(args.targets, row, args.vocab);
        const float g = args.grad_logp ? args.grad_logp[row] : 0.0f;
        const float h = args.grad_entropy ? args.grad_entropy[row] : 0.0f;
        if (target.kind == Kind::IGNORED || (g == 0.0f && h == 0.0f)) {
            write_zeros(out, args.vocab, chunk, args.chunks, thread, threads);
            continue;
        }
        const Slope slope = {
            args.max[row],
            target.kind == Kind::BAD ? NAN : args.log_sum[row],
            args.entropy[row],
            g * args.inverse_temperature,
            h * args.inverse_temperature,
            args.inverse_temperature,
        };
        write_gradients(slope, in, out, args.vocab, target.column, chunk, args.chunks, thread,
                        threads);
    }
}

KERNEL(256, 4, logprob_forward_warp_f32, ForwardArgs) { forward_warp<float>(args); }
KERNEL(256, 4, logprob_forward_warp_f16, ForwardArgs) { forward_warp<f16>(args); }
KERNEL(256, 4, logprob_forward_warp_bf16, ForwardArgs) { forward_warp<bf16>(args); }
KERNEL(256, 3, logprob_forward_block_f32, ForwardArgs) { forward_block<float>(args); }
KERNEL(256, 4, logprob_forward_block_f16, ForwardArgs) { forward_block<f16>(args); }
KERNEL(256, 4, logprob_forward_block_bf16, ForwardArgs) { forward_block<bf16>(args); }
KERNEL(256, 4, logprob_forward_merge_f32, ForwardArgs) { forward_merge<float>(args); }
KERNEL(256, 4, logprob_forward_merge_f16, ForwardArgs) { forward_merge<f16>(args); }
KERNEL(256, 4, logprob_forward_merge_bf16, ForwardArgs) { forward_merge<bf16>(args); }
KERNEL(256, 3, logprob_backward_f32, BackwardArgs) { backward<float>(args); }
KERNEL(256, 3, logprob_backward_f16, BackwardArgs) { backward<f16>(args); }
KERNEL(256, 3, logprob_backward_bf16, BackwardArgs) { backward<bf16>(args); }
