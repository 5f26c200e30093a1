// Train-inference corrections: weights, rejections and statistics. src/correction/mod.rs has the formulas,
// src/correction/cuda.rs the launches.
//
//     d = old_logp - rollout_logp    w = e^d, of a token or of its row    weight = w within bounds, or 0
//
// old_logp, rollout_logp and the weights are [B, T] in f32, mask and kept in u8.
//
// warp, block, and with rejections warp_rejects, block_rejects. A row a warp, or a row a block, in
// segments of 128 tokens, four tokens a lane. Where something of a whole row decides, the row is read for
// it first, and once more for its weights, then from L1 or L2. A block takes a part of the rows, as many
// as depends on the shape alone, one after the other; it keeps its sums in registers, those of rows in
// shared memory, and leaves them for merge. No row is spread over several multiprocessors: of few long
// rows, some of those are idle.
//
// merge. One block, a sum a warp: adds what the parts left, in order, and writes the statistics and the
// factor of the normalisation.
//
// scale. The weights times that factor, where there is a normalisation.
//
// Bytes of a token: 8 read, 1 for the mask; 4 written, 1 for kept. scale reads and writes 4.
//
// Numbers. e^x is expf, to 2 ulp. The log-ratios of a row are added up in f64, exact differences: thousands
// of them may go into one exponential. Masked tokens are selected away, never multiplied: they may be
// NaN. Whether a row is rejected every thread finds for itself, from sums that are the same in all.

#include "common/map.cuh"
#include "common/rows.cuh"
#include "common/token_kl.cuh"
#include "common/tokens.cuh"

// Segments of both inputs that a warp loads before it uses the first. Metrics take registers.
template <bool REJECTS>
constexpr int SEGMENTS = REJECTS ? 1 : IN_FLIGHT / 2;

constexpr int MAX_WARPS = 256 / WARP;

// In the order of the Rust enums.
enum class WeightLevel : int32_t { TOKEN, SEQUENCE_MEAN, SEQUENCE_SUM, NONE };
enum class Outside : int32_t { TRUNCATE, ZERO };
enum class RejectionMetric : int32_t {
    NONE,
    RATIO,
    K2,
    K3,
    REVERSE_K3,
    BINARY_KL,
    BINARY_KL_MAX,
    TOTAL_VARIATION
};
enum class RejectionLevel : int32_t { TOKEN, SEQUENCE_MEAN, SEQUENCE_SUM, SEQUENCE_MAX };

// What a part of the rows adds up to.
enum Sum {
    TOKENS,
    UNSCORED,
    REJECTED,
    BELOW,
    ABOVE,
    ROWS,
    REJECTED_ROWS,
    WEIGHT,
    WEIGHT_SQUARES,
    LOG_RATIO,
    LOG_RATIO_ABS,
    K3,
    RATIO_SQUARES,
    MULT_PROB_ERROR,
    ROW_RATIO_SQUARES,
    LOG_PPL,
    ROLLOUT_LOG_PPL,
    NORMALISER,        // the weights before rejections
    NORMALISER_COUNT,  // of tokens or rows
    // From here on maxima.
    LOG_RATIO_ABS_MAX,
    K3_MAX,
    WEIGHT_MAX,
    MINUS_WEIGHT_MIN,
    PARTIAL_SUMS,
};
static_assert(PARTIAL_SUMS <= WARP, "one block has a warp for each");

// The statistics; src/correction/mod.rs says what each is.
struct CorrectionStats {
    double tokens;
    double unscored_tokens;
    double rejected_tokens;
    double below_tokens;
    double above_tokens;
    double rows;
    double rejected_rows;
    double weight_sum;
    double weight_square_sum;
    double log_ratio_sum;
    double log_ratio_abs_sum;
    double k3_sum;
    double ratio_square_sum;
    double mult_prob_error_sum;
    double row_ratio_square_sum;
    double log_ppl_sum;
    double rollout_log_ppl_sum;
    double log_ratio_abs_max;
    double k3_max;
    double weight_max;
    double weight_min;
    double ess;
};

