/* The virtio network driver: rings, the header of 12 bytes, control commands, and the frames of the tests. */
#ifndef GUEST_NET_H
#define GUEST_NET_H
#include "virtio.h"

#define NET_F_CSUM (1ull << 0)
#define NET_F_GUEST_CSUM (1ull << 1)
#define NET_F_MTU (1ull << 3)
#define NET_F_MAC (1ull << 5)
#define NET_F_GUEST_TSO (1ull << 7 | 1ull << 8)
#define NET_F_HOST_TSO (1ull << 11 | 1ull << 12)
#define NET_F_MRG_RXBUF (1ull << 15)
#define NET_F_STATUS (1ull << 16)
#define NET_F_CTRL_VQ (1ull << 17)
#define NET_F_CTRL_RX (1ull << 18)
#define NET_F_CTRL_VLAN (1ull << 19)
#define NET_F_GUEST_ANNOUNCE (1ull << 21)
#define NET_F_MQ (1ull << 22)
#define NET_F_CTRL_MAC (1ull << 23)

#define NET_HEADER 12
#define NET_LARGEST 65550           /* a frame of 64 KiB of TCP and its Ethernet header */
#define NET_NEEDS_CSUM 1
#define NET_GSO_TCP4 1

struct net_header {
    uint8_t flags, gso_type;
    uint16_t header_length, gso_size, csum_start, csum_offset, buffers;
};

struct net_pair {
    struct queue *rx, *tx;
    uint8_t *rx_buffers, *tx_buffers;
    void **tx_free;
    unsigned tx_spare;
    uint64_t received, sent, bytes_in, bytes_out, merged;
};

struct net {
    struct virtio virtio;
    uint8_t mac[6];
    unsigned pairs, most_pairs;     /* in use; there */
    uint32_t buffer_size;           /* of a receive buffer, header included */
    struct queue *control;          /* NULL: there is none */
    unsigned unposted;              /* set it before net_open: so many receive buffers are left out */
    struct net_pair pair[16];
};

/* Find card `dev=`, negotiate what `mrg= csum= tso= ctrl= mq= announce=` (1) leave, start `pairs` queue pairs. */
void net_open(struct net *net, unsigned pairs);
/* Send one frame, waiting for a free buffer if need be. The kick is the caller's. */
void net_send(struct net *net, unsigned pair, const struct net_header *header, const void *frame, uint32_t length);
/* The next frame of at most NET_LARGEST bytes, copied; false if there is none. The kick of buffers is included. */
bool net_receive(struct net *net, unsigned pair, struct net_header *header, void *frame, uint32_t *length);
/* A control command; returns its acknowledgement: 0 ok, 1 error. */
uint8_t net_control(struct net *net, uint8_t class, uint8_t command, const void *data, uint32_t length);

/* What a test frame holds after its Ethernet header; numbers are little-endian, `crc` covers what follows it. */
#define FRAME_TYPE 0x88b5           /* "local experimental" of IEEE 802 */
#define FRAME_ECHO 1                /* send it back */
#define FRAME_DATA 2                /* count it */
#define FRAME_STOP 3                /* the end */
#define FRAME_UNCHECKED 0x80        /* a bit: without a checksum, for measurements */

struct frame {
    uint8_t to[6], from[6], type[2];
    uint8_t kind, pair;
    uint32_t crc;
    uint64_t number, time;
    uint8_t rest[];
} __attribute__((packed));

void frame_fill(const struct net *net, struct frame *frame, uint8_t kind, unsigned pair, uint64_t number,
                uint32_t length);
/* Whether it is one of the tests' frames; ends the run if it is and its checksum is wrong. */
bool frame_ours(const void *data, uint32_t length);

#endif
