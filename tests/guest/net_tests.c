/* One network card: its facts, its control commands, and the tests in which the host has the lead. */
#include "net.h"
#include "tests.h"

static struct net net;
static uint8_t *frame;

static unsigned link_up(void) { return (unsigned)virtio_config(&net.virtio, 6, 2) & 1; }

static void open(unsigned pairs)
{
    if (!frame)
        frame = allocate(NET_LARGEST, PAGE);
    net_open(&net, pairs);
}

/* Wait for a frame on any pair; false when `ms` have passed. */
static bool receive(struct net_header *header, uint32_t *length, unsigned *pair, uint64_t ms)
{
    uint64_t deadline = rdtsc() + ns_to_tsc(ms * 1000000);
    do {
        for (*pair = 0; *pair < net.pairs; ++*pair)
            if (net_receive(&net, *pair, header, frame, length))
                return true;
        if (net.pairs == 1)
            queue_wait(net.pair[0].rx, deadline);
        else
            delay_us(20);
    } while ((int64_t)(rdtsc() - deadline) < 0);
    return false;
}

/* test=net-info: what the device says of itself. */
void test_net_info(void)
{
    open((unsigned)param_number("pairs", 1));
    uint64_t features = net.virtio.features;
    print("mac=%x:%x:%x:%x:%x:%x\n", net.mac[0], net.mac[1], net.mac[2], net.mac[3], net.mac[4], net.mac[5]);
    print("offered=0x%lx\nfeatures=0x%lx\nqueue_pairs=%u\n", virtio_offered(&net.virtio), features, net.most_pairs);
    if (features & NET_F_MTU)
        print("mtu=%u\n", (unsigned)virtio_config(&net.virtio, 10, 2));
    if (features & NET_F_STATUS)
        print("link=%u\n", link_up());
    print("qsize=%u\ncontrol=%u\n", net.pair[0].rx->size, net.control != NULL);
}

/* test=net-echo: send each frame back where it came from, until one says stop or `idle_ms=`(60000) pass without any. */
void test_net_echo(void)
{
    struct net_header header, plain = {0};
    uint32_t length;
    unsigned pair;
    uint64_t echoed = 0, merged = 0, gso = 0, partial = 0;
    open((unsigned)param_number("pairs", 1));
    print("ready=1\n");
    while (receive(&header, &length, &pair, param_number("idle_ms", 60000))) {
        struct frame *got = (struct frame *)frame;
        if (length < 14)
            continue;
        gso += header.gso_type != 0;
        partial += header.flags & NET_NEEDS_CSUM;
        bool stop = frame_ours(got, length) && got->kind == FRAME_STOP;
        memcpy(got->to, got->from, 6);
        memcpy(got->from, net.mac, 6);
        struct net_header back = {header.flags & NET_NEEDS_CSUM, header.gso_type, header.header_length,
                                  header.gso_size, header.csum_start, header.csum_offset, 0};
        net_send(&net, pair, header.flags & NET_NEEDS_CSUM ? &back : &plain, got, length);
        queue_kick(net.pair[pair].tx);
        echoed++;
        if (stop)
            break;
    }
    for (unsigned i = 0; i < net.pairs; i++)
        merged += net.pair[i].merged;
    print("echoed=%lu\nmerged=%lu\ngso=%lu\npartial=%lu\nirqs=%lu\n", echoed, merged, gso, partial,
          device_irqs(&net.virtio));
}

/* test=net-receive: count numbered frames until one says stop: lost, doubled, late (below one seen before). */
void test_net_receive(void)
{
    uint64_t most = param_number("count", 1 << 20), got = 0, doubled = 0, late = 0, highest = 0, lost = 0, strange = 0;
    uint8_t *seen = allocate(most / 8 + 1, 64);
    struct net_header header;
    uint32_t length;
    unsigned pair;
    open((unsigned)param_number("pairs", 1));
    print("ready=1\n");
    for (;;) {
        require(receive(&header, &length, &pair, param_number("idle_ms", 60000)), "no frame, and none said stop");
        struct frame *one = (struct frame *)frame;
        if (!frame_ours(one, length)) {
            strange++;
            continue;
        }
        if (one->kind == FRAME_STOP)
            break;
        uint64_t number = one->number;
        require(number && number <= most, "frame %lu, count=%lu", number, most);
        doubled += seen[number / 8] >> number % 8 & 1;
        seen[number / 8] |= (uint8_t)(1 << number % 8);
        late += number < highest;
        highest = number > highest ? number : highest;
        got++;
    }
    for (uint64_t number = 1; number <= highest; number++)
        lost += !(seen[number / 8] >> number % 8 & 1);
    print("received=%lu\nhighest=%lu\nlost=%lu\ndoubled=%lu\nlate=%lu\nstrange=%lu\nmerged=%lu\n", got, highest, lost,
          doubled, late, strange, net.pair[0].merged);
    require(!doubled, "%lu frames came twice", doubled);
}

