/* A crop of interleaved uint8 pixels, scaled with antialiasing: to the last bit what torch's interpolate computes.

   As in Pillow-SIMD, weights have 16 bits, as many of them after the point as the largest weight of a side allows, and rows
   are scaled first and rounded to bytes. Processors multiply floats faster than integers, and floats are exact here: a sum
   of up to FEW products has at most 24 bits, or else one of two products has, and such sums are added as integers. */

#include <math.h>
#include <string.h>

#include "crop.h"

enum { WEIGHT_BITS = 15, MOST_BITS = 22, EXACT_BITS = 24, FEW = 8, ROWS = 4, KEPT_ROWS = 16, LANES = 4 };

/* Cases of a switch, one for each number of taps up to FEW: a function whose last argument the compiler then knows. */
#define FEW_CASES(function, ...)                                                                                       \
    case 1: function(__VA_ARGS__, 1); break;                                                                           \
    case 2: function(__VA_ARGS__, 2); break;                                                                           \
    case 3: function(__VA_ARGS__, 3); break;                                                                           \
    case 4: function(__VA_ARGS__, 4); break;                                                                           \
    case 5: function(__VA_ARGS__, 5); break;                                                                           \
    case 6: function(__VA_ARGS__, 6); break;                                                                           \
    case 7: function(__VA_ARGS__, 7); break;                                                                           \
    case 8: function(__VA_ARGS__, 8); break;

typedef float floats __attribute__((vector_size(4 * LANES)));
typedef int32_t integers __attribute__((vector_size(4 * LANES)));

/* How `count` numbers are computed from `taps` neighbours each, some of weight 0, those from `starts` on. Weights have `bits`
   after the point, and each number has room for `room` of them, an even number. Whether sums are exact, and may lie outside
   the range of a byte, is known beforehand. */
struct filter {
    int count, taps, room, bits, is_exact, overshoots;
    int *starts;
    float *weights;
};

/* Make the filter of a side. All weights of the side, also those outside the window, decide how many bits they have. */
static void make_filter(struct filter *filter, struct side side, int is_cubic, struct scratch *scratch)
{
    double step = (double)side.length / side.scaled, widened = step > 1 ? step : 1;
    double support = (is_cubic ? 2 : 1) * widened, scale = 1 / widened, largest = 0;
    int room = 2 * (int)ceil(support) + 2;

    *filter = (struct filter){.count = side.count, .room = room, .is_exact = 1, .overshoots = is_cubic};
    filter->starts = take(scratch, side.count * sizeof *filter->starts);
    filter->weights = take(scratch, (size_t)side.count * room * sizeof *filter->weights);
    double *found = take(scratch, (size_t)side.scaled * room * sizeof *found);
    if (!found)
        return;
    for (int i = 0; i < side.scaled; i++) {
        double centre = step * (i + 0.5), sum = 0, *own = found + (size_t)i * room;
        double from = centre - support + 0.5, to = centre + support + 0.5;
        int begin = from > 0 ? (int)from : 0, end = to < side.length ? (int)to : side.length;
        for (int k = 0; k < room; k++) {
            double distance = fabs((begin + k - centre + 0.5) * scale);
            own[k] = begin + k >= end ? 0 : is_cubic ? bicubic(distance) : bilinear(distance);
            sum += own[k];
        }
        for (int k = 0; k < room; k++) {
            own[k] /= sum;
            largest = own[k] > largest ? own[k] : largest;
        }
        if (i >= side.first && i < side.first + side.count)
            filter->starts[i - side.first] = begin;
    }
    while (filter->bits < MOST_BITS && (int)(0.5 + largest * (1 << (filter->bits + 1))) < 1 << WEIGHT_BITS)
        filter->bits++;
    for (int i = 0; i < side.count; i++) {
        const double *own = found + (size_t)(side.first + i) * room;
        int sum = 0;
        for (int k = 0; k < room; k++) {
            double value = own[k] * (1 << filter->bits);
            int weight = (int)(value + (value < 0 ? -0.5 : 0.5));
            filter->weights[(size_t)i * room + k] = (float)weight / (1 << filter->bits);
            sum += weight < 0 ? -weight : weight;
            if (weight && k >= filter->taps)
                filter->taps = k + 1;
        }
        if (255LL * sum + (1 << (filter->bits - 1)) > 1 << EXACT_BITS)
            filter->is_exact = 0;
    }
}

