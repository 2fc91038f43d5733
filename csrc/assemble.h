// Byte ranges of input files → an output file, by the cheapest way that the kernel and the file systems offer.
#pragma once

#include <cstdint>
#include <functional>

namespace gptailor {

// Copies [src_offset, src_offset + n_bytes) of one open file to dst_offset of another, without moving either file's
// position. Tries copy_file_range (which may share blocks or copy on the server), then sendfile, then pread and pwrite.
// Calls `poll` between chunks; what it throws ends the copy. Returns the name of the method that was used last.
// Throws OsError: errno of the failing call, EIO if the source ends early; std::invalid_argument on overlapping ranges
// of one file, negative numbers, or a destination opened with O_APPEND.
const char* copy_range(int src_fd, int64_t src_offset, int dst_fd, int64_t dst_offset, int64_t n_bytes,
                       const std::function<void()>& poll);

// Has the disk begin to write [offset, offset + n_bytes) of an open file, without waiting for it, where the system can.
// Throws OsError.
void start_write_back(int fd, int64_t offset, int64_t n_bytes);

}  // namespace gptailor
