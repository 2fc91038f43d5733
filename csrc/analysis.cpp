#include "analysis.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <stdexcept>
#include <utility>

#include "inputs.h"
#include "parallel.h"
#include "ranking.h"

namespace gptailor {

namespace {

int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }

bool finite(const double* gram, int n) {
  for (int i = 0; i < n; ++i)
    if (!std::isfinite(gram[pair_index(i, i, n)])) return false;
  return true;
}

// Part of a slice: n elements, starting with its i-th.
Slice part_of(const MergeJob& job, const Slice& slice, int64_t i, int64_t n) {
  Slice part;
  part.begin = slice.begin + i;
  part.n = n;
  for (int s = 0; s < job.n_sources; ++s) part.sources[s] = slice.sources[s] + i * mergeable_bytes(job.sources[s].dtype);
  if (slice.base != nullptr) part.base = slice.base + i * mergeable_bytes(job.base.dtype);
  return part;
}

// The Gram matrix over all elements of a slice, with its blocks added in order.
void gram_of(const MergeJob& job, bool deltas, const Slice& slice, double* sums) {
  const int pairs = n_pairs(job.n_sources);
  double block[kMaxPairs];
  std::fill(sums, sums + pairs, 0.0);
  for (int64_t i = 0; i < slice.n; i += kReduceBlock) {
    kernels().gram(job, deltas, part_of(job, slice, i, std::min(kReduceBlock, slice.n - i)), block);
    for (int p = 0; p < pairs; ++p) sums[p] += block[p];
  }
}

void gram_whole(const MergeJob& job, bool deltas, int n_threads, double* sums) {
  const int pairs = n_pairs(job.n_sources);
  const int64_t n_blocks = divide_up(job.n_elements, kReduceBlock), per_task = task_elements(job) / kReduceBlock;
  std::vector<double> blocks(static_cast<size_t>(n_blocks * pairs));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  parallel_for(divide_up(n_blocks, per_task), threads_for(job.n_elements, n_threads), [&](int64_t task, int thread) {
    const int64_t first = task * per_task, last = std::min(n_blocks, first + per_task);
    const int64_t begin = first * kReduceBlock, end = std::min(job.n_elements, last * kReduceBlock);
    const Slice slice = scratch[static_cast<size_t>(thread)].slice(job, begin, end - begin);
    for (int64_t b = first; b < last; ++b) {
      const int64_t i = (b - first) * kReduceBlock;
      const Slice block = part_of(job, slice, i, std::min(kReduceBlock, slice.n - i));
      kernels().gram(job, deltas, block, blocks.data() + b * pairs);
    }
  });
  std::fill(sums, sums + pairs, 0.0);
  for (int64_t b = 0; b < n_blocks; ++b)
    for (int p = 0; p < pairs; ++p) sums[p] += blocks[static_cast<size_t>(b * pairs + p)];
}

[[noreturn]] void no_mean_direction() {
  throw std::invalid_argument("the weighted directions cancel out, so they have no mean: change the weights");
}

bool spheres_by_row(MergeJob& job, const Method& method, bool deltas, int n_threads, Analysed& out) {
  const int n = job.n_sources;
  const std::vector<double> grams = gram_by_row(job, deltas, n_threads);
  const int64_t n_rows = job.n_elements / job.row_length;
  out.weights.resize(static_cast<size_t>(n_rows * n));
  bool ok = true, cancelled = false;
  for (int64_t row = 0; row < n_rows; ++row) {
    const double* gram = grams.data() + row * n_pairs(n);
    ok = ok && finite(gram, n);
    cancelled = cancelled || !sphere_coefficients(method.sphere, gram, n, out.weights.data() + row * n);
  }
  if (cancelled && ok) no_mean_direction();
  return ok;
}

bool spheres_by_column(MergeJob& job, const Method& method, bool deltas, int n_threads, Analysed& out) {
  const int n = job.n_sources, pairs = n_pairs(n);
  const int64_t columns = job.row_length;
  const std::vector<double> grams = gram_by_column(job, deltas, n_threads);
  out.weights.resize(static_cast<size_t>(n * columns));
  bool ok = true, cancelled = false;
  for (int64_t column = 0; column < columns; ++column) {
    double gram[kMaxPairs];
    float weights[kMaxSources];
    for (int p = 0; p < pairs; ++p) gram[p] = grams[static_cast<size_t>(p * columns + column)];
    ok = ok && finite(gram, n);
    cancelled = cancelled || !sphere_coefficients(method.sphere, gram, n, weights);
    for (int s = 0; s < n; ++s) out.weights[static_cast<size_t>(s * columns + column)] = weights[s];
  }
  if (cancelled && ok) no_mean_direction();
  return ok;
}

bool find_coefficients(MergeJob& job, const Method& method, int n_threads, Analysed& out) {
  const bool deltas = takes_delta(job.formula);
  bool ok;
  const bool one_row = method.sphere_by == Weights::rows && job.n_elements == job.row_length;
  job.weights_by = job.is_vector || one_row ? Weights::whole : method.sphere_by;
  if (job.weights_by == Weights::whole) {
    double gram[kMaxPairs];
    gram_whole(job, deltas, n_threads, gram);
    ok = finite(gram, job.n_sources);
    if (!sphere_coefficients(method.sphere, gram, job.n_sources, job.params.weights) && ok) no_mean_direction();
  } else {
    ok = job.weights_by == Weights::rows ? spheres_by_row(job, method, deltas, n_threads, out)
                                         : spheres_by_column(job, method, deltas, n_threads, out);
  }
  job.weights = out.weights.data();
  return ok || !job.check_nan;
}

bool find_thresholds(MergeJob& job, const Method& method, int n_threads) {
  std::vector<Wanted> wanted;
  std::vector<uint32_t*> results;
  const auto want = [&](int s, int64_t rank, uint32_t* to) {
    wanted.push_back({Key::magnitude, s, rank});
    results.push_back(to);
  };
  const int64_t n = job.n_elements;
  for (int s = 0; s < job.n_sources; ++s) {
    uint32_t* low = &job.params.low[s];
    uint32_t* high = &job.params.high[s];
    if (method.densities[s] >= 1.0) continue;
    if (method.analysis == Analysis::trim) {
      const int64_t kept = kept_elements(method.densities[s], n);
      if (kept < n) want(s, kept, low);
      continue;
    }
    const Ranks ranks = ranks_without_outliers(method.densities[s], method.gammas[s], n);
    if (ranks.first > ranks.last) {
      *low = kNothing, *high = 0;
      continue;
    }
    if (ranks.last < n) want(s, ranks.last, low);
    if (ranks.first > 1) want(s, ranks.first, high);
  }
  if (wanted.empty()) {
    job.keep = std::all_of(job.params.low, job.params.low + job.n_sources, [](uint32_t b) { return b == 0; })
                   ? Keep::all
                   : job.keep;
    return true;
  }
  const bool ok = find_ranked(job, wanted, n_threads) || !job.check_nan;
  for (size_t i = 0; i < wanted.size(); ++i) *results[i] = wanted[i].bits;
  return ok;
}

// The moments of each source, in one pass over the inputs.
std::vector<Moments> moments_of(const MergeJob& job, int n_threads) {
  const auto n_sources = static_cast<size_t>(job.n_sources);
  const int64_t n_blocks = divide_up(job.n_elements, kReduceBlock), per_task = task_elements(job) / kReduceBlock;
  std::vector<Moments> blocks(static_cast<size_t>(n_blocks) * n_sources);
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  parallel_for(divide_up(n_blocks, per_task), threads_for(job.n_elements, n_threads), [&](int64_t task, int thread) {
    const int64_t first = task * per_task, last = std::min(n_blocks, first + per_task);
    const int64_t begin = first * kReduceBlock, end = std::min(job.n_elements, last * kReduceBlock);
    const Slice slice = scratch[static_cast<size_t>(thread)].slice(job, begin, end - begin);
    for (int64_t b = first; b < last; ++b) {
      const int64_t i = (b - first) * kReduceBlock;
      const Slice block = part_of(job, slice, i, std::min(kReduceBlock, slice.n - i));
      for (int s = 0; s < job.n_sources; ++s)
        blocks[static_cast<size_t>(b) * n_sources + static_cast<size_t>(s)] = kernels().moments(job, block, s);
    }
  });
  std::vector<Moments> totals(n_sources, Moments{0.0, 0.0, 0.0});
  for (size_t i = 0; i < blocks.size(); ++i) {
    Moments& total = totals[i % n_sources];
    total.all += blocks[i].all, total.kept += blocks[i].kept, total.kept_sq += blocks[i].kept_sq;
  }
  return totals;
}

// Scales what is kept to the original sum of magnitudes, if there is anything to scale.
bool find_scales(MergeJob& job, const Method& method, int n_threads) {
  if (std::all_of(method.densities, method.densities + job.n_sources, [](double d) { return d >= 1.0; })) return true;
  const std::vector<Moments> moments = moments_of(job, n_threads);
  bool ok = true;
  for (int s = 0; s < job.n_sources; ++s) {
    if (method.densities[s] >= 1.0) continue;
    const Moments& m = moments[static_cast<size_t>(s)];
    ok = ok && std::isfinite(m.all);
    if (!(m.all < 1e-7 || m.kept < 1e-7)) job.params.scales[s] = static_cast<float>(m.all / m.kept);
  }
  return ok || !job.check_nan;
}

bool find_sce(MergeJob& job, const Method& method, int n_threads) {
  bool nan = false;
  if (method.select_topk >= 1.0) {
    job.keep = Keep::all;
  } else {
    const int64_t nonzero = count_nonzero(job, Key::variance, 0, n_threads, &nan);
    const auto k = static_cast<int64_t>(static_cast<double>(nonzero) * method.select_topk);
    job.params.low[0] = ~uint32_t{0};
    if (k > 0) {
      std::vector<Wanted> wanted = {{Key::variance, 0, k}};
      nan = !find_ranked(job, wanted, n_threads) || nan;
      job.params.low[0] = wanted[0].bits;
    }
  }
  const std::vector<Moments> moments = moments_of(job, n_threads);
  double energies[kMaxSources], sum = 0.0;
  for (int s = 0; s < job.n_sources; ++s) {
    energies[s] = moments[static_cast<size_t>(s)].kept_sq / static_cast<double>(job.n_elements);
    sum += energies[s];
  }
  for (int s = 0; s < job.n_sources; ++s)
    job.params.weights[s] = static_cast<float>(sum < 1e-6 ? 1.0 / job.n_sources : energies[s] / sum);
  return !job.check_nan || (!nan && std::isfinite(sum));
}

bool find_fusion(MergeJob& job, int n_threads, Analysed& out) {
  out.row_scales = row_divergences(job, n_threads);
  job.row_scales = out.row_scales.data();
  for (const double scale : out.row_scales)
    if (!std::isfinite(scale) && job.check_nan) return false;
  const auto from_top = [&](double quantile) {
    return job.n_elements - static_cast<int64_t>(quantile * static_cast<double>(job.n_elements - 1));
  };
  std::vector<Wanted> wanted = {{Key::importance, 0, from_top(0.25)},
                                {Key::importance, 0, from_top(0.5)},
                                {Key::importance, 0, from_top(0.75)}};
  if (!find_ranked(job, wanted, n_threads) && job.check_nan) return false;
  const float q1 = float_from_bits(wanted[0].bits), median = float_from_bits(wanted[1].bits),
              q3 = float_from_bits(wanted[2].bits);
  const float threshold = median + 1.5f * (q3 - q1);
  job.params.low[0] = bits_of(threshold);
  return std::isfinite(threshold) || !job.check_nan;
}

}  // namespace

