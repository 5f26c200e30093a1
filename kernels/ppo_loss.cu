// The PPO loss with its gradients and statistics. src/ppo_loss/mod.rs has the formulas,
// src/ppo_loss/cuda.rs the launches.
//
//     d = clamp(logp - old_logp)     r = e^d     w = weight of the token's row     D = denominator
//     loss = sum w (policy + value_coef value - entropy_coef entropy + kl_coef kl) / D
//
// All inputs and gradients are [B, T] in f32, but for the mask in u8. They are taken as one run of
// B T tokens; rows matter only where a token's weight depends on the length of its row.
//
// count. Reads the mask alone, where D or the weights depend on it: how many tokens are unmasked,
// or how many rows have such a token, and one over the length of every row. Counts are integers, so
// their order is free: a row goes to as many lanes as its bytes fill with vectors, or to a block.
// Of few tokens pass counts the unmasked ones by itself.
//
// pass. Everything else, from one read of the tokens. A block takes a part of them, in tiles of
// four tokens a thread: a vector of 16 bytes from each input, all in flight at once. Which tokens a
// thread takes does not depend on their alignment; inputs that are not aligned are loaded one by
// one. Sums are kept in f32 in a thread, of at most 32 tokens, and over a warp in a fixed tree;
// those of the warps are added in f64, and `partials [PARTIAL_SUMS, parts]` keeps them for merge.
// How many parts there are depends on the number of tokens alone. Row weights, the entropy and the
// KL take registers, which leaves fewer threads in flight, so there is a kernel without them (pass),
// one with (pass_full), and one for all surrogates, trust regions, weights and KL terms (pass_family).
//
// Of a pack a token's row is found in the offsets where that matters; count looks at them for the lengths of
// rows, of which it also finds the longest.
//
// rows. Before it, where the ratio is that of a row or rows may be dropped: a block a row reads what
// makes the log-ratios and adds them up in f64. Where all tokens of the row get the gradient of its
// ratio, it then reads advantages and weights, and adds up what the gradient would be of each token.
//
// row_clips, row_extremes. After it, if wanted: a block a row finds which share of its tokens is clipped, and
// one block the extremes of those.
//
// merge. One block, a sum a warp: adds the partials in f64, in order, and writes the statistics. If
// there is but one part, pass does so itself.
//
// from_logits. A row of logits a block: its log-probability and entropy, what the loss makes of them,
// and the gradient of the row, of which as much as the chip has is in shared memory and the rest in L2.
// Then come pass and merge.
//
// scale. The stored gradients times an upstream gradient that is on the device.
//
// Bytes of a token: pass reads 12, 12 more for the value term (8 without its clip), 4 for the
// entropy and for the KL each, 1 for the mask, and writes 4 a gradient; count reads the 1 of the
// mask. scale reads and writes 4 a gradient; in place, by a factor of 1, nothing. from_logits reads a
// row of logits and writes one.
//
// Numbers. e^x is expf, to 2 ulp. Variances are taken around a number that is among those they are
// of, so that they keep their digits far from 0: each thread takes one of its first, and changes to
// the block's before sums are added, as the parts do to the first part's. Masked tokens are selected
// away, never multiplied: they may be NaN. D = 0 makes the loss NaN.

#include "common/logprob.cuh"
#include "common/policy.cuh"
#include "common/reduce.cuh"
#include "common/token_kl.cuh"
#include "common/tokens.cuh"
#include "common/vector.cuh"

// What a part of the tokens adds up to. The four losses are weighted by row, the rest is plain.
enum Sum {
    TOKENS,
    CLIPPED,
    LOWER_CLIPPED,
    VALUE_CLIPPED,
    CLIPPED_HIGH,
    OUTSIDE,
    OFF_POLICY,
    POLICY_LOSS,
    VALUE_LOSS,
    ENTROPY_LOSS,
    KL_LOSS,
    LOG_RATIO,
    LOG_RATIO_SQUARES,
    LOG_RATIO_K3,
    ENTROPY,
    KL,
    ADVANTAGE,
    RATIO,  // less its centre, and so are the next five
    RATIO_SQUARES,
    RETURN,
    RETURN_SQUARES,
    RESIDUAL,  // return - value
    RESIDUAL_SQUARES,
    // From here on no sums.
    RATIO_MIN,
    RATIO_MAX,
    RATIO_CENTRE,
    RETURN_CENTRE,
    RESIDUAL_CENTRE,
    PARTIAL_SUMS,
};
// Kinds of numbers that are added up around a centre.
constexpr int CENTRES = PARTIAL_SUMS - RATIO_CENTRE;
static_assert(RATIO_MIN - RATIO == 2 * CENTRES, "a sum and a sum of squares for each");
// A warp merges each; a bit each in a mask of lanes.
static_assert(PARTIAL_SUMS < WARP, "one warp has a lane for each");

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// Tokens of a vector from every thread.
constexpr int TILE = THREADS * QUAD;

// Where D comes from.
struct Divisor {
    double given;             // or 0: it is counted
    double factor;            // of what is counted
    const uint32_t* counts;   // [parts] of count, with the sum D; or null: the unmasked tokens
    const uint32_t* longest;  // [parts] of count: D is times the longest of all rows; or null
    int32_t parts;
    int32_t needs_tokens;  // D is 0 where no token is unmasked, although it is given
};

// The statistics, NaN where not defined; src/ppo_loss/mod.rs says what each is.
struct PpoStats {
    double loss;
    double policy_loss;
    double value_loss;
    double clip_fraction;
    double lower_clip_fraction;
    double clip_high_fraction;
    double clip_low_fraction;
    double clip_high_row_max;
    double clip_low_row_min;
    double outside_fraction;
    double off_policy_fraction;
    double value_clip_fraction;
    double approx_kl_k1;
    double approx_kl_k2;
    double approx_kl_k3;
    double ratio_mean;
    double ratio_var;
    double ratio_min;
    double ratio_max;
    double entropy_mean;
    double kl_mean;
    double advantage_mean;
    double return_mean;
    double value_mean;
    double explained_variance;
    double tokens;
};

// Which inputs have one number a row.
struct PerRow {
    int32_t advantages;
    int32_t weights;
};

// What the tokens of a row share.
struct RowTerms {
    float log_ratio;   // the logarithm of the row's ratio, before the clamp
    float spread;      // the gradient that all tokens get of it, times D
    float off_policy;  // 1 where tokens with A < 0 are dropped, else 0
};

struct PassArgs {
    const float* logp;          // [rows, columns]
    const float* old_logp;      // [rows, columns]
    const float* advantages;    // [rows, columns], or [rows]
    const float* values;        // [rows, columns], or null: no value term
    const float* old_values;    // [rows, columns], or null: no clip
    const float* returns;       // [rows, columns], or null as values
    const float* entropy;       // [rows, columns], or null
    const float* ref_logp;      // [rows, columns], what the KL term is against, or null
    const float* rollout_logp;  // not looked at
    const float* weights;       // [rows, columns], or [rows], or null: ones
    const uint8_t* mask;        // [rows, columns], or null: ones
    const int64_t* offsets;     // [rows + 1], or null: rows of as many columns
    PpoStats* stats;            // [1]
    float* loss;                // [1], or null
    float* grad_logp;           // [rows, columns], or null
    float* grad_values;         // [rows, columns], or null
    float* grad_entropy;        // [rows, columns], or null
    const float* row_weights;   // [rows] of count, or null: all 1
    const RowTerms* row_terms;  // [rows] of rows, or null
    float* partials;            // [PARTIAL_SUMS, parts]
    Divisor divisor;
    double value_coef;
    double entropy_coef;
    double kl_coef;
    int64_t tokens;  // rows * columns; columns where there are offsets
    int64_t rows;
    int64_t columns;
    int32_t parts;
    int32_t part_tiles;  // tiles of a part
    int32_t aligned;     // all of the above that have a value a token are
    int32_t count_outside;
    float value_range;  // infinity is off
    Clip clip;
    TokenKl kl;
    Family family;
    // Last: before the others they cost the smallest pass registers on sm_120.
    float* row_clips;          // [2, rows], by row_clips for row_extremes, or null
    Divisor entropy_divisor;   // the unmasked tokens, with entropy_own_mean
    int32_t entropy_own_mean;  // the entropy is divided by entropy_divisor, and has no weights
    PerRow per_row;
};

