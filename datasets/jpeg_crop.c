/* The crop of a JPEG, without the rest of the picture: libjpeg's raw planes, scaled before their colours are converted.

   Entropy coding has no entry points, so the blocks above the crop are parsed, but not transformed; those below it are
   never looked at. Luma and chroma are scaled separately, each from its own resolution, with the antialiasing weights of
   Pillow's resize: a filter whose support grows with the scale.

   All arithmetic is on 16 bits. Weights have WEIGHT_BITS after the point, so that those of a cubic filter, which may be
   above 1, fit. Values have PLANE_BITS more than pixels at first; each of the two passes takes one away, as products are
   cut by 15 bits, which leaves EXTRA_BITS for the conversion. */

#include <limits.h>
#include <math.h>
#include <setjmp.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>

#include <jpeglib.h>

#include "crop.h"

enum { COMPONENTS = 3, MOST_ROWS = 16, WEIGHT_BITS = 14, PLANE_BITS = 7, EXTRA_BITS = 5, LANES = 16 };

/* How `count` numbers are computed from up to `taps` neighbours each; those from `begin` up to `end` are used at all. Each
   number has room for `room` weights. */
struct filter {
    int count, taps, room, begin, end;
    int *starts;
    int16_t *weights;
};

/* Make the filter of a side for a plane that has `share` values per pixel of the picture, `limit` in all. A value at the
   edge of the region counts if the region covers any of it. */
static void make_filter(struct filter *filter, struct side side, double share, int limit, int is_cubic, struct scratch *scratch)
{
    double step = side.length * share / side.scaled, widened = step > 1 ? step : 1;
    double support = (is_cubic ? 2 : 1) * widened, scale = 1 / widened;
    int lowest = (int)(side.start * share), highest = (int)ceil((side.start + side.length) * share);
    int room = 2 * (int)ceil(support) + 1;

    highest = highest < limit ? highest : limit;
    *filter = (struct filter){.count = side.count, .room = room, .begin = limit};
    filter->starts = take(scratch, side.count * sizeof *filter->starts);
    filter->weights = take(scratch, (size_t)side.count * room * sizeof *filter->weights);
    double *found = take(scratch, room * sizeof *found);
    for (int i = 0; i < side.count; i++) {
        double centre = side.start * share + (side.first + i + 0.5) * step, sum = 0;
        double from = centre - support + 0.5, to = centre + support + 0.5;
        int begin = from > lowest ? (int)from : lowest, end = to < highest ? (int)to : highest;
        filter->begin = begin < filter->begin ? begin : filter->begin;
        filter->end = end > filter->end ? end : filter->end;
        if (!found)
            continue;
        for (int k = 0; k < room; k++) {
            double distance = fabs(begin + k - centre + 0.5) * scale;
            found[k] = begin + k >= end ? 0 : is_cubic ? bicubic(distance) : bilinear(distance);
            sum += found[k];
        }
        for (int k = 0; k < room; k++) {
            int16_t weight = (int16_t)(found[k] / sum * (1 << WEIGHT_BITS) + (found[k] < 0 ? -0.5 : 0.5));
            filter->weights[(size_t)i * room + k] = weight;
            if (weight && k >= filter->taps)
                filter->taps = k + 1;
        }
        filter->starts[i] = begin;
    }
}

/* Return value * factor / 2**15, rounded: on x86 one instruction for 16 values. */
static inline int16_t times(int16_t value, int16_t factor)
{
    return (int16_t)(((value * factor >> 14) + 1) >> 1);
}

static inline __attribute__((always_inline)) void
add_rows(const int16_t *rows, size_t stride, const int16_t *weights, int width, int16_t *restrict line, const int count)
{
    width = width / LANES * LANES; /* the compiler then knows that nothing is left after its vectors */
    for (int x = 0; x < width; x++) {
        int16_t sum = line[x];
        for (int k = 0; k < count; k++)
            sum += times(rows[k * stride + x], weights[k]);
        line[x] = sum;
    }
}

