// Fused log-softmax gather, forward and backward. src/logprob/mod.rs has the formulas and
// src/logprob/cuda.rs the launches.
//
//     x_j  = (z_j - max z) / temperature          s = sum e^{x_j}
//     logp = x_t - ln s                           p_j = e^{x_j} / s
//     H    = ln s - sum p_j x_j
//     dz_j = (g (1[j = t] - p_j) - h p_j (ln p_j + H)) / temperature
//
// logits and grad_logits are [rows, vocab] in f32, f16 or bf16, targets [rows] in u32 or i64, all
// else [rows] in f32; g and h are the upstream gradients of logp and H.
//
// Forward. A warp takes a row (forward_warp), or a block does, its parts one after the other
// (forward_block) or side by side (forward_wide; common/rows.cuh). A thread runs over every
// `threads`-th vector of 16 bytes, four at a time, and keeps a running (max, sum, weighted sum);
// those are merged over the parts in order, over the warp by shuffles, and over the block through
// shared memory. Which columns a thread takes, and so every bit of the result, depends on vocab and
// dtype alone: neither on the row's place in the batch nor on its alignment, nor on how many rows
// there are.
//
// Backward. A warp or a block takes a range of a row's columns. No thread needs another.
//
// Bytes, with S of the logits: forward reads S, backward reads S and writes S. Rows that are
// ignored, and in the backward pass rows without upstream gradient, are not read.
//
// Numbers. Everything is in f32. exp is 2^y by the hardware, to 2 ulp. The maximum is subtracted
// before scaling, so an offset common to a row costs nothing. -inf is a probability of 0. NaN, +inf
// or -inf throughout make the row NaN. A target outside 0..vocab makes its row NaN and is never
// used as an index. Offsets are 64-bit, and the loops over rows make any number of rows fit any
// grid.

#include "common/map.cuh"
#include "common/rows.cuh"
#include "common/softmax.cuh"

// How targets are read.
struct TargetFormat {
    int64_t ignore_index;
    int32_t wide;        // i64, else u32
    int32_t has_ignore;  // whether ignore_index counts
};

struct ForwardArgs {
    const void* logits;   // [rows, vocab]
    const void* targets;  // [rows]
    float* logp;          // [rows]
    float* entropy;       // [rows], or null
    float* max;           // [rows], or null
    float* log_sum;       // [rows], or null, as max
    TargetFormat target_format;
    int64_t rows;
    int64_t vocab;
    int32_t parts;  // of a row
    int32_t ahead;
    float inverse_temperature;
};

struct BackwardArgs {
    const void* logits;         // [rows, vocab]
    const void* targets;        // [rows]
    const float* max;           // [rows]
    const float* log_sum;       // [rows]
    const float* entropy;       // [rows]
    const float* grad_logp;     // [rows], or null: zeros
    const float* grad_entropy;  // [rows], or null: zeros
    void* grad_logits;          // [rows, vocab]; may be logits
    TargetFormat target_format;
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

// The target of a row; `args` are those of either pass.
template <class Args>
static __device__ __forceinline__ Target target_of(const Args& args, int64_t row) {
    const TargetFormat& format = args.target_format;
    const int64_t id = format.wide ? static_cast<const int64_t*>(args.targets)[row]
                                   : static_cast<const uint32_t*>(args.targets)[row];
    if (format.has_ignore && id == format.ignore_index) return {Kind::IGNORED, 0};
    if (id < 0 || id >= args.vocab) return {Kind::BAD, 0};
    return {Kind::TOKEN, id};
}

// The sums over a range of a row's groups that fall to one thread of `threads`.
template <class T, bool WEIGHTED>
static __device__ __forceinline__ SoftmaxSums sum_groups(const Row<T>& row, Range range, int thread,
                                                         int threads, float scale, bool ahead) {
    SoftmaxSums s = no_sums();
    for (int tile = range.first; tile < range.end; tile += IN_FLIGHT * threads) {
        uint4 v[IN_FLIGHT];
        row.load(tile, thread, threads, range.end, v);
        if (ahead) {
            const int next = tile + IN_FLIGHT * threads;
            row.template prefetch_tile<IN_FLIGHT>(next, thread, threads, range.end);
        }
        const int vectors = (range.end - tile + threads - 1) / threads;
        add<WEIGHTED>(s, v, vectors, scale, T{});
    }
    return s;
}

// The reduction of the forward pass, for common/rows.cuh.
template <class T>
struct Forward {
    const ForwardArgs& args;
    float scale;

