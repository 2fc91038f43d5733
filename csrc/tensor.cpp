#include "tensor.h"

#include <algorithm>
#include <stdexcept>

namespace gptailor {

DType dtype_named(const std::string& name) {
  std::string known;
  for (const DTypeInfo& d : kDTypes) {
    if (d.name == name) return d.dtype;
    known += (known.empty() ? "" : ", ") + std::string(d.name);
  }
  throw std::invalid_argument("unknown dtype '" + name + "': known are " + known);
}

int64_t count_elements(const std::vector<int64_t>& shape) {
  int64_t n = 1;
  for (const int64_t dim : shape)
    if (dim < 0) throw std::invalid_argument("negative dimension " + std::to_string(dim));
  if (std::find(shape.begin(), shape.end(), 0) != shape.end()) return 0;
  for (const int64_t dim : shape)
    if (__builtin_mul_overflow(n, dim, &n)) throw std::invalid_argument("the shape has more than 2^63 elements");
  return n;
}

int64_t count_bytes(int64_t n_elements, DType dtype) {
  int64_t bits;
  if (__builtin_mul_overflow(n_elements, static_cast<int64_t>(info(dtype).bits), &bits))
    throw std::invalid_argument("the tensor has more than 2^60 bytes");
  if (bits % 8 != 0) throw std::invalid_argument("the tensor does not end at a whole byte");
  return bits / 8;
}

void check_range(int64_t offset, int64_t n_bytes, int64_t size) {
  if (offset < 0 || n_bytes < 0 || offset > size || n_bytes > size - offset)
    throw std::invalid_argument(std::to_string(n_bytes) + " bytes at offset " + std::to_string(offset) +
                                " do not lie within " + std::to_string(size) + " bytes");
}

Tensor view(std::shared_ptr<const void> owner, const std::byte* data, int64_t size, int64_t offset,
            std::vector<int64_t> shape, DType dtype) {
  Tensor t;
  t.n_elements = count_elements(shape);
  t.n_bytes = count_bytes(t.n_elements, dtype);
  check_range(offset, t.n_bytes, size);
  t.owner = std::move(owner);
  t.data = data + offset;
  t.shape = std::move(shape);
  t.dtype = dtype;
  return t;
}

}  // namespace gptailor
