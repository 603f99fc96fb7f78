/* Vectors of the processor's own width, and what reads numbers into them and writes them. */

#include <math.h>
#include <stdint.h>
#include <string.h>

#ifdef __AVX512F__
#define LANES 16
#else /* wider vectors than the processor's own are slow */
#define LANES 8
#endif

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

static inline float one_f32(const f32 *at) { return *at; }
static inline float one_bf16(const bf16 *at) {
    uint32_t bits = (uint32_t)*at << 16;
    float value;
    memcpy(&value, &bits, 4);
    return value;
}
