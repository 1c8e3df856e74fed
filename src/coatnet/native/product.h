// Matrix products of a few rows at a time, with all that follows a product done while its result is in registers.
//
// A is rows of activations as they lie in memory: fp32, bf16 or unsigned 8 bit. W is packed in panels of 32 columns:
// for each 32-bit step of K (1 fp32, 2 bf16 or 4 int8 values) the 32 columns side by side. One step multiplies a
// broadcast of 32 bits of A with two vectors of W, so the three precisions share one loop.
#pragma once
#include <algorithm>

#include "gelu.h"

constexpr int PANEL = 32;  // columns of W side by side
constexpr int ROWS = 14;   // rows of A at once: 28 of the 32 registers hold sums; 14, 28, 56 and 112 px all divide

template <int TYPE>
struct Dot {
    using Sum = __m512;
    static INLINE Sum zero() { return _mm512_setzero_ps(); }
    static INLINE Sum load(const char* at) { return _mm512_loadu_ps(at); }
    static INLINE Sum add(Sum sum, __m512i a, __m512i w) {
        if constexpr (TYPE == FP32) return _mm512_fmadd_ps(_mm512_castsi512_ps(a), _mm512_castsi512_ps(w), sum);
        return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)w);
    }
    static INLINE Sum join(Sum a, Sum b) { return _mm512_add_ps(a, b); }
    static INLINE __m512 real(Sum sum) { return sum; }
};

template <>
struct Dot<UINT8> {
    using Sum = __m512i;
    static INLINE Sum zero() { return _mm512_setzero_si512(); }
    static INLINE Sum load(const char* at) { return _mm512_loadu_si512(at); }
    static INLINE Sum add(Sum sum, __m512i a, __m512i w) {
        asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(a), "v"(w));  // gcc 12 passes the intrinsic's sums through memory
        return sum;
    }
    static INLINE Sum join(Sum a, Sum b) { return _mm512_add_epi32(a, b); }
    static INLINE __m512 real(Sum sum) { return _mm512_cvtepi32_ps(sum); }
};

template <int TYPE, int R, int V>
INLINE void clear(typename Dot<TYPE>::Sum (&sums)[R][V]) {
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
        for (int half = 0; half < V; half++) sums[r][half] = Dot<TYPE>::zero();
}

// Sums to memory, and added from there, vector by vector: what memcpy has touched gcc leaves in memory.
template <int TYPE, int R, int V>
INLINE void join(typename Dot<TYPE>::Sum (&sums)[R][V], const char* kept) {
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int half = 0; half < V; half++)
            sums[r][half] = Dot<TYPE>::join(sums[r][half], Dot<TYPE>::load(kept + 64 * (V * r + half)));
}

template <int TYPE, int R, int V>
INLINE void keep(const typename Dot<TYPE>::Sum (&sums)[R][V], char* kept) {
#pragma GCC unroll 14
    for (int r = 0; r < R; r++)
#pragma GCC unroll 2
        for (int half = 0; half < V; half++) _mm512_storeu_si512(kept + 64 * (V * r + half), (__m512i)sums[r][half]);
}

// What comes next from memory, fetched one cache line a step.
struct Ahead {
    const char *at, *end;
    INLINE void step() {
        if (at < end) _mm_prefetch(at, _MM_HINT_T0);
        at += 64;
    }
};

// Add to the sums (V vectors a row) `segments` runs of `steps` 32-bit steps, each run `segment_stride` bytes after the
// one before; within a run, steps of A are STEP bytes apart, or `step_stride` where STEP is 0.
template <int TYPE, int R, bool FETCH = false, int STEP = 4, int V>
INLINE void multiply(const char* a, int64_t row_stride, const char* w, int64_t segments, int64_t segment_stride,
                     int64_t steps, typename Dot<TYPE>::Sum (&sums)[R][V], Ahead* ahead = nullptr, int64_t step_stride = 0) {
    using D = Dot<TYPE>;
    for (int64_t s = 0; s < segments; s++, a += segment_stride) {
        const char* at = a;
        for (int64_t k = 0; k < steps; k++, w += 128, at += STEP ? STEP : step_stride) {
            if (FETCH) ahead->step();
            const __m512i w0 = _mm512_loadu_si512(w), w1 = V == 2 ? _mm512_loadu_si512(w + 64) : w0;
#pragma GCC unroll 14
            for (int r = 0; r < R; r++) {
                const __m512i value = _mm512_set1_epi32(*(const int*)(at + r * row_stride));
                sums[r][0] = D::add(sums[r][0], value, w0);
                if (V == 2) sums[r][V - 1] = D::add(sums[r][V - 1], value, w1);
            }
        }
    }
}

