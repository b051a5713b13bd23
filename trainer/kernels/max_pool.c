/* The backward pass of max pooling for trainer/kernels/max_pool.py, with adjacent windows of size x size pixels.

Images are (count, height, width, channels), outputs (count, height / size, width / size, channels); both are contiguous, with
numbers of `bytes` bytes. */

#include <stdint.h>
#include <string.h>

typedef struct {
    long count, height, width, channels, size, bytes, threads;
} Shape;

/* An output's gradient belongs to the pixel of its index, counted within the image; other pixels have gradient 0. */
#define GIVE(TYPE)                                                                                                       \
    for (long channel = 0; channel < s->channels; channel++)                                                             \
        ((TYPE *)images)[to + channel] =                                                                                 \
            indices[from + channel] == y * s->width + x ? ((const TYPE *)gradient)[from + channel] : 0

void max_pool_backward(const void *gradient, const int64_t *indices, void *images, const Shape *s) {
    long down = s->height / s->size, right = s->width / s->size;
#pragma omp parallel for collapse(2) num_threads(s->threads)
    for (long image = 0; image < s->count; image++)
        for (long y = 0; y < s->height; y++)
            for (long x = 0; x < s->width; x++) {
                long to = ((image * s->height + y) * s->width + x) * s->channels;
                long from = ((image * down + y / s->size) * right + x / s->size) * s->channels;
                if (y / s->size >= down || x / s->size >= right)
                    memset((char *)images + to * s->bytes, 0, s->channels * s->bytes);
                else if (s->bytes == 2)
                    GIVE(uint16_t);
                else
                    GIVE(uint32_t);
            }
}