// Bounds as they are compared, of ratios their logarithms; infinity is off.
struct RejectionArgs {
    RejectionMetric metric;
    RejectionLevel level;
    float low;
    float high;
};

struct RuleArgs {
    WeightLevel level;
    Outside outside;
    int32_t needs_rows;  // something of a whole row decides
    float log_ratio_limit;
    float low;  // of the weight
    float high;
    RejectionArgs rejections[2];
};

struct PassArgs {
    const float* old_logp;      // [rows, columns]
    const float* rollout_logp;  // [rows, columns]
    const uint8_t* mask;        // [rows, columns], or null: ones
    const int64_t* offsets;     // [rows + 1], or null: rows of as many columns
    float* weights;             // [rows, columns]
    CorrectionStats* stats;     // [1]
    uint8_t* kept;              // [rows, columns], or null
    double* partials;           // [PARTIAL_SUMS, parts]
    double* factor;             // [1], of the normalisation
    int64_t rows;
    int64_t columns;
    int64_t part_rows;  // rows of a part
    int32_t parts;
    int32_t normalise;
    RuleArgs rule;
};

struct ScaleArgs {
    float* weights;        // [tokens]
    const double* factor;  // [1]
    int64_t tokens;
};

// ---- tokens ----

// The lane's tokens of N segments. One that is masked is one of probability 1 by both engines.
template <int N>
struct Tokens {
    float old_logp[N][QUAD];
    float rollout_logp[N][QUAD];  // the trainer's, where there is none
    float d[N][QUAD];             // before the clamp
    unsigned keep[N];             // a bit each
    unsigned scored[N];
};

template <int N>
static __device__ __forceinline__ Tokens<N> load_chunk(const PassArgs& args, const Place& place) {
    Tokens<N> t;
    load_tokens(args.old_logp, place, t.old_logp);
    load_tokens(args.rollout_logp, place, t.rollout_logp);
    load_mask(args.mask, place, t.keep);
#pragma unroll
    for (int j = 0; j < N; j++) {
        t.scored[j] = 0;
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            const bool keep = t.keep[j] >> i & 1;
            const bool scored = keep && !isnan(t.rollout_logp[j][i]);
            t.scored[j] |= unsigned(scored) << i;
            t.old_logp[j][i] = keep ? t.old_logp[j][i] : 0.0f;
            t.rollout_logp[j][i] = scored ? t.rollout_logp[j][i] : t.old_logp[j][i];
            t.d[j][i] = scored ? t.old_logp[j][i] - t.rollout_logp[j][i] : 0.0f;
        }
    }
    return t;
}

// e^k - 1 - k.
static __device__ __forceinline__ float k3_of(float k) {
    float value, slope;
    k3_of_token(-k, value, slope);
    return value;
}

// 0 where masked. Called and not compiled into every place: eight copies of all metrics take more
// registers than there are.
static __device__ NOINLINE float metric_of(RejectionMetric metric, float limit, float old_logp,
                                           float rollout_logp, float d) {
    const float k = clamp(d, limit);
    // The same way for all threads.
    switch (metric) {
        case RejectionMetric::RATIO:
            return k;
        case RejectionMetric::K2:
            return 0.5f * k * k;
        case RejectionMetric::K3:
            return k3_of(k);
        case RejectionMetric::REVERSE_K3:
            return k3_of(-k);
        case RejectionMetric::BINARY_KL:
            return binary_kl(old_logp, rollout_logp, d);
        case RejectionMetric::BINARY_KL_MAX: {
            const float a = binary_kl(old_logp, rollout_logp, d);
            const float b = binary_kl(rollout_logp, old_logp, -d);
            return b > a ? b : a;
        }
        case RejectionMetric::TOTAL_VARIATION:
            return fabsf(probability_moved(old_logp, rollout_logp, d));
        default:
            return 0.0f;
    }
}

