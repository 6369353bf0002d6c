/* Every test that `test=` can name; each is described where it is defined. */
#ifndef GUEST_TESTS_H
#define GUEST_TESTS_H
#include "guest.h"

void test_boot(void);
void test_smp(void);
void test_pci(void);
void test_blk_info(void);
void test_blk_ops(void);
void test_blk_boots(void);
void test_blk_move(void);
void test_blk_capacity(void);
void test_blk_write(void);
void test_blk_verify(void);
void test_blk_bench(void);
void test_msix(void);
void test_rng(void);
void test_console(void);
void test_net_info(void);
void test_net_echo(void);
void test_net_receive(void);
void test_net_control(void);
void test_net_announce(void);
void test_net_send(void);
void test_net_bench(void);
void test_net_hostile(void);
void test_net_udp(void);

void test_hostile(void);
void test_race(void);
void test_resubmit(void);
void test_toggle(void);
void test_notify(void);
void test_flood(void);
void test_sweep(void);
void test_cfgsweep(void);
void test_portsweep(void);
void test_script(void);
void test_hotplug(void);

/* Run one test by its name; ends the run if there is none. */
void run_test(const char *name, size_t length);

#endif
