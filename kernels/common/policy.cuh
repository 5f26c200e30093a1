// The policy term of a token; src/ppo_loss/mod.rs has the formulas.
#pragma once

#include "token_kl.cuh"

// Bounds of the policy term; infinity is off.
struct Clip {
    float log_ratio_limit;
    float low;  // of the ratio
    float high;
    float dual_clip;
};

struct PolicyTerm {
    float log_ratio;  // clamped
    float ratio;
    float loss;
    float slope;  // of the loss by logp, if it flows; else the gradient is 0
    bool flows;
    bool is_clipped;  // the clipped branch is the larger one
    bool is_lower;    // the dual clip bounds it
};

// The clipped surrogate, its ratio bounded by a cap as well.
static __device__ __forceinline__ PolicyTerm policy_of_token(const Clip& clip, float log_ratio,
                                                             float advantage,
                                                             float cap = INFINITY) {
    PolicyTerm term;
    term.log_ratio = clamp(log_ratio, clip.log_ratio_limit);
    const bool clamped = fabsf(log_ratio) > clip.log_ratio_limit;
    term.ratio = expf(term.log_ratio);

    const bool is_capped = term.ratio > cap;
    const float capped = is_capped ? cap : term.ratio;
    const float unclipped_loss = -capped * advantage;
    const float clipped_loss = -fminf(fmaxf(term.ratio, clip.low), clip.high) * advantage;
    term.is_clipped = clipped_loss > unclipped_loss;
    const float larger = term.is_clipped ? clipped_loss : unclipped_loss;
    const float bound = advantage < 0.0f ? -clip.dual_clip * advantage : INFINITY;
    term.is_lower = larger > bound;
    term.loss = term.is_lower ? bound : larger;
    term.slope = -term.ratio * advantage;
    // Below the upper bound, but above the cap, the clipped branch is -r A.
    const bool inside = is_capped && term.ratio >= clip.low && term.ratio <= clip.high;
    term.flows = !(term.is_lower || clamped) && (term.is_clipped ? inside : !is_capped);
    return term;
}

// In the order of the Rust enums.
enum class Surrogate : int32_t {
    CLIP,
    LOG_CLIP,
    REINFORCE,
    CLIPPED_WEIGHT,
    GAMMA_WEIGHT,
    SOFT_GATE
};
enum class TrustRegion : int32_t { NONE, TOTAL_VARIATION, BINARY_KL, RATIO };
enum class KlRatio : int32_t { NONE, GRADIENT, TERM };

// What else than Clip there is to say of a policy term, and of the KL term beside it.
struct Family {
    Surrogate surrogate;
    int32_t of_rows;  // the ratio is that of the row
    int32_t spreads;  // its gradient goes to all tokens of the row
    TrustRegion trust_region;
    int32_t region_by_advantage;
    int32_t kl_reverse;
    KlRatio kl_ratio;
    int32_t kl_weighted;
    float ratio_cap;
    float tau_pos, tau_neg;
    float gamma_k_pos, gamma_lambda_pos;
    float gamma_k_neg, gamma_lambda_neg;
    float region_low, region_high;
    float kl_ratio_cap;
};

static __device__ __forceinline__ bool weighs_logp(Surrogate surrogate) {
    return surrogate == Surrogate::REINFORCE || surrogate == Surrogate::CLIPPED_WEIGHT ||
           surrogate == Surrogate::GAMMA_WEIGHT;
}

static __device__ __forceinline__ float at_most(float x, float bound) {
    // A comparison, so that NaN stays NaN.
    return x > bound ? bound : x;
}