static inline int as_byte(int value)
{
    value = value < 0 ? 0 : value;
    return value > 255 ? 255 : value;
}

/* Compute a row of pixels from `taps` rows of values, FEW at most, whose sums are exact. */
static inline __attribute__((always_inline)) void
scale_few_rows(const float *lines, size_t stride, const float *weights, int width, uint8_t *restrict out, const int taps)
{
    for (int x = 0; x < width; x++) {
        float sum = 0.5f;
        for (int k = 0; k < taps; k++)
            sum += weights[k] * lines[k * stride + x];
        out[x] = as_byte((int)sum);
    }
}

/* The same with any number of taps, and any weights. */
static void scale_many_rows(const float *lines, size_t stride, const float *weights, int bits, int width, int taps,
                            int32_t *restrict sums, uint8_t *restrict out)
{
    float one = 1 << bits;

    for (int x = 0; x < width; x++)
        sums[x] = 1 << (bits - 1);
    for (int k = 0; k < taps; k += 2) {
        const float *line = lines + k * stride, *next = k + 1 < taps ? line + stride : line; /* its weight is 0 */
        for (int x = 0; x < width; x++)
            sums[x] += (int)((weights[k] * line[x] + weights[k + 1] * next[x]) * one);
    }
    for (int x = 0; x < width; x++)
        out[x] = as_byte(sums[x] >> bits);
}

static void scale_to_row(const float *lines, size_t stride, const struct filter *filter, int y, int width,
                         int32_t *sums, uint8_t *out)
{
    const float *weights = filter->weights + (size_t)y * filter->room;
    int taps = filter->taps;

    while (taps > 1 && !weights[taps - 1]) /* also those past the last row */
        taps--;
    switch (filter->is_exact ? taps : FEW + 1) {
    FEW_CASES(scale_few_rows, lines, stride, weights, width, out)
    default: scale_many_rows(lines, stride, weights, filter->bits, width, taps, sums, out);
    }
}

static inline floats load(const float *from)
{
    floats values;

    memcpy(&values, from, sizeof values);
    return values;
}

/* Scale ROWS rows of pixels of 3 values, if sums of `taps` products, FEW at most, are exact. The vectors reach into the next
   pixel, which is written after this one. */
static inline __attribute__((always_inline)) void
scale_few_columns(const float *values, size_t stride, const struct filter *filter, float *lines, size_t line_stride,
                const int taps)
{
    const int count = filter->count, room = filter->room, *starts = filter->starts;
    const float *weights = filter->weights, *from[ROWS];
    float *to[ROWS];

    for (int row = 0; row < ROWS; row++) { /* an address each: the strides would need sums in the loop */
        from[row] = values + row * stride;
        to[row] = lines + row * line_stride;
    }
    for (int x = 0; x < count; x++, weights += room) {
        ptrdiff_t start = 3 * (ptrdiff_t)(starts[x] - starts[0]);
        floats sums[ROWS];
        for (int row = 0; row < ROWS; row++)
            sums[row] = (floats){0.5f, 0.5f, 0.5f, 0.5f};
        for (int k = 0; k < taps; k++)
            for (int row = 0; row < ROWS; row++)
                sums[row] += load(from[row] + start + 3 * k) * weights[k];
        for (int row = 0; row < ROWS; row++) {
            floats rounded = __builtin_convertvector(__builtin_convertvector(sums[row], integers), floats);
            memcpy(to[row] + 3 * x, &rounded, sizeof rounded);
        }
    }
}

