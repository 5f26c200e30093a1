// Generalised advantage estimation with the shaping of the rewards, as a parallel scan from the end
// of each row. src/gae/mod.rs has the formulas and the meaning of masks, and src/gae/cuda.rs the
// launches.
//
//     A_t = r_t + gamma V_{t+1} - V_t + gamma lambda A_{t+1}        returns_t = A_t + V_t
//
// values, rewards, kl, advantages, returns and shaped_rewards are [rows, tokens] in f32, mask and dones
// [rows, tokens] in u8, scores and bootstrap [rows] in f32, has_eos [rows] in u8, moments three
// f64.
//
// All that a step passes to the one before it is one number, u_t = gamma V_t + gamma lambda A_t:
//
//     A_t = r_t + (u_{t+1} - V_t)        returns_t = r_t + u_{t+1}
//     u_t = e_t + gamma lambda u_{t+1}   e_t = gamma (1 - lambda) V_t + gamma lambda r_t
//
// So a step is an affine map of u that is made of its own token alone, and needs no search for the
// next unmasked value. A masked token that is no step is the identity; the end of an episode is a
// map to a constant. Maps of n steps have the factor (gamma lambda)^n, which comes out of a table,
// so that no power is rounded more than once. Returns with a lambda of their own take a second u.
//
// A thread makes one map of four tokens; shuffles make maps of the tokens from a lane to the end of
// its segment of 128 tokens; from segment to segment u goes on in order, the last first. Most warps
// have no token that is masked or done, and so powers that are known beforehand: they do the same
// sums without asking what each token is. All kernels do just this, and so give the same bits, which
// depend on nothing but the row up to its last unmasked token: neither on padding, alignment and
// batch, nor on the kernel. Which is:
//     warp    a warp takes a short row
//     block   a block takes a row, from its end, a tile of 2 segments a warp at a time; the maps of
//             segments go through shared memory
//     last, totals, carry, apply: few long rows. Where a row's last unmasked token is, is found
//             first (last). A block takes a tile of a row and leaves the maps of its segments
//             (totals); a thread goes through those of a row (carry); a block takes a tile again,
//             and knows u where its segments end (apply)
//     merge   puts together the moments that every block left
//
// Of a pack the row's range comes from the offsets. Rows that have that or a lambda of their own are taken by
// a block each, which makes the table of powers for every row (block_own), or by a warp where all rows
// together are short and share the lambda. Few long rows are not split then.
//
// Bytes a token: 4 for each of values, rewards and kl, and 1 for each of mask and dones, read once
// (twice where rows are split, and the mask behind the last unmasked token once more); 4 written
// for each of advantages, returns and shaped_rewards. Registers hold a tile between: of each of values,
// rewards and kl a thread has two vectors of 16 bytes in flight.
//
// Numbers. All in f32, but the score of a row and the moments of the advantages in f64. Of T steps
// log2(128) + T / 128 additions follow one another and not T: the error is below that of the loop
// in f32, most of all for gamma lambda = 1. Masked tokens are read and not looked at, and may hold
// NaN.

#include "common/moments.cuh"
#include "common/tokens.cuh"

// Segments that a warp has in registers, and their tokens that a thread has.
constexpr int WARP_SEGMENTS = 2;
constexpr int THREAD_TOKENS = WARP_SEGMENTS * QUAD;

constexpr int MAX_THREADS = 256;
constexpr int MAX_WARPS = MAX_THREADS / WARP;

// A map of so many steps or more ends an episode. Fewer are at most the tokens of a segment.
constexpr int ENDED = 1 << 16;

// lambda in the forms it is used in.
struct Decay {
    float rest;                 // gamma (1 - lambda)
    float powers[SEGMENT + 1];  // of gamma lambda
};

// How a row's score becomes a reward.
struct Shaping {
    double mean;
    double inverse_std;
    double min;  // after or before it is scaled
    double max;
    double missing;  // for what has no end of sequence: subtracted, or taken instead
    int32_t clips_first;
    int32_t replaces;
};

// u, and that of the returns if they have a lambda of their own.
struct State {
    float u;
    float of_returns;
};

// u before some tokens as a function of u after them: power[steps] u + add, or just add.
struct Map {
    int32_t steps;
    State add;
};

// The map of a segment with its power looked up: factor u + add, or just add if that is JUST_ADD.
struct Total {
    State factor;
    State add;
};

constexpr float JUST_ADD = -1.0f;

// In the place of a token's index, so far before the first that no score falls behind it.
constexpr int NO_TOKEN = -2;

