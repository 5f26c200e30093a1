// The CPU stand-in for CUDA: what nvcc gives a kernel, for g++. Included before every kernel; a
// CUDA thread is a fiber, and whatever waits for other threads is a call into simt.cpp.
//
// Not modelled: time, bank conflicts, limits of registers and shared memory, the last bits of the
// hardware's approximations, and races between blocks (blocks run one after the other, in an order
// that varies with the schedule).
#pragma once

#include <math.h>
#include <stddef.h>
#include <stdint.h>

#include <bit>
#include <source_location>
#include <type_traits>

#define SIMT 1
#define __device__
#define __global__
#define __forceinline__ inline

struct uint3 { unsigned x, y, z; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };

inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }

extern uint3 threadIdx, blockIdx, blockDim, gridDim;

// The line of the kernel that a call stands in, for reports.
#define SIMT_HERE std::source_location here = std::source_location::current()

namespace simt {

// A kernel that can be launched by name. `variant` is empty, or names the bug planted in it.
struct Kernel {
    const char* variant;
    const char* name;
    unsigned max_threads;
    size_t args_bytes;
    void (*run)(const void* args);
    const Kernel* next;

    Kernel(const char* variant, const char* name, unsigned max_threads, size_t args_bytes,
           void (*run)(const void* args));
};

enum class WarpOp { SHUFFLE, SHUFFLE_UP, SHUFFLE_DOWN, SHUFFLE_XOR, BALLOT, SYNC };

// Waits until every lane of the mask is at the same operation, and does it.
uint64_t warp_op(WarpOp op, uint32_t mask, uint64_t value, unsigned argument,
                 const std::source_location& here);
void block_sync(const std::source_location& here);

// The running block's memory under that key, made on first use and filled with NaN.
void* shared(const void* key, size_t bytes);
// As many bytes of it as the launch asks for.
void* dynamic_shared();

// Ends the launch with a report.
[[noreturn]] void fail(const char* what, const std::source_location& here);

inline uint4 load16(const void* address, SIMT_HERE) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("misaligned load of 16 bytes", here);
    return *static_cast<const uint4*>(address);
}

inline void store16(void* address, uint4 value, SIMT_HERE) {
    if (reinterpret_cast<uintptr_t>(address) % 16) fail("misaligned store of 16 bytes", here);
    *static_cast<uint4*>(address) = value;
}

// Conversions of 16-bit floats, rounding to nearest even as the device does.

inline uint16_t to_bf16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    if (x != x) return 0x7fff;
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

inline uint16_t to_f16(float x) {
    const uint32_t bits = std::bit_cast<uint32_t>(x);
    const uint32_t sign = bits >> 16 & 0x8000, magnitude = bits & 0x7fffffff;
    if (x != x) return 0x7fff;
    // Half of the last place above the largest half.
    if (magnitude >= 0x477ff000) return uint16_t(sign | 0x7c00);
    if (magnitude < 0x38800000) {
        // Below the normal range a half counts units of 2^-24.
        return uint16_t(sign | uint32_t(nearbyintf(fabsf(x) * 16777216.0f)));
    }
    const uint32_t rebiased = magnitude - 0x38000000;
    return uint16_t(sign | (rebiased + 0xfff + (rebiased >> 13 & 1)) >> 13);
}

inline float from_f16(uint16_t half) {
    const uint32_t sign = uint32_t(half & 0x8000) << 16;
    const uint32_t exponent = half >> 10 & 31, mantissa = half & 0x3ff;
    if (exponent == 31) return std::bit_cast<float>(sign | 0x7f800000 | mantissa << 13);
    if (exponent == 0) {
        const float magnitude = float(mantissa) / 16777216.0f;
        return sign ? -magnitude : magnitude;
    }
    return std::bit_cast<float>(sign | (exponent + 112) << 23 | mantissa << 13);
}

template <class T>
T warp_value(WarpOp op, uint32_t mask, T value, unsigned argument,
             const std::source_location& here) {
    static_assert(sizeof(T) == 4 || sizeof(T) == 8);
    using Bits = std::conditional_t<sizeof(T) == 4, uint32_t, uint64_t>;
    const Bits bits = std::bit_cast<Bits>(value);
    return std::bit_cast<T>(Bits(warp_op(op, mask, bits, argument, here)));
}

}  // namespace simt

inline void __syncthreads(SIMT_HERE) { simt::block_sync(here); }

inline void __syncwarp(uint32_t mask = 0xffffffff, SIMT_HERE) {
    simt::warp_op(simt::WarpOp::SYNC, mask, 0, 0, here);
}

inline uint32_t __ballot_sync(uint32_t mask, int predicate, SIMT_HERE) {
    return uint32_t(simt::warp_op(simt::WarpOp::BALLOT, mask, predicate != 0, 0, here));
}

template <class T>
T __shfl_sync(uint32_t mask, T value, int lane, SIMT_HERE) {
    return simt::warp_value(simt::WarpOp::SHUFFLE, mask, value, unsigned(lane), here);
}

template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned lanes, SIMT_HERE) {
    return simt::warp_value(simt::WarpOp::SHUFFLE_UP, mask, value, lanes, here);
}

template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned lanes, SIMT_HERE) {
    return simt::warp_value(simt::WarpOp::SHUFFLE_DOWN, mask, value, lanes, here);
}

template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int lanes, SIMT_HERE) {
    return simt::warp_value(simt::WarpOp::SHUFFLE_XOR, mask, value, unsigned(lanes), here);
}

inline uint32_t __float_as_uint(float x) { return std::bit_cast<uint32_t>(x); }
inline float __uint_as_float(uint32_t x) { return std::bit_cast<float>(x); }

inline int64_t __double_as_longlong(double x) { return std::bit_cast<int64_t>(x); }

inline uint32_t __funnelshift_r(uint32_t low, uint32_t high, uint32_t shift) {
    return uint32_t((uint64_t(high) << 32 | low) >> (shift & 31));
}

inline int __popc(uint32_t x) { return std::popcount(x); }
// The place of the lowest bit that is set, counted from 1; 0 if none is.
inline int __ffs(uint32_t x) { return x ? std::countr_zero(x) + 1 : 0; }
// Zeros above the highest bit that is set.
inline int __clz(uint32_t x) { return std::countl_zero(x); }

inline int min(int a, int b) { return b < a ? b : a; }
inline int64_t min(int64_t a, int64_t b) { return b < a ? b : a; }
inline int64_t max(int64_t a, int64_t b) { return a < b ? b : a; }
