// Advantages from one score a sequence. src/advantages/mod.rs has the formulas and src/advantages/cuda.rs
// the launches.
//
//     x_i = clip(score_i) - score_baselines_i        A_i = (x_i - b_i) / (s_i + eps)        A_it = m_it A_i
//
// Scores, lengths, score_baselines and A are [rows] in f32, group ids [rows] in i64, the mask is [rows, tokens] in
// u8 and what is spread over tokens [rows, tokens] in f32. Up to six kernels, of which a call needs some:
//     sort    with group ids: a block sorts a tile of pairs of id and row
//     merge   with group ids: doubles the length of what is sorted, as often as it takes
//     batch   moments of all rows, and how many scores are not 0: one block
//     rows    a warp takes a group after the other: its statistics, then the advantages of its rows
//     finish  statistics: one warp
//     spread  the tokens of a row, a range of them a unit of threads
// For the optimal token baseline of verl sort and merge, and then
//     steps           a warp a row: its returns and the sums of its weights, in f64 in the workspace
//     baselines       a block a group, a thread a step
//     less_baselines  a warp a row
// 12 bytes read and 8 written a token, and 16 written and read twice of the workspace.
// No two pairs of id and row are equal, so there is one order to sort them into, whichever way; and a
// group is summed in the order of its rows by one warp, so no bit depends on ids or on the grid.
//
// What never exists: a matrix of rows by groups, a table of ids, a mean or a standard deviation a row. What is
// left out: a group is never spread over warps, nor the moments of the batch over blocks. A group of a
// million rows takes milliseconds; of those that are trained on none has more than some hundred.
//
// Bytes: 8 a row and 4 for each of lengths and score_baselines, some times 16 where there are ids; a mask's 1 and 4 a
// token. Sums are in f64, of differences from one of the scores, so that equal ones leave 0.

#include "common/map.cuh"
#include "common/moments.cuh"
#include "common/token_kl.cuh"
#include "common/tokens.cuh"

// Pairs that a block sorts in its shared memory.
constexpr int TILE = 1024;

// Places of which a warp takes the groups that begin there.
constexpr int PLACES = 8;

enum class Baseline : int32_t { NONE, GROUP, LEAVE_ONE_OUT, BATCH, LENGTH_WEIGHTED, RUNNER_UP };

enum class Scale : int32_t { NONE, GROUP, LEAVE_ONE_OUT, BATCH, MEAN, NONZERO };

enum class Singleton : int32_t { ZERO, KEEP };

// A row by its group.
struct Key {
    int64_t id;
    int64_t row;
};

struct AdvantageStats {
    double score_mean;
    double score_std;
    double zero_std_fraction;
};

// Statistics of all rows.
struct Batch {
    Moments moments;
    double nonzero;  // share of the scores that are not 0
};

// Groups with a score, and those of them in which all scores are equal.
struct Counts {
    double scored;
    double zero_std;
};

struct OptionsArgs {
    double eps;
    double score_min;
    double score_max;
    Baseline baseline;
    Scale scale;
    Singleton singleton;
    int32_t eps_at_std;  // it is added to the standard deviation, not to the variance
    int32_t unbiased;
    int32_t by_group;  // statistics of groups are looked at, by options or for statistics
};

struct SortArgs {
    const int64_t* groups;  // [count]
    const Key* from;        // [count], in sorted runs
    Key* to;                // [count]
    int64_t count;
    int64_t run;  // pairs of a run
};

struct PassArgs {
    const float* scores;           // [rows]
    const int64_t* groups;         // [rows], or null
    const float* lengths;          // [rows], or null
    const float* score_baselines;  // [rows], or null: zeros
    const uint8_t* mask;           // [rows, tokens], or null: ones
    const int64_t* offsets;        // [rows + 1], or null: rows of as many tokens
    float* advantages;             // [rows]
    float* token_advantages;       // [rows, tokens], or null: not wanted
    AdvantageStats* stats;         // [1], or null: not wanted
    const Key* keys;               // [rows], sorted, or null: the rows are in order
    Batch* batch;                  // [1]
    Counts* counts;                // [units]
    int64_t rows;
    int64_t tokens;      // of a row; of all where there are offsets
    int64_t group_size;  // 0: none
    int64_t units;       // warps that count groups
    OptionsArgs options;
    int32_t chunks;         // ranges of the tokens of a row
    int32_t chunk_threads;  // threads that share a range
};