struct GaeArgs {
    const float* values;          // [rows, tokens]
    const float* rewards;         // [rows, tokens], or null: zeros
    const float* kl;              // [rows, tokens], or null: zeros
    const float* scores;          // [rows], or null: zeros
    const uint8_t* has_eos;       // [rows], or null: ones
    const uint8_t* mask;          // [rows, tokens], or null: ones
    const uint8_t* dones;         // [rows, tokens], or null: zeros
    const float* bootstrap;       // [rows], or null: zeros
    const int64_t* offsets;       // [rows + 1], or null: rows of as many tokens
    const float* lambda_per_row;  // [rows], or null
    float* advantages;            // [rows, tokens]
    float* returns;               // [rows, tokens]
    float* shaped_rewards;        // [rows, tokens], or null
    Moments* moments;             // not looked at: the merge's
    Moments* partials;            // a block's work; or null
    int64_t* last;                // a row: its last unmasked token, or NO_TOKEN
    Total* totals;                // a segment
    State* carries;               // a segment: u after it
    int64_t rows;
    int64_t tokens;    // of a row; of all where there are offsets
    int64_t segments;  // of a row
    int32_t tiles;     // of a row: what a block has in registers
    Shaping shaping;
    double gamma;
    float minus_kl_coef;
    int32_t multiply;    // gaps are steps
    int32_t after_last;  // the score is a step of its own, if there is room
    int32_t two;         // returns have a decay of their own; looked at by the carry alone
    Decay decay;
    Decay returns_decay;
};

// The maps of many segments, to be gone through from the last to the first; once for u and once for
// that of the returns.
template <int N>
struct Chain {
    alignas(16) float factors[2][N];
    alignas(16) float adds[2][N];

    __device__ __forceinline__ void set(int k, const Total& total) {
        factors[0][k] = total.factor.u;
        factors[1][k] = total.factor.of_returns;
        adds[0][k] = total.add.u;
        adds[1][k] = total.add.of_returns;
    }
};

struct Score {
    float value;
    int32_t has_eos;
};

constexpr int BLOCK_SEGMENTS = MAX_WARPS * WARP_SEGMENTS;
constexpr int CARRY_SEGMENTS = 1024;

struct Shared {
    Chain<BLOCK_SEGMENTS> chain;
    float powers[2][SEGMENT + 1];
    Decay own;            // of the row's lambda
    int last[MAX_WARPS];  // a warp: its last unmasked token in the tile, or NO_TOKEN
    Score score;          // of the row
    Deviations warps[MAX_WARPS];
    Deviations threads[MAX_THREADS];  // of the advantages that a thread wrote
};

// What a token can be. OUTPUT is what is kept, and the step of the score.
enum Flag { KEPT, DONE, STEP, OUTPUT };

// What a warp's tokens are: NONE has no flag; ALL are kept, so steps and outputs, and none is done;
// of SOME the flags must be looked at. What is known of all tokens costs no instructions, and gives
// the bits that SOME would give.
enum Content { NONE, SOME, ALL };

template <Content CONTENT>
struct Known {
    static constexpr Content value = CONTENT;
};

// Some segments of a row: four tokens of each a lane. Eight bits for each flag say what they are,
// all in one register.
struct Tokens {
    float value[WARP_SEGMENTS][QUAD], reward[WARP_SEGMENTS][QUAD];
    uint32_t flags;
    Content content;  // the same in all lanes

    static_assert(THREAD_TOKENS <= 8, "a flag has eight bits");

    __device__ __forceinline__ void set(Flag flag, unsigned bits) { flags |= bits << 8 * flag; }

    // The bits of a segment.
    template <Content CONTENT = SOME>
    __device__ __forceinline__ unsigned bits(Flag flag, int segment) const {
        if (CONTENT == NONE) return 0;
        if (CONTENT == ALL) return flag == DONE ? 0 : 15;
        return flags >> (8 * flag + QUAD * segment) & 15;
    }

    template <Content CONTENT = SOME>
    __device__ __forceinline__ bool is(Flag flag, int segment, int token) const {
        return bits<CONTENT>(flag, segment) >> token & 1;
    }

    // Calls work(the content in its type).
    template <class Work>
    __device__ __forceinline__ void with_content(Work work) const {
        if (content == ALL) work(Known<ALL>{});
        else if (content == NONE) work(Known<NONE>{});
        else work(Known<SOME>{});
    }
};

static __device__ __forceinline__ int lane_of_thread() { return threadIdx.x % WARP; }

// To be followed by a barrier.
template <bool TWO, bool ONE = true>
static __device__ __forceinline__ void load_powers(const GaeArgs& args, Shared* shared) {
    for (int i = threadIdx.x; i <= SEGMENT; i += blockDim.x) {
        if (ONE) shared->powers[0][i] = args.decay.powers[i];
        if (TWO) shared->powers[1][i] = args.returns_decay.powers[i];
    }
}

