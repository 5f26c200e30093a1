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
// its segment of 128 tokens; from segment to segment u goes on in order, the last first. All
// kernels do just this, and so give the same bits, which depend on nothing but the row up to its
// last unmasked token: neither on padding, alignment and batch, nor on the kernel. Which is:
//     warp    a warp takes a short row
//     block   a block takes a row, from its end, a tile of 2 segments a warp at a time; the maps of
//             segments go through shared memory
//     last, totals, carry, apply: few long rows. Where a row's last unmasked token is, is found
//             first (last). A block takes a tile of a row and leaves the maps of its segments
//             (totals); a warp goes through those of a row (carry); a block takes a tile again, and
//             knows u where its segments end (apply)
//     merge   puts together the moments that every block left
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
    float rest;                  // gamma (1 - lambda)
    float powers[SEGMENT + 1];   // of gamma lambda
};

// How a row's score becomes a reward.
struct Shaping {
    double mean;
    double inverse_std;
    double clip;           // or infinity
    double missing;        // for what has no end of sequence: subtracted, or taken instead
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

struct GaeArgs {
    const float* values;      // [rows, tokens]
    const float* rewards;     // [rows, tokens], or null: zeros
    const float* kl;          // [rows, tokens], or null: zeros
    const float* scores;      // [rows], or null: zeros
    const uint8_t* has_eos;   // [rows], or null: ones
    const uint8_t* mask;      // [rows, tokens], or null: ones
    const uint8_t* dones;     // [rows, tokens], or null: zeros
    const float* bootstrap;   // [rows], or null: zeros
    float* advantages;        // [rows, tokens]
    float* returns;           // [rows, tokens]
    float* shaped_rewards;    // [rows, tokens], or null
    Moments* moments;         // not looked at: the merge's
    Moments* partials;        // a block's work; or null
    int64_t* last;            // a row: its last unmasked token, or -1
    Map* totals;              // a segment
    State* carries;           // a segment: u after it
    int64_t rows;
    int64_t tokens;
    int64_t segments;         // of a row
    int32_t tiles;            // of a row: what a block has in registers
    Shaping shaping;
    float gamma;
    float minus_kl_coef;
    int32_t multiply;         // gaps are steps
    int32_t after_last;       // the score is a step of its own, if there is room
    int32_t two;              // returns have a decay of their own
    Decay decay;
    Decay returns_decay;
};

struct Shared {
    float powers[2][SEGMENT + 1];
    Map totals[MAX_WARPS * WARP_SEGMENTS];
    int64_t last[MAX_WARPS];
    Deviations warps[MAX_WARPS];
    Deviations threads[MAX_THREADS];  // of the advantages that a thread wrote
};

// What a token can be. OUTPUT is what is kept, and the step of the score.
enum Flag { KEPT, DONE, STEP, OUTPUT };

// Some segments of a row: four tokens of each a lane. Eight bits for each flag say what they are,
// all in one register.
struct Tokens {
    float value[WARP_SEGMENTS][QUAD], reward[WARP_SEGMENTS][QUAD];
    uint32_t flags;

    static_assert(THREAD_TOKENS <= 8, "a flag has eight bits");

    __device__ __forceinline__ void set(Flag flag, unsigned bits) { flags |= bits << 8 * flag; }

    __device__ __forceinline__ bool is(Flag flag, int segment, int token) const {
        return flags >> (8 * flag + QUAD * segment + token) & 1;
    }

