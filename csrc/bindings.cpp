// gptailor._C: argument checks, release of the GIL, and nothing else. gptailor/_C.pyi documents the Python interface.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>
#include <pybind11/stl/filesystem.h>

#include <algorithm>

#include "assemble.h"
#include "declared_methods.h"
#include "dlpack.h"
#include "errors.h"
#include "file_reader.h"
#include "load.h"
#include "mapped_file.h"
#include "merge_cpu.h"
#include "merge_cuda.h"

namespace py = pybind11;
using namespace gptailor;

namespace {

PyObject* nan_error_type = nullptr;
PyObject* range_error_type = nullptr;

py::object decode_path(const std::string& path) {
  return py::reinterpret_steal<py::object>(
      PyUnicode_DecodeFSDefaultAndSize(path.data(), static_cast<Py_ssize_t>(path.size())));
}

void raise_os_error(const OsError& e) {
  const std::string text = e.path.empty() ? std::string(e.what()) + ": " + strerror(e.error) : strerror(e.error);
  py::tuple args = py::make_tuple(e.error, text);
  if (!e.path.empty()) args = py::make_tuple(e.error, text, decode_path(e.path));
  PyErr_SetObject(PyExc_OSError, args.ptr());
}

void raise_nan_error(const NanError& e) {
  const py::object error = py::reinterpret_borrow<py::object>(nan_error_type)(e.what());
  if (e.source >= 0) error.attr("source") = e.source;
  else error.attr("source") = e.source == NanError::kBase ? "base" : "result";
  error.attr("element") = e.element;
  PyErr_SetObject(nan_error_type, error.ptr());
}

void raise_range_error(const RangeError& e) {
  const py::object error = py::reinterpret_borrow<py::object>(range_error_type)(e.what());
  error.attr("is_input") = e.is_input;
  error.attr("element") = e.element;
  PyErr_SetObject(range_error_type, error.ptr());
}

struct PyTensor {
  Tensor tensor;
};

// On a GPU.
struct PyDeviceTensor {
  ForeignTensor foreign;

  static PyDeviceTensor from(const py::object& object) {
    if (py::isinstance<PyDeviceTensor>(object)) return object.cast<const PyDeviceTensor&>();
    PyDeviceTensor t{from_dlpack(object)};
    if (t.foreign.device_type != kDeviceCuda) throw py::buffer_error("the tensor is not on a CUDA device");
    return t;
  }