    __device__ __forceinline__ explicit Forward(const ForwardArgs& args)
        : args(args), scale(args.inverse_temperature * LOG2_E) {}

    static constexpr int MOST_PARTS = 4;

    struct Item {
        Target target;
        float logit;  // of a TOKEN: on its way while the row is read
    };

    __device__ __forceinline__ Item item(int64_t row) const {
        const Target target = target_of(args, row);
        const T* logits = static_cast<const T*>(args.logits) + row * args.vocab;
        return {target, target.kind == Kind::TOKEN ? to_float(logits[target.column]) : 0.0f};
    }

    __device__ __forceinline__ bool reads(Item item) const {
        return item.target.kind == Kind::TOKEN;
    }

    __device__ __forceinline__ SoftmaxSums none() const { return no_sums(); }

    __device__ __forceinline__ SoftmaxSums sum(int64_t row, int part, int thread,
                                               int threads) const {
        const Row<T> z = Row<T>::of(args.logits, row, args.rows, args.vocab);
        const Range range = part_of_row(z.groups(), part, args.parts, IN_FLIGHT * threads);
        return args.entropy ? sum_groups<T, true>(z, range, thread, threads, scale, args.ahead)
                            : sum_groups<T, false>(z, range, thread, threads, scale, args.ahead);
    }

    __device__ __forceinline__ SoftmaxSums merge(SoftmaxSums a, SoftmaxSums b) const {
        return ::merge(a, b, scale);
    }

    __device__ __forceinline__ SoftmaxSums warp_merge(SoftmaxSums s) const {
        return ::warp_merge(s, scale);
    }

    __device__ __forceinline__ void write(int64_t row, Item item, SoftmaxSums s) const {
        const float log_sum = isfinite(s.max) ? logf(s.sum) : NAN;
        const float logp = (item.logit - s.max) * args.inverse_temperature - log_sum;
        const float entropy = log_sum - LN_2 * (s.weighted / s.sum);
        write_row(row, logp, entropy, s.max, log_sum);
    }

    __device__ __forceinline__ void write_unread(int64_t row, Item item) const {
        const float value = item.target.kind == Kind::IGNORED ? 0.0f : NAN;
        write_row(row, value, value, -INFINITY, NAN);
    }

    __device__ __forceinline__ void write_row(int64_t row, float logp, float entropy, float max,
                                              float log_sum) const {
        args.logp[row] = logp;
        if (args.entropy) args.entropy[row] = entropy;
        if (args.max) {
            args.max[row] = max;
            args.log_sum[row] = log_sum;
        }
    }
};

// What the backward pass has to know of a row. All loads are on their way together.
struct RowOfBackward {
    Target target;
    float grad_logp, grad_entropy, max, log_sum, entropy;

    __device__ __forceinline__ RowOfBackward(const BackwardArgs& args, int64_t row)
        : target(target_of(args, row)), grad_logp(args.grad_logp ? args.grad_logp[row] : 0.0f),
          grad_entropy(args.grad_entropy ? args.grad_entropy[row] : 0.0f), max(args.max[row]),
          log_sum(args.log_sum[row]), entropy(args.entropy[row]) {}

    __device__ __forceinline__ bool is_zero() const {
        return target.kind == Kind::IGNORED || (grad_logp == 0.0f && grad_entropy == 0.0f);
    }
};

// The gradient of one row as a function of the logit, with that of the entropy or without.
template <bool ENTROPY>
struct Slope {
    // (z - max) scale - shift is the logarithm of p to base 2.
    float max, scale, shift;
    // For every column but the target's the gradient is p (constant + slope log2 p).
    float constant, slope;
    float at_target;  // what the target's has besides
    int64_t target;

