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
        const int64_t first = row * args.vocab;
        write_gradient(static_cast<const T*>(args.logits) + first,
                       static_cast<T*>(args.grad_logits) + first, args.vocab, known,
                       args.inverse_temperature, share);
    });
}

KERNEL(256, 4, logprob_forward_warp_f32, ForwardArgs) { reduce_by_warps(Forward<float>(args)); }
KERNEL(256, 4, logprob_forward_warp_f16, ForwardArgs) { reduce_by_warps(Forward<f16>(args)); }
KERNEL(256, 4, logprob_forward_warp_bf16, ForwardArgs) { reduce_by_warps(Forward<bf16>(args)); }
KERNEL(256, 4, logprob_forward_block_f32, ForwardArgs) { reduce_by_blocks<false>(Forward<float>(args)); }
KERNEL(256, 4, logprob_forward_block_f16, ForwardArgs) { reduce_by_blocks<false>(Forward<f16>(args)); }
KERNEL(256, 4, logprob_forward_block_bf16, ForwardArgs) { reduce_by_blocks<false>(Forward<bf16>(args)); }
KERNEL(768, 1, logprob_forward_wide_f32, ForwardArgs) { reduce_by_blocks<true>(Forward<float>(args)); }
KERNEL(768, 1, logprob_forward_wide_f16, ForwardArgs) { reduce_by_blocks<true>(Forward<f16>(args)); }
KERNEL(768, 1, logprob_forward_wide_bf16, ForwardArgs) { reduce_by_blocks<true>(Forward<bf16>(args)); }
KERNEL(256, 3, logprob_backward_f32, BackwardArgs) { backward<float>(args); }
KERNEL(256, 3, logprob_backward_f16, BackwardArgs) { backward<f16>(args); }
KERNEL(256, 3, logprob_backward_bf16, BackwardArgs) { backward<bf16>(args); }