// ---- the order of rows ----

static __device__ __forceinline__ bool operator<(const Key& a, const Key& b) {
    return a.id != b.id ? a.id < b.id : a.row < b.row;
}

// Where pair `i` goes when its run and the next one, or the one before, become one.
template <class T>
static __device__ __forceinline__ T place_in_both(const Key* keys, T i, T run, T count) {
    const T start = i / (2 * run) * (2 * run), middle = min(start + run, count);
    const bool in_second = i >= middle;
    T low = in_second ? start : middle, high = in_second ? middle : min(start + 2 * run, count);
    const T others = low;
    // The first of the other run that is not before it.
    const Key key = keys[i];
    while (low < high) {
        const T at = low + (high - low) / 2;
        if (keys[at] < key) low = at + 1;
        else high = at;
    }
    return i - (in_second ? middle - start : 0) + (low - others);
}

// Block [threads], a tile of pairs a block.
KERNEL(256, 4, advantages_sort_f32, SortArgs) {
    SHARED(Key, even, TILE);
    SHARED(Key, odd, TILE);
    for (int64_t first = int64_t(blockIdx.x) * TILE; first < args.count;
         first += int64_t(gridDim.x) * TILE) {
        const int count = int(min(int64_t(TILE), args.count - first));
        Key *from = even, *to = odd;
        // Others may still be at the tile before.
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) {
            from[i] = {args.groups[first + i], first + i};
        }
        for (int run = 1; run < TILE; run *= 2) {
            __syncthreads();
            for (int i = threadIdx.x; i < count; i += blockDim.x) {
                to[place_in_both(from, i, run, count)] = from[i];
            }
            Key* const merged = to;
            to = from;
            from = merged;
        }
        __syncthreads();
        for (int i = threadIdx.x; i < count; i += blockDim.x) args.to[first + i] = from[i];
    }
}

// Block [threads], a pair a thread.
KERNEL(256, 4, advantages_merge_f32, SortArgs) {
    for (int64_t i = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; i < args.count;
         i += int64_t(gridDim.x) * blockDim.x) {
        args.to[place_in_both(args.from, i, args.run, args.count)] = args.from[i];
    }
}

// ---- scores ----

// The score of a row as it counts; NaN if it does not.
static __device__ __forceinline__ double score_of(const PassArgs& args, int64_t row) {
    double x = args.scores[row];
    // Comparisons, not minima: NaN stays.
    if (x < args.options.score_min) x = args.options.score_min;
    if (x > args.options.score_max) x = args.options.score_max;
    return args.score_baselines ? x - double(args.score_baselines[row]) : x;
}

static __device__ __forceinline__ void add_score(Deviations& d, double x) {
    if (isnan(x)) return;
    if (d.count == 0.0) d.origin = x;
    const double off = x - d.origin;
    d.sum += off;
    d.squares = fma(off, off, d.squares);
    d.count += 1.0;
}

// NaN if one of the scores is infinite.
static __device__ __forceinline__ Moments moments_of_scores(const Deviations& d) {
    if (!isfinite(d.sum)) return {d.count, NAN, NAN};
    return moments_of(d);
}

// How a block adds up the batch.
struct BatchSums {
    Deviations deviations;
    double nonzero;
};

struct MergeBatch {
    static __device__ __forceinline__ BatchSums none() { return {no_deviations(), 0.0}; }

    static __device__ __forceinline__ BatchSums warp_merge(const BatchSums& s) {
        return {::warp_merge(s.deviations), warp_sum(s.nonzero)};
    }
};

// One block.
KERNEL(512, 1, advantages_batch_f32, PassArgs) {
    SHARED(BatchSums, warps, WARP);
    BatchSums s = MergeBatch::none();
    for (int64_t row = threadIdx.x; row < args.rows; row += blockDim.x) {
        const double x = score_of(args, row);
        add_score(s.deviations, x);
        if (!isnan(x) && x != 0.0) s.nonzero += 1.0;
    }
    s = block_merge(MergeBatch{}, s, warps);
    if (threadIdx.x == 0) {
        *args.batch = {moments_of_scores(s.deviations), s.nonzero / s.deviations.count};
    }
}

// ---- groups ----

template <class Args>
static __device__ __forceinline__ int64_t row_at(const Args& args, int64_t place) {
    return args.keys ? args.keys[place].row : place;
}

