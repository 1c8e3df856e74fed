// ATTENTION_SLOPE: the way back through ATTENTION with a bias before the softmax, or none. Weights are computed again
// from queries and keys; nothing of the size tokens x tokens was kept. Heads of 32 channels, bf16.
#pragma once
#include <cstring>

#include "attention.h"

// Scratch for one head of one image. What is packed is zero beyond the last token. Of logits, weights and slopes only keys up
// to the tokens made a multiple of 16 are written, and products read no further than the tokens made even.
struct HeadSlope {
    int64_t tokens, padded;
    char *keys, *values, *keys_by_token, *queries_by_token, *slopes_by_token;  // packed, in two ways
    uint32_t *weights, *logit_slopes;                                          // (pair of queries, key) bf16
    float *logits, *weight_slopes;                                             // of the rows at hand
    float* summed;                                                             // of all images, (query, key)
    char* rows;
    Biases biases;
    std::vector<int64_t> places;  // of queries in a table of biases

    HeadSlope(int64_t lines, int64_t cells)
        : tokens(lines * cells), padded((tokens + 31) / 32 * 32), keys(kept<struct SlopeKeys>(padded * 64)),
          values(kept<struct SlopeValues>(padded * 64)), keys_by_token(kept<struct KeysByToken>(padded * 64)),
          queries_by_token(kept<struct QueriesByToken>(padded * 64)),
          slopes_by_token(kept<struct SlopesByToken>(padded * 64)),
          weights(kept<struct WeightPairs, uint32_t>((padded + ROWS) / 2 * padded + ROWS)),
          logit_slopes(kept<struct LogitSlopePairs, uint32_t>((padded + ROWS) / 2 * padded + ROWS)),
          logits(kept<struct SlopeLogits, float>(ROWS * padded)),
          weight_slopes(kept<struct WeightSlopes, float>(ROWS * padded)),
          summed(kept<struct Summed, float>(tokens * padded)), rows(kept<struct SlopeRows>(ROWS * padded * 2)),
          biases(lines, cells), places(tokens) {
        for (int64_t query = 0; query < tokens; query++) places[query] = biases.place(query);
    }
};

// Multiply 14 rows of queries or slopes with packed keys or values: (14, padded) fp32.
SEPARATE void all_tokens(const char* rows, int64_t stride, const char* packed, int64_t padded, float* out) {
    for (int64_t panel = 0; panel < padded / 32; panel++) {
        __m512 sums[ROWS][2];
        clear<BF16, ROWS, 2>(sums);
        multiply<BF16, ROWS>(rows, stride, packed + panel * 16 * 128, 1, 0, 16, sums);
#pragma GCC unroll 14
        for (int r = 0; r < ROWS; r++) {
            _mm512_storeu_ps(out + r * padded + panel * 32, sums[r][0]);
            _mm512_storeu_ps(out + r * padded + panel * 32 + 16, sums[r][1]);
        }
    }
}

// Multiply 14 rows over all tokens with 32 channels packed by token, and store the first `count` of them, scaled.
SEPARATE void all_channels(const char* rows, int64_t stride, int64_t step_stride, const char* packed,
                         int64_t tokens, float scale, char* out, int64_t out_stride, int64_t count) {
    __m512 sums[ROWS][2];
    clear<BF16, ROWS, 2>(sums);
    multiply<BF16, ROWS, false, 0>(rows, stride, packed, 1, 0, (tokens + 1) / 2, sums, nullptr, step_stride);
#pragma GCC unroll 14
    for (int r = 0; r < ROWS; r++) {
        if (r >= count) break;
        store<BF16>(out + r * out_stride, _mm512_mul_ps(sums[r][0], _mm512_set1_ps(scale)));
        store<BF16>(out + r * out_stride + 32, _mm512_mul_ps(sums[r][1], _mm512_set1_ps(scale)));
    }
}

// A query's logits as exponentials, and what makes them weights and the weights' slopes logit slopes; nothing for rows
// beyond the last token.
struct Softened {
    int64_t r;
    __mmask16 is_there;
    __m512 inverse, share;

