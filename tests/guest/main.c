/* What runs: the tests that `test=` names, in order, each reporting key=value lines. */
#include "tests.h"

static const struct test {
    const char *name;
    void (*run)(void);
} tests[] = {
    {"boot", test_boot}, {"smp", test_smp}, {"pci", test_pci}, {"msix", test_msix},
    {"blk-info", test_blk_info}, {"blk-ops", test_blk_ops}, {"blk-boots", test_blk_boots},
    {"blk-move", test_blk_move}, {"blk-capacity", test_blk_capacity},
    {"blk-write", test_blk_write}, {"blk-verify", test_blk_verify}, {"blk-bench", test_blk_bench},
    {"net-info", test_net_info}, {"net-echo", test_net_echo}, {"net-receive", test_net_receive},
    {"net-control", test_net_control}, {"net-announce", test_net_announce}, {"net-send", test_net_send},
    {"net-bench", test_net_bench}, {"net-hostile", test_net_hostile}, {"net-udp", test_net_udp},
    {"rng", test_rng}, {"console", test_console}, {"script", test_script}, {"hotplug", test_hotplug},
    {"race", test_race}, {"resubmit", test_resubmit}, {"toggle", test_toggle}, {"notify", test_notify},
    {"flood", test_flood}, {"hostile", test_hostile}, {"sweep", test_sweep}, {"cfgsweep", test_cfgsweep}, {"portsweep", test_portsweep},
};

void guest_main(void);

void run_test(const char *name, size_t length)
{
    size_t end = 0;
    while (end < length && name[end] != ':')
        end++;
    for (unsigned i = 0; i < ARRAY_SIZE(tests); i++)
        if (strlen(tests[i].name) == end && !memcmp(tests[i].name, name, end)) {
            uint64_t begin = now_ns();
            print("test=%s\n", tests[i].name);
            unsigned before = params_push(name + end, length - end);
            tests[i].run();
            params_pop(before);
            print("test.us=%lu\n", (now_ns() - begin) / 1000);
            return;
        }
    fail("unknown test %s", name);
}

void guest_main(void)
{
    traps_init();
    memory_init();
    params_init(boot_cmdline());
    output_init();
    acpi_init();
    lapic_init();
    clock_init();
    timer_start(10);
    interrupts_on();
    print("guest=1\n");
    for (const char *at = param("test", "boot"); *at;) {
        size_t length = 0;
        while (at[length] && at[length] != ',')
            length++;
        run_test(at, length);
        at += length + (at[length] == ',');
    }
    finish();
}
