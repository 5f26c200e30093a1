// KL divergence of the policy from the reference model, forward and backward: sampled, from two
// log-probabilities a token (kl_token_*), and exact, from two rows of logits (kl_full_*).
// src/kl/mod.rs has the formulas and src/kl/cuda.rs the launches.
//
// Sampled. All tensors are [tokens] in f32, the mask [tokens] in u8. A block takes 8 KiB of each
// at a time, a thread two vectors of each, all loaded before the first is used (common/map.cuh).
//
// Bytes a token: forward reads 8 and writes 4; backward reads 12 and writes 4 for each gradient; a
// mask adds 1 byte read.
//
// Exact. The logits z and w are [rows, vocab] in f32, f16 or bf16; z is the tensor over whose
// distribution the mean is taken.
//
//     x_j = (z_j - max z) / temperature     P = sum e^{x_j}     gap = sum e^{x_j} (x_j - y_j) / P
//     y_j = (w_j - max w) / temperature     Q = sum e^{y_j}     KL  = gap + ln(Q / P)
//     dz_j = g p_j (x_j - y_j - gap) / temperature              p_j = e^{x_j} / P
//     dw_j = g (q_j - p_j) / temperature                        q_j = e^{y_j} / Q
//
// Forward writes KL, gap, max z, P, max w, Q and, for others than the KL, the mean of h_w, [7, rows] in f32, of which
// backward makes gradients in the type of the logits. It walks the two rows once, side by side: a warp or a block a row
// (common/rows.cuh), a thread every `threads`-th vector of both, four of each in flight. With so many
// at hand it looks for their maxima first, 16-bit floats two at a time, and takes the sums anew for
// larger maxima once for all of them. Then a column of 16-bit logits costs two exp and about eighteen
// instructions; an H200's memory leaves time for thirty.
// Backward takes each column by itself (common/map.cuh), two vectors of both in flight.
//
// The divergence to a mixture of both, and the total variation, look at the rows a second time
// (kl_divergence_*), when the sums are known: most of it is in the L2 cache still where rows are long.
//
// Bytes, with S for each tensor of logits and N rows: forward reads 2 S and writes 28 N, the second look
// as much again and 36 N less what the L2 cache has; backward reads 2 S + 32 N and writes S for each
// gradient. Rows that are masked out are not read, nor are, in backward, rows without upstream gradient or
// of KL NaN.
//
// Numbers. Everything is in f32. exp is 2^y by the hardware, to 2 ulp. The maxima are subtracted
// before scaling, so offsets common to a row cost nothing, and equal rows have a KL of exactly 0.
// p = 0 adds nothing; q = 0 under p > 0 makes the KL +inf. NaN, +inf or -inf throughout, in either
// row, make the row NaN. Rows may be aligned differently. Offsets are 64-bit.

#include "common/map.cuh"
#include "common/rows.cuh"
#include "common/softmax.cuh"
#include "common/token_kl.cuh"

struct TokenForwardArgs {
    const float* logp;      // [tokens]
    const float* ref_logp;  // [tokens]
    const uint8_t* mask;    // [tokens], or null: ones
    float* kl;              // [tokens]; may be logp or ref_logp
    int64_t tokens;
    TokenKl options;
};

// The gradients may be logp, ref_logp or grad_kl.
struct TokenBackwardArgs {
    const float* logp;      // [tokens]
    const float* ref_logp;  // [tokens]
    const uint8_t* mask;    // [tokens], or null: ones
    const float* grad_kl;   // [tokens]
    float* grad_logp;       // [tokens], or null
    float* grad_ref_logp;   // [tokens], or null
    int64_t tokens;
    TokenKl options;
};

// Sums over some columns of a pair of rows, with x = (z - max z) UNIT and y = (w - max w) UNIT.
struct PairSums {
    float max_z;
    float max_w;
    // Of 2^{x scale} and 2^{y scale}, with scale = log2(e) / (temperature UNIT).
    float sum_z;
    float sum_w;
    // Of 2^{x scale} (x - y). Infinite or NaN once a column had p > 0 and q = 0; else NaN only
    // where sum_z or sum_w is.
    float weighted;
};

