// Preference losses: sums over the tokens of responses, the losses of pairs, and their gradients spread
// over the tokens. src/preference/mod.rs has the formulas, src/preference/cuda.rs the launches.
//
// Arrays of tokens are [rows, columns] in f32, the mask in u8. Rows are the chosen responses and then the
// rejected ones; in KTO every row is a unit of its own, else row i and row i + units are.
//
// sums. A warp takes a row of few tokens, a block a longer one, in segments of 128 tokens: the sums of
// log-probabilities and of the reference's, and how many tokens are unmasked.
//
// merge_tails. For LD-DPO: a warp goes once more through the longer response of each pair, and sums by
// themselves the tokens that the other one does not have.
//
// merge_ranks. For losses of sorted log-ratios: the rank of an element is how many are before it, which is
// counted. No sort, and nothing to be moved in a sort; of P pairs P^2 comparisons, which for batches that
// there are take less than reading their tokens.
//
// merge_pairs. A thread takes a pair: its loss and derivatives, and of 1024 pairs the sums that the
// statistics are made of.
//
// finish. One block: those sums together, the statistics, and what gradients are multiplied by.
//
// finish_tokens. Writes the gradients, a warp or a block a row.
//
// What never exists: a matrix of masked log-probabilities, or one of the log-ratios of tokens. What it
// leaves out: the gradient waits for the whole batch's denominator, so the mask is read twice.
//
// Bytes of a token: sums reads 4, 4 more for ref_logp, 1 of the mask; finish_tokens reads the 1 of the mask
// and writes 4.
//
// Numbers. Sums, scores and what becomes of them before the loss are in f64: a log-ratio is the small
// difference of sums that may be in the thousands. The losses are in f32, of scores that are rounded once;
// expf and log1pf are good to 2 ulp. Masked tokens are selected away, never multiplied: they may be NaN.

#include "common/rows.cuh"
#include "common/tokens.cuh"

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;

// Units of a part, a few a thread.
constexpr int PART_UNITS = 1024;

// In the order of the Rust enums.
enum class Link : int32_t {
    LOGISTIC,
    HINGE,
    SQUARE,
    EXO,
    NCA,
    BCO,
    SPPO,
    APO_ZERO,
    APO_DOWN,
    DISCOPOP,
    KTO
};
enum class Transform : int32_t { IDENTITY, FORWARD_KL, JENSEN_SHANNON, ALPHA, LOG_ODDS, ALPHA_PO };
enum class Sorted : int32_t { NOTHING, PAIRS, SIDES };

// What the options come down to; src/preference/mod.rs says what each is.
struct Terms {
    double beta;
    double inner;
    double outer;
    double right;
    double wrong;
    double gamma;
    double exponent;
    double tau;
    double desirable;
    double undesirable;
    double center;
    double ld_alpha;
    Link link;
    Transform transform;
    Sorted sorted;
    int32_t averages;
};

// The statistics, NaN where not defined; src/preference/mod.rs says what each is.
struct PreferenceStats {
    double loss;
    double preference_loss;
    double sft_loss;
    double accuracy;
    double reward_margin;
    double chosen_reward;
    double rejected_reward;
    double chosen_logp;
    double rejected_logp;
    double chosen;
    double rejected;
};

// What the tokens of a row add up to.
struct RowSums {
    double plain;      // of the log-probabilities
    double policy;     // the same with the weights of tails
    double reference;  // likewise
    double length;
    int64_t tail;  // the first of the tokens that the other response does not have
};

// The gradient of a row's tokens, but for the factors of the whole batch.
struct RowGradient {
    float head;
    float rest;  // from the tail on
    float sft;   // 1 where the likelihood term is of the row
    float unused;
};

// What sums of units are divided by in the end; 0 is what is counted.
struct Scales {
    double denominator;
    double sft_coef;
    double sft_denominator;
};