// The powers of the lambda of a row, which is NaN if it is none, or of that of all. To be between two
// barriers.
static __device__ __forceinline__ void make_own_decay(const GaeArgs& args, int64_t row,
                                                      Shared* shared) {
    if (!args.lambda_per_row) {
        for (int i = threadIdx.x; i <= SEGMENT; i += blockDim.x) {
            shared->powers[0][i] = shared->own.powers[i] = args.decay.powers[i];
        }
        if (threadIdx.x == 0) shared->own.rest = args.decay.rest;
        return;
    }
    const float given = args.lambda_per_row[row];
    const double lambda = given >= 0.0f && given <= 1.0f ? double(given) : double(NAN);
    for (int i = threadIdx.x; i <= SEGMENT; i += blockDim.x) {
        double power = 1.0, square = args.gamma * lambda;
        for (int left = i; left > 0; left /= 2) {
            if (left % 2) power *= square;
            square *= square;
        }
        shared->powers[0][i] = shared->own.powers[i] = float(power);
    }
    if (threadIdx.x == 0) shared->own.rest = float(args.gamma - args.gamma * lambda);
}

template <bool OWN>
static __device__ __forceinline__ const Decay& decay_of(const GaeArgs& args, const Shared* shared) {
    if (OWN) return shared->own;
    return args.decay;
}

template <bool TWO, bool ENDS = true>
static __device__ __forceinline__ State apply(const Map& map, State s, const Shared* shared) {
    if (ENDS && map.steps >= ENDED) return map.add;
    s.u = fmaf(shared->powers[0][map.steps], s.u, map.add.u);
    if (TWO) s.of_returns = fmaf(shared->powers[1][map.steps], s.of_returns, map.add.of_returns);
    return s;
}

template <bool TWO>
static __device__ __forceinline__ Total total_of(const Map& map, const Shared* shared) {
    if (map.steps >= ENDED) return {{JUST_ADD, JUST_ADD}, map.add};
    const float of_returns = TWO ? shared->powers[1][map.steps] : 0.0f;
    return {{shared->powers[0][map.steps], of_returns}, map.add};
}

// u before a segment. Where there are no dones, no segment has ENDS.
template <bool ENDS>
static __device__ __forceinline__ float follow(float factor, float add, float u) {
    return ENDS && factor == JUST_ADD ? add : fmaf(factor, u, add);
}

// One step of a token that ends no episode.
static __device__ __forceinline__ float step(const Decay& decay, float value, float reward,
                                             float u) {
    const float once = decay.powers[1];
    return fmaf(once, u, fmaf(decay.rest, value, once * reward));
}

// u after a row's last token.
static __device__ __forceinline__ State end_of_row(const GaeArgs& args, int64_t row) {
    const float u = args.bootstrap ? float(args.gamma) * args.bootstrap[row] : 0.0f;
    return {u, u};
}

static __device__ __forceinline__ Score score_of(const GaeArgs& args, int64_t row) {
    return {args.scores ? args.scores[row] : 0.0f, !args.has_eos || args.has_eos[row]};
}

// What a row's score becomes.
static __device__ __forceinline__ float shaped(const Shaping& s, const Score& score) {
    const auto clipped = [&](double x) { return x < s.min ? s.min : x > s.max ? s.max : x; };
    double x = score.value;
    if (s.clips_first) x = clipped(x);
    x = (x - s.mean) * s.inverse_std;
    if (!s.clips_first) x = clipped(x);
    return float(score.has_eos ? x : s.replaces ? s.missing : x - s.missing);
}

// Reads a warp's segments, and does `meanwhile` what does not need them. The rewards are dense
// rewards less the KL penalty.
template <class Work>
static __device__ __forceinline__ void load(const GaeArgs& args, const Place& place, Tokens& t,
                                            Work meanwhile) {
    float kl[WARP_SEGMENTS][QUAD];
    load_tokens(args.values, place, t.value);
    if (args.rewards) {
        load_tokens(args.rewards, place, t.reward);
    } else {
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) {
#pragma unroll
            for (int i = 0; i < QUAD; i++) t.reward[j][i] = 0.0f;
        }
    }
    if (args.kl) load_tokens(args.kl, place, kl);
    uint32_t mask[WARP_SEGMENTS], dones[WARP_SEGMENTS];
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        if (args.mask) mask[j] = load_flags(args.mask, place, j);
        if (args.dones) dones[j] = load_flags(args.dones, place, j);
    }
    meanwhile();
    t.flags = 0;
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        const unsigned kept =
            args.mask ? flag_bits(mask[j]) : lowest_bits(place.left - first_of_lane(j));
        t.set(KEPT, kept << QUAD * j);
        if (args.dones) t.set(DONE, (flag_bits(dones[j]) & kept) << QUAD * j);
        if (args.kl) {
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                t.reward[j][i] = fmaf(args.minus_kl_coef, kl[j][i], t.reward[j][i]);
            }
        }
    }
}

static __device__ __forceinline__ int64_t highest_in_warp(int64_t x) {
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const int64_t other = __shfl_xor_sync(ALL_LANES, x, step);
        x = other > x ? other : x;
    }
    return x;
}

// The last unmasked token of a warp's segments, counted from their first, or NO_TOKEN.
static __device__ __forceinline__ int last_kept(const Tokens& t) {
#pragma unroll
    for (int j = WARP_SEGMENTS - 1; j >= 0; j--) {
        const unsigned kept = t.bits(KEPT, j);
        const unsigned lanes = __ballot_sync(ALL_LANES, kept != 0);
        if (lanes) {
            const int lane = WARP - 1 - __clz(lanes);
            const unsigned of_lane = __shfl_sync(ALL_LANES, kept, lane);
            return j * SEGMENT + lane * QUAD + 31 - __clz(of_lane);
        }
    }
    return NO_TOKEN;
}

