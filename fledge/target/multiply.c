/* Products of few rows by a weight: out (rows, outputs) = in (rows, inputs) times weight (outputs, inputs), transposed,
   plus bias. Compiled by native.py.

   The weight is read once, in the order of its memory, which is the order that `pack` gives it: for LANES outputs all
   inputs, four bytes of each output at a time. Four bytes are one number of fp32 or two of bf16. A number of the result
   is a sum in the order of the inputs, whatever is computed beside it: a row's bits do not depend on its company. */

#include "vectors.h"

#include <limits.h>
#include <stdlib.h>

#if LANES == 16 /* 32 registers: sums, their weights and one input */
#define MOST_LINES 14
#define BLOCKS(T, rows) ((rows) == 1 ? 8 : (rows) <= 6 ? 4 : 2)
#else /* 16; of fp32, eight streams of memory are more than help */
#define MOST_LINES 6
#define BLOCKS(T, rows) ((rows) == 1 && sizeof(T) == 2 ? 8 : (rows) <= 3 ? 4 : 2)
#endif
#define MOST_BLOCKS 8

#ifdef __clang__
#define UNROLLED _Pragma("clang loop unroll(full)")
#else
#define UNROLLED _Pragma("GCC unroll 16")
#endif

/* Inputs as they are multiplied, of so many rows at once. Without an instruction for bf16 they are numbers of fp32: to
   widen them once is less work than with every weight. The room for that stays with its thread. */
#define AT_ONCE_f32 LONG_MAX
typedef f32 input_f32;
static const input_f32 *ready_f32(const f32 *in, long *stride, long rows, long inputs) {
    (void)stride, (void)rows, (void)inputs;
    return in;
}

#ifdef __AVX512BF16__
#define AT_ONCE_bf16 LONG_MAX
typedef bf16 input_bf16;
static const input_bf16 *ready_bf16(const bf16 *in, long *stride, long rows, long inputs) {
    (void)stride, (void)rows, (void)inputs;
    return in;
}
#else
#define AT_ONCE_bf16 96
typedef f32 input_bf16;
static const input_bf16 *ready_bf16(const bf16 *in, long *stride, long rows, long inputs) {
    static _Thread_local float *room;
    static _Thread_local long size;
    long apart = APART(f32, inputs);
    if (size < rows * apart) free(room), size = rows * apart, room = malloc(size * sizeof(float));
    for (long r = 0; r < rows; r++)
        for (long i = 0; i < inputs; i++) room[r * apart + i] = one_bf16(in + r * *stride + i);
    *stride = apart;
    return room;
}
#endif

static inline vector added_f32(vector sum, wide weights, const input_f32 *in) {
    return fused((vector)weights, *in - (vector){}, sum);
}

static inline vector added_bf16(vector sum, wide weights, const input_bf16 *in) {
#ifdef __AVX512BF16__
    uint32_t both;
    memcpy(&both, in, 4);
    return (vector)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)_mm512_set1_epi32((int)both));
#else
    sum = fused((vector)(weights << 16), in[0] - (vector){}, sum);
    return fused((vector)(weights & 0xffff0000u), in[1] - (vector){}, sum);
#endif
}

/* multiply: rows of in begin `stride` numbers apart, out is contiguous; outputs a multiple of 16, a row of inputs whole
   units of four bytes; bias (outputs) or none. `parts`: threads. pack: a weight in the order that multiply reads. */
