// A typed, shaped view of bytes, which keeps their owner alive.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <vector>

#include "byte_reader.h"
#include "dtype.h"

namespace gptailor {

// Where the bytes are:
// - `data`: in memory, or in a mapped file. If `reader` is set, too, it is the mapped file's: after reading through
//   `data`, call reader->check_intact() before the result is used, because a truncated file reads as zeros; and before
//   another error is reported, because the kernel returns EFAULT for a write from there.
// - `data` is nullptr and `reader` is set: not mapped. The bytes are [reader_offset, reader_offset + n_bytes) of
//   reader->read(), to be staged chunk by chunk; check_intact() as above.
// - both nullptr: there are no bytes.
struct Tensor {
  std::shared_ptr<const void> owner;
  const std::byte* data = nullptr;  // need not be aligned
  std::shared_ptr<const ByteReader> reader;
  int64_t reader_offset = 0;
  std::vector<int64_t> shape;
  DType dtype = DType::F32;
  int64_t n_elements = 0;
  int64_t n_bytes = 0;
};

DType dtype_named(const std::string& name);  // throws std::invalid_argument

// The number of elements, or of bytes; throws std::invalid_argument for a negative dimension, for overflow, and for a
// sub-byte type that does not fill its last byte.
int64_t count_elements(const std::vector<int64_t>& shape);
int64_t count_bytes(int64_t n_elements, DType dtype);

// Throws std::invalid_argument unless [offset, offset + n_bytes) lies in [0, size).
void check_range(int64_t offset, int64_t n_bytes, int64_t size);

// Views part of [data, data + size). Throws std::invalid_argument as above.
Tensor view(std::shared_ptr<const void> owner, const std::byte* data, int64_t size, int64_t offset,
            std::vector<int64_t> shape, DType dtype);

}  // namespace gptailor