// Says of every token what it is, clears what is masked, and adds the score. `last` is the row's
// last unmasked token, counted from the warp's first.
static __device__ __forceinline__ void classify(const GaeArgs& args, const Place& place, int last,
                                                const Score& score, Tokens& t) {
    const int score_here = last + (args.after_last && last + 1 < place.left);
    const bool has_score = args.scores && score_here >= 0 && score_here < WARP_SEGMENTS * SEGMENT;
    constexpr unsigned ALL_KEPT = (1u << THREAD_TOKENS) - 1;
    if (__ballot_sync(ALL_LANES, t.flags == ALL_KEPT << 8 * KEPT) == ALL_LANES) {
        t.content = ALL;
    } else {
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) {
            const int score_at = score_here - first_of_lane(j);
            const unsigned scored =
                has_score && score_at >= 0 && score_at < QUAD ? 1u << score_at : 0;
            const unsigned output = t.bits(KEPT, j) | scored;
            const unsigned before_end = lowest_bits(last - first_of_lane(j) + 1);
            t.set(OUTPUT, output << QUAD * j);
            t.set(STEP, (args.multiply ? before_end | scored : output) << QUAD * j);
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                if (!t.is(OUTPUT, j, i)) t.value[j][i] = 0.0f;
                if (!t.is(KEPT, j, i)) t.reward[j][i] = 0.0f;
            }
        }
        t.content = __ballot_sync(ALL_LANES, t.flags != 0) ? SOME : NONE;
    }
    if (!has_score) return;
    const float reward = shaped(args.shaping, score);
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            if (first_of_lane(j) + i == score_here) t.reward[j][i] += reward;
        }
    }
}

// For each segment the map of the tokens from the lane's first on.
template <bool TWO, bool OWN, Content CONTENT>
static __device__ __forceinline__ void scan(const GaeArgs& args, const Tokens& t,
                                            const Shared* shared, Map (&maps)[WARP_SEGMENTS]) {
    const Decay& decay = decay_of<OWN>(args, shared);
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        Map& map = maps[j];
        map = {0, {0.0f, 0.0f}};
#pragma unroll
        for (int i = QUAD - 1; i >= 0; i--) {
            if (t.is<CONTENT>(DONE, j, i)) map = {ENDED, {0.0f, 0.0f}};
            if (t.is<CONTENT>(STEP, j, i)) {
                const float value = t.value[j][i], reward = t.reward[j][i];
                map.add.u = step(decay, value, reward, map.add.u);
                if (TWO) {
                    const float of_returns = map.add.of_returns;
                    map.add.of_returns = step(args.returns_decay, value, reward, of_returns);
                }
                map.steps++;
            }
        }
    }
    if (CONTENT == NONE) return;
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
        const bool inside = lane_of_thread() + distance < WARP;
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) {
            Map& map = maps[j];
            State later = {__shfl_down_sync(ALL_LANES, map.add.u, distance), 0.0f};
            if (TWO) later.of_returns = __shfl_down_sync(ALL_LANES, map.add.of_returns, distance);
            if (CONTENT == ALL) {
                // All that a lane adds to are as many steps.
                const int steps = QUAD * distance;
                if (inside) {
                    map.add = {fmaf(decay.powers[steps], later.u, map.add.u),
                               TWO ? fmaf(args.returns_decay.powers[steps], later.of_returns,
                                          map.add.of_returns)
                                   : 0.0f};
                }
            } else {
                const int steps = __shfl_down_sync(ALL_LANES, map.steps, distance);
                if (inside) {
                    map.add = apply<TWO>(map, later, shared);
                    map.steps += steps;
                }
            }
        }
    }
    if (CONTENT == ALL) {
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) maps[j].steps = SEGMENT - first_of_lane(0);
    }
}

template <bool TWO, bool OWN = false>
static __device__ __forceinline__ void scan(const GaeArgs& args, const Tokens& t,
                                            const Shared* shared, Map (&maps)[WARP_SEGMENTS]) {
    t.with_content([&](auto content) { scan<TWO, OWN, content.value>(args, t, shared, maps); });
}

// The map of a whole segment, from its first lane.
template <bool TWO>
static __device__ __forceinline__ Map of_segment(const Map& map) {
    return {__shfl_sync(ALL_LANES, map.steps, 0),
            {__shfl_sync(ALL_LANES, map.add.u, 0),
             TWO ? __shfl_sync(ALL_LANES, map.add.of_returns, 0) : 0.0f}};
}

