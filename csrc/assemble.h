// Copies byte ranges of input files to an output file, in the cheapest way that the kernel and the file systems offer.
#pragma once

#include <cstdint>
#include <functional>

namespace gptailor {

// Copies [src_offset, src_offset + n_bytes) of one open file to dst_offset of another, without moving either file's
// position. Tries copy_file_range (which may share blocks or copy on the server), then sendfile, then pread and pwrite.
// Calls `poll` between chunks; an exception from it ends the copy. Returns the name of the method that was used last.
// Throws OsError: errno of the failing call, EIO if the source ends early; std::invalid_argument for overlapping ranges
// of one file, negative numbers, or a destination opened with O_APPEND.
const char* copy_range(int src_fd, int64_t src_offset, int dst_fd, int64_t dst_offset, int64_t n_bytes,
                       const std::function<void()>& poll);

// Starts writing [offset, offset + n_bytes) of an open file back to disk without waiting, if the system supports it.
// Throws OsError.
void start_write_back(int fd, int64_t offset, int64_t n_bytes);

}  // namespace gptailor
