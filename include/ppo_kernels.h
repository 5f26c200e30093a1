/*
 * ppo-kernels: fused kernels for the token-level arithmetic of PPO, from C and C++.
 *
 * Made by cbindgen from the library's source; do not edit.
 *
 * For every op and pass there is one function for the CPU, ppok_OP_PASS_cpu, which says what the pass
 * does, and one that does the same on CUDA, ppok_OP_PASS_cuda. What holds for all of them:
 *
 * Status. Every function that can fail returns PPOK_STATUS_OK, which is 0, or what went wrong;
 * ppok_last_error() says it in words. Arguments are looked at before anything is written or
 * launched. No C++ exception and no panic ever leaves the library.
 *
 * Arrays. A shape such as [rows, vocab] means that many elements, one after the other, the last
 * index fastest. Pointers are to the process's memory in _cpu functions and to the device's in
 * _cuda functions, and are aligned to the size of an element. An array that may be null is said to;
 * where an array has no elements its pointer is not looked at, except that null still means that it
 * is not there. Masks are bytes: 0 is for what is left out, which may hold anything, NaN included.
 *
 * Overlap. What is read may overlap; what is written may overlap nothing else, unless the function
 * says that an output may be an input: the very same memory then, from the same address on.
 *
 * Structs. Every pass takes one struct, ppok_OP_PASS_args: sizes, arrays that are read, options, arrays
 * that are written. It and the options begin with struct_size and may grow at their end in later
 * versions. In arguments, set struct_size to sizeof and all that is not used to zero:
 * ppok_gae_args args = {sizeof args}; args.batch = batch; and so on. Options are set to their defaults
 * by ppok_..._options_init(&options, sizeof options), and then changed; a null pointer to options
 * stands for the defaults. Fields named reserved are 0. Results that are structs, ppok_moments and those
 * named ppok_..._stats, are of doubles only, on the device too.
 *
 * Memory. The library allocates nothing for results and keeps no pointer of the caller's. The structs
 * of arguments and options are in the process's memory, also for CUDA, and are not needed after the
 * call. The _cpu functions need no workspace. The first that has work for several threads starts a
 * pool of them, as many as RAYON_NUM_THREADS says, or OMP_NUM_THREADS, or as the machine has cores, which
 * stays for the life of the process; ppok_set_team() has the program's own threads used in its place.
 * In the child of a fork(), which does not have them, and where they cannot be started, the caller's
 * thread does all the work, to the same bits. Apart from the pool with its queue, the nodes of the tree
 * by which a call's work is shared out, the order of the rows by groups in ppok_advantages_cpu(), some numbers a row in the
 * losses of pairs and from logits, kernels that are loaded, and the texts of errors, nothing is
 * allocated.
 *
 * CUDA. ppok_OP_PASS_cuda(&args, workspace, bytes, stream) launches kernels on the caller's stream
 * (CUstream or cudaStream_t; null is the default stream of the thread's current context, or where
 * there is none of the first device's primary context) and returns at once: errors of the kernels
 * themselves come from later calls. It neither waits for the device nor allocates its memory, and can
 * be captured into a graph once it has been called with the same types, sizes and options outside of a
 * capture, which loads its kernels. The workspace is device memory, aligned to 16 bytes, of any
 * content, of as many bytes or more as ppok_OP_PASS_cuda_workspace_size(&args, stream, &bytes) writes.
 * That function looks at sizes, types, options, the stream's device and at which arrays are null, and
 * at no array's content. Calls on one stream can share a workspace. A library that was built without
 * CUDA has these functions too, and they return PPOK_STATUS_UNSUPPORTED.
 *
 * Threads. All functions can be called from several threads at a time, of 64 KiB of stack or more. The
 * same inputs give the same bits, for any number of threads.
 */


#ifndef PPO_KERNELS_H
#define PPO_KERNELS_H

#include <stddef.h>
#include <stdint.h>

/**
 * Nothing is subtracted from a score.
 */
#define PPOK_ADVANTAGES_BASELINE_NONE 0

/**
 * The mean of the group (GRPO, Dr. GRPO).
 */
#define PPOK_ADVANTAGES_BASELINE_GROUP 1

/**
 * The mean of the others in the group (RLOO).
 */
#define PPOK_ADVANTAGES_BASELINE_LEAVE_ONE_OUT 2

/**
 * The mean of all rows (REINFORCE).
 */
#define PPOK_ADVANTAGES_BASELINE_BATCH 3

/**
 * The mean of the group, every row as often as it is long (OPO).
 */
#define PPOK_ADVANTAGES_BASELINE_LENGTH_WEIGHTED 4

/**
 * The second best of the group, for the best one; all others get 0 (pass@k).
 */
#define PPOK_ADVANTAGES_BASELINE_RUNNER_UP 5

/**
 * The difference is divided by nothing.
 */
#define PPOK_ADVANTAGES_SCALE_NONE 0

/**
 * By the standard deviation of the group (GRPO).
 */
#define PPOK_ADVANTAGES_SCALE_GROUP 1

/**
 * By the standard deviation of the others in the group (NeMo-RL with its leave-one-out baseline).
 */
#define PPOK_ADVANTAGES_SCALE_LEAVE_ONE_OUT 2

/**
 * By the standard deviation of all rows (TRL's scale_rewards="batch").
 */
#define PPOK_ADVANTAGES_SCALE_BATCH 3

/**
 * By the mean of the group (MaxRL), for scores of 0 and above.
 */
#define PPOK_ADVANTAGES_SCALE_MEAN 4

/**
 * By the share of all rows whose score is not 0 (GPG).
 */
#define PPOK_ADVANTAGES_SCALE_NONZERO 5

/**
 * The advantage of a row that is the only one of its group with a score is 0 (TRL, NeMo-RL, verl's
 * vectorised forms).
 */
#define PPOK_ADVANTAGES_SINGLETON_ZERO 0

/**
 * Nothing is subtracted from its score, and no number of the group divides it (verl's loops).
 */
#define PPOK_ADVANTAGES_SINGLETON_KEEP 1

/**
 * Tokens of one column have a baseline in common (verl's `optimal_token_baseline`).
 */
#define PPOK_TOKEN_STEP_COLUMN 0

/**
 * Tokens with as many unmasked ones before them have a baseline in common (verl's
 * `tir_optimal_token_baseline`, for several turns).
 */
#define PPOK_TOKEN_STEP_UNMASKED 1

/**
 * The version of this header: 10000 times the major number, 100 times the minor one, and the patch.
 */
#define PPOK_VERSION 100

/**
 * Everything went well.
 */
#define PPOK_STATUS_OK 0

/**
 * A size is not one that the op takes, or does not go with another, or is more than a process can
 * address.
 */
#define PPOK_STATUS_SHAPE 1

/**
 * An element type is none of those that the op takes.
 */
#define PPOK_STATUS_DTYPE 2

/**
 * An option is out of its range, not finite, or does not go with the arguments given, or an array holds
 * a label or a length that is none.
 */
#define PPOK_STATUS_OPTION 3

/**
 * A target is neither in the vocabulary nor `ignore_index`.
 */
#define PPOK_STATUS_TARGET 4

/**
 * Too few elements are unmasked for the result to be defined.
 */
#define PPOK_STATUS_MASK 5

/**
 * A pointer that is needed is null.
 */
#define PPOK_STATUS_NULL_POINTER 6

/**
 * A pointer is not aligned to the size of an element.
 */
#define PPOK_STATUS_MISALIGNED 7

/**
 * Memory that is written overlaps another argument.
 */
#define PPOK_STATUS_OVERLAP 8

/**
 * The `struct_size` of a struct is none that this library knows, or the struct sets fields that only
 * a later version has.
 */
#define PPOK_STATUS_STRUCT_SIZE 9

/**
 * The workspace is smaller than the function's `_workspace_size` says.
 */
#define PPOK_STATUS_WORKSPACE 10

/**
 * The library was built without CUDA.
 */
#define PPOK_STATUS_UNSUPPORTED 11

/**
 * There is no CUDA driver on this machine, or it is too old.
 */
#define PPOK_STATUS_CUDA_DRIVER 12

/**
 * The driver has no device or no context to offer.
 */
#define PPOK_STATUS_CUDA_DEVICE 13

/**
 * The kernels were not compiled for the device's architecture.
 */
#define PPOK_STATUS_CUDA_IMAGE 14

/**
 * The device is out of memory.
 */
#define PPOK_STATUS_CUDA_MEMORY 15

/**
 * A kernel could not be launched, or an earlier one failed.
 */
#define PPOK_STATUS_CUDA_LAUNCH 16

/**
 * A mistake in the library. Please report it, with what ppok_last_error() says.
 */
#define PPOK_STATUS_INTERNAL 17

/**
 * Logits in IEEE single precision.
 */
#define PPOK_F32 0

/**
 * Logits in IEEE half precision.
 */
#define PPOK_F16 1

/**
 * Logits in bfloat16: the upper half of single precision.
 */
#define PPOK_BF16 2

/**
 * Token ids as `uint32_t`.
 */
#define PPOK_U32 0

/**
 * Token ids as `int64_t`, as PyTorch has them.
 */
#define PPOK_I64 1

/**
 * The value of an option that is left out, where it may be. So a clamp of `PPOK_NONE` clamps nothing.
 */
#define PPOK_NONE -1.0

/**
 * A weight a token: e^d with d = old_logp - rollout_logp.
 */
#define PPOK_CORRECTION_LEVEL_TOKEN 0

/**
 * A weight a row: the geometric mean of its tokens' e^d (AReaL).
 */
#define PPOK_CORRECTION_LEVEL_SEQUENCE_MEAN 1

/**
 * A weight a row: the product of its tokens' e^d (TRL, verl's sequence).
 */
#define PPOK_CORRECTION_LEVEL_SEQUENCE_SUM 2

/**
 * No weight but 1, and 0 for what is rejected.
 */
#define PPOK_CORRECTION_LEVEL_NONE 3

/**
 * A weight outside its bounds becomes the bound.
 */
#define PPOK_CORRECTION_OUTSIDE_TRUNCATE 0

/**
 * It becomes 0 (IcePop).
 */
#define PPOK_CORRECTION_OUTSIDE_ZERO 1

/**
 * Nothing is rejected.
 */
#define PPOK_REJECTION_METRIC_NONE 0

/**
 * The ratio e^d, its bounds above 0; of a row the geometric mean, the product, or the extremes.
 */
#define PPOK_REJECTION_METRIC_RATIO 1

/**
 * d^2 / 2.
 */
#define PPOK_REJECTION_METRIC_K2 2

/**
 * e^d - 1 - d, an estimate of KL(rollout || trainer).
 */
#define PPOK_REJECTION_METRIC_K3 3

/**
 * e^-d - 1 + d, an estimate of KL(trainer || rollout) (AReaL).
 */
#define PPOK_REJECTION_METRIC_REVERSE_K3 4

/**
 * The KL of (p, 1 - p) of the rollout from (q, 1 - q) of the trainer (OpenRLHF).
 */
#define PPOK_REJECTION_METRIC_BINARY_KL 5

/**
 * The larger one of the two directions of that (AReaL).
 */
#define PPOK_REJECTION_METRIC_BINARY_KL_MAX 6

/**
 * |p - q| (OpenRLHF).
 */
#define PPOK_REJECTION_METRIC_TOTAL_VARIATION 7

/**
 * The token's metric; the token is rejected.
 */
#define PPOK_REJECTION_LEVEL_TOKEN 0

/**
 * The mean over the row; the row is rejected, as in the next two.
 */
#define PPOK_REJECTION_LEVEL_SEQUENCE_MEAN 1

/**
 * The sum over the row.
 */
#define PPOK_REJECTION_LEVEL_SEQUENCE_SUM 2

/**
 * Every token of the row.
 */
#define PPOK_REJECTION_LEVEL_SEQUENCE_MAX 3

/**
 * A masked token between unmasked ones is no step: value and advantage are carried over it (verl,
 * NeMo).
 */
#define PPOK_GAE_MASK_CARRY 0

/**
 * It is a step with reward 0 and value 0, which discounts (TRL 0.11, OpenRLHF).
 */
#define PPOK_GAE_MASK_MULTIPLY 1

/**
 * The score is added at the last unmasked token (TRL 0.11, OpenRLHF, verl, NeMo, MOSS).
 */
#define PPOK_GAE_SCORE_AT_LAST 0

/**
 * One past it if there is room, else at it (TRL since 0.12, DeepSpeed-Chat). The masked position
 * after the last unmasked token then is a step too, of reward score: its value is read, its return
 * and reward are written, and its advantage is 0 and not among the moments.
 */
#define PPOK_GAE_SCORE_AFTER_LAST 1

/**
 * Scores are scaled, then clipped (TRL 0.11, MOSS).
 */
#define PPOK_GAE_SCALE_THEN_CLIP 0

/**
 * Scores are clipped, then scaled (trlx).
 */
#define PPOK_GAE_CLIP_THEN_SCALE 1