    // The bits of a segment.
    __device__ __forceinline__ unsigned bits(Flag flag, int segment) const {
        return flags >> (8 * flag + QUAD * segment) & 15;
    }
};

static __device__ __forceinline__ int lane_of_thread() { return threadIdx.x % WARP; }

// To be followed by a barrier.
static __device__ __forceinline__ void load_powers(const GaeArgs& args, Shared* shared) {
    for (int i = threadIdx.x; i <= SEGMENT; i += blockDim.x) {
        shared->powers[0][i] = args.decay.powers[i];
        shared->powers[1][i] = args.returns_decay.powers[i];
    }
}

template <bool TWO>
static __device__ __forceinline__ State apply(const Map& map, State s, const Shared* shared) {
    if (map.steps >= ENDED) return map.add;
    s.u = fmaf(shared->powers[0][map.steps], s.u, map.add.u);
    if (TWO) s.of_returns = fmaf(shared->powers[1][map.steps], s.of_returns, map.add.of_returns);
    return s;
}

// One step of a token that ends no episode.
static __device__ __forceinline__ float step(const Decay& decay, float value, float reward,
                                             float u) {
    const float once = decay.powers[1];
    return fmaf(once, u, fmaf(decay.rest, value, once * reward));
}

// u after a row's last token.
static __device__ __forceinline__ State end_of_row(const GaeArgs& args, int64_t row) {
    const float u = args.bootstrap ? args.gamma * args.bootstrap[row] : 0.0f;
    return {u, u};
}

static __device__ __forceinline__ float score_of(const GaeArgs& args, int64_t row) {
    const Shaping& s = args.shaping;
    const auto clipped = [&](double x) { return x < -s.clip ? -s.clip : x > s.clip ? s.clip : x; };
    double x = args.scores[row];
    if (s.clips_first) x = clipped(x);
    x = (x - s.mean) * s.inverse_std;
    if (!s.clips_first) x = clipped(x);
    const bool has_eos = !args.has_eos || args.has_eos[row];
    return float(has_eos ? x : s.replaces ? s.missing : x - s.missing);
}

// Reads a warp's segments. The rewards are dense rewards less the KL penalty.
static __device__ __forceinline__ void load(const GaeArgs& args, const Place& place, Tokens& t) {
    float kl[WARP_SEGMENTS][QUAD];
    load_tokens(args.values, place, t.value);
    if (args.rewards) load_tokens(args.rewards, place, t.reward);
    if (args.kl) load_tokens(args.kl, place, kl);
    uint32_t mask[WARP_SEGMENTS], dones[WARP_SEGMENTS];
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        if (args.mask) mask[j] = load_flags(args.mask, place, j);
        if (args.dones) dones[j] = load_flags(args.dones, place, j);
    }
    t.flags = 0;
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        const unsigned kept =
            args.mask ? flag_bits(mask[j]) : lowest_bits(place.left - first_of_lane(j));
        t.set(KEPT, kept << QUAD * j);
        if (args.dones) t.set(DONE, (flag_bits(dones[j]) & kept) << QUAD * j);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            const float dense = args.rewards ? t.reward[j][i] : 0.0f;
            t.reward[j][i] = args.kl ? fmaf(args.minus_kl_coef, kl[j][i], dense) : dense;
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

// The last unmasked token of a warp's segments; -1 if there is none.
static __device__ __forceinline__ int64_t last_kept(const Tokens& t, int64_t first) {
    int64_t last = -1;
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        const unsigned kept = t.bits(KEPT, j);
        if (kept) last = first + first_of_lane(j) + 31 - __clz(kept);
    }
    return highest_in_warp(last);
}

// Says of every token what it is, given the row's last unmasked one, and clears what is masked.
static __device__ __forceinline__ void classify(const GaeArgs& args, int64_t row, int64_t first,
                                                int64_t last, Tokens& t) {
    const bool has_score = args.scores && last >= 0;
    const int64_t score = args.after_last && last + 1 < args.tokens ? last + 1 : last;
    // Counted from the warp's first token; far outside its segments is as good as just outside.
    const auto here = [&](int64_t token) {
        return int(max(int64_t(-1), min(token - first, int64_t(WARP_SEGMENTS * SEGMENT))));
    };
    const int last_here = here(last), score_here = has_score ? here(score) : -1;
    float score_value = 0.0f;
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        const int score_at = score_here - first_of_lane(j);
        const unsigned scored = score_at >= 0 && score_at < QUAD ? 1u << score_at : 0;
        const unsigned output = t.bits(KEPT, j) | scored;
        const unsigned before_end = lowest_bits(last_here - first_of_lane(j) + 1);
        t.set(OUTPUT, output << QUAD * j);
        t.set(STEP, (args.multiply ? before_end | scored : output) << QUAD * j);
        if (scored) score_value = score_of(args, row);
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            if (!t.is(OUTPUT, j, i)) t.value[j][i] = 0.0f;
            if (!t.is(KEPT, j, i)) t.reward[j][i] = 0.0f;
            if (i == score_at) t.reward[j][i] += score_value;
        }
    }
}