// In this unit no number of differences of finite logits overflows. A power of 2, so it costs no
// digits; and it must leave the scale of the lowest temperature, 1e-30, finite.
constexpr float UNIT = 1.0f / (1 << 24);

// Rows of the stats: KL, gap, max z, P, max w, Q and the mean of h_w. After a second look KL is the
// divergence and gap the mean of h_z.
enum Stat { KL, GAP, MAX_Z, SUM_Z, MAX_W, SUM_W, GAP_W, STATS };

// What a divergence other than the KL is made of: c_z KL(p || m) + c_w KL(q || m) with m = a p + (1 - a) q.
struct Divergence {
    float share;  // a
    float rest;   // 1 - a
    float coef_z;
    float coef_w;
    int32_t is_total_variation;  // in its place
};

struct FullForwardArgs {
    const void* z;        // [rows, vocab]
    const void* w;        // [rows, vocab]
    const uint8_t* mask;  // [rows], or null: ones
    float* stats;         // [STATS, rows]
    int64_t rows;
    int64_t vocab;
    int32_t parts;  // of a row
    int32_t ahead;
    float inverse_temperature;
    Divergence divergence;
};

struct FullBackwardArgs {
    const void* z;         // [rows, vocab]
    const void* w;         // [rows, vocab]
    const uint8_t* mask;   // [rows], or null: ones
    const float* stats;    // [STATS, rows]
    const float* grad_kl;  // [rows]
    void* grad_z;          // [rows, vocab], or null; may be z
    void* grad_w;          // [rows, vocab], or null; may be w
    int64_t rows;
    int64_t vocab;
    int32_t chunks;         // ranges of columns of a row
    int32_t chunk_threads;  // a warp, or the whole block
    float inverse_temperature;
    Divergence divergence;
};

struct TokenValue {
    TokenKl options;

    template <int N>
    __device__ __forceinline__ void operator()(const float (&x)[2][N], int64_t,
                                               float (&kl)[1][N]) const {
        float d[N], slope[N];
#pragma unroll
        for (int i = 0; i < N; i++) d[i] = x[0][i] - x[1][i];
        kl_of_tokens(options, d, kl[0], slope);
    }
};

struct TokenGradient {
    TokenKl options;

    template <int N>
    __device__ __forceinline__ void operator()(const float (&x)[3][N], int64_t,
                                               float (&grad)[2][N]) const {
        float d[N], value[N], slope[N];
#pragma unroll
        for (int i = 0; i < N; i++) d[i] = x[0][i] - x[1][i];
        kl_of_tokens(options, d, value, slope);
#pragma unroll
        for (int i = 0; i < N; i++) {
            grad[0][i] = x[2][i] == 0.0f ? 0.0f : x[2][i] * slope[i];
            grad[1][i] = -grad[0][i];
        }
    }
};

// The same sums for maxima that are at least theirs. Without a branch, and exact if the maxima are
// the same. From -inf there is nothing to shift: the sums are 0, or NaN and stay so.
static __device__ __forceinline__ PairSums rebase(PairSums s, float max_z, float max_w,
                                                  float scale) {
    const float shift_z = fmaxf(s.max_z - max_z, -LARGEST) * UNIT;
    const float shift_w = fmaxf(s.max_w - max_w, -LARGEST) * UNIT;
    const float factor_z = exp2_fast(shift_z * scale), factor_w = exp2_fast(shift_w * scale);
    const float weighted = fmaf(shift_z - shift_w, s.sum_z, s.weighted) * factor_z;
    return {max_z, max_w, s.sum_z * factor_z, s.sum_w * factor_w, weighted};
}

