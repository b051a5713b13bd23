/* The sums of Winograd's F(4x4, 3x3) for trainer/kernels/winograd.py, which explains them.

Images are (count, height, width, channels) and tiles (36, rows, channels), both contiguous, in float32 or, if `half`, in
bfloat16; sums are in float32. Along each axis, tile t of an image has four outputs from 4 t on, and six inputs from 4 t - padding
on, which are zero outside the image. There are count * down * right tiles; transforms set any further rows to zero. */

#include <stdint.h>
#include <stdlib.h>
#include <string.h>
#ifdef __AVX512BF16__
#include <immintrin.h>
#endif

enum { FILTER = 3, STEP = 4, SIDE = 6, OVERLAP = SIDE - STEP };
#ifdef __AVX512F__
enum { LANES = 16 }; /* floats of a register */
#else
enum { LANES = 8 };
#endif
#define POINT_A (2.0f / 3)
#define POINT_B (3.0f / 2) /* 1 / POINT_A, which is used below */
#define A_SQUARED (POINT_A * POINT_A)
#define B_SQUARED (POINT_B * POINT_B)
#define BY_F_OF_A (1 / (2 * A_SQUARED * (A_SQUARED - B_SQUARED))) /* 1 / product of the distances of a from the other points */
#define BY_F_OF_B (1 / (2 * B_SQUARED * (B_SQUARED - A_SQUARED)))
#define INLINE static inline __attribute__((always_inline)) /* so that constant arguments stay constants */

typedef float Lanes __attribute__((vector_size(LANES * 4))); /* one number of each of LANES channels */
typedef uint32_t Bits __attribute__((vector_size(LANES * 4)));
typedef uint16_t Halves __attribute__((vector_size(LANES * 2)));
typedef void Transform(const Lanes *in, Lanes *out);

typedef struct {
    long count, height, width, channels, padding, down, right, rows, half, threads;
    long rectify;        /* whether collect_outputs sets negative outputs to 0 */
    const char *bias;    /* (channels), or NULL; collect_outputs adds it */
    const char *outputs; /* rectified ones, or NULL: where they are 0, transform_gradient uses a gradient of 0 */
    float *pixel_sums;   /* (rows, channels), or NULL: transform_gradient writes sums of the gradient over each tile's pixels */
} Shape;

typedef struct {
    long first, count; /* at most LANES channels */
    int half;
} Channels;

/* Addresses of channel 0 of each number of a tile, in images or in tiles; NULL outside an image. */
typedef char *Places[SIDE][SIDE];

INLINE Lanes to_lanes(Halves halves) {
#ifdef __AVX512BF16__ /* two instructions; GCC 12 turns the other line into five */
    return (Lanes)_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)halves), 16);
#else
    return (Lanes)(__builtin_convertvector(halves, Bits) << 16);
#endif
}

INLINE Halves to_halves(Lanes lanes) { /* rounds to nearest even; a NaN from sums of bfloat16 stays NaN */
#ifdef __AVX512BF16__ /* subnormal numbers become zero */
    return (Halves)_mm512_cvtneps_pbh((__m512)lanes);
#else
    Bits bits = (Bits)lanes;
    return __builtin_convertvector((bits + 0x7fff + (bits >> 16 & 1)) >> 16, Halves);
#endif
}

/* Returns zeros for a NULL place, and in lanes after the last channel. Full Lanes have separate calls to memcpy, whose size the
   compiler knows. */
INLINE Lanes load(const char *place, Channels c) {
    Lanes floats = {0};
    Halves halves = {0};
    if (!place) return floats;
    if (!c.half) {
        const float *from = (const float *)place + c.first;
        if (c.count == LANES) memcpy(&floats, from, sizeof floats);
        else memcpy(&floats, from, c.count * sizeof *from);
        return floats;
    }
    const uint16_t *from = (const uint16_t *)place + c.first;
    if (c.count == LANES) memcpy(&halves, from, sizeof halves);
    else memcpy(&halves, from, c.count * sizeof *from);
    return to_lanes(halves);
}

INLINE void store(Lanes floats, char *place, Channels c) {
    if (!place) return;
    if (!c.half) {
        float *to = (float *)place + c.first;
        if (c.count == LANES) memcpy(to, &floats, sizeof floats);
        else memcpy(to, &floats, c.count * sizeof *to);
        return;
    }
    Halves halves = to_halves(floats);
    uint16_t *to = (uint16_t *)place + c.first;
    if (c.count == LANES) memcpy(to, &halves, sizeof halves);
    else memcpy(to, &halves, c.count * sizeof *to);
}

