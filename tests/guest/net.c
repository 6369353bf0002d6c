/* virtio-net: receive buffers are always posted, what is sent is copied into a buffer of the driver's own. */
#include "net.h"

#define TX_SIZE (NET_HEADER + NET_LARGEST)

static uint64_t wanted_features(void)
{
    uint64_t wanted = NET_F_MTU | NET_F_MAC | NET_F_STATUS;
    if (param_number("mrg", 1))
        wanted |= NET_F_MRG_RXBUF;
    if (param_number("csum", 1))
        wanted |= NET_F_CSUM | NET_F_GUEST_CSUM;
    if (param_number("csum", 1) && param_number("tso", 1))
        wanted |= NET_F_GUEST_TSO | NET_F_HOST_TSO;
    if (param_number("ctrl", 1))
        wanted |= NET_F_CTRL_VQ | NET_F_CTRL_RX | NET_F_CTRL_VLAN | NET_F_CTRL_MAC;
    if (param_number("ctrl", 1) && param_number("mq", 1))
        wanted |= NET_F_MQ;
    if (param_number("ctrl", 1) && param_number("announce", 1))
        wanted |= NET_F_GUEST_ANNOUNCE;
    return wanted;
}

static void post(struct net *net, struct queue *queue, void *buffer)
{
    struct segment segment = {buffer, net->buffer_size, true};
    require(queue_add(queue, &segment, 1, buffer), "no free descriptor for a receive buffer");
}

static void start_pair(struct net *net, unsigned index)
{
    struct net_pair *pair = &net->pair[index];
    struct queue *rx = pair->rx = &net->virtio.queues[2 * index];
    struct queue *tx = pair->tx = &net->virtio.queues[2 * index + 1];
    if (!pair->rx_buffers)
        pair->rx_buffers = allocate((uint64_t)rx->size * net->buffer_size, PAGE);
    unsigned slots = tx->size < 64 ? tx->size : 64;
    if (!pair->tx_buffers) {
        pair->tx_buffers = allocate((uint64_t)slots * TX_SIZE, PAGE);
        pair->tx_free = allocate(slots * sizeof(void *), 64);
    }
    pair->tx_spare = 0;
    for (unsigned i = 0; i < slots; i++)
        pair->tx_free[pair->tx_spare++] = pair->tx_buffers + (uint64_t)i * TX_SIZE;
    for (unsigned i = net->unposted; i < rx->size; i++)
        post(net, rx, pair->rx_buffers + (uint64_t)i * net->buffer_size);
}

void net_open(struct net *net, unsigned pairs)
{
    bool again = net->virtio.pci;
    require(again || virtio_find(&net->virtio, VIRTIO_NET, (unsigned)param_number("dev", 0)), "no virtio-net device");
    virtio_negotiate(&net->virtio, wanted_features());
    uint64_t features = net->virtio.features;
    for (unsigned i = 0; i < 6; i++)
        net->mac[i] = (uint8_t)virtio_config(&net->virtio, i, 1);
    net->most_pairs = features & NET_F_MQ ? (unsigned)virtio_config(&net->virtio, 8, 2) : 1;
    require(net->most_pairs && 2 * net->most_pairs < MAX_QUEUES, "%u queue pairs", net->most_pairs);
    net->pairs = pairs < net->most_pairs ? pairs : net->most_pairs;
    require(net->pairs && net->pairs <= ARRAY_SIZE(net->pair), "%u queue pairs", net->pairs);
    uint32_t whole = NET_HEADER + (features & NET_F_GUEST_TSO ? NET_LARGEST : 1518);
    net->buffer_size = features & NET_F_MRG_RXBUF ? (uint32_t)param_number("rxbuf", 2048) : whole;
    unsigned queues = 2 * net->most_pairs + !!(features & NET_F_CTRL_VQ);
    virtio_queues(&net->virtio, queues, (unsigned)param_number("qsize", 256));
    net->control = features & NET_F_CTRL_VQ ? &net->virtio.queues[2 * net->most_pairs] : NULL;
    for (unsigned i = 0; i < net->pairs; i++)
        start_pair(net, i);
    virtio_ready(&net->virtio);
    for (unsigned i = 0; i < net->pairs; i++)
        queue_kick(net->pair[i].rx);
    uint16_t count = (uint16_t)net->pairs;
    if (net->pairs > 1)
        require(!net_control(net, 4, 0, &count, 2), "the device refuses %u queue pairs", net->pairs);
}

static void harvest_sent(struct net_pair *pair)
{
    void *token;
    uint32_t written;
    while (queue_pop(pair->tx, &token, &written)) {
        require(!written, "the device wrote %u bytes into a frame that was sent", written);
        pair->tx_free[pair->tx_spare++] = token;
    }
}