struct RowsArgs {
    const float* logp;            // [rows, columns]
    const float* old_logp;        // [rows, columns]
    const float* advantages;      // [rows, columns], or [rows]
    const float* rollout_logp;    // [rows, columns]; old_logp where there is none
    const float* weights;         // [rows, columns], or [rows], or null: ones
    const uint8_t* mask;          // [rows, columns], or null: ones
    const int64_t* offsets;       // [rows + 1], or null: rows of as many columns
    const float* row_weights;     // [rows] of count, or null: all 1
    RowTerms* row_terms;          // [rows]
    double off_policy_threshold;  // infinity is off
    int64_t rows;
    int64_t columns;  // of all rows where there are offsets
    int32_t aligned;  // all of the above with a value a token are
    PerRow per_row;
    int32_t of_mean;  // a row's ratio is of the mean of log-ratios, not of their sum
    Clip clip;
    Family family;
};

struct LogitsArgs {
    ForwardArgs
        forward;  // of rows * columns rows of logits, or columns, where parts are side by side
    const float* old_logp;     // [rows, columns]
    const float* advantages;   // [rows, columns], or [rows]
    const float* ref_logp;     // [rows, columns], what the KL term is against, or null
    const float* weights;      // [rows, columns], or [rows], or null: ones
    const uint8_t* mask;       // [rows, columns], or null: ones
    const int64_t* offsets;    // [rows + 1], or null: rows of as many columns
    const float* row_weights;  // [rows] of count, or null: all 1
    void* grad_logits;         // [rows, columns, vocab]; may be the logits; null: for another pass
    Divisor divisor;
    Divisor entropy_divisor;  // the unmasked tokens, with entropy_own_mean
    double entropy_coef;      // not 0 only where the entropy is written
    double kl_coef;
    int64_t batch;             // rows
    int64_t columns;           // of all rows where there are offsets
    int32_t kept_groups;       // vectors that the shared memory of the launch takes
    int32_t entropy_own_mean;  // the entropy is divided by entropy_divisor, and has no weights
    PerRow per_row;
    Clip clip;
    TokenKl kl;
    Family family;
};

struct CountArgs {
    const uint8_t* mask;     // [tokens], or null: ones
    const int64_t* offsets;  // [rows + 1], or null: rows of as many tokens
    uint32_t* counts;        // [parts]
    uint32_t* longest;       // [parts], tokens of the part's longest row; or null
    float* row_weights;      // [rows], or null
    int64_t tokens;
    int64_t width;  // of a row; the last one may be shorter
    int64_t rows;
    int64_t part_rows;  // rows of a part
    int32_t parts;
    int32_t team;        // threads that share a row: 1, 2, .. 32, or all of the block
    int32_t count_rows;  // with an unmasked token, and not the tokens
};

struct ScaleArgs {
    const float* upstream;        // [1]
    const float* stored_logp;     // [tokens], or null
    const float* stored_values;   // [tokens], or null
    const float* stored_entropy;  // [tokens], or null
    float* grad_logp;             // [tokens], or null as stored_logp, which it may be
    float* grad_values;           // [tokens], or null as stored_values, which it may be
    float* grad_entropy;          // [tokens], or null as stored_entropy, which it may be
    int64_t tokens;
};

// ---- counting ----

static __device__ __forceinline__ uint32_t count_nonzero(uint32_t bytes) {
    const uint32_t low_bits = 0x7f7f7f7f;
    return __popc((((bytes & low_bits) + low_bits) | bytes) & ~low_bits);
}

// How many of the `len` mask bytes that fall to one thread of `threads` are not 0.
static __device__ __forceinline__ uint32_t count_kept(const uint8_t* mask, int64_t len, int thread,
                                                      int threads) {
    const int64_t head = min(int64_t((16 - reinterpret_cast<uintptr_t>(mask) % 16) % 16), len);
    const int64_t vectors = (len - head) / 16;
    const int64_t tail = head + vectors * 16;
    uint32_t count = 0;
    for (int64_t tile = thread; tile < vectors; tile += IN_FLIGHT * threads) {
        uint4 v[IN_FLIGHT];
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            const int64_t vector = tile + i * threads;
            v[i] = make_uint4(0, 0, 0, 0);
            if (vector < vectors) v[i] = load_shared_by_neighbours(mask + head + vector * 16);
        }
#pragma unroll
        for (int i = 0; i < IN_FLIGHT; i++) {
            count += count_nonzero(v[i].x) + count_nonzero(v[i].y);
            count += count_nonzero(v[i].z) + count_nonzero(v[i].w);
        }
    }
    for (int64_t t = thread; t < head; t += threads) count += mask[t] != 0;
    for (int64_t t = tail + thread; t < len; t += threads) count += mask[t] != 0;
    return count;
}

// The sum over all threads, in every thread. `warps` is shared memory for one value a warp.
template <class T>
static __device__ __forceinline__ T block_sum(T x, T* warps) {
    x = warp_sum(x);
    // Others may still be reading what an earlier call left.
    __syncthreads();
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    return warp_sum(threadIdx.x % WARP < blockDim.x / WARP ? warps[threadIdx.x % WARP] : T(0));
}

static __device__ __forceinline__ uint32_t max_in_warp(uint32_t x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) x = max(x, __shfl_xor_sync(ALL_LANES, x, step));
    return x;
}

// The maximum over all threads, in every thread, as block_sum.
static __device__ __forceinline__ uint32_t block_max(uint32_t x, uint32_t* warps) {
    x = max_in_warp(x);
    __syncthreads();
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = x;
    __syncthreads();
    return max_in_warp(threadIdx.x % WARP < blockDim.x / WARP ? warps[threadIdx.x % WARP] : 0);
}

// Block [threads], a part of the rows a block.
KERNEL(512, 2, ppo_loss_count_f32, CountArgs) {
    SHARED(uint32_t, warps, WARP);
    const int teams = int(blockDim.x) / args.team;
    const int team = int(threadIdx.x) / args.team, rank = int(threadIdx.x) % args.team;
    for (int part = int(blockIdx.x); part < args.parts; part += int(gridDim.x)) {
        const int64_t end = min((part + 1) * args.part_rows, args.rows);
        uint32_t sum = 0, longest = 0;
        // All teams go as often round, for the lanes of several share a warp.
        for (int64_t first = part * args.part_rows; first < end; first += teams) {
            const int64_t row = first + team;
            uint32_t count = 0;
            if (row < end) {
                RowRange range = {row * args.width,
                                  min(args.width, args.tokens - row * args.width)};
                if (args.offsets) range = range_in_pack(args.offsets, row, args.tokens);
                if (args.mask) {
                    count = count_kept(args.mask + range.first, range.tokens, rank, args.team);
                } else if (rank == 0) {
                    count = uint32_t(range.tokens);
                }
                longest = max(longest, uint32_t(min(range.tokens, int64_t(UINT32_MAX))));
            }
            if (args.team > WARP) {
                count = block_sum(count, warps);
            } else {
                for (int step = args.team / 2; step > 0; step /= 2) {
                    count += __shfl_xor_sync(ALL_LANES, count, step);
                }
            }
            if (rank == 0 && row < end) {
                if (args.row_weights) args.row_weights[row] = count ? 1.0f / float(count) : 0.0f;
                sum += args.count_rows ? count > 0 : count;
            }
        }
        sum = block_sum(sum, warps);
        if (threadIdx.x == 0) args.counts[part] = sum;
        if (args.longest) {
            longest = block_max(longest, warps);
            if (threadIdx.x == 0) args.longest[part] = longest;
        }
    }
}

// D, in every thread of a block.
static __device__ __forceinline__ double divisor_of(const Divisor& divisor, const uint8_t* mask,
                                                    int64_t tokens, uint32_t* warps) {
    if (divisor.longest) {
        uint32_t longest = 0;
        double sum = 0.0;
        for (int part = threadIdx.x % WARP; part < divisor.parts; part += WARP) {
            longest = max(longest, divisor.longest[part]);
            sum += divisor.counts[part];
        }
        return (divisor.given != 0.0 ? divisor.given : warp_sum(sum)) * max_in_warp(longest);
    }
    if (divisor.given != 0.0) return divisor.given;
    if (!divisor.counts) {
        return divisor.factor * block_sum(count_kept(mask, tokens, threadIdx.x, blockDim.x), warps);
    }
    double sum = 0.0;
    for (int part = threadIdx.x % WARP; part < divisor.parts; part += WARP) {
        sum += divisor.counts[part];
    }
    return divisor.factor * warp_sum(sum);
}

// ---- loading and storing four tokens ----

