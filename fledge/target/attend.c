/* Attention of few rows over a cache, for every sequence of a batch. Compiled by native.py.

   A row of the result depends on its own query, mask and visible keys alone, to the last bit: sums over keys are taken
   key by key, so keys between that are not seen change nothing, and company does not either. */

#include "vectors.h"

#define MOST_VECTORS (256 / LANES) /* of a head */
#define BLOCK 4         /* rows that share a reading of the keys */
#define UNSEEN -1e30f   /* a mask below is one that hides */

#ifdef __clang__
#define PICK(one, other, ...) __builtin_shufflevector(one, other, __VA_ARGS__)
#else
#define PICK(one, other, ...) __builtin_shuffle(one, other, (integers){__VA_ARGS__})
#endif

/* Of vectors one and other the sums of neighbouring parts of so many numbers, those of one and of other in turns. */
#if LANES == 16
#define FOLD_8(one, other)                                                                                            \
    PICK(one, other, 0, 1, 2, 3, 4, 5, 6, 7, 16, 17, 18, 19, 20, 21, 22, 23) +                                        \
        PICK(one, other, 8, 9, 10, 11, 12, 13, 14, 15, 24, 25, 26, 27, 28, 29, 30, 31)
#define FOLD_4(one, other)                                                                                            \
    PICK(one, other, 0, 1, 2, 3, 16, 17, 18, 19, 8, 9, 10, 11, 24, 25, 26, 27) +                                      \
        PICK(one, other, 4, 5, 6, 7, 20, 21, 22, 23, 12, 13, 14, 15, 28, 29, 30, 31)
#define FOLD_2(one, other)                                                                                            \
    PICK(one, other, 0, 1, 16, 17, 4, 5, 20, 21, 8, 9, 24, 25, 12, 13, 28, 29) +                                      \
        PICK(one, other, 2, 3, 18, 19, 6, 7, 22, 23, 10, 11, 26, 27, 14, 15, 30, 31)
#define FOLD_1(one, other)                                                                                            \
    PICK(one, other, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26, 12, 28, 14, 30) +                                     \
        PICK(one, other, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27, 13, 29, 15, 31)
#else
#define FOLD_4(one, other) PICK(one, other, 0, 1, 2, 3, 8, 9, 10, 11) + PICK(one, other, 4, 5, 6, 7, 12, 13, 14, 15)
#define FOLD_2(one, other) PICK(one, other, 0, 1, 8, 9, 4, 5, 12, 13) + PICK(one, other, 2, 3, 10, 11, 6, 7, 14, 15)
#define FOLD_1(one, other) PICK(one, other, 0, 8, 2, 10, 4, 12, 6, 14) + PICK(one, other, 1, 9, 3, 11, 5, 13, 7, 15)
#endif

/* The sum of each of LANES vectors, as a vector. */
static inline vector sums(vector *v) {
#if LANES == 16
    for (int i = 0; i < 8; i++) v[i] = FOLD_8(v[i], v[i + 8]);
#endif
    for (int i = 0; i < 4; i++) v[i] = FOLD_4(v[i], v[i + 4]);
    for (int i = 0; i < 2; i++) v[i] = FOLD_2(v[i], v[i + 2]);
    return FOLD_1(v[0], v[1]);
}

static inline vector capped(vector x, float cap) { /* cap * tanh(x / cap) */
    integers below = x < 0;
    x = (vector)((integers)x & 0x7fffffff);
    vector power_of = power(x * (-2.0f / cap));
    x = cap * (1 - power_of) / (1 + power_of);
    return (vector)((integers)x | (below & (int32_t)0x80000000));
}

/* attend: query (batch, heads, rows, size) contiguous; key (batch, groups, keys, size) and value (.., value_size) with
   these strides, the last of them 1; mask, added to scores, (batch, rows, keys) with these strides, the last 1, or none:
   all is seen; sinks (heads), a score each of a key without a value, or none; softcap of scores, or 0; out (batch, rows,
   heads, value_size). `scores`: room for BLOCK times as many numbers as keys, filled up to LANES, for each of `parts`
   threads. Sizes are multiples of LANES. */