struct PassArgs {
    const float* logp;       // [rows, columns]
    const float* ref_logp;   // [rows, columns], or null
    const float* ref_sums;   // [rows], or null
    const uint8_t* mask;     // [rows, columns], or null: ones
    const int64_t* lengths;  // [rows], or null: those of the mask
    const float* weights;    // [units], or null: ones
    const float* margin;     // [units], or null: zeros
    const uint8_t* labels;   // [rows], or null: pairs
    const float* kl;         // [1], or null: 0
    const int64_t* offsets;  // [rows + 1], or null: rows of as many columns
    PreferenceStats* stats;  // [1]
    float* loss;             // [1], or null
    float* losses;           // [units], or null
    float* rewards;          // [rows], or null
    float* grad_logp;        // [rows, columns], or null
    RowSums* sums;           // [rows]
    RowGradient* gradients;  // [rows]
    double* sorted;          // [2, units], or null where nothing is
    int64_t* ranks;          // [2, units], or null likewise
    double* partials;        // [parts, PARTIAL_SUMS]
    float* factors;          // [2]: of gradients, and of the likelihood term's
    int64_t rows;
    int64_t columns;  // of all rows where there are offsets
    int64_t units;
    int32_t parts;
    int32_t row_threads;  // threads that share a row: a warp, or all of the block
    Scales scales;
    Terms terms;
};

// ---- sums over tokens ----

struct TokenSums {
    double policy, reference;
    double count;
};

// How they are added up.
struct AddTokens {
    static __device__ __forceinline__ TokenSums none() { return {0.0, 0.0, 0.0}; }

    static __device__ __forceinline__ TokenSums warp_merge(const TokenSums& s) {
        return {warp_sum(s.policy), warp_sum(s.reference), warp_sum(s.count)};
    }
};

static __device__ __forceinline__ double sum_kept(const float (&x)[QUAD], unsigned keep) {
    double sum = 0.0;
#pragma unroll
    for (int i = 0; i < QUAD; i++) sum += keep >> i & 1 ? double(x[i]) : 0.0;
    return sum;
}

// The lane's unmasked tokens of a segment, a bit each.
static __device__ __forceinline__ unsigned kept(const uint8_t* mask, const Place& place,
                                                int segment) {
    return mask ? flag_bits(load_flags(mask, place, segment))
                : lowest_bits(place.left - first_of_lane(segment));
}

// The rows that fall to this warp or block, one after the other: work(row, warp, warps) of the warp's place
// among those that share the row.
template <class Work>
static __device__ __forceinline__ void for_rows(const PassArgs& args, Work work) {
    const bool by_block = args.row_threads > WARP;
    const int warp = threadIdx.x / WARP;
    const int64_t teams = by_block ? 1 : WARPS;
    const int64_t first = int64_t(blockIdx.x) * teams + (by_block ? 0 : warp);
    for (int64_t row = first; row < args.rows; row += gridDim.x * teams) {
        work(row, by_block ? warp : 0, by_block ? WARPS : 1);
    }
}

// Block [THREADS].
KERNEL(256, 3, preference_sums_f32, PassArgs) {
    SHARED(TokenSums, of_warps, WARP);
    for_rows(args, [&](int64_t row, int warp, int warps) {
        const RowRange range = range_of_row(args.offsets, row, args.columns);
        TokenSums s = AddTokens::none();
        for (int64_t at = int64_t(warp) * IN_FLIGHT * SEGMENT; at < range.tokens;
             at += int64_t(warps) * IN_FLIGHT * SEGMENT) {
            const Place place(range, at);
            float x[IN_FLIGHT][QUAD];
            unsigned keep[IN_FLIGHT];
            load_tokens(args.logp, place, x);
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) keep[j] = kept(args.mask, place, j);
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) {
                s.policy += sum_kept(x[j], keep[j]);
                s.count += __popc(keep[j]);
            }
            if (!args.ref_logp) continue;
            load_tokens(args.ref_logp, place, x);
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) s.reference += sum_kept(x[j], keep[j]);
        }
        s = warps > 1 ? block_merge(AddTokens{}, s, of_warps) : AddTokens::warp_merge(s);
        if (warp != 0 || threadIdx.x % WARP != 0) return;
        if (args.ref_sums) s.reference = args.ref_sums[row];
        args.sums[row] = {s.policy, s.policy, s.reference, s.count, range.tokens};
    });
}