std::vector<double> gram_by_row(const MergeJob& job, bool deltas, int n_threads) {
  const int pairs = n_pairs(job.n_sources);
  std::vector<double> result(static_cast<size_t>(job.n_elements / job.row_length * pairs));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  for_rows(job, n_threads, [&](int64_t first, int64_t n_rows, int thread) {
    for (int64_t row = first; row < first + n_rows; ++row)
      gram_of(job, deltas, scratch[static_cast<size_t>(thread)].slice(job, row * job.row_length, job.row_length),
              result.data() + row * pairs);
  });
  return result;
}

std::vector<double> gram_by_column(const MergeJob& job, bool deltas, int n_threads) {
  const int pairs = n_pairs(job.n_sources);
  const int64_t n_rows = job.n_elements / job.row_length, columns = job.row_length;
  // The number of partial sums does not depend on the number of threads, so their order is fixed.
  const int64_t most_tasks = std::clamp<int64_t>((int64_t{1} << 25) / (pairs * columns), 1, 64);  // 256 MiB of them
  const int64_t per_task = std::max<int64_t>(16, divide_up(n_rows, most_tasks)), n_tasks = divide_up(n_rows, per_task);
  std::vector<std::vector<double>> partial(static_cast<size_t>(n_tasks));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  parallel_for(n_tasks, threads_for(job.n_elements, n_threads), [&](int64_t task, int thread) {
    std::vector<double>& sums = partial[static_cast<size_t>(task)];
    sums.resize(static_cast<size_t>(pairs * columns));
    for (int64_t row = task * per_task; row < std::min(n_rows, (task + 1) * per_task); ++row)
      kernels().gram_columns(job, deltas, scratch[static_cast<size_t>(thread)].slice(job, row * columns, columns),
                             sums.data(), columns);
  });
  for (size_t task = 1; task < partial.size(); ++task)
    for (size_t i = 0; i < partial[0].size(); ++i) partial[0][i] += partial[task][i];
  return std::move(partial[0]);
}