  PyDeviceTensor part(int64_t offset, std::vector<int64_t> shape, const std::string& dtype) const {
    const Tensor& t = foreign.tensor;
    return {{view(t.owner, t.data, t.n_bytes, offset, std::move(shape), dtype_named(dtype)), foreign.device_type,
             foreign.device_id}};
  }
};

PyTensor tensor_of(const std::shared_ptr<Mapping>& m, int64_t offset, std::vector<int64_t> shape,
                   const std::string& dtype) {
  return {view(m, m->data(), m->size(), offset, std::move(shape), dtype_named(dtype))};
}

PyTensor tensor_of_file(const std::shared_ptr<InputFile>& file, int64_t offset, std::vector<int64_t> shape,
                        const std::string& dtype) {
  const std::byte* mapped = file->mapped();
  PyTensor t{view(file, mapped, file->size(), mapped == nullptr ? 0 : offset, std::move(shape), dtype_named(dtype))};
  check_range(offset, t.tensor.n_bytes, file->size());
  t.tensor.reader = file;
  t.tensor.reader_offset = offset;
  return t;
}

py::bytes read_bytes(const InputFile& file, int64_t offset, int64_t n_bytes) {
  check_range(offset, n_bytes, file.size());
  auto bytes = py::reinterpret_steal<py::bytes>(PyBytes_FromStringAndSize(nullptr, static_cast<Py_ssize_t>(n_bytes)));
  if (!bytes) throw py::error_already_set();
  auto* to = reinterpret_cast<std::byte*>(PyBytes_AS_STRING(bytes.ptr()));
  const py::gil_scoped_release nogil;
  file.read(offset, n_bytes, to);
  return bytes;
}

const char* name_of(Io io) { return io == Io::mmap ? "mmap" : io == Io::pread ? "pread" : "direct"; }

std::shared_ptr<InputFile> open_input(const std::filesystem::path& path, const std::string& io) {
  const py::gil_scoped_release nogil;
  const std::string& p = path.native();
  if (io != "auto" && io != "mmap" && io != "pread" && io != "direct")
    throw std::invalid_argument("unknown io '" + io + "': known are auto, mmap, pread, direct");
  if (io == "mmap" || (io == "auto" && io_of_path(p) == Io::mmap)) return std::make_shared<MappedFile>(p);
  return std::make_shared<FileReader>(p, io == "direct");
}

DType mergeable(DType dtype, const std::string& what) {
  if (!is_mergeable(dtype))
    throw std::invalid_argument(what + " is " + std::string(info(dtype).name) + ": only F32, F16 and BF16 are merged");
  return dtype;
}

Input input_of(const Tensor& t, const std::string& what, int64_t n_elements) {
  if (t.n_elements != n_elements)
    throw std::invalid_argument(what + " has " + std::to_string(t.n_elements) + " elements, sources[0] has " +
                                std::to_string(n_elements));
  return {t.data, t.reader.get(), t.reader_offset, mergeable(t.dtype, what)};
}

void check_source_count(size_t n) {
  if (n < 1 || n > kMaxSources)
    throw std::invalid_argument("1 to " + std::to_string(kMaxSources) + " sources can be merged, not " +
                                std::to_string(n));
}

// name: number, or a sequence with one for each source.
std::map<std::string, std::vector<double>> numbers_of(const py::dict& parameters) {
  std::map<std::string, std::vector<double>> result;
  for (const auto& [key, value] : parameters) {
    if (!py::isinstance<py::str>(key)) throw py::type_error("parameters: a name is not a string");
    const auto name = py::cast<std::string>(key);
    try {
      result[name] = PyNumber_Check(value.ptr()) != 0 ? std::vector<double>{py::cast<double>(value)}
                                                       : py::cast<std::vector<double>>(value);
    } catch (const py::cast_error&) {
      throw py::type_error("parameters: " + name + " is neither a number nor a sequence of numbers");
    }
  }
  return result;
}

// A row runs along the last dimension; a column along the first, however many dimensions follow.
int64_t row_length_of(const Tensor& t, int64_t asked, bool by_columns) {
  if (asked < 0 || (asked > 0 && t.n_elements % asked != 0))
    throw std::invalid_argument("row_length is " + std::to_string(asked) + ", which does not divide " +
                                std::to_string(t.n_elements) + " elements");
  if (asked > 0) return asked;
  if (t.shape.empty() || t.n_elements == 0) return 1;
  return by_columns && t.shape.size() > 1 ? t.n_elements / t.shape.front() : t.shape.back();
}

struct PyMerge {
  std::vector<Tensor> keep_alive;
  std::unique_ptr<const Merger> merger;

  PyMerge(const std::string& name, const std::vector<PyTensor>& sources, const std::optional<PyTensor>& base,
          const std::vector<PyTensor>& statistics, const std::string& out_dtype, const MergeOptions& options,
          int64_t row_length, bool check_nan, bool check_overflow) {
    check_source_count(sources.size());
    MergeJob job;
    job.n_sources = static_cast<int>(sources.size());
    job.n_elements = sources[0].tensor.n_elements;
    for (size_t i = 0; i < sources.size(); ++i) {
      job.sources[i] = input_of(sources[i].tensor, "sources[" + std::to_string(i) + "]", job.n_elements);
      keep_alive.push_back(sources[i].tensor);
    }
    job.has_base = base.has_value();
    if (base) {
      job.base = input_of(base->tensor, "base", job.n_elements);
      keep_alive.push_back(base->tensor);
    }
    const Method method = method_named(name, job.n_sources, job.has_base, options);
    if (statistics.size() != (method.takes_statistics ? sources.size() : 0))
      throw std::invalid_argument(
          name + (method.takes_statistics ? " needs the statistics of each source" : " takes no statistics"));
    for (size_t i = 0; i < statistics.size(); ++i) {
      job.statistics[i] = input_of(statistics[i].tensor, "statistics[" + std::to_string(i) + "]", job.n_elements);
      keep_alive.push_back(statistics[i].tensor);
    }
    job.out_dtype = mergeable(dtype_named(out_dtype), "out_dtype");
    job.check_nan = check_nan;
    job.check_overflow = check_overflow;
    job.row_length = row_length_of(sources[0].tensor, row_length, method.sphere_by == Weights::columns);
    job.is_vector = row_length > 0 ? row_length == job.n_elements : sources[0].tensor.shape.size() < 2;
    const py::gil_scoped_release nogil;
    merger = std::make_unique<const Merger>(job, method, options.n_threads);
  }

