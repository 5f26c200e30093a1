/*
 * The arithmetic of one PPO update on the CPU, from the logits of three models to the gradient of
 * the trained one's: log-probabilities, KL, advantages, whitening, loss, and back. Every result is
 * compared with the same computed here in plain loops of double, and printed.
 *
 *     cc -std=c11 -Iinclude examples/c/ppo_update.c -Ltarget/release -lppo_kernels -lm
 */
#include <math.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "ppo_kernels.h"

enum { BATCH = 4, SEQ_LEN = 24, TOKENS = BATCH * SEQ_LEN, VOCAB = 301 };

static const double GAMMA = 0.99, LAMBDA = 0.95, KL_COEF = 0.05, CLIP = 0.2, VALUE_COEF = 0.5,
                    ENTROPY_COEF = 0.01, TEMPERATURE = 0.8;

/* What a rollout leaves, here at random. */
static float logits[TOKENS][VOCAB];     /* of the policy as it is now */
static float old_logits[TOKENS][VOCAB]; /* as it was when it made the responses */
static float ref_logits[TOKENS][VOCAB]; /* of the reference model */
static int64_t targets[TOKENS];         /* the tokens that it said */
static uint8_t mask[TOKENS];            /* 0 behind the end of a response */
static float scores[BATCH];             /* what the reward model thought of them */
static float values[TOKENS], old_values[TOKENS];

static void check(int32_t status) {
    if (status == PPOK_STATUS_OK) return;
    fprintf(stderr, "%s: %s\n", ppok_status_string(status), ppok_last_error());
    exit(1);
}

static float uniform(void) {
    static uint64_t state = 42;
    state = state * 6364136223846793005u + 1442695040888963407u;
    return (float)(state >> 40) / (float)(1 << 23) - 1.0f;
}

static void roll_out(void) {
    for (int t = 0; t < TOKENS; t++) {
        for (int v = 0; v < VOCAB; v++) {
            old_logits[t][v] = 4.0f * uniform();
            logits[t][v] = old_logits[t][v] + 0.2f * uniform();
            ref_logits[t][v] = old_logits[t][v] + 0.5f * uniform();
        }
        targets[t] = (int64_t)((uniform() + 1.0f) * 0.49f * VOCAB);
        mask[t] = t % SEQ_LEN < SEQ_LEN - 5 * (t / SEQ_LEN);
        old_values[t] = uniform();
        values[t] = old_values[t] + 0.3f * uniform();
    }
    for (int b = 0; b < BATCH; b++) scores[b] = 2.0f * uniform();
}

/* What an update makes of it. */
static float old_logp[TOKENS], ref_logp[TOKENS], kl[TOKENS];
static float advantages[TOKENS], returns[TOKENS], whitened[TOKENS];
static float logp[TOKENS], entropy[TOKENS], max[TOKENS], log_sum[TOKENS];
static ppok_ppo_loss_stats stats;
static float grad_logp[TOKENS], grad_values[TOKENS], grad_entropy[TOKENS];
static float grad_logits[TOKENS][VOCAB];

/* Log-probabilities, and what their gradient needs where there is room given for it. */
static void log_probabilities(const void *of, const ppok_logprob_options *sampled, float *result,
                              float *room_for_entropy, float *room_for_max, float *room_for_sum) {
    ppok_logprob_forward_args args = {
        .struct_size = sizeof args,
        .rows = TOKENS,
        .vocab = VOCAB,
        .logits_type = PPOK_F32,
        .targets_type = PPOK_I64,
        .logits = of,
        .targets = targets,
        .options = sampled,
        .logp = result,
        .entropy = room_for_entropy,
        .max = room_for_max,
        .log_sum = room_for_sum,
    };
    check(ppok_logprob_forward_cpu(&args));
}

/* Once a rollout: log-probabilities under the old policy and the reference, KL, advantages. */
static void prepare(const ppok_logprob_options *sampled) {
    log_probabilities(old_logits, sampled, old_logp, NULL, NULL, NULL);
    log_probabilities(ref_logits, sampled, ref_logp, NULL, NULL, NULL);

    ppok_kl_token_forward_args divergence = {
        .struct_size = sizeof divergence,
        .tokens = TOKENS,
        .logp = old_logp,
        .ref_logp = ref_logp,
        .mask = mask,
        .kl = kl,
    };
    check(ppok_kl_token_forward_cpu(&divergence));

    ppok_gae_options discounts;
    check(ppok_gae_options_init(&discounts, sizeof discounts));
    discounts.gamma = GAMMA;
    discounts.lambda = LAMBDA;
    discounts.kl_coef = KL_COEF;
    ppok_moments moments;
    ppok_gae_args estimate = {
        .struct_size = sizeof estimate,
        .batch = BATCH,
        .seq_len = SEQ_LEN,
        .values = old_values,
        .kl = kl,
        .scores = scores,
        .mask = mask,
        .options = &discounts,
        .advantages = advantages,
        .returns = returns,
        .moments = &moments,
    };
    check(ppok_gae_cpu(&estimate));

    ppok_whiten_forward_args whiten = {
        .struct_size = sizeof whiten,
        .elements = TOKENS,
        .x = advantages,
        .mask = mask,
        .moments = &moments,
        .y = whitened,
    };
    check(ppok_whiten_forward_cpu(&whiten));
}

