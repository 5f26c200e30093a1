// The logarithm of a target's probability in a row of logits, and its gradient: what kernels/logprob.cu
// makes passes of, and kernels/ppo_loss.cu a loss.
#pragma once

#include "map.cuh"
#include "rows.cuh"
#include "softmax.cuh"

// How targets are read.
struct TargetFormat {
    int64_t ignore_index;
    int64_t first_column;  // the id of the first column
    int64_t vocab;         // columns of the whole vocabulary
    int32_t wide;          // i64, else u32
    int32_t has_ignore;    // whether ignore_index counts
};

// What of a row's columns there is: all, or a tile of them, the first or another. Of a tile come running
// sums, those before it included, and the arguments lead to those instead.
enum Tile { WHOLE, BEGINS, CONTINUES };

struct ForwardArgs {
    const void* logits;   // [rows, columns]
    const void* targets;  // [rows]
    float* logp;          // [rows]; of a tile the target's logit
    float* entropy;       // [rows], or null; of a tile the weighted sum
    float* max;           // [rows], or null
    float* log_sum;       // [rows], or null, as max; of a tile the sum
    TargetFormat target_format;
    int64_t rows;
    int64_t columns;
    int32_t parts;  // of a row
    int32_t ahead;
    float inverse_temperature;
    int32_t tile;
};

enum class Kind { TOKEN, IGNORED, BAD };

struct Target {
    Kind kind;
    int64_t column;  // of a TOKEN, counted from the first; of a tile's row perhaps none of its own
};

// The target of a row, for arguments that have targets and their format.
template <class Args>
static __device__ __forceinline__ Target target_of(const Args& args, int64_t row) {
    const TargetFormat& format = args.target_format;
    const int64_t id = format.wide ? static_cast<const int64_t*>(args.targets)[row]
                                   : static_cast<const uint32_t*>(args.targets)[row];
    if (format.has_ignore && id == format.ignore_index) return {Kind::IGNORED, 0};
    if (id < 0 || id >= format.vocab) return {Kind::BAD, 0};
    return {Kind::TOKEN, id - format.first_column};
}

// The first groups of a row that is aligned, in shared memory, for a second look at it.
struct Kept {
    uint4* groups;  // or null
    int capacity;

    // For map_columns: what is not kept is in L2, or on its way there.
    template <class T, int N>
    __device__ __forceinline__ void operator()(const T* in, int64_t columns, int tile, int next,
                                               Share share, int end, uint4 (&v)[N]) const {
        if (!groups) return LoadRows{}(in, columns, tile, next, share, end, v);
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int group = tile + i * share.threads + share.thread;
            v[i] = make_uint4(0, 0, 0, 0);
            if (group < min(end, capacity)) {
                v[i] = groups[group];
            } else if (group < end) {
                v[i] = load_once(in + int64_t(group) * WIDTH<T>);
            }
        }
    }
};

// The sums over a range of a row's groups that fall to one thread of `threads`.
template <class T, bool WEIGHTED>
static __device__ __forceinline__ SoftmaxSums sum_groups(const Row<T>& row, Range range, int thread,
                                                         int threads, float scale, bool ahead,
                                                         Kept kept) {
    SoftmaxSums s = no_sums();
    for (int tile = range.first; tile < range.end; tile += IN_FLIGHT * threads) {
        uint4 v[IN_FLIGHT];
        row.load(tile, thread, threads, range.end, v);
        if (ahead) {
            const int next = tile + IN_FLIGHT * threads;
            row.template prefetch_tile<IN_FLIGHT>(next, thread, threads, range.end);
        }
        if (kept.groups) {
#pragma unroll
            for (int i = 0; i < IN_FLIGHT; i++) {
                const int group = tile + i * threads + thread;
                if (group < min(range.end, kept.capacity)) kept.groups[group] = v[i];
            }
        }
        const int vectors = (range.end - tile + threads - 1) / threads;
        add<WEIGHTED>(s, v, vectors, scale, T{});
    }
    return s;
}

// What is known of a row from the columns seen so far, in the terms of src/logprob/mod.rs.
struct Seen { float max, rest, weighted, logit; };