// Whether a group begins at a place; without groups every row is by itself.
template <class Args>
static __device__ __forceinline__ bool begins_group(const Args& args, int64_t place) {
    if (args.keys) return place == 0 || args.keys[place - 1].id != args.keys[place].id;
    return args.group_size == 0 || place % args.group_size == 0;
}

// Calls work(place, whether there is one) for a place of each lane, until all from start to end were.
template <class Work>
static __device__ __forceinline__ void for_places(int64_t start, int64_t end, Work work) {
    for (int64_t first = start; first < end; first += WARP) {
        const int64_t place = first + threadIdx.x % WARP;
        work(place, place < end);
    }
}

// The place behind the last of the group that begins at `start`.
template <class Args>
static __device__ __forceinline__ int64_t end_of_group(const Args& args, int64_t start) {
    if (!args.keys) return start + max(args.group_size, int64_t(1));
    const int64_t id = args.keys[start].id;
    for (int64_t first = start + 1;; first += WARP) {
        const int64_t place = first + threadIdx.x % WARP;
        const bool other = place >= args.rows || args.keys[place].id != id;
        const unsigned others = __ballot_sync(ALL_LANES, other);
        if (others) return first + __ffs(others) - 1;
    }
}

// Statistics of a group.
struct Group {
    int64_t start, end;  // places
    Moments moments;
    double weighted;    // the mean weighted by lengths, where that is the baseline
    double best, next;  // the largest scores, where those are
};

// The moments of a group, or of all of it but one place.
static __device__ __forceinline__ Deviations deviations_but(const PassArgs& args, int64_t start,
                                                            int64_t end, int64_t without) {
    Deviations d = no_deviations();
    for_places(start, end, [&](int64_t place, bool there) {
        if (there && place != without) add_score(d, score_of(args, row_at(args, place)));
    });
    return warp_merge(d);
}

static __device__ __forceinline__ Group group_from(const PassArgs& args, int64_t start) {
    Group g = {start, end_of_group(args, start), {0.0, 0.0, 0.0}, 0.0, -INFINITY, -INFINITY};
    if (!args.options.by_group) return g;
    const Deviations d = deviations_but(args, g.start, g.end, -1);
    g.moments = moments_of_scores(d);
    if (args.options.baseline == Baseline::LENGTH_WEIGHTED) {
        double total = 0.0, sum = 0.0;
        for_places(g.start, g.end, [&](int64_t place, bool there) {
            if (!there) return;
            const int64_t row = row_at(args, place);
            const double x = score_of(args, row);
            if (isnan(x)) return;
            total += double(args.lengths[row]);
            sum = fma(double(args.lengths[row]), x - d.origin, sum);
        });
        g.weighted = d.origin + warp_sum(sum) / warp_sum(total);
    }
    if (args.options.baseline == Baseline::RUNNER_UP) {
        for_places(g.start, g.end, [&](int64_t place, bool there) {
            const double x = there ? score_of(args, row_at(args, place)) : NAN;
            if (isnan(x)) return;
            g.next = fmax(fmin(x, g.best), g.next);
            g.best = fmax(x, g.best);
        });
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2) {
            const double best = __shfl_xor_sync(ALL_LANES, g.best, step);
            const double next = __shfl_xor_sync(ALL_LANES, g.next, step);
            g.next = fmax(fmin(best, g.best), fmax(next, g.next));
            g.best = fmax(best, g.best);
        }
    }
    return g;
}

// A difference, divided by the standard deviation of these.
static __device__ __forceinline__ double divide_by_std(const OptionsArgs& o, double difference,
                                                       const Moments& m) {
    const double divisor = m.count - (o.unbiased ? 1.0 : 0.0);
    if (divisor < 1.0 || m.m2 == 0.0) return difference;
    const double variance = m.m2 / divisor;
    return difference / (o.eps_at_std ? sqrt(variance) + o.eps : sqrt(variance + o.eps));
}

// A difference, divided by another scale.
static __device__ __forceinline__ double divide(const OptionsArgs& o, double difference,
                                                double scale) {
    return scale == 0.0 ? difference : difference / (scale + o.eps);
}