// Adds the first `vectors` vectors of both rows; the others hold nothing.
template <class T>
static __device__ __forceinline__ void add(PairSums& s, const uint4 (&z)[IN_FLIGHT],
                                           const uint4 (&w)[IN_FLIGHT], int vectors, float scale) {
    s = rebase(s, fmaxf(s.max_z, highest(z, T{})), fmaxf(s.max_w, highest(w, T{})), scale);
    const float base_z = origin(s.max_z) * UNIT, base_w = origin(s.max_w) * UNIT;
#pragma unroll
    for (int i = 0; i < IN_FLIGHT; i++) {
        // The same for all threads.
        if (i >= vectors) break;
        float p[WIDTH<T>], q[WIDTH<T>];
        unpack(z[i], p, T{});
        unpack(w[i], q, T{});
        float weighted = 0.0f;
#pragma unroll
        for (int j = 0; j < WIDTH<T>; j++) {
            // Rounded once, as z - max is.
            const float x = fmaf(p[j], UNIT, -base_z), y = fmaf(q[j], UNIT, -base_w);
            p[j] = exp2_fast(x * scale);
            q[j] = exp2_fast(y * scale);
            // Where z = -inf, x - y is -inf or NaN, and has to be a number for 0 times it to be 0.
            weighted = fmaf(p[j], fmaxf(x - y, -LARGEST), weighted);
        }
        s.sum_z += tree_sum(p);
        s.sum_w += tree_sum(q);
        s.weighted += weighted;
    }
}

// The reduction of the exact KL, for common/rows.cuh.
template <class T>
struct FullForward {
    const FullForwardArgs& args;
    float scale;

    __device__ __forceinline__ explicit FullForward(const FullForwardArgs& args)
        : args(args), scale(args.inverse_temperature * (LOG2_E / UNIT)) {}

    static constexpr int MOST_PARTS = 2;

    // Whether the row is kept.
    __device__ __forceinline__ bool item(int64_t row) const { return !args.mask || args.mask[row]; }

    __device__ __forceinline__ bool reads(bool kept) const { return kept; }

    __device__ __forceinline__ PairSums none() const {
        return {-INFINITY, -INFINITY, 0.0f, 0.0f, 0.0f};
    }

    __device__ __forceinline__ PairSums sum(int64_t row, int part, int thread, int threads) const {
        const Row<T> z = Row<T>::of(args.z, row, args.rows, args.vocab);
        const Row<T> w = Row<T>::of(args.w, row, args.rows, args.vocab);
        const Range range = part_of_row(z.groups(), part, args.parts, IN_FLIGHT * threads);
        PairSums s = none();
        for (int tile = range.first; tile < range.end; tile += IN_FLIGHT * threads) {
            uint4 from_z[IN_FLIGHT], from_w[IN_FLIGHT];
            z.load(tile, thread, threads, range.end, from_z);
            w.load(tile, thread, threads, range.end, from_w);
            if (args.ahead) {
                const int next = tile + IN_FLIGHT * threads;
                z.template prefetch_tile<IN_FLIGHT>(next, thread, threads, range.end);
                w.template prefetch_tile<IN_FLIGHT>(next, thread, threads, range.end);
            }
            add<T>(s, from_z, from_w, (range.end - tile + threads - 1) / threads, scale);
        }
        return s;
    }

    __device__ __forceinline__ PairSums merge(PairSums a, PairSums b) const {
        const float max_z = fmaxf(a.max_z, b.max_z), max_w = fmaxf(a.max_w, b.max_w);
        a = rebase(a, max_z, max_w, scale);
        b = rebase(b, max_z, max_w, scale);
        return {max_z, max_w, a.sum_z + b.sum_z, a.sum_w + b.sum_w, a.weighted + b.weighted};
    }

    __device__ __forceinline__ PairSums warp_merge(PairSums s) const {
        s = rebase(s, warp_max(s.max_z), warp_max(s.max_w), scale);
        return {s.max_z, s.max_w, warp_sum(s.sum_z), warp_sum(s.sum_w), warp_sum(s.weighted)};
    }

    __device__ __forceinline__ void write(int64_t row, bool, PairSums s) const {
        const float gap = s.weighted / s.sum_z * (args.inverse_temperature / UNIT);
        float kl = gap + logf(s.sum_w / s.sum_z);
        // Rounding may take a KL of nearly 0 below it.
        kl = isfinite(gap) ? fmaxf(kl, 0.0f) : INFINITY;
        // False for NaN too.
        const bool legal = s.sum_z > 0.0f && s.sum_w > 0.0f;
        float stats[STATS];
        stats[KL] = legal ? kl : NAN;
        stats[GAP] = gap;
        stats[MAX_Z] = s.max_z;
        stats[SUM_Z] = s.sum_z;
        stats[MAX_W] = s.max_w;
        stats[SUM_W] = s.sum_w;
        stats[GAP_W] = 0.0f;
        write_stats(row, stats);
    }