// u after each of the lane's tokens of a segment, 0 where an episode ends; `u` is that after the
// last.
template <Content CONTENT>
static __device__ __forceinline__ void unroll(const Decay& decay, const Tokens& t, int j, float u,
                                              float (&after)[QUAD]) {
#pragma unroll
    for (int i = QUAD - 1; i >= 0; i--) {
        if (t.is<CONTENT>(DONE, j, i)) u = 0.0f;
        after[i] = u;
        if (t.is<CONTENT>(STEP, j, i)) u = step(decay, t.value[j][i], t.reward[j][i], u);
    }
}

// What comes of a segment; `s` is u after it. The advantages are added to those of the thread.
template <bool TWO, bool OWN, Content CONTENT>
static __device__ __forceinline__ void outputs(const GaeArgs& args, const Tokens& t, int j,
                                               const Map& map, State s, Shared* shared,
                                               float (&advantages)[QUAD], float (&returns)[QUAD]) {
    if (CONTENT != NONE) {
        // The tokens from the next lane's first on.
        Map later = {CONTENT == ALL ? map.steps - QUAD : __shfl_down_sync(ALL_LANES, map.steps, 1),
                     {__shfl_down_sync(ALL_LANES, map.add.u, 1), 0.0f}};
        if (TWO) later.add.of_returns = __shfl_down_sync(ALL_LANES, map.add.of_returns, 1);
        if (lane_of_thread() < WARP - 1) s = apply<TWO, CONTENT == SOME>(later, s, shared);
    }
    float after[QUAD];
    unroll<CONTENT>(decay_of<OWN>(args, shared), t, j, s.u, after);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const bool kept = t.is<CONTENT>(KEPT, j, i);
        advantages[i] = kept ? t.reward[j][i] + (after[i] - t.value[j][i]) : 0.0f;
    }
    if (args.partials && CONTENT != NONE) {
        Deviations d = shared->threads[threadIdx.x];
        add(d, advantages, t.bits<CONTENT>(KEPT, j));
        shared->threads[threadIdx.x] = d;
    }
    if (TWO) unroll<CONTENT>(args.returns_decay, t, j, s.of_returns, after);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        returns[i] = t.is<CONTENT>(OUTPUT, j, i) ? t.reward[j][i] + after[i] : 0.0f;
    }
}

// Writes what came of a warp's segments; `after` is u after each.
template <bool TWO, bool OWN = false>
static __device__ __forceinline__ void finish(const GaeArgs& args, const Place& place, Tokens& t,
                                              const Map (&maps)[WARP_SEGMENTS],
                                              const State (&after)[WARP_SEGMENTS], Shared* shared) {
    // Flags cost an instruction each; kept in registers since the scan they would crowd out others.
    t.flags = afresh(t.flags);
#pragma unroll
    for (int j = WARP_SEGMENTS - 1; j >= 0; j--) {
        if (j * SEGMENT >= place.left) continue;
        float advantages[QUAD], returns[QUAD];
        t.with_content([&](auto content) {
            outputs<TWO, OWN, content.value>(args, t, j, maps[j], after[j], shared, advantages,
                                             returns);
        });
        store_tokens(args.advantages, place, j, advantages);
        store_tokens(args.returns, place, j, returns);
        if (args.shaped_rewards) store_tokens(args.shaped_rewards, place, j, t.reward[j]);
    }
}

// Leaves the moments of what all threads of the block wrote.
static __device__ __forceinline__ void write_partial(const GaeArgs& args, int64_t index,
                                                     Shared* shared) {
    if (!args.partials) return;
    const Deviations d = block_merge(shared->threads[threadIdx.x], shared->warps);
    if (threadIdx.x == 0) args.partials[index] = moments_of(d);
}

// Block [warps x 32], a row a warp; the moments are those of as many rows as there are warps.
template <bool TWO>
static __device__ __forceinline__ void warp_rows(const GaeArgs& args, Shared* shared) {
    load_powers<TWO>(args, shared);
    __syncthreads();
    const int warps = blockDim.x / WARP;
    for (int64_t first = int64_t(blockIdx.x) * warps; first < args.rows;
         first += int64_t(gridDim.x) * warps) {
        shared->threads[threadIdx.x] = no_deviations();
        const int64_t row = first + threadIdx.x / WARP;
        if (row < args.rows) {
            const Place place(range_of_row(args.offsets, row, args.tokens), 0);
            Tokens t;
            Score score;
            load(args, place, t, [&] { score = score_of(args, row); });
            classify(args, place, args.mask ? last_kept(t) : place.left - 1, score, t);
            Map maps[WARP_SEGMENTS];
            scan<TWO>(args, t, shared, maps);
            State s = end_of_row(args, row), after[WARP_SEGMENTS];
#pragma unroll
            for (int j = WARP_SEGMENTS - 1; j >= 0; j--) {
                after[j] = s;
                s = apply<TWO>(of_segment<TWO>(maps[j]), s, shared);
            }
            finish<TWO>(args, place, t, maps, after, shared);
        }
        write_partial(args, first / warps, shared);
    }
}