#define ATTENTION(T)                                                                                                  \
    struct lines_##T { /* up to BLOCK rows that read the same keys */                                                 \
        const T *query[BLOCK], *mask[BLOCK], *key, *value;                                                            \
        T *out[BLOCK];                                                                                                \
        float sink[BLOCK], scale, cap, *scores;                                                                       \
        long keys, key_row, value_row;                                                                                \
    };                                                                                                                \
    static inline __attribute__((always_inline)) void block_##T(                                                      \
        const struct lines_##T *of, const int rows, const int vectors, const int value_vectors) {                     \
        vector asked[BLOCK][MOST_VECTORS], mixed[BLOCK][MOST_VECTORS], most[BLOCK];                                   \
        float total[BLOCK];                                                                                           \
        long keys = of->keys, filled = (keys + LANES - 1) / LANES * LANES;                                            \
        for (int r = 0; r < rows; r++) {                                                                              \
            most[r] = (vector){} + of->sink[r];                                                                       \
            for (int c = 0; c < vectors; c++) asked[r][c] = load_##T(of->query[r] + c * LANES) * of->scale;           \
            for (int c = 0; c < value_vectors; c++) mixed[r][c] = (vector){};                                         \
        }                                                                                                             \
        for (long first = 0; first < keys; first += LANES) {                                                          \
            long here = keys - first < LANES ? keys - first : LANES;                                                  \
            vector products[BLOCK][LANES];                                                                            \
            for (int k = 0; k < LANES; k++) {                                                                         \
                const T *at = of->key + (first + (k < here ? k : here - 1)) * of->key_row;                            \
                vector read[MOST_VECTORS];                                                                            \
                for (int c = 0; c < vectors; c++) read[c] = load_##T(at + c * LANES);                                 \
                for (int r = 0; r < rows; r++) {                                                                      \
                    vector sum = asked[r][0] * read[0];                                                               \
                    for (int c = 1; c < vectors; c++) sum = fused(asked[r][c], read[c], sum);                         \
                    products[r][k] = sum;                                                                             \
                }                                                                                                     \
            }                                                                                                         \
            for (int r = 0; r < rows; r++) {                                                                          \
                vector found = sums(products[r]);                                                                     \
                if (of->cap > 0) found = capped(found, of->cap);                                                      \
                if (of->mask[r] && here == LANES) found += load_##T(of->mask[r] + first);                             \
                for (long k = 0; here < LANES && k < LANES; k++) {                                                    \
                    if (k >= here) found[k] = -INFINITY;                                                              \
                    else if (of->mask[r]) found[k] += one_##T(of->mask[r] + first + k);                               \
                }                                                                                                     \
                integers more = found > most[r];                                                                      \
                most[r] = (vector)(((integers)found & more) | ((integers)most[r] & ~more));                           \
                store_f32(of->scores + r * filled + first, found);                                                    \
            }                                                                                                         \
        }                                                                                                             \
        for (int r = 0; r < rows; r++) {                                                                              \
            float largest = most[r][0];                                                                               \
            for (int i = 1; i < LANES; i++) largest = most[r][i] > largest ? most[r][i] : largest;                    \
            for (long first = 0; first < keys; first += LANES) {                                                      \
                float *at = of->scores + r * filled + first;                                                          \
                store_f32(at, power(load_f32(at) - largest));                                                         \
            }                                                                                                         \
            total[r] = power((vector){} + (of->sink[r] - largest))[0];                                                \
        }                                                                                                             \
        for (long k = 0; k < keys; k++) {                                                                             \
            const T *at = of->value + k * of->value_row;                                                              \
            vector read[MOST_VECTORS];                                                                                \
            for (int c = 0; c < value_vectors; c++) read[c] = load_##T(at + c * LANES);                               \
            for (int r = 0; r < rows; r++) {                                                                          \
                float weight = of->scores[r * filled + k];                                                            \
                vector spread = weight - (vector){};                                                                  \
                total[r] += weight;                                                                                   \
                for (int c = 0; c < value_vectors; c++) mixed[r][c] = fused(spread, read[c], mixed[r][c]);            \
            }                                                                                                         \
        }                                                                                                             \
        for (int r = 0; r < rows; r++)                                                                                \
            for (int c = 0; c < value_vectors; c++) store_##T(of->out[r] + c * LANES, mixed[r][c] / total[r]);        \
    }                                                                                                                 \
    static void some_##T(const struct lines_##T *of, int rows, int vectors, int value_vectors) {                      \
        int size = vectors == value_vectors ? vectors * LANES : 0;                                                    \
        switch (size == 64 ? rows : size == 128 ? BLOCK + rows : 0) {                                                 \
        case 1: return block_##T(of, 1, 64 / LANES, 64 / LANES);                                                      \
        case 2: return block_##T(of, 2, 64 / LANES, 64 / LANES);                                                      \
        case 3: return block_##T(of, 3, 64 / LANES, 64 / LANES);                                                      \
        case 4: return block_##T(of, 4, 64 / LANES, 64 / LANES);                                                      \
        case 5: return block_##T(of, 1, 128 / LANES, 128 / LANES);                                                    \
        case 6: return block_##T(of, 2, 128 / LANES, 128 / LANES);                                                    \
        case 7: return block_##T(of, 3, 128 / LANES, 128 / LANES);                                                    \
        case 8: return block_##T(of, 4, 128 / LANES, 128 / LANES);                                                    \
        default: block_##T(of, rows, vectors, value_vectors);                                                         \
        }                                                                                                             \
    }                                                                                                                 \
    void attend_##T(const T *query, const T *key, const T *value, const T *mask, const T *sinks, T *out,              \
                    float *scores, long batch, long heads, long groups, long rows, long keys, long size,              \
                    long value_size, long key_batch, long key_head, long key_row, long value_batch, long value_head,  \
                    long value_row, long mask_batch, long mask_row, long parts, float scale, float softcap) {         \
        long share = heads / groups, lines = share * rows, blocks = (lines + BLOCK - 1) / BLOCK;                      \
        long tasks = batch * groups * blocks, room = BLOCK * ((keys + LANES - 1) / LANES * LANES);                    \
        _Pragma("omp parallel for schedule(static) num_threads(parts) if(parts > 1)")                                 \
        for (long part = 0; part < parts; part++)                                                                     \
            for (long task = tasks * part / parts; task < tasks * (part + 1) / parts; task++) {                       \
                long b = task / (groups * blocks), g = task / blocks % groups, first = task % blocks * BLOCK;         \
                long begin = mask ? keys : 0, end = mask ? 0 : keys;                                                  \
                int count = lines - first < BLOCK ? lines - first : BLOCK;                                            \
                struct lines_##T of = {.scale = scale, .cap = softcap, .scores = scores + part * room};               \
                for (int r = 0; r < count; r++) {                                                                     \
                    long head = g * share + (first + r) / rows, row = (first + r) % rows;                             \
                    of.query[r] = query + ((b * heads + head) * rows + row) * size;                                   \
                    of.out[r] = out + ((b * rows + row) * heads + head) * value_size;                                 \
                    of.sink[r] = sinks ? one_##T(sinks + head) : -INFINITY;                                           \
                    of.mask[r] = mask ? mask + b * mask_batch + row * mask_row : 0;                                   \
                    if (!mask || (r && of.mask[r] == of.mask[r - 1])) continue;                                       \
                    long from = 0, to = keys;                                                                         \
                    while (from < keys && one_##T(of.mask[r] + from) < UNSEEN) from++;                                \
                    while (to > from && one_##T(of.mask[r] + to - 1) < UNSEEN) to--;                                  \
                    begin = from < begin ? from : begin, end = to > end ? to : end;                                   \
                }                                                                                                     \
                if (begin >= end) begin = 0, end = keys; /* nothing is seen: as a softmax has it */                   \
                for (int r = 0; r < count && mask; r++) of.mask[r] += begin;                                          \
                of.key = key + b * key_batch + g * key_head + begin * key_row;                                        \
                of.value = value + b * value_batch + g * value_head + begin * value_row;                              \
                of.keys = end - begin, of.key_row = key_row, of.value_row = value_row;                                \
                some_##T(&of, count, size / LANES, value_size / LANES);                                               \
            }                                                                                                         \
    }

ATTENTION(f32)
ATTENTION(bf16)
