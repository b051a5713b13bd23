/* The sums of Winograd's F(4x4, 3x3) for trainer/winograd.py, which says what they are.

Images are (count, height, width, channels) and tiles (36, count * down * right, channels), contiguous, of float32 or, if `half`,
of bfloat16; sums are of float32. Along each axis, a tile t of an image has four outputs from 4 t on, and six inputs from
4 t - padding on, which are zero outside of the image. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>

enum { FILTER = 3, STEP = 4, SIDE = 6, LANES = 32 }; /* channels at once: bfloat16 of a cache line */
#define POINT_A (2.0f / 3)
#define POINT_B (3.0f / 2) /* 1 / POINT_A, which is used below */
#define A_SQUARED (POINT_A * POINT_A)
#define B_SQUARED (POINT_B * POINT_B)
#define F_OF_A (2 * A_SQUARED * (A_SQUARED - B_SQUARED)) /* product of the distances of a from the other points */
#define F_OF_B (2 * B_SQUARED * (B_SQUARED - A_SQUARED))
typedef float Lanes[LANES] __attribute__((aligned(64)));
typedef Lanes Tile[SIDE][SIDE];
typedef void Sums(const float *restrict in, float *restrict out, long stride); /* of elements `stride` floats apart */

typedef struct {
    long count, height, width, channels, padding, down, right, half, threads;
    const void *bias; /* (channels), or NULL; added by collect_outputs */
} Shape;

static inline float to_float(uint16_t bfloat16) {
    uint32_t bits = (uint32_t)bfloat16 << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint16_t to_bfloat16(float value) { /* the nearest, of two the even one; a NaN that sums of bfloat16 give stays one */
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}

/* From `channel` on, of the pixel or tile `at`; lanes behind the last channel are zero. Whole Lanes have loops of their own, of a
   length that the compiler knows. */
static inline void load(const void *from, long at, long channel, Lanes to, const Shape *s) {
    long lanes = s->channels - channel;
    const uint16_t *halves = (const uint16_t *)from + at * s->channels + channel;
    const float *floats = (const float *)from + at * s->channels + channel;
    if (lanes < LANES) {
        memset(to, 0, sizeof(Lanes));
        for (long lane = 0; lane < lanes; lane++) to[lane] = s->half ? to_float(halves[lane]) : floats[lane];
    } else if (s->half) {
        for (long lane = 0; lane < LANES; lane++) to[lane] = to_float(halves[lane]);
    } else {
        memcpy(to, floats, sizeof(Lanes));
    }
}

static inline void store(const Lanes from, void *to, long at, long channel, const Shape *s) {
    long lanes = s->channels - channel;
    uint16_t *halves = (uint16_t *)to + at * s->channels + channel;
    float *floats = (float *)to + at * s->channels + channel;
    if (lanes < LANES) {
        for (long lane = 0; lane < lanes; lane++)
            if (s->half) halves[lane] = to_bfloat16(from[lane]);
            else floats[lane] = from[lane];
    } else if (s->half) {
        for (long lane = 0; lane < LANES; lane++) halves[lane] = to_bfloat16(from[lane]);
    } else {
        memcpy(floats, from, sizeof(Lanes));
    }
}

/* out = M in along one axis, where the name says which matrix M is. Results for a and -a, and for b and -b, differ in the sign
   of what is odd. */

static inline void times_b_transposed(const float *restrict in, float *restrict out, long stride) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *d = in + lane;
        float d0 = d[0], d1 = d[stride], d2 = d[2 * stride], d3 = d[3 * stride], d4 = d[4 * stride], d5 = d[5 * stride];
        float *o = out + lane, even = d4 - B_SQUARED * d2, odd = POINT_A * d3 - POINT_B * d1;
        o[0] = d0 - (A_SQUARED + B_SQUARED) * d2 + d4;
        o[stride] = even + odd;
        o[2 * stride] = even - odd;
        even = d4 - A_SQUARED * d2, odd = POINT_B * d3 - POINT_A * d1;
        o[3 * stride] = even + odd;
        o[4 * stride] = even - odd;
        o[5 * stride] = d1 - (A_SQUARED + B_SQUARED) * d3 + d5;
    }
}