// From u after a row's tile to u before it; takes a copy of what it is after each of the warp's
// segments.
template <bool ENDS>
static __device__ __forceinline__ void follow(const float (&factors)[BLOCK_SEGMENTS],
                                              const float (&adds)[BLOCK_SEGMENTS], float& u,
                                              float (&after)[WARP_SEGMENTS]) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    constexpr int AHEAD = 4;  // warps whose maps are read before the first of them is needed
#pragma unroll
    for (int end = MAX_WARPS; end > 0; end -= AHEAD) {
        // What warps that are missing have is not used.
        const int first = (end - AHEAD) * WARP_SEGMENTS;
        float factor[AHEAD * WARP_SEGMENTS], add[AHEAD * WARP_SEGMENTS];
#pragma unroll
        for (int k = 0; k < AHEAD * WARP_SEGMENTS; k++) {
            factor[k] = factors[first + k];
            add[k] = adds[first + k];
        }
#pragma unroll
        for (int of_warp = end - 1; of_warp >= end - AHEAD; of_warp--) {
            if (of_warp >= warps) continue;
            float here[WARP_SEGMENTS];
#pragma unroll
            for (int j = WARP_SEGMENTS - 1; j >= 0; j--) {
                const int k = of_warp * WARP_SEGMENTS + j - first;
                here[j] = u;
                u = follow<ENDS>(factor[k], add[k], u);
            }
            if (of_warp != warp) continue;
#pragma unroll
            for (int j = 0; j < WARP_SEGMENTS; j++) after[j] = here[j];
        }
    }
}

template <bool TWO, bool ENDS>
static __device__ __forceinline__ void follow(const Chain<BLOCK_SEGMENTS>& chain, State& s,
                                              State (&after)[WARP_SEGMENTS]) {
    float u[WARP_SEGMENTS], of_returns[WARP_SEGMENTS] = {};
    follow<ENDS>(chain.factors[0], chain.adds[0], s.u, u);
    if (TWO) follow<ENDS>(chain.factors[1], chain.adds[1], s.of_returns, of_returns);
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) after[j] = {u[j], of_returns[j]};
}

// Block [threads], a row a block.
template <bool TWO, bool OWN = false>
static __device__ __forceinline__ void block_rows(const GaeArgs& args, Shared* shared) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int mine = warp * WARP_SEGMENTS, tile_tokens = warps * WARP_SEGMENTS * SEGMENT;
    // Rows of that length are counted in 32 bits: 2^32 of them fit no memory.
    const unsigned rows = unsigned(args.rows);
    bool has_powers = false;
    for (unsigned row = blockIdx.x; row < rows; row += gridDim.x) {
        State s = {0.0f, 0.0f};
        int last = NO_TOKEN;  // the row's last unmasked one, counted from the tile's first
        int tiles = args.tiles;
        if (OWN && args.offsets) {
            const RowRange range = range_in_pack(args.offsets, row, args.tokens);
            tiles = int((range.tokens + tile_tokens - 1) / tile_tokens);
            if (tiles == 0 && args.partials) shared->threads[threadIdx.x] = no_deviations();
        }
        if (OWN) {
            // What the table had was read.
            __syncthreads();
            make_own_decay(args, row, shared);
            __syncthreads();
        }
        for (int tile = tiles - 1; tile >= 0; tile--) {
            const int64_t first = int64_t(tile) * tile_tokens + mine * SEGMENT;
            const int64_t* offsets = OWN ? args.offsets : nullptr;
            const Place place(range_of_row(offsets, row, args.tokens), first);
            Tokens t;
            load(args, place, t, [&] {
                if (tile < tiles - 1) return;
                if (OWN ? !has_powers : row == blockIdx.x) load_powers<TWO, !OWN>(args, shared);
                if (OWN) has_powers = true;
                if (args.partials) shared->threads[threadIdx.x] = no_deviations();
                if (threadIdx.x == 0) shared->score = score_of(args, row);
                s = end_of_row(args, row);
            });
            const bool find = args.mask && last == NO_TOKEN;
            if (find) {
                int kept = last_kept(t);
                if (kept >= 0) kept += mine * SEGMENT;
                // If that is the last token before the tile, its score may be in the tile.
                if (mine == 0 && kept < 0 && place.inner) {
                    kept = args.mask[place.offset - 1] ? -1 : NO_TOKEN;
                }
                if (lane_of_thread() == 0) shared->last[warp] = kept;
            }
            // The table of powers, the score and shared->last are there; what shared->chain had was
            // read.
            __syncthreads();
            if (find) {
                const int lane = lane_of_thread();
                const unsigned some =
                    __ballot_sync(ALL_LANES, lane < warps && shared->last[lane] != NO_TOKEN);
                if (some) last = shared->last[WARP - 1 - __clz(some)];
            }
            const int last_here = args.mask ? last - mine * SEGMENT : place.left - 1;
            classify(args, place, last_here, shared->score, t);
            // Counted from the next tile's first; so far away is as good as endless.
            if (last != NO_TOKEN) last = min(last, 1 << 30) + tile_tokens;
            Map maps[WARP_SEGMENTS];
            scan<TWO, OWN>(args, t, shared, maps);
            if (lane_of_thread() == 0) {
#pragma unroll
                for (int j = 0; j < WARP_SEGMENTS; j++) {
                    const Total total = total_of<TWO>(maps[j], shared);
                    shared->chain.set(mine + j, total);
                }
            }
            __syncthreads();
            State after[WARP_SEGMENTS];
            args.dones ? follow<TWO, true>(shared->chain, s, after)
                       : follow<TWO, false>(shared->chain, s, after);
            finish<TWO, OWN>(args, place, t, maps, after, shared);
        }
        write_partial(args, row, shared);
    }
}