    INLINE __m512 weight(const HeadSlope& s, int64_t t) const {
        return _mm512_maskz_mul_ps(is_there, _mm512_loadu_ps(s.logits + r * s.padded + t), inverse);
    }
    INLINE __m512 slope(const HeadSlope& s, int64_t t, __m512 weight) const {
        const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(s.weight_slopes + r * s.padded + t), share);
        return _mm512_maskz_mul_ps(is_there, weight, off);
    }
    INLINE void keep(const HeadSlope& s, const Op& op, int64_t first, int64_t t, __m512 slope, __m256i halves) const {
        if (!is_there) return;
        float* summed = s.summed + (first + r) * s.padded + t;
        if (op.relative == PRE) _mm512_storeu_ps(summed, _mm512_add_ps(_mm512_loadu_ps(summed), slope));
        _mm256_storeu_si256((__m256i*)(s.rows + (r * s.padded + t) * 2), halves);
    }
};

INLINE Softened soften(const HeadSlope& s, int64_t r, int64_t count, __m512 largest, const char* slope, const char* mixed) {
    if (r >= count) return {r, 0, _mm512_setzero_ps(), _mm512_setzero_ps()};
    float* const row = s.logits + r * s.padded;
    const __m512 top = _mm512_set1_ps(_mm512_reduce_max_ps(largest));
    __m512 total = _mm512_setzero_ps();
    for (int64_t t = 0; t < s.tokens; t += 16) {
        const __mmask16 mask = tail(s.tokens - t);
        const __m512 logit = _mm512_maskz_loadu_ps(mask, row + t);
        const __m512 e = _mm512_maskz_mov_ps(mask, exp16<false>(_mm512_sub_ps(logit, top)));
        total = _mm512_add_ps(total, e);
        _mm512_storeu_ps(row + t, e);
    }
    const float share = _mm512_reduce_add_ps(
        _mm512_fmadd_ps(load<BF16>(slope), load<BF16>(mixed),
                        _mm512_mul_ps(load<BF16>(slope + 32), load<BF16>(mixed + 32))));
    return {r, 0xffff, _mm512_set1_ps(1.0f / _mm512_reduce_add_ps(total)), _mm512_set1_ps(share)};
}

// Logits become weights, weight slopes become logit slopes: two queries at a time, which lie side by side then.
SEPARATE void weigh(const Op& op, const HeadSlope& s, int64_t first, int64_t count, const __m512 (&largest)[ROWS],
                    const char* slopes, const char* mixed) {
    for (int64_t r = 0; r < ROWS && first + r < s.padded; r += 2) {
        const Softened even = soften(s, r, count, largest[r], slopes + r * 64, mixed + r * 2 * op.width);
        const Softened odd = soften(s, r + 1, count, largest[r + 1], slopes + (r + 1) * 64, mixed + (r + 1) * 2 * op.width);
        const int64_t line = (first + r) / 2 * s.padded;
        for (int64_t t = 0; t < s.tokens; t += 16) {
            const __m512 w0 = even.weight(s, t), w1 = odd.weight(s, t);
            const __m512 d0 = even.slope(s, t, w0), d1 = odd.slope(s, t, w1);
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(d1, d0);
            _mm512_storeu_si512(&s.weights[line + t], pairs(w0, w1));
            _mm512_storeu_si512(&s.logit_slopes[line + t], pairs(halves));
            even.keep(s, op, first, t, d0, _mm512_castsi512_si256(halves));
            odd.keep(s, op, first, t, d1, _mm512_extracti64x4_epi64(halves, 1));
        }
    }
}

// Where one head of one image lies.
struct Head {
    int64_t out_stride, stride;
    const char *q, *k, *v, *slope, *mixed;
    char* to;
    Head(const Op& op, int64_t tokens, int64_t image, int64_t head)
        : out_stride(2 * op.width), stride(3 * out_stride), q(op.source + image * tokens * stride + head * 64),
          k(q + out_stride), v(k + out_stride), slope(op.gradient + image * tokens * out_stride + head * 64),
          mixed(op.residual + image * tokens * out_stride + head * 64), to(op.out + image * tokens * stride + head * 64) {}
    // A cache line of each map a token, too far from one another for the processor to foresee. Inline, since gcc drops
    // a call that does nothing but fetch.
    INLINE void fetch(int64_t token) const {
        for (const char* at : {q, k, v}) _mm_prefetch(at + token * stride, _MM_HINT_T1);
        for (const char* at : {slope, mixed}) _mm_prefetch(at + token * out_stride, _MM_HINT_T1);
    }
};