    __device__ __forceinline__ void write_unread(int64_t row, bool) const {
        const float stats[STATS] = {};
        write_stats(row, stats);
    }

    __device__ __forceinline__ void write_stats(int64_t row, const float (&stats)[STATS]) const {
#pragma unroll
        for (int i = 0; i < STATS; i++) args.stats[i * args.rows + row] = stats[i];
    }
};

// The gradients of a pair of rows as functions of the logits, for common/map.cuh. Both are formed
// even if one is wanted: the memory leaves time for it, and no branch costs registers.
struct Slopes {
    float max_z, max_w;
    float norm_z, norm_w;  // 1 / P and 1 / Q
    float gap;
    // Upstream gradient over the temperature; to z it is NaN where the KL is +inf.
    float grad_z, grad_w;
    float inverse_temperature;

    template <int N>
    __device__ __forceinline__ void operator()(const float (&logits)[2][N], int64_t,
                                               float (&grad)[2][N]) const {
        const float scale = inverse_temperature * LOG2_E;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float x = logits[0][i] - max_z, y = logits[1][i] - max_w;
            const float p = exp2_gradual(x * scale) * norm_z;
            // 0 where p is, whatever x - y; where the KL is +inf, NaN in all columns but those of
            // -inf.
            const float excess = p == 0.0f ? 0.0f : fmaf(x - y, inverse_temperature, -gap);
            grad[0][i] = logits[0][i] == -INFINITY ? 0.0f : grad_z * p * excess;
            grad[1][i] = grad_w * (exp2_gradual(y * scale) * norm_w - p);
        }
    }
};

// g - ln(1 + g), without what would cancel near 0: of the series of ln(1 + g), by Cephes.
static __device__ __forceinline__ float less_ln_1p(float g) {
    float p = fmaf(7.0376836292e-2f, g, -1.1514610310e-1f);
    p = fmaf(p, g, 1.1676998740e-1f);
    p = fmaf(p, g, -1.2420140846e-1f);
    p = fmaf(p, g, 1.4249322787e-1f);
    p = fmaf(p, g, -1.6668057665e-1f);
    p = fmaf(p, g, 2.0000714765e-1f);
    p = fmaf(p, g, -2.4999993993e-1f);
    p = fmaf(p, g, 3.3333331174e-1f);
    return fabsf(g) < 0.29f ? g * g * fmaf(-g, p, 0.5f) : g - log1pf(g);
}

// A column's term of the divergence, and h of z and of w.
struct Column {
    float term;
    float h_z;
    float h_w;
};

// Of p, q and r = ln p - ln q, which is NaN where both are 0.
static __device__ __forceinline__ Column column_of(const Divergence& of, float p, float q,
                                                   float r) {
    const float d = fabsf(r), e = expm1f(-d);  // the less probable side over the other, less 1
    if (of.is_total_variation) {
        const bool above = r > 0.0f;
        return {above ? -p * e : 0.0f, above ? 0.0f : -1.0f, above ? -1.0f : 0.0f};
    }
    const bool z_is_high = r >= 0.0f;
    const float high = z_is_high ? p : q, low = z_is_high ? q : p;
    const float share = z_is_high ? of.share : of.rest;
    const float g = e - share * e;  // m / high - 1
    const float ln_high = -log1pf(g), ln_low = ln_high - d;
    // m / low - 1 is without bound: from 1/4 on not to be multiplied with what may be 0.
    const float beyond = -share * e, g_low = beyond / (1.0f + e);
    const bool near = g_low < 0.25f;
    const float of_high = high * less_ln_1p(g);
    const float of_low =
        near ? low * less_ln_1p(g_low) : fmaf(high, beyond, low == 0.0f ? 0.0f : low * ln_low);
    const float inverse = 1.0f / (1.0f + g);
    const float over_high = -g * inverse, over_low = (e - g) * inverse;  // side / m - 1
    const float term_z = z_is_high ? of_high : of_low, term_w = z_is_high ? of_low : of_high;
    const float ln_z = z_is_high ? ln_high : ln_low, ln_w = z_is_high ? ln_low : ln_high;
    const float over_z = z_is_high ? over_high : over_low;
    const float over_w = z_is_high ? over_low : over_high;
    return {
        fmaf(of.coef_z, term_z, of.coef_w * term_w),
        of.coef_z * (ln_z - of.share * over_z) - of.share * (of.coef_w * over_w),
        of.coef_w * (ln_w - of.rest * over_w) - of.rest * (of.coef_z * over_z),
    };
}

