// Weights of f32 are powers of 2, those of f64 powers of e.
#pragma once

#include "kernels/cuda/common/ptx.cuh"

// The exponent of a logit of 1.
template <typename T>
constexpr T PER_LOGIT = 1;
template <>
constexpr float PER_LOGIT<float> = LOG2E;
__device__ __forceinline__ float exponential(float x) { return exp2_approx(x); }
__device__ __forceinline__ double exponential(double x) { return exp(x); }
__device__ __forceinline__ float logarithm(float x) { return log2f(x); }
__device__ __forceinline__ double logarithm(double x) { return log(x); }