// Block [THREADS], a row a warp.
KERNEL(256, 2, preference_merge_tails_f32, PassArgs) {
    const int lane = threadIdx.x % WARP;
    const int64_t first = int64_t(blockIdx.x) * WARPS + threadIdx.x / WARP;
    for (int64_t row = first; row < args.rows; row += int64_t(gridDim.x) * WARPS) {
        const double shorter = args.sums[(row + args.units) % args.rows].length;
        if (args.sums[row].length <= shorter) continue;
        double head = 0.0, rest = 0.0, ref_head = 0.0, ref_rest = 0.0;
        const RowRange range = range_of_row(args.offsets, row, args.columns);
        int64_t before = 0, tail = range.tokens;
        for (int64_t at = 0; at < range.tokens; at += SEGMENT) {
            const Place place(range, at);
            float x[1][QUAD], reference[1][QUAD] = {};
            load_tokens(args.logp, place, x);
            if (args.ref_logp) load_tokens(args.ref_logp, place, reference);
            const unsigned keep = kept(args.mask, place, 0);
            // Unmasked tokens up to this lane's last.
            int upto = __popc(keep);
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                const int below = __shfl_up_sync(ALL_LANES, upto, step);
                if (lane >= step) upto += below;
            }
            const int64_t mine = before + upto - __popc(keep);
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                if (!(keep >> i & 1)) continue;
                const int64_t position = mine + __popc(keep & ((1u << i) - 1));
                if (double(position) < shorter) {
                    head += double(x[0][i]);
                    ref_head += double(reference[0][i]);
                } else {
                    rest += double(x[0][i]);
                    ref_rest += double(reference[0][i]);
                    tail = min(tail, at + first_of_lane(0) + i);
                }
            }
            before += __shfl_sync(ALL_LANES, upto, WARP - 1);
        }
        head = warp_sum(head), rest = warp_sum(rest);
        ref_head = warp_sum(ref_head), ref_rest = warp_sum(ref_rest);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            const int64_t other = __shfl_xor_sync(ALL_LANES, tail, step);
            tail = min(tail, other);
        }
        if (lane != 0) continue;
        RowSums* sums = args.sums + row;
        sums->policy = fma(rest, args.terms.ld_alpha, head);
        if (args.ref_logp) sums->reference = fma(ref_rest, args.terms.ld_alpha, ref_head);
        sums->tail = tail;
    }
}

// ---- scores ----

// What stands for the log-ratio of a response in its loss, and its derivative by the sum.
struct Score {
    double value;
    double slope;
    double reward;
    double length;
};

static __device__ __forceinline__ double length_of(const PassArgs& args, int64_t row) {
    if (!args.lengths) return args.sums[row].length;
    const int64_t given = args.lengths[row];
    // Nobody has looked.
    return given < 0 ? double(NAN) : double(given);
}

// What scores are divided by.
static __device__ __forceinline__ double divisor_of(const PassArgs& args, double length) {
    return !args.terms.averages || length < 1.0 ? 1.0 : length;
}

static __device__ __forceinline__ Score score_of(const PassArgs& args, int64_t row) {
    const Terms& terms = args.terms;
    const RowSums sums = args.sums[row];
    const double length = length_of(args, row), n = divisor_of(args, length);
    const double x = sums.policy - sums.reference, mean = x / n, e = terms.exponent;
    Score score = {mean, 1.0 / n, mean, length};
    // The same way for all threads.
    switch (terms.transform) {
        case Transform::IDENTITY:
            break;
        case Transform::FORWARD_KL:
        case Transform::ALPHA:
            score.value = expm1(e * x) / e / n;
            score.slope = exp(e * x) / n;
            break;
        case Transform::JENSEN_SHANNON: {
            const double z = exp(-fabs(x));
            // ln 2 + ln s(x)
            score.value = (0.693147180559945309 + (x > 0.0 ? 0.0 : x) - log1p(z)) / n;
            score.slope = (x < 0.0 ? 1.0 : z) / (1.0 + z) / n;
            break;
        }
        case Transform::LOG_ODDS: {
            const double rest = 0.0 - expm1(mean);
            // Of a probability below a half ln(1 - p) is p itself, nearly.
            score.value = mean - (mean < -0.7 ? log1p(-exp(mean)) : log(rest));
            score.slope = 1.0 / rest / n;
            break;
        }
        case Transform::ALPHA_PO:
            score.value = expm1(e * mean) / e;
            score.slope = exp(e * mean) / n;
            score.reward = score.value;
            break;
    }
    score.reward *= terms.beta;
    return score;
}

