// Rows in 16-byte vectors, wherever a row begins: with V = 50257 columns seven rows of eight are
// not aligned.
#pragma once

#include "device.cuh"

// Columns of a vector.
template <class T>
constexpr int WIDTH = 16 / sizeof(T);

// Vectors of a row that a thread loads before it uses the first.
constexpr int IN_FLIGHT = 4;

// A word of columns that hold -inf.
template <class T>
constexpr uint32_t NOTHING = 0xff800000;
template <>
constexpr uint32_t NOTHING<f16> = 0xfc00fc00;
template <>
constexpr uint32_t NOTHING<bf16> = 0xff80ff80;

static __device__ __forceinline__ uint32_t bits_of(float x) { return __float_as_uint(x); }

template <class T>
static __device__ __forceinline__ uint32_t bits_of(T x) {
    return x.bits;
}

static __device__ __forceinline__ void unpack(uint4 v, float (&x)[4], float) {
    x[0] = __uint_as_float(v.x);
    x[1] = __uint_as_float(v.y);
    x[2] = __uint_as_float(v.z);
    x[3] = __uint_as_float(v.w);
}

template <class T>
static __device__ __forceinline__ void unpack(uint4 v, float (&x)[8], T) {
    const uint32_t words[4] = {v.x, v.y, v.z, v.w};
#pragma unroll
    for (int i = 0; i < 4; i++) {
        x[2 * i] = to_float(T{uint16_t(words[i])});
        x[2 * i + 1] = to_float(T{uint16_t(words[i] >> 16)});
    }
}

static __device__ __forceinline__ uint4 pack(const float (&x)[4], float) {
    return make_uint4(__float_as_uint(x[0]), __float_as_uint(x[1]), __float_as_uint(x[2]),
                      __float_as_uint(x[3]));
}

template <class T>
static __device__ __forceinline__ uint4 pack(const float (&x)[8], T type) {
    return make_uint4(pack(x[0], x[1], type), pack(x[2], x[3], type), pack(x[4], x[5], type),
                      pack(x[6], x[7], type));
}

static __device__ __forceinline__ float highest(uint32_t word, float) {
    return __uint_as_float(word);
}

template <class T>
static __device__ __forceinline__ float highest(uint32_t word, T) {
    return fmaxf(to_float(T{uint16_t(word)}), to_float(T{uint16_t(word >> 16)}));
}

// The largest of all columns, NaN skipped. 16-bit floats are compared two at a time.
template <int N, class T>
static __device__ __forceinline__ float highest(const uint4 (&v)[N], T type) {
    uint32_t x = v[0].x, y = v[0].y, z = v[0].z, w = v[0].w;
#pragma unroll
    for (int i = 1; i < N; i++) {
        x = larger(x, v[i].x, type);
        y = larger(y, v[i].y, type);
        z = larger(z, v[i].z, type);
        w = larger(w, v[i].w, type);
    }
    return highest(larger(larger(x, y, type), larger(z, w, type), type), type);
}

// Moves the largest columns into the first word, where a tournament among the words of all vectors ends,
// and NaN with them; what has lost a match takes the other's place. So if the last vectors hold nothing but
// -inf, they still do. 16-bit floats are compared two at a time, low halves with low ones.
template <int N, class T>
static __device__ __forceinline__ void highest_first(uint4 (&v)[N], T type) {
    static_assert((N & (N - 1)) == 0);
#pragma unroll
    for (int half = N / 2; half > 0; half /= 2) {
#pragma unroll
        for (int i = 0; i < half; i++) {
            order(v[i].x, v[i + half].x, type);
            order(v[i].y, v[i + half].y, type);
            order(v[i].z, v[i + half].z, type);
            order(v[i].w, v[i + half].w, type);
        }
    }
    order(v[0].x, v[0].z, type);
    order(v[0].y, v[0].w, type);
    order(v[0].x, v[0].y, type);
}

