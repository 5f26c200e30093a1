// Masked whitening, forward and backward. src/whiten/mod.rs has the formulas and src/whiten/cuda.rs
// the launches.
//
//     mean = sum m x / n    var = sum m (x - mean)^2 / (n - 1)    y = (x - mean) / sqrt(var + eps)
//
// x, y and gradients are [n] in f32, the mask is [n] in u8, moments are three f64: count, mean, and
// the sum of squared deviations. They stay on the device between the passes:
//     moments   a block takes a run of elements and leaves their moments, merge puts those together
//     forward   an element after the other, with given moments, which may be of a larger set
//     sums      sum g and sum g (x - mean), which the gradient through the moments needs, in runs
//               as above; merge_sums adds those up
//     backward  an element after the other
// A warp has several segments of 128 elements in flight, four elements a lane. Where runs begin and
// end depends on n alone, and so do all bits.
//
// Bytes an element, with a mask: moments 5 read; forward 5 read, 4 written; sums 9 read; backward 9
// read, 4 written.
//
// Numbers. Sums are in f64. The mean is subtracted in two floats: x minus the first is exact where
// x is near it, so that a large mean costs the deviations no digits. What is masked is read and not
// looked at, and comes out as 0. Too few elements for the variance make what is not masked NaN.

#include "common/map.cuh"
#include "common/moments.cuh"
#include "common/tokens.cuh"

// Segments of x and g each that a warp loads before it uses the first; of x alone, IN_FLIGHT.
constexpr int PAIRS_IN_FLIGHT = IN_FLIGHT / 2;

constexpr int MAX_WARPS = 256 / WARP;

struct GradientSums {
    double g;
    double product;  // g (x - mean)
};

struct OptionsArgs {
    double eps;
    int32_t eps_at_std;  // it is added to the standard deviation, not to the variance
    int32_t unbiased;
    int32_t shift_mean;
};

struct MomentsArgs {
    const float* x;       // [count]
    const uint8_t* mask;  // [count], or null: ones
    Moments* partials;    // [runs]
    int64_t count;
    int64_t run;  // elements of a partial
};

struct ForwardArgs {
    const float* x;          // [count]
    const uint8_t* mask;     // [count], or null: ones
    const Moments* moments;  // [1], or null: those that the host knows
    float* y;                // [count]; may be x
    Moments known;
    int64_t count;
    OptionsArgs options;
    int32_t scale_only;  // y = x / sqrt(..), the gradient with moments that are constants
};

struct SumsArgs {
    const float* x;          // [count]
    const float* grad_y;     // [count]
    const uint8_t* mask;     // [count], or null: ones
    const Moments* moments;  // [1], or null: those that the host knows
    Moments known;
    GradientSums* partials;  // [runs]
    int64_t count;
    int64_t run;  // elements of a partial
};

struct MergeSumsArgs {
    const GradientSums* partials;  // [count]
    GradientSums* sums;            // [1]
    int64_t count;
};

struct BackwardArgs {
    const float* x;          // [count]
    const float* grad_y;     // [count]
    const uint8_t* mask;     // [count], or null: ones
    const Moments* moments;  // [1], or null: those that the host knows
    float* grad_x;           // [count]; may be grad_y
    Moments known;
    const GradientSums* sums;  // [1]
    int64_t count;
    OptionsArgs options;
};

// The moments to whiten with, wherever they are.
template <class Args>
static __device__ __forceinline__ Moments given_moments(const Args& args) {
    return args.moments ? *args.moments : args.known;
}

// A mean in two floats.
struct Mean {
    float high, low;

    __device__ __forceinline__ float deviation(float x) const { return (x - high) - low; }
};

static __device__ __forceinline__ Mean in_two_floats(double mean) {
    const float high = float(mean);
    return {high, float(mean - double(high))};
}

// What moments and options come down to: one thread of a block works it out for all.
struct Scale {
    Mean mean;
    float inverse;  // the factor of x - mean
    float offset;   // added last
};

// The same for the gradient.
struct GradientScale {
    Mean mean;
    float slope;  // the factor of x - mean
    Mean mean_g;
    float inverse;  // the factor of g - mean g: without a deviation in x, up to 1 / eps
    float offset;   // added last
};

// 1 / sqrt(var + eps), or 1 / (std + eps), and its derivative by the variance.
struct Inverse {
    double value, slope;
    double divisor;  // of the sum of squares

    __device__ __forceinline__ Inverse(const Moments& m, const OptionsArgs& o) {
        divisor = m.count - (o.unbiased ? 1.0 : 0.0);
        const double variance = divisor < 1.0 ? NAN : m.m2 / divisor;
        if (o.eps_at_std) {
            const double std = sqrt(variance);
            value = 1.0 / (std + o.eps);
            slope = -0.5 * value * value / std;
        } else {
            value = 1.0 / sqrt(variance + o.eps);
            slope = -0.5 * value * value * value;
        }
        // All elements are equal: what it multiplies is 0.
        if (variance == 0.0) slope = 0.0;
    }
};

struct Forward {
    Scale scale;

    template <int N>
    __device__ __forceinline__ void operator()(const float (&x)[1][N], int64_t,
                                               float (&y)[1][N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            y[0][i] = fmaf(scale.mean.deviation(x[0][i]), scale.inverse, scale.offset);
        }
    }
};

struct Backward {
    GradientScale scale;