// ---- sorted log-ratios ----

// What is sorted: of side 0 or 1.
static __device__ __forceinline__ double sorted_value(const PassArgs& args, int side,
                                                      int64_t unit) {
    const int64_t other = unit + args.units;
    if (args.terms.sorted == Sorted::SIDES) return score_of(args, side ? other : unit).value;
    const RowSums chosen = args.sums[unit], rejected = args.sums[other];
    const double x = side ? chosen.reference : chosen.policy;
    const double y = side ? rejected.reference : rejected.policy;
    return x / divisor_of(args, length_of(args, unit)) -
           y / divisor_of(args, length_of(args, other));
}

// Numbers in the order of their values, NaN at the ends.
static __device__ __forceinline__ int64_t order_of(double x) {
    const int64_t bits = __double_as_longlong(x);
    return bits ^ int64_t(uint64_t(bits >> 63) >> 1);
}

// Block [THREADS], an element a thread.
KERNEL(256, 1, preference_merge_ranks_f32, PassArgs) {
    SHARED(int64_t, orders, THREADS);
    const int64_t blocks_of_side = (args.units + THREADS - 1) / THREADS;
    for (int64_t block = blockIdx.x; block < 2 * blocks_of_side; block += gridDim.x) {
        const int side = int(block / blocks_of_side);
        const int64_t unit = block % blocks_of_side * THREADS + threadIdx.x;
        const bool inside = unit < args.units;
        const double value = inside ? sorted_value(args, side, unit) : 0.0;
        const int64_t mine = order_of(value);
        int64_t rank = 0;
        for (int64_t first = 0; first < args.units; first += THREADS) {
            const int64_t theirs = first + threadIdx.x;
            // Others may still be reading the tile before.
            __syncthreads();
            if (theirs < args.units)
                orders[threadIdx.x] = order_of(sorted_value(args, side, theirs));
            __syncthreads();
            const int count = int(min(int64_t(THREADS), args.units - first));
            for (int i = 0; i < count; i++) {
                // Equal ones in the order in which they are.
                rank += orders[i] < mine || (orders[i] == mine && first + i < unit);
            }
        }
        if (!inside) continue;
        args.ranks[side * args.units + unit] = rank;
        args.sorted[side * args.units + rank] = value;
    }
}

// ---- losses ----

// ln s(h), ln s(-h), s(h) and s(-h), with one exponential and one logarithm.
struct Logistic { float ln, ln_of_minus, s, of_minus; };

static __device__ __forceinline__ Logistic logistic(float h) {
    const float z = expf(-fabsf(h));
    const float ln = log1pf(z), large = 1.0f / (1.0f + z), small = z / (1.0f + z);
    const bool positive = h >= 0.0f;
    // Comparisons, so that NaN stays NaN.
    return {(h > 0.0f ? 0.0f : h) - ln, (h < 0.0f ? 0.0f : -h) - ln, positive ? large : small,
            positive ? small : large};
}

// A loss and its derivatives by a and b.
struct Loss { float loss, a, b; };

// Of h alone: a loss and its derivative.
static __device__ __forceinline__ Loss of_h(float loss, float slope) {
    return {loss, slope, -slope};
}

