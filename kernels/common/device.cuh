// What has to be spelt twice: inline PTX for nvcc, and its twin for the CPU stand-in
// (src/cuda/simt), which compiles the same kernels with g++ and defines SIMT. No other file holds
// PTX.
#pragma once

#include <math.h>
#include <stdint.h>

// 16-bit floats as bits; arithmetic is in f32 only.
struct f16 { uint16_t bits; };
struct bf16 { uint16_t bits; };

// A kernel takes one struct of arguments, named `args` in its body. src/OP/cuda.rs has the struct's
// twin in Rust. `threads` is the largest block, and `blocks` is how many of those a multiprocessor
// shall hold: together they say how many registers a thread may have.
#ifdef SIMT
#define KERNEL(threads, blocks, name, Args)                               \
    static void name(const Args& args);                                   \
    static const simt::Kernel name##_kernel(                              \
        SIMT_VARIANT, #name, threads, sizeof(Args),                       \
        [](const void* args) { name(*static_cast<const Args*>(args)); }); \
    static void name(const Args& args)
#else
#define KERNEL(threads, blocks, name, Args)                       \
    extern "C" __global__ void __launch_bounds__(threads, blocks) \
        name(const __grid_constant__ Args args)
#endif

// Of a function that is to be called, and not compiled into every place that calls it.
#ifdef SIMT
#define NOINLINE
#else
#define NOINLINE __noinline__
#endif

// The largest finite number.
constexpr float LARGEST = 3.40282347e38f;