// Scale, bias, GELU, residual, 8 bit: what becomes of one vector of sums, for channels `at` and on. Training has two more
// (bf16): GELU_KEPT writes what GELU takes beside; GELU_SLOPE is the way back through it, where the residual is what it
// took, and writes what it gave beside.
template <int TYPE, int OUT>
INLINE __m512 finish(int64_t act, __m512 sum, __m512 scale, __m512 bias, const char* residual, __m512 out_scale,
                     __m512 out_zero, char* beside, __mmask16 mask) {
    __m512 value = TYPE == UINT8 ? _mm512_fmadd_ps(sum, scale, bias) : _mm512_add_ps(sum, bias);
    if constexpr (TYPE == BF16 && OUT == BF16) {
        if (act == GELU_SLOPE) {
            const Gelu found = gelu_with_slope(load<OUT>(residual, mask));
            store<OUT>(beside, found.value, mask);
            return _mm512_mul_ps(value, found.slope);
        }
        if (act == GELU_KEPT) store<OUT>(beside, value, mask);
    }
    if (act != LINEAR) value = gelu<TYPE == FP32>(value);
    if (residual) value = _mm512_add_ps(value, load<OUT>(residual, mask));
    if (OUT == UINT8) value = _mm512_fmadd_ps(value, out_scale, out_zero);
    return value;
}

// Where a long K is done in parts: which part this is, and the sums of those before.
struct Part {
    bool first, last;
    char* sums;  // of a tile's row: 128 bytes
};

// R rows by V vectors of 16 columns: 1 where no more than 16 are left.
template <int TYPE, int OUT, int R, int V>
void tile(const Op& op, const char* a, const char* w, int64_t steps, const Part& part, const float* scale,
          const float* bias, int64_t column, char* out, const char* residual, Ahead& ahead) {
    typename Dot<TYPE>::Sum sums[R][V];
    clear<TYPE, R, V>(sums);
    if (residual && part.last)  // it was written long ago
        for (int r = 0; r < R; r++) _mm_prefetch(residual + r * op.out_cell + column * bytes(OUT), _MM_HINT_T0);
    if (ahead.at < ahead.end)
        multiply<TYPE, R, true>(a, op.source_cell, w, op.segments, op.segment_stride, steps, sums, &ahead);
    else
        multiply<TYPE, R>(a, op.source_cell, w, op.segments, op.segment_stride, steps, sums);
    if (!part.first) join<TYPE, R, V>(sums, part.sums);
    if (!part.last) {
        keep<TYPE, R, V>(sums, part.sums);
        return;
    }
    // By value: what is stored could else be one of these, which would be read again for each vector.
    const int64_t act = op.act, out_cell = op.out_cell;
    char* const beside = op.beside + (out - op.out);
#pragma GCC unroll 2
    for (int half = 0; half < V; half++) {
        const int64_t at = column + 16 * half;
        const __mmask16 mask = tail(op.width - at);
        const __m512 b = _mm512_maskz_loadu_ps(op.bias ? mask : 0, bias + at);
        const __m512 s = TYPE == UINT8 ? _mm512_maskz_loadu_ps(mask, scale + at) : b;
        const __m512 os = OUT == UINT8 ? _mm512_maskz_loadu_ps(mask, op.out_scale + at) : b;
        const __m512 oz = OUT == UINT8 ? _mm512_maskz_loadu_ps(mask, op.out_zero + at) : b;
#pragma GCC unroll 14
        for (int r = 0; r < R; r++) {
            const int64_t place = r * out_cell + at * bytes(OUT);
            const __m512 value = finish<TYPE, OUT>(act, Dot<TYPE>::real(sums[r][half]), s, b,
                                                   residual ? residual + place : nullptr, os, oz, beside + place, mask);
            store<OUT>(out + place, value, mask);
        }
    }
}

// A run of rows of one line, as tiles of 14, 7, 4, 2 or 1.
template <int TYPE, int OUT>
void tiles(const Op& op, const char* a, const char* w, int64_t steps, Part part, const float* scale, const float* bias,
           int64_t column, char* out, const char* residual, int64_t cells, Ahead& ahead) {
    while (cells > 0) {
        int64_t done = 0;
        auto go = [&]<int R>() {
            if (op.width - column > 16)
                tile<TYPE, OUT, R, 2>(op, a, w, steps, part, scale, bias, column, out, residual, ahead);
            else
                tile<TYPE, OUT, R, 1>(op, a, w, steps, part, scale, bias, column, out, residual, ahead);
            done = R;
        };
        if (cells >= 14) go.template operator()<14>();
        else if (cells >= 7) go.template operator()<7>();
        else if (cells >= 4) go.template operator()<4>();
        else if (cells >= 2) go.template operator()<2>();
        else go.template operator()<1>();
        cells -= done;
        a += done * op.source_cell;
        out += done * op.out_cell;
        part.sums += done * 128;
        if (residual) residual += done * op.out_cell;
    }
}

