// SPDX-License-Identifier: MIT
// Winograd's minimal filtering as polynomial evaluation and interpolation (Winograd 1980; Lavin & Gray,
// arXiv:1509.09308; Barabasz et al., arXiv:1803.10986 for the choice of points).
//
// Points are 0, +-q[0], ..., +-q[n - 1] and infinity. An output of F(m, r) is y = A^T [(G g) * (B^T d)] with
//   (G g)(a)   = g(a) / N(a),               N(a) = prod over the other finite points b of (a - b)
//   (B^T d)(a) = [prod over the other finite points b of (x - b)] applied to d: the coefficient of x^i meets d[i]
//   (A^T M)_r  = sum over a of a^r M(a), and M(infinity) in the last output.
// The points of a class n, that is the first n pairs, are some of those of a greater class. So a tile of a smaller
// class can use the same transformed weights, if its inputs are multiplied by the factors (a^2 - q[k]^2) that N(a) has
// too many: the last tiles of a row are cut exactly, without a second set of weights.
#pragma once

namespace repvgg {

struct WinogradPoints {
  int pairs;
  double q[3];

  constexpr int points() const { return 2 * pairs + 2; }
};

// Tiles 2, 4 and 6 wide for a filter of 3. (3/4, 3/2) has an error a quarter of the usual (1, 2).
inline constexpr WinogradPoints kPoints2 = {1, {1.0, 0.0, 0.0}};
inline constexpr WinogradPoints kPoints4 = {2, {0.75, 1.5, 0.0}};
inline constexpr WinogradPoints kPoints6 = {3, {1.0, 2.0, 0.5}};

// Ascending coefficients.
struct WinogradPolynomial {
  double c[4];
};

// prod over k < n, k != skip of (t - q[k]^2), a polynomial in t = x^2.
constexpr WinogradPolynomial winograd_polynomial(const WinogradPoints& set, int n, int skip) {
  WinogradPolynomial result = {{1, 0, 0, 0}};
  int degree = 0;
  for (int k = 0; k < n; ++k) {
    if (k == skip) continue;
    ++degree;
    for (int i = degree; i >= 0; --i) {
      result.c[i] = (i > 0 ? result.c[i - 1] : 0) - set.q[k] * set.q[k] * (i < degree ? result.c[i] : 0);
    }
  }
  return result;
}

// The factors that N(a) has and class n lacks, for a^2 = square.
constexpr double winograd_dropped(const WinogradPoints& set, int n, double square) {
  double product = 1;
  for (int k = n; k < set.pairs; ++k) product *= square - set.q[k] * set.q[k];
  return product;
}

// N(+-q[k]), or N(0) for k = -1.
constexpr double winograd_norm(const WinogradPoints& set, int k) {
  const double square = k < 0 ? 0 : set.q[k] * set.q[k];
  double product = k < 0 ? 1 : 2 * square;
  for (int i = 0; i < set.pairs; ++i) {
    if (i != k) product *= square - set.q[i] * set.q[i];
  }
  return product;
}

// B^T of class n, in the form in which it is computed: for the point 0, `all` over d[0], d[2], ...; for infinity, over
// d[1], d[3], ...; for +-q[k], part[k] over d[2], d[4], ... plus or minus q[k] times the same over d[1], d[3], ...
// Values at a point are multiplied by its `dropped` factor.
struct WinogradInput {
  float all[4], part[3][4], q[3], dropped_zero, dropped[3];
};

constexpr WinogradInput winograd_input(const WinogradPoints& set, int n) {
  WinogradInput table = {};
  const WinogradPolynomial all = winograd_polynomial(set, n, -1);
  for (int i = 0; i < 4; ++i) table.all[i] = static_cast<float>(all.c[i]);
  for (int k = 0; k < n; ++k) {
    const WinogradPolynomial part = winograd_polynomial(set, n, k);
    for (int i = 0; i < 4; ++i) table.part[k][i] = static_cast<float>(part.c[i]);
    table.q[k] = static_cast<float>(set.q[k]);
    table.dropped[k] = static_cast<float>(winograd_dropped(set, n, set.q[k] * set.q[k]));
  }
  table.dropped_zero = static_cast<float>(winograd_dropped(set, n, 0));
  return table;
}

// A^T: power[k][r] = q[k]^r.
struct WinogradOutput {
  float power[3][8];
};

constexpr WinogradOutput winograd_output(const WinogradPoints& set) {
  WinogradOutput table = {};
  for (int k = 0; k < set.pairs; ++k) {
    double power = 1;
    for (int r = 0; r < 8; ++r, power *= set.q[k]) table.power[k][r] = static_cast<float>(power);
  }
  return table;
}

// G, [points][taps of the filter]: rows 0, +q[0], -q[0], ..., infinity. With `polyphase` the filter is split by the
// parity of its taps: taps 0 and 2 are the filter that the points evaluate, and a last row takes tap 1 as it is.
struct WinogradWeight {
  double g[8][3];
};

constexpr WinogradWeight winograd_weight(const WinogradPoints& set, bool polyphase) {
  WinogradWeight table = {};
  const int last = set.points() - 1;
  for (int p = 0; p < last; ++p) {
    const int k = p == 0 ? -1 : (p - 1) / 2;
    const double a = p == 0 ? 0 : p % 2 == 1 ? set.q[k] : -set.q[k], norm = winograd_norm(set, k);
    table.g[p][0] = 1 / norm;
    table.g[p][1] = polyphase ? 0 : a / norm;
    table.g[p][2] = (polyphase ? a : a * a) / norm;
  }
  table.g[last][2] = 1;
  if (polyphase) table.g[last + 1][1] = 1;
  return table;
}

}  // namespace repvgg
