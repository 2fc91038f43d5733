// The divergence of softmaxes, for arcee_fusion.
// Part of kernels.cpp, which is compiled for each instruction set: everything has internal linkage.
#pragma once

#include "kernel_sums.h"

namespace gptailor {
namespace {

double from_bits(uint64_t bits) {
  double value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

uint64_t bits_of_double(double value) {
  uint64_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;

// exp(x) for x <= 0, and log(x) for normal x > 0, within a few units in the last place. The C library's are not used,
// because these loops are vectorised, and because its results depend on the machine. NaN stays NaN.
void exp_of(double* __restrict x, int64_t n) {
  constexpr double kRound = 0x1.8p52;  // adding it leaves an integer in the low bits
  for (int64_t j = 0; j < n; ++j) {
    const double v = x[j] < -700.0 ? -700.0 : x[j];
    const double shifted = v * 0x1.71547652b82fep0 + kRound, k = shifted - kRound;
    const double r = (v - k * kLn2High) - k * kLn2Low;
    double p = 1.0 / 479001600.0;
    p = p * r + 1.0 / 39916800.0;
    p = p * r + 1.0 / 3628800.0;
    p = p * r + 1.0 / 362880.0;
    p = p * r + 1.0 / 40320.0;
    p = p * r + 1.0 / 5040.0;
    p = p * r + 1.0 / 720.0;
    p = p * r + 1.0 / 120.0;
    p = p * r + 1.0 / 24.0;
    p = p * r + 1.0 / 6.0;
    p = p * r + 0.5;
    p = p * r * r + r + 1.0;
    x[j] = p * from_bits((bits_of_double(shifted) + 1023) << 52);
  }
}

double log_of(double x) {
  // The mantissa is between sqrt(1/2) and sqrt(2); the exponent is converted to double through its bits.
  const uint64_t bits = bits_of_double(x), moved = bits - 0x3fe6a09e667f3bcdu;
  const double m = from_bits(bits - (moved & 0xfff0000000000000u));
  // moved >> 52 with its sign, as an offset that is never negative
  const double k = from_bits(0x4330000000000000u | ((moved + (uint64_t{2048} << 52)) >> 52 & 0xfff)) - (0x1p52 + 2048.0);
  const double s = (m - 1.0) / (m + 1.0), z = s * s;
  double p = 1.0 / 21.0;
  p = p * z + 1.0 / 19.0;
  p = p * z + 1.0 / 17.0;
  p = p * z + 1.0 / 15.0;
  p = p * z + 1.0 / 13.0;
  p = p * z + 1.0 / 11.0;
  p = p * z + 1.0 / 9.0;
  p = p * z + 1.0 / 7.0;
  p = p * z + 1.0 / 5.0;
  p = p * z + 1.0 / 3.0;
  return k * kLn2High + (2.0 * s + (2.0 * s * z * p + k * kLn2Low));
}

// exp(x - max x) in double, and their sum.
double exponentials(const std::byte* in, DType dtype, int64_t n, double* __restrict out) {
  alignas(64) Block x;
  float most = -__builtin_huge_valf();
  for (int64_t i = 0; i < n; i += kBlock) {
    const int64_t m = n - i < kBlock ? n - i : kBlock;
    load(in + i * mergeable_bytes(dtype), dtype, m, x);
    for (int64_t j = 0; j < m; ++j) most = x[j] > most ? x[j] : most;
    for (int64_t j = 0; j < m; ++j) out[i + j] = static_cast<double>(x[j]);
  }
  const auto shift = static_cast<double>(most);
  for (int64_t j = 0; j < n; ++j) out[j] -= shift;
  exp_of(out, n);
  alignas(64) double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += out[j + lane];
  for (int lane = 0; j + lane < n; ++lane) lanes[lane] += out[j + lane];
  return fold(lanes);
}

double divergence(const MergeJob& job, const Slice& slice, double* room) {
  const int64_t n = slice.n;
  double* __restrict p = room;
  double* __restrict q = room + n;
  const double p_sum = exponentials(slice.sources[0], job.sources[0].dtype, n, p);
  const double q_sum = exponentials(slice.base, job.base.dtype, n, q);
  for (int64_t j = 0; j < n; ++j) {
    const double a = p[j] / p_sum + 1e-8, b = q[j] / q_sum + 1e-8;
    p[j] = a * log_of(a / b);
  }
  alignas(64) double lanes[kLanes] = {};
  int64_t j = 0;
  for (; j + kLanes <= n; j += kLanes)
    for (int lane = 0; lane < kLanes; ++lane) lanes[lane] += p[j + lane];
  for (int lane = 0; j + lane < n; ++lane) lanes[lane] += p[j + lane];
  return fold(lanes);
}

}  // namespace
}  // namespace gptailor