/* Sum rows of a plane for row i of the result; `width` is a multiple of LANES. */
static void sum_rows(const int16_t *plane, int width, const struct filter *filter, int i, int16_t *line)
{
    size_t stride = width;
    const int16_t *rows = plane + (filter->starts[i] - filter->begin) * stride;
    const int16_t *weights = filter->weights + (size_t)i * filter->room;
    int left = filter->taps;

    memset(line, 0, width * sizeof *line);
    while (left > 1 && !weights[left - 1]) /* also those past the last row */
        left--;
    for (; left > 4; left -= 4, rows += 4 * stride, weights += 4)
        add_rows(rows, stride, weights, width, line, 4);
    if (left == 4)
        add_rows(rows, stride, weights, width, line, 4);
    else if (left == 3)
        add_rows(rows, stride, weights, width, line, 3);
    else if (left == 2)
        add_rows(rows, stride, weights, width, line, 2);
    else
        add_rows(rows, stride, weights, width, line, 1);
}

/* Turn LANES rows into columns of LANES values; `width` is a multiple of LANES. */
static void turn_rows(const int16_t *restrict rows, int width, int16_t *restrict columns)
{
    for (int x = 0; x < width; x += LANES)
        for (int column = 0; column < LANES; column++)
            for (int row = 0; row < LANES; row++)
                columns[(x + column) * LANES + row] = rows[(size_t)row * width + x + column];
}

/* Sum columns of LANES values. All have as many taps, some of weight 0: a processor can predict that. */
static void sum_columns(const int16_t *columns, const struct filter *filter, int16_t *restrict out)
{
    for (int x = 0; x < filter->count; x++, out += LANES) {
        const int16_t *first = columns + (size_t)(filter->starts[x] - filter->begin) * LANES;
        const int16_t *weights = filter->weights + (size_t)x * filter->room;
        int16_t sum[LANES] = {0};
        for (int k = 0; k < filter->taps; k++)
            for (int row = 0; row < LANES; row++)
                sum[row] += times(first[k * LANES + row], weights[k]);
        memcpy(out, sum, sizeof sum);
    }
}

static inline uint8_t pixel(int16_t value)
{
    value = (int16_t)(value + (1 << (EXTRA_BITS - 1))) >> EXTRA_BITS;
    return value < 0 ? 0 : value > 255 ? 255 : value;
}

static inline int16_t share(int16_t value, double part)
{
    return times(value, (int16_t)(part * (1 << 15) + 0.5));
}

/* Convert columns of JFIF's YCbCr to RGB: three columns of LANES pixels for each. */
static void to_rgb(const int16_t *luma, const int16_t *blue, const int16_t *red, int width, uint8_t *restrict out)
{
    for (int x = 0; x < width; x++, luma += LANES, blue += LANES, red += LANES, out += COMPONENTS * LANES)
        for (int row = 0; row < LANES; row++) {
            int16_t y = luma[row], cb = blue[row] - (128 << EXTRA_BITS), cr = red[row] - (128 << EXTRA_BITS);
            out[row] = pixel(y + cr + share(cr, 0.402));
            out[LANES + row] = pixel(y - share(cb, 0.344136) - share(cr, 0.714136));
            out[2 * LANES + row] = pixel(y + cb + share(cb, 0.772));
        }
}

/* Write the first `count` of LANES rows, from columns of LANES bytes: square by square. Up to LANES columns more are read. */
static void write_rows(const uint8_t *columns, int width, int count, uint8_t *out)
{
    uint8_t square[LANES][LANES];

    for (int x = 0; x < width; x += LANES, columns += LANES * LANES) {
        for (int row = 0; row < LANES; row++)
            for (int column = 0; column < LANES; column++)
                square[row][column] = columns[column * LANES + row];
        for (int row = 0; row < count; row++)
            if (width - x >= LANES) /* a constant size is one instruction */
                memcpy(out + (size_t)row * width + x, square[row], LANES);
            else
                memcpy(out + (size_t)row * width + x, square[row], width - x);
    }
}

struct work {
    struct jpeg_decompress_struct jpeg;
    struct jpeg_error_mgr errors;
    jmp_buf failed;
    struct filter rows[COMPONENTS], columns[COMPONENTS];
    int widths[COMPONENTS];       /* of the planes: the columns that are used, rounded up to LANES */
    uint8_t *strips[COMPONENTS];  /* the row of blocks that libjpeg decoded last */
    int16_t *planes[COMPONENTS];  /* what the filters use of them, with PLANE_BITS */
    int16_t *lines, *turned, *scaled;
    uint8_t *pixels;
};