// The score less its baseline.
static __device__ __forceinline__ double difference_of(const PassArgs& args, const Group& g,
                                                       double x) {
    const Baseline baseline = args.options.baseline;
    const double n = g.moments.count;
    if (baseline == Baseline::NONE) return x;
    if (baseline == Baseline::BATCH) return x - args.batch->moments.mean;
    // Of a score that is infinite.
    if (isnan(g.moments.mean)) return NAN;
    if (baseline == Baseline::RUNNER_UP && g.end == g.start + 1) return NAN;
    if (n == 1.0) return args.options.singleton == Singleton::KEEP ? x : 0.0;
    switch (baseline) {
        case Baseline::GROUP:
            return x - g.moments.mean;
        case Baseline::LEAVE_ONE_OUT:
            return (x - g.moments.mean) * (n / (n - 1.0));
        case Baseline::LENGTH_WEIGHTED:
            return isnan(g.weighted) ? 0.0 : x - g.weighted;
        default:
            return x == g.best ? g.best - g.next : 0.0;
    }
}

// The moments of a group without the score of each lane, its place being there; their mean is not worked out.
// All lanes of the warp take part.
static __device__ __forceinline__ Moments others_of(const PassArgs& args, const Group& g,
                                                    int64_t place, double x) {
    const double n = g.moments.count, off = x - g.moments.mean;
    const double share = off * off * (n / (n - 1.0));
    Moments others = {n - 1.0, NAN, g.moments.m2 - share};
    // Of a difference that is small beside what it is taken from few digits would be right, and where the
    // others are equal it would not be 0. No more than three scores can make up so much.
    unsigned anew = __ballot_sync(ALL_LANES, share > g.moments.m2 / 2.0);
    while (anew) {
        const int lane = __ffs(anew) - 1;
        anew &= anew - 1;
        const int64_t without = __shfl_sync(ALL_LANES, place, lane);
        const Deviations d = deviations_but(args, g.start, g.end, without);
        if (int(threadIdx.x % WARP) == lane) others = moments_of_scores(d);
    }
    return others;
}

// Block [warps x 32], PLACES places a warp.
KERNEL(256, 2, advantages_rows_f32, PassArgs) {
    const OptionsArgs& o = args.options;
    const int lane = threadIdx.x % WARP;
    const int64_t warps = blockDim.x / WARP;
    const int64_t unit = int64_t(blockIdx.x) * warps + threadIdx.x / WARP;
    Counts counts = {0.0, 0.0};
    for (int64_t first = unit * PLACES; first < args.rows; first += gridDim.x * warps * PLACES) {
        const int64_t place = first + lane;
        const bool begins = lane < PLACES && place < args.rows && begins_group(args, place);
        unsigned starts = __ballot_sync(ALL_LANES, begins);
        while (starts) {
            const Group g = group_from(args, first + __ffs(starts) - 1);
            starts &= starts - 1;
            const Moments& m = g.moments;
            if (m.count > 0.0) {
                counts.scored += 1.0;
                if (m.m2 == 0.0) counts.zero_std += 1.0;
            }
            for_places(g.start, g.end, [&](int64_t place, bool there) {
                const int64_t row = there ? row_at(args, place) : 0;
                const double x = there ? score_of(args, row) : NAN;
                double a = difference_of(args, g, x);
                switch (o.scale) {
                    case Scale::GROUP:
                        a = divide_by_std(o, a, m);
                        break;
                    case Scale::LEAVE_ONE_OUT:
                        a = divide_by_std(o, a, others_of(args, g, place, x));
                        break;
                    case Scale::BATCH:
                        a = divide_by_std(o, a, args.batch->moments);
                        break;
                    case Scale::MEAN:
                        a = m.count == 1.0 ? a : divide(o, a, m.mean);
                        break;
                    case Scale::NONZERO:
                        a = divide(o, a, args.batch->nonzero);
                        break;
                    default:
                        break;
                }
                const bool single = o.baseline == Baseline::RUNNER_UP && g.end == g.start + 1;
                if (there) args.advantages[row] = isnan(x) ? single ? NAN : 0.0f : float(a);
            });
        }
    }
    if (lane == 0 && args.stats) args.counts[unit] = counts;
}

// One warp.
KERNEL(32, 1, advantages_finish_f32, PassArgs) {
    Counts counts = {0.0, 0.0};
    for (int64_t unit = threadIdx.x; unit < args.units; unit += WARP) {
        counts.scored += args.counts[unit].scored;
        counts.zero_std += args.counts[unit].zero_std;
    }
    const double scored = warp_sum(counts.scored), zero_std = warp_sum(counts.zero_std);
    if (threadIdx.x == 0) {
        const Moments m = args.batch->moments;
        const double divisor = m.count - (args.options.unbiased ? 1.0 : 0.0);
        const bool grouped = args.keys || args.group_size;
        *args.stats = {m.count > 0.0 ? m.mean : NAN, divisor < 1.0 ? NAN : sqrt(m.m2 / divisor),
                       grouped ? zero_std / scored : NAN};
    }
}