/**
 * The score of a sequence without end-of-sequence token stays as it is.
 */
#define PPOK_GAE_MISSING_EOS_KEEP 0

/**
 * `missing_eos_value` is subtracted from it (TRL's `missing_eos_penalty`).
 */
#define PPOK_GAE_MISSING_EOS_SUBTRACT 1

/**
 * `missing_eos_value` takes its place (lm-human-preferences' `penalty_reward_value`).
 */
#define PPOK_GAE_MISSING_EOS_REPLACE 2

/**
 * d = logp - ref_logp: unbiased, may be negative. What goes into the reward everywhere.
 */
#define PPOK_KL_K1 0

/**
 * |d|.
 */
#define PPOK_KL_ABS 1

/**
 * d^2 / 2: low variance, biased; its gradient is an unbiased estimate of that of the exact KL.
 */
#define PPOK_KL_K2 2

/**
 * exp(-d) - 1 + d: unbiased and never negative. What goes into the loss.
 */
#define PPOK_KL_K3 3

/**
 * The value of `PPOK_KL_K3` with the gradient of `PPOK_KL_K2`.
 */
#define PPOK_KL_K3_STRAIGHT_THROUGH 4

/**
 * KL(policy || reference), the mean over the policy: what the estimators from samples estimate.
 */
#define PPOK_KL_FORWARD 0

/**
 * KL(reference || policy), the mean over the reference, as in distillation.
 */
#define PPOK_KL_REVERSE 1

/**
 * beta KL(reference || m) + (1 - beta) KL(policy || m), m = (1 - beta) policy + beta reference: the generalised
 * Jensen-Shannon divergence (GKD).
 */
#define PPOK_KL_JSD 2

/**
 * KL(policy || skew policy + (1 - skew) reference).
 */
#define PPOK_KL_SKEW_FORWARD 3

/**
 * KL(reference || skew reference + (1 - skew) policy).
 */
#define PPOK_KL_SKEW_REVERSE 4

/**
 * 1 - sum_i min(p_i, q_i).
 */
#define PPOK_KL_TOTAL_VARIATION 5

/**
 * Values a row that ppok_kl_full_forward_* leaves.
 */
#define PPOK_KL_FULL_STATS 7

/**
 * sum m L / sum m: every token counts the same.
 */
#define PPOK_PPO_LOSS_TOKEN_MEAN 0

/**
 * The mean over rows of sum_t m L. The denominator is the number of rows with an unmasked token.
 */
#define PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM 1

/**
 * The mean over rows of the row's mean.
 */
#define PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_MEAN 2

/**
 * sum m L / seq_len, not divided by the batch (verl's seq-mean-token-sum-norm).
 */
#define PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM 3

/**
 * sum m L / aggregation_divisor (Dr. GRPO).
 */
#define PPOK_PPO_LOSS_CONSTANT 4

/**
 * sum m L / batch (TRL's luspo).
 */
#define PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_SUM 5

/**
 * The mean of the rows' means over all rows, those without an unmasked token too (TRL's grpo).
 */
#define PPOK_PPO_LOSS_BATCH_MEAN_TOKEN_MEAN 6

/**
 * sum m L / (rows with an unmasked token times seq_len) (verl's seq-mean-token-sum-norm from 0.9 on).
 */
#define PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM_ROWS 7

/**
 * max(-r A, -clip(r, 1 - low, 1 + high) A), with dual clip and ratio cap (PPO, DAPO, GRPO, GSPO).
 */
#define PPOK_SURROGATE_CLIP 0

/**
 * -r A of a row's ratio, made of log-ratios that are clipped by the sign of A (GMPO).
 */
#define PPOK_SURROGATE_LOG_CLIP 1

/**
 * -A logp (REINFORCE, GPG, DRO).
 */
#define PPOK_SURROGATE_REINFORCE 2

/**
 * -clip(r, 1 - low, 1 + high) A logp, the clipped ratio a constant (CISPO, DPPO).
 */
#define PPOK_SURROGATE_CLIPPED_WEIGHT 3

/**
 * -w A logp with the constant w = exp(lambda) r^k exp(-lambda r) (VESPO).
 */
#define PPOK_SURROGATE_GAMMA_WEIGHT 4

/**
 * -(4 / tau) sigmoid(tau (r - 1)) A (SAPO).
 */
#define PPOK_SURROGATE_SOFT_GATE 5

/**
 * A ratio a token.
 */
#define PPOK_RATIO_TOKEN 0

/**
 * A ratio a row: exp of the mean of its log-ratios (GSPO).
 */
#define PPOK_RATIO_SEQUENCE_MEAN 1

/**
 * A ratio a row: exp of the sum of its log-ratios (RLOO, VESPO).
 */
#define PPOK_RATIO_SEQUENCE_SUM 2

/**
 * The gradient of a row's ratio goes through the mean or the sum, the same to every token.
 */
#define PPOK_RATIO_GRADIENT_SPREAD 0

/**
 * Each token gets that of its own term (GSPO-token).
 */
#define PPOK_RATIO_GRADIENT_OWN_TOKEN 1

/**
 * All tokens have a policy term.
 */
#define PPOK_TRUST_REGION_NONE 0

/**
 * Tokens with p - p_old within the bounds (DPPO-TV).
 */
#define PPOK_TRUST_REGION_TOTAL_VARIATION 1

/**
 * Tokens with the KL of (p_old, 1 - p_old) from (p, 1 - p) within the bounds (DPPO-KL).
 */
#define PPOK_TRUST_REGION_BINARY_KL 2

/**
 * Tokens with r of the token within 1 - low and 1 + high (IcePop).
 */
#define PPOK_TRUST_REGION_RATIO 3

/**
 * The upper bound holds where A > 0, else the lower one.
 */
#define PPOK_TRUST_REGION_SIDES_BY_ADVANTAGE 0

/**
 * Both bounds hold.
 */
#define PPOK_TRUST_REGION_SIDES_BOTH 1

/**
 * The KL term is against `ref_logp`.
 */
#define PPOK_KL_AGAINST_REFERENCE 0

/**
 * Against `old_logp` (DRO).
 */
#define PPOK_KL_AGAINST_OLD 1

/**
 * Against `rollout_logp`.
 */
#define PPOK_KL_AGAINST_ROLLOUT 2

/**
 * The KL term has its estimator's gradient.
 */
#define PPOK_KL_GRADIENT_OWN 0

/**
 * Its gradient is the log-ratio, which no clamp stops.
 */
#define PPOK_KL_GRADIENT_REVERSE 1

/**
 * The ratio is no factor of the KL term.
 */
#define PPOK_KL_RATIO_NONE 0

/**
 * The token's ratio is a factor of its gradient (OpenRLHF).
 */
#define PPOK_KL_RATIO_GRADIENT 1

/**
 * It is a factor of value and gradient (TRL's use_bias_correction_kl).
 */
#define PPOK_KL_RATIO_TERM 2

/**
 * The clip fraction counts tokens whose clipped branch is the larger one (TRL, verl).
 */
#define PPOK_PPO_LOSS_CLIPPED_BRANCH 0

/**
 * It counts tokens whose ratio is outside of the bounds (CleanRL).
 */
#define PPOK_PPO_LOSS_RATIO_OUTSIDE 1

/**
 * -(1 - e) ls(h) - e ls(-h): DPO, with label smoothing e cDPO.
 */
#define PPOK_PREFERENCE_SIGMOID 0

/**
 * (-(1 - e) ls(h) + e ls(-h)) / (1 - 2 e).
 */
#define PPOK_PREFERENCE_ROBUST 1

/**
 * max(0, 1 - h).
 */
#define PPOK_PREFERENCE_HINGE 2

/**
 * (x - y - 1 / (2 beta))^2. TRL averages x and y.
 */
#define PPOK_PREFERENCE_IPO 3

/**
 * `PPOK_PREFERENCE_SIGMOID`, always averaged.
 */
#define PPOK_PREFERENCE_SIGMOID_NORM 4

/**
 * KL of (s(h), s(-h)) to (1 - e, e), e above 0.
 */
#define PPOK_PREFERENCE_EXO_PAIR 5

/**
 * -ls(a) - (ls(-a) + ls(-b)) / 2.
 */
#define PPOK_PREFERENCE_NCA_PAIR 6

/**
 * -ls(a) - ls(-b).
 */
#define PPOK_PREFERENCE_BCO_PAIR 7

/**
 * (x - 1 / (2 beta))^2 + (y + 1 / (2 beta))^2.
 */
#define PPOK_PREFERENCE_SPPO_HARD 8

/**
 * 1 - s(a) + s(b).
 */
#define PPOK_PREFERENCE_APO_ZERO 9

/**
 * s(a) + 1 - s(h).
 */
#define PPOK_PREFERENCE_APO_DOWN 10

/**
 * -ls(h) (1 - g) + exp(-h) g, g = s(h / discopop_tau).
 */
#define PPOK_PREFERENCE_DISCOPOP 11

/**
 * `PPOK_PREFERENCE_SIGMOID` of the sorted log-ratios of policy and reference.
 */
#define PPOK_PREFERENCE_AOT 12

/**
 * `PPOK_PREFERENCE_SIGMOID` of the sorted x and the sorted y.
 */
#define PPOK_PREFERENCE_AOT_UNPAIRED 13

/**
 * `PPOK_PREFERENCE_SIGMOID` without a reference, always averaged, with margin `gamma`.
 */
#define PPOK_PREFERENCE_SIMPO 14

/**
 * `PPOK_PREFERENCE_SIGMOID` without a reference.
 */
#define PPOK_PREFERENCE_CPO 15

/**
 * -beta ls(o(x) - o(y)), o(t) = t - ln(1 - exp(t)), without a reference, always averaged.
 */
#define PPOK_PREFERENCE_ORPO 16

/**
 * `PPOK_PREFERENCE_SIMPO` of (1 - exp(-alpha t)) / alpha.
 */
#define PPOK_PREFERENCE_ALPHAPO 17

/**
 * w_d (1 - s(beta (x - kl))) where desirable, w_u (1 - s(beta (kl - x))) elsewhere.
 */
#define PPOK_PREFERENCE_KTO 18

/**
 * The log-ratio x itself.
 */
#define PPOK_F_DIVERGENCE_REVERSE_KL 0

/**
 * 1 - exp(-x) in its place.
 */
#define PPOK_F_DIVERGENCE_FORWARD_KL 1

/**
 * ln 2 + ls(x).
 */
#define PPOK_F_DIVERGENCE_JENSEN_SHANNON 2

/**
 * (exp((f_alpha - 1) x) - 1) / (f_alpha - 1).
 */
#define PPOK_F_DIVERGENCE_ALPHA 3

/**
 * `eps` is added to the variance (TRL, verl, NeMo, OpenRLHF, lm-human-preferences).
 */
#define PPOK_WHITEN_EPS_IN_VARIANCE 0

/**
 * `eps` is added to the standard deviation (CleanRL).
 */
#define PPOK_WHITEN_EPS_IN_STD 1

/**
 * A rule by which tokens or rows are rejected.
 */
typedef struct Rejection Rejection;

/**
 * Options of ppok_advantages_*; the defaults are TRL's GRPO. Estimators by their baseline and scale: Dr. GRPO
 * GROUP and NONE; RLOO LEAVE_ONE_OUT and NONE; OPO LENGTH_WEIGHTED and NONE; pass@k RUNNER_UP and GROUP;
 * MaxRL GROUP and MEAN with an eps of 1e-6; GPG GROUP and NONZERO with an eps of 0; ReMax NONE and NONE with
 * `score_baselines`; REINFORCE++-baseline GROUP, NONE and SINGLETON_KEEP, then ppok_whiten_* of token_advantages.
 */
typedef struct ppok_advantages_options {
    size_t struct_size;
    /**
     * Added to the scale; finite, 0 or above; 1e-4 by default.
     */
    double eps;
    /**
     * The least that scores are clipped to; -INFINITY by default.
     */
    double score_min;
    /**
     * The most that scores are clipped to; not below `score_min`; INFINITY by default.
     */
    double score_max;
    /**
     * What is subtracted: `PPOK_ADVANTAGES_BASELINE_GROUP`, the default, or one of the others.
     */
    int32_t baseline;
    /**
     * What is divided by: `PPOK_ADVANTAGES_SCALE_GROUP`, the default, or one of the others. One that is 0, or
     * of too few scores to have it, divides nothing.
     */
    int32_t scale;
    /**
     * What a group of one gets where the baseline is of the group: `PPOK_ADVANTAGES_SINGLETON_ZERO`, the
     * default, or `PPOK_ADVANTAGES_SINGLETON_KEEP`.
     */
    int32_t singleton;
    /**
     * What of a standard deviation `eps` is added to: `PPOK_WHITEN_EPS_IN_STD`, the default, or
     * `PPOK_WHITEN_EPS_IN_VARIANCE`.
     */
    int32_t eps_placement;
    /**
     * 1, the default: sums of squares are divided by n - 1; 0: by n.
     */
    int32_t unbiased;
    int32_t reserved;
} ppok_advantages_options;

