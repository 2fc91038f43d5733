#include "methods.h"

#include <algorithm>
#include <cmath>
#include <limits>
#include <stdexcept>

#include "declared_methods.h"

namespace gptailor {

namespace {

static_assert(kMaxSources == GPTAILOR_MAX_SOURCES, "MAX_SOURCES of the declarations differs");

enum class Base : uint8_t { never, always, optional };

// Parameters: the first `n` values go to a field of the method.
void put(double& field, const double* values, int) { field = values[0]; }
void put(float& field, const double* values, int) { field = static_cast<float>(values[0]); }
void put(int& field, const double* values, int) { field = static_cast<int>(values[0]); }
void put(uint64_t& field, const double* values, int) { field = static_cast<uint64_t>(values[0]); }
void put(bool& field, const double* values, int) { field = values[0] != 0.0; }
void put(double (&field)[kMaxSources], const double* values, int n) { std::copy_n(values, n, field); }

constexpr double kNeeded = std::numeric_limits<double>::quiet_NaN();  // the default of a parameter without one

struct Parameter {
  const char* name;
  double otherwise, low, high;
  bool per_source;
  void (*put)(Method&, const double* values, int n);
};

struct Entry {
  const char* name;
  Formula formula;  // of methods with an optional base: without one
  Keep keep;
  Analysis analysis;
  Sphere sphere;
  Base base;
  int min_sources, max_sources;
  bool takes_statistics, on_gpu;
  std::vector<Parameter> parameters;
};

const std::vector<Entry>& entries() {
#define GPTAILOR_PARAMETER(name, otherwise, low, high, per_source, field) \
  {name, otherwise, low, high, per_source, [](Method& m, const double* values, int n) { put(m.field, values, n); }},
#define GPTAILOR_METHOD(name, formula, keep, analysis, sphere, base, min_sources, max_sources, statistics, on_gpu, ...) \
  {name,        Formula::formula, Keep::keep,  Analysis::analysis, Sphere::sphere, Base::base,                          \
   min_sources, max_sources,      statistics, on_gpu,             {__VA_ARGS__}},
  static const std::vector<Entry> all = {GPTAILOR_METHODS(GPTAILOR_METHOD, GPTAILOR_PARAMETER)};
#undef GPTAILOR_METHOD
#undef GPTAILOR_PARAMETER
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

std::string outside(double value, double low, double high) {
  return " is " + text(value) + ", outside " + text(low) + " to " + text(high);
}

// One value for each source, from a list of one or n.
void spread(const char* name, const std::vector<double>& list, double low, double high, int n, double* out) {
  if (list.size() != 1 && list.size() != static_cast<size_t>(n))
    throw std::invalid_argument(std::string(name) + ": " + std::to_string(list.size()) + " values for " +
                                std::to_string(n) + " sources");
  for (int i = 0; i < n; ++i) {
    out[i] = list[list.size() == 1 ? 0 : static_cast<size_t>(i)];
    if (!(out[i] >= low && out[i] <= high))
      throw std::invalid_argument(std::string(name) + "[" + std::to_string(i) + "]" + outside(out[i], low, high));
  }
}

void set_parameters(Method& m, const Entry& e, const MergeOptions& options, int n) {
  for (const auto& [name, list] : options.values)
    if (std::none_of(e.parameters.begin(), e.parameters.end(), [&](const Parameter& p) { return p.name == name; }))
      throw std::invalid_argument(m.name + " has no parameter '" + name + "'");
  for (const Parameter& p : e.parameters) {
    const auto found = options.values.find(p.name);
    double values[kMaxSources];
    if (found == options.values.end()) {
      if (std::isnan(p.otherwise)) throw std::invalid_argument(m.name + " needs a value for " + p.name);
      std::fill_n(values, kMaxSources, p.otherwise);
    } else if (p.per_source) {
      spread(p.name, found->second, p.low, p.high, n, values);
    } else {
      if (found->second.size() != 1) throw std::invalid_argument(std::string(p.name) + " needs one value");
      values[0] = found->second[0];
      if (!(values[0] >= p.low && values[0] <= p.high))
        throw std::invalid_argument(p.name + outside(values[0], p.low, p.high));
    }
    p.put(m, values, n);
  }
}

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

void set_sphere(Method& m, const double* weights, int n) {
  SphereParams& s = m.sphere;
  if (s.kind == Sphere::nuslerp) {
    const double sum = weights[0] + weights[1];
    s.t = std::abs(sum) < 1e-6 ? 0.5 : weights[1] / sum;
    if (!m.flatten) m.sphere_by = m.row_wise ? Weights::columns : Weights::rows;
  }
  if (s.kind == Sphere::multislerp) {
    double sum = 0.0;
    for (int i = 0; i < n; ++i) sum += weights[i];
    if (m.normalize_weights && std::abs(sum) < 1e-8)
      throw std::invalid_argument("the weights add up to zero, so they cannot be normalised");
    for (int i = 0; i < n; ++i) s.weights[i] = m.normalize_weights ? weights[i] / sum : weights[i];
  }
  if (s.kind == Sphere::model_stock && m.filter_wise) m.sphere_by = Weights::rows;
}

// Masks that depend on magnitude use probabilities density ± epsilon, which must lie between 0 and 1.
void check_ranked(const Method& m, int n) {
  for (int i = 0; i < n; ++i)
    if (m.densities[i] > 0.0 && m.densities[i] < 1.0 &&
        (m.densities[i] - m.epsilons[i] <= 0.0 || m.densities[i] + m.epsilons[i] >= 1.0))
      throw std::invalid_argument("density - epsilon and density + epsilon must lie between 0 and 1, but source " +
                                  std::to_string(i) + " has density " + text(m.densities[i]) + " and epsilon " +
                                  text(m.epsilons[i]));
}

}  // namespace

Method method_named(const std::string& name, int n, bool has_base, const MergeOptions& o) {
  const Entry& e = entry_named(name);
  check_counts(e, n, has_base);
  Method m;
  m.name = name;
  m.formula = e.formula;
  m.keep = e.keep;
  m.analysis = e.analysis;
  m.sphere.kind = e.sphere;
  m.takes_statistics = e.takes_statistics;
  m.on_gpu = e.on_gpu;
  set_parameters(m, e, o, n);
  if (e.base == Base::optional) {
    if (o.values.count(GPTAILOR_BASE_FLAG) != 0 && m.task_vectors != has_base)
      throw std::invalid_argument(name + (has_base ? " of the models themselves takes no base"
                                                   : " of task vectors needs a base"));
    if (has_base) m.formula = Formula::task_arithmetic;
  }
  if (!(std::abs(o.factor) <= kBig)) throw std::invalid_argument("factor is " + text(o.factor));

  double weights[kMaxSources];
  if (!o.weights.empty() && o.weights.size() != static_cast<size_t>(n))
    throw std::invalid_argument("weights: " + std::to_string(o.weights.size()) + " values for " + std::to_string(n) +
                                " sources");
  spread("weights", o.weights.empty() ? std::vector<double>{1.0} : o.weights, -kBig, kBig, n, weights);
  Params& p = m.params;
  p.factor = static_cast<float>(o.factor);
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
  p.key = philox_key(m.seed, o.key);
  if (e.analysis == Analysis::ranked) check_ranked(m, n);
  if (e.analysis == Analysis::random)
    for (int i = 0; i < n; ++i) p.chances[i] = chance(m.densities[i]);
  if (e.analysis == Analysis::sphere) set_sphere(m, weights, n);
  m.is_copy = m.formula == Formula::linear && e.analysis == Analysis::none && n == 1 && p.weights[0] == 1.0f &&
              !p.normalize && p.factor == 1.0f;
  return m;
}

int64_t kept_elements(double density, int64_t n) {
  return std::clamp<int64_t>(static_cast<int64_t>(density * static_cast<double>(n)), 1, n);
}

Ranks ranks_without_outliers(double density, double gamma, int64_t n) {
  const auto target = static_cast<int64_t>(density * static_cast<double>(n));
  auto top = static_cast<int64_t>(gamma * static_cast<double>(n));
  const int64_t bottom = n - target - top;
  if (bottom < 0) top += bottom;  // drop fewer large ones, so that as many stay as the density demands
  return {top + 1, n - std::max<int64_t>(bottom, 0)};
}

}  // namespace gptailor