// The largest of the columns of a first word, and `x` in its place; of two the lesser stays. NaN is
// skipped, and stays too.
static __device__ __forceinline__ float exchange_highest(float (&z)[4], float x) {
    const float most = fmaxf(z[0], x);
    z[0] = lesser(z[0], x);
    return most;
}

static __device__ __forceinline__ float exchange_highest(float (&z)[8], float x) {
    const float pair = fmaxf(z[0], z[1]);
    z[0] = lesser(z[0], z[1]);
    z[1] = lesser(pair, x);
    return fmaxf(pair, x);
}

// One element, rounded to nearest even.
static __device__ __forceinline__ void store(float* address, float x) { *address = x; }

template <class T>
static __device__ __forceinline__ void store(T* address, float x) {
    *address = T{uint16_t(pack(x, 0.0f, T{}))};
}

// 16 bytes out of 32, from the byte `skip` on. `skip` is a multiple of 2 below 16.
static __device__ __forceinline__ uint4 extract(uint4 low, uint4 high, unsigned skip) {
    uint32_t w[8] = {low.x, low.y, low.z, low.w, high.x, high.y, high.z, high.w};
#pragma unroll
    for (int i = 0; i < 6; i++) w[i] = skip & 8 ? w[i + 2] : w[i];
#pragma unroll
    for (int i = 0; i < 5; i++) w[i] = skip & 4 ? w[i + 1] : w[i];
    const unsigned bits = (skip & 3) * 8;
    return make_uint4(__funnelshift_r(w[0], w[1], bits), __funnelshift_r(w[1], w[2], bits),
                      __funnelshift_r(w[2], w[3], bits), __funnelshift_r(w[3], w[4], bits));
}

// The same of several, for a `skip` that all lanes have: which words they are is a branch and costs
// nothing for each.
template <int N>
static __device__ __forceinline__ void extract(const uint4 (&low)[N], const uint4 (&high)[N],
                                               unsigned skip, uint4 (&v)[N]) {
    const unsigned in_word = skip & 3;
    const auto all = [&](unsigned skip) {
#pragma unroll
        for (int i = 0; i < N; i++) v[i] = extract(low[i], high[i], skip);
    };
    switch (skip / 4) {
        case 0:
            return all(in_word);
        case 1:
            return all(4 | in_word);
        case 2:
            return all(8 | in_word);
        default:
            return all(12 | in_word);
    }
}

// A row for reading, as groups of WIDTH columns counted from column 0. Which columns make a group
// does not depend on the row's alignment, so neither do the bits of a sum over groups: a misaligned
// group is put together from the two aligned vectors that it straddles. The second of them is the
// neighbour's first, so it comes from L1 and not from memory twice. Groups are counted in 32 bits,
// which is enough for a row; what is counted over rows takes 64.
template <class T>
struct Row {
    const T* data;
    int64_t columns;
    // Bytes from an aligned address up to the row.
    unsigned skip;
    // The groups that are columns throughout, and whose vectors are ours to read.
    int first_inside, end_inside;

    // So many elements before and after the row may be read too, where a vector of it holds them. They are
    // cut off, so that they may change meanwhile.
    __device__ __forceinline__ Row(const T* data, int64_t columns, int64_t before, int64_t after)
        : data(data), columns(columns) {
        skip = unsigned(reinterpret_cast<uintptr_t>(data) & 15);
        first_inside = skip && before < WIDTH<T> ? 1 : 0;
        const int64_t end = columns + min(after, int64_t(WIDTH<T>));
        const int vectors = int((end * int64_t(sizeof(T)) + skip) / 16);
        end_inside = min(skip ? vectors - 1 : vectors, int(columns / WIDTH<T>));
    }

    // A row of a tensor [rows, columns].
    static __device__ __forceinline__ Row of(const void* tensor, int64_t row, int64_t rows,
                                             int64_t columns) {
        const int64_t before = row * columns;
        return Row(static_cast<const T*>(tensor) + before, columns, before,
                   (rows - 1 - row) * columns);
    }

    __device__ __forceinline__ const T* at(int group) const {
        return data + int64_t(group) * WIDTH<T>;
    }

