// Arrays of one value a token, f32 or flags in u8, wherever in memory a row of them begins.
//
// A warp takes a row in segments of 128 tokens, four tokens a lane, counted from the row's first
// token. Which tokens a lane takes, and so every bit of what it computes, does not depend on the
// row's alignment: a misaligned row is read as the aligned vectors that its tokens straddle, and
// written as those that a lane and the next one share.
#pragma once

#include "reduce.cuh"
#include "vector.cuh"

// Tokens of a lane, and of a warp.
constexpr int QUAD = WIDTH<float>;
constexpr int SEGMENT = QUAD * WARP;

static __device__ __forceinline__ unsigned misalignment(const void* address, unsigned of) {
    return unsigned(reinterpret_cast<uintptr_t>(address)) % of;
}

// Where a row's tokens are in arrays of one value a token.
struct RowRange { int64_t first, tokens; };

// Row `row` of a pack of `total` tokens: offsets [rows + 1]. Whatever they hold, it is within the tokens.
static __device__ __forceinline__ RowRange range_in_pack(const int64_t* offsets, int64_t row,
                                                         int64_t total) {
    const int64_t first = min(max(offsets[row], int64_t(0)), total);
    return {first, min(max(offsets[row + 1], first), total) - first};
}

// Row `row` of rows of `tokens` tokens, or if there are offsets, of a pack of `tokens` in all.
static __device__ __forceinline__ RowRange range_of_row(const int64_t* offsets, int64_t row,
                                                        int64_t tokens) {
    if (offsets) return range_in_pack(offsets, row, tokens);
    return {row * tokens, tokens};
}

// Where in a row a warp's segments begin. Counted from there the rest of the row fits 32 bits, or
// it is as good as endless.
struct Place {
    int64_t offset;  // of the first token from the array's first
    int left;        // tokens from there to the end of the row, 2^30 at most; may be negative
    bool inner;      // not the row's first token

    __device__ __forceinline__ Place(const RowRange& row, int64_t first)
        : offset(row.first + first),
          left(int(min(row.tokens - first, int64_t(1) << 30))),
          inner(first > 0) {}

    __device__ __forceinline__ Place(int64_t row, int64_t tokens, int64_t first)
        : Place(RowRange{row * tokens, tokens}, first) {}
};

static __device__ __forceinline__ int first_of_lane(int segment) {
    return segment * SEGMENT + int(threadIdx.x % WARP) * QUAD;
}

// The lane's tokens of N segments, with all loads in flight; 0 past the end of the row.
template <int N>
static __device__ __forceinline__ void load_tokens(const float* array, const Place& place,
                                                   float (&x)[N][QUAD]) {
    const float* from = array + place.offset;
    const unsigned skip = misalignment(from, 16);
    // The same for all lanes. What stands before and after the row is not ours to read.
    if (skip == 0 && place.left >= N * SEGMENT) {
        uint4 v[N];
#pragma unroll
        for (int j = 0; j < N; j++) v[j] = load_once(from + first_of_lane(j));
#pragma unroll
        for (int j = 0; j < N; j++) unpack(v[j], x[j], float{});
    } else if (skip != 0 && place.inner && place.left >= N * SEGMENT + QUAD) {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const char* low = reinterpret_cast<const char*>(from + first_of_lane(j)) - skip;
            const uint4 v = load_shared_by_neighbours(low);
            unpack(extract(v, load_shared_by_neighbours(low + 16), skip), x[j], float{});
        }
    } else {
#pragma unroll
        for (int j = 0; j < N; j++) {
            const int t = first_of_lane(j);
            if (skip == 0 && t + QUAD <= place.left) {
                unpack(load_once(from + t), x[j], float{});
                continue;
            }
#pragma unroll
            for (int i = 0; i < QUAD; i++) x[j][i] = t + i < place.left ? from[t + i] : 0.0f;
        }
    }
}

// Writes the lane's tokens of one segment, as far as the row goes. All lanes of the warp take part.
static __device__ __forceinline__ void store_tokens(float* array, const Place& place, int segment,
                                                    const float (&x)[QUAD]) {
    const int lane = threadIdx.x % WARP, t = first_of_lane(segment);
    float* to = array + place.offset + t;
    const unsigned skip = misalignment(to, 16);
    if (skip == 0 && t + QUAD <= place.left) {
        store_once(to, pack(x, float{}));
        return;
    }
    // Tokens that are stored one by one.
    int first = 0, end = place.left - t;
    if (skip != 0 && place.left >= (segment + 1) * SEGMENT) {
        // The vector that begins with this lane's token `head` ends with the next lane's tokens.
        const int head = QUAD - int(skip / sizeof(float));
        float next[QUAD] = {};
#pragma unroll
        for (int i = 0; i < QUAD - 1; i++) next[i] = __shfl_down_sync(ALL_LANES, x[i], 1);
        if (lane < WARP - 1) {
            store_once(to + head, extract(pack(x, float{}), pack(next, float{}), 16 - skip));
            end = lane == 0 ? head : 0;
        } else {
            first = head;
        }
    }
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        if (i >= first && i < end) to[i] = x[i];
    }
}

// The lane's four flags of a segment, a byte each; 0 past the end of the row.
static __device__ __forceinline__ uint32_t load_flags(const uint8_t* array, const Place& place,
                                                      int segment) {
    const int t = first_of_lane(segment);
    const uint8_t* from = array + place.offset + t;
    if (misalignment(from, QUAD) == 0 && t + QUAD <= place.left) {
        return *reinterpret_cast<const uint32_t*>(from);
    }
    uint32_t flags = 0;
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        if (t + i < place.left) flags |= uint32_t(from[i]) << 8 * i;
    }
    return flags;
}

// A bit for each byte that is not 0.
static __device__ __forceinline__ unsigned flag_bits(uint32_t flags) {
    const uint32_t high = (((flags & 0x7f7f7f7f) + 0x7f7f7f7f) | flags) & 0x80808080;
    // Brings bits 7, 15, 23 and 31 next to each other at the top.
    return (high >> 7) * 0x10204080u >> 28;
}

// The lowest `count` of four bits.
static __device__ __forceinline__ unsigned lowest_bits(int count) {
    return count >= QUAD ? 15u : count <= 0 ? 0u : (1u << count) - 1;
}

// The lane's unmasked tokens of N segments, four bits for each.
template <int N>
static __device__ __forceinline__ void load_mask(const uint8_t* mask, const Place& place,
                                                 unsigned (&keep)[N]) {
    uint32_t flags[N];
#pragma unroll
    for (int j = 0; j < N; j++) {
        if (mask) flags[j] = load_flags(mask, place, j);
    }
#pragma unroll
    for (int j = 0; j < N; j++) {
        keep[j] = mask ? flag_bits(flags[j]) : lowest_bits(place.left - first_of_lane(j));
    }
}

// Writes the lane's four flags of a segment, a byte each, as far as the row goes.
static __device__ __forceinline__ void store_flags(uint8_t* array, const Place& place, int segment,
                                                   uint32_t flags) {
    const int t = first_of_lane(segment);
    uint8_t* to = array + place.offset + t;
    if (misalignment(to, QUAD) == 0 && t + QUAD <= place.left) {
        *reinterpret_cast<uint32_t*>(to) = flags;
        return;
    }
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        if (t + i < place.left) to[i] = uint8_t(flags >> 8 * i);
    }
}