/* Once a minibatch: log-probabilities with what their gradient needs, loss, and backward. */
static void learn(const ppok_logprob_options *sampled) {
    log_probabilities(logits, sampled, logp, entropy, max, log_sum);

    ppok_ppo_loss_options coefs;
    check(ppok_ppo_loss_options_init(&coefs, sizeof coefs));
    coefs.clip_range = CLIP;
    coefs.value_clip_range = CLIP;
    coefs.value_coef = VALUE_COEF;
    coefs.entropy_coef = ENTROPY_COEF;
    ppok_ppo_loss_args loss = {
        .struct_size = sizeof loss,
        .batch = BATCH,
        .seq_len = SEQ_LEN,
        .logp = logp,
        .old_logp = old_logp,
        .advantages = whitened,
        .values = values,
        .old_values = old_values,
        .returns = returns,
        .entropy = entropy,
        .mask = mask,
        .options = &coefs,
        .stats = &stats,
        .grad_logp = grad_logp,
        .grad_values = grad_values,
        .grad_entropy = grad_entropy,
    };
    check(ppok_ppo_loss_cpu(&loss));

    ppok_logprob_backward_args backward = {
        .struct_size = sizeof backward,
        .rows = TOKENS,
        .vocab = VOCAB,
        .logits_type = PPOK_F32,
        .targets_type = PPOK_I64,
        .logits = logits,
        .targets = targets,
        .max = max,
        .log_sum = log_sum,
        .entropy = entropy,
        .grad_logp = grad_logp,
        .grad_entropy = grad_entropy,
        .options = sampled,
        .grad_logits = grad_logits,
    };
    check(ppok_logprob_backward_cpu(&backward));
}

static void update(void) {
    ppok_logprob_options sampled;
    check(ppok_logprob_options_init(&sampled, sizeof sampled));
    sampled.temperature = TEMPERATURE;
    prepare(&sampled);
    learn(&sampled);
}

/* The same in double. */
static struct {
    double logp[TOKENS], old_logp[TOKENS], ref_logp[TOKENS], entropy[TOKENS], kl[TOKENS];
    double advantages[TOKENS], returns[TOKENS], whitened[TOKENS];
    double loss, policy_loss, value_loss, clip_fraction;
    double grad_logp[TOKENS], grad_values[TOKENS], grad_entropy[TOKENS];
    double grad_logits[TOKENS][VOCAB];
} exact;

/* ln p of every token of a row. */
static void log_softmax(const float *row, double *ln_p) {
    double top = -INFINITY, sum = 0.0;
    for (int v = 0; v < VOCAB; v++) top = fmax(top, row[v]);
    for (int v = 0; v < VOCAB; v++) sum += exp((row[v] - top) / TEMPERATURE);
    for (int v = 0; v < VOCAB; v++) ln_p[v] = (row[v] - top) / TEMPERATURE - log(sum);
}

static double clip(double x, double low, double high) {
    return x < low ? low : x > high ? high : x;
}