static inline void times_b(const float *restrict in, float *restrict out, long stride) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *t = in + lane;
        float t0 = t[0], t1 = t[stride], t2 = t[2 * stride], t3 = t[3 * stride], t4 = t[4 * stride], t5 = t[5 * stride];
        float *o = out + lane, sum_a = t1 + t2, difference_a = t1 - t2, sum_b = t3 + t4, difference_b = t3 - t4;
        o[0] = t0;
        o[stride] = t5 - POINT_B * difference_a - POINT_A * difference_b;
        o[2 * stride] = -(A_SQUARED + B_SQUARED) * t0 - B_SQUARED * sum_a - A_SQUARED * sum_b;
        o[3 * stride] = POINT_A * difference_a + POINT_B * difference_b - (A_SQUARED + B_SQUARED) * t5;
        o[4 * stride] = t0 + sum_a + sum_b;
        o[5 * stride] = t5;
    }
}

static inline void times_a(const float *restrict in, float *restrict out, long stride) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *y = in + lane;
        float y0 = y[0], y1 = y[stride], y2 = y[2 * stride], y3 = y[3 * stride];
        float *o = out + lane, even = y0 + A_SQUARED * y2, odd = POINT_A * y1 + A_SQUARED * POINT_A * y3;
        o[0] = y0;
        o[stride] = even + odd;
        o[2 * stride] = even - odd;
        even = y0 + B_SQUARED * y2, odd = POINT_B * y1 + B_SQUARED * POINT_B * y3;
        o[3 * stride] = even + odd;
        o[4 * stride] = even - odd;
        o[5 * stride] = y3;
    }
}

static inline void times_a_transposed(const float *restrict in, float *restrict out, long stride) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *m = in + lane;
        float m1 = m[stride], m2 = m[2 * stride], m3 = m[3 * stride], m4 = m[4 * stride];
        float *o = out + lane, sum_a = m1 + m2, difference_a = m1 - m2, sum_b = m3 + m4, difference_b = m3 - m4;
        o[0] = m[0] + sum_a + sum_b;
        o[stride] = POINT_A * difference_a + POINT_B * difference_b;
        o[2 * stride] = A_SQUARED * sum_a + B_SQUARED * sum_b;
        o[3 * stride] = A_SQUARED * POINT_A * difference_a + B_SQUARED * POINT_B * difference_b + m[5 * stride];
    }
}

static inline void times_g(const float *restrict in, float *restrict out, long stride) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *g = in + lane;
        float *o = out + lane, even = (g[0] + A_SQUARED * g[2 * stride]) / F_OF_A, odd = POINT_A * g[stride] / F_OF_A;
        o[0] = g[0];
        o[stride] = even + odd;
        o[2 * stride] = even - odd;
        even = (g[0] + B_SQUARED * g[2 * stride]) / F_OF_B, odd = POINT_B * g[stride] / F_OF_B;
        o[3 * stride] = even + odd;
        o[4 * stride] = even - odd;
        o[5 * stride] = g[2 * stride];
    }
}

static inline void times_g_transposed(const float *restrict in, float *restrict out, long stride) {
    for (long lane = 0; lane < LANES; lane++) {
        const float *u = in + lane;
        float u1 = u[stride], u2 = u[2 * stride], u3 = u[3 * stride], u4 = u[4 * stride];
        float *o = out + lane, sum_a = (u1 + u2) / F_OF_A, sum_b = (u3 + u4) / F_OF_B;
        o[0] = u[0] + sum_a + sum_b;
        o[stride] = POINT_A * (u1 - u2) / F_OF_A + POINT_B * (u3 - u4) / F_OF_B;
        o[2 * stride] = A_SQUARED * sum_a + B_SQUARED * sum_b + u[5 * stride];
    }
}

static inline void along_both_axes(Sums *sums, int side_before, int side_after, Tile in, Tile out) {
    Tile rows;
    for (int column = 0; column < side_before; column++) sums(in[0][column], rows[0][column], SIDE * LANES);
    for (int row = 0; row < side_after; row++) sums(rows[row][0], out[row][0], LANES);
}

static inline void to_tile(Sums *sums, int side, long padding, const void *images, void *tiles, long tile, const Shape *s) {
    long image = tile / (s->down * s->right), all = s->count * s->down * s->right;
    long top = STEP * (tile / s->right % s->down) - padding, left = STEP * (tile % s->right) - padding;
    for (long channel = 0; channel < s->channels; channel += LANES) {
        Tile in, out;
        for (int row = 0; row < side; row++)
            for (int column = 0; column < side; column++) {
                long y = top + row, x = left + column;
                if (y >= 0 && y < s->height && x >= 0 && x < s->width)
                    load(images, (image * s->height + y) * s->width + x, channel, in[row][column], s);
                else
                    memset(in[row][column], 0, sizeof(Lanes));
            }
        along_both_axes(sums, side, SIDE, in, out);
        for (int k = 0; k < SIDE * SIDE; k++) store(out[k / SIDE][k % SIDE], tiles, k * all + tile, channel, s);
    }
}

