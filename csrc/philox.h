// Random bits that depend only on a key and a position, so that CPU, GPU, threads and ranks draw the same masks.
// Philox4x32-10: Salmon et al. 2011, Parallel random numbers: as easy as 1, 2, 3, SC11.
#pragma once

#include "dtype.h"

namespace gptailor {

// One key for each merged tensor.
struct PhiloxKey {
  uint32_t low = 0, high = 0;
};

// The finaliser of splitmix64 (Steele et al. 2014): spreads nearby seeds and tensor keys over all 64 bits.
inline PhiloxKey philox_key(uint64_t seed, uint64_t tensor_key) {
  uint64_t z = seed + 0x9E3779B97F4A7C15u * tensor_key;
  z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
  z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
  z ^= z >> 31;
  return {static_cast<uint32_t>(z), static_cast<uint32_t>(z >> 32)};
}

inline constexpr int kPhiloxWords = 4;
inline constexpr int kPhiloxRounds = 10;

GPTAILOR_HD void philox_round(PhiloxKey key, uint32_t& c0, uint32_t& c1, uint32_t& c2, uint32_t& c3) {
  const uint64_t p0 = static_cast<uint64_t>(0xD2511F53u) * c0, p1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
  c0 = static_cast<uint32_t>(p1 >> 32) ^ c1 ^ key.low;
  c2 = static_cast<uint32_t>(p0 >> 32) ^ c3 ^ key.high;
  c1 = static_cast<uint32_t>(p1);
  c3 = static_cast<uint32_t>(p0);
}

GPTAILOR_HD PhiloxKey next_key(PhiloxKey key) { return {key.low + 0x9E3779B9u, key.high + 0xBB67AE85u}; }

// The four words of one counter. Element e of source s uses word e % 4 of the counter (e / 4, s, 0).
GPTAILOR_HD void philox(PhiloxKey key, uint64_t position, uint32_t source, uint32_t (&words)[kPhiloxWords]) {
  words[0] = static_cast<uint32_t>(position), words[1] = static_cast<uint32_t>(position >> 32);
  words[2] = source, words[3] = 0;
  for (int round = 0; round < kPhiloxRounds; ++round, key = next_key(key))
    philox_round(key, words[0], words[1], words[2], words[3]);
}

// A word passes with this probability if it is below the chance: ceil(p * 2^32), 2^32 for "always".
inline constexpr uint64_t kAlways = uint64_t{1} << 32;
GPTAILOR_HD uint64_t chance(double probability) {
  const double scaled = probability * 4294967296.0;
  if (!(scaled > 0.0)) return 0;
  if (scaled >= 4294967296.0) return kAlways;
  const uint64_t floor = static_cast<uint64_t>(scaled);
  return floor + (static_cast<double>(floor) < scaled ? 1 : 0);
}

}  // namespace gptailor