// An array in the block's shared memory. Its contents are undefined at first.
#ifdef SIMT
#define SHARED(T, name, count)        \
    static const char name##_key = 0; \
    T* const name = static_cast<T*>(simt::shared(&name##_key, sizeof(T) * (count)))
#else
#define SHARED(T, name, count) __shared__ T name[count]
#endif

// As many bytes of the block's shared memory as the launch asks for, aligned to 16.
#ifdef SIMT
#define DYNAMIC_SHARED(T, name) T* const name = static_cast<T*>(simt::dynamic_shared())
#else
#define DYNAMIC_SHARED(T, name) extern __shared__ T name[]
#endif

// 2^x to 2 ulp; 0 where the result is below the normal range, NaN for NaN.
static __device__ __forceinline__ float exp2_fast(float x) {
#ifdef SIMT
    const float y = exp2f(x);
    return y < 1.17549435e-38f ? 0.0f : y;
#else
    float y;
    asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// 2^x to 2 ulp, and below the normal range next to it; NaN for NaN. Three instructions more.
static __device__ __forceinline__ float exp2_gradual(float x) {
#ifdef SIMT
    return exp2f(x);
#else
    float y;
    asm("ex2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
    return y;
#endif
}

// The same value, of which the compiler knows nothing: what it worked out of x before it will work
// out again, where it would have kept it in registers.
static __device__ __forceinline__ uint32_t afresh(uint32_t x) {
#ifndef SIMT
    asm volatile("" : "+r"(x));
#endif
    return x;
}

// Loads are not volatile, so that the compiler may move them past each other, past stores and past
// barriers. What they read must not change while the kernel runs, but by a store of what was made
// of it.

// 16 bytes that are needed once: they do not push others out of L1. Aligned to 16.
static __device__ __forceinline__ uint4 load_once(const void* address) {
#ifdef SIMT
    return simt::load16(address);
#else
    uint4 v;
    asm("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
#endif
}

// 16 bytes that a neighbour needs too. Aligned to 16.
static __device__ __forceinline__ uint4 load_shared_by_neighbours(const void* address) {
#ifdef SIMT
    return simt::load16(address);
#else
    uint4 v;
    asm("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];"
        : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
        : "l"(address));
    return v;
#endif
}

// Brings a line of 128 bytes into L2.
static __device__ __forceinline__ void prefetch(const void* address) {
#ifdef SIMT
    (void)address;
#else
    asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
#endif
}

// 16 bytes that nobody reads soon: they leave L2 first. Aligned to 16.
static __device__ __forceinline__ void store_once(void* address, uint4 v) {
#ifdef SIMT
    simt::store16(address, v);
#else
    asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
                 "r"(v.z), "r"(v.w)
                 : "memory");
#endif
}

// Two floats rounded to nearest even, `low` in the low half.
static __device__ __forceinline__ uint32_t pack(float low, float high, bf16) {
#ifdef SIMT
    return simt::to_bf16(low) | uint32_t(simt::to_bf16(high)) << 16;
#else
    uint32_t v;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
#endif
}

static __device__ __forceinline__ uint32_t pack(float low, float high, f16) {
#ifdef SIMT
    return simt::to_f16(low) | uint32_t(simt::to_f16(high)) << 16;
#else
    uint32_t v;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(v) : "f"(high), "f"(low));
    return v;
#endif
}

static __device__ __forceinline__ float to_float(bf16 v) {
    return __uint_as_float(uint32_t(v.bits) << 16);
}

static __device__ __forceinline__ float to_float(f16 v) {
#ifdef SIMT
    return simt::from_f16(v.bits);
#else
    float y;
    asm("cvt.f32.f16 %0, %1;" : "=f"(y) : "h"(v.bits));
    return y;
#endif
}

static __device__ __forceinline__ float to_float(float v) { return v; }

// The larger halves of two pairs, or the larger of two floats. Of a number and NaN, the number.
static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b, float) {
    return __float_as_uint(fmaxf(__uint_as_float(a), __uint_as_float(b)));
}

// The lesser one. Of a number and NaN, NaN.
static __device__ __forceinline__ float lesser(float a, float b) {
#ifdef SIMT
    return isnan(a) || a < b ? a : b;
#else
    float v;
    asm("min.NaN.f32 %0, %1, %2;" : "=f"(v) : "f"(a), "f"(b));
    return v;
#endif
}

// Moves the larger halves of two pairs, or the larger of two floats, to `a`, and NaN.
static __device__ __forceinline__ void order(uint32_t& a, uint32_t& b, float) {
    const float x = __uint_as_float(a), y = __uint_as_float(b);
#ifdef SIMT
    const bool stay = x >= y || isnan(x);
    a = __float_as_uint(stay ? x : y);
    b = __float_as_uint(stay ? y : x);
#else
    float most;
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(most) : "f"(x), "f"(y));
    a = __float_as_uint(most);
    b = __float_as_uint(fminf(x, y));
#endif
}

#ifdef SIMT
template <class T>
static uint32_t larger(uint32_t a, uint32_t b, T) {
    uint32_t pair = 0;
    for (int shift = 0; shift < 32; shift += 16) {
        const T x{uint16_t(a >> shift)}, y{uint16_t(b >> shift)};
        const bool first = to_float(x) > to_float(y) || isnan(to_float(y));
        pair |= uint32_t(first ? x.bits : y.bits) << shift;
    }
    return pair;
}

template <class T>
static void order(uint32_t& a, uint32_t& b, T) {
    for (int shift = 0; shift < 32; shift += 16) {
        const T x{uint16_t(a >> shift)}, y{uint16_t(b >> shift)};
        if (to_float(x) >= to_float(y) || isnan(to_float(x))) continue;
        const uint32_t changed = (a ^ b) & 0xffffu << shift;
        a ^= changed;
        b ^= changed;
    }
}
#else
static __device__ __forceinline__ void order(uint32_t& a, uint32_t& b, bf16) {
    uint32_t most, least;
    asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    asm("min.bf16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
    a = most;
    b = least;
}

static __device__ __forceinline__ void order(uint32_t& a, uint32_t& b, f16) {
    uint32_t most, least;
    asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(most) : "r"(a), "r"(b));
    asm("min.f16x2 %0, %1, %2;" : "=r"(least) : "r"(a), "r"(b));
    a = most;
    b = least;
}

static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b, bf16) {
    uint32_t v;
    asm("max.bf16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}

static __device__ __forceinline__ uint32_t larger(uint32_t a, uint32_t b, f16) {
    uint32_t v;
    asm("max.f16x2 %0, %1, %2;" : "=r"(v) : "r"(a), "r"(b));
    return v;
}
#endif
