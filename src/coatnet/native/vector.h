// Vectors of 16 floats: loaded from and stored in any of the three types; exp.
#pragma once
#include <immintrin.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>

#include "op.h"

#define INLINE inline __attribute__((always_inline))
#define SEPARATE inline __attribute__((noinline))  // registers are shared out better by themselves
#define INLINE_LAMBDA __attribute__((always_inline))

constexpr int64_t bytes(int64_t type) { return type == FP32 ? 4 : type == BF16 ? 2 : 1; }

constexpr int64_t AHEAD = 4096;  // bytes that memory is fetched before its turn, on a walk in its own order

INLINE __mmask16 tail(int64_t count) { return count >= 16 ? 0xffff : count <= 0 ? 0 : (1u << count) - 1; }

// Call `use(c, mask)` for every 16 channels.
template <class Use>
INLINE void by_vector(int64_t width, Use use) {
    int64_t c = 0;
    for (; c + 16 <= width; c += 16) use(c, __mmask16(0xffff));
    if (c < width) use(c, tail(width - c));
}

// Memory of this thread's own for one purpose, which is a name, from the start of a cache line on. It is not cleared and it
// lasts, since the system clears new memory page by page.
template <class Purpose, class T = char>
T* kept(int64_t count) {
    struct Free {
        void operator()(void* at) const { std::free(at); }
    };
    thread_local std::unique_ptr<void, Free> held;
    thread_local int64_t size = 0;
    const int64_t wanted = (count * int64_t(sizeof(T)) + 63) / 64 * 64;
    if (wanted > size) {
        held.reset(std::aligned_alloc(64, wanted));
        size = held ? wanted : 0;
        if (!held) throw std::bad_alloc();
    }
    return (T*)held.get();
}

template <int TYPE>
INLINE __m512 load(const char* at) {
    if constexpr (TYPE == FP32) return _mm512_loadu_ps(at);
    if constexpr (TYPE == BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)at)), 16));
    if constexpr (TYPE == UINT8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)at)));
}

template <int TYPE>
INLINE __m512 load(const char* at, __mmask16 mask) {
    if constexpr (TYPE == FP32) return _mm512_maskz_loadu_ps(mask, at);
    if constexpr (TYPE == BF16)
        return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, at)), 16));
    if constexpr (TYPE == UINT8) return _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(mask, at)));
}

// Where 8 bit is stored, `value` has been scaled and moved already.
template <int TYPE>
INLINE void store(char* at, __m512 value, __mmask16 mask = 0xffff) {
    if constexpr (TYPE == FP32) {
        if (mask == 0xffff)
            _mm512_storeu_ps(at, value);
        else
            _mm512_mask_storeu_ps(at, mask, value);
    }
    if constexpr (TYPE == BF16) {
        const __m256i half = (__m256i)_mm512_cvtneps_pbh(value);
        if (mask == 0xffff)
            _mm256_storeu_si256((__m256i*)at, half);
        else
            _mm256_mask_storeu_epi16(at, mask, half);
    }
    if constexpr (TYPE == UINT8) {
        const __m512i whole = _mm512_max_epi32(_mm512_cvtps_epi32(value), _mm512_setzero_si512());
        const __m128i byte = _mm512_cvtusepi32_epi8(whole);
        if (mask == 0xffff)
            _mm_storeu_si128((__m128i*)at, byte);
        else
            _mm_mask_storeu_epi8(at, mask, byte);
    }
}

// Side by side in 32 bits, as products want them: numbers FIRST to FIRST + 15 of two vectors of 32 bf16.
template <int FIRST>
INLINE __m512i zip(__m512i even, __m512i odd) {
    constexpr auto both = [](int i) { return int64_t(FIRST + i) | int64_t(FIRST + i + 32) << 16; };
    constexpr auto four = [=](int i) { return both(i) | both(i + 1) << 32; };
    const __m512i places = _mm512_setr_epi64(four(0), four(2), four(4), four(6), four(8), four(10), four(12), four(14));
    return _mm512_permutex2var_epi16(even, places, odd);
}

// Two vectors as bf16, side by side in 32 bits.
INLINE __m512i pairs(__m512i halves) {  // of which the lower is even
    constexpr auto both = [](int i) { return int64_t(i) | int64_t(i + 16) << 16; };
    constexpr auto four = [=](int i) { return both(i) | both(i + 1) << 32; };
    const __m512i places = _mm512_setr_epi64(four(0), four(2), four(4), four(6), four(8), four(10), four(12), four(14));
    return _mm512_permutexvar_epi16(places, halves);
}
INLINE __m512i pairs(__m512 even, __m512 odd) { return pairs((__m512i)_mm512_cvtne2ps_pbh(odd, even)); }

INLINE __m512 join(__m512 a, __m512 b, bool largest) { return largest ? _mm512_max_ps(a, b) : _mm512_add_ps(a, b); }

