// The weights of widen: how much the length and the direction of each column changed, ranked within its source and
// compared between the sources. float64; gptailor/merging/reference/widening.py has the formulas.
#include <algorithm>
#include <cmath>
#include <numeric>

#include "analysis.h"
#include "inputs.h"

namespace gptailor {

namespace {

using Table = std::vector<std::vector<double>>;  // [source][column]

// Softmax over the sources, or the calibration value if a column stands out from the mean of its source.
Table scores(const Table& significance, const std::vector<double>& means, double ratio, double calibration) {
  const size_t n = significance[0].size();
  Table result = significance;
  for (size_t c = 0; c < n; ++c) {
    double most = significance[0][c], sum = 0.0;
    for (const auto& row : significance) most = std::max(most, row[c]);
    for (const auto& row : significance) sum += std::exp(row[c] - most);
    for (size_t s = 0; s < significance.size(); ++s)
      result[s][c] = significance[s][c] > ratio * means[s] ? calibration : std::exp(significance[s][c] - most) / sum;
  }
  return result;
}

std::vector<double> means_of(const Table& significance) {
  std::vector<double> means;
  for (const auto& row : significance)
    means.push_back(std::accumulate(row.begin(), row.end(), 0.0) / static_cast<double>(row.size()));
  return means;
}

// The rank of each value within its source, divided by their number; ties go by index.
Table rank_shares(const Table& values) {
  Table result = values;
  std::vector<size_t> order(values[0].size());
  for (size_t s = 0; s < values.size(); ++s) {
    std::iota(order.begin(), order.end(), size_t{0});
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return values[s][a] < values[s][b]; });
    for (size_t rank = 0; rank < order.size(); ++rank)
      result[s][order[rank]] = static_cast<double>(rank) / static_cast<double>(order.size());
  }
  return result;
}

}  // namespace

bool find_widen_weights(MergeJob& job, const Method& method, int n_threads, std::vector<float>& weights) {
  const int n = job.n_sources;
  const auto n_sources = static_cast<size_t>(n);
  Table sum;
  bool ok = true;
  if (job.is_vector) {  // each element on its own
    Table change(n_sources, std::vector<double>(static_cast<size_t>(job.n_elements)));
    const int64_t piece = task_elements(job);
    Scratch scratch;
    std::vector<float> x(static_cast<size_t>(piece)), base(static_cast<size_t>(piece));
    for (int64_t begin = 0; begin < job.n_elements; begin += piece) {
      const Slice slice = scratch.slice(job, begin, std::min(piece, job.n_elements - begin));
      kernels().load(slice.base, job.base.dtype, slice.n, base.data());
      for (size_t s = 0; s < n_sources; ++s) {
        kernels().load(slice.sources[s], job.sources[s].dtype, slice.n, x.data());
        for (int64_t i = 0; i < slice.n; ++i) {
          const auto at = static_cast<size_t>(i);
          const double d = static_cast<double>(x[at]) - static_cast<double>(base[at]);
          ok = ok && std::isfinite(d);
          change[s][static_cast<size_t>(begin + i)] = std::abs(d);
        }
      }
    }
    sum = scores(change, means_of(change), method.widen_ratio, method.widen_calibration);
    for (auto& row : sum)
      for (double& value : row) value *= 2.0;
  } else {
    MergeJob all = job;  // the base is one more vector
    all.sources[n] = job.base;
    all.n_sources = n + 1;
    all.has_base = false;
    const int64_t count = method.by_rows ? job.n_elements / job.row_length : job.row_length;
    const int pairs = n_pairs(n + 1);
    const std::vector<double> grams =
        method.by_rows ? gram_by_row(all, false, n_threads) : gram_by_column(all, false, n_threads);
    const auto product = [&](int a, int b, int64_t c) {
      const int pair = pair_index(a, b, n + 1);
      return grams[static_cast<size_t>(method.by_rows ? c * pairs + pair : pair * count + c)];
    };
    Table length(n_sources, std::vector<double>(static_cast<size_t>(count))), direction = length;
    for (int s = 0; s < n; ++s)
      for (int64_t c = 0; c < count; ++c) {
        const double xx = product(s, s, c), bb = product(n, n, c), xb = product(s, n, c);
        ok = ok && std::isfinite(xx) && std::isfinite(bb);
        const double norms = std::sqrt(xx * bb);
        length[static_cast<size_t>(s)][static_cast<size_t>(c)] = std::abs(std::sqrt(xx) - std::sqrt(bb));
        direction[static_cast<size_t>(s)][static_cast<size_t>(c)] =
            xx == 0.0 && bb == 0.0 ? 0.0 : 1.0 - xb / (norms > 0.0 ? norms : 1.0);
      }
    if (!ok) return false;  // NaN has no rank
    // Exact, because of an odd number of columns the middle one has it.
    const auto columns = static_cast<double>(count);
    const std::vector<double> means(n_sources, (columns - 1.0) / 2.0 / columns);
    sum = scores(rank_shares(length), means, method.widen_ratio, method.widen_calibration);
    const Table other = scores(rank_shares(direction), means, method.widen_ratio, method.widen_calibration);
    for (size_t s = 0; s < sum.size(); ++s)
      for (size_t c = 0; c < sum[s].size(); ++c) sum[s][c] += other[s][c];
  }
  const bool rows = method.by_rows && !job.is_vector;
  const size_t count = sum[0].size();
  job.weights_by = rows ? Weights::rows : Weights::columns;
  weights.resize(n_sources * count);
  for (size_t s = 0; s < n_sources; ++s)
    for (size_t c = 0; c < count; ++c)
      weights[rows ? c * n_sources + s : s * count + c] = static_cast<float>(0.5 * sum[s][c]);
  job.weights = weights.data();
  return ok;
}

}  // namespace gptailor
