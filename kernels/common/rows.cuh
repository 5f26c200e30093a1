// Sums over rows: of a warp a row, or of a block a row. A long row has several parts, ranges of whole
// tiles of columns. A block takes one after the other, or, where rows are too few to fill the device,
// a wide block takes all at once, with as many threads for each. What a thread adds up of a part, and
// the order in which sums are merged, depends on the row's length alone; so the bits are the same
// either way.
//
// A row is never spread over multiprocessors: the barriers of a cluster cost more than they gain (on an
// H200 rows in 8 blocks took 1.77 times the time of rows in one; and of 64 rows in 8 blocks each the
// log-probabilities took longer than now, the exact KL about as long).
//
// What is summed is said by a reduction R. Its `args` hold `rows` and `parts`. And it has:
//
//     MOST_PARTS                                 of a row: what a wide block has threads for
//     item(row)                                  what has to be known of a row before it is read
//     reads(item)                                whether it is read at all
//     none()                                     the sums over no columns
//     sum(row, part, thread, threads)            those over the columns of a part that fall to one
//                                                thread
//     merge(a, b)                                of both
//     warp_merge(a)                              of all lanes, in every lane
//     write(row, item, sums)                     what comes of them
//     write_unread(row, item)                    what comes of a row that is not read
#pragma once

#include "reduce.cuh"

// Threads for a part of a row.
constexpr int PART_THREADS = 256;

// A range of a row's groups.
struct Range { int first, end; };

// The groups of a part: whole tiles, but for the row's last.
static __device__ __forceinline__ Range part_of_row(int groups, int part, int parts, int tile) {
    if (parts == 1) return {0, groups};
    const int tiles = (groups + tile - 1) / tile;
    const int first = tiles * part / parts * tile;
    return {first, min(tiles * (part + 1) / parts * tile, groups)};
}

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

// The sums of a row, in the first warp of a block [PART_THREADS], which takes its parts one after the
// other; or, WIDE, of a block [parts x PART_THREADS], which takes them side by side.
template <bool WIDE, class R>
static __device__ __forceinline__ auto sums_of_row(const R& reduction, int64_t row) {
    using Sums = decltype(reduction.none());
    SHARED(Sums, warps, WARP);
    // Of every thread and part. Not in registers, of which there are none left.
    SHARED(Sums, part_sums, R::MOST_PARTS * PART_THREADS);
    const int parts = reduction.args.parts;
    const int threads = WIDE ? PART_THREADS : int(blockDim.x);
    const int thread = int(threadIdx.x) % threads;
    const int first = int(threadIdx.x) / threads, step = int(blockDim.x) / threads;
    for (int part = first; part < parts; part += step) {
        part_sums[part * threads + thread] = reduction.sum(row, part, thread, threads);
    }
    if (WIDE) __syncthreads();
    Sums sums = reduction.none();
    // The threads of other parts have nothing left to add.
    for (int part = 0; part < parts && int(threadIdx.x) < threads; part++) {
        sums = reduction.merge(sums, part_sums[part * threads + thread]);
    }
    return block_merge(reduction, sums, warps);
}

// Block as of sums_of_row, a row a block.
template <bool WIDE, class R>
static __device__ __forceinline__ void reduce_by_blocks(const R& reduction) {
    for (int64_t row = blockIdx.x; row < reduction.args.rows; row += gridDim.x) {
        const auto item = reduction.item(row);
        if (!reduction.reads(item)) {
            if (threadIdx.x == 0) reduction.write_unread(row, item);
            continue;
        }
        const auto sums = sums_of_row<WIDE>(reduction, row);
        if (threadIdx.x == 0) reduction.write(row, item, sums);
    }
}
