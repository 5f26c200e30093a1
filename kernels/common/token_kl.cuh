// The sampled KL of one token from d = logp - ref_logp; src/kl/mod.rs has the table of estimators.
#pragma once

#include "device.cuh"

// In the order of the Rust enum's variants.
enum Estimator : int32_t { K1, ABS, K2, K3, K3_STRAIGHT_THROUGH };

// Options ready for a loop over tokens: no clamp is a clamp at infinity.
struct TokenKl {
    int32_t estimator;
    float log_ratio_limit;
    float output_limit;
};

struct KlTerm {
    float value;
    float slope;  // by d
};

// `x` within +- the limit. A comparison, so that NaN stays NaN.
static __device__ __forceinline__ float clamp(float x, float limit) {
    return fabsf(x) > limit ? copysignf(limit, x) : x;
}

// e^-d - 1 + d, given e = e^-d. Below |d| = 1, where the three terms cancel, it is summed as the
// series d^2/2! - d^3/3! + ... through d^12/12!, half a unit in the last place of the sum.
static __device__ __forceinline__ float k3_value(float d, float e) {
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
    series = fmaf(series, d, 0.5f) * (d * d);
    return fabsf(d) < 1.0f ? series : e - 1.0f + d;
}

static __device__ __forceinline__ KlTerm token_kl(const TokenKl& kl, float log_ratio) {
    const float d = clamp(log_ratio, kl.log_ratio_limit);
    KlTerm term;
    if (kl.estimator == K1) {
        term = {d, 1.0f};
    } else if (kl.estimator == ABS) {
        term = {fabsf(d), d == 0.0f ? 0.0f : copysignf(1.0f, d)};
    } else if (kl.estimator == K2) {
        term = {0.5f * d * d, d};
    } else {
        const float e = expf(-d);
        const float k3 = k3_value(d, e);
        // 1 - e^-d, from the series where it would cancel.
        const float slope = fabsf(d) < 1.0f ? d - k3 : 1.0f - e;
        term = {k3, kl.estimator == K3 ? slope : d};
    }
    const float value = clamp(term.value, kl.output_limit);
    const bool d_clamped = fabsf(log_ratio) > kl.log_ratio_limit;
    const bool value_clamped = fabsf(term.value) > kl.output_limit;
    return {value, d_clamped || value_clamped ? 0.0f : term.slope};
}