#define PRODUCTS(T)                                                                                                   \
    struct tile_##T {                                                                                                 \
        const input_##T *in;                                                                                          \
        const T *weight, *bias;                                                                                       \
        T *out;                                                                                                       \
        long stride, inputs, outputs;                                                                                 \
    };                                                                                                                \
    static inline __attribute__((always_inline)) void tile_##T(struct tile_##T of, const int rows, const int blocks) {\
        vector sums[MOST_LINES][MOST_BLOCKS];                                                                         \
        long units = of.inputs * sizeof(T) / 4;                                                                       \
        UNROLLED for (int r = 0; r < rows; r++)                                                                       \
            UNROLLED for (int b = 0; b < blocks; b++) sums[r][b] = of.bias ? load_##T(of.bias + b * LANES) : (vector){};\
        for (long u = 0; u < units; u++) {                                                                            \
            wide weights[MOST_BLOCKS];                                                                                \
            UNROLLED for (int b = 0; b < blocks; b++) {                                                               \
                const char *at = (const char *)of.weight + (b * units + u) * sizeof(wide);                            \
                __builtin_prefetch(at + blocks * units * sizeof(wide), 0, 2); /* of the next tile */                  \
                memcpy(&weights[b], at, sizeof(wide));                                                                \
            }                                                                                                         \
            UNROLLED for (int r = 0; r < rows; r++)                                                                   \
                UNROLLED for (int b = 0; b < blocks; b++)                                                             \
                    sums[r][b] = added_##T(sums[r][b], weights[b], of.in + r * of.stride + u * 4 / sizeof(T));        \
        }                                                                                                             \
        UNROLLED for (int r = 0; r < rows; r++)                                                                       \
            UNROLLED for (int b = 0; b < blocks; b++) store_##T(of.out + r * of.outputs + b * LANES, sums[r][b]);     \
    }                                                                                                                 \
    static void tiles_##T(struct tile_##T of, int rows, int blocks) { /* 1 <= rows <= MOST_LINES */                   \
        while (blocks) {                                                                                              \
            int now = 1;                                                                                              \
            while (now * 2 <= blocks && now * 2 <= BLOCKS(T, rows)) now *= 2;                                         \
            switch (rows * 16 + now) { EVERY_TILE(T) }                                                                \
            of.weight += now * LANES * of.inputs, of.out += now * LANES, blocks -= now;                               \
            if (of.bias) of.bias += now * LANES;                                                                      \
        }                                                                                                             \
    }                                                                                                                 \
    void multiply_part_##T(const T *in, long stride, const T *weight, const T *bias, T *out, long rows, long inputs,  \
                           long outputs, long part, long parts) {                                                     \
        for (; rows > AT_ONCE_##T; rows -= AT_ONCE_##T, in += AT_ONCE_##T * stride, out += AT_ONCE_##T * outputs)     \
            multiply_part_##T(in, stride, weight, bias, out, AT_ONCE_##T, inputs, outputs, part, parts);              \
        long pieces = (rows + MOST_LINES - 1) / MOST_LINES, most = BLOCKS(T, rows / pieces);                          \
        long blocks = outputs / LANES, end = blocks * (part + 1) / parts;                                             \
        const input_##T *ready = ready_##T(in, &stride, rows, inputs);                                                \
        for (long first = blocks * part / parts; first < end; first += most)                                          \
            for (long piece = 0; piece < pieces; piece++) {                                                           \
                long row = rows * piece / pieces, to = rows * (piece + 1) / pieces, place = first * LANES;            \
                struct tile_##T of = {ready + row * stride, weight + place * inputs, bias ? bias + place : 0,         \
                                      out + row * outputs + place, stride, inputs, outputs};                          \
                tiles_##T(of, to - row, end - first < most ? end - first : most);                                     \
            }                                                                                                         \
    }                                                                                                                 \
    void multiply_##T(const T *in, const T *weight, const T *bias, T *out, long rows, long stride, long inputs,       \
                      long outputs, long parts) {                                                                     \
        _Pragma("omp parallel for schedule(static) num_threads(parts) if(parts > 1)")                                 \
        for (long part = 0; part < parts; part++)                                                                     \
            multiply_part_##T(in, stride, weight, bias, out, rows, inputs, outputs, part, parts);                     \
    }                                                                                                                 \
    void pack_##T(const T *weight, T *packed, long inputs, long outputs, long parts) {                                \
        const long unit = 4 / sizeof(T);                                                                              \
        _Pragma("omp parallel for schedule(static) num_threads(parts) if(parts > 1)")                                 \
        for (long first = 0; first < outputs; first += LANES)                                                         \
            for (long u = 0; u < inputs / unit; u++)                                                                  \
                for (long i = 0; i < LANES; i++)                                                                      \
                    memcpy(packed + first * inputs + (u * LANES + i) * unit, weight + (first + i) * inputs + u * unit, 4);\
    }

#define TILE(T, rows, blocks)                                                                                         \
    case rows * 16 + blocks: tile_##T(of, rows, blocks); break;
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
    TILE(T, 1, 1) TILE(T, 1, 2) TILE(T, 1, 4) TILE(T, 1, 8) TILE(T, 2, 1) TILE(T, 2, 2) TILE(T, 2, 4)                 \
    TILE(T, 3, 1) TILE(T, 3, 2) TILE(T, 3, 4) TILE(T, 4, 1) TILE(T, 4, 2) TILE(T, 5, 1) TILE(T, 5, 2)                 \
    TILE(T, 6, 1) TILE(T, 6, 2)
#endif

PRODUCTS(f32)
PRODUCTS(bf16)