/* B^T d B */
void transform_inputs(const void *images, void *tiles, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->count * s->down * s->right; tile++)
        to_tile(times_b_transposed, SIDE, s->padding, images, tiles, tile, s);
}

/* A y A^T */
void transform_outputs(const void *images, void *tiles, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->count * s->down * s->right; tile++) to_tile(times_a, STEP, 0, images, tiles, tile, s);
}

/* G g G^T; filters (count, 3, 3, channels) have one tile each */
void transform_filters(const void *filters, void *tiles, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->count; tile++) to_tile(times_g, FILTER, 0, filters, tiles, tile, s);
}

/* One of `all` tiles, whose 36 numbers of a channel lie `all` tiles apart. */
static inline void load_tile(const void *tiles, long all, long tile, long channel, Tile in, const Shape *s) {
    for (int k = 0; k < SIDE * SIDE; k++) load(tiles, k * all + tile, channel, in[k / SIDE][k % SIDE], s);
}

/* A^T m A + bias */
void collect_outputs(const void *tiles, void *images, const Shape *s) {
    long all = s->count * s->down * s->right;
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < all; tile++) {
        long image = tile / (s->down * s->right), top = STEP * (tile / s->right % s->down), left = STEP * (tile % s->right);
        for (long channel = 0; channel < s->channels; channel += LANES) {
            Tile in, out;
            Lanes bias = {0};
            load_tile(tiles, all, tile, channel, in, s);
            along_both_axes(times_a_transposed, SIDE, STEP, in, out);
            if (s->bias) load(s->bias, 0, channel, bias, s);
            for (long row = 0; row < STEP && top + row < s->height; row++)
                for (long column = 0; column < STEP && left + column < s->width; column++) {
                    for (int lane = 0; lane < LANES; lane++) out[row][column][lane] += bias[lane];
                    store(out[row][column], images, (image * s->height + top + row) * s->width + left + column, channel, s);
                }
        }
    }
}

/* G^T u G, added to what `filters`, always of float32, hold already */
void collect_filters(const void *tiles, float *filters, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long filter = 0; filter < s->count; filter++)
        for (long channel = 0; channel < s->channels; channel += LANES) {
            Tile in, out;
            load_tile(tiles, s->count, filter, channel, in, s);
            along_both_axes(times_g_transposed, SIDE, FILTER, in, out);
            for (int k = 0; k < FILTER * FILTER; k++)
                for (long lane = 0; lane < LANES && channel + lane < s->channels; lane++)
                    filters[(filter * FILTER * FILTER + k) * s->channels + channel + lane] += out[k / FILTER][k % FILTER][lane];
        }
}

/* B t B^T, the transpose of transform_inputs: where tiles overlap, what they hold is added. */
void collect_inputs(const void *tiles, void *images, const Shape *s) {
    long all = s->count * s->down * s->right, width = STEP * s->right + SIDE - STEP;
#pragma omp parallel for collapse(2) num_threads(s->threads)
    for (long image = 0; image < s->count; image++)
        for (long channel = 0; channel < s->channels; channel += LANES) {
            Lanes(*strip)[width] = aligned_alloc(sizeof(Lanes), SIDE * sizeof *strip); /* of the padded image, as high as a tile */
            memset(strip, 0, SIDE * sizeof *strip);
            for (long down = 0; down < s->down; down++) {
                for (long right = 0; right < s->right; right++) {
                    Tile in, out;
                    load_tile(tiles, all, (image * s->down + down) * s->right + right, channel, in, s);
                    along_both_axes(times_b, SIDE, SIDE, in, out);
                    for (int row = 0; row < SIDE; row++)
                        for (int column = 0; column < SIDE; column++)
                            for (int lane = 0; lane < LANES; lane++)
                                strip[row][STEP * right + column][lane] += out[row][column][lane];
                }
                int complete = down + 1 < s->down ? STEP : SIDE; /* rows to which no further tile adds */
                for (int row = 0; row < complete; row++) {
                    long y = STEP * down + row - s->padding;
                    for (long x = 0; x < s->width && y >= 0 && y < s->height; x++)
                        store(strip[row][x + s->padding], images, (image * s->height + y) * s->width + x, channel, s);
                }
                memmove(strip, strip + STEP, (SIDE - STEP) * sizeof *strip);
                memset(strip + SIDE - STEP, 0, STEP * sizeof *strip);
            }
            free(strip);
        }
}