static void update_in_double(void) {
    double ln_p[VOCAB];
    for (int t = 0; t < TOKENS; t++) {
        log_softmax(old_logits[t], ln_p);
        exact.old_logp[t] = ln_p[targets[t]];
        log_softmax(ref_logits[t], ln_p);
        exact.ref_logp[t] = ln_p[targets[t]];
        exact.kl[t] = mask[t] ? exact.old_logp[t] - exact.ref_logp[t] : 0.0;
        log_softmax(logits[t], ln_p);
        exact.logp[t] = ln_p[targets[t]];
        for (int v = 0; v < VOCAB; v++) exact.entropy[t] -= exp(ln_p[v]) * ln_p[v];
    }

    int kept = 0;
    double mean = 0.0, variance = 0.0;
    for (int b = 0; b < BATCH; b++) {
        double next_value = 0.0, next_advantage = 0.0;
        int last = 1;
        for (int t = (b + 1) * SEQ_LEN - 1; t >= b * SEQ_LEN; t--) {
            if (!mask[t]) continue;
            double reward = -KL_COEF * exact.kl[t] + (last ? scores[b] : 0.0);
            double delta = reward + GAMMA * next_value - old_values[t];
            exact.advantages[t] = delta + GAMMA * LAMBDA * next_advantage;
            exact.returns[t] = exact.advantages[t] + old_values[t];
            next_value = old_values[t];
            next_advantage = exact.advantages[t];
            last = 0;
            kept++;
            mean += exact.advantages[t];
        }
    }
    mean /= kept;
    for (int t = 0; t < TOKENS; t++)
        if (mask[t]) variance += pow(exact.advantages[t] - mean, 2) / (kept - 1);
    for (int t = 0; t < TOKENS; t++)
        if (mask[t]) exact.whitened[t] = (exact.advantages[t] - mean) / sqrt(variance + 1e-8);

    double entropy_mean = 0.0;
    for (int t = 0; t < TOKENS; t++) {
        if (!mask[t]) continue;
        double ratio = exp(exact.logp[t] - exact.old_logp[t]), a = exact.whitened[t];
        double unclipped = -ratio * a, clipped = -clip(ratio, 1 - CLIP, 1 + CLIP) * a;
        exact.policy_loss += fmax(unclipped, clipped) / kept;
        exact.clip_fraction += (clipped > unclipped) / (double)kept;
        exact.grad_logp[t] = clipped > unclipped ? 0.0 : unclipped / kept;

        double near = clip(values[t], old_values[t] - CLIP, old_values[t] + CLIP);
        double error = values[t] - exact.returns[t], near_error = near - exact.returns[t];
        exact.value_loss += 0.5 * fmax(error * error, near_error * near_error) / kept;
        int flows = error * error >= near_error * near_error;
        exact.grad_values[t] = flows ? VALUE_COEF * error / kept : 0.0;

        entropy_mean += exact.entropy[t] / kept;
        exact.grad_entropy[t] = -ENTROPY_COEF / kept;
    }
    exact.loss = exact.policy_loss + VALUE_COEF * exact.value_loss - ENTROPY_COEF * entropy_mean;

    for (int t = 0; t < TOKENS; t++) {
        log_softmax(logits[t], ln_p);
        for (int v = 0; v < VOCAB; v++) {
            double p = exp(ln_p[v]), of_logp = (v == targets[t]) - p;
            double of_entropy = -p * (ln_p[v] + exact.entropy[t]);
            double grad = exact.grad_logp[t] * of_logp + exact.grad_entropy[t] * of_entropy;
            exact.grad_logits[t][v] = grad / TEMPERATURE;
        }
    }
}

/* The largest difference, as a share of the largest value; single precision has 6e-8. */
static int compare(const char *name, const float *ours, const double *theirs, int count) {
    double error = 0.0, largest = 1e-30;
    for (int i = 0; i < count; i++) {
        error = fmax(error, fabs(ours[i] - theirs[i]));
        largest = fmax(largest, fabs(theirs[i]));
        if (isnan(ours[i])) error = INFINITY;
    }
    int wrong = !(error / largest < 2e-5);
    printf("%-14s %8.1e %s\n", name, error / largest, wrong ? "WRONG" : "");
    return wrong;
}

int main(void) {
    printf("ppo-kernels %s\n", ppok_version_string());
    roll_out();
    update();
    update_in_double();

    printf("%-14s %s\n", "result", "error");
    int wrong = compare("logp", logp, exact.logp, TOKENS);
    wrong += compare("entropy", entropy, exact.entropy, TOKENS);
    wrong += compare("kl", kl, exact.kl, TOKENS);
    wrong += compare("returns", returns, exact.returns, TOKENS);
    wrong += compare("advantages", whitened, exact.whitened, TOKENS);
    wrong += compare("grad logp", grad_logp, exact.grad_logp, TOKENS);
    wrong += compare("grad values", grad_values, exact.grad_values, TOKENS);
    wrong += compare("grad entropy", grad_entropy, exact.grad_entropy, TOKENS);
    wrong += compare("grad logits", &grad_logits[0][0], &exact.grad_logits[0][0], TOKENS * VOCAB);

    const char *const names[] = {"loss", "policy loss", "value loss", "clip fraction"};
    const double numbers[] = {stats.loss, stats.policy_loss, stats.value_loss, stats.clip_fraction};
    const double theirs[] = {exact.loss, exact.policy_loss, exact.value_loss, exact.clip_fraction};
    for (int i = 0; i < 4; i++) {
        const float ours = (float)numbers[i];
        wrong += compare(names[i], &ours, &theirs[i], 1);
        printf("%-14s %f\n", "", ours);
    }
    return wrong != 0;
}