// ---- rows ----

// A rejection's metric over a row.
struct RowMetric {
    double sum;
    float low, high;
};

// What is added up over a row.
struct RowSums {
    double d;  // before the clamp
    double old_logp, rollout_logp;
    float kept, scored, rejected;
    RowMetric metrics[2];
};

static __device__ __forceinline__ RowSums no_row_sums() {
    const RowMetric none = {0.0, INFINITY, -INFINITY};
    return {0.0, 0.0, 0.0, 0.0f, 0.0f, 0.0f, {none, none}};
}

static __device__ __forceinline__ void merge_metric(RowMetric& m, const RowMetric& other) {
    m.sum += other.sum;
    m.low = fminf(m.low, other.low);
    m.high = fmaxf(m.high, other.high);
}

// Those of all threads that share the row, in each of them; the metrics too where there are some. `warps`
// is shared memory for one a warp.
template <bool BLOCK, bool METRICS>
static __device__ __forceinline__ RowSums merge_row(RowSums s, RowSums* warps) {
    s.d = warp_sum(s.d);
    s.old_logp = warp_sum(s.old_logp);
    s.rollout_logp = warp_sum(s.rollout_logp);
    s.kept = warp_sum(s.kept);
    s.scored = warp_sum(s.scored);
    s.rejected = warp_sum(s.rejected);
#pragma unroll
    for (int i = 0; METRICS && i < 2; i++) {
        s.metrics[i].sum = warp_sum(s.metrics[i].sum);
        s.metrics[i].low = -warp_max(-s.metrics[i].low);
        s.metrics[i].high = warp_max(s.metrics[i].high);
    }
    if (!BLOCK) return s;
    // Others may still be reading what an earlier call left.
    __syncthreads();
    if (threadIdx.x % WARP == 0) warps[threadIdx.x / WARP] = s;
    __syncthreads();
    s = warps[0];
    for (int warp = 1; warp < int(blockDim.x) / WARP; warp++) {
        const RowSums& other = warps[warp];
        s.d += other.d;
        s.old_logp += other.old_logp;
        s.rollout_logp += other.rollout_logp;
        s.kept += other.kept;
        s.scored += other.scored;
        s.rejected += other.rejected;
#pragma unroll
        for (int i = 0; METRICS && i < 2; i++) merge_metric(s.metrics[i], other.metrics[i]);
    }
    return s;
}

template <int N>
static __device__ __forceinline__ void add_tokens(RowSums& s, const Tokens<N>& t) {
#pragma unroll
    for (int j = 0; j < N; j++) {
        s.kept += float(__popc(t.keep[j]));
        s.scored += float(__popc(t.scored[j]));
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            if (t.scored[j] >> i & 1) {
                const double old_logp = t.old_logp[j][i], rollout_logp = t.rollout_logp[j][i];
                s.d += old_logp - rollout_logp;
                s.old_logp += old_logp;
                s.rollout_logp += rollout_logp;
            }
        }
    }
}

static __device__ __forceinline__ bool is_of_row(const RejectionArgs& rejection) {
    return rejection.metric != RejectionMetric::NONE && rejection.level != RejectionLevel::TOKEN;
}

// Adds the metrics of rows. The loop over rejections stays one: their code is long.
template <int N>
static __device__ __forceinline__ void add_metrics(RowSums& s, const RuleArgs& rule,
                                                   const Tokens<N>& t) {
#pragma unroll 1
    for (int which = 0; which < 2; which++) {
        const RejectionArgs rejection = rule.rejections[which];
        if (!is_of_row(rejection)) continue;
        RowMetric m = {0.0, INFINITY, -INFINITY};
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                const float x = metric_of(rejection.metric, rule.log_ratio_limit, t.old_logp[j][i],
                                          t.rollout_logp[j][i], t.d[j][i]);
                const bool keep = t.keep[j] >> i & 1;
                m.sum += double(x);
                m.low = keep ? fminf(m.low, x) : m.low;
                m.high = keep ? fmaxf(m.high, x) : m.high;
            }
        }
        // Not by index, which would be local memory.
        if (which == 0) merge_metric(s.metrics[0], m);
        if (which == 1) merge_metric(s.metrics[1], m);
    }
}