// The loss of the scores a, b and h, before `outer`; in KTO of a, by the label.
static __device__ __forceinline__ Loss loss_of(const Terms& terms, float a, float b, float h,
                                               bool desirable) {
    const float right = float(terms.right), wrong = float(terms.wrong);
    // The same way for all threads.
    switch (terms.link) {
        case Link::LOGISTIC: {
            const Logistic l = logistic(h);
            // Where the share is 0 the logarithm, which may be infinite, is not wanted.
            const float of_wrong = wrong == 0.0f ? 0.0f : wrong * l.ln_of_minus;
            return of_h(-right * l.ln - of_wrong, wrong * l.s - right * l.of_minus);
        }
        case Link::HINGE: {
            const float room = 1.0f - h;
            // A comparison, so that NaN stays NaN.
            return of_h(room < 0.0f ? 0.0f : room, h < 1.0f ? -1.0f : 0.0f);
        }
        case Link::SQUARE: {
            const float off = h - 0.5f;
            return of_h(off * off, 2.0f * off);
        }
        case Link::EXO: {
            const Logistic l = logistic(h);
            return of_h(l.s * (l.ln - right) + l.of_minus * (l.ln_of_minus - wrong),
                        l.s * l.of_minus * (h - right + wrong));
        }
        case Link::NCA: {
            const Logistic x = logistic(a), y = logistic(b);
            return {-x.ln - 0.5f * (x.ln_of_minus + y.ln_of_minus), 0.5f * x.s - x.of_minus,
                    0.5f * y.s};
        }
        case Link::BCO: {
            const Logistic x = logistic(a), y = logistic(b);
            return {-x.ln - y.ln_of_minus, -x.of_minus, y.s};
        }
        case Link::SPPO: {
            const float x = a - 0.5f, y = b + 0.5f;
            return {x * x + y * y, 2.0f * x, 2.0f * y};
        }
        case Link::APO_ZERO: {
            const Logistic x = logistic(a), y = logistic(b);
            return {x.of_minus + y.s, -x.s * x.of_minus, y.s * y.of_minus};
        }
        case Link::APO_DOWN: {
            const Logistic x = logistic(a), both = logistic(h);
            const float slope = both.s * both.of_minus;
            return {x.s + both.of_minus, x.s * x.of_minus - slope, slope};
        }
        case Link::DISCOPOP: {
            const float tau = float(terms.tau);
            const Logistic l = logistic(h), g = logistic(h / tau);
            // e^-h g, whose factors may be infinite and 0: below 0 as one exponential.
            const bool below = h < 0.0f;
            const float product = expf(below ? h / tau - h : -h) * (below ? g.of_minus : g.s);
            return of_h(product - l.ln * g.of_minus, l.ln * (g.s * g.of_minus / tau) -
                                                         l.of_minus * g.of_minus +
                                                         product * (g.of_minus / tau - 1.0f));
        }
        default: {
            const Logistic x = logistic(a);
            const float slope = x.s * x.of_minus;
            const float weight = float(desirable ? terms.desirable : terms.undesirable);
            return {weight * (desirable ? x.of_minus : x.s),
                    desirable ? -weight * slope : weight * slope, 0.0f};
        }
    }
}

// What some units add up to.
enum Sum {
    UNITS,
    LOSS,
    SFT,  // negative log-likelihood of the chosen responses
    SFT_TOKENS,
    CORRECT,
    CHOSEN,
    REJECTED,
    CHOSEN_REWARD,
    REJECTED_REWARD,
    CHOSEN_LOGP,
    REJECTED_LOGP,
    PARTIAL_SUMS,
};

struct UnitSums { double sum[PARTIAL_SUMS]; };

// How they are added up.
struct AddUnits {
    static __device__ __forceinline__ UnitSums none() {
        UnitSums s;
#pragma unroll
        for (int i = 0; i < PARTIAL_SUMS; i++) s.sum[i] = 0.0;
        return s;
    }

    static __device__ __forceinline__ UnitSums warp_merge(const UnitSums& from) {
        UnitSums s;
#pragma unroll
        for (int i = 0; i < PARTIAL_SUMS; i++) s.sum[i] = warp_sum(from.sum[i]);
        return s;
    }
};

// A row that counts: its gradient, by the derivative of the loss by its score, and its reward.
static __device__ __forceinline__ void write_row(const PassArgs& args, int64_t row,
                                                 const Score& score, double by_score, bool sft) {
    // A derivative of 0 is one of 0, however steep the score is.
    const double head = by_score == 0.0 ? 0.0 : by_score * score.slope;
    args.gradients[row] = {float(head), float(head * args.terms.ld_alpha), sft ? 1.0f : 0.0f, 0.0f};
    if (args.rewards) args.rewards[row] = float(score.reward);
}

