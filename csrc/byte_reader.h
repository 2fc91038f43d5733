// Access to the bytes of an input file that is not mapped.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gptailor {

// Safe to use from several threads at once. Offsets are from the start of the file.
struct ByteReader {
  virtual ~ByteReader() = default;

  // Fills [to, to + n_bytes) or throws OsError; ESTALE if the file has become shorter.
  virtual void read(int64_t offset, int64_t n_bytes, std::byte* to) const = 0;

  // Throws OsError (ESTALE) if bytes read so far may not be the file's. Cheap; to be called after the last byte of an
  // operation was read and before its result is used.
  virtual void check_intact() const = 0;
};

}  // namespace gptailor
