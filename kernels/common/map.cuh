// Columns that are computed each by itself: gradients of a row, or values of tokens.
#pragma once

#include "vector.cuh"

// Columns on both sides of the aligned vectors of one or two outputs.
template <class T>
struct Split {
    int head;      // columns before the first aligned vector
    int vectors;   // aligned vectors
    int64_t tail;  // the first column after them

    // Outputs that are aligned differently have no vectors in common: all columns are tail.
    __device__ __forceinline__ Split(const T* a, const T* b, int64_t columns) {
        const unsigned skip = unsigned(reinterpret_cast<uintptr_t>(a) & 15);
        const bool alike = skip == unsigned(reinterpret_cast<uintptr_t>(b) & 15);
        head = alike ? int(min(int64_t((16 - skip) % 16 / sizeof(T)), columns)) : 0;
        vectors = alike ? int((columns - head) / WIDTH<T>) : 0;
        tail = head + int64_t(vectors) * WIDTH<T>;
    }
};

// Four bytes from anywhere.
static __device__ __forceinline__ uint32_t load_bytes(const uint8_t* bytes) {
    if (reinterpret_cast<uintptr_t>(bytes) % 4 == 0) {
        return *reinterpret_cast<const uint32_t*>(bytes);
    }
    return bytes[0] | bytes[1] << 8 | bytes[2] << 16 | uint32_t(bytes[3]) << 24;
}

// What of some columns falls to a thread: they are dealt out by tiles to `chunks` units of
// `threads`.
struct Share {
    int chunk, chunks;
    int thread, threads;
};

// Vectors of each input that a thread loads before it uses the first: of several fewer, so that
// registers are left for more threads.
template <int IN>
constexpr int VECTORS = IN == 1 ? IN_FLIGHT : IN_FLIGHT / 2;

// Loads a tile of an input's vectors, as far as they are below `end`, and has the next one brought into
// L2, if it is not negative.
struct LoadRows {
    template <class T, int N>
    __device__ __forceinline__ void operator()(const T* in, int64_t columns, int tile, int next,
                                               Share share, int end, uint4 (&v)[N]) const {
        const Row<T> row(in, columns, 0, 0);
        row.load(tile, share.thread, share.threads, end, v);
        if (next >= 0) { row.template prefetch_tile<N>(next, share.thread, share.threads, end); }
    }
};

// Writes to each of `out` what `f` makes of the columns of all `in`: f(x, first, y) reads columns
// from `first` on, x[0] from in[0] and so on, one column or a vector, and sets y. An output may be
// null. `load` is LoadRows, or knows of vectors that are at hand.
//
// With MASKED columns are f32, and where `mask` is not null and 0, outputs are 0.
//
// No thread reads by vectors what another writes: an output may be the memory of an input of the
// same column count. (If it is, it is aligned like that input; and if outputs are not all aligned
// alike, columns go one by one.)
template <bool MASKED = false, class T, int IN, int OUT, class F, class L = LoadRows>
static __device__ __forceinline__ void map_columns(const T* const (&in)[IN], T* const (&out)[OUT],
                                                   const uint8_t* mask, int64_t columns,
                                                   Share share, const F& f, const L& load = {}) {
    static_assert(!MASKED || WIDTH<T> == 4);
    const T* a = out[0] ? out[0] : out[OUT - 1];
    const T* b = out[OUT - 1] ? out[OUT - 1] : a;
    const Split<T> split(a, b, columns);
    const int thread = share.thread, threads = share.threads;
    // The last tile first: what a pass over the row before this one has left in L2 is its end.
    const int tile_vectors = VECTORS<IN> * threads, step = share.chunks * tile_vectors;
    const int tiles = (split.vectors + tile_vectors - 1) / tile_vectors;
    for (int tile = (tiles - 1 - share.chunk) * tile_vectors; tile >= 0; tile -= step) {
        uint4 v[IN][VECTORS<IN>];
#pragma unroll
        for (int k = 0; k < IN; k++) {
            load(in[k] + split.head, columns - split.head, tile, tile - step, share, split.vectors,
                 v[k]);
        }
        uint32_t keep[VECTORS<IN>];
        if constexpr (MASKED) {
#pragma unroll
            for (int i = 0; i < VECTORS<IN>; i++) {
                const int vector = tile + i * threads + thread;
                keep[i] = 0x01010101;
                if (mask && vector < split.vectors) {
                    keep[i] = load_bytes(mask + split.head + int64_t(vector) * WIDTH<T>);
                }
            }
        }
#pragma unroll
        for (int i = 0; i < VECTORS<IN>; i++) {
            const int vector = tile + i * threads + thread;
            if (vector >= split.vectors) break;
            const int64_t first = split.head + int64_t(vector) * WIDTH<T>;
            float x[IN][WIDTH<T>], y[OUT][WIDTH<T>];
#pragma unroll
            for (int k = 0; k < IN; k++) unpack(v[k][i], x[k], T{});
            f(x, first, y);
#pragma unroll
            for (int k = 0; k < OUT; k++) {
                if constexpr (MASKED) {
#pragma unroll
                    for (int j = 0; j < WIDTH<T>; j++) {
                        y[k][j] = keep[i] >> 8 * j & 0xff ? y[k][j] : 0.0f;
                    }
                }
                if (out[k]) store_once(out[k] + first, pack(y[k], T{}));
            }
        }
    }
    // Columns that are no vectors fall to the last threads of the last tile, which have the fewest of
    // those.
    const int rank = (share.chunk + 1) * threads - 1 - thread;
    const auto one = [&](int64_t column) {
        float x[IN][1], y[OUT][1];
#pragma unroll
        for (int k = 0; k < IN; k++) x[k][0] = to_float(in[k][column]);
        f(x, column, y);
#pragma unroll
        for (int k = 0; k < OUT; k++) {
            if (MASKED && mask && mask[column] == 0) y[k][0] = 0.0f;
            if (out[k]) store(out[k] + column, y[k][0]);
        }
    };
    if (rank < split.head) one(rank);
    for (int64_t i = split.tail + rank; i < columns; i += share.chunks * threads) one(i);
}

