// The merge methods by name: how each is computed, and the checks of its options. Names, bounds and defaults are those
// of gptailor/merging/registry.py, from which the build makes declared_methods.h.
#pragma once

#include <map>
#include <string>
#include <vector>

#include "kernels.h"

namespace gptailor {

struct MergeOptions {
  std::vector<double> weights;                         // empty: all 1
  std::map<std::string, std::vector<double>> values;   // by name: one value, or one for each source
  double factor = 1.0;                                 // on the whole result
  uint64_t key = 0;                                    // of the tensor, for random masks
  int n_threads = 0;                                   // 0: as many as there are cores
};

// The analysis of the whole inputs that comes before any element is merged.
enum class Analysis : uint8_t { none, sphere, trim, outliers, random, ranked, sce, fusion, widen };

// A method with its options, checked.
struct Method {
  std::string name;
  Formula formula = Formula::linear;
  Keep keep = Keep::all;
  Analysis analysis = Analysis::none;
  bool takes_statistics = false;
  bool on_gpu = false;
  // Defaults of parameters come from the declarations; these are for methods that have no such parameter.
  bool rescale = false;          // scale what is kept to the original sum of magnitudes
  double densities[kMaxSources] = {};
  double gammas[kMaxSources] = {};
  double epsilons[kMaxSources] = {};
  double select_topk = 1.0;
  double widen_ratio = 1.0, widen_calibration = 1.0;
  bool by_rows = false;          // widen: scores for rows, not columns
  bool flatten = true, row_wise = false;  // nuslerp
  bool filter_wise = false;      // model_stock
  bool normalize_weights = false;  // multislerp
  bool task_vectors = false;     // use the base if it is optional
  uint64_t seed = 0;             // of random masks
  // Derived from the above.
  Weights sphere_by = Weights::whole;  // one sphere for the tensor, each row, or each column
  SphereParams sphere;
  Params params;                 // everything that does not depend on the elements
  bool is_copy = false;          // one unchanged source
};

// Throws std::invalid_argument: unknown name or option, a value out of range, a wrong number of sources, a base that is
// missing or not accepted.
Method method_named(const std::string& name, int n_sources, bool has_base, const MergeOptions& options);

// How many elements of n a density keeps: int(density * n), at least 1.
int64_t kept_elements(double density, int64_t n_elements);

// breadcrumbs: the ranks (1 is the largest) of the largest and the smallest magnitude that stay.
struct Ranks {
  int64_t first, last;
};
Ranks ranks_without_outliers(double density, double gamma, int64_t n_elements);

}  // namespace gptailor