static void fail(j_common_ptr jpeg) { longjmp(((struct work *)jpeg->client_data)->failed, 1); }

static void fail_on_warning(j_common_ptr jpeg, int level)
{
    if (level < 0)
        fail(jpeg);
}

static void ignore(j_common_ptr jpeg) { (void)jpeg; }

static int is_common(const struct jpeg_decompress_struct *jpeg)
{
    const jpeg_component_info *parts = jpeg->comp_info;
    J_COLOR_SPACE colours = jpeg->num_components == 1 ? JCS_GRAYSCALE : JCS_YCbCr;

    if (jpeg->data_precision != 8 || jpeg->arith_code || jpeg->jpeg_color_space != colours ||
        parts[0].h_samp_factor > 2 || parts[0].v_samp_factor > 2)
        return 0;
    for (int c = 1; c < jpeg->num_components; c++)
        if (parts[c].h_samp_factor != 1 || parts[c].v_samp_factor != 1)
            return 0;
    return 1;
}

/* Keep what the filters use of the strips that were just read, those of row `number` of blocks. */
static void keep_strips(struct work *work, int number)
{
    for (int c = 0; c < work->jpeg.num_components; c++) {
        const jpeg_component_info *part = &work->jpeg.comp_info[c];
        int height = part->v_samp_factor * DCTSIZE, width = work->widths[c];
        for (int row = 0; row < height; row++) {
            int y = number * height + row;
            const uint8_t *from = work->strips[c] + (size_t)row * part->width_in_blocks * DCTSIZE + work->columns[c].begin;
            int16_t *restrict to = work->planes[c] + (y - work->rows[c].begin) * (ptrdiff_t)width;
            if (y >= work->rows[c].begin && y < work->rows[c].end)
                for (int x = 0; x < width; x++)
                    to[x] = from[x] << PLANE_BITS;
        }
    }
}

/* Read the planes down to the last row that the filters use. Blocks above the first one are parsed, but not transformed. */
static void read_planes(struct work *work)
{
    struct jpeg_decompress_struct *jpeg = &work->jpeg;
    int first = INT_MAX, last = 0;
    JSAMPROW rows[COMPONENTS][MOST_ROWS];
    JSAMPARRAY strips[COMPONENTS] = {rows[0], rows[1], rows[2]};

    for (int c = 0; c < work->jpeg.num_components; c++) {
        int height = jpeg->comp_info[c].v_samp_factor * DCTSIZE;
        size_t width = (size_t)jpeg->comp_info[c].width_in_blocks * DCTSIZE;
        int begin = work->rows[c].begin / height, end = (work->rows[c].end + height - 1) / height;
        first = begin < first ? begin : first;
        last = end > last ? end : last;
        for (int row = 0; row < height; row++)
            rows[c][row] = work->strips[c] + row * width;
    }
    for (int number = 0; number < last; number++) {
        for (int c = 0; c < work->jpeg.num_components; c++)
            jpeg->comp_info[c].component_needed = number >= first;
        jpeg_read_raw_data(jpeg, strips, jpeg->max_v_samp_factor * DCTSIZE);
        if (number >= first)
            keep_strips(work, number);
    }
}

/* Scale the planes and convert their colours, LANES rows at a time: sums over columns then need no shuffling of values. */
static void scale_planes(struct work *work, uint8_t *out)
{
    int height = work->rows[0].count, width = work->columns[0].count;
    size_t size = (size_t)width * LANES;

    for (size_t i = work->jpeg.num_components * size; i < COMPONENTS * size; i++)
        work->scaled[i] = 128 << EXTRA_BITS; /* grey has no chroma */
    for (int top = 0; top < height; top += LANES) {
        int count = height - top < LANES ? height - top : LANES;
        for (int c = 0; c < work->jpeg.num_components; c++) {
            int used = work->widths[c];
            for (int row = 0; row < count; row++)
                sum_rows(work->planes[c], used, &work->rows[c], top + row, work->lines + (size_t)row * used);
            turn_rows(work->lines, used, work->turned);
            sum_columns(work->turned, &work->columns[c], work->scaled + c * size);
        }
        to_rgb(work->scaled, work->scaled + size, work->scaled + 2 * size, width, work->pixels);
        write_rows(work->pixels, COMPONENTS * width, count, out + (size_t)top * COMPONENTS * width);
    }
}

