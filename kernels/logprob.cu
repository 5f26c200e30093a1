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

#include "common/logprob.cuh"

struct BackwardArgs {
    const void* logits;         // [rows, columns]
    const void* targets;        // [rows]
    const float* max;           // [rows]
    const float* log_sum;       // [rows]
    const float* entropy;       // [rows]
    const float* grad_logp;     // [rows], or null: zeros
    const float* grad_entropy;  // [rows], or null: zeros
    void* grad_logits;          // [rows, columns]; may be logits
    TargetFormat target_format;
    int64_t rows;
    int64_t columns;
    int32_t chunks;         // ranges of columns of a row
    int32_t chunk_threads;  // a warp, or the whole block
    float inverse_temperature;
};

struct MergeSumsArgs {
    const float* other_max;       // [rows]
    const float* other_rest;      // [rows]
    const float* other_logit;     // [rows]
    const float* other_weighted;  // [rows], or null
    float* max;                   // [rows]
    float* rest;                  // [rows]
    float* logit;                 // [rows]
    float* weighted;              // [rows], or null, as other_weighted
    int64_t rows;
    float inverse_temperature;
};

struct FinishSumsArgs {
    const void* targets;    // [rows]
    const float* max;       // [rows]
    const float* rest;      // [rows]
    const float* logit;     // [rows]
    const float* weighted;  // [rows], or null
    float* logp;            // [rows]
    float* log_sum;         // [rows]
    float* entropy;         // [rows], or null
    TargetFormat target_format;
    int64_t rows;
    float inverse_temperature;
};

// Block [threads]: a row a thread.
template <class Args, class F>
static __device__ __forceinline__ void for_each_row(const Args& args, const F& f) {
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t row = first; row < args.rows; row += int64_t(gridDim.x) * blockDim.x) f(row);
}

KERNEL(256, 4, logprob_merge_f32, MergeSumsArgs) {
    for_each_row(args, [&](int64_t row) {
        const float other_weighted = args.weighted ? args.other_weighted[row] : 0.0f;
        const float weighted = args.weighted ? args.weighted[row] : 0.0f;
        const Seen other = {args.other_max[row], args.other_rest[row], other_weighted,
                            args.other_logit[row]};
        const Seen mine = {args.max[row], args.rest[row], weighted, args.logit[row]};
        const Seen both = merge(mine, other, args.inverse_temperature);
        args.max[row] = both.max;
        args.rest[row] = both.rest;
        args.logit[row] = both.logit;
        if (args.weighted) args.weighted[row] = both.weighted;
    });
}

KERNEL(256, 4, logprob_finish_f32, FinishSumsArgs) {
    for_each_row(args, [&](int64_t row) {
        const Target target = target_of(args, row);
        const float weighted = args.weighted ? args.weighted[row] : 0.0f;
        const Seen seen = {args.max[row], args.rest[row], weighted, args.logit[row]};
        const RowValues values = target.kind == Kind::TOKEN
                                     ? values_of(seen, args.inverse_temperature)
                                     : values_unread_of(target);
        args.logp[row] = values.logp;
        args.log_sum[row] = values.log_sum;
        if (args.entropy) args.entropy[row] = values.entropy;
    });
}

// Block [threads], a range of a row a warp or a block.
template <class T>
static __device__ __forceinline__ void backward(const BackwardArgs& args) {
    for_each_share(args, [&](int64_t row, Share share) {
        // All on their way together.
        const KnownOfRow known = {
            target_of(args, row),
            args.grad_logp ? args.grad_logp[row] : 0.0f,
            args.grad_entropy ? args.grad_entropy[row] : 0.0f,
            args.max[row],
            args.log_sum[row],
            args.entropy[row],
        };
        const int64_t first = row * args.columns;
        write_gradient(static_cast<const T*>(args.logits) + first,
                       static_cast<T*>(args.grad_logits) + first, args.columns, known,
                       args.inverse_temperature, share);
    });
}

KERNEL(256, 4, logprob_forward_warp_f32, ForwardArgs) { reduce_by_warps(Forward<float>(args)); }
KERNEL(256, 4, logprob_forward_warp_f16, ForwardArgs) { reduce_by_warps(Forward<f16>(args)); }
KERNEL(256, 4, logprob_forward_warp_bf16, ForwardArgs) { reduce_by_warps(Forward<bf16>(args)); }
KERNEL(256, 4, logprob_forward_block_f32, ForwardArgs) {
    reduce_by_blocks<false>(Forward<float>(args));
}
KERNEL(256, 4, logprob_forward_block_f16, ForwardArgs) {
    reduce_by_blocks<false>(Forward<f16>(args));
}
KERNEL(256, 4, logprob_forward_block_bf16, ForwardArgs) {
    reduce_by_blocks<false>(Forward<bf16>(args));
}
KERNEL(768, 1, logprob_forward_wide_f32, ForwardArgs) {
    reduce_by_blocks<true>(Forward<float>(args));
}
KERNEL(768, 1, logprob_forward_wide_f16, ForwardArgs) {
    reduce_by_blocks<true>(Forward<f16>(args));
}
KERNEL(768, 1, logprob_forward_wide_bf16, ForwardArgs) {
    reduce_by_blocks<true>(Forward<bf16>(args));
}
KERNEL(256, 3, logprob_backward_f32, BackwardArgs) { backward<float>(args); }
KERNEL(256, 3, logprob_backward_f16, BackwardArgs) { backward<f16>(args); }
KERNEL(256, 3, logprob_backward_bf16, BackwardArgs) { backward<bf16>(args); }
