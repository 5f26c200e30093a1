// Sums over rows: of a warp a row, of a block a row, or of several blocks a row, each of which
// takes a part of the columns. What a thread takes, and the order in which sums are merged, depends
// on the row's length alone; so the bits are the same with clusters and without.
//
// What is summed is said by a reduction R. Its `args` hold `rows`, `parts`, and `partials` for
// [rows, parts] sums, or null where the parts of a row are the blocks of a cluster. And it has:
//
//     item(row)                           what has to be known of a row before it is read
//     reads(item)                         whether it is read at all
//     none()                              the sums over no columns
//     sum(row, part, thread, threads)     those over the columns of a part that fall to one thread
//     merge(a, b)                         of both
//     warp_merge(a)                       of all lanes, in every lane
//     write(row, item, sums)              what comes of them
//     write_unread(row, item)             what comes of a row that is not read
#pragma once

#include "reduce.cuh"

// Block [warps x 32], a row a warp.
template <class R>
static __device__ __forceinline__ void reduce_by_warps(const R& reduction) {
    const int lane = threadIdx.x % WARP;
    const int warps = blockDim.x / WARP;
    const int64_t first = int64_t(blockIdx.x) * warps + threadIdx.x / WARP;
    for (int64_t row = first; row < reduction.args.rows; row += int64_t(gridDim.x) * warps) {
        const auto item = reduction.item(row);
        if (!reduction.reads(item)) {
            if (lane == 0) reduction.write_unread(row, item);
            continue;
        }
        const auto sums = reduction.warp_merge(reduction.sum(row, 0, lane, WARP));
        if (lane == 0) reduction.write(row, item, sums);
    }
}

// The sums of all threads, in the first warp. `warps` is shared memory for one value a warp.
template <class R, class Sums>
static __device__ __forceinline__ Sums block_merge(const R& reduction, Sums sums, Sums* warps) {
    const unsigned lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    sums = reduction.warp_merge(sums);
    // The first warp may still be reading what an earlier call left.
    __syncthreads();
    if (lane == 0) warps[warp] = sums;
    __syncthreads();
    if (warp == 0) {
        const bool filled = lane < blockDim.x / WARP;
        sums = reduction.warp_merge(filled ? warps[lane] : reduction.none());
    }
    return sums;
}

// Block [threads], a part of a row a block; the grid is a multiple of the parts.
template <class R>
static __device__ __forceinline__ void reduce_by_blocks(const R& reduction) {
    using Sums = decltype(reduction.none());
    SHARED(Sums, warps, WARP);
    SHARED(Sums, part_sums, 1);
    const auto& args = reduction.args;
    const int part = blockIdx.x % args.parts;
    const int64_t step = gridDim.x / args.parts;
    for (int64_t row = blockIdx.x / args.parts; row < args.rows; row += step) {
        const auto item = reduction.item(row);
        if (!reduction.reads(item)) {
            if (part == 0 && threadIdx.x == 0) reduction.write_unread(row, item);
            continue;
        }
        Sums sums = reduction.sum(row, part, threadIdx.x, blockDim.x);
        sums = block_merge(reduction, sums, warps);
        if (args.parts == 1) {
            if (threadIdx.x == 0) reduction.write(row, item, sums);
        } else if (args.partials) {
            if (threadIdx.x == 0) args.partials[row * args.parts + part] = sums;
        } else {
            if (threadIdx.x == 0) *part_sums = sums;
            cluster_sync();
            if (part == 0 && threadIdx.x == 0) {
                for (int other = 1; other < args.parts; other++) {
                    sums = reduction.merge(sums, *in_cluster_block(part_sums, other));
                }
                reduction.write(row, item, sums);
            }
            // Until they were read, the other blocks must neither leave nor take their next row.
            cluster_sync();
        }
    }
}

// Block [threads], a row a thread: what rank 0 of a cluster does, where there are no clusters.
template <class R>
static __device__ __forceinline__ void merge_parts(const R& reduction) {
    const auto& args = reduction.args;
    const int64_t first = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    for (int64_t row = first; row < args.rows; row += int64_t(gridDim.x) * blockDim.x) {
        const auto item = reduction.item(row);
        if (!reduction.reads(item)) continue;
        const auto* parts = args.partials + row * args.parts;
        auto sums = parts[0];
        for (int part = 1; part < args.parts; part++) sums = reduction.merge(sums, parts[part]);
        reduction.write(row, item, sums);
    }
}