static __device__ __forceinline__ Seen merge(Seen a, Seen b, float inverse_temperature) {
    const float logit = isnan(a.logit) ? b.logit : a.logit;
    if (b.max > a.max) {
        const Seen lower = a;
        a = b;
        b = lower;
    }
    // Of nothing finite the sums are 0, or NaN and stay so.
    if (b.max == -INFINITY) return {a.max, a.rest + b.rest, a.weighted, logit};
    const float d = (a.max - b.max) * inverse_temperature;
    const float factor = exp2_fast(-d * LOG2_E);
    // Where the factor is 0 d may be infinite.
    const float weighted = factor == 0.0f ? 0.0f : fmaf(d, 1.0f + b.rest, b.weighted);
    return {a.max, fmaf(factor, 1.0f + b.rest, a.rest), fmaf(factor, weighted, a.weighted), logit};
}

// What the forward pass finds in a row.
struct RowValues { float logp, entropy, max, log_sum; };

// Those of a row of which all columns have been seen.
static __device__ __forceinline__ RowValues values_of(Seen seen, float inverse_temperature) {
    const float log_sum = isfinite(seen.max) ? log1pf(seen.rest) : NAN;
    const float logp = (seen.logit - seen.max) * inverse_temperature - log_sum;
    return {logp, log_sum + seen.weighted / (1.0f + seen.rest), seen.max, log_sum};
}

// Those of a row that is not read.
static __device__ __forceinline__ RowValues values_unread_of(Target target) {
    const float value = target.kind == Kind::IGNORED ? 0.0f : NAN;
    return {value, value, -INFINITY, NAN};
}

// The reduction of the forward pass, for common/rows.cuh.
template <class T>
struct Forward {
    const ForwardArgs& args;
    float scale;
    Kept kept;

    __device__ __forceinline__ explicit Forward(const ForwardArgs& args, Kept kept = {nullptr, 0})
        : args(args), scale(args.inverse_temperature * LOG2_E), kept(kept) {}

    static constexpr int MOST_PARTS = 3;

    struct Item {
        Target target;
        float logit;  // of a TOKEN among the columns, else NaN: on its way while the row is read
    };

    __device__ __forceinline__ Item item(int64_t row) const {
        const Target target = target_of(args, row);
        const T* logits = static_cast<const T*>(args.logits) + row * args.columns;
        const bool here = target.column >= 0 && target.column < args.columns;
        const bool token = target.kind == Kind::TOKEN && here;
        return {target, token ? to_float(logits[target.column]) : NAN};
    }

    __device__ __forceinline__ bool reads(Item item) const {
        return item.target.kind == Kind::TOKEN;
    }

    __device__ __forceinline__ SoftmaxSums none() const { return no_sums(); }

    __device__ __forceinline__ SoftmaxSums sum(int64_t row, int part, int thread,
                                               int threads) const {
        const Row<T> z = Row<T>::of(args.logits, row, args.rows, args.columns);
        const Range range = part_of_row(z.groups(), part, args.parts, IN_FLIGHT * threads);
        return args.entropy
                   ? sum_groups<T, true>(z, range, thread, threads, scale, args.ahead, kept)
                   : sum_groups<T, false>(z, range, thread, threads, scale, args.ahead, kept);
    }

    __device__ __forceinline__ SoftmaxSums merge(SoftmaxSums a, SoftmaxSums b) const {
        return ::merge(a, b, scale);
    }

    __device__ __forceinline__ SoftmaxSums warp_merge(SoftmaxSums s) const {
        return ::warp_merge(s, scale);
    }

    __device__ __forceinline__ Seen seen(Item item, SoftmaxSums s) const {
        return {s.max, s.rest, -LN_2 * s.weighted, item.logit};
    }

    __device__ __forceinline__ RowValues values(Item item, SoftmaxSums s) const {
        return values_of(seen(item, s), args.inverse_temperature);
    }

    __device__ __forceinline__ void write(int64_t row, Item item, SoftmaxSums s) const {
        if (args.tile == WHOLE) return write(row, values(item, s));
        write_seen(row, seen(item, s));
    }

    __device__ __forceinline__ void write_unread(int64_t row, Item item) const {
        if (args.tile == WHOLE) return write(row, values_unread_of(item.target));
        if (args.tile == BEGINS) write_seen(row, {-INFINITY, 0.0f, 0.0f, NAN});
    }