  void check_elements(int64_t begin, int64_t count) const {
    const int64_t n = merger->job().n_elements;
    if (begin < 0 || count < 0 || begin > n || count > n - begin)
      throw std::invalid_argument("elements [" + std::to_string(begin) + ", +" + std::to_string(count) +
                                  ") do not lie within " + std::to_string(n));
  }

  void run(int64_t begin, int64_t count, const Buffer& out, int64_t out_offset) const {
    check_elements(begin, count);
    const int64_t n_bytes = count * mergeable_bytes(merger->job().out_dtype);
    check_range(out_offset, n_bytes, out.size());
    std::byte* to = out.data() + out_offset;
    for (const Tensor& t : keep_alive)
      if (n_bytes > 0 && t.data != nullptr && t.data < to + n_bytes && to < t.data + t.n_bytes)
        throw std::invalid_argument("the output overlaps an input");
    const py::gil_scoped_release nogil;
    merger->run(begin, count, to);
  }

  void write(int64_t begin, int64_t count, int fd, int64_t offset) const {
    check_elements(begin, count);
    if (offset < 0) throw std::invalid_argument("offset is negative");
    const py::gil_scoped_release nogil;
    merger->write(begin, count, fd, offset);
  }
};

std::string py_copy_range(int src_fd, int64_t src_offset, int dst_fd, int64_t dst_offset, int64_t n_bytes) {
  const py::gil_scoped_release nogil;
  return copy_range(src_fd, src_offset, dst_fd, dst_offset, n_bytes, [] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
}

void py_merge_cuda(const std::string& name, const std::vector<py::object>& outs,
                   const std::vector<std::vector<py::object>>& sources, const std::vector<py::object>& bases,
                   const std::vector<uint64_t>& keys, const std::optional<py::object>& found, const MergeOptions& options,
                   uintptr_t stream) {
  require_cuda();
  if (sources.size() != outs.size() || (!bases.empty() && bases.size() != outs.size()) ||
      (!keys.empty() && keys.size() != outs.size()))
    throw std::invalid_argument("outs, sources, bases and keys must have one entry for each tensor");
  if (outs.empty()) return;
  check_source_count(sources[0].size());
  const int n_sources = static_cast<int>(sources[0].size());
  const Method method = method_named(name, n_sources, !bases.empty(), options);

  std::vector<Tensor> keep_alive;  // for as long as the call lasts; the stream is the caller's business
  std::vector<CudaTensor> tensors(outs.size());
  int device = -1;
  const auto take = [&](const py::object& object, const std::string& what) {
    const bool known = py::isinstance<PyDeviceTensor>(object);
    const ForeignTensor foreign = known ? object.cast<const PyDeviceTensor&>().foreign : from_dlpack(object);
    if (foreign.device_type != kDeviceCuda) throw std::invalid_argument(what + " is not on a CUDA device");
    if (device >= 0 && foreign.device_id != device) throw std::invalid_argument(what + " is on another device");
    device = foreign.device_id;
    keep_alive.push_back(foreign.tensor);
    return foreign.tensor;
  };
  for (size_t k = 0; k < outs.size(); ++k) {
    CudaTensor& c = tensors[k];
    const std::string at = "[" + std::to_string(k) + "]";
    const Tensor out = take(outs[k], "outs" + at);
    c.n_elements = out.n_elements;
    c.out = const_cast<std::byte*>(out.data);
    c.out_dtype = mergeable(out.dtype, "outs" + at);
    if (sources[k].size() != static_cast<size_t>(n_sources))
      throw std::invalid_argument("sources" + at + " and sources[0] have different numbers of sources");
    for (size_t i = 0; i < sources[k].size(); ++i) {
      const std::string what = "sources" + at + "[" + std::to_string(i) + "]";
      c.sources[i] = input_of(take(sources[k][i], what), what, c.n_elements);
    }
    if (!bases.empty()) c.base = input_of(take(bases[k], "bases" + at), "bases" + at, c.n_elements);
    c.key = keys.empty() ? 0 : keys[k];
  }
  int* found_flags = nullptr;
  if (found) {
    const Tensor flags = take(*found, "found");
    if (flags.dtype != DType::I32 || flags.n_elements != 2 * static_cast<int64_t>(outs.size()))
      throw std::invalid_argument("found must hold two I32 for each tensor");
    found_flags = reinterpret_cast<int*>(const_cast<std::byte*>(flags.data));
  }
  const py::gil_scoped_release nogil;
  merge_cuda(method, n_sources, tensors, found_flags, device, stream);
}

void py_load(Loader& loader, const std::vector<std::tuple<std::filesystem::path, int64_t, py::object>>& requests,
             uintptr_t stream) {
  std::vector<std::string> paths;
  std::vector<LoadRange> ranges;
  std::vector<Tensor> keep_alive;  // for as long as the call lasts; the stream is the caller's business
  for (size_t k = 0; k < requests.size(); ++k) {
    const auto& [path, offset, object] = requests[k];
    const ForeignTensor out = from_dlpack(object);
    const bool host = loader.device() == Loader::kHost;
    if (host ? out.device_type != kDeviceCpu
             : out.device_type != kDeviceCuda || out.device_id != loader.device())
      throw std::invalid_argument("requests[" + std::to_string(k) + "] is not in " +
                                  (host ? "CPU memory" : "memory of GPU " + std::to_string(loader.device())));
    const auto found = std::find(paths.begin(), paths.end(), path.native());
    const auto file = static_cast<int>(found - paths.begin());
    if (found == paths.end()) paths.push_back(path.native());
    ranges.push_back({file, offset, out.tensor.n_bytes, const_cast<std::byte*>(out.tensor.data)});
    keep_alive.push_back(out.tensor);
  }
  const py::gil_scoped_release nogil;
  loader.load(paths, ranges, stream);
}

py::dict build_info() {
  py::dict d;
#ifdef GPTAILOR_CUDA_VERSION
  d["cuda"] = true;
  d["cuda_version"] = GPTAILOR_CUDA_VERSION;
  d["cuda_archs"] = GPTAILOR_CUDA_ARCHS;
#else
  d["cuda"] = false;
  d["cuda_version"] = py::none();
  d["cuda_archs"] = "";
#endif
  d["compiler"] = GPTAILOR_COMPILER;
  d["simd"] = kernels().name;
  d["max_sources"] = kMaxSources;
  d["methods_digest"] = GPTAILOR_METHODS_DIGEST;
  return d;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  nan_error_type = PyErr_NewExceptionWithDoc(
      "gptailor._C.NanError", "A NaN in an input, or made from infinities. Has .source and .element.",
      PyExc_ValueError, nullptr);
  m.attr("NanError") = py::reinterpret_borrow<py::object>(nan_error_type);
  range_error_type = PyErr_NewExceptionWithDoc(
      "gptailor._C.RangeError", "A finite number that is too large for the result. Has .is_input and .element.",
      PyExc_ValueError, nullptr);
  m.attr("RangeError") = py::reinterpret_borrow<py::object>(range_error_type);
  py::register_exception_translator([](std::exception_ptr p) {
    try {
      if (p) std::rethrow_exception(p);
    } catch (const OsError& e) {
      raise_os_error(e);
    } catch (const NanError& e) {
      raise_nan_error(e);
    } catch (const RangeError& e) {
      raise_range_error(e);
    }
  });

  py::class_<PyTensor>(m, "Tensor")
      .def_static(
          "from_dlpack",
          [](const py::object& object) {
            ForeignTensor foreign = from_dlpack(object);
            if (foreign.device_type != kDeviceCpu) throw py::buffer_error("the tensor is not in CPU memory");
            return PyTensor{std::move(foreign.tensor)};
          },
          py::arg("tensor"))
      .def_property_readonly("shape", [](const PyTensor& t) { return py::tuple(py::cast(t.tensor.shape)); })
      .def_property_readonly("dtype", [](const PyTensor& t) { return info(t.tensor.dtype).name; })
      .def_property_readonly("n_bytes", [](const PyTensor& t) { return t.tensor.n_bytes; })
      .def_property_readonly("n_elements", [](const PyTensor& t) { return t.tensor.n_elements; })
      .def("__dlpack__",
           [](const PyTensor& t, const py::kwargs&) {
             const auto there = [&] {
               const py::gil_scoped_release nogil;
               return in_memory(t.tensor);
             };
             return to_dlpack(there());
           })
      .def("check_intact",
           [](const PyTensor& t) {
             const py::gil_scoped_release nogil;
             if (t.tensor.reader) t.tensor.reader->check_intact();
           })
      .def("__dlpack_device__", [](const PyTensor&) { return py::make_tuple(kDeviceCpu, 0); })
      .def("__repr__", [](const PyTensor& t) {
        return py::str("<gptailor._C.Tensor {} {}>").format(info(t.tensor.dtype).name, py::tuple(py::cast(t.tensor.shape)));
      });

  py::class_<InputFile, std::shared_ptr<InputFile>>(m, "InputFile")
      .def_property_readonly("path", [](const InputFile& f) { return decode_path(f.path()); })
      .def_property_readonly("size", &InputFile::size)
      .def_property_readonly("io", [](const InputFile& f) { return name_of(f.io()); })
      .def("fileno", &InputFile::fd)
      .def("read", &read_bytes, py::arg("offset"), py::arg("n_bytes"))
      .def("tensor", &tensor_of_file, py::arg("offset"), py::arg("shape"), py::arg("dtype"))
      .def("check_intact", [](const InputFile& f) {
        const py::gil_scoped_release nogil;
        f.check_intact();
      });
  py::class_<MappedFile, InputFile, std::shared_ptr<MappedFile>>(m, "MappedFile")
      .def(py::init([](const std::filesystem::path& path) {
             const py::gil_scoped_release nogil;
             return std::make_shared<MappedFile>(path.native());
           }),
           py::arg("path"));
  py::class_<FileReader, InputFile, std::shared_ptr<FileReader>>(m, "FileReader")
      .def(py::init([](const std::filesystem::path& path, bool direct) {
             const py::gil_scoped_release nogil;
             return std::make_shared<FileReader>(path.native(), direct);
           }),
           py::arg("path"), py::kw_only(), py::arg("direct") = false);
  m.def("open_input", &open_input, py::arg("path"), py::arg("io") = "auto");
  m.def("io_of_file_system", [](uint32_t type) { return name_of(io_of_file_system(type)); }, py::arg("type"));

  py::class_<Buffer, std::shared_ptr<Buffer>>(m, "Buffer", py::buffer_protocol())
      .def(py::init([](int64_t n_bytes) {
             if (n_bytes < 0) throw std::invalid_argument("n_bytes is negative");
             return std::make_shared<Buffer>(n_bytes);
           }),
           py::arg("n_bytes"))
      .def_property_readonly("size", &Buffer::size)
      .def(
          "tensor",
          [](const std::shared_ptr<Buffer>& b, int64_t offset, std::vector<int64_t> shape, const std::string& dtype) {
            return tensor_of(b, offset, std::move(shape), dtype);
          },
          py::arg("offset"), py::arg("shape"), py::arg("dtype"))
      .def_buffer([](const Buffer& b) {
        return py::buffer_info(reinterpret_cast<uint8_t*>(b.data()), static_cast<py::ssize_t>(b.size()));
      });

  py::class_<PyMerge>(m, "Merge")
      .def(py::init([](const std::string& method, const std::vector<PyTensor>& sources,
                       const std::optional<PyTensor>& base, const std::vector<PyTensor>& statistics,
                       const std::string& out_dtype, std::vector<double> weights, const py::dict& parameters, double factor, int64_t row_length, uint64_t key, bool check_nan,
                       bool check_overflow, int threads) {
             return std::make_unique<PyMerge>(
                 method, sources, base, statistics, out_dtype,
                 MergeOptions{std::move(weights), numbers_of(parameters), factor, key, threads}, row_length, check_nan,
                 check_overflow);
           }),
           py::arg("method"), py::arg("sources"), py::arg("base") = py::none(), py::kw_only(),
           py::arg("statistics") = py::tuple(), py::arg("out_dtype"), py::arg("weights") = py::tuple(), py::arg("parameters") = py::dict(), py::arg("factor") = 1.0,
           py::arg("row_length") = 0, py::arg("key") = 0, py::arg("check_nan") = true,
           py::arg("check_overflow") = true, py::arg("threads") = 0)
      .def_property_readonly("n_elements", [](const PyMerge& p) { return p.merger->job().n_elements; })
      .def("run", &PyMerge::run, py::arg("begin"), py::arg("count"), py::arg("out"), py::arg("out_offset") = 0)
      .def("write", &PyMerge::write, py::arg("begin"), py::arg("count"), py::arg("fd"), py::arg("offset"));

  m.def("copy_range", &py_copy_range, py::arg("src_fd"), py::arg("src_offset"), py::arg("dst_fd"),
        py::arg("dst_offset"), py::arg("n_bytes"));
  m.def("start_write_back", &start_write_back, py::arg("fd"), py::arg("offset"), py::arg("n_bytes"),
        py::call_guard<py::gil_scoped_release>());
  m.def(
      "merge_cuda",
      [](const std::string& method, const std::vector<py::object>& outs,
         const std::vector<std::vector<py::object>>& sources, const std::optional<std::vector<py::object>>& bases,
         std::vector<double> weights, const py::dict& parameters, double factor, const std::vector<uint64_t>& keys,
         const std::optional<py::object>& found, uintptr_t stream) {
        py_merge_cuda(method, outs, sources, bases.value_or(std::vector<py::object>{}), keys, found,
                      MergeOptions{std::move(weights), numbers_of(parameters), factor, 0, 0}, stream);
      },
      py::arg("method"), py::arg("outs"), py::arg("sources"), py::arg("bases") = py::none(), py::kw_only(),
      py::arg("weights") = py::tuple(), py::arg("parameters") = py::dict(), py::arg("factor") = 1.0,
      py::arg("keys") = py::tuple(), py::arg("found") = py::none(), py::arg("stream") = 0);
  py::class_<PyDeviceTensor>(m, "DeviceTensor")
      .def_static("from_dlpack", &PyDeviceTensor::from, py::arg("tensor"))
      .def_property_readonly("device", [](const PyDeviceTensor& t) { return t.foreign.device_id; })
      .def_property_readonly("shape", [](const PyDeviceTensor& t) { return py::tuple(py::cast(t.foreign.tensor.shape)); })
      .def_property_readonly("dtype", [](const PyDeviceTensor& t) { return info(t.foreign.tensor.dtype).name; })
      .def_property_readonly("n_bytes", [](const PyDeviceTensor& t) { return t.foreign.tensor.n_bytes; })
      .def("tensor", &PyDeviceTensor::part, py::arg("offset"), py::arg("shape"), py::arg("dtype"));

  py::class_<Loader>(m, "DeviceLoader")
      .def(py::init([](const std::optional<int>& device, const std::string& way, int threads, int64_t buffer_bytes,
                       int64_t pin_bytes) {
             if (device && *device < 0) throw std::invalid_argument("device is " + std::to_string(*device));
             const py::gil_scoped_release nogil;
             return std::make_unique<Loader>(device.value_or(Loader::kHost),
                                             LoaderOptions{load_way_named(way), threads, buffer_bytes, pin_bytes});
           }),
           py::arg("device"), py::kw_only(), py::arg("way") = "auto", py::arg("threads") = 0,
           py::arg("buffer_bytes") = int64_t{8} << 20, py::arg("pin_bytes") = 0)
      .def("load", &py_load, py::arg("requests"), py::kw_only(), py::arg("stream") = 0)
      .def_property_readonly("loaded", [](const Loader& loader) {
        LoadedBytes bytes;
        {
          const py::gil_scoped_release nogil;
          bytes = loader.bytes();
        }
        py::dict d;
        d["pinned"] = bytes.pinned;
        d["pread"] = bytes.buffered;
        d["direct"] = bytes.direct;
        return d;
      });
  m.def("cuda_device_count", &cuda_device_count);
  m.def("build_info", &build_info);
}
