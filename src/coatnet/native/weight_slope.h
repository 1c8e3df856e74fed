// WEIGHT_SLOPE: the gradient of a product's weights, out (width, depth) fp32 = the sum over all pixels (cells) of
// gradient (cells, width) times source (cells, depth), bf16, the latter `source_cell` bytes from pixel to pixel. Two pixels are put side by side in 32 bits, as bf16
// products want them, for both factors; tiles of `out` are shared among threads, so that sums do not depend on them.
// PACK: weights as products want them.
#pragma once
#include <vector>

#include "product.h"

constexpr int64_t AT_ONCE = 512;  // pixels: sums are kept in registers while so many pass, and their pairs in the caches
constexpr int64_t FETCH = 16;     // pixels ahead: columns of a map are read crosswise, which no processor foresees

// Call `put(step, even, odd)` with up to 32 channels, bf16, of each two pixels; of zeros after the last.
template <class Put>
INLINE void each_pair(const char* map, int64_t stride, int64_t pixels, __mmask32 channels, Put put) {
    for (int64_t p = 0; p < pixels; p += 2, map += 2 * stride) {
        _mm_prefetch(map + FETCH * stride, _MM_HINT_T0);
        _mm_prefetch(map + (FETCH + 1) * stride, _MM_HINT_T0);
        put(p / 2, _mm512_maskz_loadu_epi16(channels, map),
            _mm512_maskz_loadu_epi16(p + 1 < pixels ? channels : 0, map + stride));
    }
}

// Side by side in 32 bits: channels `first` to `first` + 15 of two pixels.
template <int FIRST>
INLINE __m512i zip(__m512i even, __m512i odd) {
    constexpr auto both = [](int i) { return int64_t(FIRST + i) | int64_t(FIRST + i + 32) << 16; };
    constexpr auto four = [=](int i) { return both(i) | both(i + 1) << 32; };
    const __m512i places = _mm512_setr_epi64(four(0), four(2), four(4), four(6), four(8), four(10), four(12), four(14));
    return _mm512_permutex2var_epi16(even, places, odd);
}

// R rows of `out` by 32 columns.
template <int R>
void slope_tile(const char* rows, const char* columns, int64_t steps, bool first, float* out, int64_t stride,
                int64_t num_rows, int64_t num_columns) {
    __m512 sums[R][2];
    const __mmask16 masks[2] = {tail(num_columns), tail(num_columns - 16)};
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            sums[r][half] = _mm512_maskz_loadu_ps(first || r >= num_rows ? 0 : masks[half], out + r * stride + 16 * half);
    multiply<BF16, R, false, 4 * R>(rows, 4, columns, 1, 0, steps, sums);
#pragma GCC unroll 12
    for (int r = 0; r < R; r++)
        for (int half = 0; half < 2; half++)
            _mm512_mask_storeu_ps(out + r * stride + 16 * half, r >= num_rows ? 0 : masks[half], sums[r][half]);
}

template <int R>
void weight_slope_by(const Op& op, int64_t thread, int64_t threads) {
    const int64_t tiles = (op.width + R - 1) / R, panels = (op.depth + PANEL - 1) / PANEL;
    const int64_t tile_bytes = AT_ONCE / 2 * 4 * R, panel_bytes = AT_ONCE / 2 * 128;
    const bool by_panel = op.width <= op.depth;  // of the narrower factor every thread makes all pairs beforehand
    const int64_t held = by_panel ? tiles : panels;
    const Share share(tiles * panels, thread, threads);
    std::vector<char> rows((by_panel ? tiles : 1) * tile_bytes), columns((by_panel ? 1 : panels) * panel_bytes);
    for (int64_t start = 0; start < op.cells; start += AT_ONCE) {
        const int64_t pixels = std::min(AT_ONCE, op.cells - start), steps = (pixels + 1) / 2;
        auto zip_rows = [&](int64_t tile, char* out) {
            each_pair(op.gradient + 2 * (start * op.width + tile * R), 2 * op.width, pixels,
                      tail(std::min<int64_t>(R, op.width - tile * R)),
                      [out](int64_t step, __m512i even, __m512i odd) INLINE_LAMBDA {
                          _mm512_mask_storeu_epi32(out + 4 * R * step, (1 << R) - 1, zip<0>(even, odd));
                      });
        };
        auto zip_columns = [&](int64_t panel, char* out) {
            const int64_t column = panel * PANEL;
            const __mmask32 channels = tail(op.depth - column) | __mmask32(tail(op.depth - column - 16)) << 16;
            each_pair(op.source + start * op.source_cell + 2 * column, op.source_cell, pixels, channels,
                      [out](int64_t step, __m512i even, __m512i odd) INLINE_LAMBDA {
                          _mm512_storeu_si512(out + 128 * step, zip<0>(even, odd));
                          _mm512_storeu_si512(out + 128 * step + 64, zip<16>(even, odd));
                      });
        };
        for (int64_t i = 0; i < held; i++)
            by_panel ? zip_rows(i, rows.data() + i * tile_bytes) : zip_columns(i, columns.data() + i * panel_bytes);
        for (int64_t unit = share.first, next; unit < share.last; unit = next) {
            const int64_t other = unit / held;
            next = std::min(share.last, (other + 1) * held);
            by_panel ? zip_columns(other, columns.data()) : zip_rows(other, rows.data());
            for (int64_t i = unit - other * held; i < next - other * held; i++) {
                const int64_t tile = by_panel ? i : other, panel = by_panel ? other : i, column = panel * PANEL;
                slope_tile<R>(rows.data() + (by_panel ? i * tile_bytes : 0),
                              columns.data() + (by_panel ? 0 : i * panel_bytes), steps, start == 0 && !op.adds,
                              (float*)op.out + tile * R * op.depth + column, op.depth, op.width - tile * R,
                              op.depth - column);
            }
        }
    }
}