void net_send(struct net *net, unsigned index, const struct net_header *header, const void *frame, uint32_t length)
{
    struct net_pair *pair = &net->pair[index];
    static unsigned split;
    if (!split)
        split = (unsigned)param_number("segs", 1);
    require(length <= NET_LARGEST, "a frame of %u bytes", length);
    harvest_sent(pair);
    while (!pair->tx_spare || pair->tx->free_count < 1 + split) {
        queue_kick(pair->tx);
        queue_await(pair->tx);
        harvest_sent(pair);
    }
    uint8_t *buffer = pair->tx_free[--pair->tx_spare];
    memcpy(buffer, header, NET_HEADER);
    memcpy(buffer + NET_HEADER, frame, length);
    struct segment segments[MAX_SEGMENTS] = {{buffer, NET_HEADER, false}};
    unsigned count = 1;
    if (split == 1) {
        segments[0].length += length;                       /* header and frame in one descriptor */
    } else {
        uint32_t piece = length / (split - 1) + 1;
        for (uint32_t at = 0; at < length; at += piece)
            segments[count++] = (struct segment){buffer + NET_HEADER + at, length - at < piece ? length - at : piece,
                                                 false};
    }
    require(queue_add(pair->tx, segments, count, buffer), "no free descriptor to send");
    pair->sent++;
    pair->bytes_out += length;
}

/* Copy one buffer's bytes behind those that are there, and give it back to the device. */
static void take(struct net *net, struct net_pair *pair, uint8_t *buffer, uint32_t skip, uint32_t written, void *frame,
                 uint32_t *length)
{
    require(written >= skip && written <= net->buffer_size, "received %u bytes into a buffer of %u", written,
            net->buffer_size);
    require(*length + written - skip <= NET_LARGEST, "received a frame of more than %u bytes", *length);
    memcpy((uint8_t *)frame + *length, buffer + skip, written - skip);
    *length += written - skip;
    post(net, pair->rx, buffer);
}

bool net_receive(struct net *net, unsigned index, struct net_header *header, void *frame, uint32_t *length)
{
    struct net_pair *pair = &net->pair[index];
    void *token;
    uint32_t written;
    if (!queue_pop(pair->rx, &token, &written))
        return false;
    memcpy(header, token, NET_HEADER);
    *length = 0;
    bool merge = net->virtio.features & NET_F_MRG_RXBUF;
    unsigned buffers = merge ? header->buffers : 1;
    require(buffers, "received a frame in no buffer");
    take(net, pair, token, NET_HEADER, written, frame, length);
    for (unsigned i = 1; i < buffers; i++) {
        require(queue_pop(pair->rx, &token, &written), "buffer %u of %u of a frame is not there", i, buffers);
        take(net, pair, token, 0, written, frame, length);
    }
    pair->merged += buffers > 1;
    pair->received++;
    pair->bytes_in += *length;
    queue_kick(pair->rx);
    return true;
}

uint8_t net_control(struct net *net, uint8_t class, uint8_t command, const void *data, uint32_t length)
{
    static uint8_t *memory;
    if (!memory)
        memory = allocate(2 * PAGE, PAGE);
    require(net->control && length <= PAGE, "no control queue");
    memory[0] = class, memory[1] = command, memory[2] = 0xee;
    memcpy(memory + PAGE, data, length);
    struct segment segments[3] = {{memory, 2, false}};
    unsigned count = 1;
    if (length)
        segments[count++] = (struct segment){memory + PAGE, length, false};
    segments[count++] = (struct segment){memory + 2, 1, true};
    void *token;
    uint32_t written;
    require(queue_add(net->control, segments, count, memory), "no free descriptor for a command");
    queue_kick(net->control);
    queue_await(net->control);
    require(queue_pop(net->control, &token, &written) && token == memory, "completed a command that was not given");
    require(written == 1, "a command's acknowledgement is %u bytes long", written);
    return memory[2];
}

static uint32_t frame_crc(const struct frame *frame, uint32_t length)
{
    return crc32(0, &frame->number, length - (uint32_t)__builtin_offsetof(struct frame, number));
}

void frame_fill(const struct net *net, struct frame *frame, uint8_t kind, unsigned pair, uint64_t number,
                uint32_t length)
{
    memset(frame->to, 0xff, 6);
    memcpy(frame->from, net->mac, 6);
    frame->type[0] = FRAME_TYPE >> 8;
    frame->type[1] = FRAME_TYPE & 0xff;
    frame->kind = kind;
    frame->pair = (uint8_t)pair;
    frame->number = number;
    frame->time = rdtsc();
    frame->crc = kind & FRAME_UNCHECKED ? 0 : frame_crc(frame, length);
}

bool frame_ours(const void *data, uint32_t length)
{
    const struct frame *frame = data;
    if (length < sizeof *frame || frame->type[0] != FRAME_TYPE >> 8 || frame->type[1] != (FRAME_TYPE & 0xff))
        return false;
    require(frame->kind & FRAME_UNCHECKED || frame->crc == frame_crc(frame, length),
            "frame %lu of %u bytes arrived with a wrong checksum",
            frame->number, length);
    return true;
}