    __device__ __forceinline__ Slope(const RowOfBackward& row, float inverse_temperature)
        : max(row.max), scale(inverse_temperature * LOG2_E), target(row.target.column) {
        shift = (row.target.kind == Kind::BAD ? NAN : row.log_sum) * LOG2_E;
        at_target = row.grad_logp * inverse_temperature;
        const float h = row.grad_entropy * inverse_temperature;
        constant = ENTROPY ? -fmaf(h, row.entropy, at_target) : -at_target;
        slope = -h * LN_2;
    }

    __device__ __forceinline__ float at(float z) const {
        const float log2_p = fmaf(z - max, scale, -shift);
        const float p = exp2_fast(log2_p);
        return p * (ENTROPY ? fmaf(slope, fmaxf(log2_p, FLOOR), constant) : constant);
    }

    // For common/map.cuh. The target's gradient is formed in f32 before rounding: near p = 1 the
    // two terms cancel.
    template <int N>
    __device__ __forceinline__ void operator()(const float (&z)[1][N], int64_t first,
                                               float (&grad)[1][N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) grad[0][i] = at(z[0][i]);
        // A row has less than 2^32 columns.
        const uint32_t place = uint32_t(target) - uint32_t(first);
        if (place < N) {
#pragma unroll
            for (int i = 0; i < N; i++) grad[0][i] = place == i ? grad[0][i] + at_target : grad[0][i];
        }
    }
};

// Block [threads], a range of a row a warp or a block.
template <class T>
static __device__ __forceinline__ void backward(const BackwardArgs& args) {
    for_each_share(args, [&](int64_t row, Share share) {
        const T* const in[1] = {static_cast<const T*>(args.logits) + row * args.vocab};
        T* const out[1] = {static_cast<T*>(args.grad_logits) + row * args.vocab};
        const RowOfBackward known(args, row);
        const float inverse_temperature = args.inverse_temperature;
        if (known.is_zero()) {
            fill_columns(out[0], 0.0f, args.vocab, share);
        } else if (known.grad_entropy == 0.0f) {
            const Slope<false> slope(known, inverse_temperature);
            map_columns(in, out, nullptr, args.vocab, share, slope);
        } else {
            const Slope<true> slope(known, inverse_temperature);
            map_columns(in, out, nullptr, args.vocab, share, slope);
        }
    });
}

KERNEL(256, 4, logprob_forward_warp_f32, ForwardArgs) { reduce_by_warps(Forward<float>(args)); }
KERNEL(256, 4, logprob_forward_warp_f16, ForwardArgs) { reduce_by_warps(Forward<f16>(args)); }
KERNEL(256, 4, logprob_forward_warp_bf16, ForwardArgs) { reduce_by_warps(Forward<bf16>(args)); }
KERNEL(256, 4, logprob_forward_block_f32, ForwardArgs) { reduce_by_blocks<false>(Forward<float>(args)); }
KERNEL(256, 4, logprob_forward_block_f16, ForwardArgs) { reduce_by_blocks<false>(Forward<f16>(args)); }
KERNEL(256, 4, logprob_forward_block_bf16, ForwardArgs) { reduce_by_blocks<false>(Forward<bf16>(args)); }
KERNEL(1024, 1, logprob_forward_wide_f32, ForwardArgs) { reduce_by_blocks<true>(Forward<float>(args)); }
KERNEL(1024, 1, logprob_forward_wide_f16, ForwardArgs) { reduce_by_blocks<true>(Forward<f16>(args)); }
KERNEL(1024, 1, logprob_forward_wide_bf16, ForwardArgs) { reduce_by_blocks<true>(Forward<bf16>(args)); }
KERNEL(256, 3, logprob_backward_f32, BackwardArgs) { backward<float>(args); }
KERNEL(256, 3, logprob_backward_f16, BackwardArgs) { backward<f16>(args); }
KERNEL(256, 3, logprob_backward_bf16, BackwardArgs) { backward<bf16>(args); }