    __device__ __forceinline__ int groups() const {
        return int((columns + WIDTH<T> - 1) / WIDTH<T>);
    }

    __device__ __forceinline__ bool inside(int first, int end) const {
        return first >= first_inside && end <= end_inside;
    }

    // Begins to bring the tile of N groups a thread into L2, as far as they are below `end`: it takes no
    // registers, unlike loads.
    template <int N>
    __device__ __forceinline__ void prefetch_tile(int tile, int thread, int threads,
                                                  int end) const {
        constexpr int GROUPS_IN_LINE = 8;
        const int group = tile + thread * GROUPS_IN_LINE;
        if (thread < N * threads / GROUPS_IN_LINE && group < end) prefetch(at(group));
    }

    // N groups, from tile + thread on every `threads`-th, as far as they are below `end`; beyond
    // it, as in columns past the end of the row, -inf.
    template <int N>
    __device__ __forceinline__ void load(int tile, int thread, int threads, int end,
                                         uint4 (&v)[N]) const {
        const int mine = tile + thread;
        const int tile_end = tile + N * threads;
        // The same for all threads, so that no warp takes both ways.
        if (inside(tile, tile_end) && tile_end <= end) {
            if (skip == 0) {
#pragma unroll
                for (int i = 0; i < N; i++) v[i] = load_once(at(mine + i * threads));
            } else {
#pragma unroll
                for (int i = 0; i < N; i++)
                    v[i] = load_shared_by_neighbours(low_of(mine + i * threads));
                // Half of the others at a time: they come from L1, and registers are few.
                constexpr int HALF = (N + 1) / 2;
#pragma unroll
                for (int first = 0; first < N; first += HALF) {
                    uint4 low[HALF], high[HALF];
#pragma unroll
                    for (int i = 0; i < HALF; i++) {
                        low[i] = v[first + i];
                        high[i] =
                            load_shared_by_neighbours(low_of(mine + (first + i) * threads) + 16);
                    }
                    extract(low, high, skip, low);
#pragma unroll
                    for (int i = 0; i < HALF; i++) v[first + i] = low[i];
                }
            }
            return;
        }
#pragma unroll
        for (int i = 0; i < N; i++) {
            const int group = mine + i * threads;
            uint4 low = nothing(), high = low;
            if (group < end && inside(group, group + 1)) {
                low = load_shared_by_neighbours(low_of(group));
                if (skip) high = load_shared_by_neighbours(low_of(group) + 16);
            }
            v[i] = extract(low, high, skip);
        }
        if (inside(tile, min(tile_end, end))) return;
#pragma unroll 1
        for (int i = 0; i < N; i++) {
            const int group = mine + i * threads;
            if (group >= end || inside(group, group + 1)) continue;
            const uint4 edge = load_edge(group);
#pragma unroll
            for (int j = 0; j < N; j++) {
                if (j == i) v[j] = edge;
            }
        }
    }

private:
    static __device__ __forceinline__ uint4 nothing() {
        return make_uint4(NOTHING<T>, NOTHING<T>, NOTHING<T>, NOTHING<T>);
    }

    // The first of the two aligned vectors in which a group lies, which of an aligned row is the group.
    __device__ __forceinline__ const char* low_of(int group) const {
        return reinterpret_cast<const char*>(at(group)) - skip;
    }

    // A group at an end of the row, one element at a time.
    __device__ __forceinline__ uint4 load_edge(int group) const {
        constexpr int IN_WORD = 4 / sizeof(T);
        constexpr uint32_t MASK = 0xffffffff >> (32 - 8 * sizeof(T));
        const int64_t first = int64_t(group) * WIDTH<T>;
        uint32_t words[4] = {0, 0, 0, 0};
#pragma unroll
        for (int i = 0; i < WIDTH<T>; i++) {
            const uint32_t bits =
                first + i < columns ? bits_of(data[first + i]) : NOTHING<T> & MASK;
            words[i / IN_WORD] |= bits << (32 / IN_WORD * (i % IN_WORD));
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }
};