// ---- tokens ----

// Block [threads], a range of the tokens of a row a unit of threads.
KERNEL(256, 4, advantages_spread_f32, PassArgs) {
    for_each_share(args, [&](int64_t row, Share share) {
        const RowRange range = range_of_row(args.offsets, row, args.tokens);
        const uint8_t* mask = args.mask ? args.mask + range.first : nullptr;
        fill_columns<true>(args.token_advantages + range.first, args.advantages[row], range.tokens,
                           share, mask);
    });
}

// ---- the optimal token baseline ----

struct TokenArgs {
    const float* rewards;           // [rows, tokens]
    const float* logp;              // [rows, tokens]
    const float* log_sum_sq_probs;  // [rows, tokens]
    const int64_t* groups;          // [rows], or null
    const float* weights;           // [rows, tokens], or null: ones
    const uint8_t* mask;            // [rows, tokens], or null: ones
    const int64_t* offsets;         // [rows + 1], or null: rows of as many tokens
    float* advantages;              // [rows, tokens]
    float* returns;                 // [rows, tokens], or null: not wanted
    const Key* keys;                // [rows], sorted, or null: the rows are in order
    double* step_returns;           // [rows, tokens], by steps, from the first token of a row on
    double* step_weights;           // [rows, tokens], likewise; baselines in the end
    int64_t* lengths;               // [rows], unmasked tokens
    double eps;
    int64_t rows;
    int64_t tokens;       // of a row; of all where there are offsets
    int64_t group_size;   // 0: none
    int32_t by_unmasked;  // a step is an unmasked token, not a column
    int32_t lone_tail;
};

// 32 tokens of a row, one a lane, and their steps.
struct StepTokens {
    int64_t at, step;
    bool keep;
    int kept;  // of all lanes
};

// Those from `first` of the row on, of which as many as `before` are unmasked ahead of them. By all lanes.
static __device__ __forceinline__ StepTokens step_tokens(const TokenArgs& args, const RowRange& row,
                                                         int64_t first, int64_t before) {
    const int lane = threadIdx.x % WARP;
    const int64_t t = first + lane, at = row.first + t;
    const bool keep = t < row.tokens && (!args.mask || args.mask[at]);
    const unsigned kept = __ballot_sync(ALL_LANES, keep);
    const int64_t rank = before + __popc(kept & ((1u << lane) - 1));
    return {at, args.by_unmasked ? rank : t, keep, __popc(kept)};
}

// |onehot - p|^2 of a token, and its factor: that of itself and of all others, neither as a difference of
// numbers near 1.
static __device__ __forceinline__ double step_weight(const TokenArgs& args, int64_t at) {
    const float logp = args.logp[at], log_sum = args.log_sum_sq_probs[at];
    float excess = log_sum - 2.0f * logp;
    // That much below 0 is rounding.
    if (excess < 0.0f && excess >= -1e-5f) excess = 0.0f;
    const float own = expm1f(logp), others = probability_moved(log_sum, 2.0f * logp, excess);
    const double importance = args.weights ? double(args.weights[at]) : 1.0;
    return double(fmaf(own, own, others)) * importance * importance;
}

// The sum of this lane's and all lower ones', or all higher ones'.
static __device__ __forceinline__ double sum_from_below(double x) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const double other = __shfl_up_sync(ALL_LANES, x, step);
        if (int(threadIdx.x % WARP) >= step) x += other;
    }
    return x;
}

static __device__ __forceinline__ double sum_from_above(double x) {
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const double other = __shfl_down_sync(ALL_LANES, x, step);
        if (int(threadIdx.x % WARP) + step < WARP) x += other;
    }
    return x;
}

// Calls work(row) for the rows of a warp.
template <class Work>
static __device__ __forceinline__ void for_rows(const TokenArgs& args, Work work) {
    const int64_t warps = blockDim.x / WARP;
    const int64_t unit = int64_t(blockIdx.x) * warps + threadIdx.x / WARP;
    for (int64_t row = unit; row < args.rows; row += gridDim.x * warps) work(row);
}