// What a pass has in it, apart from the clipped surrogate and the value term.
enum class Has {
    NOTHING,
    MORE_TERMS,  // row weights, entropy and KL
    FAMILY,      // those, and everything else
};

// Four tokens of every input; zeros for what is not given.
struct Group {
    uint4 logp, old_logp, advantages, values, old_values, returns, entropy, ref_logp, weights;
    uint32_t mask;  // a byte a token
};

static __device__ __forceinline__ uint4 load_group(const float* from, int64_t at) {
    return from ? load_once(from + at) : make_uint4(0, 0, 0, 0);
}

// One by one, up to the end.
static __device__ __forceinline__ uint4 load_edge(const float* from, int64_t at, int64_t end) {
    float x[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++) x[i] = from && at + i < end ? from[at + i] : 0.0f;
    return pack(x, float{});
}

static __device__ __forceinline__ uint32_t load_mask_edge(const uint8_t* mask, int64_t at,
                                                          int64_t end) {
    uint32_t bytes = 0;
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const uint32_t byte = at + i >= end ? 0 : mask ? mask[at + i] : 1;
        bytes |= byte << 8 * i;
    }
    return bytes;
}

template <Has HAS>
static __device__ __forceinline__ Group load_group(const PassArgs& args, int64_t at) {
    Group g;
    const float* entropy = HAS != Has::NOTHING ? args.entropy : nullptr;
    const float* ref_logp = HAS != Has::NOTHING ? args.ref_logp : nullptr;
    // What is of rows comes with them.
    const bool of_tokens = !(HAS == Has::FAMILY && args.per_row.advantages);
    const float* advantages = of_tokens ? args.advantages : nullptr;
    const float* weights = HAS == Has::FAMILY && !args.per_row.weights ? args.weights : nullptr;
    if (args.aligned && at + QUAD <= args.tokens) {
        g.logp = load_group(args.logp, at);
        g.old_logp = load_group(args.old_logp, at);
        g.advantages = load_group(advantages, at);
        g.values = load_group(args.values, at);
        g.old_values = load_group(args.old_values, at);
        g.returns = load_group(args.returns, at);
        g.entropy = load_group(entropy, at);
        g.ref_logp = load_group(ref_logp, at);
        g.weights = load_group(weights, at);
        g.mask = 0x01010101;
        if (args.mask) g.mask = *reinterpret_cast<const uint32_t*>(args.mask + at);
    } else {
        const int64_t end = args.tokens;
        g.logp = load_edge(args.logp, at, end);
        g.old_logp = load_edge(args.old_logp, at, end);
        g.advantages = load_edge(advantages, at, end);
        g.values = load_edge(args.values, at, end);
        g.old_values = load_edge(args.old_values, at, end);
        g.returns = load_edge(args.returns, at, end);
        g.entropy = load_edge(entropy, at, end);
        g.ref_logp = load_edge(ref_logp, at, end);
        g.weights = load_edge(weights, at, end);
        g.mask = load_mask_edge(args.mask, at, end);
    }
    return g;
}

static __device__ __forceinline__ void store_group(const PassArgs& args, float* to, int64_t at,
                                                   const float (&x)[QUAD]) {
    if (args.aligned && at + QUAD <= args.tokens) {
        store_once(to + at, pack(x, float{}));
    } else {
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            if (at + i < args.tokens) to[at + i] = x[i];
        }
    }
}

// ---- the terms ----

// The sums of one thread.
struct ThreadSums {
    float sum[PARTIAL_SUMS];
    // The first seven of them, some bits each: a thread has at most 32 tokens of a part. All but those of
    // the family are in the first word, which leaves registers to the pass without it.
    uint32_t counts[2];
};

constexpr int COUNT_BITS = 6;
constexpr int COUNTS_A_WORD = 5;

static __device__ __forceinline__ ThreadSums no_thread_sums() {
    ThreadSums s;
#pragma unroll
    for (int i = 0; i < PARTIAL_SUMS; i++) s.sum[i] = 0.0f;
    s.counts[0] = s.counts[1] = 0;
    return s;
}

static __device__ __forceinline__ void count(ThreadSums& s, Sum which, bool counts) {
    s.counts[which / COUNTS_A_WORD] += uint32_t(counts) << COUNT_BITS * (which % COUNTS_A_WORD);
}

// The second smallest of the unmasked numbers, which of three or four is not the outlier, if there is
// one; NaN without any.
static __device__ __forceinline__ float centre_of(const float (&x)[QUAD],
                                                  const bool (&keep)[QUAD]) {
    float first = NAN, y[QUAD];
#pragma unroll
    for (int i = QUAD - 1; i >= 0; i--) first = keep[i] ? x[i] : first;
#pragma unroll
    for (int i = 0; i < QUAD; i++) y[i] = keep[i] ? x[i] : INFINITY;
    const float low = fmaxf(fminf(y[0], y[1]), fminf(y[2], y[3]));
    const float second = fminf(low, fminf(fmaxf(y[0], y[1]), fmaxf(y[2], y[3])));
    const float centre = fabsf(second) <= LARGEST ? second : first;
    // Infinity less itself would be NaN.
    return fabsf(centre) > LARGEST ? 0.0f : centre;
}

// What a thread keeps in shared memory, as there are no registers left for it: its centres, in the
// order of the sums, and what is touched once for four tokens.
enum Slot { RATIO_SLOT, ADVANTAGE_SLOT = CENTRES, MIN_SLOT, MAX_SLOT, SLOTS };

// The slots of a block, THREADS of each kind; a thread has a pointer to its first.
static __device__ __forceinline__ volatile float& slot(volatile float* slots, int which) {
    return slots[which * THREADS];
}

// Of four tokens.
struct QuadStats {
    float advantage = 0.0f, min = INFINITY, max = -INFINITY;

    __device__ __forceinline__ void add_to(volatile float* slots) const {
        slot(slots, ADVANTAGE_SLOT) = slot(slots, ADVANTAGE_SLOT) + advantage;
        slot(slots, MIN_SLOT) = fminf(slot(slots, MIN_SLOT), min);
        slot(slots, MAX_SLOT) = fmaxf(slot(slots, MAX_SLOT), max);
    }
};

// Adds numbers and their squares around a centre, which is NaN until the thread has seen a token.
static __device__ __forceinline__ void add_around(ThreadSums& s, Sum centre, volatile float* slots,
                                                  const float (&x)[QUAD],
                                                  const bool (&keep)[QUAD]) {
    const int kind = centre - RATIO_CENTRE;
    float c = slot(slots, kind);
    if (c != c) slot(slots, kind) = c = centre_of(x, keep);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float y = keep[i] ? x[i] - c : 0.0f;
        s.sum[RATIO + 2 * kind] += y;
        s.sum[RATIO_SQUARES + 2 * kind] = fmaf(y, y, s.sum[RATIO_SQUARES + 2 * kind]);
    }
}

// The factors of the terms' gradients.
struct Scales { float policy, value, entropy, kl; };

// Whether a token counts as clipped.
static __device__ __forceinline__ bool counts_as_clipped(const PassArgs& args,
                                                         const PolicyTerm& term, bool keep) {
    const bool outside = keep && (term.ratio < args.clip.low || term.ratio > args.clip.high);
    return args.count_outside ? outside : term.is_clipped;
}

// The statistics of a token's policy term; of a masked one only ratio 1 and advantage 0 are seen.
// The first ratio, or 1 if that is an outlier, is the centre of the thread's.
static __device__ __forceinline__ void add_policy_stats(const PassArgs& args, ThreadSums& s,
                                                        const PolicyTerm& term, bool keep, float d,
                                                        float a, volatile float* slots,
                                                        QuadStats& quad) {
    const float ratio = term.ratio;
    float centre = slot(slots, RATIO_SLOT);
    if (keep && centre != centre) {
        centre = ratio <= 2.0f ? ratio : 1.0f;
        slot(slots, RATIO_SLOT) = centre;
    }
    const float excess = keep ? ratio - centre : 0.0f;
    s.sum[RATIO] += excess;
    s.sum[RATIO_SQUARES] = fmaf(excess, excess, s.sum[RATIO_SQUARES]);
    quad.min = keep ? fminf(quad.min, ratio) : quad.min;
    quad.max = keep ? fmaxf(quad.max, ratio) : quad.max;
    const bool clipped = counts_as_clipped(args, term, keep);
    count(s, CLIPPED, clipped);
    count(s, CLIPPED_HIGH, clipped && a > 0.0f);
    count(s, LOWER_CLIPPED, term.is_lower);
    s.sum[LOG_RATIO] += d;
    s.sum[LOG_RATIO_SQUARES] = fmaf(d, d, s.sum[LOG_RATIO_SQUARES]);
    quad.advantage += a;
}