/**
 * Statistics of a batch's scores, after clip and `score_baselines`. NaN stands for what is not
 * defined: there are too few scores, or no groups.
 */
typedef struct ppok_advantages_stats {
    /**
     * Mean of the scores that are not NaN.
     */
    double score_mean;
    /**
     * Their standard deviation, unbiased or not by the option.
     */
    double score_std;
    /**
     * Share of groups without two different scores, from which nothing is learnt; groups without any score
     * do not count.
     */
    double zero_std_fraction;
} ppok_advantages_stats;


/**
 * Arguments of ppok_advantages_*.
 */
typedef struct ppok_advantages_args {
    size_t struct_size;
    /**
     * Rows: sequences.
     */
    size_t batch;
    /**
     * Tokens of a row, or with `offsets` of all rows, where `mask` or `token_advantages` is given.
     */
    size_t seq_len;
    /**
     * Rows of a group where those stand after each other; it divides `batch`. 0 where `groups` is given,
     * or nothing is asked of groups.
     */
    size_t group_size;
    /**
     * Scores of the sequences, `[batch]`. Those that are NaN are left out, and their rows get 0.
     */
    const float *scores;
    /**
     * Ids of any values in any order, `[batch]`: rows of equal ids are a group. May be null.
     */
    const int64_t *groups;
    /**
     * Lengths of the sequences, `[batch]`: the weights of the length-weighted mean; else it may be null.
     */
    const float *lengths;
    /**
     * Subtracted from the clipped scores before all else, `[batch]`; null stands for zeros.
     */
    const float *score_baselines;
    /**
     * `[batch, seq_len]`, or with `offsets` `[seq_len]`; null if nothing is masked. Looked at for
     * `token_advantages` only.
     */
    const uint8_t *mask;
    /**
     * Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
     * `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
     * `seq_len` tokens.
     */
    const int64_t *offsets;
    const struct ppok_advantages_options *options;
    /**
     * Advantages of the rows, `[batch]`; written.
     */
    float *advantages;
    /**
     * The row's advantage on each of its tokens, 0 where masked, `[batch, seq_len]`, or with `offsets`
     * `[seq_len]`; written; null if not wanted.
     */
    float *token_advantages;
    /**
     * Statistics of the scores, one, written; null if not wanted.
     */
    struct ppok_advantages_stats *stats;
} ppok_advantages_args;

/**
 * Options of ppok_correction_*.
 */
typedef struct ppok_correction_options {
    size_t struct_size;
    /**
     * Clamps d, its sum or its mean to plus or minus this; above 0, or `PPOK_NONE`. 20 by default.
     */
    double log_ratio_clamp;
    /**
     * The lower bound of the weight; 0 or above, or `PPOK_NONE`, which is the default.
     */
    double low;
    /**
     * The upper bound of the weight; 0 or above, or `PPOK_NONE`. 2 by default.
     */
    double high;
    /**
     * The lower bound of what is kept; 0 or above, or `PPOK_NONE`, which is the default, as in the next three.
     */
    double rejection_low;
    /**
     * The upper bound of what is kept; 0 or above, or `PPOK_NONE`.
     */
    double rejection_high;
    /**
     * The lower bound of the second rejection, or `PPOK_NONE`.
     */
    double second_rejection_low;
    /**
     * The upper bound of the second rejection, or `PPOK_NONE`.
     */
    double second_rejection_high;
    /**
     * `PPOK_CORRECTION_LEVEL_TOKEN`, the default, to `PPOK_CORRECTION_LEVEL_NONE`.
     */
    int32_t level;
    /**
     * `PPOK_CORRECTION_OUTSIDE_TRUNCATE`, the default, or `PPOK_CORRECTION_OUTSIDE_ZERO`.
     */
    int32_t outside;
    /**
     * Whether all weights are divided by the mean of those before rejections, over tokens, or of a row's
     * weights over rows; 0 by default, or 1.
     */
    int32_t normalise;
    /**
     * `PPOK_REJECTION_METRIC_NONE`, the default, to `PPOK_REJECTION_METRIC_TOTAL_VARIATION`.
     */
    int32_t rejection_metric;
    /**
     * `PPOK_REJECTION_LEVEL_TOKEN`, the default, to `PPOK_REJECTION_LEVEL_SEQUENCE_MAX`.
     */
    int32_t rejection_level;
    /**
     * `PPOK_REJECTION_METRIC_NONE`, the default, to `PPOK_REJECTION_METRIC_TOTAL_VARIATION`: what either
     * of the two rejects is.
     */
    int32_t second_rejection_metric;
    /**
     * `PPOK_REJECTION_LEVEL_TOKEN`, the default, to `PPOK_REJECTION_LEVEL_SEQUENCE_MAX`.
     */
    int32_t second_rejection_level;
    int32_t reserved;
} ppok_correction_options;

/**
 * How the two engines differ, and what the weights are: sums that ranks can add, extremes that they can
 * compare, and the effective sample size, see [`CorrectionStats::merge`].
 *
 * Sums are over `tokens`, the unmasked tokens of which the rollout engine gave a log-probability, and `rows`
 * that have such a token. Divided by those they are means: -`log_ratio_sum` / `tokens` is the first and
 * `k3_sum` / `tokens` the third estimate of KL(rollout ‖ trainer), `ratio_square_sum` / `tokens` - 1 the
 * χ² divergence, `mult_prob_error_sum` / `tokens` NeMo-RL's `token_mult_prob_error`. Nothing is NaN because
 * there is no token.
 */
typedef struct ppok_correction_stats {
    /**
     * Unmasked tokens with a log-probability of the rollout.
     */
    double tokens;
    /**
     * Unmasked tokens without, where it is NaN.
     */
    double unscored_tokens;
    /**
     * Tokens of weight 0.
     */
    double rejected_tokens;
    /**
     * Tokens whose w is below the lower bound of the weight.
     */
    double below_tokens;
    /**
     * Tokens whose w is above the upper bound of the weight.
     */
    double above_tokens;
    /**
     * Rows with a token.
     */
    double rows;
    /**
     * Rows with a token of weight 0.
     */
    double rejected_rows;
    /**
     * Sum of the weights.
     */
    double weight_sum;
    /**
     * Sum of their squares.
     */
    double weight_square_sum;
    /**
     * Sum of d, clamped as are the next.
     */
    double log_ratio_sum;
    /**
     * Sum of |d|.
     */
    double log_ratio_abs_sum;
    /**
     * Sum of e^d - 1 - d.
     */
    double k3_sum;
    /**
     * Sum of e^2d.
     */
    double ratio_square_sum;
    /**
     * Sum of e^|d|.
     */
    double mult_prob_error_sum;
    /**
     * Sum over rows of the square of their ratio, the product of e^d.
     */
    double row_ratio_square_sum;
    /**
     * Sum over rows of the mean of -old_logp: of logarithms of the trainer's perplexity.
     */
    double log_ppl_sum;
    /**
     * Sum over rows of the mean of -rollout_logp.
     */
    double rollout_log_ppl_sum;
    /**
     * Largest |d|; 0 of no token, as the next two.
     */
    double log_ratio_abs_max;
    /**
     * Largest e^d - 1 - d.
     */
    double k3_max;
    /**
     * Largest weight.
     */
    double weight_max;
    /**
     * Smallest weight; infinity of no token.
     */
    double weight_min;
    /**
     * Effective sample size as a share of the tokens, (Σ w)² / (tokens Σ w²); 0 where all weights are 0.
     */
    double ess;
} ppok_correction_stats;


/**
 * Arguments of ppok_correction_*.
 */
typedef struct ppok_correction_args {
    size_t struct_size;
    /**
     * Rows.
     */
    size_t batch;
    /**
     * Tokens of a row; with `offsets`, of all rows.
     */
    size_t seq_len;
    /**
     * Log-probabilities as the trainer computes them before the update, `[batch, seq_len]`, or with `offsets`
     * `[seq_len]`, as are all of that shape.
     */
    const float *old_logp;
    /**
     * Log-probabilities as the rollout engine computed them, `[batch, seq_len]`; NaN where it could not.
     */
    const float *rollout_logp;
    /**
     * `[batch, seq_len]`; null if nothing is masked.
     */
    const uint8_t *mask;
    /**
     * Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
     * `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
     * `seq_len` tokens.
     */
    const int64_t *offsets;
    const struct ppok_correction_options *options;
    /**
     * Weights for ppok_ppo_loss_*, `[batch, seq_len]`, written; 0 where masked or rejected.
     */
    float *weights;
    /**
     * The statistics, one, written.
     */
    struct ppok_correction_stats *stats;
    /**
     * 1 where unmasked and not rejected, else 0, `[batch, seq_len]`, written; null if not wanted.
     */
    uint8_t *kept;
} ppok_correction_args;

/**
 * Options of ppok_gae_*.
 */
typedef struct ppok_gae_options {
    size_t struct_size;
    /**
     * Discount, in 0..1; 1 by default.
     */
    double gamma;
    /**
     * Lambda of the advantages, in 0..1; 0.95 by default.
     */
    double lambda;
    /**
     * Lambda of the advantages that the returns are made of, if it is another; `PPOK_NONE` by default.
     */
    double value_lambda;
    /**
     * Weight of the KL penalty, 0 or above; 0.05 by default. At 0 `kl` is not looked at.
     */
    double kl_coef;
    /**
     * Subtracted from the scores where `score_std` is given; 0 by default.
     */
    double score_mean;
    /**
     * The scores are divided by it; above 0, or `PPOK_NONE`, which is the default: not scaled.
     */
    double score_std;
    /**
     * The least that scores are clipped to; -INFINITY by default.
     */
    double score_min;
    /**
     * The most that scores are clipped to; not below `score_min`; INFINITY by default.
     */
    double score_max;
    /**
     * The number that `missing_eos` subtracts or puts in place; 0 by default.
     */
    double missing_eos_value;
    /**
     * `PPOK_GAE_MASK_CARRY`, the default, or `PPOK_GAE_MASK_MULTIPLY`.
     */
    int32_t mask_mode;
    /**
     * `PPOK_GAE_SCORE_AT_LAST`, the default, or `PPOK_GAE_SCORE_AFTER_LAST`.
     */
    int32_t score_placement;
    /**
     * `PPOK_GAE_SCALE_THEN_CLIP`, the default, or `PPOK_GAE_CLIP_THEN_SCALE`.
     */
    int32_t score_order;
    /**
     * `PPOK_GAE_MISSING_EOS_KEEP`, the default, or one of the others, which need `scores` and
     * `has_eos`.
     */
    int32_t missing_eos;
} ppok_gae_options;

/**
 * Count, mean and sum of squared deviations of a set of numbers; sets can be merged.
 */
typedef struct ppok_moments {
    /**
     * How many numbers: a whole number, exact up to 2^53.
     */
    double count;
    /**
     * Their mean; 0 for none.
     */
    double mean;
    /**
     * The sum of (x - mean)^2.
     */
    double m2;
} ppok_moments;

/**
 * Arguments of ppok_gae_*.
 */
typedef struct ppok_gae_args {
    size_t struct_size;
    /**
     * Rows.
     */
    size_t batch;
    /**
     * Tokens of a row; with `offsets`, of all rows.
     */
    size_t seq_len;
    /**
     * Values V, `[batch, seq_len]`, or with `offsets` `[seq_len]`, as are all of that shape.
     */
    const float *values;
    /**
     * Dense rewards, `[batch, seq_len]`; null stands for zeros.
     */
    const float *rewards;
    /**
     * KL to the reference model for each token, `[batch, seq_len]`; null stands for zeros.
     */
    const float *kl;
    /**
     * Scores of the sequences, `[batch]`; null stands for zeros.
     */
    const float *scores;
    /**
     * Not 0 where the sequence ended by itself, `[batch]`; null if all did.
     */
    const uint8_t *has_eos;
    /**
     * `[batch, seq_len]`; null if nothing is masked. Padding left and right, and gaps.
     */
    const uint8_t *mask;
    /**
     * Not 0 where an episode ended with step t, `[batch, seq_len]`; null if none did.
     */
    const uint8_t *dones;
    /**
     * Value of the state after the last unmasked token, `[batch]`; null stands for zeros.
     */
    const float *bootstrap;
    /**
     * Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
     * `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
     * `seq_len` tokens.
     */
    const int64_t *offsets;
    /**
     * Lambda of the advantages of each row, `[batch]`, in 0..1; null if it is that of the options.
     */
    const float *lambda_per_row;
    const struct ppok_gae_options *options;
    /**
     * Advantages, not whitened, `[batch, seq_len]`; written, and 0 where masked, as are the next two.
     */
    float *advantages;
    /**
     * Returns, the targets of the value function, `[batch, seq_len]`.
     */
    float *returns;
    /**
     * The rewards after shaping, `[batch, seq_len]`; null if not wanted.
     */
    float *shaped_rewards;
    /**
     * Moments of the unmasked advantages, one, written, for ppok_whiten_forward_*; null if not wanted.
     */
    struct ppok_moments *moments;
} ppok_gae_args;