// What is known of a pair of rows before a second look.
struct Pair {
    float max_z, max_w;
    float norm_z, norm_w;  // 1 / P and 1 / Q
    float offset;          // ln(P / Q), which (x - y) is too much for ln p - ln q
    float inverse_temperature;

    static __device__ __forceinline__ Pair of(float max_z, float sum_z, float max_w, float sum_w,
                                              float inverse_temperature) {
        return {max_z, max_w, 1.0f / sum_z, 1.0f / sum_w, logf(sum_z / sum_w), inverse_temperature};
    }

    // Of x and y times the temperature.
    __device__ __forceinline__ float log_ratio(float x, float y) const {
        return fmaf(x - y, inverse_temperature, -offset);
    }
};

struct LookSums {
    float term;
    float of_z;  // p h_z
    float of_w;  // q h_w
};

// The second look, for common/rows.cuh. Where a row has no distribution the KL that the first one has
// found is NaN, and stays so.
template <class T>
struct LookAgain {
    const FullForwardArgs& args;

    static constexpr int MOST_PARTS = 2;

    // Not by the KL, which a lane writes while another may not have read it yet. False for NaN too.
    __device__ __forceinline__ bool item(int64_t row) const {
        return (!args.mask || args.mask[row]) && args.stats[SUM_Z * args.rows + row] > 0.0f &&
               args.stats[SUM_W * args.rows + row] > 0.0f;
    }

    __device__ __forceinline__ bool reads(bool legal) const { return legal; }

    __device__ __forceinline__ LookSums none() const { return {0.0f, 0.0f, 0.0f}; }

    __device__ __forceinline__ LookSums sum(int64_t row, int part, int thread, int threads) const {
        const Row<T> z = Row<T>::of(args.z, row, args.rows, args.vocab);
        const Row<T> w = Row<T>::of(args.w, row, args.rows, args.vocab);
        const Range range = part_of_row(z.groups(), part, args.parts, IN_FLIGHT * threads);
        const auto stat = [&](Stat i) { return args.stats[i * args.rows + row]; };
        const Pair pair =
            Pair::of(stat(MAX_Z), stat(SUM_Z), stat(MAX_W), stat(SUM_W), args.inverse_temperature);
        LookSums s = none();
        // One vector at a time: it is the arithmetic that takes the time.
        for (int tile = range.first; tile < range.end; tile += threads) {
            uint4 from_z[1], from_w[1];
            z.load(tile, thread, threads, range.end, from_z);
            w.load(tile, thread, threads, range.end, from_w);
            add(s, pair, from_z[0], from_w[0]);
        }
        return s;
    }

    __device__ __forceinline__ void add(LookSums& s, const Pair& pair, const uint4& from_z,
                                        const uint4& from_w) const {
        const float scale = args.inverse_temperature * LOG2_E;
        float z[WIDTH<T>], w[WIDTH<T>];
        unpack(from_z, z, T{});
        unpack(from_w, w, T{});
        LookSums more = none();
#pragma unroll
        for (int j = 0; j < WIDTH<T>; j++) {
            const float x = z[j] - pair.max_z, y = w[j] - pair.max_w;
            const float p = exp2_fast(x * scale) * pair.norm_z;
            const float q = exp2_fast(y * scale) * pair.norm_w;
            const Column c = column_of(args.divergence, p, q, pair.log_ratio(x, y));
            // Where both are 0 there is nothing; where one is, it has no h.
            more.term += p + q == 0.0f ? 0.0f : c.term;
            more.of_z += p == 0.0f ? 0.0f : p * c.h_z;
            more.of_w += q == 0.0f ? 0.0f : q * c.h_w;
        }
        s = merge(s, more);
    }

