/* What the two ways to make a crop share: jpeg_crop.c and scale.c. */

#ifndef CROP_H
#define CROP_H

#include <stddef.h>
#include <stdint.h>

enum { DONE, ANOTHER_KIND, DAMAGED, NEEDS_MEMORY }; /* results; in native.py too */
enum { VECTOR_BYTES = 64 };

/* A side of a crop: `count` pixels from number `first` on of the `scaled` ones that region [start, start + length) becomes. */
struct side {
    int start, length, scaled, first, count;
};

/* Memory of the caller, given out from the front: no call of malloc, and no page that is new each time. */
struct scratch {
    uint8_t *memory;
    size_t size, used;
};

/* Return `bytes` that are aligned for vectors, or NULL where not so many are left; `used` then says how many it takes. */
static inline void *take(struct scratch *scratch, size_t bytes)
{
    size_t start = scratch->used;

    scratch->used += (bytes + VECTOR_BYTES - 1) / VECTOR_BYTES * VECTOR_BYTES;
    return scratch->used <= scratch->size ? scratch->memory + start : NULL;
}

static inline double bilinear(double x)
{
    return x < 1 ? 1 - x : 0;
}

static inline double bicubic(double x) /* Keys 1981, with a = -0.5 */
{
    return x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0;
}

#endif