    __device__ __forceinline__ void write_seen(int64_t row, Seen seen) const {
        if (args.tile == CONTINUES) {
            const float weighted = args.entropy ? args.entropy[row] : 0.0f;
            const Seen before = {args.max[row], args.log_sum[row], weighted, args.logp[row]};
            seen = ::merge(before, seen, args.inverse_temperature);
        }
        args.max[row] = seen.max;
        args.log_sum[row] = seen.rest;
        args.logp[row] = seen.logit;
        if (args.entropy) args.entropy[row] = seen.weighted;
    }

    __device__ __forceinline__ void write(int64_t row, const RowValues& values) const {
        args.logp[row] = values.logp;
        if (args.entropy) args.entropy[row] = values.entropy;
        if (args.max) {
            args.max[row] = values.max;
            args.log_sum[row] = values.log_sum;
        }
    }
};

// What the gradient of a row depends on besides its logits.
struct KnownOfRow {
    Target target;
    float grad_logp, grad_entropy, max, log_sum, entropy;
};

static __device__ __forceinline__ bool is_zero_gradient(const KnownOfRow& known) {
    return known.target.kind == Kind::IGNORED ||
           (known.grad_logp == 0.0f && known.grad_entropy == 0.0f);
}

// The gradient of one row as a function of the logit, with that of the entropy or without.
template <bool ENTROPY>
struct Slope {
    // (z - max) scale - shift is the logarithm of p to base 2.
    float max, scale, shift;
    // For every column but the target's the gradient is p (constant + slope log2 p).
    float constant, slope;
    float grad_logp, of_entropy;  // the two parts of the constant, negated
    int64_t target;

    __device__ __forceinline__ Slope(const KnownOfRow& row, float inverse_temperature)
        : max(row.max), scale(inverse_temperature * LOG2_E), target(row.target.column) {
        shift = (row.target.kind == Kind::BAD ? NAN : row.log_sum) * LOG2_E;
        grad_logp = row.grad_logp * inverse_temperature;
        const float h = row.grad_entropy * inverse_temperature;
        of_entropy = ENTROPY ? h * row.entropy : 0.0f;
        constant = ENTROPY ? -fmaf(h, row.entropy, grad_logp) : -grad_logp;
        slope = -h * LN_2;
    }

    __device__ __forceinline__ float at(float z) const { return at(z, constant); }

    __device__ __forceinline__ float at(float z, float constant) const {
        const float log2_p = fmaf(z - max, scale, -shift);
        // Times an upstream gradient, what is below the normal numbers may be one.
        const float p = exp2_gradual(log2_p);
        return p * (ENTROPY ? fmaf(slope, fmaxf(log2_p, FLOOR), constant) : constant);
    }

    __device__ __forceinline__ float at_target(float z) const {
        const float log2_p = fmaf(z - max, scale, -shift);
        return fmaf(-grad_logp, exp2_m1(log2_p), ENTROPY ? at(z, -of_entropy) : 0.0f);
    }

    // For common/map.cuh.
    template <int N>
    __device__ __forceinline__ void operator()(const float (&z)[1][N], int64_t first,
                                               float (&grad)[1][N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) grad[0][i] = at(z[0][i]);
        // A vocabulary has less than 2^32 columns; a target that is none of these is at no place.
        const uint32_t place = uint32_t(target) - uint32_t(first);
        if (place < uint32_t(N)) {
            float logit = z[0][0];
#pragma unroll
            for (int i = 1; i < N; i++) logit = place == uint32_t(i) ? z[0][i] : logit;
            const float at = at_target(logit);
#pragma unroll
            for (int i = 0; i < N; i++) grad[0][i] = place == uint32_t(i) ? at : grad[0][i];
        }
    }
};

// The gradient of a row's logits, a range of the columns; `load` is as of map_columns.
template <class T, class L = LoadRows>
static __device__ __forceinline__ void write_gradient(const T* logits, T* grad_logits,
                                                      int64_t vocab, const KnownOfRow& known,
                                                      float inverse_temperature, Share share,
                                                      const L& load = {}) {
    const T* const in[1] = {logits};
    T* const out[1] = {grad_logits};
    if (is_zero_gradient(known)) {
        fill_columns(grad_logits, 0.0f, vocab, share);
    } else if (known.grad_entropy == 0.0f) {
        const Slope<false> slope(known, inverse_temperature);
        map_columns(in, out, nullptr, vocab, share, slope, load);
    } else {
        const Slope<true> slope(known, inverse_temperature);
        map_columns(in, out, nullptr, vocab, share, slope, load);
    }
}
