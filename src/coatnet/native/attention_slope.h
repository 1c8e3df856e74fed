// ATTENTION_SLOPE: the way back through ATTENTION with a bias before the softmax, or none. Weights are computed again
// from queries and keys and what was noted of each query; nothing of the size tokens x tokens was kept. Heads of 32 channels, bf16.
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
    char* rows;
    Biases biases;
    float *spread, *spread_slopes;  // a head's biases, and their gradients from all images

    HeadSlope(int64_t lines, int64_t cells)
        : tokens(lines * cells), padded((tokens + 31) / 32 * 32), keys(kept<struct SlopeKeys>(padded * 64)),
          values(kept<struct SlopeValues>(padded * 64)), keys_by_token(kept<struct KeysByToken>(padded * 64)),
          queries_by_token(kept<struct QueriesByToken>(padded * 64)),
          slopes_by_token(kept<struct SlopesByToken>(padded * 64)),
          weights(kept<struct WeightPairs, uint32_t>((padded + ROWS) / 2 * padded + ROWS)),
          logit_slopes(kept<struct LogitSlopePairs, uint32_t>((padded + ROWS) / 2 * padded + ROWS)),
          logits(kept<struct SlopeLogits, float>(ROWS * padded)),
          weight_slopes(kept<struct WeightSlopes, float>(ROWS * padded)),
          rows(kept<struct SlopeRows>(ROWS * padded * 2)), biases{lines, cells},
          spread(kept<struct SlopeSpread, float>(biases.spread_size())),
          spread_slopes(kept<struct SpreadSlopes, float>(biases.spread_size())) {}
};

// Multiply 14 rows of slopes with packed values: (14, padded) fp32, up to the tokens made a multiple of 16.
SEPARATE void all_tokens(const char* rows, const char* packed, int64_t tokens, int64_t padded, float* out) {
    for (int64_t t = 0; t < tokens; t += PANEL) {
        auto panel = [&]<int V>() INLINE_LAMBDA {
            __m512 sums[ROWS][V];
            clear<BF16, ROWS, V>(sums);
            multiply<BF16, ROWS>(rows, 64, packed + t * 64, 1, 0, 16, sums);
#pragma GCC unroll 14
            for (int r = 0; r < ROWS; r++)
                for (int half = 0; half < V; half++) _mm512_storeu_ps(out + r * padded + t + 16 * half, sums[r][half]);
        };
        if (tokens - t > 16) panel.template operator()<2>();
        else panel.template operator()<1>();
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

// Logits become weights, weight slopes become logit slopes: two queries at a time, which lie side by side then. Rows
// from `count` on become zeros.
SEPARATE void weigh(const Op& op, const HeadSlope& s, int64_t first, int64_t count, const float* noted, const char* slopes,
                    const char* mixed) {
    alignas(64) float tops[16], inverse[16], shares[16];
    _mm512_store_ps(tops, _mm512_maskz_loadu_ps(tail(count), noted));
    _mm512_store_ps(inverse, _mm512_maskz_loadu_ps(tail(count), noted + s.tokens));
    __m512 products[ROWS];
    for (int r = 0; r < ROWS; r++) {
        const char *a = slopes + r * 64, *b = mixed + std::min<int64_t>(r, count - 1) * 2 * op.width;
        products[r] = _mm512_fmadd_ps(load<BF16>(a), load<BF16>(b), _mm512_mul_ps(load<BF16>(a + 32), load<BF16>(b + 32)));
    }
    _mm512_store_ps(shares, by_row(products, false));
    for (int64_t r = 0; r < ROWS && first + r < s.padded; r += 2) {
        const int64_t line = (first + r) / 2 * s.padded;
        float* sums[2];  // they overlap: one after the other, in order
        for (int i = 0; i < 2; i++) sums[i] = s.spread_slopes + s.biases.place(first + std::min(r + i, count - 1));
        each_vector(s.tokens, [&](int64_t t, __mmask16 mask) INLINE_LAMBDA {
            __m512 weights[2], found[2];
#pragma GCC unroll 2
            for (int i = 0; i < 2; i++) {
                const int64_t at = (r + i) * s.padded + t;
                const __m512 e = exp16<false>(_mm512_sub_ps(_mm512_loadu_ps(s.logits + at), _mm512_set1_ps(tops[r + i])));
                weights[i] = _mm512_maskz_mul_ps(mask, e, _mm512_set1_ps(inverse[r + i]));
                const __m512 off = _mm512_sub_ps(_mm512_loadu_ps(s.weight_slopes + at), _mm512_set1_ps(shares[r + i]));
                found[i] = _mm512_mul_ps(weights[i], off);
                if (op.relative == PRE) _mm512_storeu_ps(sums[i] + t, _mm512_add_ps(_mm512_loadu_ps(sums[i] + t), found[i]));
            }
            const __m512i halves = (__m512i)_mm512_cvtne2ps_pbh(found[1], found[0]);
            _mm512_storeu_si512(&s.weights[line + t], pairs(weights[0], weights[1]));
            _mm512_storeu_si512(&s.logit_slopes[line + t], pairs(halves));
            _mm256_storeu_si256((__m256i*)(s.rows + (r * s.padded + t) * 2), _mm512_castsi512_si256(halves));
            _mm256_storeu_si256((__m256i*)(s.rows + ((r + 1) * s.padded + t) * 2), _mm512_extracti64x4_epi64(halves, 1));
        });
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

// One head of one image; its logit slopes are added to `spread_slopes`. The next image's is fetched meanwhile.
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
        for (int64_t r = 0; r < ROWS; r++) places[r] = s.spread + s.biases.place(first + std::min(r, count - 1));
        for (int64_t t = 0; t < N; t += PANEL)
            if (N - t > 16) match<BF16, ROWS, 2>(op, query_rows, 64, s.keys + t * 64, places, t, P, s.logits, nullptr);
            else match<BF16, ROWS, 1>(op, query_rows, 64, s.keys + t * 64, places, t, P, s.logits, nullptr);
        all_tokens(slope_rows, s.values, N, P, s.weight_slopes);
        weigh(op, s, first, count, op.sums + (image * op.heads + head) * 2 * N + first, slope_rows, mixed + first * out_stride);
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
    const Biases& biases = scratch.biases;
    const Share share(op.heads, thread, threads);
    for (int64_t head = share.first; head < share.last; head++) {
        const int64_t place = head * biases.size();
        if (op.relative == PRE) {
            biases.spread(op.bias + place, scratch.spread);
            std::fill_n(scratch.spread_slopes, biases.spread_size(), 0.0f);
        }
        for (int64_t image = 0; image < op.images; image++) head_slope(op, scratch, image, head);
        if (op.relative != PRE) continue;
        std::fill_n(op.weight_sums + place, biases.size(), 0.0f);
        biases.gather(scratch.spread_slopes, op.weight_sums + place);
    }
}
