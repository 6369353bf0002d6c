/* Numbered UDP datagrams to a host that sends them back: just enough of ARP and IPv4 for a user-mode back end. */
#include "net.h"
#include "tests.h"

#define PORT_HERE 4000

struct datagram {
    uint8_t to[6], from[6], type[2];
    uint8_t version, service, length[2], id[2], fragment[2], ttl, protocol, checksum[2], source[4], target[4];
    uint8_t source_port[2], target_port[2], udp_length[2], udp_checksum[2];
    uint64_t number;
} __attribute__((packed));

static struct net net;
static uint8_t *frame;
static uint8_t here[4], there[4], gateway[6];
static const struct net_header plain;

static void put16(uint8_t *at, unsigned value) { at[0] = (uint8_t)(value >> 8), at[1] = (uint8_t)value; }

static void read_address(uint8_t *address, const char *text)
{
    for (unsigned i = 0; i < 4; i++, text++)
        address[i] = (uint8_t)number(text, &text);
}

/* The next frame within `ms`; false if there is none. */
static bool receive(uint32_t *length, uint64_t ms)
{
    struct net_header header;
    uint64_t deadline = rdtsc() + ns_to_tsc(ms * 1000000);
    do {
        if (net_receive(&net, 0, &header, frame, length))
            return true;
        queue_wait(net.pair[0].rx, deadline);
    } while ((int64_t)(rdtsc() - deadline) < 0);
    return false;
}

static void find_gateway(void)
{
    static const uint8_t head[22] = {0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0, 0, 0, 0, 0, 0, 8, 6,
                                     0, 1, 8, 0, 6, 4, 0, 1};
    uint8_t ask[60] = {0};
    uint32_t length;
    memcpy(ask, head, sizeof head);
    memcpy(ask + 6, net.mac, 6);
    memcpy(ask + 22, net.mac, 6);
    memcpy(ask + 28, here, 4);
    memcpy(ask + 38, there, 4);
    for (unsigned i = 0; i < 300; i++) {
        net_send(&net, 0, &plain, ask, sizeof ask);
        queue_kick(net.pair[0].tx);
        while (receive(&length, 100))
            if (length >= 42 && frame[12] == 8 && frame[13] == 6 && frame[21] == 2 && !memcmp(frame + 28, there, 4)) {
                memcpy(gateway, frame + 22, 6);
                return;
            }
    }
    fail("nobody says who has the address host=%s", param("host", ""));
}

static void send(uint64_t number, uint32_t size, unsigned port)
{
    struct datagram *one = (struct datagram *)frame;
    memset(frame, 0x5a, size);
    memcpy(one->to, gateway, 6);
    memcpy(one->from, net.mac, 6);
    put16(one->type, 0x800);
    one->version = 0x45, one->service = 0, one->ttl = 64, one->protocol = 17;
    put16(one->length, size - 14);
    put16(one->id, 0), put16(one->fragment, 0x4000), put16(one->checksum, 0);
    memcpy(one->source, here, 4);
    memcpy(one->target, there, 4);
    uint32_t sum = 0;
    for (unsigned i = 14; i < 34; i += 2)
        sum += (uint32_t)(frame[i] << 8 | frame[i + 1]);
    put16(one->checksum, ~((sum & 0xffff) + (sum >> 16)) & 0xffff);
    put16(one->source_port, PORT_HERE), put16(one->target_port, port);
    put16(one->udp_length, size - 34), put16(one->udp_checksum, 0);     /* 0: it has none */
    one->number = number;
    net_send(&net, 0, &plain, one, size);
    queue_kick(net.pair[0].tx);
}

/* test=net-udp: one datagram after the other from `ip=` to `host=` `port=`, until `count=`(100) came back or the host
   answers with number 0; `bs=`(256) bytes with all headers. What is not back after `patience_ms=`(300) is lost. */
void test_net_udp(void)
{
    uint64_t count = param_number("count", 100), back = 0, lost = 0, sent = 0, doubled = 0;
    uint64_t patience = param_number("patience_ms", 300);
    uint32_t size = (uint32_t)param_number("bs", 256), length;
    unsigned port = (unsigned)param_number("port", 7);
    frame = allocate(NET_LARGEST, PAGE);
    require(size >= 60 && size <= 65535, "bs=%u is outside 60..65535", size);
    net_open(&net, 1);
    read_address(here, param("ip", "10.0.2.15"));
    read_address(there, param("host", "10.0.2.2"));
    find_gateway();
    print("ready=1\n");
    uint8_t *seen = allocate(8192, PAGE);
    while (back < count) {
        require(++sent < 65536 && lost < 1000, "%lu of %lu datagrams came back", back, sent);
        send(sent, size, port);
        for (bool here_again = false; !here_again;) {
            if (!receive(&length, patience)) {
                lost++;
                break;
            }
            const struct datagram *one = (const struct datagram *)frame;
            if (length != size || one->protocol != 17 || one->type[0] != 8 || one->type[1])
                continue;
            if (!one->number) {
                count = 0;                              /* the host has seen enough */
                break;
            }
            require(one->number <= sent, "datagram %lu came, it was never sent", one->number);
            if (seen[one->number / 8] >> one->number % 8 & 1) {
                doubled++;
                continue;
            }
            seen[one->number / 8] |= (uint8_t)(1 << one->number % 8);
            lost -= one->number != sent;                /* it was given up too early */
            here_again = one->number == sent;
            back++;
        }
        if (sent % 16 == 0)
            print("back=%lu\n", back);
    }
    print("sent=%lu\nreceived=%lu\nlost=%lu\ndoubled=%lu\n", sent, back, lost, doubled);
}
