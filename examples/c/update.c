/* From logits to their gradient by the PPO loss. docs/c.md says how to build it. */
#include <stdio.h>
#include <stdlib.h>

#include <ppo_kernels.h>

static void check(int32_t status) {
    if (status != PPOK_STATUS_OK) {
        fprintf(stderr, "%s\n", ppok_last_error());
        exit(1);
    }
}

int main(void) {
    /* One response of three tokens, from a vocabulary of four. */
    const float logits[3][4] = {{1.0f, 2.0f, 0.0f, -1.0f}, {0.5f, 0.0f, 3.0f, 1.0f}, {0.0f, 0.0f, 1.0f, 2.0f}};
    const int64_t targets[3] = {1, 2, 3};
    const float old_logp[3] = {-0.6f, -0.3f, -0.4f};
    const float advantages[3] = {0.5f, -1.0f, 1.5f};

    ppok_logprob_options options;
    check(ppok_logprob_options_init(&options, sizeof options));
    options.temperature = 0.7;

    float logp[3], max[3], log_sum[3];
    ppok_logprob_forward_args forward = {sizeof forward}; /* the rest is zero: not given, not wanted */
    forward.rows = 3;
    forward.vocab = 4;
    forward.logits_type = PPOK_F32;
    forward.targets_type = PPOK_I64;
    forward.logits = logits;
    forward.targets = targets;
    forward.options = &options;
    forward.logp = logp;
    forward.max = max;
    forward.log_sum = log_sum;
    check(ppok_logprob_forward_cpu(&forward));

    float grad_logp[3];
    ppok_ppo_loss_stats stats;
    ppok_ppo_loss_args loss = {sizeof loss};
    loss.batch = 1;
    loss.seq_len = 3;
    loss.logp = logp;
    loss.old_logp = old_logp;
    loss.advantages = advantages;
    loss.stats = &stats;
    loss.grad_logp = grad_logp;
    check(ppok_ppo_loss_cpu(&loss));

    float grad_logits[3][4];
    ppok_logprob_backward_args backward = {sizeof backward};
    backward.rows = 3;
    backward.vocab = 4;
    backward.logits_type = PPOK_F32;
    backward.targets_type = PPOK_I64;
    backward.logits = logits;
    backward.targets = targets;
    backward.max = max;
    backward.log_sum = log_sum;
    backward.grad_logp = grad_logp;
    backward.options = &options;
    backward.grad_logits = grad_logits;
    check(ppok_logprob_backward_cpu(&backward));

    printf("loss %.4f, clipped %.2f\n", stats.loss, stats.clip_fraction);
    for (int t = 0; t < 3; t++) printf("logp %.4f, its gradient %.4f\n", logp[t], grad_logp[t]);
    return 0;
}
