/* Rate limits in a page that several processes share (core/wire/budget.py writes it). */
#ifndef CELLVISOR_BUDGET_H
#define CELLVISOR_BUDGET_H
#include <stdint.h>

/* `size` tokens pass in `refill` ns and `burst` more once; 0: no limit. It is full at `due` (ns, CLOCK_MONOTONIC):
   one word tells all that was spent, so whoever is killed leaves no bucket half changed. */
struct cv_bucket {
    uint64_t due, burst, size, refill;
};

/* The limits of bytes and of operations, twice: `which` says which ones hold. */
struct cv_budget {
    uint64_t which, unused[7];
    struct cv_bucket slots[2][2];
};

/* Take one operation of so many bytes and return 0, or take nothing and return in how many ns to ask again. A token
   is enough to begin: what is missing of the rest is owed and paid off first. Processes that ask at the same moment
   may both get the last token. */
uint64_t cv_budget_take(struct cv_budget *budget, uint64_t now, uint64_t bytes);

#endif