/**
 * Options of ppok_kl_full_*.
 */
typedef struct ppok_kl_full_options {
    size_t struct_size;
    /**
     * Divides both logits; 1e-30 to 1e30, 1 by default.
     */
    double temperature;
    /**
     * The weight of the reference in the mixture of `PPOK_KL_JSD`; above 0 and below 1, 0.5 by default.
     */
    double beta;
    /**
     * The skew of the skewed KLs; above 0 and below 1, 0.1 by default (DistiLLM).
     */
    double skew;
    /**
     * `PPOK_KL_FORWARD`, the default, to `PPOK_KL_TOTAL_VARIATION`.
     */
    int32_t divergence;
    int32_t reserved;
} ppok_kl_full_options;

/**
 * Arguments of ppok_kl_full_backward_*.
 */
typedef struct ppok_kl_full_backward_args {
    size_t struct_size;
    /**
     * As in the forward pass, and so are the next six.
     */
    size_t rows;
    size_t vocab;
    int32_t logits_type;
    int32_t reserved;
    const void *logits;
    const void *ref_logits;
    const uint8_t *mask;
    /**
     * `[PPOK_KL_FULL_STATS, rows]`, as the forward pass wrote them.
     */
    const float *stats;
    /**
     * Upstream gradient, `[rows]`. A row where it is 0 is not read, and gets gradient 0.
     */
    const float *grad_kl;
    const struct ppok_kl_full_options *options;
    /**
     * Gradient of `logits`, `[rows, vocab]` of `logits_type`, written; null if not wanted. For CUDA it
     * may be `logits`.
     */
    void *grad_logits;
    /**
     * Gradient of `ref_logits`, likewise. For CUDA it may be `ref_logits`.
     */
    void *grad_ref_logits;
} ppok_kl_full_backward_args;

/**
 * Arguments of ppok_kl_full_forward_*.
 */
typedef struct ppok_kl_full_forward_args {
    size_t struct_size;
    /**
     * Rows of logits, one a token.
     */
    size_t rows;
    /**
     * Logits of a row; above 0, and for CUDA below 2^32.
     */
    size_t vocab;
    /**
     * `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
     */
    int32_t logits_type;
    int32_t reserved;
    /**
     * Logits of the policy, `[rows, vocab]` of `logits_type`.
     */
    const void *logits;
    /**
     * Logits of the reference, `[rows, vocab]` of `logits_type`.
     */
    const void *ref_logits;
    /**
     * `[rows]`; null if all count. Rows that are left out are not read, and give 0.
     */
    const uint8_t *mask;
    const struct ppok_kl_full_options *options;
    /**
     * `[PPOK_KL_FULL_STATS, rows]`, written: the first `rows` values are the KL, and the rest is what the
     * backward pass needs.
     */
    float *stats;
} ppok_kl_full_forward_args;

/**
 * Options of ppok_kl_token_*.
 */
typedef struct ppok_kl_token_options {
    size_t struct_size;
    /**
     * Clamps d to plus or minus this before the estimator sees it; above 0, or `PPOK_NONE`, which is
     * the default. 20 in verl and NeMo-RL.
     */
    double log_ratio_clamp;
    /**
     * Clamps the estimate likewise; above 0, or `PPOK_NONE`, which is the default. 10 in verl, OpenRLHF
     * and NeMo-RL.
     */
    double output_clamp;
    /**
     * `PPOK_KL_K1`, the default, to `PPOK_KL_K3_STRAIGHT_THROUGH`.
     */
    int32_t estimator;
    int32_t reserved;
} ppok_kl_token_options;

/**
 * Arguments of ppok_kl_token_backward_*.
 */
typedef struct ppok_kl_token_backward_args {
    size_t struct_size;
    /**
     * As in the forward pass, and so are the next three.
     */
    size_t tokens;
    const float *logp;
    const float *ref_logp;
    const uint8_t *mask;
    /**
     * Upstream gradient, `[tokens]`. Where it is 0, so are the gradients.
     */
    const float *grad_kl;
    const struct ppok_kl_token_options *options;
    /**
     * Gradient of `logp`, `[tokens]`, written; null if not wanted. For CUDA it may be `logp`, `ref_logp`
     * or `grad_kl`, and so may the next one.
     */
    float *grad_logp;
    /**
     * Gradient of `ref_logp`, `[tokens]`, written; null if not wanted.
     */
    float *grad_ref_logp;
} ppok_kl_token_backward_args;

/**
 * Arguments of ppok_kl_token_forward_*.
 */
typedef struct ppok_kl_token_forward_args {
    size_t struct_size;
    /**
     * Tokens, of any number of sequences.
     */
    size_t tokens;
    /**
     * Log-probabilities under the policy, `[tokens]`.
     */
    const float *logp;
    /**
     * Log-probabilities under the reference, `[tokens]`.
     */
    const float *ref_logp;
    /**
     * `[tokens]`; null if all count. What is left out gives 0.
     */
    const uint8_t *mask;
    const struct ppok_kl_token_options *options;
    /**
     * The estimate, `[tokens]`, written. For CUDA it may be `logp` or `ref_logp`.
     */
    float *kl;
} ppok_kl_token_forward_args;

/**
 * Options of ppok_logprob_forward_* and ppok_logprob_backward_*.
 */
typedef struct ppok_logprob_options {
    size_t struct_size;
    /**
     * The logits are divided by it; 1e-30 to 1e30, 1 by default. The temperature that the tokens were
     * sampled at.
     */
    double temperature;
    /**
     * Rows with this target are skipped, if `has_ignore_index`. PyTorch's custom is -100.
     */
    int64_t ignore_index;
    /**
     * 1 or 0, which is the default.
     */
    int32_t has_ignore_index;
    int32_t reserved;
} ppok_logprob_options;

/**
 * Options of ppok_ppo_loss_*.
 */
typedef struct ppok_ppo_loss_options {
    size_t struct_size;
    /**
     * The ratio is clipped from below at 1 - this, and from above at 1 + this unless
     * `clip_range_high` is given; 0 or above, infinity for no clip, 0.2 by default. Of
     * `PPOK_SURROGATE_LOG_CLIP` the bounds of the log-ratio.
     */
    double clip_range;
    /**
     * The ratio is clipped from above at 1 + this; 0 or above, or `PPOK_NONE`, which is the default. Of
     * `PPOK_SURROGATE_CLIPPED_WEIGHT` it may be below 0.
     */
    double clip_range_high;
    /**
     * Bounds the policy term at -c A where A < 0; above 1 (3 in verl), or `PPOK_NONE`, which is the
     * default.
     */
    double dual_clip;
    /**
     * Clamps the log-ratio to plus or minus this; above 0, or `PPOK_NONE`. 20 by default.
     */
    double log_ratio_clamp;
    /**
     * Clips the values to the old values plus or minus this; 0 or above, or `PPOK_NONE`, which is
     * needed without `old_values`. 0.2 by default.
     */
    double value_clip_range;
    /**
     * Factor of the value term; 0.1 by default.
     */
    double value_coef;
    /**
     * Factor of the entropy, subtracted; 0 by default.
     */
    double entropy_coef;
    /**
     * Factor of the KL term; 0 by default.
     */
    double kl_coef;
    /**
     * The clamp of the log-ratio, as in `ppok_kl_token_options`; above 0, or `PPOK_NONE`. 20 by default.
     */
    double kl_log_ratio_clamp;
    /**
     * The clamp of the estimate, as in `ppok_kl_token_options`; `PPOK_NONE` by default.
     */
    double kl_output_clamp;
    /**
     * The divisor of `PPOK_PPO_LOSS_CONSTANT`, above 0; not looked at with others.
     */
    double aggregation_divisor;
    /**
     * Replaces the denominator of the aggregation, above 0, for gradient accumulation and data
     * parallelism; not with `PPOK_PPO_LOSS_CONSTANT`. `PPOK_NONE` by default.
     */
    double denominator;
    /**
     * Bounds the ratio from above in the unclipped branch of `PPOK_SURROGATE_CLIP` (TRL's delta); above
     * 0, or `PPOK_NONE`, which is the default.
     */
    double ratio_cap;
    /**
     * tau of `PPOK_SURROGATE_SOFT_GATE` where A > 0; above 0, 1 by default.
     */
    double soft_gate_tau_pos;
    /**
     * tau of `PPOK_SURROGATE_SOFT_GATE` elsewhere; above 0, 1.05 by default.
     */
    double soft_gate_tau_neg;
    /**
     * k of `PPOK_SURROGATE_GAMMA_WEIGHT` where A >= 0; 0 or above, 2 by default.
     */
    double gamma_k_pos;
    /**
     * lambda of `PPOK_SURROGATE_GAMMA_WEIGHT` where A >= 0; 0 or above, 3 by default.
     */
    double gamma_lambda_pos;
    /**
     * k of `PPOK_SURROGATE_GAMMA_WEIGHT` where A < 0; 0 or above, 3 by default.
     */
    double gamma_k_neg;
    /**
     * lambda of `PPOK_SURROGATE_GAMMA_WEIGHT` where A < 0; 0 or above, 2 by default.
     */
    double gamma_lambda_neg;
    /**
     * The lower bound of the trust region; 0 or above, 0.2 by default.
     */
    double trust_region_low;
    /**
     * The upper bound of the trust region; 0 or above, 0.2 by default.
     */
    double trust_region_high;
    /**
     * Drops the policy term of tokens with A < 0 in rows whose mean of rollout_logp - logp is above this;
     * without `rollout_logp` `old_logp` is taken. `PPOK_NONE` by default.
     */
    double off_policy_threshold;
    /**
     * Bounds the ratio as a factor of the KL term from above; above 0, or `PPOK_NONE`, which is the
     * default.
     */
    double kl_ratio_cap;
    /**
     * `PPOK_PPO_LOSS_TOKEN_MEAN`, the default, to `PPOK_PPO_LOSS_SEQ_MEAN_TOKEN_SUM_NORM_ROWS`.
     */
    int32_t aggregation;
    /**
     * `PPOK_PPO_LOSS_CLIPPED_BRANCH`, the default, or `PPOK_PPO_LOSS_RATIO_OUTSIDE`.
     */
    int32_t clip_fraction;
    /**
     * `PPOK_KL_K3`, the default, or another of `PPOK_KL_K1` to `PPOK_KL_K3_STRAIGHT_THROUGH`.
     */
    int32_t kl_estimator;
    /**
     * `PPOK_SURROGATE_CLIP`, the default, to `PPOK_SURROGATE_SOFT_GATE`.
     */
    int32_t surrogate;
    /**
     * `PPOK_RATIO_TOKEN`, the default, `PPOK_RATIO_SEQUENCE_MEAN` or `PPOK_RATIO_SEQUENCE_SUM`.
     */
    int32_t ratio;
    /**
     * `PPOK_RATIO_GRADIENT_SPREAD`, the default, or `PPOK_RATIO_GRADIENT_OWN_TOKEN`.
     */
    int32_t ratio_gradient;
    /**
     * `PPOK_TRUST_REGION_NONE`, the default, to `PPOK_TRUST_REGION_RATIO`.
     */
    int32_t trust_region;
    /**
     * `PPOK_TRUST_REGION_SIDES_BY_ADVANTAGE`, the default, or `PPOK_TRUST_REGION_SIDES_BOTH`.
     */
    int32_t trust_region_sides;
    /**
     * `PPOK_KL_AGAINST_REFERENCE`, the default, to `PPOK_KL_AGAINST_ROLLOUT`.
     */
    int32_t kl_against;
    /**
     * `PPOK_KL_GRADIENT_OWN`, the default, or `PPOK_KL_GRADIENT_REVERSE`.
     */
    int32_t kl_gradient;
    /**
     * `PPOK_KL_RATIO_NONE`, the default, to `PPOK_KL_RATIO_TERM`.
     */
    int32_t kl_ratio;
    /**
     * Whether `weights` are a factor of the KL term too (DRO); 0 by default, or 1.
     */
    int32_t kl_weighted;
    /**
     * Whether the entropy bonus is the mean over the unmasked tokens, whatever `aggregation` and `denominator`
     * are; 0 by default, or 1, and so are the next three.
     */
    int32_t entropy_own_mean;
    /**
     * Whether `advantages` are `[batch]`, one for all tokens of a row.
     */
    int32_t advantages_per_row;
    /**
     * Whether `weights` are `[batch]`, one for all tokens of a row.
     */
    int32_t weights_per_row;
    /**
     * Whether the statistics have the extremes over rows of the clip fractions, which takes another look at
     * the tokens.
     */
    int32_t row_extremes;
} ppok_ppo_loss_options;

/**
 * The loss and what else the pass over the tokens found.
 *
 * Means, fractions and variances are over the unmasked tokens, each counting the same, whatever
 * the aggregation; those of weight 0, and those that an option takes away, count too. NaN stands for
 * what is not defined: the input was not given, or there is no unmasked token. The ratio is that of the
 * loss, and d = logp - old_logp the token's, both after the clamp.
 */