/* Calls work(channels, ...) for all channels from `from` to `to`, with separate code for full Lanes in each format. */
#define FOR_CHANNELS(from, to, half, work, ...)                             \
    for (long first = from; first < (to); first += LANES) {                 \
        long left = (to) - first;                                           \
        if (left < LANES) work(((Channels){first, left, half}), __VA_ARGS__); \
        else if (half) work(((Channels){first, LANES, 1}), __VA_ARGS__);    \
        else work(((Channels){first, LANES, 0}), __VA_ARGS__);              \
    }

/* out = M in along one axis, where the function's name says which matrix M is. Results for a and -a, and for b and -b, differ in
   the sign of the odd part. */

INLINE void times_b_transposed(const Lanes *d, Lanes *out) {
    Lanes even = d[4] - B_SQUARED * d[2], odd = POINT_A * d[3] - POINT_B * d[1];
    out[0] = d[0] - (A_SQUARED + B_SQUARED) * d[2] + d[4];
    out[1] = even + odd;
    out[2] = even - odd;
    even = d[4] - A_SQUARED * d[2], odd = POINT_B * d[3] - POINT_A * d[1];
    out[3] = even + odd;
    out[4] = even - odd;
    out[5] = d[1] - (A_SQUARED + B_SQUARED) * d[3] + d[5];
}

INLINE void times_b(const Lanes *t, Lanes *out) {
    Lanes sum_a = t[1] + t[2], difference_a = t[1] - t[2], sum_b = t[3] + t[4], difference_b = t[3] - t[4];
    out[0] = t[0];
    out[1] = t[5] - POINT_B * difference_a - POINT_A * difference_b;
    out[2] = -(A_SQUARED + B_SQUARED) * t[0] - B_SQUARED * sum_a - A_SQUARED * sum_b;
    out[3] = POINT_A * difference_a + POINT_B * difference_b - (A_SQUARED + B_SQUARED) * t[5];
    out[4] = t[0] + sum_a + sum_b;
    out[5] = t[5];
}

INLINE void times_a(const Lanes *y, Lanes *out) {
    Lanes even = y[0] + A_SQUARED * y[2], odd = POINT_A * y[1] + A_SQUARED * POINT_A * y[3];
    out[0] = y[0];
    out[1] = even + odd;
    out[2] = even - odd;
    even = y[0] + B_SQUARED * y[2], odd = POINT_B * y[1] + B_SQUARED * POINT_B * y[3];
    out[3] = even + odd;
    out[4] = even - odd;
    out[5] = y[3];
}

INLINE void times_a_transposed(const Lanes *m, Lanes *out) {
    Lanes sum_a = m[1] + m[2], difference_a = m[1] - m[2], sum_b = m[3] + m[4], difference_b = m[3] - m[4];
    out[0] = m[0] + sum_a + sum_b;
    out[1] = POINT_A * difference_a + POINT_B * difference_b;
    out[2] = A_SQUARED * sum_a + B_SQUARED * sum_b;
    out[3] = A_SQUARED * POINT_A * difference_a + B_SQUARED * POINT_B * difference_b + m[5];
}

INLINE void times_g(const Lanes *g, Lanes *out) {
    Lanes even = BY_F_OF_A * (g[0] + A_SQUARED * g[2]), odd = BY_F_OF_A * POINT_A * g[1];
    out[0] = g[0];
    out[1] = even + odd;
    out[2] = even - odd;
    even = BY_F_OF_B * (g[0] + B_SQUARED * g[2]), odd = BY_F_OF_B * POINT_B * g[1];
    out[3] = even + odd;
    out[4] = even - odd;
    out[5] = g[2];
}

INLINE void times_g_transposed(const Lanes *u, Lanes *out) {
    Lanes sum_a = BY_F_OF_A * (u[1] + u[2]), sum_b = BY_F_OF_B * (u[3] + u[4]);
    out[0] = u[0] + sum_a + sum_b;
    out[1] = BY_F_OF_A * POINT_A * (u[1] - u[2]) + BY_F_OF_B * POINT_B * (u[3] - u[4]);
    out[2] = A_SQUARED * sum_a + B_SQUARED * sum_b + u[5];
}

/* Computes M T, where T are the before x before numbers at `from`. */
INLINE void along_columns(Channels c, Transform *times_m, int before, int after, Places from, Lanes to[SIDE][SIDE]) {
    for (int column = 0; column < before; column++) {
        Lanes in[SIDE], out[SIDE];
#pragma GCC unroll 6
        for (int row = 0; row < before; row++) in[row] = load(from[row][column], c);
        times_m(in, out);
#pragma GCC unroll 6
        for (int row = 0; row < after; row++) to[row][column] = out[row];
    }
}