// Number r of what comes back: the largest of the 16 numbers of vector r, or their sum. 45 instructions for all of them.
template <int R>
INLINE __m512 by_row(const __m512 (&of)[R], bool largest) {
    __m512 twos[8], fours[4], eights[2];
#pragma GCC unroll 8
    for (int i = 0; i < 8; i++) {
        const __m512 a = of[2 * i < R ? 2 * i : 0], b = of[2 * i + 1 < R ? 2 * i + 1 : 0];
        twos[i] = join(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b), largest);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; i++) {
        const __m512d a = _mm512_castps_pd(twos[2 * i]), b = _mm512_castps_pd(twos[2 * i + 1]);
        fours[i] = join(_mm512_castpd_ps(_mm512_unpacklo_pd(a, b)), _mm512_castpd_ps(_mm512_unpackhi_pd(a, b)), largest);
    }
    auto across = [&](__m512 a, __m512 b) INLINE_LAMBDA {
        return join(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd), largest);
    };
    for (int i = 0; i < 2; i++) eights[i] = across(fours[2 * i], fours[2 * i + 1]);
    return across(eights[0], eights[1]);
}

INLINE void store(int64_t type, char* at, __m512 value, __mmask16 mask = 0xffff) {
    if (type == FP32)
        store<FP32>(at, value, mask);
    else if (type == BF16)
        store<BF16>(at, value, mask);
    else
        store<UINT8>(at, value, mask);
}

// exp for x <= 88: 2^n times a polynomial on half an octave each side. Relative error 1e-4; EXACT 2e-7, from sixteenths of an
// octave, whose powers of two are a table.
template <bool EXACT>
INLINE __m512 exp16(__m512 x) {
    const __m512 magic = _mm512_set1_ps(12582912.0f);  // 1.5 * 2^23: after adding it, the low bits are the whole part
    x = _mm512_max_ps(x, _mm512_set1_ps(-87.0f));
    const __m512 whole = _mm512_fmadd_ps(x, _mm512_set1_ps(EXACT ? 23.0831206542f : 1.44269504f), magic);
    const __m512 n = _mm512_sub_ps(whole, magic);
    const __m512i bits = _mm512_castps_si512(whole);
    if constexpr (EXACT) {
        const __m512 powers = _mm512_setr_ps(1.0f, 1.04427378f, 1.09050773f, 1.13878863f, 1.18920712f, 1.24185781f, 1.29683955f,
                                             1.35425555f, 1.41421356f, 1.47682615f, 1.54221083f, 1.61049033f, 1.68179283f,
                                             1.75625216f, 1.83400809f, 1.91520656f);
        __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.0433349609375f), x);
        r = _mm512_fnmadd_ps(n, _mm512_set1_ps(-1.32621527e-5f), r);  // ln 2 / 16 in two parts, so that n times the first is exact
        const __m512 by_r = _mm512_fmadd_ps(r, _mm512_set1_ps(0.166666667f), _mm512_set1_ps(0.5f));
        const __m512 less_1 = _mm512_fmadd_ps(by_r, _mm512_mul_ps(r, r), r);
        const __m512 power = _mm512_permutexvar_ps(bits, powers), p = _mm512_fmadd_ps(power, less_1, power);
        const __m512i exponent = _mm512_slli_epi32(_mm512_andnot_si512(_mm512_set1_epi32(15), bits), 19);
        return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), exponent));
    }
    const __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.69314718f), x);
    __m512 p = _mm512_fmadd_ps(_mm512_set1_ps(0.16792160f), r, _mm512_set1_ps(0.50502354f));
    p = _mm512_add_ps(_mm512_fmadd_ps(p, _mm512_mul_ps(r, r), r), _mm512_set1_ps(1.0f));
    // n is added to the exponent, beside the multiply-adds.
    return _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), _mm512_slli_epi32(bits, 23)));
}

// Turn 16 rows of 16 words of 32 bits: afterwards row i holds word i of each.
INLINE void transpose(__m512i (&rows)[16]) {
    __m512i quads[16];  // quads[4 i + j]: in its part L, word 4 L + j of rows 4 i to 4 i + 3
#pragma GCC unroll 4
    for (int i = 0; i < 16; i += 4) {
        const __m512i low = _mm512_unpacklo_epi32(rows[i], rows[i + 1]), high = _mm512_unpackhi_epi32(rows[i], rows[i + 1]);
        const __m512i low2 = _mm512_unpacklo_epi32(rows[i + 2], rows[i + 3]);
        const __m512i high2 = _mm512_unpackhi_epi32(rows[i + 2], rows[i + 3]);
        quads[i] = _mm512_unpacklo_epi64(low, low2), quads[i + 1] = _mm512_unpackhi_epi64(low, low2);
        quads[i + 2] = _mm512_unpacklo_epi64(high, high2), quads[i + 3] = _mm512_unpackhi_epi64(high, high2);
    }
#pragma GCC unroll 4
    for (int j = 0; j < 4; j++) {
        constexpr int EVEN = 0x88, ODD = 0xdd;  // parts 0 and 2 of both, or 1 and 3
        const __m512i first = _mm512_shuffle_i32x4(quads[j], quads[4 + j], EVEN);
        const __m512i second = _mm512_shuffle_i32x4(quads[j], quads[4 + j], ODD);
        const __m512i third = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], EVEN);
        const __m512i fourth = _mm512_shuffle_i32x4(quads[8 + j], quads[12 + j], ODD);
        rows[j] = _mm512_shuffle_i32x4(first, third, EVEN), rows[8 + j] = _mm512_shuffle_i32x4(first, third, ODD);
        rows[4 + j] = _mm512_shuffle_i32x4(second, fourth, EVEN), rows[12 + j] = _mm512_shuffle_i32x4(second, fourth, ODD);
    }
}
