// A typed, shaped view of bytes that somebody else owns, and keeps alive for as long as the view lives.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "dtype.h"

namespace gptailor {

struct Tensor {
  std::shared_ptr<const void> owner;
  const std::byte* data = nullptr;  // need not be aligned; nullptr only if there are no bytes
  std::vector<int64_t> shape;
  DType dtype = DType::F32;
  int64_t n_elements = 0;
  int64_t n_bytes = 0;
};

DType dtype_named(const std::string& name);  // throws std::invalid_argument

// The number of elements, or of bytes; throws std::invalid_argument on a negative dimension, on overflow, and on a
// sub-byte type that does not fill its last byte.
int64_t count_elements(const std::vector<int64_t>& shape);
int64_t count_bytes(int64_t n_elements, DType dtype);

// Throws std::invalid_argument unless [offset, offset + n_bytes) lies in [0, size).
void check_range(int64_t offset, int64_t n_bytes, int64_t size);

// Views part of [data, data + size). Throws std::invalid_argument as above.
Tensor view(std::shared_ptr<const void> owner, const std::byte* data, int64_t size, int64_t offset,
            std::vector<int64_t> shape, DType dtype);

}  // namespace gptailor