// For each segment the map of the tokens from the lane's first on.
template <bool TWO>
static __device__ __forceinline__ void scan(const GaeArgs& args, const Tokens& t,
                                            const Shared* shared, Map (&maps)[WARP_SEGMENTS]) {
#pragma unroll
    for (int j = 0; j < WARP_SEGMENTS; j++) {
        Map& map = maps[j];
        map = {0, {0.0f, 0.0f}};
#pragma unroll
        for (int i = QUAD - 1; i >= 0; i--) {
            if (t.is(DONE, j, i)) map = {ENDED, {0.0f, 0.0f}};
            if (t.is(STEP, j, i)) {
                const float value = t.value[j][i], reward = t.reward[j][i];
                map.add.u = step(args.decay, value, reward, map.add.u);
                if (TWO) {
                    const float of_returns = map.add.of_returns;
                    map.add.of_returns = step(args.returns_decay, value, reward, of_returns);
                }
                map.steps++;
            }
        }
    }
#pragma unroll
    for (int distance = 1; distance < WARP; distance *= 2) {
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) {
            Map later = {__shfl_down_sync(ALL_LANES, maps[j].steps, distance),
                         {__shfl_down_sync(ALL_LANES, maps[j].add.u, distance), 0.0f}};
            if (TWO) {
                const float of_returns = maps[j].add.of_returns;
                later.add.of_returns = __shfl_down_sync(ALL_LANES, of_returns, distance);
            }
            if (lane_of_thread() + distance < WARP) {
                maps[j].add = apply<TWO>(maps[j], later.add, shared);
                maps[j].steps += later.steps;
            }
        }
    }
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
static __device__ __forceinline__ void unroll(const Decay& decay, const Tokens& t, int j, float u,
                                              float (&after)[QUAD]) {
#pragma unroll
    for (int i = QUAD - 1; i >= 0; i--) {
        if (t.is(DONE, j, i)) u = 0.0f;
        after[i] = u;
        if (t.is(STEP, j, i)) u = step(decay, t.value[j][i], t.reward[j][i], u);
    }
}

// Writes what came of a segment; `s` is u after it.
template <bool TWO>
static __device__ __forceinline__ void finish(const GaeArgs& args, const Place& place, Tokens& t,
                                              int j, const Map& map, State s, Shared* shared) {
    // Flags cost an instruction each; kept in registers since the scan they would crowd out others.
    t.flags = afresh(t.flags);
    // The tokens from the next lane's first on.
    Map later = {__shfl_down_sync(ALL_LANES, map.steps, 1),
                 {__shfl_down_sync(ALL_LANES, map.add.u, 1), 0.0f}};
    if (TWO) later.add.of_returns = __shfl_down_sync(ALL_LANES, map.add.of_returns, 1);
    if (lane_of_thread() < WARP - 1) s = apply<TWO>(later, s, shared);

    float after[QUAD], x[QUAD];
    unroll(args.decay, t, j, s.u, after);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        x[i] = t.is(KEPT, j, i) ? t.reward[j][i] + (after[i] - t.value[j][i]) : 0.0f;
    }
    store_tokens(args.advantages, place, j, x);
    if (args.partials) {
        Deviations d = shared->threads[threadIdx.x];
        add(d, x, t.bits(KEPT, j));
        shared->threads[threadIdx.x] = d;
    }
    if (TWO) unroll(args.returns_decay, t, j, s.of_returns, after);
#pragma unroll
    for (int i = 0; i < QUAD; i++) x[i] = t.is(OUTPUT, j, i) ? t.reward[j][i] + after[i] : 0.0f;
    store_tokens(args.returns, place, j, x);
    if (args.shaped_rewards) store_tokens(args.shaped_rewards, place, j, t.reward[j]);
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
    const int warps = blockDim.x / WARP;
    for (int64_t first = int64_t(blockIdx.x) * warps; first < args.rows;
         first += int64_t(gridDim.x) * warps) {
        shared->threads[threadIdx.x] = no_deviations();
        const int64_t row = first + threadIdx.x / WARP;
        if (row < args.rows) {
            const Place place(row, args.tokens, 0);
            Tokens t;
            load(args, place, t);
            const int64_t last = args.mask ? last_kept(t, 0) : args.tokens - 1;
            classify(args, row, 0, last, t);
            Map maps[WARP_SEGMENTS];
            scan<TWO>(args, t, shared, maps);
            State s = end_of_row(args, row);
#pragma unroll
            for (int j = WARP_SEGMENTS - 1; j >= 0; j--) {
                const Map segment = of_segment<TWO>(maps[j]);
                if (j * SEGMENT < place.left) finish<TWO>(args, place, t, j, maps[j], s, shared);
                s = apply<TWO>(segment, s, shared);
            }
        }
        write_partial(args, first / warps, shared);
    }
}