typedef struct ppok_ppo_loss_stats {
    /**
     * The total, as it is minimised.
     */
    double loss;
    /**
     * The aggregated policy term.
     */
    double policy_loss;
    /**
     * The aggregated value term, before `value_coef`.
     */
    double value_loss;
    /**
     * Share of tokens that are clipped, as the option `clip_fraction` counts them.
     */
    double clip_fraction;
    /**
     * Share of tokens bounded by the dual clip.
     */
    double lower_clip_fraction;
    /**
     * Share of tokens that are clipped, as above, and have A > 0.
     */
    double clip_high_fraction;
    /**
     * Share of tokens that are clipped, as above, and do not have A > 0.
     */
    double clip_low_fraction;
    /**
     * Largest share of a row's tokens that are clipped and have A > 0, over rows with an unmasked token;
     * NaN without `row_extremes`.
     */
    double clip_high_row_max;
    /**
     * Smallest share of a row's tokens that are clipped and do not have A > 0, likewise.
     */
    double clip_low_row_min;
    /**
     * Share of tokens outside the trust region.
     */
    double outside_fraction;
    /**
     * Share of tokens with A < 0 in rows that are too far off the policy.
     */
    double off_policy_fraction;
    /**
     * Share of tokens whose clipped value has the larger error.
     */
    double value_clip_fraction;
    /**
     * Mean of -d, the first estimate of KL(old || new).
     */
    double approx_kl_k1;
    /**
     * Mean of d^2 / 2.
     */
    double approx_kl_k2;
    /**
     * Mean of ratio - 1 - d.
     */
    double approx_kl_k3;
    /**
     * Mean of the ratio.
     */
    double ratio_mean;
    /**
     * Variance of the ratio, biased.
     */
    double ratio_var;
    /**
     * Smallest ratio.
     */
    double ratio_min;
    /**
     * Largest ratio.
     */
    double ratio_max;
    /**
     * Mean entropy.
     */
    double entropy_mean;
    /**
     * Mean of the KL estimate against the reference model.
     */
    double kl_mean;
    /**
     * Mean advantage.
     */
    double advantage_mean;
    /**
     * Mean return.
     */
    double return_mean;
    /**
     * Mean value.
     */
    double value_mean;
    /**
     * 1 - Var(returns - values) / Var(returns), with the values that are trained; NaN where the
     * returns do not vary.
     */
    double explained_variance;
    /**
     * Number of unmasked tokens.
     */
    double tokens;
} ppok_ppo_loss_stats;


/**
 * Arguments of ppok_logits_ppo_loss_*.
 */
typedef struct ppok_logits_ppo_loss_args {
    size_t struct_size;
    /**
     * Rows.
     */
    size_t batch;
    /**
     * Tokens of a row; with `offsets`, of all rows.
     */
    size_t seq_len;
    /**
     * Logits of a token; above 0, and for CUDA below 2^32.
     */
    size_t vocab;
    /**
     * `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
     */
    int32_t logits_type;
    /**
     * `PPOK_U32` or `PPOK_I64`.
     */
    int32_t targets_type;
    /**
     * Logits of the policy that is trained, which get the gradient, `[batch, seq_len, vocab]` of
     * `logits_type`.
     */
    const void *logits;
    /**
     * Ids of the tokens, `[batch, seq_len]` of `targets_type`; each in `0..vocab` or `ignore_index`,
     * but for masked ones.
     */
    const void *targets;
    /**
     * Log-probabilities under the policy that made the rollout, `[batch, seq_len]`.
     */
    const float *old_logp;
    /**
     * Advantages, already whitened if they are to be, `[batch, seq_len]`, or `[batch]` with
     * `advantages_per_row`.
     */
    const float *advantages;
    /**
     * Log-probabilities under the reference model, `[batch, seq_len]`; may be null where `kl_coef` is
     * 0.
     */
    const float *ref_logp;
    /**
     * Log-probabilities of the rollout as its engine computed them, `[batch, seq_len]`; may be null.
     */
    const float *rollout_logp;
    /**
     * Factors of the policy term, `[batch, seq_len]`, or `[batch]` with `weights_per_row`, 0 or above; null if
     * all are 1.
     */
    const float *weights;
    /**
     * `[batch, seq_len]`; null if nothing is masked.
     */
    const uint8_t *mask;
    /**
     * Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
     * `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
     * `seq_len` tokens.
     */
    const int64_t *offsets;
    const struct ppok_logprob_options *logprob_options;
    const struct ppok_ppo_loss_options *options;
    /**
     * Log-probabilities of the targets, `[batch, seq_len]`, written; 0 where masked.
     */
    float *logp;
    /**
     * The loss and the statistics, one, written.
     */
    struct ppok_ppo_loss_stats *stats;
    /**
     * Gradient with respect to `logits`, for an upstream gradient of 1, `[batch, seq_len, vocab]` of
     * `logits_type`, written; on CUDA it may be `logits`.
     */
    void *grad_logits;
    /**
     * Entropies, `[batch, seq_len]`, written, 0 where masked; may be null where `entropy_coef` is 0.
     */
    float *entropy;
    /**
     * The loss once more, one, written; null if not wanted.
     */
    float *loss;
} ppok_logits_ppo_loss_args;

/**
 * Arguments of ppok_logprob_backward_*.
 */
typedef struct ppok_logprob_backward_args {
    size_t struct_size;
    /**
     * Rows of logits, one a token.
     */
    size_t rows;
    /**
     * Columns of the whole vocabulary, above 0 and below 2^32. Logits of a row, unless there are
     * `columns`.
     */
    size_t vocab;
    /**
     * Logits of a row where they are a tile, and 0 where they are all.
     */
    size_t columns;
    /**
     * The id of the tile's first column; 0 where the logits are all.
     */
    size_t first_column;
    /**
     * `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
     */
    int32_t logits_type;
    /**
     * `PPOK_U32` or `PPOK_I64`.
     */
    int32_t targets_type;
    /**
     * Logits, `[rows, vocab]` or `[rows, columns]` of `logits_type`.
     */
    const void *logits;
    /**
     * Ids of the tokens, `[rows]` of `targets_type`.
     */
    const void *targets;
    /**
     * The row's largest logit, `[rows]`, as the forward pass wrote it, and so are the next two.
     */
    const float *max;
    /**
     * ln s, `[rows]`.
     */
    const float *log_sum;
    /**
     * Entropy of the row's distribution, `[rows]`; may be null if `grad_entropy` is.
     */
    const float *entropy;
    /**
     * Upstream gradient of the log-probabilities, `[rows]`; null stands for zeros.
     */
    const float *grad_logp;
    /**
     * Upstream gradient of the entropies, `[rows]`; null stands for zeros.
     */
    const float *grad_entropy;
    const struct ppok_logprob_options *options;
    /**
     * Gradient of the logits, of their shape and type, written; it may be `logits`.
     */
    void *grad_logits;
} ppok_logprob_backward_args;

/**
 * Arguments of ppok_logprob_finish_*.
 */
typedef struct ppok_logprob_finish_args {
    size_t struct_size;
    /**
     * Rows.
     */
    size_t rows;
    /**
     * Columns of the whole vocabulary, below 2^32.
     */
    size_t vocab;
    /**
     * `PPOK_U32` or `PPOK_I64`.
     */
    int32_t targets_type;
    int32_t reserved;
    /**
     * Ids of the tokens, `[rows]` of `targets_type`; each in `0..vocab` or `ignore_index`.
     */
    const void *targets;
    /**
     * The running sums over all columns, as ppok_logprob_partial_* or ppok_logprob_merge_* wrote them:
     * the largest logit, `[rows]`.
     */
    const float *max;
    /**
     * The sum, `[rows]`.
     */
    const float *rest;
    /**
     * The target's logit, `[rows]`.
     */
    const float *logit;
    /**
     * The weighted sum, `[rows]`; may be null if `entropy` is.
     */
    const float *weighted;
    const struct ppok_logprob_options *options;
    /**
     * Log-probability of the target, `[rows]`, written.
     */
    float *logp;
    /**
     * ln s, `[rows]`, written, for the backward pass.
     */
    float *log_sum;
    /**
     * Entropy of the row's distribution, `[rows]`, written; null if not wanted.
     */
    float *entropy;
} ppok_logprob_finish_args;

/**
 * Arguments of ppok_logprob_forward_*.
 */
typedef struct ppok_logprob_forward_args {
    size_t struct_size;
    /**
     * Rows of logits, one a token.
     */
    size_t rows;
    /**
     * Logits of a row; above 0, and for CUDA below 2^32.
     */
    size_t vocab;
    /**
     * `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
     */
    int32_t logits_type;
    /**
     * `PPOK_U32` or `PPOK_I64`.
     */
    int32_t targets_type;
    /**
     * Logits, `[rows, vocab]` of `logits_type`.
     */
    const void *logits;
    /**
     * Ids of the tokens, `[rows]` of `targets_type`; each in `0..vocab` or `ignore_index`.
     */
    const void *targets;
    const struct ppok_logprob_options *options;
    /**
     * Log-probability of the target, `[rows]`, written.
     */
    float *logp;
    /**
     * Entropy of the row's distribution, `[rows]`, written; null if not wanted.
     */
    float *entropy;
    /**
     * The row's largest logit, `[rows]`, written, for the backward pass; null if not wanted.
     */
    float *max;
    /**
     * ln s, `[rows]`, written, for the backward pass; null if `max` is.
     */
    float *log_sum;
} ppok_logprob_forward_args;

/**
 * Arguments of ppok_logprob_merge_*. Where one of the weighted sums is null, so is the other.
 */
typedef struct ppok_logprob_merge_args {
    size_t struct_size;
    /**
     * Rows.
     */
    size_t rows;
    /**
     * The running sums over other columns, as ppok_logprob_partial_* wrote them: the largest logit,
     * `[rows]`.
     */
    const float *other_max;
    /**
     * The sum, `[rows]`.
     */
    const float *other_rest;
    /**
     * The target's logit, `[rows]`.
     */
    const float *other_logit;
    /**
     * The weighted sum, `[rows]`; may be null.
     */
    const float *other_weighted;
    const struct ppok_logprob_options *options;
    /**
     * The running sums that they are added to: the largest logit, `[rows]`, read and written, and so
     * are the next three.
     */
    float *max;
    /**
     * The sum, `[rows]`.
     */
    float *rest;
    /**
     * The target's logit, `[rows]`.
     */
    float *logit;
    /**
     * The weighted sum, `[rows]`; may be null.
     */
    float *weighted;
} ppok_logprob_merge_args;

/**
 * Arguments of ppok_logprob_partial_*.
 */
typedef struct ppok_logprob_partial_args {
    size_t struct_size;
    /**
     * Rows of logits, one a token.
     */
    size_t rows;
    /**
     * Columns of the tile: logits of a row; above 0.
     */
    size_t columns;
    /**
     * The id of the tile's first column.
     */
    size_t first_column;
    /**
     * Columns of the whole vocabulary, at least `first_column + columns` and below 2^32.
     */
    size_t vocab;
    /**
     * `PPOK_F32`, `PPOK_F16` or `PPOK_BF16`.
     */
    int32_t logits_type;
    /**
     * `PPOK_U32` or `PPOK_I64`.
     */
    int32_t targets_type;
    /**
     * 1 if the sums begin with this tile, and what they hold is not looked at; 0 if they go on.
     */
    int32_t begins;
    int32_t reserved;
    /**
     * Logits of the tile, `[rows, columns]` of `logits_type`.
     */
    const void *logits;
    /**
     * Ids of the tokens, `[rows]` of `targets_type`; each in `0..vocab` or `ignore_index`.
     */
    const void *targets;
    const struct ppok_logprob_options *options;
    /**
     * The largest logit so far, `[rows]`, read and written, and so are the next three.
     */
    float *max;
    /**
     * Sum of exp((z - max) / T) over the columns so far but one that holds the maximum, `[rows]`.
     */
    float *rest;
    /**
     * The target's logit, `[rows]`; NaN while its column is not among those so far.
     */
    float *logit;
    /**
     * The sum of the exponentials weighted by (max - z) / T, `[rows]`; null if no entropy is wanted.
     */
    float *weighted;
} ppok_logprob_partial_args;

/**
 * Options of ppok_optimal_token_baseline_*; the defaults are verl's.
 */
typedef struct ppok_optimal_token_baseline_options {
    size_t struct_size;
    /**
     * Added to the sum of the weights; finite, 0 or above; 1e-8 by default.
     */
    double eps;
    /**
     * Which tokens of a group: `PPOK_TOKEN_STEP_COLUMN`, the default, or `PPOK_TOKEN_STEP_UNMASKED`.
     */
    int32_t step;
    /**
     * 1, the default: the one longest row of a group has no baseline from where the second longest ends,
     * where it would be compared with itself; 0: it has.
     */
    int32_t lone_tail;
} ppok_optimal_token_baseline_options;