// A row that does not.
static __device__ __forceinline__ void write_nothing(const PassArgs& args, int64_t row) {
    args.gradients[row] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (args.rewards) args.rewards[row] = 0.0f;
}

static __device__ __forceinline__ void add_unit(const PassArgs& args, int64_t unit, UnitSums& s) {
    const Terms& terms = args.terms;
    const bool paired = terms.link != Link::KTO;
    const int64_t row = unit, other = unit + args.units;
    const double weight = args.weights ? double(args.weights[unit]) : 1.0;
    if (weight == 0.0) {
        write_nothing(args, row);
        if (paired) write_nothing(args, other);
        if (args.losses) args.losses[unit] = 0.0f;
        return;
    }
    const Score x = score_of(args, row);
    const Score y = paired ? score_of(args, other) : Score{0.0, 0.0, 0.0, 0.0};
    const double kl = args.kl ? double(*args.kl) : 0.0;
    const double shift = terms.gamma + (args.margin ? double(args.margin[unit]) : 0.0);
    const int label = args.labels ? args.labels[unit] : 1;
    // A label of no class, which nobody has looked for.
    const float valid = label > 1 ? NAN : 1.0f;
    const float a = float(terms.inner * (x.value - kl)) * valid;
    const float b = float(terms.inner * y.value);

    double by_x = x.value - kl - y.value, by_y = by_x;
    if (terms.sorted != Sorted::NOTHING) {
        const int64_t first = args.ranks[unit], second = args.ranks[other];
        if (terms.sorted == Sorted::PAIRS) {
            by_x = by_y = args.sorted[first] - args.sorted[args.units + first];
        } else {
            by_x = x.value - args.sorted[args.units + first];
            by_y = args.sorted[second] - y.value;
        }
    }
    Loss loss = loss_of(terms, a, b, float(terms.inner * by_x - shift), label != 0);
    if (terms.sorted == Sorted::SIDES) {
        loss.b = loss_of(terms, a, b, float(terms.inner * by_y - shift), true).b;
    }
    if (terms.center != 0.0) {
        const float center = float(terms.center), sum = a + b;
        loss.loss += center * sum * sum;
        loss.a += 2.0f * center * sum;
        loss.b += 2.0f * center * sum;
    }

    const double weighted = double(loss.loss) * terms.outer * weight;
    const double scale = terms.inner * terms.outer * weight;
    if (args.losses) args.losses[unit] = float(weighted);
    write_row(args, row, x, scale * double(loss.a), paired);
    s.sum[UNITS] += 1.0;
    s.sum[LOSS] += weighted;
    const double one = label != 0 ? 1.0 : 0.0;
    s.sum[CHOSEN] += one;
    s.sum[REJECTED] += 1.0 - one;
    s.sum[CHOSEN_REWARD] += label != 0 ? x.reward : 0.0;
    s.sum[REJECTED_REWARD] += label != 0 ? 0.0 : x.reward;
    s.sum[CHOSEN_LOGP] += label != 0 ? args.sums[row].policy : 0.0;
    s.sum[REJECTED_LOGP] += label != 0 ? 0.0 : args.sums[row].policy;
    if (!paired) return;
    write_row(args, other, y, scale * double(loss.b), false);
    s.sum[SFT] -= args.sums[row].plain;
    s.sum[SFT_TOKENS] += x.length;
    s.sum[CORRECT] += x.reward > y.reward ? 1.0 : 0.0;
    s.sum[REJECTED] += 1.0;
    s.sum[REJECTED_REWARD] += y.reward;
    s.sum[REJECTED_LOGP] += args.sums[other].policy;
}

