/* Products of few rows by a weight: out (rows, outputs) = in (rows, inputs) times weight (outputs, inputs), transposed,
   plus bias. Compiled by native.py.

   The weight is read once, in the order of its memory, which is the order that `pack` gives it: for LANES outputs all
   inputs, four bytes of each output at a time. Four bytes are one number of fp32 or two of bf16. A number of the result
   is a sum in the order of the inputs, whatever is computed beside it: a row's bits do not depend on its company. */

#include "vectors.h"

#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

#if LANES == 16 /* 32 registers: sums, their weights and one input */
#define MOST_LINES 14
#define BLOCKS(rows) ((rows) == 1 ? 8 : (rows) <= 6 ? 4 : 2)
#else /* 16 */
#define MOST_LINES 6
#define BLOCKS(rows) ((rows) == 1 ? 4 : (rows) <= 3 ? 2 : 1)
#endif
#define MOST_BLOCKS 8

#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

static inline vector added_f32(vector sum, wide weights, uint32_t input) {
    float number;
    memcpy(&number, &input, 4);
    return sum + (vector)weights * number;
}

static inline vector added_bf16(vector sum, wide weights, uint32_t inputs) {
#ifdef __AVX512BF16__
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)inputs));
#else
    uint32_t halves[2] = {inputs << 16, inputs & 0xffff0000u};
    float numbers[2];
    memcpy(numbers, halves, 8);
    sum += (vector)(weights << 16) * numbers[0];
    return sum + (vector)(weights & 0xffff0000u) * numbers[1];
#endif
}

/* multiply: in and out contiguous, outputs a multiple of 16, a row of inputs one of four bytes; bias (outputs) or none.
   `parts`: threads. pack: a weight in the order that multiply reads. */
#define PRODUCTS(T)                                                                                                   \
    static inline __attribute__((always_inline)) void tile_##T(                                                       \
        const T *in, const T *weight, const T *bias, T *out, long inputs, long outputs, const int rows,               \
        const int blocks) {                                                                                           \
        vector sums[MOST_LINES][MOST_BLOCKS];                                                                         \
        long units = inputs * sizeof(T) / 4;                                                                          \
        UNROLLED for (int r = 0; r < rows; r++)                                                                       \
            UNROLLED for (int b = 0; b < blocks; b++) sums[r][b] = bias ? load_##T(bias + b * LANES) : (vector){};    \
        for (long u = 0; u < units; u++) {                                                                            \
            wide weights[MOST_BLOCKS];                                                                                \
            UNROLLED for (int b = 0; b < blocks; b++)                                                                 \
                memcpy(&weights[b], (const char *)weight + (b * units + u) * sizeof(wide), sizeof(wide));             \
            UNROLLED for (int r = 0; r < rows; r++) {                                                                 \
                uint32_t unit;                                                                                        \
                memcpy(&unit, (const char *)(in + r * inputs) + u * 4, 4);                                            \
                UNROLLED for (int b = 0; b < blocks; b++) sums[r][b] = added_##T(sums[r][b], weights[b], unit);       \
            }                                                                                                         \
        }                                                                                                             \
        UNROLLED for (int r = 0; r < rows; r++)                                                                       \
            UNROLLED for (int b = 0; b < blocks; b++) store_##T(out + r * outputs + b * LANES, sums[r][b]);           \
    }                                                                                                                 \
    static void tiles_##T(const T *in, const T *weight, const T *bias, T *out, long inputs, long outputs, int rows,   \
                          int blocks) { /* 1 <= rows <= MOST_LINES, blocks <= BLOCKS(rows) */                         \
        for (int done = 0; done < blocks;) {                                                                          \
            int left = blocks - done, now = 1;                                                                        \
            while (now * 2 <= left && now * 2 <= BLOCKS(rows)) now *= 2;                                              \
            const T *packed = weight + done * LANES * inputs, *biases = bias ? bias + done * LANES : 0;               \
            T *to = out + done * LANES;                                                                               \
            switch (rows * 16 + now) { EVERY_TILE(T) }                                                                \
            done += now;                                                                                              \
        }                                                                                                             \
    }                                                                                                                 \
    void multiply_##T(const T *in, const T *weight, const T *bias, T *out, long rows, long inputs, long outputs,      \
                      long parts) {                                                                                   \
        long total = outputs / LANES, pieces = (rows + MOST_LINES - 1) / MOST_LINES;                                  \
        int most = BLOCKS((rows + pieces - 1) / pieces);                                                              \
        _Pragma("omp parallel for schedule(static) num_threads(parts) if(parts > 1)")                                 \
        for (long part = 0; part < parts; part++) {                                                                   \
            long end = total * (part + 1) / parts;                                                                    \
            for (long first = total * part / parts; first < end; first += most)                                       \
                for (long piece = 0; piece < pieces; piece++) {                                                       \
                    long from = rows * piece / pieces, to = rows * (piece + 1) / pieces, place = first * LANES;       \
                    tiles_##T(in + from * inputs, weight + place * inputs, bias ? bias + place : 0,                   \
                              out + from * outputs + place, inputs, outputs, to - from,                               \
                              end - first < most ? end - first : most);                                               \
                }                                                                                                     \
        }                                                                                                             \
    }                                                                                                                 \
    void pack_##T(const T *weight, T *packed, long inputs, long outputs, long parts) {                                \
        const long unit = 4 / sizeof(T);                                                                              \
        _Pragma("omp parallel for schedule(static) num_threads(parts) if(parts > 1)")                                 \
        for (long first = 0; first < outputs; first += LANES)                                                         \
            for (long u = 0; u < inputs / unit; u++)                                                                  \
                for (long i = 0; i < LANES; i++)                                                                      \
                    memcpy(packed + first * inputs + (u * LANES + i) * unit, weight + (first + i) * inputs + u * unit, 4); \
    }

#define TILE(T, rows, blocks)                                                                                         \
    case rows * 16 + blocks: tile_##T(in, packed, biases, to, inputs, outputs, rows, blocks); break;
#if LANES == 16
#define EVERY_TILE(T)                                                                                                 \
    TILE(T, 1, 1) TILE(T, 1, 2) TILE(T, 1, 4) TILE(T, 1, 8)                                                           \
    TILE(T, 2, 1) TILE(T, 2, 2) TILE(T, 2, 4) TILE(T, 3, 1) TILE(T, 3, 2) TILE(T, 3, 4)                               \
    TILE(T, 4, 1) TILE(T, 4, 2) TILE(T, 4, 4) TILE(T, 5, 1) TILE(T, 5, 2) TILE(T, 5, 4)                               \
    TILE(T, 6, 1) TILE(T, 6, 2) TILE(T, 6, 4) TILE(T, 7, 1) TILE(T, 7, 2) TILE(T, 8, 1) TILE(T, 8, 2)                 \
    TILE(T, 9, 1) TILE(T, 9, 2) TILE(T, 10, 1) TILE(T, 10, 2) TILE(T, 11, 1) TILE(T, 11, 2)                           \
    TILE(T, 12, 1) TILE(T, 12, 2) TILE(T, 13, 1) TILE(T, 13, 2) TILE(T, 14, 1) TILE(T, 14, 2)
#else
#define EVERY_TILE(T)                                                                                                 \
    TILE(T, 1, 1) TILE(T, 1, 2) TILE(T, 1, 4) TILE(T, 2, 1) TILE(T, 2, 2) TILE(T, 3, 1) TILE(T, 3, 2)                 \
    TILE(T, 4, 1) TILE(T, 5, 1) TILE(T, 6, 1)
#endif

PRODUCTS(f32)
PRODUCTS(bf16)