// Block [threads], all tokens as columns, a few vectors a thread at a time.
template <int IN, int OUT, class F>
static __device__ __forceinline__ void map_tokens(const float* const (&in)[IN],
                                                  float* const (&out)[OUT], const uint8_t* mask,
                                                  int64_t tokens, const F& f) {
    const int64_t tile = int64_t(VECTORS<IN>) * WIDTH<float> * blockDim.x;
    for (int64_t first = blockIdx.x * tile; first < tokens; first += gridDim.x * tile) {
        const float* from[IN];
        float* to[OUT];
#pragma unroll
        for (int k = 0; k < IN; k++) from[k] = in[k] + first;
#pragma unroll
        for (int k = 0; k < OUT; k++) to[k] = out[k] ? out[k] + first : nullptr;
        const Share share = {0, 1, int(threadIdx.x), int(blockDim.x)};
        map_columns<true>(from, to, mask ? mask + first : nullptr, min(tile, tokens - first), share,
                          f);
    }
}

// One value in all columns, shared out in the same way. With MASKED columns are f32, and where `mask` is
// not null and 0, they are 0.
template <bool MASKED = false, class T>
static __device__ __forceinline__ void fill_columns(T* out, float value, int64_t columns,
                                                    Share share, const uint8_t* mask = nullptr) {
    static_assert(!MASKED || WIDTH<T> == 4);
    const Split<T> split(out, out, columns);
    const int rank = share.chunk * share.threads + share.thread;
    const int step = share.chunks * share.threads;
    float values[WIDTH<T>];
#pragma unroll
    for (int i = 0; i < WIDTH<T>; i++) values[i] = value;
    for (int vector = rank; vector < split.vectors; vector += step) {
        const int64_t first = split.head + int64_t(vector) * WIDTH<T>;
        if constexpr (MASKED) {
            const uint32_t keep = mask ? load_bytes(mask + first) : 0x01010101;
#pragma unroll
            for (int i = 0; i < WIDTH<T>; i++) values[i] = keep >> 8 * i & 0xff ? value : 0.0f;
        }
        store_once(out + first, pack(values, T{}));
    }
    const auto one = [&](int64_t column) {
        store(out + column, MASKED && mask && mask[column] == 0 ? 0.0f : value);
    };
    if (rank < split.head) one(rank);
    for (int64_t i = split.tail + rank; i < columns; i += step) one(i);
}

// Block [threads]: calls f(row, share) for every row and each of its `chunks`, which are for a warp
// or for the whole block (`chunk_threads`).
template <class Args, class F>
static __device__ __forceinline__ void for_each_share(const Args& args, const F& f) {
    const int threads = args.chunk_threads;
    const int64_t units = args.rows * args.chunks;
    const int64_t first = int64_t(blockIdx.x) * (blockDim.x / threads) + threadIdx.x / threads;
    const int64_t step = int64_t(gridDim.x) * (blockDim.x / threads);
    for (int64_t unit = first; unit < units; unit += step) {
        const int chunk = int(unit % args.chunks);
        f(unit / args.chunks, Share{chunk, args.chunks, int(threadIdx.x % threads), threads});
    }
}