    __device__ __forceinline__ LookSums merge(LookSums a, LookSums b) const {
        return {a.term + b.term, a.of_z + b.of_z, a.of_w + b.of_w};
    }

    __device__ __forceinline__ LookSums warp_merge(LookSums s) const {
        return {warp_sum(s.term), warp_sum(s.of_z), warp_sum(s.of_w)};
    }

    __device__ __forceinline__ void write(int64_t row, bool, LookSums s) const {
        args.stats[KL * args.rows + row] = s.term;
        args.stats[GAP * args.rows + row] = s.of_z;
        args.stats[GAP_W * args.rows + row] = s.of_w;
    }

    // What the first look has written.
    __device__ __forceinline__ void write_unread(int64_t, bool) const {}
};

// The gradients after a second look, likewise.
struct PairSlopes {
    Pair pair;
    Divergence divergence;
    float gap_z, gap_w;
    float grad;  // upstream gradient over the temperature

    template <int N>
    __device__ __forceinline__ void operator()(const float (&logits)[2][N], int64_t,
                                               float (&grads)[2][N]) const {
        const float scale = pair.inverse_temperature * LOG2_E;
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float x = logits[0][i] - pair.max_z, y = logits[1][i] - pair.max_w;
            const float p = exp2_gradual(x * scale) * pair.norm_z;
            const float q = exp2_gradual(y * scale) * pair.norm_w;
            const Column c = column_of(divergence, p, q, pair.log_ratio(x, y));
            grads[0][i] = p == 0.0f ? 0.0f : p * (grad * (c.h_z - gap_z));
            grads[1][i] = q == 0.0f ? 0.0f : q * (grad * (c.h_w - gap_w));
        }
    }
};

// Block [threads], a chunk of a row a warp or a block.
template <class T, bool IS_KL>
static __device__ __forceinline__ void full_backward(const FullBackwardArgs& args) {
    for_each_share(args, [&](int64_t row, Share share) {
        const int64_t start = row * args.vocab;
        const T* const in[2] = {
            static_cast<const T*>(args.z) + start,
            static_cast<const T*>(args.w) + start,
        };
        T* const out[2] = {
            args.grad_z ? static_cast<T*>(args.grad_z) + start : nullptr,
            args.grad_w ? static_cast<T*>(args.grad_w) + start : nullptr,
        };
        // All at once: they are on the way together.
        const bool kept = !args.mask || args.mask[row];
        const float upstream = args.grad_kl[row];
        float stats[STATS];
#pragma unroll
        for (int i = 0; i < STATS; i++) stats[i] = args.stats[i * args.rows + row];

        const bool zero = !kept || upstream == 0.0f;
        if (zero || isnan(stats[KL])) {
#pragma unroll
            for (int k = 0; k < 2; k++) {
                if (out[k]) fill_columns(out[k], zero ? 0.0f : NAN, args.vocab, share);
            }
            return;
        }
        const float grad = upstream * args.inverse_temperature;
        if constexpr (!IS_KL) {
            const Pair pair = Pair::of(stats[MAX_Z], stats[SUM_Z], stats[MAX_W], stats[SUM_W],
                                       args.inverse_temperature);
            const PairSlopes slopes = {pair, args.divergence, stats[GAP], stats[GAP_W], grad};
            map_columns(in, out, nullptr, args.vocab, share, slopes);
            return;
        }
        const Slopes slopes = {
            stats[MAX_Z],
            stats[MAX_W],
            1.0f / stats[SUM_Z],
            1.0f / stats[SUM_W],
            stats[GAP],
            stats[KL] == INFINITY ? NAN : grad,
            grad,
            args.inverse_temperature,
        };
        map_columns(in, out, nullptr, args.vocab, share, slopes);
    });
}