// Block [warps x 32], a row a warp: the sums up to each step, and from each step on. In chunks from the row's
// first token on, so that padding changes no bit.
KERNEL(256, 2, advantages_steps_f32, TokenArgs) {
    const int lane = threadIdx.x % WARP;
    for_rows(args, [&](int64_t row) {
        const RowRange range = range_of_row(args.offsets, row, args.tokens);
        double* weights = args.step_weights + range.first;
        double* returns = args.step_returns + range.first;
        int64_t length = 0;
        double before = 0.0;
        for (int64_t first = 0; first < range.tokens; first += WARP) {
            const StepTokens s = step_tokens(args, range, first, length);
            const double own = s.keep ? step_weight(args, s.at) : 0.0;
            const double total = before + sum_from_below(own);
            // A column without a token has weight 0, and is a step all the same.
            const bool is_step = s.keep || (!args.by_unmasked && first + lane < range.tokens);
            if (is_step) {
                weights[s.step] = s.keep ? total : 0.0;
                returns[s.step] = s.keep ? double(args.rewards[s.at]) : 0.0;
            }
            before = __shfl_sync(ALL_LANES, total, WARP - 1);
            length += s.kept;
        }
        if (lane == 0) args.lengths[row] = length;
        // What one lane wrote another reads.
        __syncwarp();
        const int64_t steps = args.by_unmasked ? length : range.tokens;
        double after = 0.0;
        for (int64_t first = (steps - 1) / WARP * WARP; steps > 0 && first >= 0; first -= WARP) {
            const int64_t step = first + lane;
            const double total = after + sum_from_above(step < steps ? returns[step] : 0.0);
            if (step < steps) returns[step] = total;
            after = __shfl_sync(ALL_LANES, total, 0);
        }
    });
}

// Block [threads], a place a block: of the group that begins there, a step a thread, whose weights become
// baselines.
KERNEL(256, 2, advantages_baselines_f32, TokenArgs) {
    for (int64_t start = blockIdx.x; start < args.rows; start += gridDim.x) {
        if (!begins_group(args, start)) continue;
        const int64_t end = end_of_group(args, start);
        int64_t most = 0, longest = 0, second = 0, rows = 0;
        for (int64_t place = start; place < end; place++) {
            const int64_t row = row_at(args, place), length = args.lengths[row];
            const int64_t tokens = range_of_row(args.offsets, row, args.tokens).tokens;
            most = max(most, args.by_unmasked ? length : tokens);
            second = max(second, min(length, longest));
            longest = max(longest, length);
            rows += length > 0;
        }
        for (int64_t step = threadIdx.x; step < most; step += blockDim.x) {
            double sum = 0.0, total = 0.0;
            // The rows that have this step.
            const auto for_each = [&](auto work) {
                for (int64_t place = start; place < end; place++) {
                    const int64_t row = row_at(args, place), length = args.lengths[row];
                    const RowRange range = range_of_row(args.offsets, row, args.tokens);
                    const int64_t steps = args.by_unmasked ? length : range.tokens;
                    if (length > 0 && step < steps) work(range.first + step, length);
                }
            };
            for_each([&](int64_t at, int64_t) {
                sum = fma(args.step_weights[at], args.step_returns[at], sum);
                total += args.step_weights[at];
            });
            const double baseline = rows > 1 ? sum / (total + args.eps) : 0.0;
            for_each([&](int64_t at, int64_t length) {
                const bool alone = args.lone_tail && length > second && step >= second;
                args.step_weights[at] = alone ? 0.0 : baseline;
            });
        }
    }
}

// Block [warps x 32], a row a warp.
KERNEL(256, 4, advantages_less_baselines_f32, TokenArgs) {
    const int lane = threadIdx.x % WARP;
    for_rows(args, [&](int64_t row) {
        const RowRange range = range_of_row(args.offsets, row, args.tokens);
        int64_t length = 0;
        for (int64_t first = 0; first < range.tokens; first += WARP) {
            const StepTokens s = step_tokens(args, range, first, length);
            length += s.kept;
            if (first + lane >= range.tokens) continue;
            const int64_t at = range.first + s.step;
            const double total = s.keep ? args.step_returns[at] : 0.0;
            args.advantages[s.at] = s.keep ? float(total - args.step_weights[at]) : 0.0f;
            if (args.returns) args.returns[s.at] = float(total);
        }
    });
}
