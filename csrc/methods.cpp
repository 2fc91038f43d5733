#include "methods.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <set>
#include <stdexcept>

namespace gptailor {

namespace {

enum class Base : uint8_t { never, always, optional };

struct Entry {
  const char* name;
  Formula formula;  // of methods with an optional base: without one
  Keep keep;
  Analysis analysis;
  Sphere sphere;
  Base base;
  int min_sources, max_sources;
  std::vector<std::string> options;
};

const std::vector<Entry>& entries() {
  using F = Formula;
  using K = Keep;
  using A = Analysis;
  using S = Sphere;
  static const std::vector<Entry> all = {
      {"linear", F::linear, K::all, A::none, S::none, Base::never, 1, kMaxSources, {"normalize"}},
      {"slerp", F::linear, K::all, A::sphere, S::slerp, Base::never, 2, 2, {"t"}},
      {"nuslerp", F::linear, K::all, A::sphere, S::nuslerp, Base::optional, 2, 2,
       {"nuslerp_flatten", "nuslerp_row_wise", "task_vectors"}},
      {"multislerp", F::linear, K::all, A::sphere, S::multislerp, Base::optional, 1, kMaxSources,
       {"normalize_weights", "eps", "task_vectors"}},
      {"karcher", F::linear, K::all, A::sphere, S::karcher, Base::never, 1, kMaxSources, {"max_iter", "tol"}},
      {"model_stock", F::task_arithmetic, K::all, A::sphere, S::model_stock, Base::always, 2, kMaxSources,
       {"filter_wise"}},
      {"fisher", F::fisher, K::all, A::none, S::none, Base::never, 1, kMaxSources, {"floor"}},
      {"stock", F::task_arithmetic, K::all, A::sphere, S::model_stock, Base::always, 2, kMaxSources, {}},
      {"widen", F::task_arithmetic, K::all, A::widen, S::none, Base::always, 1, kMaxSources - 1,
       {"above_average_value_ratio", "score_calibration_value", "by_rows"}},
      {"task_arithmetic", F::task_arithmetic, K::all, A::none, S::none, Base::always, 1, kMaxSources,
       {"lambda", "normalize"}},
      {"ties", F::ties, K::magnitude, A::trim, S::none, Base::always, 1, kMaxSources,
       {"density", "lambda", "normalize", "rescale"}},
      {"dare_linear", F::task_arithmetic, K::random, A::random, S::none, Base::always, 1, kMaxSources,
       {"density", "lambda", "normalize", "rescale", "seed"}},
      {"dare_ties", F::ties, K::random, A::random, S::none, Base::always, 1, kMaxSources,
       {"density", "lambda", "normalize", "rescale", "seed"}},
      {"della_linear", F::task_arithmetic, K::ranked, A::ranked, S::none, Base::always, 1, kMaxSources,
       {"density", "epsilon", "lambda", "normalize", "rescale", "seed"}},
      {"della", F::ties, K::ranked, A::ranked, S::none, Base::always, 1, kMaxSources,
       {"density", "epsilon", "lambda", "normalize", "rescale", "seed"}},
      {"breadcrumbs", F::task_arithmetic, K::magnitude, A::outliers, S::none, Base::always, 1, kMaxSources,
       {"density", "gamma", "lambda", "normalize", "rescale"}},
      {"breadcrumbs_ties", F::ties, K::magnitude, A::outliers, S::none, Base::always, 1, kMaxSources,
       {"density", "gamma", "lambda", "normalize", "rescale"}},
      {"sce", F::sce, K::variance, A::sce, S::none, Base::always, 1, kMaxSources, {"select_topk"}},
      {"ram", F::ram, K::all, A::none, S::none, Base::always, 1, kMaxSources, {"epsilon"}},
      {"nearswap", F::nearswap, K::all, A::none, S::none, Base::always, 1, 1, {"t"}},
      {"arcee_fusion", F::task_arithmetic, K::importance, A::fusion, S::none, Base::always, 1, 1, {}},
  };
  return all;
}

const Entry& entry_named(const std::string& name) {
  std::string known;
  for (const Entry& e : entries()) {
    if (e.name == name) return e;
    known += (known.empty() ? "" : ", ") + std::string(e.name);
  }
  throw std::invalid_argument("unknown merge method '" + name + "': known are " + known);
}

std::string text(double value) { return std::to_string(value); }

constexpr double kNeeded = std::numeric_limits<double>::quiet_NaN();

class Values {
 public:
  Values(const Entry& entry, const MergeOptions& options, int n_sources)
      : entry_(entry), options_(options), n_sources_(n_sources) {
    for (const auto& [name, list] : options.values)
      if (std::find(entry.options.begin(), entry.options.end(), name) == entry.options.end())
        throw std::invalid_argument(std::string(entry.name) + " has no parameter '" + name + "'");
  }

