// What a method needs from the whole inputs before it merges any element: coefficients, thresholds, masks.
#pragma once

#include <vector>

#include "methods.h"

namespace gptailor {

// Owns the data that a job points to.
struct Analysed {
  std::vector<float> weights;
  std::vector<std::vector<uint64_t>> ranked;
  std::vector<double> row_scales;
};

// Completes a job whose inputs, sizes and method are set. Returns false if an input is NaN, or infinite so that there
// is no answer, and the job checks for it; the job must not be run then. Throws std::invalid_argument if finite inputs
// have no answer.
bool analyse(MergeJob& job, const Method& method, int n_threads, Analysed& out);

// della: a bit for each element that says whether it stays; larger magnitudes within a row are likelier to stay.
std::vector<uint64_t> ranked_mask(const MergeJob& job, int source, double density, double epsilon, int n_threads);

// widen: weights from the change of each column's (or row's) length and direction, or of each element of a vector.
// Returns false if an input is not finite.
bool find_widen_weights(MergeJob& job, const Method& method, int n_threads, std::vector<float>& weights);

// The inner products of all pairs of sources, by column: [pair][column]; or by row: [row][pair].
std::vector<double> gram_by_column(const MergeJob& job, bool deltas, int n_threads);
std::vector<double> gram_by_row(const MergeJob& job, bool deltas, int n_threads);

// arcee_fusion: the divergence of each row's softmax from the base's, as factors on the differences.
std::vector<double> row_divergences(const MergeJob& job, int n_threads);

}  // namespace gptailor