static __device__ __forceinline__ bool rejects_row(const RejectionArgs& rejection,
                                                   const RowMetric& m, const RowSums& s) {
    if (!is_of_row(rejection) || s.kept == 0.0f) return false;
    if (rejection.level == RejectionLevel::SEQUENCE_MAX) {
        return m.low < rejection.low || m.high > rejection.high;
    }
    const double sum = rejection.metric == RejectionMetric::RATIO ? s.d : m.sum;
    const double x = rejection.level == RejectionLevel::SEQUENCE_MEAN ? sum / double(s.kept) : sum;
    return x < double(rejection.low) || x > double(rejection.high);
}

// e^x of a row's log-ratio, within the limit.
static __device__ __forceinline__ double ratio_of_row(double x, float limit) {
    // Comparisons, so that NaN stays NaN.
    const double most = limit;
    return exp(x < -most ? -most : x > most ? most : x);
}

// ---- weights ----

// The sums of one thread.
struct ThreadSums {
    uint32_t below, above;
    double weight, weight_squares, log_ratio, log_ratio_abs, k3, ratio_squares, mult_prob_error;
    double normaliser;  // of tokens
    float log_ratio_abs_max, k3_max, weight_max, minus_weight_min;
};

// What the first of the threads that share rows adds up for them: in shared memory, so that the others
// have no registers for it.
struct LeaderSums {
    double tokens, unscored, rejected;
    double rows, rejected_rows, row_ratio_squares, log_ppl, rollout_log_ppl;
    double normaliser, normaliser_count;
};

static __device__ __forceinline__ ThreadSums no_thread_sums() {
    ThreadSums s = {};
    s.minus_weight_min = -INFINITY;
    return s;
}

static __device__ __forceinline__ bool weighs_rows(const RuleArgs& rule) {
    return rule.level == WeightLevel::SEQUENCE_MEAN || rule.level == WeightLevel::SEQUENCE_SUM;
}

// A weight within its bounds, and on which side it was outside.
struct Weight {
    float bounded;
    bool below, above;
};

static __device__ __forceinline__ Weight weight_of(const RuleArgs& rule, float w) {
    const bool bounds = rule.level != WeightLevel::NONE;
    const bool below = bounds && w < rule.low, above = bounds && w > rule.high;
    float bounded = below ? rule.low : above ? rule.high : w;
    if (rule.outside == Outside::ZERO && (below || above)) bounded = 0.0f;
    return {bounded, below, above};
}

// The weights of some segments of a row that is `rejected` or not, of which `ratio` is that of the row.
// Returns how many scored tokens have weight 0.
template <bool REJECTS, int N>
static __device__ __forceinline__ uint32_t weigh(const PassArgs& args, const Place& place,
                                                 const Tokens<N>& t, bool rejected, float ratio,
                                                 ThreadSums& s) {
    const RuleArgs& rule = args.rule;
    const float limit = rule.log_ratio_limit;
    unsigned survives[N];
#pragma unroll
    for (int j = 0; j < N; j++) survives[j] = rejected ? 0 : t.keep[j];
#pragma unroll 1
    for (int which = 0; REJECTS && which < 2; which++) {
        const RejectionArgs rejection = rule.rejections[which];
        if (rejection.metric == RejectionMetric::NONE || is_of_row(rejection)) continue;
#pragma unroll
        for (int j = 0; j < N; j++) {
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                const float x = metric_of(rejection.metric, limit, t.old_logp[j][i],
                                          t.rollout_logp[j][i], t.d[j][i]);
                const bool outside = x < rejection.low || x > rejection.high;
                survives[j] &= ~(unsigned(outside) << i);
            }
        }
    }
    uint32_t zeros = 0;