// e^d - 1 - d, whose exponential is at hand.
static __device__ __forceinline__ float k3_of_ratio(float d, float ratio) {
    const float series = k3_series(-d);
    return fabsf(d) < 1.0f ? series : ratio - 1.0f - d;
}

// The clipped surrogate, and its gradient.
static __device__ __forceinline__ void add_policy(const PassArgs& args, ThreadSums& s,
                                                  const Group& g, const bool (&keep)[QUAD],
                                                  const float (&w)[QUAD], float scale,
                                                  volatile float* slots, float (&grad)[QUAD]) {
    float logp[QUAD], old_logp[QUAD], advantages[QUAD];
    unpack(g.logp, logp, float{});
    unpack(g.old_logp, old_logp, float{});
    unpack(g.advantages, advantages, float{});
    s.counts[0] += count_nonzero(g.mask) << COUNT_BITS * TOKENS;
    QuadStats quad;
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        // A masked token becomes one with ratio 1 and advantage 0, which adds nothing.
        const float log_ratio = keep[i] ? logp[i] - old_logp[i] : 0.0f;
        const float a = keep[i] ? advantages[i] : 0.0f;
        const PolicyTerm term = policy_of_token(args.clip, log_ratio, a);
        grad[i] = keep[i] && term.flows ? term.slope * w[i] * scale : 0.0f;
        s.sum[POLICY_LOSS] = fmaf(w[i], term.loss, s.sum[POLICY_LOSS]);
        add_policy_stats(args, s, term, keep[i], term.log_ratio, a, slots, quad);
        s.sum[LOG_RATIO_K3] += k3_of_ratio(term.log_ratio, term.ratio);
    }
    quad.add_to(slots);
}

// Any policy term, and its gradient. `rows` are of the tokens' rows.
static __device__ __forceinline__ void add_family(const PassArgs& args, ThreadSums& s,
                                                  const Group& g, const bool (&keep)[QUAD],
                                                  const float (&w)[QUAD],
                                                  const RowTerms (&rows)[QUAD], float scale,
                                                  volatile float* slots, float (&grad)[QUAD]) {
    const Clip& clip = args.clip;
    const Family& family = args.family;
    float logp[QUAD], old_logp[QUAD], advantages[QUAD], weights[QUAD];
    unpack(g.logp, logp, float{});
    unpack(g.old_logp, old_logp, float{});
    unpack(g.advantages, advantages, float{});
    unpack(g.weights, weights, float{});
    s.counts[0] += count_nonzero(g.mask) << COUNT_BITS * TOKENS;
    QuadStats quad;
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float d = keep[i] ? logp[i] - old_logp[i] : 0.0f;
        const float a = keep[i] ? advantages[i] : 0.0f;
        const float log_ratio = keep[i] && family.of_rows ? rows[i].log_ratio : d;
        PolicyTerm term = policy_of_token(clip, family, log_ratio, logp[i], a);
        const bool log_clipped = keep[i] && is_log_clipped(clip, family, d, a);
        term.is_clipped = keep[i] && (term.is_clipped || log_clipped);
        const bool outside =
            keep[i] && outside_trust_region(clip, family, logp[i], old_logp[i], d, a);
        const bool off_policy = keep[i] && rows[i].off_policy != 0.0f && a < 0.0f;
        const float given = args.weights ? weights[i] : 1.0f;
        // 0 drops even NaN.
        const bool drops = !keep[i] || outside || off_policy || given == 0.0f;
        const float product = drops ? 0.0f : w[i] * given;
        grad[i] = !drops && term.flows ? term.slope * product * scale : 0.0f;
        if (family.spreads) grad[i] = keep[i] && !log_clipped ? rows[i].spread * scale : 0.0f;
        const float loss = drops ? 0.0f : product * term.loss;
        // The CPU refuses it.
        const bool is_negative = keep[i] && given < 0.0f;
        s.sum[POLICY_LOSS] += is_negative ? NAN : loss;
        count(s, OUTSIDE, outside);
        count(s, OFF_POLICY, off_policy);
        const float clamped = clamp(d, clip.log_ratio_limit);
        add_policy_stats(args, s, term, keep[i], clamped, a, slots, quad);
        s.sum[LOG_RATIO_K3] += k3_of_ratio(clamped, family.of_rows ? expf(clamped) : term.ratio);
    }
    quad.add_to(slots);
}

// The KL term; adds its gradient to the policy term's.
template <Has HAS>
static __device__ __forceinline__ void add_kl(const PassArgs& args, ThreadSums& s, const Group& g,
                                              const bool (&keep)[QUAD], const float (&w)[QUAD],
                                              float scale, float (&grad)[QUAD]) {
    float logp[QUAD], old_logp[QUAD], ref_logp[QUAD], weights[QUAD];
    unpack(g.logp, logp, float{});
    unpack(g.ref_logp, ref_logp, float{});
    unpack(g.old_logp, old_logp, float{});
    unpack(g.weights, weights, float{});
    float d[QUAD], value[QUAD], slope[QUAD];
    // Every estimate of d = 0 is 0.
#pragma unroll
    for (int i = 0; i < QUAD; i++) d[i] = keep[i] ? logp[i] - ref_logp[i] : 0.0f;
    kl_of_tokens(args.kl, d, value, slope);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        bool drops = false;
        float weight = w[i];
        if (HAS == Has::FAMILY) {
            const float log_ratio = keep[i] ? logp[i] - old_logp[i] : 0.0f;
            change_kl(args.clip, args.family, log_ratio, d[i], value[i], slope[i]);
            if (args.family.kl_weighted && args.weights) {
                drops = !keep[i] || weights[i] == 0.0f;
                weight *= weights[i];
            }
        }
        s.sum[KL_LOSS] = drops ? s.sum[KL_LOSS] : fmaf(weight, value[i], s.sum[KL_LOSS]);
        s.sum[KL] += value[i];
        // Without a coefficient the slope, which may be infinite, is not wanted.
        const bool flows = keep[i] && !drops && scale != 0.0f;
        if (flows) grad[i] = fmaf(slope[i] * weight, scale, grad[i]);
    }
}

// The value term, and its gradient.
static __device__ __forceinline__ void add_value(const PassArgs& args, ThreadSums& s,
                                                 const Group& g, const bool (&keep)[QUAD],
                                                 const float (&w)[QUAD], float scale,
                                                 volatile float* slots, float (&grad)[QUAD]) {
    float values[QUAD], old_values[QUAD], returns[QUAD];
    unpack(g.values, values, float{});
    unpack(args.old_values ? g.old_values : g.values, old_values, float{});
    unpack(g.returns, returns, float{});
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float error = values[i] - returns[i];
        // From differences, which keep their digits where values are far from 0.
        const float moved = values[i] - old_values[i];
        const float clipped_error = error + (clamp(moved, args.value_range) - moved);
        const float unclipped_loss = error * error;
        const float clipped_loss = clipped_error * clipped_error;
        const bool is_clipped = keep[i] && clipped_loss > unclipped_loss;
        const float larger = is_clipped ? clipped_loss : unclipped_loss;
        // Without a coefficient the error, which may be NaN, is not wanted.
        const bool flows = keep[i] && !is_clipped && scale != 0.0f;
        grad[i] = flows ? error * w[i] * scale : 0.0f;

        count(s, VALUE_CLIPPED, is_clipped);
        s.sum[VALUE_LOSS] = fmaf(w[i], keep[i] ? larger : 0.0f, s.sum[VALUE_LOSS]);
    }
    float residuals[QUAD];
#pragma unroll
    for (int i = 0; i < QUAD; i++) residuals[i] = returns[i] - values[i];
    add_around(s, RETURN_CENTRE, slots, returns, keep);
    add_around(s, RESIDUAL_CENTRE, slots, residuals, keep);
}

// The entropy, and its gradient.
static __device__ __forceinline__ void add_entropy(const PassArgs& args, ThreadSums& s,
                                                   const Group& g, const bool (&keep)[QUAD],
                                                   const float (&w)[QUAD], float scale,
                                                   float (&grad)[QUAD]) {
    float entropy[QUAD];
    unpack(g.entropy, entropy, float{});
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const float h = keep[i] ? entropy[i] : 0.0f;
        const float weight = args.entropy_own_mean ? 1.0f : w[i];
        s.sum[ENTROPY_LOSS] = fmaf(weight, h, s.sum[ENTROPY_LOSS]);
        s.sum[ENTROPY] += h;
        grad[i] = keep[i] ? weight * scale : 0.0f;
    }
}

