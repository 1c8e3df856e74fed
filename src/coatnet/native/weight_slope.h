// WEIGHT_SLOPE: the gradient of a product's weights, out (width, segments, depth) fp32 = the sum over all pixels (cells) of
// gradient (cells, width) times source (cells, depth), bf16, the latter `source_cell` bytes from pixel to pixel and
// `segment_stride` bytes from segment to segment; where `sums` is given, the bias's too (width). Two pixels are put side by
// side in 32 bits, as bf16 products want them, for both factors; tiles of `out` are shared among threads, so that sums do
// not depend on them. Where `images` is 2, `out` and `sums` are two, of half the pixels each, to be added up: then a thread
// reads what it wrote itself.
// PACK: weights as products want them.
#pragma once

#include "product.h"

// Pixels that pass while sums are kept in registers, and their pairs in the caches; divides 28 x 28 and 56 x 56.
constexpr int64_t AT_ONCE = 392;
constexpr int64_t FETCH = 64;             // pixels ahead: a map is read crosswise here, which no processor foresees
constexpr int64_t TILES = 8, PANELS = 3;  // made together: 192 bytes of a pixel

// R rows of `out` by 32 columns. Those of the next tile, which lie below, come from far away: they are fetched meanwhile.
template <int R>
void slope_tile(const char* rows, const char* columns, int64_t steps, bool first, float* out, int64_t stride,
                int64_t num_rows, int64_t num_columns) {
    __m512 sums[R][2];
    const __mmask16 masks[2] = {tail(num_columns), tail(num_columns - 16)};
#pragma GCC unroll 12
    for (int r = R; r < 2 * R; r++)
        for (int half = 0; half < 2; half++) __builtin_prefetch(out + r * stride + 16 * half, 1, 3);
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

// Both factors over the pixels that pass at once, and the tiles of their product.
template <int R>
struct Factors {
    const Op& op;
    int64_t start, pixels;
    // A line more than they hold, so that what is written side by side falls into different sets of the first cache.
    static constexpr int64_t TILE_BYTES = AT_ONCE / 2 * 4 * R + 64, PANEL_BYTES = AT_ONCE / 2 * 128 + 64;

    // Pairs of R channels for each tile from `first` on: cache lines hold parts of several.
    void zip_tiles(int64_t first, int64_t last, char* out, bool with_sums) const {
        const char* map = op.gradient + 2 * (start * op.width + first * R);
        const int64_t whole = std::min(last, op.width / R);
        const int64_t num_bytes = 2 * R * (last - first);
        const __m512bh ones = (__m512bh)_mm512_set1_epi16(0x3f80);
        __m512 sums[TILES] = {};
        each_pair(map, 2 * op.width, num_bytes, [&](const char* even, const char* odd, int64_t step) INLINE_LAMBDA {
            auto pair = [&](int64_t t, __mmask16 channels) INLINE_LAMBDA {
                const __m512i pairs = zip<0>(read(even, t * R, channels), read(odd, t * R, channels));
                _mm512_mask_storeu_epi32(out + t * TILE_BYTES + 4 * R * step, (1 << R) - 1, pairs);
                if (with_sums) sums[t] = _mm512_dpbf16_ps(sums[t], (__m512bh)pairs, ones);
            };
            for (int64_t t = 0; t < whole - first; t++) pair(t, (1 << R) - 1);
            if (whole < last) pair(whole - first, tail(op.width - whole * R));
        });
        if (!with_sums) return;
        for (int64_t t = first; t < last; t++) {
            const __mmask16 channels = tail(std::min<int64_t>(R, op.width - t * R)), added = begins() ? 0 : channels;
            float* const to = op.sums + t * R;
            _mm512_mask_storeu_ps(to, channels, _mm512_add_ps(sums[t - first], _mm512_maskz_loadu_ps(added, to)));
        }
    }
    void zip_panels(int64_t first, int64_t last, char* out) const {
        const int64_t column = first % per_segment() * PANEL;
        const char* map = op.source + start * op.source_cell + first / per_segment() * op.segment_stride + 2 * column;
        const int64_t num_bytes = 2 * PANEL * (last - first);
        each_pair(map, op.source_cell, num_bytes, [&](const char* even, const char* odd, int64_t step) INLINE_LAMBDA {
            for (int64_t p = 0; p < last - first; p++) {
                const int64_t left = op.depth - column - p * PANEL;
                const __mmask32 channels = left >= PANEL ? ~0u : (1u << left) - 1;
                const __m512i a = read(even, p * PANEL, channels), b = read(odd, p * PANEL, channels);
                _mm512_storeu_si512(out + p * PANEL_BYTES + 128 * step, zip<0>(a, b));
                _mm512_storeu_si512(out + p * PANEL_BYTES + 128 * step + 64, zip<16>(a, b));
            }
        });
    }
    // Call `put(even, odd, step)` for each two pixels; the odd one is null after the last.
    template <class Put>
    INLINE void each_pair(const char* map, int64_t stride, int64_t num_bytes, Put put) const {
        for (int64_t p = 0; p < pixels; p += 2, map += 2 * stride) {
            for (int64_t at = 0; at < num_bytes; at += 64) {
                _mm_prefetch(map + FETCH * stride + at, _MM_HINT_T0);
                _mm_prefetch(map + (FETCH + 1) * stride + at, _MM_HINT_T0);
            }
            put(map, p + 1 < pixels ? map + stride : nullptr, p / 2);
        }
    }
    static INLINE __m512i read(const char* pixel, int64_t channel, __mmask32 mask) {
        return _mm512_maskz_loadu_epi16(pixel ? mask : 0, pixel + 2 * channel);
    }
    void multiply(int64_t tile, const char* rows, int64_t panel, const char* columns) const {
        const int64_t column = panel % per_segment() * PANEL, stride = op.segments * op.depth;
        slope_tile<R>(rows, columns, (pixels + 1) / 2, begins(),
                      (float*)op.out + tile * R * stride + panel / per_segment() * op.depth + column, stride,
                      op.width - tile * R, op.depth - column);
    }
    bool begins() const { return start == 0 && !op.adds; }
    int64_t per_segment() const { return (op.depth + PANEL - 1) / PANEL; }
    // The end of what is zipped with panel `first`: a few of the same segment.
    int64_t last_beside(int64_t first, int64_t end) const {
        return std::min({first + PANELS, (first / per_segment() + 1) * per_segment(), end});
    }
};

// Of the narrower factor every thread makes all pairs, of the wider one those of its own share. A panel stays in the first
// cache while tiles pass.
template <int R>
void weight_slope_by(const Op& op, int64_t thread, int64_t threads) {
    using F = Factors<R>;
    const int64_t tiles = (op.width + R - 1) / R, panels = op.segments * ((op.depth + PANEL - 1) / PANEL);
    const bool by_panel = op.width <= op.segments * op.depth;
    char* const rows = kept<struct Rows>((by_panel ? tiles : TILES) * F::TILE_BYTES);
    char* const columns = kept<struct Columns>((by_panel ? PANELS : panels) * F::PANEL_BYTES);
    for (int64_t start = 0; start < op.cells; start += AT_ONCE) {
        const F factors = {op, start, std::min(AT_ONCE, op.cells - start)};
        if (by_panel) {
            const Share own(tiles * panels, thread, threads);
            for (int64_t t = 0; t < tiles; t += TILES)
                factors.zip_tiles(t, std::min(t + TILES, tiles), rows + t * F::TILE_BYTES, op.sums && thread == 0);
            const int64_t end = (own.last + tiles - 1) / tiles;
            for (int64_t first = own.first / tiles, last; first * tiles < own.last; first = last) {
                last = factors.last_beside(first, end);
                factors.zip_panels(first, last, columns);
                for (int64_t p = first; p < last; p++) {
                    const int64_t end = std::min(tiles, own.last - p * tiles);
                    for (int64_t t = std::max<int64_t>(0, own.first - p * tiles); t < end; t++)
                        factors.multiply(t, rows + t * F::TILE_BYTES, p, columns + (p - first) * F::PANEL_BYTES);
                }
            }
        } else {
            const Share own(tiles, thread, threads);
            for (int64_t p = 0, last; p < panels; p = last) {
                last = factors.last_beside(p, panels);
                factors.zip_panels(p, last, columns + p * F::PANEL_BYTES);
            }
            for (int64_t first = own.first; first < own.last; first += TILES) {
                const int64_t last = std::min(first + TILES, own.last);
                factors.zip_tiles(first, last, rows, op.sums);
                for (int64_t p = 0; p < panels; p++)
                    for (int64_t t = first; t < last; t++)
                        factors.multiply(t, rows + (t - first) * F::TILE_BYTES, p, columns + p * F::PANEL_BYTES);
            }
        }
    }
}

// The rows of a tile are those that divide the width best: 12 for most of the family, 8 for 64, 10 for 40 and 160.
inline void weight_slope_of(const Op& op, int64_t thread, int64_t threads) {
    auto done = [&](int64_t rows) { return (op.width + rows - 1) / rows * rows; };
    if (done(12) <= std::min(done(10), done(8))) return weight_slope_by<12>(op, thread, threads);
    if (done(10) <= done(8)) return weight_slope_by<10>(op, thread, threads);
    weight_slope_by<8>(op, thread, threads);
}

inline void weight_slope(const Op& op, int64_t thread, int64_t threads) {
    const int64_t a_part = std::max<int64_t>(1, threads / op.images);  // threads
    for (int64_t unit = thread; unit < op.images * a_part; unit += threads) {
        const int64_t part = unit / a_part;
        const Share pixels(op.cells, part, op.images);
        Op own = op;
        own.cells = pixels.last - pixels.first;
        own.gradient += 2 * op.width * pixels.first;
        own.source += op.source_cell * pixels.first;
        own.out += 4 * part * op.width * op.segments * op.depth;
        if (own.sums) own.sums += part * op.width;
        if (own.cells == 0) {  // one pixel has no second half
            if (op.adds || unit % a_part) continue;
            std::fill_n((float*)own.out, op.width * op.segments * op.depth, 0.0f);
            if (own.sums) std::fill_n(own.sums, op.width, 0.0f);
            continue;
        }
        weight_slope_of(own, unit % a_part, a_part);
    }
}

// PACK: weights (depth, width) fp32, `source_line` bytes from step to step of K and `source_cell` from column to column,
// one of which is 4 -> bf16 panels, (panels, depth / 2, 32, 2); zeros beyond the last. 16 steps of 16 columns at a time,
// in the order that the weights lie in.
inline void pack_weights(const Op& op, int64_t thread, int64_t threads) {
    constexpr int64_t PACK_AHEAD = 256;  // bytes along each of many lines, more than the processor follows
    constexpr int64_t STEPS = 16, K = 2 * STEPS;
    const int64_t steps = (op.depth + 1) / 2, panels = (op.width + PANEL - 1) / PANEL;
    const Share share(panels * 2, thread, threads);
    auto source = [&](int64_t unit, int64_t k) { return op.source + unit * 16 * op.source_cell + k * op.source_line; };
    auto packed = [&](int64_t unit, int64_t k) { return op.out + ((unit / 2 * steps + k / 2) * 2 + unit % 2) * 64; };
    auto by_rows = [&](int64_t unit, int64_t first) {
        const __mmask16 columns = tail(op.width - unit * 16);
        for (int64_t k = first; k < std::min(first + K, op.depth); k += 2) {
            const __mmask16 odd = k + 1 < op.depth ? columns : 0;
            _mm_prefetch(source(unit, k) + PACK_AHEAD, _MM_HINT_T0);
            _mm_prefetch(source(unit, k + 1) + PACK_AHEAD, _MM_HINT_T0);
            _mm512_storeu_si512(packed(unit, k), pairs(_mm512_maskz_loadu_ps(columns, source(unit, k)),
                                                       _mm512_maskz_loadu_ps(odd, source(unit, k + 1))));
        }
    };
    auto by_columns = [&](int64_t unit, int64_t first) {
        __m512i rows[16];
        for (int c = 0; c < 16; c++) {
            const int64_t count = unit * 16 + c < op.width ? op.depth - first : 0;
            const char* from = source(unit, first) + c * op.source_cell;
            _mm_prefetch(from + PACK_AHEAD, _MM_HINT_T0);
            _mm_prefetch(from + PACK_AHEAD + 64, _MM_HINT_T0);
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