std::vector<double> row_divergences(const MergeJob& job, int n_threads) {
  std::vector<double> result(static_cast<size_t>(job.n_elements / job.row_length));
  std::vector<Scratch> scratch(static_cast<size_t>(n_threads));
  for_rows(job, n_threads, [&](int64_t first, int64_t n_rows, int thread) {
    std::vector<double> room(static_cast<size_t>(2 * job.row_length));
    for (int64_t row = first; row < first + n_rows; ++row) {
      const double divergence = kernels().divergence(
          job, scratch[static_cast<size_t>(thread)].slice(job, row * job.row_length, job.row_length), room.data());
      // Rounding may make it slightly negative. NaN stays.
      result[static_cast<size_t>(row)] = divergence < 0.0 ? 0.0 : divergence;
    }
  });
  return result;
}

bool analyse(MergeJob& job, const Method& method, int n_threads, Analysed& out) {
  switch (method.analysis) {
    case Analysis::none: return true;
    case Analysis::sphere: return find_coefficients(job, method, n_threads, out);
    case Analysis::trim:
    case Analysis::outliers:
      return find_thresholds(job, method, n_threads) &&
             (!method.rescale || job.keep == Keep::all || find_scales(job, method, n_threads));
    case Analysis::random:
      if (std::all_of(method.densities, method.densities + job.n_sources, [](double d) { return d >= 1.0; }))
        job.keep = Keep::all;
      return !method.rescale || find_scales(job, method, n_threads);
    case Analysis::ranked:
      out.ranked.resize(static_cast<size_t>(job.n_sources));
      for (int s = 0; s < job.n_sources; ++s) {
        if (method.densities[s] >= 1.0) continue;
        auto& bits = out.ranked[static_cast<size_t>(s)];
        bits = ranked_mask(job, s, method.densities[s], method.epsilons[s], n_threads);
        job.ranked[s] = bits.data();
      }
      return !method.rescale || find_scales(job, method, n_threads);
    case Analysis::sce: return find_sce(job, method, n_threads);
    case Analysis::fusion: return find_fusion(job, n_threads, out);
    case Analysis::widen: return find_widen_weights(job, method, n_threads, out.weights) || !job.check_nan;
  }
  return true;
}

}  // namespace gptailor
