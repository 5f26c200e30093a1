// Reductions in fixed trees: over the threads of a warp, where every lane gets the result, and over
// a thread's own values.
#pragma once

#include "device.cuh"

constexpr unsigned ALL_LANES = 0xffffffffu;
constexpr int WARP = 32;

// NaN is skipped.
static __device__ __forceinline__ float warp_max(float x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
    }
    return x;
}

template <class T>
static __device__ __forceinline__ T warp_sum(T x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x += __shfl_xor_sync(ALL_LANES, x, step);
    return x;
}

// Leaves `x` changed. N is a power of 2.
template <int N>
static __device__ __forceinline__ float tree_sum(float (&x)[N]) {
#pragma unroll
    for (int width = N / 2; width > 0; width /= 2) {
#pragma unroll
        for (int i = 0; i < width; i++) x[i] += x[i + width];
    }
    return x[0];
}