  bool has(const char* name) const {
    return std::find(entry_.options.begin(), entry_.options.end(), name) != entry_.options.end();
  }

  // `otherwise` is kNeeded where there is no default.
  double number(const char* name, double otherwise, double low, double high) const {
    const auto found = options_.values.find(name);
    if (found == options_.values.end()) {
      if (std::isnan(otherwise)) throw std::invalid_argument(std::string(entry_.name) + " needs a value for " + name);
      return otherwise;
    }
    if (found->second.size() != 1) throw std::invalid_argument(std::string(name) + " needs one value");
    const double value = found->second[0];
    if (!(value >= low && value <= high))
      throw std::invalid_argument(std::string(name) + " is " + text(value) + ", outside " + text(low) + " to " +
                                  text(high));
    return value;
  }

  bool flag(const char* name, bool otherwise) const { return number(name, otherwise ? 1.0 : 0.0, 0.0, 1.0) != 0.0; }

  void numbers(const char* name, double otherwise, double low, double high, double* out) const {
    const auto found = options_.values.find(name);
    const std::vector<double> list = found == options_.values.end() ? std::vector<double>{otherwise} : found->second;
    fill(name, list, low, high, out);
  }

  void fill(const char* name, const std::vector<double>& list, double low, double high, double* out) const {
    if (list.size() != 1 && list.size() != static_cast<size_t>(n_sources_))
      throw std::invalid_argument(std::string(name) + ": " + std::to_string(list.size()) + " values for " +
                                  std::to_string(n_sources_) + " sources");
    for (int i = 0; i < n_sources_; ++i) {
      out[i] = list[list.size() == 1 ? 0 : static_cast<size_t>(i)];
      if (!(out[i] >= low && out[i] <= high))
        throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "] is " + text(out[i]) +
                                    ", outside " + text(low) + " to " + text(high));
    }
  }

 private:
  const Entry& entry_;
  const MergeOptions& options_;
  int n_sources_;
};

constexpr double kBig = std::numeric_limits<float>::max();

void check_counts(const Entry& e, int n, bool has_base) {
  if (n < 1 || n > kMaxSources)
    throw std::invalid_argument("1 to " + std::to_string(kMaxSources) + " sources can be merged, not " +
                                std::to_string(n));
  const std::string name = e.name;
  if (e.min_sources == e.max_sources && n != e.min_sources)
    throw std::invalid_argument(name + " takes exactly " + std::to_string(e.min_sources) + " sources, not " +
                                std::to_string(n));
  if (n < e.min_sources)
    throw std::invalid_argument(name + " takes at least " + std::to_string(e.min_sources) + " sources, not " +
                                std::to_string(n));
  if (n > e.max_sources)
    throw std::invalid_argument(name + " takes at most " + std::to_string(e.max_sources) + " sources, not " +
                                std::to_string(n));
  if (e.base == Base::always && !has_base) throw std::invalid_argument(name + " needs a base");
  if (e.base == Base::never && has_base) throw std::invalid_argument(name + " takes no base");
}

void set_sphere(Method& m, const Entry& e, const Values& values, const double* weights, int n) {
  SphereParams& s = m.sphere;
  s.kind = e.sphere;
  if (s.kind == Sphere::slerp) s.t = values.number("t", kNeeded, -kBig, kBig);
  if (s.kind == Sphere::nuslerp) {
    const double sum = weights[0] + weights[1];
    s.t = std::abs(sum) < 1e-6 ? 0.5 : weights[1] / sum;
    const bool rows_are_columns = values.flag("nuslerp_row_wise", false);
    if (!values.flag("nuslerp_flatten", true)) m.sphere_by = rows_are_columns ? Weights::columns : Weights::rows;
  }
  if (s.kind == Sphere::multislerp) {
    s.eps = values.number("eps", 1e-8, 0.0, kBig);
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += weights[i];
    const bool normalize = values.flag("normalize_weights", true);
    if (normalize && std::abs(sum) < 1e-8)
      throw std::invalid_argument("the weights add up to zero, so they cannot be normalised");
    for (int i = 0; i < n; ++i) s.weights[i] = normalize ? weights[i] / sum : weights[i];
  }
  if (s.kind == Sphere::karcher) {
    s.max_iter = static_cast<int>(values.number("max_iter", 10, 0, 100000));
    s.tol = values.number("tol", 1e-5, 0.0, kBig);
  }
  if (s.kind == Sphere::model_stock && values.flag("filter_wise", false)) m.sphere_by = Weights::rows;
}

}  // namespace