/* x where a is above 0 or NaN, else 0 */
INLINE Lanes where_positive(Lanes a, Lanes x) { return (Lanes)((Bits)x & ~(Bits)(a <= 0)); }

/* M T M^T */
INLINE void along_both_axes(Channels c, Transform *times_m, int before, int after, Places from, Places to) {
    Lanes half_way[SIDE][SIDE], out[SIDE];
    along_columns(c, times_m, before, after, from, half_way);
    for (int row = 0; row < after; row++) {
        times_m(half_way[row], out);
#pragma GCC unroll 6
        for (int column = 0; column < after; column++) store(out[column], to[row][column], c);
    }
}

/* Finds the side x side pixels of a tile; `outside` rows are above the first output, and as many columns left of it. */
INLINE void find_pixels(Places places, const void *images, long tile, int side, long outside, const Shape *s) {
    long image = tile / (s->down * s->right), bytes = s->channels * (s->half ? 2 : 4);
    long top = STEP * (tile / s->right % s->down) - outside, left = STEP * (tile % s->right) - outside;
    for (int row = 0; row < side; row++)
        for (int column = 0; column < side; column++) {
            long y = top + row, x = left + column;
            int inside = image < s->count && y >= 0 && y < s->height && x >= 0 && x < s->width;
            places[row][column] = inside ? (char *)images + ((image * s->height + y) * s->width + x) * bytes : NULL;
        }
}

INLINE void find_tile(Places places, const void *tiles, long tile, const Shape *s) {
    long bytes = s->channels * (s->half ? 2 : 4);
    for (int k = 0; k < SIDE * SIDE; k++) places[k / SIDE][k % SIDE] = (char *)tiles + (k * s->rows + tile) * bytes;
}

INLINE void to_tile(Transform *times_m, int side, long outside, const void *images, void *tiles, long tile, const Shape *s) {
    Places from, to;
    find_pixels(from, images, tile, side, outside, s);
    find_tile(to, tiles, tile, s);
    FOR_CHANNELS(0, s->channels, s->half, along_both_axes, times_m, side, SIDE, from, to)
}

/* B^T d B */
void transform_inputs(const void *images, void *tiles, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->rows; tile++) to_tile(times_b_transposed, SIDE, s->padding, images, tiles, tile, s);
}

/* A y A^T, and the sum of y, which is masked while in registers */
INLINE void gradient_to_tile(Channels c, Places from, Places outputs, int rectified, Places to, float *sums) {
    Lanes half_way[SIDE][SIDE], in[SIDE], out[SIDE], sum = {0};
    for (int column = 0; column < STEP; column++) {
#pragma GCC unroll 4
        for (int row = 0; row < STEP; row++) {
            in[row] = load(from[row][column], c);
            if (rectified) in[row] = where_positive(load(outputs[row][column], c), in[row]);
            sum += in[row];
        }
        times_a(in, out);
#pragma GCC unroll 6
        for (int row = 0; row < SIDE; row++) half_way[row][column] = out[row];
    }
    store(sum, (char *)sums, (Channels){c.first, c.count, 0});
    for (int row = 0; row < SIDE; row++) {
        times_a(half_way[row], out);
#pragma GCC unroll 6
        for (int column = 0; column < SIDE; column++) store(out[column], to[row][column], c);
    }
}

/* A y A^T of the outputs' gradient, and its sums */
void transform_gradient(const void *images, void *tiles, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->rows; tile++) {
        Places from, outputs, to;
        float *sums = s->pixel_sums ? s->pixel_sums + tile * s->channels : NULL;
        find_pixels(from, images, tile, STEP, 0, s);
        find_tile(to, tiles, tile, s);
        if (s->outputs) {
            find_pixels(outputs, s->outputs, tile, STEP, 0, s);
            FOR_CHANNELS(0, s->channels, s->half, gradient_to_tile, from, outputs, 1, to, sums)
        } else {
            FOR_CHANNELS(0, s->channels, s->half, gradient_to_tile, from, outputs, 0, to, sums)
        }
    }
}

/* G g G^T; filters (count, 3, 3, channels) have one tile each */
void transform_filters(const void *filters, void *tiles, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->rows; tile++) to_tile(times_g, FILTER, 0, filters, tiles, tile, s);
}

INLINE void tile_to_outputs(Channels c, Places from, Places to, const char *bias, int rectify) {
    Lanes half_way[SIDE][SIDE], out[SIDE], added = load(bias, c);
    along_columns(c, times_a_transposed, SIDE, STEP, from, half_way);
    for (int row = 0; row < STEP; row++) {
        times_a_transposed(half_way[row], out);
#pragma GCC unroll 4
        for (int column = 0; column < STEP; column++) {
            out[column] += added;
            store(rectify ? where_positive(out[column], out[column]) : out[column], to[row][column], c);
        }
    }
}