// A token's row and column; in a pack the column is not known.
struct RowColumn { int64_t row, column; };

// The row that a token of a pack is in: the last that begins there or before. Whatever the offsets hold, it
// is one of the rows.
static __device__ __forceinline__ int64_t row_in_pack(const int64_t* offsets, int64_t rows,
                                                      int64_t token) {
    int64_t row = 0, end = rows;
    while (end - row > 1) {
        const int64_t middle = row + (end - row) / 2;
        if (offsets[middle] <= token) row = middle;
        else end = middle;
    }
    return row;
}

// Whether anything depends on the row of a token.
template <Has HAS>
static __device__ __forceinline__ bool needs_rows(const PassArgs& args) {
    const bool of_family = args.row_terms || args.per_row.advantages || args.per_row.weights;
    return HAS != Has::NOTHING && (args.row_weights || (HAS == Has::FAMILY && of_family));
}

template <Has HAS>
static __device__ __forceinline__ RowColumn place_of(const PassArgs& args, int64_t token) {
    if (!needs_rows<HAS>(args)) return {0, 0};
    if (args.offsets) return {row_in_pack(args.offsets, args.rows, token), 0};
    return {token / args.columns, token % args.columns};
}

// The weights of four tokens in a row, what they share with that, and in `g` what is of rows; those past the
// end are not needed.
template <Has HAS>
static __device__ __forceinline__ void load_rows(const PassArgs& args, int64_t at, RowColumn place,
                                                 float (&w)[QUAD], RowTerms (&rows)[QUAD],
                                                 Group& g) {
    float advantages[QUAD] = {}, weights[QUAD] = {};
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        w[i] = 1.0f;
        rows[i] = {0.0f, 0.0f, 0.0f};
        if (!needs_rows<HAS>(args)) continue;
        if (at + i < args.tokens) {
            if (args.row_weights) w[i] = args.row_weights[place.row];
            if (HAS == Has::FAMILY) {
                if (args.row_terms) rows[i] = args.row_terms[place.row];
                if (args.per_row.advantages) advantages[i] = args.advantages[place.row];
                if (args.per_row.weights && args.weights) weights[i] = args.weights[place.row];
            }
        }
        if (args.offsets) {
            const int64_t next = at + i + 1;
            if (next < args.tokens && args.offsets[place.row + 1] <= next) {
                place.row = row_in_pack(args.offsets, args.rows, next);
            }
            continue;
        }
        place.column++;
        if (place.column == args.columns) place = {place.row + 1, 0};
    }
    if (HAS == Has::FAMILY && args.per_row.advantages) g.advantages = pack(advantages, float{});
    if (HAS == Has::FAMILY && args.per_row.weights) g.weights = pack(weights, float{});
}

// What one thread finds in `count` tokens, whose gradients it writes.
template <Has HAS>
static __device__ __forceinline__ ThreadSums sum_tokens(const PassArgs& args, const Scales& scales,
                                                        int64_t first, int count,
                                                        volatile float* slots) {
    ThreadSums s = no_thread_sums();
#pragma unroll
    for (int kind = 0; kind < CENTRES; kind++) slot(slots, kind) = NAN;
    slot(slots, ADVANTAGE_SLOT) = 0.0f;
    slot(slots, MIN_SLOT) = INFINITY;
    slot(slots, MAX_SLOT) = -INFINITY;
    const RowColumn step = args.offsets ? RowColumn{0, 0} : place_of<HAS>(args, TILE);
    RowColumn place = place_of<HAS>(args, first + threadIdx.x * QUAD);
    for (int i = threadIdx.x * QUAD; i < count; i += TILE) {
        const int64_t at = first + i;
        Group g = load_group<HAS>(args, at);
        bool keep[QUAD];
#pragma unroll
        for (int i = 0; i < QUAD; i++) keep[i] = g.mask & 0xffu << 8 * i;
        float w[QUAD], grad[QUAD];
        RowTerms rows[QUAD];
        load_rows<HAS>(args, at, place, w, rows, g);

        if (HAS == Has::FAMILY) {
            add_family(args, s, g, keep, w, rows, scales.policy, slots, grad);
        } else {
            add_policy(args, s, g, keep, w, scales.policy, slots, grad);
        }
        if (HAS != Has::NOTHING && args.ref_logp) {
            add_kl<HAS>(args, s, g, keep, w, scales.kl, grad);
        }
        if (args.grad_logp) store_group(args, args.grad_logp, at, grad);
        if (args.values) {
            add_value(args, s, g, keep, w, scales.value, slots, grad);
            if (args.grad_values) store_group(args, args.grad_values, at, grad);
        }
        if (HAS != Has::NOTHING && args.entropy) {
            add_entropy(args, s, g, keep, w, scales.entropy, grad);
            if (args.grad_entropy) store_group(args, args.grad_entropy, at, grad);
        }

        if (HAS == Has::NOTHING) continue;
        if (args.offsets) {
            place = place_of<HAS>(args, at + TILE);
            continue;
        }
        place = {place.row + step.row, place.column + step.column};
        if (place.column >= args.columns) place = {place.row + 1, place.column - args.columns};
    }
#pragma unroll
    for (int i = TOKENS; i <= OFF_POLICY; i++) {
        const uint32_t word = s.counts[i / COUNTS_A_WORD];
        s.sum[i] = float(word >> COUNT_BITS * (i % COUNTS_A_WORD) & ((1 << COUNT_BITS) - 1));
    }
    s.sum[ADVANTAGE] = slot(slots, ADVANTAGE_SLOT);
    s.sum[RATIO_MIN] = slot(slots, MIN_SLOT);
    s.sum[RATIO_MAX] = slot(slots, MAX_SLOT);
    // What the block adds up has the centres of its first thread with tokens, values or not.
#pragma unroll
    for (int kind = 0; kind < CENTRES; kind++) {
        const bool any = s.sum[TOKENS] > 0.0f && (kind == 0 || args.values);
        s.sum[RATIO_CENTRE + kind] = any ? slot(slots, kind) : 0.0f;
    }
    return s;
}

// ---- adding up ----

// Sums of x - to and of its square, from those of x - from, of which there are `count`.
template <class T>
static __device__ __forceinline__ void change_centre(T& sum, T& squares, T count, T from, T to) {
    const T shift = from - to;
    squares += shift * (2 * sum + count * shift);
    sum += count * shift;
}

// Where a warp leaves its sums for the block.
struct WarpSums {
    float sum[PARTIAL_SUMS];
    int32_t has_tokens;
};

// The sums of all threads, in the first PARTIAL_SUMS threads, one each. `warps` is shared memory for
// WARPS.
static __device__ __forceinline__ double block_sums(ThreadSums& s, WarpSums* warps) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const bool has_tokens = s.sum[TOKENS] > 0.0f;

    // The centres of the first thread that has tokens are everybody's.
    const int leader = __ffs(__ballot_sync(ALL_LANES, has_tokens)) - 1;
    // Others may still be reading what an earlier call left.
    __syncthreads();
    if (lane == (leader < 0 ? 0 : leader)) {
        warps[warp].has_tokens = has_tokens;
#pragma unroll
        for (int centre = RATIO_CENTRE; centre < PARTIAL_SUMS; centre++) {
            warps[warp].sum[centre] = s.sum[centre];
        }
    }
    __syncthreads();
#pragma unroll
    for (int kind = 0; kind < CENTRES; kind++) {
        float centre = 0.0f;
#pragma unroll
        for (int other = WARPS - 1; other >= 0; other--) {
            if (warps[other].has_tokens) centre = warps[other].sum[RATIO_CENTRE + kind];
        }
        if (has_tokens) {
            change_centre(s.sum[RATIO + 2 * kind], s.sum[RATIO_SQUARES + 2 * kind], s.sum[TOKENS],
                          s.sum[RATIO_CENTRE + kind], centre);
        }
        s.sum[RATIO_CENTRE + kind] = centre;
    }