// Block [threads], a row a block: the last unmasked token, from the end, 64 bytes a thread at a
// time.
static __device__ __forceinline__ void last_of_rows(const GaeArgs& args, int64_t* of_warps) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const uint8_t* mask = args.mask + row * args.tokens;
        // Vectors are counted from the aligned address at or before the row.
        const unsigned skip = misalignment(mask, 16);
        const int64_t vectors = (args.tokens + skip + 15) / 16;
        int64_t last = NO_TOKEN;
        for (int64_t end = vectors; end > 0 && last < 0; end -= IN_FLIGHT * blockDim.x) {
            uint4 v[IN_FLIGHT];
            int64_t first[IN_FLIGHT];  // token of a vector
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                first[i] = 16 * (end - 1 - i * int64_t(blockDim.x) - threadIdx.x) - skip;
                v[i] = make_uint4(0, 0, 0, 0);
                const bool inside = first[i] >= 0 && first[i] + 16 <= args.tokens;
                if (inside) v[i] = load_once(mask + first[i]);
            }
            int64_t kept = NO_TOKEN;
#pragma unroll
            for (int i = IN_FLIGHT - 1; i >= 0; i--) {
                const uint32_t words[4] = {v[i].x, v[i].y, v[i].z, v[i].w};
#pragma unroll
                for (int w = 0; w < 4; w++) {
                    if (words[w]) kept = first[i] + 4 * w + 3 - __clz(words[w]) / 8;
                }
                if (first[i] < 0 || first[i] + 16 > args.tokens) {
                    for (int64_t at = first[i]; at < first[i] + 16; at++) {
                        if (at >= 0 && at < args.tokens && mask[at]) kept = at;
                    }
                }
            }
            kept = highest_in_warp(kept);
            // What was there was read.
            __syncthreads();
            if (lane_of_thread() == 0) of_warps[warp] = kept;
            __syncthreads();
            for (int other = 0; other < warps; other++) {
                if (of_warps[other] > last) last = of_warps[other];
            }
        }
        if (threadIdx.x == 0) args.last[row] = last;
    }
}

// Block [threads], a tile of a row a block: leaves the maps of the segments, or knows u after each
// and writes what comes of them.
template <bool TWO, bool KNOWN>
static __device__ __forceinline__ void for_tiles(const GaeArgs& args, Shared* shared) {
    const int segments = blockDim.x / WARP * WARP_SEGMENTS;
    // Rows are few, so that tiles are counted in 32 bits.
    const unsigned tiles = unsigned(args.rows) * args.tiles;
    for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
        const unsigned row = index / args.tiles, tile = index % args.tiles;
        const int64_t segment = int64_t(tile) * segments + threadIdx.x / WARP * WARP_SEGMENTS;
        const int64_t first = segment * SEGMENT, of_segments = row * args.segments + segment;
        const Place place(row, args.tokens, first);
        const int64_t last = args.mask ? args.last[row] : args.tokens - 1;
        State after[WARP_SEGMENTS];
        if (KNOWN) {
#pragma unroll
            for (int j = 0; j < WARP_SEGMENTS; j++) {
                if (j * SEGMENT < place.left) after[j] = args.carries[of_segments + j];
            }
        }
        Tokens t;
        Score score;
        load(args, place, t, [&] {
            score = score_of(args, row);
            if (index == blockIdx.x) {
                load_powers<TWO>(args, shared);
                __syncthreads();
            }
        });
        // Far outside the warp's segments is as good as just outside.
        const int last_here =
            int(max(int64_t(NO_TOKEN), min(last - first, int64_t(WARP_SEGMENTS * SEGMENT))));
        classify(args, place, last_here, score, t);
        Map maps[WARP_SEGMENTS];
        scan<TWO>(args, t, shared, maps);
        if (KNOWN) {
            if (args.partials) shared->threads[threadIdx.x] = no_deviations();
            finish<TWO>(args, place, t, maps, after, shared);
            write_partial(args, index, shared);
        } else if (lane_of_thread() == 0) {
#pragma unroll
            for (int j = 0; j < WARP_SEGMENTS; j++) {
                if (j * SEGMENT < place.left) {
                    args.totals[of_segments + j] = total_of<TWO>(maps[j], shared);
                }
            }
        }
    }
}