    template <int N>
    __device__ __forceinline__ void operator()(const float (&x)[2][N], int64_t,
                                               float (&grad_x)[1][N]) const {
#pragma unroll
        for (int i = 0; i < N; i++) {
            const float from_g = fmaf(scale.mean_g.deviation(x[1][i]), scale.inverse, scale.offset);
            grad_x[0][i] = fmaf(scale.mean.deviation(x[0][i]), scale.slope, from_g);
        }
    }
};

// Calls work(place) for every N segments of the elements first..end that fall to this warp.
template <int N, class Work>
static __device__ __forceinline__ void for_segments(int64_t first, int64_t end, int64_t count,
                                                    Work work) {
    constexpr int64_t TOKENS = N * SEGMENT;
    const int64_t warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    for (int64_t at = first + warp * TOKENS; at < end; at += warps * TOKENS) {
        work(Place(0, count, at));
    }
}

// Block [threads], a run of elements a block.
KERNEL(256, 4, whiten_moments_f32, MomentsArgs) {
    SHARED(Deviations, warps, MAX_WARPS);
    for (int64_t run = blockIdx.x; run * args.run < args.count; run += gridDim.x) {
        const int64_t first = run * args.run, end = min(first + args.run, args.count);
        Deviations d = no_deviations();
        for_segments<IN_FLIGHT>(first, end, args.count, [&](const Place& place) {
            float x[IN_FLIGHT][QUAD];
            unsigned keep[IN_FLIGHT];
            load_tokens(args.x, place, x);
            load_mask(args.mask, place, keep);
#pragma unroll
            for (int j = 0; j < IN_FLIGHT; j++) add(d, x[j], keep[j]);
        });
        d = block_merge(d, warps);
        if (threadIdx.x == 0) args.partials[run] = moments_of(d);
    }
}

KERNEL(512, 1, whiten_merge_f32, MergeArgs) { merge_moments(args); }

KERNEL(256, 4, whiten_forward_f32, ForwardArgs) {
    SHARED(Scale, shared, 1);
    if (threadIdx.x == 0) {
        const Moments m = given_moments(args);
        const Mean mean = in_two_floats(args.scale_only ? 0.0 : m.mean);
        const float inverse = float(Inverse(m, args.options).value);
        *shared = {mean, inverse, args.options.shift_mean ? 0.0f : mean.high};
    }
    __syncthreads();
    const Scale scale = *shared;
    const float* const in[1] = {args.x};
    float* const out[1] = {args.y};
    map_tokens(in, out, args.mask, args.count, Forward{scale});
}

// How a block adds up sums.
struct AddSums {
    static __device__ __forceinline__ GradientSums none() { return {0.0, 0.0}; }

    static __device__ __forceinline__ GradientSums warp_merge(const GradientSums& s) {
        return {warp_sum(s.g), warp_sum(s.product)};
    }
};

// Block [threads], a run of elements a block.
KERNEL(256, 4, whiten_sums_f32, SumsArgs) {
    SHARED(GradientSums, warps, MAX_WARPS);
    const Mean mean = in_two_floats(given_moments(args).mean);
    for (int64_t run = blockIdx.x; run * args.run < args.count; run += gridDim.x) {
        const int64_t first = run * args.run, end = min(first + args.run, args.count);
        GradientSums s = {0.0, 0.0};
        for_segments<PAIRS_IN_FLIGHT>(first, end, args.count, [&](const Place& place) {
            float x[PAIRS_IN_FLIGHT][QUAD], g[PAIRS_IN_FLIGHT][QUAD];
            unsigned keep[PAIRS_IN_FLIGHT];
            load_tokens(args.x, place, x);
            load_tokens(args.grad_y, place, g);
            load_mask(args.mask, place, keep);
#pragma unroll
            for (int j = 0; j < PAIRS_IN_FLIGHT; j++) {
#pragma unroll
                for (int i = 0; i < QUAD; i++) {
                    if (keep[j] >> i & 1) {
                        const double grad = g[j][i];
                        s.g += grad;
                        s.product = fma(grad, double(mean.deviation(x[j][i])), s.product);
                    }
                }
            }
        });
        s = block_merge(AddSums{}, s, warps);
        if (threadIdx.x == 0) args.partials[run] = s;
    }
}

// One block.
KERNEL(512, 1, whiten_merge_sums_f32, MergeSumsArgs) {
    SHARED(GradientSums, warps, WARP);
    GradientSums s = {0.0, 0.0};
    for (int64_t i = threadIdx.x; i < args.count; i += blockDim.x) {
        s.g += args.partials[i].g;
        s.product += args.partials[i].product;
    }
    s = block_merge(AddSums{}, s, warps);
    if (threadIdx.x == 0) *args.sums = s;
}

KERNEL(256, 4, whiten_backward_f32, BackwardArgs) {
    SHARED(GradientScale, shared, 1);
    if (threadIdx.x == 0) {
        const Moments m = given_moments(args);
        const Inverse inverse(m, args.options);
        const double mean_g = args.sums->g / m.count;
        const double slope = args.sums->product * (2.0 * inverse.slope / inverse.divisor);
        *shared = {in_two_floats(m.mean), float(slope), in_two_floats(mean_g), float(inverse.value),
                   args.options.shift_mean ? 0.0f : float(mean_g)};
    }
    __syncthreads();
    const GradientScale scale = *shared;
    const float* const in[2] = {args.x, args.grad_y};
    float* const out[1] = {args.grad_x};
    map_tokens(in, out, args.mask, args.count, Backward{scale});
}
