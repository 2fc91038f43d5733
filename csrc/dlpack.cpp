#include "dlpack.h"

#include <string>

namespace py = pybind11;

namespace gptailor {

namespace {

// The structures of DLPack 0.8, whose layout is fixed.
struct DLDevice {
  int32_t device_type;
  int32_t device_id;
};
struct DLDataType {
  uint8_t code;
  uint8_t bits;
  uint16_t lanes;
};
struct DLTensor {
  void* data;
  DLDevice device;
  int32_t ndim;
  DLDataType dtype;
  int64_t* shape;
  int64_t* strides;  // nullptr: contiguous
  uint64_t byte_offset;
};
struct DLManagedTensor {
  DLTensor dl_tensor;
  void* manager_ctx;
  void (*deleter)(DLManagedTensor*);
};

constexpr const char* kFresh = "dltensor";
constexpr const char* kUsed = "used_dltensor";

struct Export {
  DLManagedTensor managed;
  Tensor tensor;
  std::vector<int64_t> strides;
};

DType dtype_of(const DLDataType& dtype) {
  for (const DTypeInfo& d : kDTypes)
    if (dtype.lanes == 1 && d.bits == dtype.bits && d.dlpack_code == dtype.code) return d.dtype;
  throw py::buffer_error("unsupported DLPack dtype (code " + std::to_string(dtype.code) + ", " +
                         std::to_string(dtype.bits) + " bits)");
}

bool is_contiguous(const DLTensor& t) {
  int64_t expected = 1;
  for (int i = t.ndim - 1; i >= 0; --i) {
    if (t.shape[i] == 0) return true;
    if (t.strides != nullptr && t.shape[i] != 1 && t.strides[i] != expected) return false;
    expected *= t.shape[i];
  }
  return true;
}

}  // namespace

py::capsule to_dlpack(const Tensor& tensor) {
  const DTypeInfo& d = info(tensor.dtype);
  if (d.dlpack_code < 0) throw py::buffer_error("DLPack has no " + std::string(d.name));
  auto e = std::make_unique<Export>();
  e->tensor = tensor;
  e->strides.resize(tensor.shape.size());
  int64_t stride = 1;
  for (size_t i = tensor.shape.size(); i-- > 0; stride *= tensor.shape[i]) e->strides[i] = stride;
  e->managed.dl_tensor = {const_cast<std::byte*>(tensor.data),
                          {kDeviceCpu, 0},
                          static_cast<int32_t>(tensor.shape.size()),
                          {static_cast<uint8_t>(d.dlpack_code), static_cast<uint8_t>(d.bits), 1},
                          e->tensor.shape.data(),
                          e->strides.data(),
                          0};
  e->managed.manager_ctx = e.get();
  e->managed.deleter = [](DLManagedTensor* managed) { delete static_cast<Export*>(managed->manager_ctx); };
  py::capsule capsule(&e->managed, kFresh, [](PyObject* self) {
    // A consumer renames the capsule, and then calls the deleter itself.
    if (!PyCapsule_IsValid(self, kFresh)) return;
    auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(self, kFresh));
    managed->deleter(managed);
  });
  e.release();
  return capsule;
}

ForeignTensor from_dlpack(const py::object& object) {
  // -1: do not wait for other streams. The caller says which one it uses.
  const bool cuda = object.attr("__dlpack_device__")().cast<std::pair<int, int>>().first == kDeviceCuda;
  const py::object capsule = cuda ? object.attr("__dlpack__")(py::arg("stream") = -1) : object.attr("__dlpack__")();
  auto* managed = static_cast<DLManagedTensor*>(PyCapsule_GetPointer(capsule.ptr(), kFresh));
  if (managed == nullptr) throw py::error_already_set();
  PyCapsule_SetName(capsule.ptr(), kUsed);
  const std::shared_ptr<const void> owner(managed, [](const void* p) {
    const py::gil_scoped_acquire gil;
    auto* m = static_cast<DLManagedTensor*>(const_cast<void*>(p));
    if (m->deleter != nullptr) m->deleter(m);
  });
  const DLTensor& t = managed->dl_tensor;
  if (!is_contiguous(t)) throw py::buffer_error("the tensor is not contiguous");
  std::vector<int64_t> shape(t.shape, t.shape + t.ndim);
  const DType dtype = dtype_of(t.dtype);
  const int64_t n_bytes = count_bytes(count_elements(shape), dtype);
  const auto* data = static_cast<const std::byte*>(t.data) + t.byte_offset;
  return {view(owner, data, n_bytes, 0, std::move(shape), dtype), t.device.device_type, t.device.device_id};
}

}  // namespace gptailor