// A thread: puts u after each segment in the place of the segment's map, from the last one on.
// Returns u before the first.
template <bool ENDS, int N>
static __device__ __forceinline__ float follow(const float* factors, float (&adds)[N], int count,
                                               float u) {
    const auto next = [&](int k, float factor, float add) {
        const float before = follow<ENDS>(factor, add, u);
        adds[k] = u;
        u = before;
    };
    constexpr int AHEAD = 32;  // maps that are read before the first of them is needed
    while (count % AHEAD) {
        count--;
        next(count, factors[count], adds[count]);
    }
    // Counted so that the compiler sees that vectors are aligned.
    for (int group = count / AHEAD - 1; group >= 0; group--) {
        const int first = group * AHEAD;
        float f[AHEAD], a[AHEAD];
#pragma unroll
        for (int i = 0; i < AHEAD; i++) {
            f[i] = factors[first + i];
            a[i] = adds[first + i];
        }
#pragma unroll
        for (int i = AHEAD - 1; i >= 0; i--) next(first + i, f[i], a[i]);
    }
    return u;
}

// Block [MAX_THREADS], a row a block: u after each segment, from the last one on. One thread goes
// through the maps of many segments, and another for the returns.
static __device__ __forceinline__ void carry(const GaeArgs& args, Chain<CARRY_SEGMENTS>* chain) {
    const int lane = lane_of_thread(), warp = threadIdx.x / WARP;
    const int states = args.two ? 2 : 1;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const Total* totals = args.totals + row * args.segments;
        State* carries = args.carries + row * args.segments;
        float u = end_of_row(args, row).u;
        int64_t first = (args.segments - 1) / CARRY_SEGMENTS * CARRY_SEGMENTS;
        for (; first >= 0; first -= CARRY_SEGMENTS) {
            const int count = int(min(args.segments - first, int64_t(CARRY_SEGMENTS)));
            Total mine[CARRY_SEGMENTS / MAX_THREADS];
#pragma unroll
            for (int i = 0; i < CARRY_SEGMENTS / MAX_THREADS; i++) {
                const int k = threadIdx.x + i * MAX_THREADS;
                if (k < count) mine[i] = totals[first + k];
            }
#pragma unroll
            for (int i = 0; i < CARRY_SEGMENTS / MAX_THREADS; i++) {
                const int k = threadIdx.x + i * MAX_THREADS;
                if (k < count) chain->set(k, mine[i]);
            }
            __syncthreads();
            if (lane == 0 && warp < states) {
                float (&adds)[CARRY_SEGMENTS] = chain->adds[warp];
                u = args.dones ? follow<true>(chain->factors[warp], adds, count, u)
                               : follow<false>(chain->factors[warp], adds, count, u);
            }
            __syncthreads();
            for (int k = threadIdx.x; k < count; k += blockDim.x) {
                carries[first + k] = {chain->adds[0][k], chain->adds[1][k]};
            }
            // What is there was read before the next maps come.
            __syncthreads();
        }
    }
}

// Blocks a multiprocessor: with three those from sm_100 on would spill.
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1000
constexpr int OWN_BLOCKS = 2;
#else
constexpr int OWN_BLOCKS = 3;
#endif

// Returns with a lambda of their own are rare, and have kernels of their own: in the same they would
// cost all others registers.
#define KERNELS(two, name, own_name)                                  \
    KERNEL(256, two ? 2 : 3, gae_warp##name, GaeArgs) {               \
        SHARED(Shared, shared, 1);                                    \
        warp_rows<two>(args, shared);                                 \
    }                                                                 \
    KERNEL(256, two ? 2 : 3, gae_block##name, GaeArgs) {              \
        SHARED(Shared, shared, 1);                                    \
        block_rows<two>(args, shared);                                \
    }                                                                 \
    KERNEL(256, two ? 2 : OWN_BLOCKS, gae_block##own_name, GaeArgs) { \
        SHARED(Shared, shared, 1);                                    \
        block_rows<two, true>(args, shared);                          \
    }                                                                 \
    KERNEL(256, two ? 2 : 4, gae_totals##name, GaeArgs) {             \
        SHARED(Shared, shared, 1);                                    \
        for_tiles<two, false>(args, shared);                          \
    }                                                                 \
    KERNEL(256, two ? 2 : 3, gae_apply##name, GaeArgs) {              \
        SHARED(Shared, shared, 1);                                    \
        for_tiles<two, true>(args, shared);                           \
    }

KERNELS(false, _f32, _own_f32)
KERNELS(true, _two_f32, _two_own_f32)

KERNEL(256, 4, gae_last_f32, GaeArgs) {
    SHARED(int64_t, of_warps, MAX_WARPS);
    last_of_rows(args, of_warps);
}

KERNEL(256, 2, gae_carry_f32, GaeArgs) {
    SHARED(Chain<CARRY_SEGMENTS>, chain, 1);
    carry(args, chain);
}

KERNEL(512, 1, gae_merge_f32, MergeArgs) { merge_moments(args); }
