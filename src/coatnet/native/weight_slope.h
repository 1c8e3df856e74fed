// WEIGHT_SLOPE: the gradient of a product's weights, out (width, depth) fp32 = the sum over all pixels (cells) of
// gradient (cells, width) times source (cells, depth), bf16, the latter `source_cell` bytes from pixel to pixel. Two pixels are put side by side in 32 bits, as bf16
// products want them, for both factors; tiles of `out` are shared among threads, so that sums do not depend on them.
// PACK: weights as products want them.
#pragma once
#include <vector>

#include "product.h"

constexpr int64_t AT_ONCE = 1024;  // pixels: sums are kept in registers while so many pass

// Put pairs of pixels side by side: 16 channels at most, (pixels / 2) steps of `step` bytes.
INLINE void zip(const char* map, int64_t stride, int64_t pixels, __mmask16 channels, char* out, int64_t step, __mmask16 stored) {
    for (int64_t p = 0; p < pixels; p += 2, map += 2 * stride, out += step) {
        const __m512i even = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(channels, map));
        const __m512 odd = load<BF16>(map + stride, p + 1 < pixels ? channels : 0);
        _mm512_mask_storeu_epi32(out, stored, _mm512_or_si512(even, _mm512_castps_si512(odd)));
    }
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
    const Share share(tiles * panels, thread, threads);
    const int64_t tile_bytes = AT_ONCE / 2 * 4 * R;
    std::vector<char> rows(tiles * tile_bytes), columns(AT_ONCE / 2 * 128);
    for (int64_t start = 0; start < op.cells; start += AT_ONCE) {
        const int64_t pixels = std::min(AT_ONCE, op.cells - start), steps = (pixels + 1) / 2;
        const char* gradient = op.gradient + 2 * start * op.width;
        const char* source = op.source + start * op.source_cell;
        for (int64_t t = 0; t < tiles; t++)
            zip(gradient + 2 * t * R, 2 * op.width, pixels, tail(std::min<int64_t>(R, op.width - t * R)),
                rows.data() + t * tile_bytes, 4 * R, (1 << R) - 1);
        for (int64_t unit = share.first, next; unit < share.last; unit = next) {
            const int64_t panel = unit / tiles, column = panel * PANEL;
            next = std::min(share.last, (panel + 1) * tiles);
            for (int64_t half = 0; half < PANEL; half += 16)
                zip(source + 2 * (column + half), op.source_cell, pixels, tail(op.depth - column - half),
                    columns.data() + 4 * half, 128, 0xffff);
            for (int64_t t = unit % tiles; t < unit % tiles + next - unit; t++)
                slope_tile<R>(rows.data() + t * tile_bytes, columns.data(), steps, start == 0 && !op.adds,
                              (float*)op.out + t * R * op.depth + column, op.depth, op.width - t * R, op.depth - column);
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
// one of which is 4 -> bf16 panels, (panels, depth / 2, 32, 2); zeros beyond the last.
inline void pack_weights(const Op& op, int64_t thread, int64_t threads) {
    const int64_t steps = (op.depth + 1) / 2, panels = (op.width + PANEL - 1) / PANEL;
    const __m512i places = _mm512_mullo_epi32(
        _mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(int(op.source_cell)));
    const Share share(panels * 2, thread, threads);
    for (int64_t unit = share.first; unit < share.last; unit++) {
        const int64_t column = unit * 16;
        const __mmask16 mask = tail(op.width - column);
        const char* from = op.source + column * op.source_cell;
        char* to = op.out + unit / 2 * steps * 128 + unit % 2 * 64;
        auto row = [&](int64_t k) INLINE_LAMBDA {
            const __mmask16 here = k < op.depth ? mask : 0;
            const char* at = from + k * op.source_line;
            return op.source_cell == 4 ? _mm512_maskz_loadu_ps(here, at)
                                       : _mm512_mask_i32gather_ps(_mm512_setzero_ps(), here, places, at, 1);
        };
        for (int64_t k = 0; k < steps; k++, to += 128) _mm512_storeu_si512(to, pairs(row(2 * k), row(2 * k + 1)));
    }
}