/* test=net-control: each command of the control queue, and those that must be refused. */
void test_net_control(void)
{
    static const struct {
        const char *name;
        uint8_t class, command, length, data[16];
        uint64_t needs;
    } commands[] = {
        {"promisc_on", 0, 0, 1, {1}, NET_F_CTRL_RX}, {"promisc_off", 0, 0, 1, {0}, NET_F_CTRL_RX},
        {"allmulti_on", 0, 1, 1, {1}, NET_F_CTRL_RX}, {"allmulti_off", 0, 1, 1, {0}, NET_F_CTRL_RX},
        {"table", 1, 0, 14, {1, 0, 0, 0, 2, 0, 0, 0, 0, 9, 0, 0, 0, 0}, NET_F_CTRL_RX},
        {"table_short", 1, 0, 9, {9, 0, 0, 0, 2, 0, 0, 0, 0}, NET_F_CTRL_RX},
        {"mac", 1, 1, 6, {2, 0, 0, 0, 0, 0x77}, NET_F_CTRL_MAC},
        {"mac_short", 1, 1, 5, {2, 0, 0, 0, 0}, NET_F_CTRL_MAC},
        {"vlan_add", 2, 0, 2, {7, 0}, NET_F_CTRL_VLAN}, {"vlan_del", 2, 1, 2, {7, 0}, NET_F_CTRL_VLAN},
        {"vlan_wild", 2, 0, 2, {0xff, 0xff}, NET_F_CTRL_VLAN},
        {"pairs_one", 4, 0, 2, {1, 0}, NET_F_MQ}, {"pairs_none", 4, 0, 2, {0, 0}, NET_F_MQ},
        {"pairs_many", 4, 0, 2, {0xff, 0x7f}, NET_F_MQ}, {"announce_ack", 3, 0, 0, {0}, NET_F_GUEST_ANNOUNCE},
        {"unknown_class", 0x7e, 0, 1, {0}, 0}, {"unknown_command", 0, 0x7e, 1, {0}, 0}, {"empty", 0, 0, 0, {0}, 0},
    };
    open(1);
    require(net.control, "the device has no control queue");
    for (unsigned i = 0; i < ARRAY_SIZE(commands); i++) {
        if (commands[i].needs & ~net.virtio.features)
            continue;
        uint8_t ack = net_control(&net, commands[i].class, commands[i].command, commands[i].data, commands[i].length);
        print("ctrl.%s=%u\n", commands[i].name, ack);
        require(ack <= 1, "%s: acknowledgement 0x%x", commands[i].name, ack);
    }
    if (net.virtio.features & NET_F_CTRL_MAC)
        print("mac_tail=0x%x\n", (unsigned)virtio_config(&net.virtio, 5, 1));
}

/* test=net-announce: wait until the device asks to be announced, announce, acknowledge; with down=1 the link first. */
void test_net_announce(void)
{
    open(1);
    uint64_t deadline = now_ns() + param_number("timeout", 60000) * 1000000;
    print("ready=1\n");
    if (param_number("down", 0)) {
        while (link_up()) {
            require(now_ns() < deadline, "the link stays up");
            delay_us(1000);
        }
        print("link=0\n");
        while (!link_up()) {
            require(now_ns() < deadline, "the link stays down");
            delay_us(1000);
        }
        print("link=1\n");
        return;
    }
    while (!(virtio_config(&net.virtio, 6, 2) & 2)) {
        require(now_ns() < deadline, "nobody asks for an announcement");
        delay_us(1000);
    }
    require(!net_control(&net, 3, 0, NULL, 0), "the acknowledgement is refused");
    while (virtio_config(&net.virtio, 6, 2) & 2)
        require(now_ns() < deadline, "the device asks again after the acknowledgement");
    print("announced=1\n");
}