/**
 * Arguments of ppok_optimal_token_baseline_*.
 */
typedef struct ppok_optimal_token_baseline_args {
    size_t struct_size;
    /**
     * Rows: sequences.
     */
    size_t batch;
    /**
     * Tokens of a row, or with `offsets` of all rows.
     */
    size_t seq_len;
    /**
     * Rows of a group where those stand after each other; it divides `batch`. 0 where `groups` is given.
     */
    size_t group_size;
    /**
     * Rewards of the tokens, `[batch, seq_len]`, or with `offsets` `[seq_len]`, as all that has a number a
     * token.
     */
    const float *rewards;
    /**
     * Log-probabilities of the tokens, `[batch, seq_len]`.
     */
    const float *logp;
    /**
     * Logarithms of the sums of the squared probabilities of the whole vocabulary, `[batch, seq_len]`.
     */
    const float *log_sum_sq_probs;
    /**
     * Ids of any values in any order, `[batch]`: rows of equal ids are a group. May be null.
     */
    const int64_t *groups;
    /**
     * Importance weights, `[batch, seq_len]`, whose squares are factors of the tokens' weights; null stands for
     * ones.
     */
    const float *weights;
    /**
     * `[batch, seq_len]`, 0 where masked; null if nothing is.
     */
    const uint8_t *mask;
    /**
     * Where the rows of a pack begin, `[batch + 1]`, as of ppok_advantages_*. Null if all rows have `seq_len`
     * tokens.
     */
    const int64_t *offsets;
    const struct ppok_optimal_token_baseline_options *options;
    /**
     * Advantages of the tokens, `[batch, seq_len]`, 0 where masked; written.
     */
    float *advantages;
    /**
     * Sums of the rewards from each token on, `[batch, seq_len]`, 0 where masked; written; null if not wanted.
     */
    float *returns;
} ppok_optimal_token_baseline_args;

/**
 * Arguments of ppok_ppo_loss_*.
 */
typedef struct ppok_ppo_loss_args {
    size_t struct_size;
    /**
     * Rows.
     */
    size_t batch;
    /**
     * Tokens of a row; with `offsets`, of all rows.
     */
    size_t seq_len;
    /**
     * Log-probabilities under the policy that is trained, which get the gradient, `[batch, seq_len]`, or with
     * `offsets` `[seq_len]`, as are all of that shape.
     */
    const float *logp;
    /**
     * Log-probabilities under the policy that made the rollout, `[batch, seq_len]`.
     */
    const float *old_logp;
    /**
     * Advantages, already whitened if they are to be, `[batch, seq_len]`, or `[batch]` with
     * `advantages_per_row`.
     */
    const float *advantages;
    /**
     * The critic's predictions, which get the gradient, `[batch, seq_len]`; null for no value term.
     */
    const float *values;
    /**
     * Its predictions at the time of the rollout, `[batch, seq_len]`; may be null where
     * `value_clip_range` is `PPOK_NONE`, and is where `values` is.
     */
    const float *old_values;
    /**
     * The targets of the regression, `[batch, seq_len]`; null if `values` is.
     */
    const float *returns;
    /**
     * Entropy of the policy at each token, which gets the gradient, `[batch, seq_len]`; may be null
     * where `entropy_coef` is 0.
     */
    const float *entropy;
    /**
     * Log-probabilities under the reference model, `[batch, seq_len]`; may be null where `kl_coef` is
     * 0.
     */
    const float *ref_logp;
    /**
     * Log-probabilities of the rollout as its engine computed them, `[batch, seq_len]`; may be null.
     */
    const float *rollout_logp;
    /**
     * Factors of the policy term, `[batch, seq_len]`, or `[batch]` with `weights_per_row`, 0 or above; null if
     * all are 1.
     */
    const float *weights;
    /**
     * `[batch, seq_len]`; null if nothing is masked.
     */
    const uint8_t *mask;
    /**
     * Where the rows of a pack begin, `[batch + 1]`: row b is the tokens from `offsets[b]` up to
     * `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
     * `seq_len` tokens.
     */
    const int64_t *offsets;
    const struct ppok_ppo_loss_options *options;
    /**
     * The loss and the statistics, one, written.
     */
    struct ppok_ppo_loss_stats *stats;
    /**
     * The loss once more, one, written; null if not wanted.
     */
    float *loss;
    /**
     * Gradient with respect to `logp`, for an upstream gradient of 1, `[batch, seq_len]`, written; null
     * if not wanted, and so are the next two.
     */
    float *grad_logp;
    /**
     * Gradient with respect to `values`, `[batch, seq_len]`; only with `values`.
     */
    float *grad_values;
    /**
     * Gradient with respect to `entropy`, `[batch, seq_len]`; only with `entropy`.
     */
    float *grad_entropy;
} ppok_ppo_loss_args;

/**
 * Arguments of ppok_ppo_loss_scale_*. Where one of a stored and a written gradient is null, so is the
 * other.
 */
typedef struct ppok_ppo_loss_scale_args {
    size_t struct_size;
    /**
     * Elements of each gradient: `batch` times `seq_len`.
     */
    size_t tokens;
    /**
     * The gradient of whatever came of the loss, one number.
     */
    const float *upstream;
    /**
     * The gradient with respect to logp that ppok_ppo_loss_* left, `[tokens]`.
     */
    const float *stored_logp;
    /**
     * The gradient with respect to values, `[tokens]`.
     */
    const float *stored_values;
    /**
     * The gradient with respect to entropy, `[tokens]`.
     */
    const float *stored_entropy;
    /**
     * Gradient with respect to logp, `[tokens]`, written; may be `stored_logp`.
     */
    float *grad_logp;
    /**
     * Gradient with respect to values, `[tokens]`, written; may be `stored_values`.
     */
    float *grad_values;
    /**
     * Gradient with respect to entropy, `[tokens]`, written; may be `stored_entropy`.
     */
    float *grad_entropy;
} ppok_ppo_loss_scale_args;

/**
 * Options of ppok_preference_loss_*.
 */
typedef struct ppok_preference_options {
    size_t struct_size;
    /**
     * Scale of the log-ratios, above 0; 0.1 by default.
     */
    double beta;
    /**
     * e, the share of labels taken to be wrong, 0 to 0.5, of losses that have it; 0 by default.
     */
    double label_smoothing;
    /**
     * Subtracted from h, of losses that are as `PPOK_PREFERENCE_SIGMOID`; 0 by default.
     */
    double gamma;
    /**
     * alpha of `PPOK_PREFERENCE_ALPHAPO`; 0 by default, and for other losses.
     */
    double alpha;
    /**
     * Above 0; 0.05 by default.
     */
    double discopop_tau;
    /**
     * alpha of `PPOK_F_DIVERGENCE_ALPHA`, other than 1; not looked at with others. 0.5 by default.
     */
    double f_alpha;
    /**
     * Weight of tokens beyond the length of the shorter response of the pair (LD-DPO), 0 to 1, or
     * `PPOK_NONE`, which is the default.
     */
    double ld_alpha;
    /**
     * w_d of `PPOK_PREFERENCE_KTO`, 0 or above; 1 by default.
     */
    double desirable_weight;
    /**
     * w_u of `PPOK_PREFERENCE_KTO`, 0 or above; 1 by default.
     */
    double undesirable_weight;
    /**
     * Factor of the mean negative log-likelihood of the chosen responses' tokens; 0 by default, and in
     * `PPOK_PREFERENCE_KTO`.
     */
    double sft_coef;
    /**
     * Replaces the number of pairs, or in `PPOK_PREFERENCE_KTO` of responses, above 0, for gradient
     * accumulation and data parallelism. `PPOK_NONE` by default.
     */
    double denominator;
    /**
     * Replaces the number of tokens of the chosen responses likewise. `PPOK_NONE` by default.
     */
    double sft_denominator;
    /**
     * `PPOK_PREFERENCE_SIGMOID`, the default, to `PPOK_PREFERENCE_KTO`.
     */
    int32_t loss;
    /**
     * `PPOK_F_DIVERGENCE_REVERSE_KL`, the default, to `PPOK_F_DIVERGENCE_ALPHA`, the latter three for
     * losses of h alone that have a reference and do not sort.
     */
    int32_t f_divergence;
    /**
     * 1: sums are divided by lengths; 0, the default: in losses that always do.
     */
    int32_t average_log_prob;
    int32_t reserved;
} ppok_preference_options;

/**
 * The loss and what else was found of the responses that count.
 *
 * NaN stands for what is not defined, the mean of no response. In KTO the desirable responses are the chosen
 * ones.
 */
typedef struct ppok_preference_stats {
    /**
     * The total, as it is minimised.
     */
    double loss;
    /**
     * The loss without the likelihood term.
     */
    double preference_loss;
    /**
     * Mean negative log-likelihood of the chosen responses' tokens, before `sft_coef`; in KTO NaN.
     */
    double sft_loss;
    /**
     * Share of pairs whose chosen response has the larger reward; in KTO NaN.
     */
    double accuracy;
    /**
     * `chosen_reward` less `rejected_reward`.
     */
    double reward_margin;
    /**
     * Mean implicit reward of the chosen responses.
     */
    double chosen_reward;
    /**
     * Mean implicit reward of the rejected responses.
     */
    double rejected_reward;
    /**
     * Mean sum of the chosen responses' log-probabilities.
     */
    double chosen_logp;
    /**
     * Mean sum of the rejected responses' log-probabilities.
     */
    double rejected_logp;
    /**
     * Number of chosen responses.
     */
    double chosen;
    /**
     * Number of rejected responses.
     */
    double rejected;
} ppok_preference_stats;


/**
 * Arguments of ppok_preference_loss_*. Units are pairs, `rows` / 2, or in KTO rows. Rows are the chosen
 * responses of all pairs, and then the rejected ones in the same order.
 */
typedef struct ppok_preference_loss_args {
    size_t struct_size;
    /**
     * Responses; an even number of them but in KTO.
     */
    size_t rows;
    /**
     * Tokens of a row, or with `offsets` of all rows; 1 where rows are log-probabilities of whole responses.
     */
    size_t seq_len;
    /**
     * Log-probabilities under the policy that is trained, which get the gradient, `[rows, seq_len]`, or with
     * `offsets` `[seq_len]`, as are all of that shape.
     */
    const float *logp;
    /**
     * Log-probabilities under the reference model, `[rows, seq_len]`; null if there are none, and for
     * losses without a reference.
     */
    const float *ref_logp;
    /**
     * Their sums over the unmasked tokens, `[rows]`, in their place, or null.
     */
    const float *ref_sums;
    /**
     * `[rows, seq_len]`; null if nothing is masked.
     */
    const uint8_t *mask;
    /**
     * The divisors of averages, `[rows]`, 0 or above; null for the number of unmasked tokens.
     */
    const int64_t *lengths;
    /**
     * Factors of the losses, `[units]`; null for ones. A unit of weight 0 is left out altogether. Not
     * for losses that sort.
     */
    const float *weights;
    /**
     * Subtracted from h, `[units]`, or null; for losses that are as `PPOK_PREFERENCE_SIGMOID`.
     */
    const float *margin;
    /**
     * 1 for desirable responses and 0 for others, `[rows]`, in KTO; else null.
     */
    const uint8_t *labels;
    /**
     * kl of KTO, one number; null for 0.
     */
    const float *kl;
    /**
     * Where the rows of a pack begin, `[rows + 1]`: row b is the tokens from `offsets[b]` up to
     * `offsets[b + 1]`; 0 first, never falling, `seq_len` last. Not checked on CUDA. Null if all rows have
     * `seq_len` tokens.
     */
    const int64_t *offsets;
    const struct ppok_preference_options *options;
    /**
     * The loss and the statistics, one, written.
     */
    struct ppok_preference_stats *stats;
    /**
     * The loss once more, one, written; null if not wanted.
     */
    float *loss;
    /**
     * The losses of the units, times their weights, `[units]`, written; null if not wanted.
     */
    float *losses;
    /**
     * Implicit rewards, `[rows]`, written: beta x, averaged if the loss averages; null if not wanted.
     */
    float *rewards;
    /**
     * Gradient with respect to `logp`, for an upstream gradient of 1, `[rows, seq_len]`, written; null
     * if not wanted.
     */
    float *grad_logp;
} ppok_preference_loss_args;

/**
 * Options of ppok_reward_model_loss_*.
 */
typedef struct ppok_reward_model_options {
    size_t struct_size;
    /**
     * Factor of (chosen + rejected)^2, 0 or above; 0 by default.
     */
    double center_coef;
    /**
     * Replaces the number of pairs, above 0. `PPOK_NONE` by default.
     */
    double denominator;
} ppok_reward_model_options;

/**
 * Arguments of ppok_reward_model_loss_*.
 */