struct Share {  // of a thread in `count` equal pieces of work
    int64_t first, last;
    Share(int64_t count, int64_t thread, int64_t threads)
        : first(count * thread / threads), last(count * (thread + 1) / threads) {}
};

constexpr int64_t BIG_BYTES = 1 << 18;     // weights that share the second cache with much: the next panel is fetched ahead
constexpr int64_t ROWS_BYTES = 160 << 10;  // of A kept in the second cache while panels of W pass by
constexpr int64_t PART_STEPS = 768;        // of K at once, so that enough rows fit there

// A product's weights as panels, and what a thread does of it: its panels for all tiles of rows, or its tiles for all panels.
struct Division {
    int64_t steps, panels, panel_bytes;  // steps: of one segment
    int64_t per_line, tiles;             // of rows
    Share columns, rows;

    Division(const Op& op, int64_t thread, int64_t threads)
        : steps(op.depth * (op.type == FP32 ? 4 : op.type == BF16 ? 2 : 1) / 4),
          panels((op.width + PANEL - 1) / PANEL),
          panel_bytes(op.segments * steps * 128),
          per_line((op.cells + ROWS - 1) / ROWS),
          tiles(op.images * op.lines * per_line),
          columns(panels, 0, 1),
          rows(tiles, 0, 1) {
        const int64_t rows_bytes = tiles * ROWS * op.segments * steps * 4;
        // A shortcut's map goes on to what is done by pixels: where there are many, each thread keeps to its own.
        const bool keeps = op.residual && tiles >= 7 * threads;
        const bool by_panel = panels * panel_bytes > rows_bytes && panels >= threads && !keeps;
        (by_panel ? columns : rows) = Share(by_panel ? panels : tiles, thread, threads);
    }
};

// The weights that a thread reads first in a product that is still to come.
inline Ahead first_panel(const Op& op, int64_t thread, int64_t threads) {
    const Division of(op, thread, threads);
    const char* const at = op.weight + of.columns.first * of.panel_bytes;
    return {at, at + of.panel_bytes};
}

// `later` is fetched beside the last panel.
template <int TYPE, int OUT>
void product(const Op& op, int64_t thread, int64_t threads, const Ahead& later) {
    const auto [steps, panels, panel_bytes, per_line, num_tiles, columns, rows] = Division(op, thread, threads);
    const int64_t part_steps = op.segments == 1 ? std::min(steps, op.part ? op.part : PART_STEPS) : steps;
    const int64_t group = std::max<int64_t>(1, ROWS_BYTES / (ROWS * op.segments * part_steps * 4));
    const bool is_big = panels * panel_bytes > BIG_BYTES && !op.weight_image;
    const float* const bias = op.bias ? op.bias : (const float*)op.weight;  // read with an empty mask: slow where nothing is
    char* const between = kept<struct Between>(part_steps < steps ? group * ROWS * (columns.last - columns.first) * 128 : 0);
    for (int64_t start = rows.first; start < rows.last; start += group)
        for (int64_t k = 0; k < steps; k += part_steps)
            for (int64_t panel = columns.first; panel < columns.last; panel++) {
                const int64_t now = std::min(part_steps, steps - k);
                const char* following = op.weight + (panel + 1) * panel_bytes + k * 128;
                const bool fetch = is_big && panel + 1 < columns.last;
                const bool ends = start + group >= rows.last && k + now == steps && panel + 1 == columns.last;
                Ahead ahead = ends ? later : Ahead{following, fetch ? following + op.segments * now * 128 : following};
                Part part = {k == 0, k + now == steps, between + (panel - columns.first) * group * ROWS * 128};
                for (int64_t t = start, next; t < std::min(start + group, rows.last); t = next) {
                    const int64_t line = t / per_line, first = t % per_line;
                    next = std::min({start + group, rows.last, (line + 1) * per_line});  // along one line in one go
                    const int64_t image = line / op.lines, y = line % op.lines, x = first * ROWS;
                    const int64_t place = image * op.out_image + y * op.out_line + x * op.out_cell;
                    const int64_t own = op.weight_image ? image * panels * PANEL : 0;
                    const char* a = op.source + image * op.source_image + y * op.source_line + x * op.source_cell + 4 * k;
                    const char* w = op.weight + image * op.weight_image + panel * panel_bytes + k * 128;
                    tiles<TYPE, OUT>(op, a, w, now, part, op.scale + own, bias + own, panel * PANEL, op.out + place,
                                     op.residual ? op.residual + place : nullptr,
                                     std::min(op.cells, (first + next - t) * ROWS) - x, ahead);
                    part.sums += (next - t) * ROWS * 128;
                }
            }
}