Method method_named(const std::string& name, int n, bool has_base, const MergeOptions& o) {
  const Entry& e = entry_named(name);
  check_counts(e, n, has_base);
  const Values values(e, o, n);
  Method m;
  m.name = name;
  m.formula = e.formula;
  m.keep = e.keep;
  m.analysis = e.analysis;
  if (e.base == Base::optional) {
    if (values.flag("task_vectors", has_base) != has_base)
      throw std::invalid_argument(name + (has_base ? " of the models themselves takes no base"
                                                   : " of task vectors needs a base"));
    if (has_base) m.formula = Formula::task_arithmetic;
  }
  if (!(std::abs(o.factor) <= kBig)) throw std::invalid_argument("factor is " + text(o.factor));

  double weights[kMaxSources];
  if (!o.weights.empty() && o.weights.size() != static_cast<size_t>(n))
    throw std::invalid_argument("weights: " + std::to_string(o.weights.size()) + " values for " + std::to_string(n) +
                                " sources");
  values.fill("weights", o.weights.empty() ? std::vector<double>{1.0} : o.weights, -kBig, kBig, weights);
  Params& p = m.params;
  p.factor = static_cast<float>(o.factor);
  p.lambda = static_cast<float>(values.number("lambda", 1.0, -kBig, kBig));
  const bool normalizes_by_default = name == "linear" || name == "ties" || name == "della";
  p.normalize = values.has("normalize") && values.flag("normalize", normalizes_by_default);
  float sum = 0.0f;
  for (int i = 0; i < n; ++i) {
    p.weights[i] = static_cast<float>(weights[i]);
    p.high[i] = ~uint32_t{0};
    p.scales[i] = 1.0f;
    p.chances[i] = kAlways;
    sum += p.weights[i];
  }
  const bool zero_sum = std::abs(sum) < 1e-8f;
  if (m.formula == Formula::linear && p.normalize && zero_sum)
    throw std::invalid_argument("the weights add up to zero, so they cannot be normalised");
  p.divisor = zero_sum ? 1.0f : sum;
  p.t = static_cast<float>(name == "nearswap" ? values.number("t", kNeeded, 0.0, kBig) : 0.0);
  p.epsilon = static_cast<float>(name == "ram" ? values.number("epsilon", 1e-5, 0.0, kBig) : 0.0);
  if (m.formula == Formula::fisher) p.epsilon = static_cast<float>(values.number("floor", 1e-6, 0.0, kBig));
  m.seed = static_cast<uint64_t>(values.number("seed", 0.0, 0.0, 9007199254740992.0));
  p.key = philox_key(m.seed, o.key);
  if (e.analysis == Analysis::widen) {
    m.widen_ratio = values.number("above_average_value_ratio", 1.0, -kBig, kBig);
    m.widen_calibration = values.number("score_calibration_value", 1.0, -kBig, kBig);
    m.by_rows = values.flag("by_rows", false);
  }
  m.select_topk = values.number("select_topk", 1.0, 0.0, 1.0);
  m.rescale = values.flag("rescale", e.analysis == Analysis::random || e.analysis == Analysis::ranked);
  values.numbers("density", 1.0, 0.0, 1.0, m.densities);
  values.numbers("gamma", 0.01, 0.0, 1.0, m.gammas);
  if (e.analysis == Analysis::ranked) {
    values.numbers("epsilon", 0.15, 0.0, 1.0, m.epsilons);
    for (int i = 0; i < n; ++i)
      if (m.densities[i] > 0.0 && m.densities[i] < 1.0 &&
          (m.densities[i] - m.epsilons[i] <= 0.0 || m.densities[i] + m.epsilons[i] >= 1.0))
        throw std::invalid_argument("density - epsilon and density + epsilon must lie between 0 and 1, but source " +
                                    std::to_string(i) + " has density " + text(m.densities[i]) + " and epsilon " +
                                    text(m.epsilons[i]));
  }
  if (e.analysis == Analysis::random)
    for (int i = 0; i < n; ++i) p.chances[i] = chance(m.densities[i]);
  if (e.analysis == Analysis::sphere) set_sphere(m, e, values, weights, n);
  m.is_copy = name == "linear" && n == 1 && p.weights[0] == 1.0f && !p.normalize && p.factor == 1.0f;
  return m;
}

int64_t kept_elements(double density, int64_t n) {
  return std::clamp<int64_t>(static_cast<int64_t>(density * static_cast<double>(n)), 1, n);
}

Ranks ranks_without_outliers(double density, double gamma, int64_t n) {
  const auto target = static_cast<int64_t>(density * static_cast<double>(n));
  auto top = static_cast<int64_t>(gamma * static_cast<double>(n));
  const int64_t bottom = n - target - top;
  if (bottom < 0) top += bottom;  // fewer large ones go, so that as many stay as the density says
  return {top + 1, n - std::max<int64_t>(bottom, 0)};
}

}  // namespace gptailor