#pragma unroll
    for (int j = 0; j < N; j++) {
        float weights[QUAD];
        uint32_t flags = 0;
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            const bool keep = t.keep[j] >> i & 1, scored = t.scored[j] >> i & 1;
            const float d = clamp(t.d[j][i], limit), r = expf(d);
            const Weight w = weight_of(rule, rule.level == WeightLevel::TOKEN ? r : ratio);
            const bool stays = survives[j] >> i & 1;
            const float weight = stays ? w.bounded : 0.0f;
            weights[i] = weight;
            flags |= uint32_t(stays) << 8 * i;
            s.normaliser += keep && !weighs_rows(rule) ? double(w.bounded) : 0.0;
            if (!scored) continue;
            const float k3 = k3_of(d);
            zeros += weight == 0.0f;
            s.below += w.below;
            s.above += w.above;
            s.weight += double(weight);
            s.weight_squares = fma(double(weight), double(weight), s.weight_squares);
            s.log_ratio += double(d);
            s.log_ratio_abs += double(fabsf(d));
            s.k3 += double(k3);
            s.ratio_squares = fma(double(r), double(r), s.ratio_squares);
            s.mult_prob_error += double(d < 0.0f ? 1.0f / r : r);
            s.log_ratio_abs_max = fmaxf(s.log_ratio_abs_max, fabsf(d));
            s.k3_max = fmaxf(s.k3_max, k3);
            s.weight_max = fmaxf(s.weight_max, weight);
            s.minus_weight_min = fmaxf(s.minus_weight_min, -weight);
        }
        store_tokens(args.weights, place, j, weights);
        if (args.kept) store_flags(args.kept, place, j, flags);
    }
    return zeros;
}

// Whether this is the first of the threads that share rows.
template <bool BLOCK>
static __device__ __forceinline__ bool leads() {
    return (BLOCK ? threadIdx.x : threadIdx.x % WARP) == 0;
}

// One row, by a warp, or by all warps of a block.
template <bool BLOCK, bool REJECTS>
static __device__ __forceinline__ void correct_row(const PassArgs& args, int64_t row, ThreadSums& s,
                                                   LeaderSums* leader, RowSums* warps) {
    constexpr int N = SEGMENTS<REJECTS>, CHUNK = N * SEGMENT;
    const RuleArgs& rule = args.rule;
    const RowRange range = range_of_row(args.offsets, row, args.columns);
    const int64_t first = BLOCK ? threadIdx.x / WARP * CHUNK : 0;
    const int64_t step = BLOCK ? blockDim.x / WARP * CHUNK : CHUNK;
    RowSums of_row = no_row_sums();
    bool rejected = false;
    float ratio = 1.0f;
    if (rule.needs_rows) {
        for (int64_t at = first; at < range.tokens; at += step) {
            const Tokens<N> t = load_chunk<N>(args, Place(range, at));
            add_tokens(of_row, t);
            if (REJECTS) add_metrics(of_row, rule, t);
        }
        of_row = merge_row<BLOCK, REJECTS>(of_row, warps);
#pragma unroll
        for (int i = 0; i < 2; i++) {
            const RejectionArgs& rejection = rule.rejections[i];
            rejected = rejected || (REJECTS && rejects_row(rejection, of_row.metrics[i], of_row));
        }
        if (rule.level == WeightLevel::SEQUENCE_MEAN) {
            ratio = float(ratio_of_row(of_row.d / double(of_row.kept), rule.log_ratio_limit));
        } else if (rule.level == WeightLevel::SEQUENCE_SUM) {
            ratio = float(ratio_of_row(of_row.d, rule.log_ratio_limit));
        }
    }
    RowSums again = no_row_sums();
    for (int64_t at = first; at < range.tokens; at += step) {
        const Place place(range, at);
        const Tokens<N> t = load_chunk<N>(args, place);
        if (!rule.needs_rows) add_tokens(again, t);
        again.rejected += float(weigh<REJECTS>(args, place, t, rejected, ratio, s));
    }
    again = merge_row<BLOCK, false>(again, warps);
    if (!rule.needs_rows) of_row = again;
    if (!leads<BLOCK>() || of_row.kept == 0.0f) return;
    const double kept = of_row.kept, scored = of_row.scored;
    leader->normaliser += weighs_rows(rule) ? double(weight_of(rule, ratio).bounded) : 0.0;
    leader->normaliser_count += weighs_rows(rule) ? 1.0 : kept;
    leader->unscored += kept - scored;
    if (scored == 0.0) return;
    const double row_ratio = ratio_of_row(of_row.d, rule.log_ratio_limit);
    leader->tokens += scored;
    leader->rejected += double(again.rejected);
    leader->rows += 1.0;
    leader->rejected_rows += again.rejected > 0.0f ? 1.0 : 0.0;
    leader->row_ratio_squares += row_ratio * row_ratio;
    leader->log_ppl -= of_row.old_logp / scored;
    leader->rollout_log_ppl -= of_row.rollout_logp / scored;
}

