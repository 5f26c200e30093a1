// The clipped surrogate of a token; src/ppo_loss/mod.rs has the formulas.
#pragma once

#include "token_kl.cuh"

// Bounds of the policy term; infinity is off.
struct Clip {
    float log_ratio_limit;
    float low;   // of the ratio
    float high;
    float dual_clip;
};

struct PolicyTerm {
    float log_ratio;  // clamped
    float ratio;
    float loss;
    float slope;      // of the loss by logp, if it flows; else the gradient is 0
    bool flows;
    bool is_clipped;  // the clipped branch is the larger one
    bool is_lower;    // the dual clip bounds it
};

static __device__ __forceinline__ PolicyTerm policy_of_token(const Clip& clip, float log_ratio,
                                                             float advantage) {
    PolicyTerm term;
    term.log_ratio = clamp(log_ratio, clip.log_ratio_limit);
    const bool clamped = fabsf(log_ratio) > clip.log_ratio_limit;
    term.ratio = expf(term.log_ratio);

    const float unclipped_loss = -term.ratio * advantage;
    const float clipped_loss = -fminf(fmaxf(term.ratio, clip.low), clip.high) * advantage;
    term.is_clipped = clipped_loss > unclipped_loss;
    const float larger = term.is_clipped ? clipped_loss : unclipped_loss;
    const float bound = advantage < 0.0f ? -clip.dual_clip * advantage : INFINITY;
    term.is_lower = larger > bound;
    term.loss = term.is_lower ? bound : larger;
    term.slope = unclipped_loss;
    term.flows = !(term.is_clipped || term.is_lower || clamped);
    return term;
}