/* Make the filters and place everything in the scratch. */
static void prepare(struct work *work, struct side rows, struct side columns, int is_cubic, struct scratch *scratch)
{
    size_t longest = 0, width = columns.count;

    for (int c = 0; c < work->jpeg.num_components; c++) {
        const jpeg_component_info *part = &work->jpeg.comp_info[c];
        double across = (double)part->h_samp_factor / work->jpeg.max_h_samp_factor;
        double down = (double)part->v_samp_factor / work->jpeg.max_v_samp_factor;
        if (c == 2) { /* both chroma planes are sampled alike */
            work->rows[c] = work->rows[1];
            work->columns[c] = work->columns[1];
        } else {
            make_filter(&work->rows[c], rows, down, part->downsampled_height, is_cubic, scratch);
            make_filter(&work->columns[c], columns, across, part->downsampled_width, is_cubic, scratch);
        }
        size_t height = work->rows[c].end - work->rows[c].begin, needed = work->columns[c].room;
        work->widths[c] = (work->columns[c].end - work->columns[c].begin + LANES - 1) / LANES * LANES;
        work->planes[c] = take(scratch, height * work->widths[c] * sizeof *work->planes[c]);
        work->strips[c] = take(scratch, (size_t)part->v_samp_factor * DCTSIZE * part->width_in_blocks * DCTSIZE + LANES);
        needed += work->widths[c];
        longest = needed > longest ? needed : longest;
    }
    work->lines = take(scratch, longest * LANES * sizeof *work->lines);
    work->turned = take(scratch, longest * LANES * sizeof *work->turned);
    work->scaled = take(scratch, COMPONENTS * width * LANES * sizeof *work->scaled);
    work->pixels = take(scratch, (COMPONENTS * width + LANES) * LANES);
}

static int crop(struct work *work, const uint8_t *data, size_t size, struct side rows, struct side columns, int is_cubic,
                struct scratch *scratch, uint8_t *out)
{
    struct jpeg_decompress_struct *jpeg = &work->jpeg;

    jpeg_mem_src(jpeg, data, size);
    jpeg_read_header(jpeg, TRUE);
    if (!is_common(jpeg) || rows.start + rows.length > (int)jpeg->image_height ||
        columns.start + columns.length > (int)jpeg->image_width)
        return ANOTHER_KIND;
    jpeg->raw_data_out = TRUE;
    jpeg->out_color_space = jpeg->jpeg_color_space;
    jpeg_start_decompress(jpeg);
    prepare(work, rows, columns, is_cubic, scratch);
    if (scratch->used > scratch->size)
        return NEEDS_MEMORY;
    read_planes(work);
    scale_planes(work, out);
    return DONE;
}

/* Write the crop of a JPEG to `out`, uint8 (rows->count, columns->count, 3). Returns DONE, ANOTHER_KIND for what is neither
   grey nor YCbCr with common subsampling, or smaller, DAMAGED, or NEEDS_MEMORY, with the bytes that it takes in scratch->used. */
int crop_jpeg(const uint8_t *data, size_t size, const struct side *rows, const struct side *columns, int is_cubic,
              struct scratch *scratch, uint8_t *out)
{
    struct work work = {.errors.error_exit = NULL};
    volatile int found = DAMAGED;

    work.jpeg.err = jpeg_std_error(&work.errors);
    work.jpeg.client_data = &work;
    work.errors.error_exit = fail;
    work.errors.emit_message = fail_on_warning;
    work.errors.output_message = ignore;
    scratch->used = 0;
    if (!setjmp(work.failed)) {
        jpeg_create_decompress(&work.jpeg);
        found = crop(&work, data, size, *rows, *columns, is_cubic, scratch, out);
    }
    jpeg_destroy_decompress(&work.jpeg);
    return found;
}