#pragma unroll
    for (int i = TOKENS; i < RATIO_MIN; i++) s.sum[i] = warp_sum(s.sum[i]);
    s.sum[RATIO_MIN] = -warp_max(-s.sum[RATIO_MIN]);
    s.sum[RATIO_MAX] = warp_max(s.sum[RATIO_MAX]);
    __syncthreads();
    if (lane == 0) {
#pragma unroll
        for (int i = 0; i < PARTIAL_SUMS; i++) warps[warp].sum[i] = s.sum[i];
    }
    __syncthreads();
    const int which = threadIdx.x;
    if (which >= PARTIAL_SUMS) return 0.0;
    double total = warps[0].sum[which];
    for (int other = 1; other < WARPS; other++) {
        const float x = warps[other].sum[which];
        if (which < RATIO_MIN) total += x;
        if (which == RATIO_MIN) total = fmin(total, double(x));
        if (which == RATIO_MAX) total = fmax(total, double(x));
    }
    return total;
}

// Biased variance times the count.
static __device__ __forceinline__ double squares_around_mean(double count, double sum,
                                                             double squares) {
    const double m2 = squares - sum * (sum / count);
    // A comparison, so that NaN stays NaN.
    return m2 < 0.0 ? 0.0 : m2;
}

// The statistics, from the sums of all tokens. By one thread.
template <Has HAS>
static __device__ __forceinline__ void write_stats(const PassArgs& args, const double* sum,
                                                   double divisor) {
    const double count = sum[TOKENS];
    const double nan = NAN;
    const bool any = count > 0.0;
    if (args.divisor.needs_tokens && !any) divisor = 0.0;
    // 0 * infinity is NaN where there is no token.
    const double share = 1.0 / count;
    const double scale = 1.0 / divisor;

    // A sum whose coefficient is 0 stays out, so that its NaN does.
    const double policy_loss = sum[POLICY_LOSS] * scale;
    const double value_loss = 0.5 * sum[VALUE_LOSS] * scale;
    double loss = policy_loss;
    if (args.value_coef != 0.0) loss += args.value_coef * value_loss;
    if (HAS != Has::NOTHING && args.entropy_coef != 0.0) {
        const double of_entropy = args.entropy_own_mean ? (any ? share : 0.0) : scale;
        loss -= args.entropy_coef * (sum[ENTROPY_LOSS] * of_entropy);
    }
    if (args.kl_coef != 0.0) loss += args.kl_coef * (sum[KL_LOSS] * scale);

    const bool has_value = args.values != nullptr;
    const double returns = sum[RETURN_CENTRE] + sum[RETURN] * share;
    const double residual = sum[RESIDUAL_CENTRE] + sum[RESIDUAL] * share;
    const double return_m2 = squares_around_mean(count, sum[RETURN], sum[RETURN_SQUARES]);
    const double residual_m2 = squares_around_mean(count, sum[RESIDUAL], sum[RESIDUAL_SQUARES]);
    const double ratio_m2 = squares_around_mean(count, sum[RATIO], sum[RATIO_SQUARES]);
    PpoStats stats;
    stats.loss = loss;
    stats.policy_loss = policy_loss;
    stats.value_loss = has_value ? value_loss : nan;
    stats.clip_fraction = sum[CLIPPED] * share;
    stats.lower_clip_fraction = sum[LOWER_CLIPPED] * share;
    stats.clip_high_fraction = sum[CLIPPED_HIGH] * share;
    stats.clip_low_fraction = (sum[CLIPPED] - sum[CLIPPED_HIGH]) * share;
    stats.clip_high_row_max = stats.clip_low_row_min = nan;  // row_extremes has them
    stats.outside_fraction = sum[OUTSIDE] * share;
    stats.off_policy_fraction = sum[OFF_POLICY] * share;
    stats.value_clip_fraction = has_value ? sum[VALUE_CLIPPED] * share : nan;
    stats.approx_kl_k1 = -sum[LOG_RATIO] * share;
    stats.approx_kl_k2 = 0.5 * sum[LOG_RATIO_SQUARES] * share;
    // Of a log-ratio of inf the exponential is the larger one.
    const bool infinite = sum[LOG_RATIO_K3] != sum[LOG_RATIO_K3] && sum[LOG_RATIO] > LARGEST;
    stats.approx_kl_k3 = infinite ? double(INFINITY) : sum[LOG_RATIO_K3] * share;
    stats.ratio_mean = sum[RATIO_CENTRE] + sum[RATIO] * share;
    stats.ratio_var = ratio_m2 * share;
    stats.ratio_min = any ? sum[RATIO_MIN] : nan;
    stats.ratio_max = any ? sum[RATIO_MAX] : nan;
    stats.entropy_mean = args.entropy ? sum[ENTROPY] * share : nan;
    stats.kl_mean = args.ref_logp ? sum[KL] * share : nan;
    stats.advantage_mean = sum[ADVANTAGE] * share;
    stats.return_mean = has_value ? returns : nan;
    stats.value_mean = has_value ? returns - residual : nan;
    stats.explained_variance = has_value && return_m2 != 0.0 ? 1.0 - residual_m2 / return_m2 : nan;
    stats.tokens = count;
    *args.stats = stats;
    if (args.loss) *args.loss = float(loss);
}

// Block [THREADS], a part of the tokens a block.
template <Has HAS>
static __device__ __forceinline__ void pass(const PassArgs& args) {
    SHARED(uint32_t, counts, WARP);
    SHARED(WarpSums, warps, WARPS);
    SHARED(double, totals, PARTIAL_SUMS);
    SHARED(double, divisor, 1);
    SHARED(float, slots, SLOTS* THREADS);
    const double counted = divisor_of(args.divisor, args.mask, args.tokens, counts);
    if (threadIdx.x == 0) *divisor = counted;
    const double unit = 1.0 / counted;
    double of_entropy = unit;
    if (HAS != Has::NOTHING && args.entropy_own_mean) {
        of_entropy = 1.0 / divisor_of(args.entropy_divisor, args.mask, args.tokens, counts);
    }
    const Scales scales = {
        float(unit),
        float(args.value_coef * unit),
        float(-args.entropy_coef * of_entropy),
        float(args.kl_coef * unit),
    };
    for (int part = int(blockIdx.x); part < args.parts; part += int(gridDim.x)) {
        const int part_tokens = args.part_tiles * TILE;
        const int64_t first = int64_t(part) * part_tokens;
        const int count = int(min(int64_t(part_tokens), args.tokens - first));
        ThreadSums s = sum_tokens<HAS>(args, scales, first, count, slots + threadIdx.x);
        const double total = block_sums(s, warps);
        if (threadIdx.x >= PARTIAL_SUMS) continue;
        if (args.parts > 1) {
            args.partials[int64_t(threadIdx.x) * args.parts + part] = float(total);
        } else {
            totals[threadIdx.x] = total;
            __syncwarp((1u << PARTIAL_SUMS) - 1);
            if (threadIdx.x == 0) write_stats<HAS>(args, totals, *divisor);
        }
    }
}

KERNEL(256, 3, ppo_loss_pass_f32, PassArgs) { pass<Has::NOTHING>(args); }
KERNEL(256, 2, ppo_loss_pass_full_f32, PassArgs) { pass<Has::MORE_TERMS>(args); }
KERNEL(256, 2, ppo_loss_pass_family_f32, PassArgs) { pass<Has::FAMILY>(args); }

// ---- what the tokens of a row share ----

// Four tokens of a row, of what makes the log-ratios.
struct RowGroup {
    float logp[QUAD], old_logp[QUAD], advantages[QUAD], other[QUAD];
    bool keep[QUAD];
};

// `other` is rollout_logp or the weights, or null. What is of rows is `own_advantage` for all tokens.
template <class Args>
static __device__ __forceinline__ RowGroup load_row_group(const Args& args, const float* other,
                                                          int64_t at, int64_t end, bool aligned,
                                                          float own_advantage) {
    const float* of_tokens = args.per_row.advantages ? nullptr : args.advantages;
    uint4 logp, old_logp, advantages, more;
    uint32_t mask = 0x01010101;
    if (aligned && at + QUAD <= end) {
        logp = load_shared_by_neighbours(args.logp + at);
        old_logp = load_shared_by_neighbours(args.old_logp + at);
        advantages = make_uint4(0, 0, 0, 0);
        if (of_tokens) advantages = load_shared_by_neighbours(of_tokens + at);
        more = make_uint4(0, 0, 0, 0);
        if (other) more = load_shared_by_neighbours(other + at);
        if (args.mask) mask = *reinterpret_cast<const uint32_t*>(args.mask + at);
    } else {
        logp = load_edge(args.logp, at, end);
        old_logp = load_edge(args.old_logp, at, end);
        advantages = load_edge(of_tokens, at, end);
        more = load_edge(other, at, end);
        mask = load_mask_edge(args.mask, at, end);
    }
    RowGroup g;
    unpack(logp, g.logp, float{});
    unpack(old_logp, g.old_logp, float{});
    unpack(advantages, g.advantages, float{});
    unpack(more, g.other, float{});
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        g.keep[i] = mask & 0xffu << 8 * i;
        if (args.per_row.advantages) g.advantages[i] = own_advantage;
    }
    return g;
}

