// Count, mean and sum of squared deviations of many numbers, in f64 and from one pass.
//
// A thread adds up deviations from the first of its own numbers. To merge, all sums are brought to
// the origin of one of them, so that what is merged is added and nothing is divided before the end.
// An origin is always a number of the set, or the mean of a part of it: its distance from the mean
// is not more than the numbers' own spread explains, and a large mean costs a small variance no
// digits.
#pragma once

#include "rows.cuh"

struct Moments {
    double count;
    double mean;  // 0 of none
    double m2;    // the sum of (x - mean)^2
};

struct Deviations {
    double count;
    double origin;
    double sum;      // of x - origin
    double squares;  // of (x - origin)^2
};

static __device__ __forceinline__ Deviations no_deviations() { return {0.0, 0.0, 0.0, 0.0}; }

// Adds the numbers whose bit of `keep` is set.
template <int N>
static __device__ __forceinline__ void add(Deviations& d, const float (&x)[N], unsigned keep) {
    if (d.count == 0.0 && keep) {
        float first = x[N - 1];
#pragma unroll
        for (int i = N - 2; i >= 0; i--) first = keep >> i & 1 ? x[i] : first;
        d.origin = first;
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (keep >> i & 1) {
            const double off = double(x[i]) - d.origin;
            d.sum += off;
            d.squares = fma(off, off, d.squares);
        }
    }
    d.count += __popc(keep);
}

static __device__ __forceinline__ void add(Deviations& d, const Moments& m) {
    if (m.count == 0.0) return;
    if (d.count == 0.0) d.origin = m.mean;
    const double off = m.mean - d.origin, sum = m.count * off;
    d.sum += sum;
    d.squares += fma(off, sum, m.m2);
    d.count += m.count;
}

// The deviations of all lanes, in every lane.
static __device__ __forceinline__ Deviations warp_merge(Deviations d) {
    const unsigned some = __ballot_sync(ALL_LANES, d.count != 0.0);
    const int first = some ? __ffs(some) - 1 : 0;
    const double origin = __shfl_sync(ALL_LANES, d.origin, first);
    if (d.count != 0.0) {
        const double shift = d.origin - origin;
        const double twice = fma(d.count, shift, d.sum) + d.sum;
        d.squares = fma(shift, twice, d.squares);
        d.sum = fma(d.count, shift, d.sum);
    }
    return {warp_sum(d.count), origin, warp_sum(d.sum), warp_sum(d.squares)};
}

// How a block merges them.
struct MergeDeviations {
    static __device__ __forceinline__ Deviations none() { return no_deviations(); }

    static __device__ __forceinline__ Deviations warp_merge(const Deviations& d) {
        return ::warp_merge(d);
    }
};

// The deviations of all threads, in the first warp. `warps` is shared memory for one value a warp.
static __device__ __forceinline__ Deviations block_merge(const Deviations& d, Deviations* warps) {
    return block_merge(MergeDeviations{}, d, warps);
}

static __device__ __forceinline__ Moments moments_of(const Deviations& d) {
    if (d.count == 0.0) return {0.0, 0.0, 0.0};
    const double mean = d.sum / d.count;
    const double squares = fma(-d.sum, mean, d.squares);
    // A comparison and not a maximum: NaN stays.
    return {d.count, d.origin + mean, squares < 0.0 ? 0.0 : squares};
}

struct MergeArgs {
    const Moments* partials;
    Moments* moments;  // one for every `run` partials
    int64_t count;
    int64_t run;
};

// Block [threads], a run of partials a block: their moments together, in an order that depends on
// the length of the run alone.
static __device__ __forceinline__ void merge_moments(const MergeArgs& args) {
    SHARED(Deviations, warps, WARP);
    for (int64_t index = blockIdx.x; index == 0 || index * args.run < args.count;
         index += gridDim.x) {
        const int64_t end = min((index + 1) * args.run, args.count);
        Deviations d = no_deviations();
        for (int64_t i = index * args.run + threadIdx.x; i < end; i += blockDim.x) {
            add(d, args.partials[i]);
        }
        d = block_merge(d, warps);
        if (threadIdx.x == 0) args.moments[index] = moments_of(d);
    }
}
