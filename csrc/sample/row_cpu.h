// One row of logits on the CPU: its sums, its filters, and draws from it.
#pragma once

#include "sample/logits.h"
#include "sample/select.h"

namespace dflash::DFLASH_ISA {

template <class T, class Real>
class Row {
  using Wide = typename Logits<T, Real>::Wide;
  static constexpr int kLanes = Logits<T, Real>::kLanes;
  static constexpr int64_t kTile = 1024;  // tokens; a tile is read twice while it lies in the L1 cache

  // The sum of e = exp((x - max) / temperature), and the sum of e times that exponent.
  struct Tile {
    Wide lane_max;
    Real max, sum, sum_exponent;
  };

 public:
  // Scratch memory that the rows of a thread use one after another.
  struct Workspace {
    Array<Tile> tiles;
    Array<Real> numbers;

    Workspace(int64_t vocab, bool filters) : tiles(tiles_of(vocab)), numbers(filters ? 2 * (vocab + kLanes) : 0) {}
    ~Workspace() { delete[] certain_; }

    // Returns logits that are 0 for the token and -inf for all others.
    const T* point_mass(int64_t token, int64_t vocab) const {
      using One = Vector<Real, 1>;
      if (!certain_) certain_ = new T[vocab];
      for (int64_t i = 0; i < vocab; ++i) store(certain_ + i, i == token ? One{} : One{} - kInfinity);
      return certain_;
    }

   private:
    mutable T* certain_ = nullptr;  // made when it is first needed, which is rare
  };

  struct Sums {
    double e = 0, e_exponent = 0;
    Real entropy() const { return Real(__builtin_log(e) - e_exponent / e); }  // nats
  };

  // Reads what the draws need. A logit of +inf, of which a softmax would make NaN, makes the row a point mass at the
  // first such token.
  static Row read(const T* x, int64_t vocab, Real temperature, const Workspace& workspace) {
    Row row(x, vocab, temperature, workspace);
    row.scan();
    if (row.max_ < kInfinity) return row;
    Row certain(workspace.point_mass(row.argmax_, vocab), vocab, temperature, workspace);
    certain.scan();
    certain.is_certain_ = true;
    return certain;
  }

  Row(const T* x, int64_t vocab, Real temperature, const Workspace& workspace)
      : logits_{x, vocab}, temperature_(temperature == 0 ? Real(1) : temperature), inverse_(1 / temperature_),
        tiles_(workspace.tiles.data()), tile_count_(tiles_of(vocab)), numbers_(workspace.numbers.data()) {}

  // Reads the two largest logits and the first token of the largest.
  void read_maxima() {
    Wide first = Wide{} - kInfinity, second = first;
    for (int64_t t = 0; t < tile_count_; ++t) read_maxima(t, first, second);
    finish_maxima(first, second);
  }

  // Applies the filters. It must follow `read`.
  void filter(const Filters<Real>& filters) {
    pivot_ = pivot_of(filters);
    if (pivot_ == -kInfinity) return;
    lowest_ = smallest_logit(pivot_, temperature_);
    for (int64_t t = 0; t < tile_count_; ++t) read_sums(t, max_);
    kept_ = total();
  }

  Real max() const { return max_; }
  Real second() const { return second_; }
  int64_t argmax() const { return argmax_; }
  Real logit(int64_t token) const { return logits_[token]; }
  Real exponent(Real logit) const { return (logit - max_) * inverse_; }
  const Sums& sums() const { return sums_; }
  bool is_certain() const { return is_certain_; }  // a point mass, because of a logit of +inf

  // Returns the probability of a token at temperature 1, before the filters. This is another pass over memory.
  Real probability_at_1(int64_t token) const {
    double sum = 0;
    for (int64_t t = 0; t < tile_count_; ++t) {
      Wide part{};
      for (int64_t i = begin_of(t); i < begin_of(t + 1); i += kLanes) {
        const Wide x = logits_.at(i);
        part += x > -kInfinity ? exp_of(x - max_) : Wide{};
      }
      sum += sum_lanes(part);
    }
    return Real(exp_of(logit(token) - max_) / sum);
  }

  // The filtered distribution, in z = logits / temperature: exp(z - normaliser) for z of at least the pivot.
  const Sums& kept() const { return kept_; }
  Real pivot() const { return pivot_; }  // -inf if nothing was dropped
  Real normaliser() const { return max_ / temperature_ + Real(__builtin_log(kept_.e)); }
  Masses<T, Real> probabilities() const { return {logits_, lowest_, max_, inverse_, Real(1 / kept_.e)}; }

