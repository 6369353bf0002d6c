#include "budget.h"

#define LONGEST ((uint64_t)1 << 62)

static uint64_t load(const uint64_t *word)
{
    return __atomic_load_n(word, __ATOMIC_RELAXED);
}

static uint64_t least(uint64_t one, uint64_t other)
{
    return one < other ? one : other;
}

static uint64_t wait_of(const struct cv_bucket *bucket, uint64_t now, uint64_t cost)
{
    uint64_t size = load(&bucket->size), refill = least(load(&bucket->refill), LONGEST), due;

    if (!cost || !size || !refill || load(&bucket->burst))
        return 0;
    due = least(load(&bucket->due), LONGEST) + refill / size; /* full less one token */
    return due > now + refill ? due - now - refill : 0;
}

static void take(struct cv_bucket *bucket, uint64_t now, uint64_t cost)
{
    uint64_t size = load(&bucket->size), refill = load(&bucket->refill), seen = load(&bucket->burst), want, once;

    if (!size || !refill)
        return;
    do
        once = least(seen, cost);
    while (once && !__atomic_compare_exchange_n(&bucket->burst, &seen, seen - once, 0, __ATOMIC_RELAXED,
                                                __ATOMIC_RELAXED));
    cost -= once;
    if (!cost)
        return;
    unsigned __int128 time = ((unsigned __int128)cost * refill + size - 1) / size;
    uint64_t more = time > LONGEST ? LONGEST : (uint64_t)time;
    seen = load(&bucket->due);
    do
        want = least((seen > now ? least(seen, LONGEST) : now) + more, LONGEST);
    while (!__atomic_compare_exchange_n(&bucket->due, &seen, want, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
}

uint64_t cv_budget_take(struct cv_budget *budget, uint64_t now, uint64_t bytes)
{
    struct cv_bucket *bucket = budget->slots[load(&budget->which) & 1];
    const uint64_t cost[2] = {bytes, 1};
    uint64_t longest = 0;

    for (int kind = 0; kind < 2; kind++) {
        uint64_t wait = wait_of(&bucket[kind], now, cost[kind]);
        longest = wait > longest ? wait : longest;
    }
    for (int kind = 0; !longest && kind < 2; kind++)
        take(&bucket[kind], now, cost[kind]);
    return longest;
}