// The rows of a tile are those that divide the width best: 12 for most of the family, 8 for 64, 10 for 40 and 160.
inline void weight_slope(const Op& op, int64_t thread, int64_t threads) {
    auto done = [&](int64_t rows) { return (op.width + rows - 1) / rows * rows; };
    if (done(12) <= std::min(done(10), done(8))) return weight_slope_by<12>(op, thread, threads);
    if (done(10) <= done(8)) return weight_slope_by<10>(op, thread, threads);
    weight_slope_by<8>(op, thread, threads);
}

// PACK: weights (depth, width) fp32, `source_line` bytes from step to step of K and `source_cell` from column to column,
// one of which is 4 -> bf16 panels, (panels, depth / 2, 32, 2); zeros beyond the last. 16 steps of 16 columns at a time,
// in the order that the weights lie in.
inline void pack_weights(const Op& op, int64_t thread, int64_t threads) {
    constexpr int64_t STEPS = 16, K = 2 * STEPS;
    const int64_t steps = (op.depth + 1) / 2, panels = (op.width + PANEL - 1) / PANEL;
    const Share share(panels * 2, thread, threads);
    auto source = [&](int64_t unit, int64_t k) { return op.source + unit * 16 * op.source_cell + k * op.source_line; };
    auto packed = [&](int64_t unit, int64_t k) { return op.out + ((unit / 2 * steps + k / 2) * 2 + unit % 2) * 64; };
    auto by_rows = [&](int64_t unit, int64_t first) {
        const __mmask16 columns = tail(op.width - unit * 16);
        for (int64_t k = first; k < std::min(first + K, op.depth); k += 2) {
            const __mmask16 odd = k + 1 < op.depth ? columns : 0;
            _mm512_storeu_si512(packed(unit, k), pairs(_mm512_maskz_loadu_ps(columns, source(unit, k)),
                                                       _mm512_maskz_loadu_ps(odd, source(unit, k + 1))));
        }
    };
    auto by_columns = [&](int64_t unit, int64_t first) {
        __m512i rows[16];
        for (int c = 0; c < 16; c++) {
            const int64_t count = unit * 16 + c < op.width ? op.depth - first : 0;
            const char* from = source(unit, first) + c * op.source_cell;
            rows[c] = (__m512i)_mm512_cvtne2ps_pbh(_mm512_maskz_loadu_ps(tail(count - 16), from + 64),
                                                   _mm512_maskz_loadu_ps(tail(count), from));
        }
        transpose(rows);
        for (int64_t k = first; k < std::min(first + K, op.depth); k += 2)
            _mm512_storeu_si512(packed(unit, k), rows[(k - first) / 2]);
    };
    if (op.source_cell == 4)
        for (int64_t k = 0; k < op.depth; k += K)
            for (int64_t unit = share.first; unit < share.last; unit++) by_rows(unit, k);
    else
        for (int64_t unit = share.first; unit < share.last; unit++)
            for (int64_t k = 0; k < op.depth; k += K) by_columns(unit, k);
}
