// Online softmax: the maximum of a row and the sums that depend on it, from one pass.
//
// Compiled with --fmad=false: where a product and a sum are to be one instruction, fmaf says so. Then
// the bits do not depend on what the compiler makes of each place that a function is inlined into.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

constexpr float LOG2_E = 1.44269504f;
constexpr float LN_2 = 0.693147181f;

// A y below this counts as this, for which 2^y is 0 all the same: so that 2^y y is 0 and not 0 * inf.
constexpr float FLOOR = -216.0f;

// Sums over some columns of a row, with y = (z - max) * scale and scale = log2(e) / temperature.
struct SoftmaxSums {
    float max;
    float sum;       // of 2^y
    float weighted;  // of 2^y y, if asked for
};

static __device__ __forceinline__ SoftmaxSums no_sums() { return {-INFINITY, 0.0f, 0.0f}; }

// What y is counted from. With -inf throughout, -inf - -inf would make NaN of legal columns.
static __device__ __forceinline__ float origin(float max) { return max == -INFINITY ? 0.0f : max; }

// The same sums for a maximum that is at least theirs. Without a branch, and exact if the maximum is
// the same. NaN stays in `sum`.
static __device__ __forceinline__ SoftmaxSums rebase(SoftmaxSums s, float max, float scale) {
    const float shift = fmaxf((s.max - origin(max)) * scale, FLOOR);
    const float factor = exp2_fast(shift);
    return {max, s.sum * factor, fmaf(shift, s.sum, s.weighted) * factor};
}

// Adds the first `vectors` vectors of logits, the same number for all lanes; the others hold -inf. The
// maximum of all is found first, so that sums are rebased once.
template <bool WEIGHTED, class T, int N>
static __device__ __forceinline__ void add(SoftmaxSums& s, const uint4 (&v)[N], int vectors,
                                           float scale, T type) {
    s = rebase(s, fmaxf(s.max, highest(v, type)), scale);
    const float base = origin(s.max);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i >= vectors) break;
        float z[WIDTH<T>], weighted[WIDTH<T>];
        unpack(v[i], z, type);
#pragma unroll
        for (int j = 0; j < WIDTH<T>; j++) {
            const float y = (z[j] - base) * scale;
            z[j] = exp2_fast(y);
            if (WEIGHTED) weighted[j] = z[j] * fmaxf(y, FLOOR);
        }
        s.sum += tree_sum(z);
        if (WEIGHTED) s.weighted += tree_sum(weighted);
    }
}

static __device__ __forceinline__ SoftmaxSums merge(SoftmaxSums a, SoftmaxSums b, float scale) {
    const float max = fmaxf(a.max, b.max);
    a = rebase(a, max, scale);
    b = rebase(b, max, scale);
    return {max, a.sum + b.sum, a.weighted + b.weighted};
}

// The sums of all lanes, in every lane.
static __device__ __forceinline__ SoftmaxSums warp_merge(SoftmaxSums s, float scale) {
    s = rebase(s, warp_max(s.max), scale);
    return {s.max, warp_sum(s.sum), warp_sum(s.weighted)};
}