  // Both draws invert the CDF, in the order of the vocabulary, with one number of [0, 1). This one is of the filtered
  // distribution.
  int64_t draw(double uniform) const {
    const Masses<T, Real> masses{logits_, lowest_, max_, inverse_, Real(1)};
    const int64_t token = draw_by_tiles(uniform * kept_.e, [&](int64_t i) DFLASH_LAMBDA { return masses.at(i); });
    return token < 0 ? argmax_ : token;
  }

  // This one is of any masses: mass(i) is the vector of tokens [i, i + kLanes), 0 where the filters dropped a token. It
  // returns -1 if there is no mass. draw(uniform) cannot follow it.
  template <class Mass>
  int64_t draw(double uniform, Mass&& mass) {
    double all = 0;
    for (int64_t t = 0; t < tile_count_; ++t) {
      Wide sum{};
      if (tiles_[t].max >= lowest_) {
        for (int64_t i = begin_of(t); i < begin_of(t + 1); i += kLanes) sum += mass(i);
      }
      tiles_[t].sum = sum_lanes(sum);
      all += tiles_[t].sum;
    }
    return all > 0 ? draw_by_tiles(uniform * all, mass) : -1;
  }

 private:
  static int64_t tiles_of(int64_t vocab) { return (vocab + kTile - 1) / kTile; }
  int64_t begin_of(int64_t tile) const { return smaller(tile * kTile, logits_.vocab); }
  // 0 * -inf counts as 0.
  template <class X>
  static DFLASH_MEMBER X bounded(X exponent) {
    return larger(exponent, X{} - 1e4f);
  }

  // Does read_maxima() and computes the row's sums, in one pass over memory.
  void scan() {
    Wide first = Wide{} - kInfinity, second = first;
    for (int64_t t = 0; t < tile_count_; ++t) {
      read_maxima(t, first, second);
      read_sums(t, tiles_[t].max);
    }
    finish_maxima(first, second);
    for (int64_t t = 0; t < tile_count_; ++t) {  // make sums relative to the row's maximum, not the tile's
      Tile& tile = tiles_[t];
      const Real shift = bounded(exponent(tile.max)), scale = exp_of(shift);
      tile.sum_exponent = scale * (tile.sum_exponent + shift * tile.sum);
      tile.sum *= scale;
    }
    sums_ = kept_ = total();
  }

  DFLASH_MEMBER void read_maxima(int64_t t, Wide& first, Wide& second) {
    Wide tile_first = Wide{} - kInfinity, tile_second = tile_first;
    for (int64_t i = begin_of(t); i < begin_of(t + 1); i += kLanes) {
      const Wide x = logits_.at(i);  // for a NaN, each of the three returns its second argument
      tile_second = larger(smaller(tile_first, x), tile_second);
      tile_first = larger(x, tile_first);
    }
    second = larger(larger(second, tile_second), smaller(first, tile_first));
    first = larger(first, tile_first);
    tiles_[t].lane_max = tile_first;
    tiles_[t].max = max_lanes(tile_first);
  }

  void finish_maxima(Wide first, const Wide& second) {
    max_ = max_lanes(first);
    int lane = 0;
    while (lane < kLanes - 1 && first[lane] != max_) ++lane;
    first[lane] = second[lane];
    second_ = max_lanes(first);

    argmax_ = 0;
    if (max_ == -kInfinity) return;  // the row holds nothing but -inf and NaN, which counts as -inf
    int64_t t = 0;
    while (t < tile_count_ - 1 && tiles_[t].max != max_) ++t;
    argmax_ = begin_of(t);
    while (argmax_ < logits_.vocab - 1 && logits_[argmax_] != max_) ++argmax_;
  }

  DFLASH_MEMBER void read_sums(int64_t t, Real max) {
    Wide sum{}, sum_exponent{};
    if (tiles_[t].max >= lowest_ && tiles_[t].max > -kInfinity) {
      for (int64_t i = begin_of(t); i < begin_of(t + 1); i += kLanes) {
        const Wide x = logits_.at(i), exponent = (x - max) * inverse_;
        const Wide e = x >= lowest_ ? exp_of(exponent) : Wide{};
        sum += e;
        sum_exponent += e * bounded(exponent);
      }
    }
    tiles_[t].sum = sum_lanes(sum);
    tiles_[t].sum_exponent = sum_lanes(sum_exponent);
  }

  Sums total() const {
    Sums sums;
    for (int64_t t = 0; t < tile_count_; ++t) {
      sums.e += tiles_[t].sum;
      sums.e_exponent += tiles_[t].sum_exponent;
    }
    return sums;
  }