// Block [THREADS], a row a block. Sums in f64: thousands of log-ratios may go into one exponential.
KERNEL(256, 2, ppo_loss_rows_f32, RowsArgs) {
    SHARED(double, warps, WARP);
    const Clip& clip = args.clip;
    const Family& family = args.family;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const RowRange range = range_of_row(args.offsets, row, args.columns);
        const int64_t first = range.first, end = first + range.tokens;
        const bool aligned = args.aligned && first % QUAD == 0;
        const float own_advantage = args.per_row.advantages ? args.advantages[row] : 0.0f;
        double kept = 0.0, total = 0.0, excess = 0.0;
        for (int64_t at = first + threadIdx.x * QUAD; at < end; at += TILE) {
            const RowGroup g =
                load_row_group(args, args.rollout_logp, at, end, aligned, own_advantage);
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                if (!g.keep[i]) continue;
                const float d = g.logp[i] - g.old_logp[i], a = g.advantages[i];
                const bool clipped = is_log_clipped(clip, family, d, a);
                const double exact = double(g.logp[i]) - double(g.old_logp[i]);
                kept += 1.0;
                total += clipped ? double(a > 0.0f ? clip.high : clip.low) : exact;
                const double over = double(g.other[i]) - double(g.logp[i]);
                excess += g.other[i] != g.other[i] ? 0.0 : over;
            }
        }
        kept = block_sum(kept, warps);
        total = block_sum(total, warps);
        excess = block_sum(excess, warps);
        const double log_ratio = args.of_mean ? total / kept : total;
        const bool off_policy = excess / kept > args.off_policy_threshold;
        double spread = 0.0;
        if (family.spreads) {
            // Without row_weights all rows have the same one, which is in D.
            const float w = args.row_weights ? args.row_weights[row] : 1.0f;
            const float* weights = args.per_row.weights ? nullptr : args.weights;
            const float own_weight =
                args.per_row.weights && args.weights ? args.weights[row] : 1.0f;
            for (int64_t at = first + threadIdx.x * QUAD; at < end; at += TILE) {
                const RowGroup g = load_row_group(args, weights, at, end, aligned, own_advantage);
#pragma unroll
                for (int i = 0; i < QUAD; i++) {
                    const float d = g.logp[i] - g.old_logp[i], a = g.advantages[i];
                    const float given = weights ? g.other[i] : own_weight;
                    const bool drops =
                        !g.keep[i] || given == 0.0f || (off_policy && a < 0.0f) ||
                        outside_trust_region(clip, family, g.logp[i], g.old_logp[i], d, a);
                    if (drops) continue;
                    const PolicyTerm term =
                        policy_of_token(clip, family, float(log_ratio), g.logp[i], a);
                    if (term.flows) spread += term.slope * (w * given);
                }
            }
            spread = block_sum(spread, warps);
            if (args.of_mean) spread /= kept;
        }
        if (threadIdx.x == 0) {
            args.row_terms[row] = {float(log_ratio), kept > 0.0 ? float(spread) : 0.0f,
                                   off_policy ? 1.0f : 0.0f};
        }
    }
}

// Block [THREADS], a row a block: the shares of the row's tokens that are clipped and have A > 0, and of those
// that are clipped and do not; NaN without tokens.
KERNEL(256, 2, ppo_loss_row_clips_f32, PassArgs) {
    SHARED(double, warps, WARP);
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const RowRange range = range_of_row(args.offsets, row, args.columns);
        RowTerms terms = {0.0f, 0.0f, 0.0f};
        if (args.row_terms) terms = args.row_terms[row];
        const int64_t first = range.first, end = first + range.tokens;
        const bool aligned = args.aligned && first % QUAD == 0;
        const float own_advantage = args.per_row.advantages ? args.advantages[row] : 0.0f;
        double kept = 0.0, high = 0.0, low = 0.0;
        const auto count = [&](const RowGroup& g) {
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                if (!g.keep[i]) continue;
                const float a = g.advantages[i], d = g.logp[i] - g.old_logp[i];
                const float log_ratio = args.family.of_rows ? terms.log_ratio : d;
                PolicyTerm term = policy_of_token(args.clip, args.family, log_ratio, g.logp[i], a);
                term.is_clipped |= is_log_clipped(args.clip, args.family, d, a);
                const bool clipped = counts_as_clipped(args, term, true);
                kept += 1.0;
                high += clipped && a > 0.0f;
                low += clipped && !(a > 0.0f);
            }
        };
        // Of two tiles the loads are in flight at once.
        for (int64_t at = first + threadIdx.x * QUAD; at < end; at += 2 * TILE) {
            const auto load = [&](int64_t at) {
                return load_row_group(args, nullptr, at, end, aligned, own_advantage);
            };
            const RowGroup one = load(at), two = load(at + TILE);
            count(one);
            count(two);
        }
        kept = block_sum(kept, warps);
        high = block_sum(high, warps);
        low = block_sum(low, warps);
        if (threadIdx.x == 0) {
            args.row_clips[row] = float(high / kept);
            args.row_clips[args.rows + row] = float(low / kept);
        }
    }
}

// One block [THREADS]: the extremes of those over rows, into the statistics that are there.
KERNEL(256, 1, ppo_loss_row_extremes_f32, PassArgs) {
    SHARED(float, highest, WARP);
    SHARED(float, lowest, WARP);
    float high = -INFINITY, low = INFINITY;
    for (int64_t row = threadIdx.x; row < args.rows; row += THREADS) {
        // NaN is less than no number, and more than none.
        high = fmaxf(high, args.row_clips[row]);
        low = fminf(low, args.row_clips[args.rows + row]);
    }
    high = warp_max(high);
    low = -warp_max(-low);
    if (threadIdx.x % WARP == 0) {
        highest[threadIdx.x / WARP] = high;
        lowest[threadIdx.x / WARP] = low;
    }
    __syncthreads();
    if (threadIdx.x != 0) return;
    for (int other = 1; other < WARPS; other++) {
        high = fmaxf(high, highest[other]);
        low = fminf(low, lowest[other]);
    }
    const bool any = high >= 0.0f;
    args.stats->clip_high_row_max = any ? double(high) : double(NAN);
    args.stats->clip_low_row_min = any ? double(low) : double(NAN);
}

// The first part that has tokens, or 0.
static __device__ __forceinline__ int first_part(const PassArgs& args) {
    const float* tokens = args.partials + int64_t(TOKENS) * args.parts;
    for (int first = 0; first < args.parts; first += WARP) {
        const int part = first + threadIdx.x % WARP;
        const bool has_tokens = part < args.parts && tokens[part] > 0.0f;
        const uint32_t found = __ballot_sync(ALL_LANES, has_tokens);
        if (found) return first + __ffs(found) - 1;
    }
    return 0;
}

// The sum `which` of all parts, by a warp.
static __device__ __forceinline__ double merge_parts(const PassArgs& args, int which) {
    const auto all = [&](int sum) { return args.partials + int64_t(sum) * args.parts; };
    const float* mine = all(which);
    const int lane = threadIdx.x % WARP;
    if (which == RATIO_MIN || which == RATIO_MAX) {
        const float sign = which == RATIO_MIN ? -1.0f : 1.0f;
        float most = -INFINITY;
        for (int part = lane; part < args.parts; part += WARP) {
            most = fmaxf(most, sign * mine[part]);
        }
        return sign * warp_max(most);
    }
    if (which < RATIO) {
        double total = 0.0;
#pragma unroll 8
        for (int part = lane; part < args.parts; part += WARP) total += mine[part];
        return warp_sum(total);
    }
    if (args.parts == 0) return 0.0;
    const int kind = which >= RATIO_CENTRE ? which - RATIO_CENTRE : (which - RATIO) / 2;
    const float* centres = all(RATIO_CENTRE + kind);
    const double centre = centres[first_part(args)];
    if (which >= RATIO_CENTRE) return centre;
    const float* sums = all(RATIO + 2 * kind);
    const float* all_squares = all(RATIO_SQUARES + 2 * kind);
    double total = 0.0;
#pragma unroll 4
    for (int part = lane; part < args.parts; part += WARP) {
        const double count = all(TOKENS)[part];
        double sum = sums[part], squares = all_squares[part];
        if (count > 0.0) change_centre(sum, squares, count, double(centres[part]), centre);
        total += which == RATIO + 2 * kind ? sum : squares;
    }
    return warp_sum(total);
}

