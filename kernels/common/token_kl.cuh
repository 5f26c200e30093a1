// Sampled KL of tokens, and other divergences of a token's probabilities; src/kl/mod.rs has the
// formulas.
#pragma once

#include "device.cuh"

// In the order of the Rust enum.
enum class KlEstimator : int32_t { K1, ABS, K2, K3, K3_STRAIGHT_THROUGH };

struct TokenKl {
    KlEstimator estimator;
    float log_ratio_limit;  // of d = logp - ref_logp; +inf for none
    float output_limit;     // of the value; +inf for none
};

// x within -limit..limit. Comparisons, so that NaN stays NaN.
static __device__ __forceinline__ float clamp(float x, float limit) {
    return x > limit ? limit : x < -limit ? -limit : x;
}

// e^-d - 1 + d for |d| < 1. In PPO d is small, and there the three terms cancel: at d = 1e-3 the
// value is 5e-7, eight units in the last place of 1. So it is summed as the series
// d^2/2! - d^3/3! + ..
static __device__ __forceinline__ float k3_series(float d) {
    // Through d^12/12!, which is below half a unit in the last place of the sum.
    float series = 2.0876757e-9f;
    series = fmaf(series, d, -2.5052108e-8f);
    series = fmaf(series, d, 2.755732e-7f);
    series = fmaf(series, d, -2.7557319e-6f);
    series = fmaf(series, d, 2.4801587e-5f);
    series = fmaf(series, d, -1.984127e-4f);
    series = fmaf(series, d, 1.3888889e-3f);
    series = fmaf(series, d, -8.333333e-3f);
    series = fmaf(series, d, 4.1666667e-2f);
    series = fmaf(series, d, -1.6666667e-1f);
    return fmaf(series, d, 0.5f) * (d * d);
}

// e^-d - 1 + d and 1 - e^-d.
static __device__ __forceinline__ void k3_of_token(float d, float& value, float& slope) {
    if (fabsf(d) < 1.0f) {
        value = k3_series(d);
        slope = d - value;
    } else {
        const float e = expf(-d);
        // Of d = -inf the exponential is the larger one.
        value = e - 1.0f + (d < -LARGEST ? -LARGEST : d);
        slope = 1.0f - e;
    }
}

// The values of some tokens, and their derivatives by d.
template <int N>
static __device__ __forceinline__ void kl_of_tokens(const TokenKl& kl, const float (&log_ratio)[N],
                                                    float (&value)[N], float (&slope)[N]) {
    float d[N];
#pragma unroll
    for (int i = 0; i < N; i++) d[i] = clamp(log_ratio[i], kl.log_ratio_limit);
    // The same way for all threads.
    switch (kl.estimator) {
        case KlEstimator::K1:
#pragma unroll
            for (int i = 0; i < N; i++) value[i] = d[i], slope[i] = 1.0f;
            break;
        case KlEstimator::ABS:
#pragma unroll
            for (int i = 0; i < N; i++) {
                value[i] = fabsf(d[i]);
                slope[i] = d[i] == 0.0f ? 0.0f : copysignf(1.0f, d[i]);
            }
            break;
        case KlEstimator::K2:
#pragma unroll
            for (int i = 0; i < N; i++) value[i] = 0.5f * d[i] * d[i], slope[i] = d[i];
            break;
        default:
#pragma unroll
            for (int i = 0; i < N; i++) {
                k3_of_token(d[i], value[i], slope[i]);
                if (kl.estimator == KlEstimator::K3_STRAIGHT_THROUGH) slope[i] = d[i];
            }
    }
#pragma unroll
    for (int i = 0; i < N; i++) {
        // Where a clamp bites, no gradient flows.
        const bool clamped =
            fabsf(log_ratio[i]) > kl.log_ratio_limit || fabsf(value[i]) > kl.output_limit;
        if (clamped) slope[i] = 0.0f;
        value[i] = clamp(value[i], kl.output_limit);
    }
}

// p - p_old, from the logarithms and their difference d.
static __device__ __forceinline__ float probability_moved(float logp, float old_logp, float d) {
    // The larger one times 1 - e^-|d|, with the sign of d.
    const float moved = expf(d > 0.0f ? logp : old_logp) * expm1f(-fabsf(d));
    return d > 0.0f ? -moved : moved;
}

// KL of (p_old, 1 - p_old) from (p, 1 - p).
static __device__ __forceinline__ float binary_kl(float logp, float old_logp, float d) {
    const float rest_old = -expm1f(old_logp), p_old = expf(old_logp);
    // Beyond 1 by its rounding only, where nothing is left beside the token.
    const float moved = probability_moved(logp, old_logp, d) / rest_old;
    const float grown = moved > 1.0f ? 1.0f : moved;
    const float of_rest = rest_old > 0.0f ? -rest_old * log1pf(-grown) : 0.0f;
    return of_rest - (p_old > 0.0f ? p_old * d : 0.0f);
}