// The term of any surrogate. `log_ratio` is that of the token or of its row.
static __device__ __forceinline__ PolicyTerm policy_of_token(const Clip& clip, const Family& family,
                                                             float log_ratio, float logp,
                                                             float advantage) {
    const float a = advantage;
    if (family.surrogate == Surrogate::CLIP) {
        return policy_of_token(clip, log_ratio, a, family.ratio_cap);
    }
    PolicyTerm term;
    term.log_ratio = clamp(log_ratio, clip.log_ratio_limit);
    term.flows = !(fabsf(log_ratio) > clip.log_ratio_limit) || weighs_logp(family.surrogate);
    term.ratio = expf(term.log_ratio);
    term.is_clipped = term.is_lower = false;
    if (family.surrogate == Surrogate::LOG_CLIP) {
        term.slope = term.loss = -term.ratio * a;
        return term;
    }
    if (family.surrogate == Surrogate::SOFT_GATE) {
        const float tau = a > 0.0f ? family.tau_pos : family.tau_neg;
        const float x = tau * (term.ratio - 1.0f);
        // Of -|x|, so that it does not overflow.
        const float e = expf(-fabsf(x));
        const float larger = 1.0f / (1.0f + e);
        const float gate = x < 0.0f ? e * larger : larger;
        // e is 0 where the ratio is infinite, and so is the slope.
        const float slope = 4.0f * e * larger * larger;
        term.loss = -4.0f / tau * gate * a;
        term.slope = -(slope == 0.0f ? 0.0f : slope * term.ratio) * a;
        return term;
    }
    // A weight without gradient times logp.
    float weight = 1.0f;
    if (family.surrogate == Surrogate::CLIPPED_WEIGHT) {
        weight = term.ratio < clip.low ? clip.low : term.ratio > clip.high ? clip.high : term.ratio;
        term.is_clipped = term.ratio < clip.low || term.ratio > clip.high;
    } else if (family.surrogate == Surrogate::GAMMA_WEIGHT) {
        const bool is_pos = a >= 0.0f;
        const float k = is_pos ? family.gamma_k_pos : family.gamma_k_neg;
        const float lambda = is_pos ? family.gamma_lambda_pos : family.gamma_lambda_neg;
        const float least = -18.420681f;  // ln 1e-8
        const float l = term.log_ratio < least ? least : term.log_ratio;
        const float ratio = term.log_ratio < least ? 1e-8f : term.ratio;
        // Without lambda the ratio, which may be infinite, is not wanted.
        const float of_ratio = lambda == 0.0f ? 0.0f : lambda * ratio;
        weight = expf(fmaf(k, l, lambda - of_ratio));
    }
    term.slope = -weight * a;
    term.loss = term.slope * logp;
    return term;
}

// Whether a log-ratio is clipped before it is added up.
static __device__ __forceinline__ bool is_log_clipped(const Clip& clip, const Family& family,
                                                      float log_ratio, float advantage) {
    if (family.surrogate != Surrogate::LOG_CLIP) return false;
    return advantage > 0.0f ? log_ratio > clip.high : log_ratio < clip.low;
}

// Whether the token has no policy term. `d` is logp - old_logp.
static __device__ __forceinline__ bool outside_trust_region(const Clip& clip, const Family& family,
                                                            float logp, float old_logp, float d,
                                                            float advantage) {
    if (family.trust_region == TrustRegion::NONE) return false;
    // What is compared with the upper bound and with the lower one.
    float above, below;
    if (family.trust_region == TrustRegion::RATIO) {
        above = expm1f(clamp(d, clip.log_ratio_limit));
        below = -above;
    } else if (family.trust_region == TrustRegion::TOTAL_VARIATION) {
        above = probability_moved(logp, old_logp, d);
        below = -above;
    } else {
        const float kl = binary_kl(logp, old_logp, d);
        above = d > 0.0f ? kl : 0.0f;
        below = d < 0.0f ? kl : 0.0f;
    }
    const bool over = above > family.region_high, under = below > family.region_low;
    if (!family.region_by_advantage) return over || under;
    return advantage > 0.0f ? over : under;
}

// What the ratio and the options make of a token's KL term. `d` is logp - old_logp, and `against` logp
// less what the KL is against.
static __device__ __forceinline__ void change_kl(const Clip& clip, const Family& family, float d,
                                                 float against, float& value, float& slope) {
    if (family.kl_reverse) slope = against;
    if (family.kl_ratio == KlRatio::NONE) return;
    const float ratio = at_most(expf(clamp(d, clip.log_ratio_limit)), family.kl_ratio_cap);
    slope *= ratio;
    if (family.kl_ratio == KlRatio::TERM) value *= ratio;
}
