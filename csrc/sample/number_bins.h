// A bin for each number of a 16-bit dtype, for a histogram that finds a pivot exactly.
#pragma once

#include <type_traits>

#include "common/device.h"

namespace dflash::DFLASH_ISA {

constexpr int kBins = 1024;

// The numbers of a 16-bit dtype between two bounds, each of which has a bin; the first is the upper bound's. Where there
// are too many, those of at most `floor` in magnitude share one bin, whose mass is not known.
template <class T>
class NumberBins {
 public:
  // `low` and `high` must be near enough for fits().
  DFLASH_INLINE NumberBins(float low, float high) : floor_(0), highest_(rank_of(from_float<T>(high))) {
    const int lowest = rank_of(from_float<T>(low)) - 1;  // it may have been rounded up by one
    const int excess = highest_ - lowest + 1 - kBins;
    if (lowest <= rank_of(from_float<T>(-kInfinity))) return;
    fits_ = excess <= 0;
    count_ = min(highest_ - lowest + 1, kBins);
    // Most float16 logits of a row would share one bin.
    if (std::is_same_v<T, __half> || fits_ || highest_ <= 0) return;
    const int of_both = (excess + 1) / 2, of_positive = highest_ + 1 - kBins;
    floor_ = of_both <= -lowest ? of_both : of_positive;
    highest_ = rank_of(from_float<T>(high));
    fits_ = true;
  }
  DFLASH_INLINE bool fits() const { return fits_; }
  DFLASH_INLINE uint32_t count() const { return count_; }  // of the bins
  // Returns the bin of a number; none of [0, count()) if it is outside, or NaN.
  DFLASH_INLINE uint32_t bin_of(T x) const { return highest_ - rank_of(x); }
  // Whether this bin and all before it have one number each.
  DFLASH_INLINE bool is_exact(int bin) const { return floor_ == 0 || bin < highest_; }
  DFLASH_INLINE float number_of(int bin) const {
    const int rank = highest_ - bin, sign = rank >> 31, magnitude = (rank ^ sign) - sign;
    const short bits = (magnitude > 0 ? magnitude + floor_ : 0) | (sign & 0x8000);
    return to_float(*reinterpret_cast<const T*>(&bits));
  }

 private:
  // Ranks rise with the numbers; that of 0 is 0.
  DFLASH_INLINE int rank_of(T x) const {
    const int bits = *reinterpret_cast<const short*>(&x), sign = bits >> 31;
    return (max((bits & 0x7fff) - floor_, 0) ^ sign) - sign;
  }

  int floor_, highest_, count_ = 0;
  bool fits_ = false;
};

}  // namespace dflash::DFLASH_ISA
