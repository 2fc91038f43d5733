// Exceptions of the C++ code; bindings.cpp turns them into Python exceptions. std::invalid_argument becomes ValueError.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace gptailor {

// A failed system call: OSError with errno and, if there is one, the path.
struct OsError : std::runtime_error {
  OsError(int error, const std::string& what, std::string path = {})
      : std::runtime_error(what), error(error), path(std::move(path)) {}
  int error;
  std::string path;
};

// A NaN where none is allowed.
struct NanError : std::runtime_error {
  static constexpr int kBase = -1, kResult = -2;
  NanError(const std::string& what, int source, int64_t element)
      : std::runtime_error(what), source(source), element(element) {}
  int source;       // 0-based index of the input, or kBase, or kResult
  int64_t element;  // 0-based index of the first such element
};

// A finite number that is too large for the type of the result.
struct RangeError : std::runtime_error {
  RangeError(const std::string& what, bool is_input, int64_t element)
      : std::runtime_error(what), is_input(is_input), element(element) {}
  bool is_input;    // of input 0, which is only cast; otherwise it was computed
  int64_t element;  // 0-based index of the first such element
};

}  // namespace gptailor
