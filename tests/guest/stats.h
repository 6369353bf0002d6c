/* Durations in logarithmic buckets: 16 to each power of two, so a percentile is within 6 %. */
#ifndef GUEST_STATS_H
#define GUEST_STATS_H
#include "guest.h"

#define STATS_BUCKETS (64 * 16)

struct stats {
    uint64_t count, least, most, sum;
    uint32_t buckets[STATS_BUCKETS];
};

void stats_add(struct stats *stats, uint64_t ticks);
/* `permille` of all values are at most this many nanoseconds. */
uint64_t stats_ns(const struct stats *stats, unsigned permille);
/* Print NAME_min_ns, _p50_ns, _p99_ns, _max_ns, _mean_ns. */
void stats_print(const struct stats *stats, const char *name);
/* Print NAME.MICROSECONDS=how many, for each bucket that is not empty. */
void stats_print_all(const struct stats *stats, const char *name);
void stats_merge(struct stats *into, const struct stats *from);

#endif