// The sums of all threads of the block, written to the part's place. `warps` is shared memory.
static __device__ __forceinline__ void write_part(const PassArgs& args, int part,
                                                  const ThreadSums& s, const LeaderSums& leader,
                                                  double* warps) {
    const double sums[PARTIAL_SUMS] = {
        leader.tokens,
        leader.unscored,
        leader.rejected,
        double(s.below),
        double(s.above),
        leader.rows,
        leader.rejected_rows,
        s.weight,
        s.weight_squares,
        s.log_ratio,
        s.log_ratio_abs,
        s.k3,
        s.ratio_squares,
        s.mult_prob_error,
        leader.row_ratio_squares,
        leader.log_ppl,
        leader.rollout_log_ppl,
        s.normaliser + leader.normaliser,
        leader.normaliser_count,
        s.log_ratio_abs_max,
        s.k3_max,
        s.weight_max,
        s.minus_weight_min,
    };
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    // Others may still be reading what the part before left.
    __syncthreads();
#pragma unroll
    for (int i = 0; i < PARTIAL_SUMS; i++) {
        const bool adds = i < LOG_RATIO_ABS_MAX;
        const double total = adds ? warp_sum(sums[i]) : double(warp_max(float(sums[i])));
        if (lane == 0) warps[warp * PARTIAL_SUMS + i] = total;
    }
    __syncthreads();
    const int which = threadIdx.x;
    if (which >= PARTIAL_SUMS) return;
    double total = warps[which];
    for (int other = 1; other < int(blockDim.x) / WARP; other++) {
        const double x = warps[other * PARTIAL_SUMS + which];
        total = which < LOG_RATIO_ABS_MAX ? total + x : fmax(total, x);
    }
    args.partials[int64_t(which) * args.parts + part] = total;
}

// Block [threads], a part of the rows a block.
template <bool BLOCK, bool REJECTS>
static __device__ __forceinline__ void correct(const PassArgs& args) {
    SHARED(RowSums, rows, MAX_WARPS);
    SHARED(LeaderSums, leaders, MAX_WARPS);
    SHARED(double, sums, MAX_WARPS* PARTIAL_SUMS);
    LeaderSums* leader = leaders + threadIdx.x / WARP;
    const int64_t own = BLOCK ? 0 : threadIdx.x / WARP;
    const int64_t step = BLOCK ? 1 : blockDim.x / WARP;
    for (int part = int(blockIdx.x); part < args.parts; part += int(gridDim.x)) {
        ThreadSums s = no_thread_sums();
        if (leads<BLOCK>()) *leader = LeaderSums{};
        const int64_t end = min((part + 1) * args.part_rows, args.rows);
        for (int64_t row = part * args.part_rows + own; row < end; row += step) {
            correct_row<BLOCK, REJECTS>(args, row, s, leader, rows);
        }
        LeaderSums of_rows = {};
        if (leads<BLOCK>()) of_rows = *leader;
        write_part(args, part, s, of_rows, sums);
    }
}

