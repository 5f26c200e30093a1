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

// 2^y - 1 for y up to 0, with all its digits where 2^y is near 1. The polynomial is the one of
// src/cpu/math.rs.
static __device__ __forceinline__ float exp2_m1(float y) {
    float p = 1.5594678e-4f;
    p = fmaf(p, y, 1.3406644e-3f);
    p = fmaf(p, y, 9.617693e-3f);
    p = fmaf(p, y, 5.5503105e-2f);
    p = fmaf(p, y, 2.4022653e-1f);
    p = fmaf(p, y, 6.9314722e-1f);
    // NaN is no number above -1/2.
    return y > -0.5f ? y * p : exp2_fast(y) - 1.0f;
}

// Sums over some columns of a row, with y = (z - max) * scale and scale = log2(e) / temperature. One
// occurrence of the maximum is left out: where that stands far above all others, what they add up to would
// be rounded away beside its 1.
struct SoftmaxSums {
    float max;
    float rest;      // of 2^y
    float weighted;  // of 2^y y, if asked for
};

static __device__ __forceinline__ SoftmaxSums no_sums() { return {-INFINITY, 0.0f, 0.0f}; }

// What y is counted from. With -inf throughout, -inf - -inf would make NaN of legal columns.
static __device__ __forceinline__ float origin(float max) { return max == -INFINITY ? 0.0f : max; }

// The same sums for a maximum that is at least theirs, which itself is in none of them then. Without a
// branch, and exact if the maximum is the same. NaN stays in `rest`.
static __device__ __forceinline__ SoftmaxSums rebase(SoftmaxSums s, float max, float scale) {
    const float shift = fmaxf((s.max - origin(max)) * scale, FLOOR);
    const float factor = exp2_fast(shift);
    return {max, s.rest * factor, fmaf(shift, s.rest, s.weighted) * factor};
}

// With one more column, which is not above the maximum; nothing with -inf.
static __device__ __forceinline__ SoftmaxSums with_column(SoftmaxSums s, float z, float scale) {
    const float y = fmaxf((z - origin(s.max)) * scale, FLOOR);
    const float p = exp2_fast(y);
    return {s.max, s.rest + p, fmaf(p, y, s.weighted)};
}

// Adds the first `vectors` vectors of logits, the same number for all lanes; the others hold -inf. The
// maximum of all is found first, so that sums are rebased once, and takes no part; the one before it does,
// in its place.
template <bool WEIGHTED, class T, int N>
static __device__ __forceinline__ void add(SoftmaxSums& s, uint4 (&v)[N], int vectors, float scale,
                                           T type) {
    highest_first(v, type);
    float z[WIDTH<T>];
    unpack(v[0], z, type);
    s = rebase(s, exchange_highest(z, s.max), scale);
    const float base = origin(s.max);
#pragma unroll
    for (int i = 0; i < N; i++) {
        if (i >= vectors) break;
        float weighted[WIDTH<T>];
        if (i > 0) unpack(v[i], z, type);
#pragma unroll
        for (int j = 0; j < WIDTH<T>; j++) {
            const float y = (z[j] - base) * scale;
            z[j] = exp2_fast(y);
            if (WEIGHTED) weighted[j] = z[j] * fmaxf(y, FLOOR);
        }
        s.rest += tree_sum(z);
        if (WEIGHTED) s.weighted += tree_sum(weighted);
    }
}

static __device__ __forceinline__ SoftmaxSums merge(SoftmaxSums a, SoftmaxSums b, float scale) {
    const float max = fmaxf(a.max, b.max), other = fminf(a.max, b.max);
    a = rebase(a, max, scale);
    b = rebase(b, max, scale);
    return with_column({max, a.rest + b.rest, a.weighted + b.weighted}, other, scale);
}

// The sums of all lanes, in every lane.
static __device__ __forceinline__ SoftmaxSums warp_merge(SoftmaxSums s, float scale) {
    const float max = warp_max(s.max);
    // Of one lane with the largest maximum it is left out.
    const unsigned first = __ffs(__ballot_sync(ALL_LANES, s.max == max)) - 1;
    const float other = threadIdx.x % WARP == first ? -INFINITY : s.max;
    s = with_column(rebase(s, max, scale), other, scale);
    return {max, warp_sum(s.rest), warp_sum(s.weighted)};
}
