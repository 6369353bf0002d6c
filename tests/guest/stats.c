/* Latency histograms (see stats.h). */
#include "stats.h"

static unsigned bucket(uint64_t ticks)
{
    if (ticks < 16)
        return (unsigned)ticks;
    unsigned shift = 59 - (unsigned)__builtin_clzll(ticks);
    return (shift + 1) * 16 + (unsigned)(ticks >> shift & 15);
}

void stats_add(struct stats *stats, uint64_t ticks)
{
    stats->buckets[bucket(ticks)]++;
    stats->least = !stats->count || ticks < stats->least ? ticks : stats->least;
    stats->most = ticks > stats->most ? ticks : stats->most;
    stats->sum += ticks;
    stats->count++;
}

static uint64_t floor_of(unsigned index)
{
    return index < 16 ? index : (16ull + index % 16) << (index / 16 - 1);
}

uint64_t stats_ns(const struct stats *stats, unsigned permille)
{
    uint64_t wanted = (stats->count * permille + 999) / 1000, seen = 0;
    for (unsigned i = 0; i < STATS_BUCKETS; i++) {
        seen += stats->buckets[i];
        if (seen >= wanted && seen) {
            uint64_t ticks = floor_of(i);
            return tsc_to_ns(ticks < stats->least ? stats->least : ticks);
        }
    }
    return 0;
}

void stats_print(const struct stats *stats, const char *name)
{
    print("%s_min_ns=%lu\n%s_p50_ns=%lu\n", name, tsc_to_ns(stats->least), name, stats_ns(stats, 500));
    print("%s_p99_ns=%lu\n%s_max_ns=%lu\n", name, stats_ns(stats, 990), name, tsc_to_ns(stats->most));
    print("%s_mean_ns=%lu\n", name, stats->count ? tsc_to_ns(stats->sum / stats->count) : 0);
}

void stats_print_all(const struct stats *stats, const char *name)
{
    for (unsigned i = 0; i < STATS_BUCKETS; i++)
        if (stats->buckets[i])
            print("%s.%lu=%u\n", name, tsc_to_ns(floor_of(i)) / 1000, (unsigned)stats->buckets[i]);
}

void stats_merge(struct stats *into, const struct stats *from)
{
    if (!from->count)
        return;
    into->least = !into->count || from->least < into->least ? from->least : into->least;
    into->most = from->most > into->most ? from->most : into->most;
    into->sum += from->sum;
    into->count += from->count;
    for (unsigned i = 0; i < STATS_BUCKETS; i++)
        into->buckets[i] += from->buckets[i];
}