/* Scale ROWS rows of values to lines of as many values as the window has columns, with any number of taps and channels. */
static void scale_many_columns(const float *values, size_t stride, const struct filter *filter, int channels,
                               int32_t *sums, float *lines, size_t line_stride)
{
    float one = 1 << filter->bits;

    for (int row = 0; row < ROWS; row++, values += stride, lines += line_stride) {
        const float *weights = filter->weights;
        for (int x = 0; x < filter->count; x++, weights += filter->room) {
            const float *from = values + (ptrdiff_t)(filter->starts[x] - filter->starts[0]) * channels;
            integers sum = {0};
            for (int k = 0; k < filter->taps; k += 2) {
                const float *pair = from + (ptrdiff_t)k * channels;
                floats part = load(pair) * weights[k] + load(pair + channels) * weights[k + 1];
                sum += __builtin_convertvector(part * one, integers);
            }
            memcpy(sums + (size_t)x * channels, &sum, sizeof sum);
        }
        for (int x = 0; x < filter->count * channels; x++)
            lines[x] = as_byte((sums[x] + (1 << (filter->bits - 1))) >> filter->bits);
    }
}

static void scale_columns(const float *values, size_t stride, const struct filter *filter, int channels, int32_t *sums,
                          float *lines, size_t line_stride)
{
    switch (filter->is_exact && channels == 3 ? filter->taps : FEW + 1) {
    FEW_CASES(scale_few_columns, values, stride, filter, lines, line_stride)
    default: scale_many_columns(values, stride, filter, channels, sums, lines, line_stride); return;
    }
    for (size_t x = 0; filter->overshoots && x < ROWS * line_stride; x++)
        lines[x] = as_byte((int)lines[x]);
}

/* Write the crop of a picture to `out`, uint8 (rows->count, columns->count, channels), with 1 or 3 channels. The picture's rows
   begin `stride` bytes after one another. Returns DONE, or NEEDS_MEMORY, with the bytes that it takes in scratch->used. */
int scale_crop(const uint8_t *pixels, ptrdiff_t stride, int channels, const struct side *rows, const struct side *columns,
               int is_cubic, struct scratch *scratch, uint8_t *out)
{
    struct filter down, across;
    int width = columns->count * channels;
    size_t line_stride = (width + LANES + 15) / 16 * 16;

    scratch->used = 0;
    make_filter(&down, *rows, is_cubic, scratch);
    make_filter(&across, *columns, is_cubic, scratch);
    int room = down.room + KEPT_ROWS; /* for lines: the taps of a row, and some to be read before they are moved */
    size_t length = (size_t)(columns->length + across.room) * channels + LANES;
    float *values = take(scratch, ROWS * length * sizeof *values);
    float *lines = take(scratch, (room + ROWS) * line_stride * sizeof *lines);
    int32_t *sums = take(scratch, line_stride * sizeof *sums);
    if (scratch->used > scratch->size)
        return NEEDS_MEMORY;

    int begin = across.starts[0], end = across.starts[across.count - 1] + across.taps;
    int used = ((end < columns->length ? end : columns->length) - begin) * channels;
    int first = down.starts[0], ready = first; /* lines has the rows of the region from `first` up to `ready` */
    pixels += rows->start * stride + (ptrdiff_t)(columns->start + begin) * channels;
    memset(values, 0, ROWS * length * sizeof *values); /* what is past the picture is multiplied by 0, so not NaN */
    for (int y = 0; y < rows->count; y++, out += width) {
        int start = down.starts[y], needed = start + down.taps;
        needed = needed < rows->length ? needed : rows->length;
        if (needed > first + room) {
            memmove(lines, lines + (start - first) * line_stride, (ready - start) * line_stride * sizeof *lines);
            first = start;
        }
        for (; ready < needed; ready += ROWS) {
            for (int row = 0; row < ROWS && ready + row < rows->length; row++) {
                const uint8_t *from = pixels + (ready + row) * stride;
                float *restrict to = values + row * length;
                for (int x = 0; x < used; x++)
                    to[x] = from[x];
            }
            scale_columns(values, length, &across, channels, sums, lines + (ready - first) * line_stride, line_stride);
        }
        scale_to_row(lines + (start - first) * line_stride, line_stride, &down, y, width, sums, out);
    }
    return DONE;
}