typedef struct ppok_reward_model_loss_args {
    size_t struct_size;
    /**
     * How many pairs there are.
     */
    size_t pairs;
    /**
     * Rewards of the chosen responses and of the rejected ones, which get the gradient, `[2, pairs]`.
     */
    const float *rewards;
    /**
     * How much more the chosen response is to get, `[pairs]`; null for 0.
     */
    const float *margin;
    /**
     * Factors of the losses, `[pairs]`; null for ones. A pair of weight 0 is left out altogether.
     */
    const float *weights;
    const struct ppok_reward_model_options *options;
    /**
     * The loss and the statistics, one, written.
     */
    struct ppok_preference_stats *stats;
    /**
     * The loss once more, one, written; null if not wanted.
     */
    float *loss;
    /**
     * The losses of the pairs, times their weights, `[pairs]`, written; null if not wanted.
     */
    float *losses;
    /**
     * Gradient with respect to `rewards`, for an upstream gradient of 1, `[2, pairs]`, written; null if
     * not wanted.
     */
    float *grad_rewards;
} ppok_reward_model_loss_args;

/**
 * Threads of the program's: see ppok_set_team().
 */
typedef void (*ppok_team)(void (*work)(void *state),
                          void *state,
                          unsigned int threads,
                          unsigned int flags);

/**
 * Options of ppok_whiten_*.
 */
typedef struct ppok_whiten_options {
    size_t struct_size;
    /**
     * Keeps the divisor from 0; above 1.2e-38, or 0; 1e-8 by default.
     */
    double eps;
    /**
     * `PPOK_WHITEN_EPS_IN_VARIANCE`, the default, or `PPOK_WHITEN_EPS_IN_STD`.
     */
    int32_t eps_placement;
    /**
     * 1, the default: the sum of squares is divided by n - 1; 0: by n.
     */
    int32_t unbiased;
    /**
     * 1, the default: the result has mean 0; 0: the mean is added back after scaling.
     */
    int32_t shift_mean;
    int32_t reserved;
} ppok_whiten_options;

/**
 * Arguments of ppok_whiten_backward_*.
 */
typedef struct ppok_whiten_backward_args {
    size_t struct_size;
    /**
     * How many there are.
     */
    size_t elements;
    /**
     * `[elements]`.
     */
    const float *x;
    /**
     * `[elements]`; null if all count.
     */
    const uint8_t *mask;
    /**
     * The moments of x, one.
     */
    const struct ppok_moments *moments;
    /**
     * The upstream gradient, `[elements]`.
     */
    const float *grad_y;
    const struct ppok_whiten_options *options;
    /**
     * `[elements]`, written; 0 where masked. For CUDA it may be `grad_y`.
     */
    float *grad_x;
} ppok_whiten_backward_args;

/**
 * Arguments of ppok_whiten_forward_*.
 */
typedef struct ppok_whiten_forward_args {
    size_t struct_size;
    /**
     * How many there are.
     */
    size_t elements;
    /**
     * `[elements]`.
     */
    const float *x;
    /**
     * `[elements]`; null if all count.
     */
    const uint8_t *mask;
    /**
     * The moments to whiten with, one: those of x itself, or of a larger set. Of 2 elements or more, or
     * 1 where not `unbiased`.
     */
    const struct ppok_moments *moments;
    const struct ppok_whiten_options *options;
    /**
     * `[elements]`, written; 0 where masked. For CUDA it may be `x`.
     */
    float *y;
} ppok_whiten_forward_args;

/**
 * Arguments of ppok_whiten_moments_*.
 */
typedef struct ppok_whiten_moments_args {
    size_t struct_size;
    /**
     * How many there are.
     */
    size_t elements;
    /**
     * `[elements]`.
     */
    const float *x;
    /**
     * `[elements]`; null if all count.
     */
    const uint8_t *mask;
    /**
     * Count, mean and sum of squared deviations of the unmasked elements, one; written.
     */
    struct ppok_moments *moments;
} ppok_whiten_moments_args;

/**
 * Arguments of ppok_whiten_with_backward_*.
 */
typedef struct ppok_whiten_with_backward_args {
    size_t struct_size;
    /**
     * How many there are.
     */
    size_t elements;
    /**
     * `[elements]`; null if all count.
     */
    const uint8_t *mask;
    /**
     * The moments that were whitened with, one.
     */
    const struct ppok_moments *moments;
    /**
     * The upstream gradient, `[elements]`.
     */
    const float *grad_y;
    const struct ppok_whiten_options *options;
    /**
     * `[elements]`, written; 0 where masked. For CUDA it may be `grad_y`.
     */
    float *grad_x;
} ppok_whiten_with_backward_args;