// Block [threads], a row a block.
template <bool TWO>
static __device__ __forceinline__ void block_rows(const GaeArgs& args, Shared* shared) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    const int mine = warp * WARP_SEGMENTS, segments = warps * WARP_SEGMENTS;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        shared->threads[threadIdx.x] = no_deviations();
        State s = end_of_row(args, row);
        bool found = !args.mask;  // the row's last unmasked token
        for (int tile = args.tiles - 1; tile >= 0; tile--) {
            const int64_t first = (int64_t(tile) * segments + mine) * SEGMENT;
            const Place place(row, args.tokens, first);
            Tokens t;
            load(args, place, t);
            if (!found) {
                int64_t kept = last_kept(t, first);
                // If that is the last token before the tile, its score may be in the tile.
                if (mine == 0 && kept < 0 && first > 0) {
                    kept = args.mask[row * args.tokens + first - 1] ? first - 1 : -1;
                }
                if (lane_of_thread() == 0) shared->last[warp] = kept;
            }
            // The table of powers and shared->last are there; what shared->totals had was read.
            __syncthreads();
            int64_t last = args.tokens - 1;
            if (args.mask) {
                last = -1;
                for (int other = 0; other < warps; other++) last = max(last, shared->last[other]);
                found = last >= 0;
            }
            classify(args, row, first, last, t);
            Map maps[WARP_SEGMENTS];
            scan<TWO>(args, t, shared, maps);
            if (lane_of_thread() == 0) {
#pragma unroll
                for (int j = 0; j < WARP_SEGMENTS; j++) shared->totals[mine + j] = maps[j];
            }
            __syncthreads();
            for (int k = segments - 1; k >= mine + WARP_SEGMENTS; k--) {
                s = apply<TWO>(shared->totals[k], s, shared);
            }
#pragma unroll
            for (int j = WARP_SEGMENTS - 1; j >= 0; j--) {
                finish<TWO>(args, place, t, j, maps[j], s, shared);
                s = apply<TWO>(shared->totals[mine + j], s, shared);
            }
            for (int k = mine - 1; k >= 0 && tile > 0; k--) {
                s = apply<TWO>(shared->totals[k], s, shared);
            }
        }
        write_partial(args, row, shared);
    }
}

// Block [threads], a row a block: the last unmasked token, from the end, 64 bytes a thread at a
// time.
static __device__ __forceinline__ void last_of_rows(const GaeArgs& args, Shared* shared) {
    const int warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int64_t row = blockIdx.x; row < args.rows; row += gridDim.x) {
        const uint8_t* mask = args.mask + row * args.tokens;
        // Vectors are counted from the aligned address at or before the row.
        const unsigned skip = misalignment(mask, 16);
        const int64_t vectors = (args.tokens + skip + 15) / 16;
        int64_t last = -1;
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
            int64_t kept = -1;
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
            if (lane_of_thread() == 0) shared->last[warp] = kept;
            __syncthreads();
            for (int other = 0; other < warps; other++) {
                if (shared->last[other] > last) last = shared->last[other];
            }
        }
        if (threadIdx.x == 0) args.last[row] = last;
    }
}

// Block [threads], a tile of a row a block: calls work(tile counted over rows, the place of the
// warp's segments, the index of the first of those, its tokens, their maps).
template <bool TWO, class Work>
static __device__ __forceinline__ void for_tiles(const GaeArgs& args, const Shared* shared,
                                                 Work work) {
    const int segments = blockDim.x / WARP * WARP_SEGMENTS;
    // Rows are few, so that tiles are counted in 32 bits.
    const unsigned tiles = unsigned(args.rows) * args.tiles;
    for (unsigned index = blockIdx.x; index < tiles; index += gridDim.x) {
        const unsigned row = index / args.tiles, tile = index % args.tiles;
        const int64_t segment = int64_t(tile) * segments + threadIdx.x / WARP * WARP_SEGMENTS;
        const int64_t first = segment * SEGMENT;
        const Place place(row, args.tokens, first);
        Tokens t;
        load(args, place, t);
        classify(args, row, first, args.mask ? args.last[row] : args.tokens - 1, t);
        Map maps[WARP_SEGMENTS];
        scan<TWO>(args, t, shared, maps);
        work(index, place, row * args.segments + segment, t, maps);
    }
}

