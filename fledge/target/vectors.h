/* Vectors of the processor's own width, and what reads numbers into them and writes them. */

#include <math.h>
#include <stdint.h>
#include <string.h>
#ifdef __FMA__
#include <immintrin.h>
#endif

#ifdef __AVX512F__
#define LANES 16
#else /* wider vectors than the processor's own are slow */
#define LANES 8
#endif

/* Rows that begin a multiple of 2048 bytes apart drive each other from the nearest cache: so many numbers more. */
#define APART(T, numbers) ((numbers) * sizeof(T) % 2048 ? (numbers) : (numbers) + 64 / (long)sizeof(T))

typedef uint16_t bf16;
typedef float f32;
typedef float vector __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));
typedef uint32_t wide __attribute__((vector_size(4 * LANES)));
typedef uint16_t narrow __attribute__((vector_size(2 * LANES)));

static inline vector load_f32(const f32 *at) {
    vector found;
    memcpy(&found, at, sizeof found);
    return found;
}

static inline vector load_bf16(const bf16 *at) {
    narrow found;
    memcpy(&found, at, sizeof found);
    return (vector)(__builtin_convertvector(found, wide) << 16);
}

static inline void store_f32(f32 *at, vector numbers) { memcpy(at, &numbers, sizeof numbers); }

static inline void store_bf16(bf16 *at, vector numbers) { /* to the nearest, ties to even */
    wide bits = (wide)numbers;
    wide nan = (wide)((bits & 0x7fffffff) > 0x7f800000);
    bits = (nan & 0x7fc00000) | (~nan & (bits + 0x7fff + ((bits >> 16) & 1)));
    narrow found = __builtin_convertvector(bits >> 16, narrow);
    memcpy(at, &found, sizeof found);
}

/* a * b + sum, rounded once wherever the processor can. Left to itself GCC rounds twice in some of the loops over sums
   (on Zen 2 and 3), and then a row's bits depend on the loop that it is in. */
static inline vector fused(vector a, vector b, vector sum) {
#if defined(__AVX512F__)
    return (vector)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)sum);
#elif defined(__FMA__)
    return (vector)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)sum);
#else
    return a * b + sum;
#endif
}

static inline float one_f32(const f32 *at) { return *at; }
static inline float one_bf16(const bf16 *at) {
    uint32_t bits = (uint32_t)*at << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

/* exp of x <= 0, to 2 in the last place; 0 below -86. 2^n times a polynomial of degree 6 on [-ln 2 / 2, ln 2 / 2]. */
static inline vector power(vector x) {
    integers hidden = x < -86.0f;
    x = (vector)((integers)x & ~hidden);
    vector n = x * 1.44269504f - 0.5f;
    integers whole = __builtin_convertvector(n, integers); /* towards zero: the nearest, of numbers below 0 */
    n = __builtin_convertvector(whole, vector);
    vector r = x - n * 0.693359375f + n * 2.12194440e-4f;
    vector p = r * (1.0f / 720) + 1.0f / 120;
    p = p * r + 1.0f / 24, p = p * r + 1.0f / 6, p = p * r + 0.5f, p = p * r + 1.0f, p = p * r + 1.0f;
    p = p * (vector)((whole + 127) << 23);
    return (vector)((integers)p & ~hidden);
}
