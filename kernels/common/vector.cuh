// Rows in 16-byte vectors, wherever a row begins: with V = 50257 columns seven rows of eight are not
// aligned.
#pragma once

#include "device.cuh"

// Columns of a vector.
template <class T> constexpr int WIDTH = 16 / sizeof(T);

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
    // The groups whose vectors lie in the row: the first group of a misaligned row does not, since
    // what stands before the row is not ours to read.
    int first_inside, end_inside;

    __device__ __forceinline__ Row(const T* data, int64_t columns) : data(data), columns(columns) {
        skip = unsigned(reinterpret_cast<uintptr_t>(data) & 15);
        const int vectors = int((columns * sizeof(T) + skip) / 16);
        first_inside = skip ? 1 : 0;
        end_inside = skip ? vectors - 1 : vectors;
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

    __device__ __forceinline__ uint4 load_aligned(int group) const {
        return load_once(at(group));
    }

    __device__ __forceinline__ uint4 load_misaligned(int group) const {
        const char* low = reinterpret_cast<const char*>(at(group)) - skip;
        return extract(load_shared_by_neighbours(low), load_shared_by_neighbours(low + 16), skip);
    }

    // A group at an end of the row, one element at a time; -inf for columns past the end.
    __device__ __forceinline__ void load_edge(int group, float (&x)[WIDTH<T>]) const {
        const int64_t first = int64_t(group) * WIDTH<T>;
#pragma unroll
        for (int i = 0; i < WIDTH<T>; i++) {
            x[i] = first + i < columns ? to_float(data[first + i]) : -INFINITY;
        }
    }
};