template <bool TWO>
static __device__ __forceinline__ void totals(const GaeArgs& args, const Shared* shared) {
    for_tiles<TWO>(args, shared, [&](int64_t, const Place& place, int64_t segment, Tokens&,
                                     const Map (&maps)[WARP_SEGMENTS]) {
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) {
            if (lane_of_thread() == 0 && j * SEGMENT < place.left) {
                args.totals[segment + j] = maps[j];
            }
        }
    });
}

// Block [warps x 32], a row a warp: u after each segment, from the last one on.
template <bool TWO>
static __device__ __forceinline__ void carry(const GaeArgs& args, const Shared* shared) {
    const int lane = lane_of_thread();
    const int64_t segments = args.segments;
    const int64_t step = int64_t(gridDim.x) * (blockDim.x / WARP);
    const int64_t begin = int64_t(blockIdx.x) * (blockDim.x / WARP) + threadIdx.x / WARP;
    for (int64_t row = begin; row < args.rows; row += step) {
        const Map* totals = args.totals + row * segments;
        const auto map_at = [&](int64_t segment) {
            return segment >= 0 && segment < segments ? totals[segment] : Map{0, {0.0f, 0.0f}};
        };
        State s = end_of_row(args, row);
        int64_t first = (segments - 1) / WARP * WARP;
        Map next = map_at(first + lane);
        for (; first >= 0; first -= WARP) {
            const Map map = next;
            // Under way while this one is worked on.
            next = map_at(first - WARP + lane);
            State mine = s;
#pragma unroll
            for (int i = WARP - 1; i >= 0; i--) {
                if (i == lane) mine = s;
                const Map other = {__shfl_sync(ALL_LANES, map.steps, i),
                                   {__shfl_sync(ALL_LANES, map.add.u, i),
                                    TWO ? __shfl_sync(ALL_LANES, map.add.of_returns, i) : 0.0f}};
                s = apply<TWO>(other, s, shared);
            }
            if (first + lane < segments) args.carries[row * segments + first + lane] = mine;
        }
    }
}

template <bool TWO>
static __device__ __forceinline__ void apply_carries(const GaeArgs& args, Shared* shared) {
    for_tiles<TWO>(args, shared, [&](int64_t index, const Place& place, int64_t segment,
                                     Tokens& t, const Map (&maps)[WARP_SEGMENTS]) {
        shared->threads[threadIdx.x] = no_deviations();
#pragma unroll
        for (int j = 0; j < WARP_SEGMENTS; j++) {
            if (j * SEGMENT < place.left) {
                finish<TWO>(args, place, t, j, maps[j], args.carries[segment + j], shared);
            }
        }
        write_partial(args, index, shared);
    });
}

KERNEL(256, 3, gae_warp_f32, GaeArgs) {
    SHARED(Shared, shared, 1);
    load_powers(args, shared);
    __syncthreads();
    args.two ? warp_rows<true>(args, shared) : warp_rows<false>(args, shared);
}

KERNEL(256, 3, gae_block_f32, GaeArgs) {
    SHARED(Shared, shared, 1);
    load_powers(args, shared);
    args.two ? block_rows<true>(args, shared) : block_rows<false>(args, shared);
}

KERNEL(256, 3, gae_last_f32, GaeArgs) {
    SHARED(Shared, shared, 1);
    last_of_rows(args, shared);
}

KERNEL(256, 3, gae_totals_f32, GaeArgs) {
    SHARED(Shared, shared, 1);
    load_powers(args, shared);
    __syncthreads();
    args.two ? totals<true>(args, shared) : totals<false>(args, shared);
}

KERNEL(256, 3, gae_carry_f32, GaeArgs) {
    SHARED(Shared, shared, 1);
    load_powers(args, shared);
    __syncthreads();
    args.two ? carry<true>(args, shared) : carry<false>(args, shared);
}

KERNEL(256, 3, gae_apply_f32, GaeArgs) {
    SHARED(Shared, shared, 1);
    load_powers(args, shared);
    __syncthreads();
    args.two ? apply_carries<true>(args, shared) : apply_carries<false>(args, shared);
}

KERNEL(512, 1, gae_merge_f32, MergeArgs) { merge_moments(args); }