KERNEL(256, 4, kl_token_forward_f32, TokenForwardArgs) {
    const float* const in[2] = {args.logp, args.ref_logp};
    float* const out[1] = {args.kl};
    map_tokens(in, out, args.mask, args.tokens, TokenValue{args.options});
}
KERNEL(256, 3, kl_token_backward_f32, TokenBackwardArgs) {
    const float* const in[3] = {args.logp, args.ref_logp, args.grad_kl};
    float* const out[2] = {args.grad_logp, args.grad_ref_logp};
    map_tokens(in, out, args.mask, args.tokens, TokenGradient{args.options});
}
KERNEL(256, 2, kl_full_forward_warp_f32, FullForwardArgs) {
    reduce_by_warps(FullForward<float>(args));
}
KERNEL(256, 3, kl_full_forward_warp_f16, FullForwardArgs) {
    reduce_by_warps(FullForward<f16>(args));
}
KERNEL(256, 3, kl_full_forward_warp_bf16, FullForwardArgs) {
    reduce_by_warps(FullForward<bf16>(args));
}
KERNEL(256, 3, kl_full_forward_block_f32, FullForwardArgs) {
    reduce_by_blocks<false>(FullForward<float>(args));
}
KERNEL(256, 3, kl_full_forward_block_f16, FullForwardArgs) {
    reduce_by_blocks<false>(FullForward<f16>(args));
}
KERNEL(256, 3, kl_full_forward_block_bf16, FullForwardArgs) {
    reduce_by_blocks<false>(FullForward<bf16>(args));
}
KERNEL(512, 1, kl_full_forward_wide_f32, FullForwardArgs) {
    reduce_by_blocks<true>(FullForward<float>(args));
}
KERNEL(512, 1, kl_full_forward_wide_f16, FullForwardArgs) {
    reduce_by_blocks<true>(FullForward<f16>(args));
}
KERNEL(512, 1, kl_full_forward_wide_bf16, FullForwardArgs) {
    reduce_by_blocks<true>(FullForward<bf16>(args));
}
KERNEL(256, 3, kl_full_backward_f32, FullBackwardArgs) { full_backward<float, true>(args); }
KERNEL(256, 3, kl_full_backward_f16, FullBackwardArgs) { full_backward<f16, true>(args); }
KERNEL(256, 3, kl_full_backward_bf16, FullBackwardArgs) { full_backward<bf16, true>(args); }
KERNEL(256, 2, kl_divergence_warp_f32, FullForwardArgs) { reduce_by_warps(LookAgain<float>{args}); }
KERNEL(256, 2, kl_divergence_block_f32, FullForwardArgs) {
    reduce_by_blocks<false>(LookAgain<float>{args});
}
KERNEL(512, 1, kl_divergence_wide_f32, FullForwardArgs) {
    reduce_by_blocks<true>(LookAgain<float>{args});
}
KERNEL(256, 2, kl_divergence_backward_f32, FullBackwardArgs) { full_backward<float, false>(args); }
KERNEL(256, 2, kl_divergence_warp_f16, FullForwardArgs) { reduce_by_warps(LookAgain<f16>{args}); }
KERNEL(256, 2, kl_divergence_block_f16, FullForwardArgs) {
    reduce_by_blocks<false>(LookAgain<f16>{args});
}
KERNEL(512, 1, kl_divergence_wide_f16, FullForwardArgs) {
    reduce_by_blocks<true>(LookAgain<f16>{args});
}
KERNEL(256, 2, kl_divergence_backward_f16, FullBackwardArgs) { full_backward<f16, false>(args); }
KERNEL(256, 2, kl_divergence_warp_bf16, FullForwardArgs) { reduce_by_warps(LookAgain<bf16>{args}); }
KERNEL(256, 2, kl_divergence_block_bf16, FullForwardArgs) {
    reduce_by_blocks<false>(LookAgain<bf16>{args});
}
KERNEL(512, 1, kl_divergence_wide_bf16, FullForwardArgs) {
    reduce_by_blocks<true>(LookAgain<bf16>{args});
}
KERNEL(256, 2, kl_divergence_backward_bf16, FullBackwardArgs) { full_backward<bf16, false>(args); }
