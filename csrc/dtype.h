// Element types as safetensors names them, and the three floating-point types that merges read and write.
// Conversions are bit operations with round-to-nearest-even, the same on every CPU and on the GPU, and written
// without branches on the data so that compilers vectorise loops over them.
#pragma once

#include <cstdint>
#include <cstring>
#include <string_view>

#ifdef __CUDACC__
#define GPTAILOR_HD __host__ __device__ __forceinline__
#else
// Always inlined: kernels.cpp is compiled once per instruction set, and the linker must not keep an out-of-line copy
// for AVX-512 for all of them.
#define GPTAILOR_HD inline __attribute__((always_inline))
#endif

namespace gptailor {

enum class DType : uint8_t {
  BOOL, F4, F6_E2M3, F6_E3M2, U8, I8, F8_E5M2, F8_E4M3, F8_E8M0, I16, U16, F16, BF16, I32, U32, F32, F64, I64, U64, C64,
};

struct DTypeInfo {
  DType dtype;
  std::string_view name;
  int bits;
  int dlpack_code;  // DLDataTypeCode; -1 if DLPack or its consumers have none
};

inline constexpr DTypeInfo kDTypes[] = {
    {DType::BOOL, "BOOL", 8, 6},          {DType::F4, "F4", 4, -1},           {DType::F6_E2M3, "F6_E2M3", 6, -1},
    {DType::F6_E3M2, "F6_E3M2", 6, -1},   {DType::U8, "U8", 8, 1},            {DType::I8, "I8", 8, 0},
    {DType::F8_E5M2, "F8_E5M2", 8, 12},   {DType::F8_E4M3, "F8_E4M3", 8, 10}, {DType::F8_E8M0, "F8_E8M0", 8, 14},
    {DType::I16, "I16", 16, 0},           {DType::U16, "U16", 16, 1},         {DType::F16, "F16", 16, 2},
    {DType::BF16, "BF16", 16, 4},         {DType::I32, "I32", 32, 0},         {DType::U32, "U32", 32, 1},
    {DType::F32, "F32", 32, 2},           {DType::F64, "F64", 64, 2},         {DType::I64, "I64", 64, 0},
    {DType::U64, "U64", 64, 1},           {DType::C64, "C64", 64, 5},
};

inline const DTypeInfo& info(DType dtype) { return kDTypes[static_cast<int>(dtype)]; }

inline bool is_mergeable(DType dtype) { return dtype == DType::F32 || dtype == DType::F16 || dtype == DType::BF16; }

GPTAILOR_HD int mergeable_bytes(DType dtype) { return dtype == DType::F32 ? 4 : 2; }

GPTAILOR_HD float float_from_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

GPTAILOR_HD uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Bits of |value|. They are ordered like the magnitudes; anything above kInfBits is NaN.
inline constexpr uint32_t kInfBits = 0x7f800000u;
GPTAILOR_HD uint32_t magnitude_bits(float value) { return bits_of(value) & 0x7fffffffu; }
GPTAILOR_HD bool is_nan(float value) { return magnitude_bits(value) > kInfBits; }

GPTAILOR_HD float bf16_to_f32(uint16_t h) { return float_from_bits(static_cast<uint32_t>(h) << 16); }

GPTAILOR_HD uint16_t f32_to_bf16(float value) {
  const uint32_t u = bits_of(value);
  const uint32_t rounded = (u + 0x7fffu + ((u >> 16) & 1u)) >> 16;
  const uint32_t nan = (u >> 16) | 0x40u;  // stays NaN: quiet, sign and upper payload kept
  return static_cast<uint16_t>((u & 0x7fffffffu) > kInfBits ? nan : rounded);
}

GPTAILOR_HD float f16_to_f32(uint16_t h) {
  const uint32_t magnitude = static_cast<uint32_t>(h & 0x7fffu) << 13;
  // Multiplying by 2^112 moves the exponent bias from 15 to 127, and normalises subnormals on the way.
  const uint32_t finite = bits_of(float_from_bits(magnitude) * float_from_bits(0x77800000u));
  const uint32_t special = magnitude | kInfBits | (magnitude > (0x7c00u << 13) ? 0x400000u : 0u);
  const uint32_t sign = static_cast<uint32_t>(h & 0x8000u) << 16;
  return float_from_bits((magnitude >= (0x7c00u << 13) ? special : finite) | sign);
}

GPTAILOR_HD uint16_t f32_to_f16(float value) {
  const uint32_t u = magnitude_bits(value);
  const uint32_t normal = (u - (112u << 23) + 0xfffu + ((u >> 13) & 1u)) >> 13;
  // Adding 0.5 aligns a value below 2^-14 so that the float's last bit is the half's: the addition does the rounding.
  const uint32_t subnormal = bits_of(float_from_bits(u) + 0.5f) - 0x3f000000u;
  const uint32_t special = u > kInfBits ? 0x7e00u | ((u >> 13) & 0x3ffu) : 0x7c00u;
  const uint32_t finite = u < (113u << 23) ? subnormal : normal;
  const uint32_t sign = (bits_of(value) >> 16) & 0x8000u;
  return static_cast<uint16_t>((u >= (143u << 23) ? special : finite) | sign);
}

// Whether a finite number becomes infinite as F16: from half a step above 65504 on.
GPTAILOR_HD bool overflows_f16(float value) {
  const uint32_t u = magnitude_bits(value);
  return u >= 0x477ff000u && u < kInfBits;
}

}  // namespace gptailor