  // ---- filters

  // Returns the smallest z = logits / temperature that the filters keep.
  Real pivot_of(const Filters<Real>& filters) const {
    Real lowest = -kInfinity, pivot = -kInfinity;
    if (filters.top_k > 0 && filters.top_k < logits_.vocab) {
      pivot = pivot_by_count(filters.top_k) / temperature_;
      lowest = smallest_logit(pivot, temperature_);
    }
    if (filters.top_p < 1) pivot = pivot_by_mass(filters.top_p, lowest) / temperature_;
    if (filters.min_p > 0) pivot = larger(pivot, max_ / temperature_ + log_of(filters.min_p));
    return pivot;
  }

  // Returns the count-th largest logit.
  Real pivot_by_count(Real count) const {
    const auto one = [](Wide) DFLASH_LAMBDA { return Wide{} + 1; };
    // At least `count` logits are not below the count-th largest among the maxima of each lane of each tile.
    Real lowest = -kInfinity;
    Weighted<Real> maxima = no_numbers();
    for (int64_t t = 0; t < tile_count_; ++t) maxima.append(tiles_[t].lane_max, tiles_[t].lane_max > -kInfinity);
    if (maxima.count >= count) {
      maxima.weigh(one);
      lowest = maxima.select(-kInfinity, max_, count);
    }
    Weighted<Real> candidates = reaching(lowest);
    candidates.weigh(one);
    return candidates.select(lowest, max_, count);
  }

  // Returns the smallest of the logits from `lowest` on for which those above it have less than top_p of the mass.
  Real pivot_by_mass(Real top_p, Real lowest) const {
    const bool all = lowest == -kInfinity;
    if (all) {
      // The logits below this bound together have less than 1 - top_p of the mass. The factor 0.5 allows for rounding.
      const double share = 0.5 * (1 - top_p) * sums_.e / logits_.vocab;
      lowest = max_ + temperature_ * Real(__builtin_log(share));
    }
    Weighted<Real> candidates = reaching(lowest);
    candidates.weigh([&](Wide x) DFLASH_LAMBDA { return exp_of((x - max_) * inverse_); });
    const double mass = all ? sums_.e : candidates.split(-kInfinity).weight_above;
    return candidates.select(lowest, max_, top_p * mass);
  }

  // Collects the finite logits from `lowest` on.
  Weighted<Real> reaching(Real lowest) const {
    Weighted<Real> found = no_numbers();
    for (int64_t t = 0; t < tile_count_; ++t) {
      if (tiles_[t].max < lowest) continue;
      for (int64_t i = begin_of(t); i < begin_of(t + 1); i += kLanes) {
        const Wide x = logits_.at(i);
        found.append(x, (x >= lowest) & (x > -kInfinity));
      }
    }
    return found;
  }

  Weighted<Real> no_numbers() const { return {numbers_, numbers_ + logits_.vocab + kLanes, 0}; }

  // ---- drawing

  // Returns the first token at which the running sum of masses exceeds the target.
  template <class Mass>
  int64_t draw_by_tiles(double target, Mass&& mass) const {
    double passed = 0;
    for (int64_t t = 0; t < tile_count_; ++t) {
      if (passed + tiles_[t].sum <= target) {
        passed += tiles_[t].sum;
        continue;
      }
      for (int64_t i = begin_of(t); i < begin_of(t + 1); i += kLanes) {
        const Wide masses = mass(i);
        const double sum = sum_lanes(masses);
        if (passed + sum <= target) {
          passed += sum;
          continue;
        }
        for (int lane = 0; lane < kLanes; ++lane) {
          passed += masses[lane];
          if (passed > target) return i + lane;
        }
      }
    }
    return last_of(mass);  // the sum stays below the target because of rounding
  }

  // Returns the last token with a mass, or -1 if there is none.
  template <class Mass>
  int64_t last_of(Mass&& mass) const {
    for (int64_t i = (logits_.vocab - 1) / kLanes * kLanes; i >= 0; i -= kLanes) {
      const Wide masses = mass(i);
      for (int lane = kLanes - 1; lane >= 0; --lane) {
        if (masses[lane] > 0) return i + lane;
      }
    }
    return -1;
  }

  const Logits<T, Real> logits_;
  const Real temperature_, inverse_;
  Tile* const tiles_;
  const int64_t tile_count_;
  Real* const numbers_;

  Real max_, second_, lowest_ = -kInfinity, pivot_ = -kInfinity;
  int64_t argmax_;
  bool is_certain_ = false;
  Sums sums_, kept_;
};

}  // namespace dflash::DFLASH_ISA