/* A^T m A + bias; with `rectify`, negative values become zero */
void collect_outputs(const void *tiles, void *images, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long tile = 0; tile < s->count * s->down * s->right; tile++) {
        Places from, to;
        find_tile(from, tiles, tile, s);
        find_pixels(to, images, tile, STEP, 0, s);
        FOR_CHANNELS(0, s->channels, s->half, tile_to_outputs, from, to, s->bias, s->rectify)
    }
}

INLINE void add_to_filter(Channels c, Places from, float *filter, long channels) {
    Lanes half_way[SIDE][SIDE], out[SIDE];
    Channels floats = {c.first, c.count, 0};
    along_columns(c, times_g_transposed, SIDE, FILTER, from, half_way);
    for (int row = 0; row < FILTER; row++) {
        times_g_transposed(half_way[row], out);
        for (int column = 0; column < FILTER; column++) {
            char *to = (char *)(filter + (row * FILTER + column) * channels);
            store(load(to, floats) + out[column], to, floats);
        }
    }
}

/* Adds G^T u G to `filters`, which are always float32. */
void collect_filters(const void *tiles, float *filters, const Shape *s) {
#pragma omp parallel for num_threads(s->threads)
    for (long filter = 0; filter < s->count; filter++) {
        Places from;
        find_tile(from, tiles, filter, s);
        FOR_CHANNELS(0, s->channels, s->half, add_to_filter, from, filters + filter * FILTER * FILTER * s->channels, s->channels)
    }
}

/* Computes B T B^T of one tile and adds the overlapping sums of its neighbours: `beside` from the tile to the left, `above`, rows
   of `width`, from the tiles above. Sums to which further tiles add stay there. */
INLINE void add_to_pixels(Channels c, long begin, Places from, Places to, Lanes beside[][SIDE][OVERLAP], Lanes *above, long width,
                          int last_row, int last_column) {
    Lanes half_way[SIDE][SIDE], out[SIDE];
    long vector = (c.first - begin) / LANES;
    int columns = last_column ? SIDE : STEP;
    above += vector * OVERLAP * width;
    along_columns(c, times_b, SIDE, SIDE, from, half_way);
    for (int row = 0; row < SIDE; row++) {
        times_b(half_way[row], out);
        for (int column = 0; column < OVERLAP; column++) {
            out[column] += beside[vector][row][column];
            beside[vector][row][column] = out[STEP + column];
        }
#pragma GCC unroll 6
        for (int column = 0; column < SIDE; column++) { /* a constant bound, so that the loop is unrolled */
            if (column >= columns) break;
            if (row < OVERLAP) out[column] += above[row * width + column];
            if (row < STEP || last_row) store(out[column], to[row][column], c);
            else above[(row - STEP) * width + column] = out[column];
        }
    }
}

/* B t B^T, the transpose of transform_inputs: where tiles overlap, their values are added. */
void collect_inputs(const void *tiles, void *images, const Shape *s) {
    long width = STEP * s->right + OVERLAP;
    int uneven = s->count < 4 * s->threads && s->count % s->threads; /* dividing by images would leave threads without work */
    long vectors = uneven ? 1 : (s->channels + LANES - 1) / LANES, at_once = vectors * LANES; /* channels */
    long above_bytes = vectors * OVERLAP * width * sizeof(Lanes), beside_bytes = vectors * SIDE * OVERLAP * sizeof(Lanes);
#pragma omp parallel for collapse(2) num_threads(s->threads)
    for (long image = 0; image < s->count; image++)
        for (long begin = 0; begin < s->channels; begin += at_once) {
            long end = begin + at_once < s->channels ? begin + at_once : s->channels;
            Lanes *above = aligned_alloc(sizeof(Lanes), above_bytes);
            Lanes(*beside)[SIDE][OVERLAP] = aligned_alloc(sizeof(Lanes), beside_bytes);
            memset(above, 0, above_bytes);
            for (long down = 0; down < s->down; down++) {
                memset(beside, 0, beside_bytes);
                for (long right = 0; right < s->right; right++) {
                    long tile = (image * s->down + down) * s->right + right;
                    Places from, to;
                    find_tile(from, tiles, tile, s);
                    find_pixels(to, images, tile, SIDE, s->padding, s);
                    FOR_CHANNELS(begin, end, s->half, add_to_pixels, begin, from, to, beside, above + STEP * right, width,
                                 down + 1 == s->down, right + 1 == s->right)
                }
            }
            free(above);
            free(beside);
        }
}