// Block [THREADS], a part of the units a block.
KERNEL(256, 1, preference_merge_pairs_f32, PassArgs) {
    SHARED(UnitSums, warps, WARP);
    for (int part = int(blockIdx.x); part < args.parts; part += int(gridDim.x)) {
        const int64_t first = int64_t(part) * PART_UNITS;
        const int64_t end = min(first + PART_UNITS, args.units);
        UnitSums s = AddUnits::none();
        for (int64_t unit = first + threadIdx.x; unit < end; unit += THREADS) {
            add_unit(args, unit, s);
        }
        s = block_merge(AddUnits{}, s, warps);
        if (threadIdx.x == 0) {
            double* partials = args.partials + int64_t(part) * PARTIAL_SUMS;
#pragma unroll
            for (int i = 0; i < PARTIAL_SUMS; i++) partials[i] = s.sum[i];
        }
    }
}

// One block [THREADS].
KERNEL(256, 1, preference_finish_f32, PassArgs) {
    SHARED(UnitSums, warps, WARP);
    UnitSums s = AddUnits::none();
    for (int part = int(threadIdx.x); part < args.parts; part += THREADS) {
        const double* partials = args.partials + int64_t(part) * PARTIAL_SUMS;
#pragma unroll
        for (int i = 0; i < PARTIAL_SUMS; i++) s.sum[i] += partials[i];
    }
    s = block_merge(AddUnits{}, s, warps);
    if (threadIdx.x != 0) return;
    const Scales& scales = args.scales;
    const bool paired = args.terms.link != Link::KTO, has_sft = scales.sft_coef != 0.0;
    const double divisor = scales.denominator != 0.0 ? scales.denominator : s.sum[UNITS];
    const double sft_divisor =
        scales.sft_denominator != 0.0 ? scales.sft_denominator : s.sum[SFT_TOKENS];
    // Of nothing that counts the gradients are 0, and the loss is NaN.
    args.factors[0] = divisor == 0.0 ? 0.0f : float(1.0 / divisor);
    args.factors[1] = !has_sft || sft_divisor == 0.0 ? 0.0f : float(-scales.sft_coef / sft_divisor);

    const double nan = NAN;
    PreferenceStats stats;
    stats.preference_loss = s.sum[LOSS] / divisor;
    stats.sft_loss = paired ? s.sum[SFT] / sft_divisor : nan;
    stats.loss = stats.preference_loss;
    if (has_sft) stats.loss += scales.sft_coef * stats.sft_loss;
    stats.accuracy = paired ? s.sum[CORRECT] / s.sum[UNITS] : nan;
    stats.chosen_reward = s.sum[CHOSEN_REWARD] / s.sum[CHOSEN];
    stats.rejected_reward = s.sum[REJECTED_REWARD] / s.sum[REJECTED];
    stats.reward_margin = stats.chosen_reward - stats.rejected_reward;
    stats.chosen_logp = s.sum[CHOSEN_LOGP] / s.sum[CHOSEN];
    stats.rejected_logp = s.sum[REJECTED_LOGP] / s.sum[REJECTED];
    stats.chosen = s.sum[CHOSEN];
    stats.rejected = s.sum[REJECTED];
    *args.stats = stats;
    if (args.loss) *args.loss = float(stats.loss);
}

// Block [THREADS].
KERNEL(256, 4, preference_finish_tokens_f32, PassArgs) {
    for_rows(args, [&](int64_t row, int warp, int warps) {
        const RowGradient gradient = args.gradients[row];
        const int64_t tail = args.sums[row].tail;
        const float sft = gradient.sft * args.factors[1];
        const float head = fmaf(gradient.head, args.factors[0], sft);
        const float rest = fmaf(gradient.rest, args.factors[0], sft);
        const RowRange range = range_of_row(args.offsets, row, args.columns);
        for (int64_t at = int64_t(warp) * IN_FLIGHT * SEGMENT; at < range.tokens;
             at += int64_t(warps) * IN_FLIGHT * SEGMENT) {
            const Place place(range, at);
            unsigned keep[IN_FLIGHT];
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) keep[j] = kept(args.mask, place, j);
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) {
                float x[QUAD];
#pragma unroll
                for (int i = 0; i < QUAD; i++) {
                    const bool is_rest = at + first_of_lane(j) + i >= tail;
                    x[i] = keep[j] >> i & 1 ? (is_rest ? rest : head) : 0.0f;
                }
                store_tokens(args.grad_logp, place, j, x);
            }
        }
    });
}