// One head of one image; its logit slopes are added to `summed`. The next image's is fetched meanwhile.
inline void head_slope(const Op& op, HeadSlope& s, int64_t image, int64_t head) {
    const int64_t N = s.tokens, P = s.padded;
    const float factor = 1.0f / __builtin_sqrtf(32.0f);
    const Head next(op, N, std::min(image + 1, op.images - 1), head);
    const auto [out_stride, stride, q, k, v, slope, mixed, to] = Head(op, N, image, head);
    pack_keys(k, stride, N, 16, (int*)s.keys);
    pack_keys(v, stride, N, 16, (int*)s.values);
    pack_values<BF16>(k, stride, N, P, 32, s.keys_by_token);
    pack_values<BF16>(q, stride, N, P, 32, s.queries_by_token);
    pack_values<BF16>(slope, out_stride, N, P, 32, s.slopes_by_token);
    alignas(64) char query_rows[ROWS * 64], slope_rows[ROWS * 64];
    for (int64_t first = 0; first < N; first += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, N - first);
        for (int64_t r = 0; r < ROWS; r++) {
            const __mmask16 mask = r < count ? 0xffff : 0;
            _mm512_store_si512(query_rows + r * 64, _mm512_maskz_loadu_epi32(mask, q + (first + r) * stride));
            _mm512_store_si512(slope_rows + r * 64, _mm512_maskz_loadu_epi32(mask, slope + (first + r) * out_stride));
        }
        for (int64_t r = 0; r < count; r++) next.fetch(first + r);
        const float* places[ROWS];
        __m512 largest[ROWS];
        for (int64_t r = 0; r < ROWS; r++) {
            places[r] = op.bias + head * s.biases.size() + s.places[first + std::min(r, count - 1)];
            largest[r] = _mm512_set1_ps(-std::numeric_limits<float>::infinity());
        }
        for (int64_t t = 0; t < N; t += PANEL)
            if (N - t > 16)
                match<BF16, ROWS, 2>(op, query_rows, 64, s.keys + t * 64, s.biases, places, t, P, s.logits, largest);
            else
                match<BF16, ROWS, 1>(op, query_rows, 64, s.keys + t * 64, s.biases, places, t, P, s.logits, largest);
        all_tokens(slope_rows, 64, s.values, P, s.weight_slopes);
        weigh(op, s, first, count, largest, slope_rows, mixed + first * out_stride);
        all_channels(s.rows, 2 * P, 4, s.keys_by_token, N, factor, to + first * stride, stride, count);
    }
    for (int64_t first = 0; first < N; first += ROWS) {
        const int64_t count = std::min<int64_t>(ROWS, N - first);
        all_channels((const char*)&s.weights[first], 4, 4 * P, s.slopes_by_token, N, 1.0f,
                     to + 4 * op.width + first * stride, stride, count);
        all_channels((const char*)&s.logit_slopes[first], 4, 4 * P, s.queries_by_token, N, factor,
                     to + 2 * op.width + first * stride, stride, count);
    }
}

inline void attention_slope(const Op& op, int64_t thread, int64_t threads) {
    HeadSlope scratch(op.lines, op.cells);
    const Share share(op.heads, thread, threads);
    for (int64_t head = share.first; head < share.last; head++) {
        std::fill_n(scratch.summed, scratch.tokens * scratch.padded, 0.0f);
        for (int64_t image = 0; image < op.images; image++) head_slope(op, scratch, image, head);
        if (op.relative != PRE) continue;
        float* const bias_slope = op.weight_sums + head * scratch.biases.size();
        std::fill_n(bias_slope, scratch.biases.size(), 0.0f);
        for (int64_t query = 0; query < scratch.tokens; query++)
            for (int64_t t = 0; t < scratch.tokens; t += 16)
                scratch.biases.add(t, bias_slope + scratch.biases.place(query),
                                   _mm512_loadu_ps(scratch.summed + query * scratch.padded + t));
    }
}
