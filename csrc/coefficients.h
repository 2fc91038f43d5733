// Methods on a sphere produce a weighted sum of their inputs: sum_i c_i v_i, where v_i are the sources or their
// differences from the base. The c_i follow from the inner products <v_i, v_j> alone, so such a merge is one reduction,
// then the kernel of a plain weighted sum. float64 throughout; shared by CPU and GPU.
#pragma once

#include <cmath>

#include "formulas.h"

namespace gptailor {

// Upper triangle of the Gram matrix, row by row: (0,0), (0,1), ..., (1,1), ...
inline constexpr int kMaxPairs = kMaxSources * (kMaxSources + 1) / 2;
GPTAILOR_HD constexpr int n_pairs(int n) { return n * (n + 1) / 2; }
GPTAILOR_HD constexpr int pair_index(int i, int j, int n) {
  return i <= j ? i * n - i * (i - 1) / 2 + (j - i) : j * n - j * (j - 1) / 2 + (i - j);
}

enum class Sphere : uint8_t { none, slerp, nuslerp, multislerp, karcher, model_stock };

struct SphereParams {
  Sphere kind = Sphere::none;
  double t = 0.5;           // slerp, nuslerp
  double weights[kMaxSources] = {};  // multislerp
  double eps = 1e-8;        // multislerp
  double tol = 1e-5;        // karcher
  int max_iter = 10;        // karcher
};

namespace detail {

GPTAILOR_HD double at(const double* gram, int n, int i, int j) { return gram[pair_index(i, j, n)]; }

GPTAILOR_HD double clamped(double x, double low, double high) { return x < low ? low : x > high ? high : x; }

inline constexpr double kPi = 3.14159265358979323846;

// <a, b> for vectors that are given by their coefficients.
GPTAILOR_HD double inner(const double* gram, int n, const double* a, const double* b) {
  double sum = 0.0;
  for (int i = 0; i < n; ++i)
    for (int j = 0; j < n; ++j) sum += a[i] * b[j] * at(gram, n, i, j);
  return sum;
}

GPTAILOR_HD double length(const double* gram, int n, const double* a) {
  const double square = inner(gram, n, a, a);
  return square > 0.0 ? sqrt(square) : 0.0;
}

// Nearly parallel tensors are interpolated linearly: sin(theta) would be close to zero.
GPTAILOR_HD void slerp(const double* gram, double t, double* c) {
  const double norm0 = sqrt(gram[0]), norm1 = sqrt(gram[2]);
  const double cosine = gram[1] / ((norm0 > 1e-8 ? norm0 : 1.0) * (norm1 > 1e-8 ? norm1 : 1.0));
  if (cosine > 0.9995 || cosine < -0.9995) {
    c[0] = 1.0 - t, c[1] = t;
  } else {
    const double theta = acos(cosine);
    c[0] = sin((1.0 - t) * theta) / sin(theta), c[1] = sin(t * theta) / sin(theta);
  }
}

GPTAILOR_HD void nuslerp(const double* gram, double t, double* c) {
  const double norm0 = sqrt(gram[0]), norm1 = sqrt(gram[2]);
  const double scale = (norm0 > 1e-7 ? norm0 : 1e-7) * (norm1 > 1e-7 ? norm1 : 1e-7);
  const double theta = acos(clamped(gram[1] / scale, -1.0, 1.0));
  const double sine = sin(theta);
  // In float32 the sine of the rounded pi is above 1e-8, so float32 code divides by it; linear is what is intended.
  if (sine < 1e-6) {
    c[0] = 1.0 - t, c[1] = t;
  } else {
    c[0] = sin((1.0 - t) * theta) / sine, c[1] = sin(t * theta) / sine;
  }
}

// Returns false if the weighted mean direction vanishes.
GPTAILOR_HD bool multislerp(const double* gram, int n, const SphereParams& p, double* c) {
  double norms[kMaxSources], mean[kMaxSources];
  for (int i = 0; i < n; ++i) {
    norms[i] = sqrt(at(gram, n, i, i));
    mean[i] = p.weights[i] / (norms[i] + p.eps);
  }
  if (n == 1) {
    c[0] = 1.0;
    return true;
  }
  const double mean_norm = length(gram, n, mean);
  if (mean_norm < (p.eps > 1e-7 ? p.eps : 1e-7)) {  // lengths from inner products are good to about 1e-8
    bool all_zero = true;
    for (int i = 0; i < n; ++i) {
      c[i] = p.weights[i];
      all_zero = all_zero && norms[i] == 0.0;
    }
    return n == 2 || all_zero;
  }
  double average = 0.0, along = 0.0, tangent[kMaxSources];
  for (int i = 0; i < n; ++i) mean[i] /= mean_norm;
  for (int i = 0; i < n; ++i) {
    double unit[kMaxSources] = {};
    unit[i] = 1.0 / (norms[i] + p.eps);
    along += p.weights[i] * inner(gram, n, unit, mean);
    average += p.weights[i] * norms[i];
  }
  for (int i = 0; i < n; ++i) tangent[i] = p.weights[i] / (norms[i] + p.eps) - along * mean[i];
  const double angle = length(gram, n, tangent) + p.eps;
  for (int i = 0; i < n; ++i) c[i] = average * (mean[i] * cos(angle) + tangent[i] * (sin(angle) / angle));
  return true;
}

// The Karcher mean of the directions with equal weights; its length is the mean length.
GPTAILOR_HD void karcher(const double* gram, int n, const SphereParams& p, double* c) {
  if (n == 1) {
    c[0] = 1.0;
    return;
  }
  double norms[kMaxSources], u[kMaxSources] = {};
  double scale = 0.0;
  int n_valid = 0, first = -1;
  for (int i = 0; i < n; ++i) {
    norms[i] = sqrt(at(gram, n, i, i));
    scale += norms[i] / n;
    c[i] = 0.0;
    if (!(norms[i] > p.tol)) continue;
    ++n_valid;
    if (first < 0) first = i;
  }
  if (n_valid == 0) return;
  for (int i = 0; i < n; ++i)
    if (norms[i] > p.tol) u[i] = 1.0 / (norms[i] * n_valid);
  const double norm = length(gram, n, u);
  for (int i = 0; i < n; ++i) u[i] = norm < p.tol ? (i == first ? 1.0 / norms[i] : 0.0) : u[i] / norm;
  for (int step = 0; step < p.max_iter; ++step) {
    double tangent[kMaxSources] = {};
    for (int i = 0; i < n; ++i) {
      if (!(norms[i] > p.tol)) continue;
      double unit[kMaxSources] = {};
      unit[i] = 1.0 / norms[i];
      const double cosine = clamped(inner(gram, n, u, unit), -1.0, 1.0);
      const double theta = acos(cosine);
      if (theta < p.tol || theta > kPi - p.tol) continue;  // no unique direction leads to an antipode
      const double weight = theta / sin(theta) / n_valid;
      tangent[i] += weight * unit[i];
      for (int j = 0; j < n; ++j) tangent[j] -= weight * cosine * u[j];
    }
    const double angle = length(gram, n, tangent);
    if (angle < p.tol) break;
    for (int i = 0; i < n; ++i) u[i] = cos(angle) * u[i] + sin(angle) * (tangent[i] / angle);
    const double u_norm = length(gram, n, u);
    if (u_norm > p.tol)
      for (int i = 0; i < n; ++i) u[i] /= u_norm;
  }
  for (int i = 0; i < n; ++i) c[i] = scale * u[i];
}

GPTAILOR_HD void model_stock(const double* gram, int n, double* c) {
  double cosine = 0.0;
  for (int i = 0; i < n; ++i)
    for (int j = i + 1; j < n; ++j) {
      const double norms = sqrt(at(gram, n, i, i)) * sqrt(at(gram, n, j, j));
      cosine += clamped(at(gram, n, i, j) / (norms > 1e-6 ? norms : 1e-6), -1.0, 1.0);
    }
  cosine /= n * (n - 1) / 2;
  const double divisor = 1.0 + (n - 1) * cosine;
  const double t = divisor < 1e-6 && divisor > -1e-6 ? 0.0 : n * cosine / divisor;  // the base if there is no answer
  for (int i = 0; i < n; ++i) c[i] = t / n;
}

}  // namespace detail

// The coefficients of the n vectors with this Gram matrix. Returns false if there is no answer: multislerp of more than
// two directions that cancel out.
GPTAILOR_HD bool sphere_coefficients(const SphereParams& p, const double* gram, int n, float* coefficients) {
  double c[kMaxSources] = {};
  bool ok = true;
  if (p.kind == Sphere::slerp) detail::slerp(gram, p.t, c);
  if (p.kind == Sphere::nuslerp) detail::nuslerp(gram, p.t, c);
  if (p.kind == Sphere::multislerp) ok = detail::multislerp(gram, n, p, c);
  if (p.kind == Sphere::karcher) detail::karcher(gram, n, p, c);
  if (p.kind == Sphere::model_stock) detail::model_stock(gram, n, c);
  for (int i = 0; i < n; ++i) coefficients[i] = static_cast<float>(c[i]);
  return ok;
}

}  // namespace gptailor
