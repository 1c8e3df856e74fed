// GELU and its derivative on 16 floats, from polynomials on 16 equal pieces. A coefficient of all pieces is one vector,
// from which a permutation picks: additions and permutations run beside the multiply-adds that products need.
//
// gelu(x) = max(x, 0) - G(|x|), gelu'(x) = 1/2 + sign(x) D(|x|), with G(u) = u Phi(-u) and D(u) = Phi(u) - 1/2 + u phi(u).
// The compiler fits the polynomials, through the Chebyshev nodes of each piece.
#pragma once
#include "vector.h"

namespace gelu_pieces {

constexpr int PIECES = 16;

constexpr double phi(double u) {  // the normal density
    double e = 1, term = 1;
    const double y = -u * u / 2048;
    for (int k = 1; k < 20; k++) e += term *= y / k;
    for (int k = 0; k < 10; k++) e *= e;
    return e * 0.39894228040143267794;
}

constexpr double phi_integral(double u) {  // from 0 to u
    double sum = u, term = u;
    for (int k = 1; k < 200; k++) sum += term *= u * u / (2 * k + 1);
    return phi(u) * sum;
}

constexpr double G(double u) { return u * (0.5 - phi_integral(u)); }
constexpr double D(double u) { return phi_integral(u) + u * phi(u); }

// Polynomials on pieces of `width`, the first with its middle at `first` times that: in u itself, or in r, -1/2 to 1/2 from
// the middle, where higher powers of u would cost the last digits.
template <int DEGREE, bool IN_U>
struct Pieces {
    alignas(64) float coefficient[DEGREE + 1][PIECES] = {};

    constexpr Pieces(double (*function)(double), double width, double first) {
        constexpr double NODES[][5] = {{-0.8660254038, 0, 0.8660254038}, {-0.9238795325, -0.3826834324, 0.3826834324, 0.9238795325},
                                       {-0.9510565163, -0.5877852523, 0, 0.5877852523, 0.9510565163}};
        for (int piece = 0; piece < PIECES; piece++) {
            double node[DEGREE + 1] = {}, newton[DEGREE + 1] = {}, power[DEGREE + 1] = {};
            for (int k = 0; k <= DEGREE; k++) {
                const double r = NODES[DEGREE - 2][k] / 2, u = (piece + first + r) * width;
                node[k] = IN_U ? u : r;
                newton[k] = function(u);
            }
            for (int step = 1; step <= DEGREE; step++)
                for (int k = DEGREE; k >= step; k--) newton[k] = (newton[k] - newton[k - 1]) / (node[k] - node[k - step]);
            for (int k = DEGREE; k >= 0; k--) {  // Newton's form, multiplied out
                for (int d = DEGREE; d > 0; d--) power[d] = power[d - 1] - node[k] * power[d];
                power[0] = newton[k] - node[k] * power[0];
            }
            for (int d = 0; d <= DEGREE; d++) coefficient[d][piece] = float(power[d]);
        }
    }

    // The value at u or r of the piece whose number is in the low bits of `piece`.
    INLINE __m512 operator()(__m512i piece, __m512 at) const {
        __m512 sum = _mm512_permutexvar_ps(piece, _mm512_load_ps(coefficient[DEGREE]));
#pragma GCC unroll 4
        for (int d = DEGREE - 1; d >= 0; d--)
            sum = _mm512_fmadd_ps(sum, at, _mm512_permutexvar_ps(piece, _mm512_load_ps(coefficient[d])));
        return sum;
    }
};

constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23: after adding it, the low bits are the whole part
constexpr float EXACT_END = 5.5f;     // beyond, G is less than the errors
constexpr Pieces<4, false> EXACT_G(G, EXACT_END / PIECES, 0.5);

INLINE __m512 exact_G(__m512 x) {
    const float last = PIECES - 0.5001f;  // a little within the last piece
    const __m512 end = _mm512_set1_ps((last + 0.5f) * EXACT_END / PIECES);
    const __m512 within = _mm512_fmsub_ps(_mm512_range_ps(x, end, 10), _mm512_set1_ps(PIECES / EXACT_END), _mm512_set1_ps(0.5f));
    const __m512 n = _mm512_add_ps(within, _mm512_set1_ps(MAGIC));
    return EXACT_G(_mm512_castps_si512(n), _mm512_sub_ps(within, _mm512_sub_ps(n, _mm512_set1_ps(MAGIC))));
}

// Pieces of a quarter: where it is added, the last digits of MAGIC / 4 count quarters.
constexpr float QUARTER = 0.25f, LAST = (PIECES - 0.5001f) * QUARTER;
constexpr Pieces<2, true> SHORT_G(G, QUARTER, 0), SHORT_D(D, QUARTER, 0);

struct Place {
    __m512i piece;
    __m512 u;
};

INLINE Place short_place(__m512 x) {
    const __m512 u = _mm512_range_ps(x, _mm512_set1_ps(LAST), 10);
    return {_mm512_castps_si512(_mm512_add_ps(u, _mm512_set1_ps(MAGIC * QUARTER))), u};
}

}  // namespace gelu_pieces

// Largest error: EXACT 3e-7, else 3e-4, below what bf16 and 8 bit round away.
template <bool EXACT>
INLINE __m512 gelu(__m512 x) {
    using namespace gelu_pieces;
    const __m512 positive = _mm512_max_ps(_mm512_setzero_ps(), x);
    if constexpr (EXACT) return _mm512_sub_ps(positive, exact_G(x));
    const Place at = short_place(x);
    return _mm512_sub_ps(positive, SHORT_G(at.piece, at.u));
}

struct Gelu {
    __m512 value, slope;
};

// Both at once. Largest error 3e-4 of the value, 1e-3 of the derivative. A NaN stays one in the value alone.
INLINE Gelu gelu_with_slope(__m512 x) {
    using namespace gelu_pieces;
    const Place at = short_place(x);
    const __m512 sign = _mm512_and_ps(x, _mm512_set1_ps(-0.0f));
    const __m512 half = _mm512_xor_ps(SHORT_D(at.piece, at.u), sign);
    return {_mm512_sub_ps(_mm512_max_ps(_mm512_setzero_ps(), x), SHORT_G(at.piece, at.u)),
            _mm512_add_ps(half, _mm512_set1_ps(0.5f))};
}