// One block [PARTIAL_SUMS x 32], a sum a warp.
KERNEL(PARTIAL_SUMS* WARP, 1, ppo_loss_merge_f32, PassArgs) {
    SHARED(double, totals, PARTIAL_SUMS);
    SHARED(uint32_t, counts, WARP);
    const int which = threadIdx.x / WARP;
    const double total = merge_parts(args, which);
    if (threadIdx.x % WARP == 0) totals[which] = total;
    const double divisor = divisor_of(args.divisor, args.mask, args.tokens, counts);
    __syncthreads();
    if (threadIdx.x == 0) write_stats<Has::MORE_TERMS>(args, totals, divisor);
}

// ---- from logits ----

// The row of a token, if something is of rows.
static __device__ __forceinline__ int64_t row_of_token(const LogitsArgs& args, int64_t token) {
    if (!args.row_weights && !args.per_row.advantages && !args.per_row.weights) return 0;
    return args.offsets ? row_in_pack(args.offsets, args.batch, token) : token / args.columns;
}

// The factors of a token's gradients that all share.
struct Units { double terms, entropy; };

// What the loss makes of the logits of a token: by one thread.
static __device__ __forceinline__ KnownOfRow known_of_row(const LogitsArgs& args, int64_t token,
                                                          Target target, const RowValues& values,
                                                          const Units& units) {
    const int64_t row = row_of_token(args, token);
    const float w = args.row_weights ? args.row_weights[row] : 1.0f;
    const Family& family = args.family;
    const float logp = values.logp, old_logp = args.old_logp[token];
    const float a = args.advantages[args.per_row.advantages ? row : token];
    const float d = logp - old_logp;
    const float given = args.weights ? args.weights[args.per_row.weights ? row : token] : 1.0f;
    const double unit = units.terms;
    const PolicyTerm term = policy_of_token(args.clip, family, d, logp, a);
    const bool drops =
        given == 0.0f || outside_trust_region(args.clip, family, logp, old_logp, d, a);
    float grad = !drops && term.flows ? term.slope * (w * given) * float(unit) : 0.0f;
    if (args.ref_logp && args.kl_coef != 0.0) {
        const float against[1] = {logp - args.ref_logp[token]};
        float value[1], slope[1];
        kl_of_tokens(args.kl, against, value, slope);
        change_kl(args.clip, family, d, against[0], value[0], slope[0]);
        const float weight = family.kl_weighted ? w * given : w;
        if (!family.kl_weighted || given != 0.0f) {
            grad = fmaf(slope[0] * weight, float(args.kl_coef * unit), grad);
        }
    }
    const bool has_entropy = args.entropy_coef != 0.0;
    const float weight = args.entropy_own_mean ? 1.0f : w;
    const float grad_entropy =
        has_entropy ? weight * float(-args.entropy_coef * units.entropy) : 0.0f;
    return {target, grad, grad_entropy, values.max, values.log_sum, values.entropy};
}

// Block as of sums_of_row, WIDE, a row a block. As much of a row as the shared memory takes stays there
// for the gradient, if logits and gradient are aligned; the rest is read again, and is in L2 still while
// there are no more blocks than run at once.
template <class T>
static __device__ __forceinline__ void from_logits(const LogitsArgs& args) {
    SHARED(uint32_t, counts, WARP);
    SHARED(KnownOfRow, shared, 1);
    SHARED(Units, units, 1);
    DYNAMIC_SHARED(uint4, groups);
    const int64_t rows = args.forward.rows, vocab = args.forward.columns;
    const double divisor = divisor_of(args.divisor, args.mask, rows, counts);
    double of_entropy = divisor;
    if (args.entropy_own_mean) {
        of_entropy = divisor_of(args.entropy_divisor, args.mask, rows, counts);
    }
    // For the first thread, where they take no register.
    if (threadIdx.x == 0) *units = {1.0 / divisor, 1.0 / of_entropy};
    for (int64_t row = blockIdx.x; row < rows; row += gridDim.x) {
        const T* logits = static_cast<const T*>(args.forward.logits) + row * vocab;
        T* grad_logits = nullptr;
        if (args.grad_logits) grad_logits = static_cast<T*>(args.grad_logits) + row * vocab;
        const bool aligned = misalignment(logits, 16) == 0 && misalignment(grad_logits, 16) == 0;
        const Kept kept = {aligned ? groups : nullptr, args.kept_groups};
        const Forward<T> forward(args.forward, kept);
        typename Forward<T>::Item item = {{Kind::IGNORED, 0}, 0.0f};
        if (!args.mask || args.mask[row]) item = forward.item(row);
        const bool reads = forward.reads(item);
        SoftmaxSums sums = no_sums();
        // Others may still be writing the row before this one.
        __syncthreads();
        if (reads) sums = sums_of_row<true>(forward, row);
        if (threadIdx.x == 0) {
            const RowValues values =
                reads ? forward.values(item, sums) : values_unread_of(item.target);
            forward.write(row, values);
            if (grad_logits) *shared = known_of_row(args, row, item.target, values, *units);
        }
        // The next row begins while this one is written.
        const int64_t next = row + gridDim.x;
        if (next < rows && (!args.mask || args.mask[next])) {
            constexpr int LINE = 128 / sizeof(T);
            const int64_t column = threadIdx.x * LINE;
            if (column < vocab) prefetch(logits + gridDim.x * vocab + column);
        }
        __syncthreads();
        if (!grad_logits) continue;
        const Share share = {0, 1, int(threadIdx.x), int(blockDim.x)};
        write_gradient(logits, grad_logits, vocab, *shared, args.forward.inverse_temperature, share,
                       kept);
    }
}

KERNEL(768, 1, ppo_loss_from_logits_f32, LogitsArgs) { from_logits<float>(args); }
KERNEL(768, 1, ppo_loss_from_logits_f16, LogitsArgs) { from_logits<f16>(args); }
KERNEL(768, 1, ppo_loss_from_logits_bf16, LogitsArgs) { from_logits<bf16>(args); }

// ---- scaling ----

static __device__ __forceinline__ float scaled(float x, float factor) {
    // A masked token's 0 stays 0.
    return x == 0.0f ? 0.0f : x * factor;
}

// Block [threads]; nobody needs another.
KERNEL(256, 4, ppo_loss_scale_f32, ScaleArgs) {
    const float factor = *args.upstream;
    const int64_t tokens = args.tokens;
    const int64_t thread = int64_t(blockIdx.x) * blockDim.x + threadIdx.x;
    const int64_t threads = int64_t(gridDim.x) * blockDim.x;
#pragma unroll 1
    for (int which = 0; which < 3; which++) {
        // Selected, not indexed: an array of them would be in local memory.
        const float* from = which == 0   ? args.stored_logp
                            : which == 1 ? args.stored_values
                                         : args.stored_entropy;
        float* to = which == 0 ? args.grad_logp : which == 1 ? args.grad_values : args.grad_entropy;
        if (!from || (from == to && factor == 1.0f)) continue;
        const uintptr_t address = reinterpret_cast<uintptr_t>(from);
        // Where the two are aligned differently they have no vectors in common: all is tail.
        const bool apart = (address ^ reinterpret_cast<uintptr_t>(to)) & 15;
        const int64_t head = apart ? 0 : min(int64_t((16 - address % 16) % 16 / 4), tokens);
        const int64_t vectors = apart ? 0 : (tokens - head) / QUAD;
        const int64_t tail = head + vectors * QUAD;
        for (int64_t tile = thread; tile < vectors; tile += IN_FLIGHT * threads) {
            uint4 v[IN_FLIGHT];
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                const int64_t vector = tile + i * threads;
                if (vector < vectors) v[i] = load_once(from + head + vector * QUAD);
            }
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                const int64_t vector = tile + i * threads;
                float x[QUAD];
                unpack(v[i], x, float{});
#pragma unroll
                for (int j = 0; j < QUAD; j++) x[j] = scaled(x[j], factor);
                if (vector < vectors) store_once(to + head + vector * QUAD, pack(x, float{}));
            }
        }
        const auto one = [&](int64_t t) { to[t] = scaled(from[t], factor); };
        if (thread < head) one(thread);
        for (int64_t t = tail + thread; t < tokens; t += threads) one(t);
    }
}