#ifdef __cplusplus
extern "C" {
#endif // __cplusplus

/**
 * Advantages from one score a sequence: with x_i = clip(score_i) - score_baselines_i,
 *
 * ```text
 * A_i = (x_i - b_i) / (s_i + eps)
 * ```
 *
 * where the options say which number of the row's group, or of all rows, b and s are. Equal scores give
 * exactly 0. An infinite score makes every row NaN that is compared with it. Where the baseline is the
 * runner-up, a group of one row is `PPOK_STATUS_OPTION`; on CUDA, by `groups`, its advantage is NaN. The
 * function for the CPU allocates a number a row for `groups` that do not ascend.
 */
int32_t ppok_advantages_cpu(const struct ppok_advantages_args *args);

int32_t ppok_advantages_cuda(const struct ppok_advantages_args *args,
                             void *workspace,
                             size_t bytes,
                             void *stream);

int32_t ppok_advantages_cuda_workspace_size(const struct ppok_advantages_args *args,
                                            void *stream,
                                            size_t *bytes);

int32_t ppok_advantages_options_init(struct ppok_advantages_options *options, size_t struct_size);

/**
 * Importance weights that correct for a rollout by another engine than the trainer's: with
 * d = old_logp - rollout_logp
 *
 * ```text
 * w      = exp(d), exp(sum d), exp(mean d) or 1       by the level
 * weight = w where low <= w <= high, else the nearer bound or 0
 * weight = 0 where a rejection's metric, of the token or its row, is out of its bounds
 * ```
 *
 * NaN in `rollout_logp` counts as d = 0. Nothing is NaN because there is no token.
 */
int32_t ppok_correction_cpu(const struct ppok_correction_args *args);

int32_t ppok_correction_cuda(const struct ppok_correction_args *args,
                             void *workspace,
                             size_t bytes,
                             void *stream);

int32_t ppok_correction_cuda_workspace_size(const struct ppok_correction_args *args,
                                            void *stream,
                                            size_t *bytes);

int32_t ppok_correction_options_init(struct ppok_correction_options *options, size_t struct_size);

/**
 * Gives options those of the correction of that name: "tis", "sequence_tis", "icepop", "sequence_mask" (TRL) or
 * "geometric_mask" (NeMo-RL), with the bounds that are usual. `struct_size` is as of
 * ppok_correction_options_init().
 */
int32_t ppok_correction_options_named(struct ppok_correction_options *options,
                                      size_t struct_size,
                                      const char *name);

/**
 * Generalised advantage estimation, with the shaping of the rewards in the same pass: for each row,
 * from the last token backwards,
 *
 * ```text
 * r_t       = rewards_t - kl_coef kl_t + score    (the score at one place of the row only)
 * delta_t   = r_t + gamma V_{t+1} - V_t
 * A_t       = delta_t + gamma lambda A_{t+1}
 * returns_t = A_t + V_t
 * ```
 *
 * The scan starts at the last unmasked token. A row without one comes out as zeros, its score
 * dropped. A score is scaled and clipped, then the rule for a missing end of sequence is applied.
 */
int32_t ppok_gae_cpu(const struct ppok_gae_args *args);

int32_t ppok_gae_cuda(const struct ppok_gae_args *args,
                      void *workspace,
                      size_t bytes,
                      void *stream);

int32_t ppok_gae_cuda_workspace_size(const struct ppok_gae_args *args, void *stream, size_t *bytes);

int32_t ppok_gae_options_init(struct ppok_gae_options *options, size_t struct_size);

/**
 * The vector instructions that the functions for the CPU use on this machine: "avx512", "avx2", "neon" or
 * "scalar", never null. The results are the same.
 */
const char *ppok_instruction_set(void);

/**
 * Gradients of ppok_kl_full_forward_cpu() with respect to the logits, in their own type.
 */
int32_t ppok_kl_full_backward_cpu(const struct ppok_kl_full_backward_args *args);

int32_t ppok_kl_full_backward_cuda(const struct ppok_kl_full_backward_args *args,
                                   void *workspace,
                                   size_t bytes,
                                   void *stream);

int32_t ppok_kl_full_backward_cuda_workspace_size(const struct ppok_kl_full_backward_args *args,
                                                  void *stream,
                                                  size_t *bytes);

/**
 * Exact KL divergence between the distributions of two rows of logits, in nats: with
 * p = softmax(logits / temperature) and q = softmax(ref_logits / temperature), forward
 * sum_i p_i (ln p_i - ln q_i), or reverse with the two exchanged; or another divergence, as the options say.
 * Reads both logits once, or of another divergence twice.
 *
 * A logit of -inf is a token of probability 0: under q where p is above 0 the KL is +inf. A row with
 * NaN or +inf, or of -inf only, in either tensor gives NaN in that row and in no other.
 */
int32_t ppok_kl_full_forward_cpu(const struct ppok_kl_full_forward_args *args);

int32_t ppok_kl_full_forward_cuda(const struct ppok_kl_full_forward_args *args,
                                  void *workspace,
                                  size_t bytes,
                                  void *stream);

int32_t ppok_kl_full_forward_cuda_workspace_size(const struct ppok_kl_full_forward_args *args,
                                                 void *stream,
                                                 size_t *bytes);

int32_t ppok_kl_full_options_init(struct ppok_kl_full_options *options, size_t struct_size);

/**
 * Gradients of ppok_kl_token_forward_cpu(). Where a clamp changed anything they are 0.
 */
int32_t ppok_kl_token_backward_cpu(const struct ppok_kl_token_backward_args *args);

int32_t ppok_kl_token_backward_cuda(const struct ppok_kl_token_backward_args *args,
                                    void *workspace,
                                    size_t bytes,
                                    void *stream);

int32_t ppok_kl_token_backward_cuda_workspace_size(const struct ppok_kl_token_backward_args *args,
                                                   void *stream,
                                                   size_t *bytes);

/**
 * KL divergence of the policy from the reference model, estimated for each token from the
 * log-probabilities d = logp - ref_logp of what was sampled, in nats.
 */
int32_t ppok_kl_token_forward_cpu(const struct ppok_kl_token_forward_args *args);

int32_t ppok_kl_token_forward_cuda(const struct ppok_kl_token_forward_args *args,
                                   void *workspace,
                                   size_t bytes,
                                   void *stream);

int32_t ppok_kl_token_forward_cuda_workspace_size(const struct ppok_kl_token_forward_args *args,
                                                  void *stream,
                                                  size_t *bytes);

int32_t ppok_kl_token_options_init(struct ppok_kl_token_options *options, size_t struct_size);

/**
 * The error of this thread's last call that returned anything but `PPOK_STATUS_OK`: the op,
 * the argument, what was expected and what came, in UTF-8. Empty before the first. A call that goes
 * well leaves it as it is. The text is the library's, and stays until the thread's next failing
 * call.
 */
const char *ppok_last_error(void);

/**
 * The PPO loss from logits, with its statistics and the gradient of the logits, in one pass over them:
 * what ppok_logprob_forward_cpu(), ppok_ppo_loss_cpu() without values and ppok_logprob_backward_cpu()
 * do one after the other. Where an option looks at a whole row (`ratio`, `off_policy_threshold`), the logits
 * are read twice. Logits of masked tokens are not looked at. The gradient is for an upstream gradient of 1.
 */
int32_t ppok_logits_ppo_loss_cpu(const struct ppok_logits_ppo_loss_args *args);

int32_t ppok_logits_ppo_loss_cuda(const struct ppok_logits_ppo_loss_args *args,
                                  void *workspace,
                                  size_t bytes,
                                  void *stream);

int32_t ppok_logits_ppo_loss_cuda_workspace_size(const struct ppok_logits_ppo_loss_args *args,
                                                 void *stream,
                                                 size_t *bytes);

/**
 * Gradient with respect to the logits, or to a tile of their columns, in their own type: with the
 * upstream gradients g of logp and h of the entropy,
 *
 * ```text
 * d/dz_j = (g (1[j = t] - p_j) - h p_j (ln p_j + entropy)) / T
 * ```
 *
 * A row that is ignored, or whose upstream gradients are 0, gets gradient 0 and is not read. Targets
 * are refused as in the forward pass.
 */
int32_t ppok_logprob_backward_cpu(const struct ppok_logprob_backward_args *args);

int32_t ppok_logprob_backward_cuda(const struct ppok_logprob_backward_args *args,
                                   void *workspace,
                                   size_t bytes,
                                   void *stream);

int32_t ppok_logprob_backward_cuda_workspace_size(const struct ppok_logprob_backward_args *args,
                                                  void *stream,
                                                  size_t *bytes);

/**
 * Log-probabilities, and entropies, of running sums over all columns. Of a target whose column was in
 * none of them the log-probability is NaN.
 */
int32_t ppok_logprob_finish_cpu(const struct ppok_logprob_finish_args *args);

int32_t ppok_logprob_finish_cuda(const struct ppok_logprob_finish_args *args,
                                 void *workspace,
                                 size_t bytes,
                                 void *stream);

int32_t ppok_logprob_finish_cuda_workspace_size(const struct ppok_logprob_finish_args *args,
                                                void *stream,
                                                size_t *bytes);

/**
 * Log-probability of one token a row, and the entropy of the row's distribution, from logits: with
 * `z[n, 0..V]`, target `t[n]` and temperature T,
 *
 * ```text
 * x_j = (z_j - max z) / T       s = sum_j exp(x_j)       p_j = exp(x_j) / s
 * logp = x_t - ln s             entropy = ln s - sum_j p_j x_j
 * ```
 *
 * in nats. The logits are read once, and sums are kept in single precision.
 *
 * A logit of -inf is a token of probability 0. A row with NaN or +inf, or of -inf only, gives NaN in
 * that row and in no other. A row with target `ignore_index` is not read: logp and entropy are 0. Any
 * other target outside `0..vocab` is refused with `PPOK_STATUS_TARGET`, and nothing is written; on
 * CUDA its row comes out as NaN.
 */
int32_t ppok_logprob_forward_cpu(const struct ppok_logprob_forward_args *args);

int32_t ppok_logprob_forward_cuda(const struct ppok_logprob_forward_args *args,
                                  void *workspace,
                                  size_t bytes,
                                  void *stream);

int32_t ppok_logprob_forward_cuda_workspace_size(const struct ppok_logprob_forward_args *args,
                                                 void *stream,
                                                 size_t *bytes);

/**
 * Adds the running sums over other columns to those over some.
 */
int32_t ppok_logprob_merge_cpu(const struct ppok_logprob_merge_args *args);

int32_t ppok_logprob_merge_cuda(const struct ppok_logprob_merge_args *args,
                                void *workspace,
                                size_t bytes,
                                void *stream);

int32_t ppok_logprob_merge_cuda_workspace_size(const struct ppok_logprob_merge_args *args,
                                               void *stream,
                                               size_t *bytes);

int32_t ppok_logprob_options_init(struct ppok_logprob_options *options, size_t struct_size);

/**
 * Folds a tile of columns into running sums of its rows, or begins them with it: the forward pass from
 * logits that come in pieces. The sums may be added to those over other columns, another process's say,
 * by ppok_logprob_merge_*, and ppok_logprob_finish_* makes log-probabilities and entropies of those over
 * all columns.
 *
 * The bits depend on the widths of the tiles and their order. Targets are refused as in the forward pass.
 */
int32_t ppok_logprob_partial_cpu(const struct ppok_logprob_partial_args *args);

int32_t ppok_logprob_partial_cuda(const struct ppok_logprob_partial_args *args,
                                  void *workspace,
                                  size_t bytes,
                                  void *stream);

int32_t ppok_logprob_partial_cuda_workspace_size(const struct ppok_logprob_partial_args *args,
                                                 void *stream,
                                                 size_t *bytes);

/**
 * The moments of both sets together, for shards and data parallelism, in the process's memory.
 * `merged` may be `a` or `b`.
 */
int32_t ppok_moments_merge(const struct ppok_moments *a,
                           const struct ppok_moments *b,
                           struct ppok_moments *merged);

/**
 * How many threads a call by this thread would work with at most, its own included.
 */
size_t ppok_num_threads(void);

/**
 * Advantages of tokens against verl's optimal token baseline. With G_it the sum of the rewards of row i from
 * token t on, and W_it that of w^2 |onehot - p|^2 up to it,
 *
 * ```text
 * A_it = G_it - sum_i W_it G_it / (sum_i W_it + eps)      over the rows i of the group
 * ```
 *
 * The row of a group of one has no baseline: A = G. The function for the CPU allocates two f64 a token.
 */
int32_t ppok_optimal_token_baseline_cpu(const struct ppok_optimal_token_baseline_args *args);

int32_t ppok_optimal_token_baseline_cuda(const struct ppok_optimal_token_baseline_args *args,
                                         void *workspace,
                                         size_t bytes,
                                         void *stream);

int32_t ppok_optimal_token_baseline_cuda_workspace_size(const struct ppok_optimal_token_baseline_args *args,
                                                        void *stream,
                                                        size_t *bytes);

int32_t ppok_optimal_token_baseline_options_init(struct ppok_optimal_token_baseline_options *options,
                                                 size_t struct_size);

/**
 * The PPO loss: clipped surrogate, clipped value loss, entropy bonus and KL penalty, with their
 * gradients and statistics, from one pass over the tokens. With d = logp - old_logp, clamped, ratio
 * r = exp(d) and advantage A,
 *
 * ```text
 * policy = max(-r A, -clip(r, 1 - low, 1 + high) A), at most -c A where A < 0 with dual clip c
 * value  = max((v - R)^2, (clip(v, v_old - e, v_old + e) - R)^2) / 2
 * loss   = agg(weights policy) + value_coef agg(value) - entropy_coef agg(entropy) + kl_coef agg(kl)
 * ```
 *
 * The options have other policy terms than this clipped surrogate, ratios of whole rows, and trust
 * regions; ppok_ppo_loss_options_named() knows the losses that have names.
 *
 * If no token is unmasked and no denominator is given, `PPOK_STATUS_MASK`; on CUDA the loss is NaN
 * then, and the gradients are 0. A negative weight of an unmasked token is `PPOK_STATUS_OPTION`; on CUDA
 * the loss is NaN.
 */
int32_t ppok_ppo_loss_cpu(const struct ppok_ppo_loss_args *args);

int32_t ppok_ppo_loss_cuda(const struct ppok_ppo_loss_args *args,
                           void *workspace,
                           size_t bytes,
                           void *stream);

int32_t ppok_ppo_loss_cuda_workspace_size(const struct ppok_ppo_loss_args *args,
                                          void *stream,
                                          size_t *bytes);

int32_t ppok_ppo_loss_options_init(struct ppok_ppo_loss_options *options, size_t struct_size);

/**
 * Gives options those of the loss of that name: "ppo", "dapo", "grpo", "dr_grpo", "bnpo", "luspo", "rloo",
 * "gspo", "gspo_token", "gmpo", "cispo", "dppo", "sapo", "vespo", "reinforce" or "gpg", as their papers or the
 * systems that have them do. `struct_size` is as of ppok_ppo_loss_options_init().
 */
int32_t ppok_ppo_loss_options_named(struct ppok_ppo_loss_options *options,
                                    size_t struct_size,
                                    const char *name);

/**
 * Multiplies stored gradients of ppok_ppo_loss_cpu() by the gradient of whatever came of the loss. A 0
 * stays 0, whatever that is.
 */
int32_t ppok_ppo_loss_scale_cpu(const struct ppok_ppo_loss_scale_args *args);

int32_t ppok_ppo_loss_scale_cuda(const struct ppok_ppo_loss_scale_args *args,
                                 void *workspace,
                                 size_t bytes,
                                 void *stream);

int32_t ppok_ppo_loss_scale_cuda_workspace_size(const struct ppok_ppo_loss_scale_args *args,
                                                void *stream,
                                                size_t *bytes);

/**
 * Preference losses: the DPO family on pairs of responses, and KTO on labelled ones, with their gradient,
 * implicit rewards and statistics. With x and y the sums of log-ratios of the chosen and the rejected
 * response over their unmasked tokens, averaged where the loss averages, s the logistic function and ls its
 * logarithm,
 *
 * ```text
 * a = beta x, b = beta y, h = a - b - gamma - margin
 * loss = sum weight l(a, b, h) / units + sft_coef (-sum logp / tokens), the latter of chosen responses
 * ```
 *
 * where the option `loss` says what l is. If no unit has a weight and no denominator is given,
 * `PPOK_STATUS_MASK`; on CUDA the loss is NaN then, and the gradient is 0. A label other than 0 and 1, and
 * a length below 0, are `PPOK_STATUS_OPTION`; on CUDA the loss is NaN.
 */
int32_t ppok_preference_loss_cpu(const struct ppok_preference_loss_args *args);

int32_t ppok_preference_loss_cuda(const struct ppok_preference_loss_args *args,
                                  void *workspace,
                                  size_t bytes,
                                  void *stream);

int32_t ppok_preference_loss_cuda_workspace_size(const struct ppok_preference_loss_args *args,
                                                 void *stream,
                                                 size_t *bytes);

int32_t ppok_preference_options_init(struct ppok_preference_options *options, size_t struct_size);

/**
 * The pairwise loss of a reward model, with its gradient and statistics: the mean of
 * -ls(chosen - rejected - margin) + center_coef (chosen + rejected)^2. If no pair has a weight and no
 * denominator is given, `PPOK_STATUS_MASK`; on CUDA the loss is NaN then, and the gradient is 0.
 */
int32_t ppok_reward_model_loss_cpu(const struct ppok_reward_model_loss_args *args);

int32_t ppok_reward_model_loss_cuda(const struct ppok_reward_model_loss_args *args,
                                    void *workspace,
                                    size_t bytes,
                                    void *stream);

int32_t ppok_reward_model_loss_cuda_workspace_size(const struct ppok_reward_model_loss_args *args,
                                                   void *stream,
                                                   size_t *bytes);

int32_t ppok_reward_model_options_init(struct ppok_reward_model_options *options,
                                       size_t struct_size);

/**
 * From now on the functions for the CPU work with threads of the program's: `team` has as many of them
 * as it likes call `work(state)`, the caller's among them, and returns when all those calls have. It is
 * called with 0 for `threads` and `flags`, from any thread that calls the library, and its threads need
 * as much stack as that one. `GOMP_parallel` of the OpenMP runtimes is such a function: so a program
 * whose OpenMP threads wait by spinning has no second set of threads that does. Null brings back the
 * library's own pool. What is returned was in use before.
 */
ppok_team ppok_set_team(ppok_team team);

/**
 * The meaning of a status, in a few words: a string of the library's, never null.
 */
const char *ppok_status_string(int32_t status);

/**
 * The library's version, in the form of `PPOK_VERSION`, which is the header's.
 */
int32_t ppok_version(void);

/**
 * The library's version as text: "major.minor.patch", never null.
 */
const char *ppok_version_string(void);

/**
 * Gradient with respect to `x` of ppok_whiten_forward_cpu() with the moments of `x` itself, through
 * which it goes too.
 */
int32_t ppok_whiten_backward_cpu(const struct ppok_whiten_backward_args *args);

int32_t ppok_whiten_backward_cuda(const struct ppok_whiten_backward_args *args,
                                  void *workspace,
                                  size_t bytes,
                                  void *stream);

int32_t ppok_whiten_backward_cuda_workspace_size(const struct ppok_whiten_backward_args *args,
                                                 void *stream,
                                                 size_t *bytes);

/**
 * Masked whitening: y = (x - mean) / sqrt(var + eps) where unmasked, else 0, with the mean and the
 * variance of `moments`. If those are of too few elements, `PPOK_STATUS_MASK`; on CUDA y is NaN then
 * where not masked.
 */
int32_t ppok_whiten_forward_cpu(const struct ppok_whiten_forward_args *args);

int32_t ppok_whiten_forward_cuda(const struct ppok_whiten_forward_args *args,
                                 void *workspace,
                                 size_t bytes,
                                 void *stream);

int32_t ppok_whiten_forward_cuda_workspace_size(const struct ppok_whiten_forward_args *args,
                                                void *stream,
                                                size_t *bytes);

/**
 * Count, mean and sum of squared deviations of the unmasked elements.
 */
int32_t ppok_whiten_moments_cpu(const struct ppok_whiten_moments_args *args);

int32_t ppok_whiten_moments_cuda(const struct ppok_whiten_moments_args *args,
                                 void *workspace,
                                 size_t bytes,
                                 void *stream);

int32_t ppok_whiten_moments_cuda_workspace_size(const struct ppok_whiten_moments_args *args,
                                                void *stream,
                                                size_t *bytes);

int32_t ppok_whiten_options_init(struct ppok_whiten_options *options, size_t struct_size);

/**
 * Gradient with respect to `x` of ppok_whiten_forward_cpu() with moments that are constants.
 */
int32_t ppok_whiten_with_backward_cpu(const struct ppok_whiten_with_backward_args *args);

int32_t ppok_whiten_with_backward_cuda(const struct ppok_whiten_with_backward_args *args,
                                       void *workspace,
                                       size_t bytes,
                                       void *stream);

int32_t ppok_whiten_with_backward_cuda_workspace_size(const struct ppok_whiten_with_backward_args *args,
                                                      void *stream,
                                                      size_t *bytes);

#ifdef __cplusplus
}  // extern "C"
#endif  // __cplusplus

#endif  /* PPO_KERNELS_H */