KERNEL(256, 2, correction_warp_f32, PassArgs) { correct<false, false>(args); }
KERNEL(256, 2, correction_block_f32, PassArgs) { correct<true, false>(args); }
KERNEL(256, 2, correction_warp_rejects_f32, PassArgs) { correct<false, true>(args); }
KERNEL(256, 2, correction_block_rejects_f32, PassArgs) { correct<true, true>(args); }

// ---- all parts ----

// The statistics, from the sums of all rows. By one thread.
static __device__ __forceinline__ void write_stats(const PassArgs& args, const double* sum) {
    const bool scales = args.normalise && sum[NORMALISER] != 0.0;
    const double factor = scales ? sum[NORMALISER_COUNT] / sum[NORMALISER] : 1.0;
    const double weight = sum[WEIGHT] * factor;
    const double squares = sum[WEIGHT_SQUARES] * factor * factor;
    CorrectionStats stats;
    stats.tokens = sum[TOKENS];
    stats.unscored_tokens = sum[UNSCORED];
    stats.rejected_tokens = sum[REJECTED];
    stats.below_tokens = sum[BELOW];
    stats.above_tokens = sum[ABOVE];
    stats.rows = sum[ROWS];
    stats.rejected_rows = sum[REJECTED_ROWS];
    stats.weight_sum = weight;
    stats.weight_square_sum = squares;
    stats.log_ratio_sum = sum[LOG_RATIO];
    stats.log_ratio_abs_sum = sum[LOG_RATIO_ABS];
    stats.k3_sum = sum[K3];
    stats.ratio_square_sum = sum[RATIO_SQUARES];
    stats.mult_prob_error_sum = sum[MULT_PROB_ERROR];
    stats.row_ratio_square_sum = sum[ROW_RATIO_SQUARES];
    stats.log_ppl_sum = sum[LOG_PPL];
    stats.rollout_log_ppl_sum = sum[ROLLOUT_LOG_PPL];
    stats.log_ratio_abs_max = sum[LOG_RATIO_ABS_MAX];
    stats.k3_max = sum[K3_MAX];
    stats.weight_max = sum[WEIGHT_MAX] * factor;
    stats.weight_min = -sum[MINUS_WEIGHT_MIN] * factor;
    stats.ess = squares == 0.0 ? 0.0 : weight / sum[TOKENS] * (weight / squares);
    *args.stats = stats;
    *args.factor = factor;
}

// One block [PARTIAL_SUMS x 32], a sum a warp.
KERNEL(PARTIAL_SUMS* WARP, 1, correction_merge_f32, PassArgs) {
    SHARED(double, totals, PARTIAL_SUMS);
    const int which = threadIdx.x / WARP, lane = threadIdx.x % WARP;
    const double* mine = args.partials + int64_t(which) * args.parts;
    double total = 0.0;
    if (which < LOG_RATIO_ABS_MAX) {
        for (int part = lane; part < args.parts; part += WARP) total += mine[part];
        total = warp_sum(total);
    } else {
        float most = which == MINUS_WEIGHT_MIN ? -INFINITY : 0.0f;
        for (int part = lane; part < args.parts; part += WARP)
            most = fmaxf(most, float(mine[part]));
        total = warp_max(most);
    }
    if (lane == 0) totals[which] = total;
    __syncthreads();
    if (threadIdx.x == 0) write_stats(args, totals);
}

// ---- scaling ----

struct Scale {
    float factor;

    template <int N>
    __device__ __forceinline__ void operator()(const float (&x)[1][N], int64_t,
                                               float (&y)[1][N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) y[0][i] = x[0][i] * factor;
    }
};

KERNEL(256, 4, correction_scale_f32, ScaleArgs) {
    const float* const in[1] = {args.weights};
    float* const out[1] = {args.weights};
    map_tokens(in, out, nullptr, args.tokens, Scale{float(*args.factor)});
}
