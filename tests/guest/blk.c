/* virtio-blk requests; `segs=` splits the data of each over several descriptors. */
#include "blk.h"

void blk_open(struct blk *blk, unsigned which, unsigned queues)
{
    if (blk->which != which)
        memset(blk, 0, sizeof *blk);
    blk->which = which;
    bool again = blk->virtio.pci;
    require(again || virtio_find(&blk->virtio, VIRTIO_BLK, which), "no virtio-blk device %u", which);
    virtio_negotiate(&blk->virtio, BLK_F_ALL);
    unsigned offered = blk->virtio.features & BLK_F_MQ ? (unsigned)virtio_config(&blk->virtio, 34, 2) : 1;
    blk->queues = queues && queues < offered ? queues : offered;
    blk->sectors = virtio_config(&blk->virtio, 0, 8);
    virtio_queues(&blk->virtio, blk->queues, (unsigned)param_number("qsize", 0));
    virtio_ready(&blk->virtio);
}

bool blk_submit(struct queue *queue, struct blk_request *request)
{
    static unsigned wanted;
    struct segment segments[MAX_SEGMENTS];
    unsigned count = 0;
    if (!wanted)
        wanted = (unsigned)param_number("segs", 1);
    segments[count++] = (struct segment){&request->header, 16, false};
    bool device_writes = request->header.type == BLK_IN || request->header.type == BLK_GET_ID;
    uint32_t left = request->length, piece = (request->length / wanted + 511) & ~511u;
    uint8_t *data = request->data;
    while (left) {
        uint32_t size = !piece || left < piece || count == MAX_SEGMENTS - 2 ? left : piece;
        segments[count++] = (struct segment){data, size, device_writes};
        data += size;
        left -= size;
    }
    request->status = BLK_NO_STATUS;
    segments[count++] = (struct segment){(void *)&request->status, 1, true};
    request->begin = rdtsc();
    return queue_add(queue, segments, count, request);
}

uint8_t blk_do(struct blk *blk, uint32_t type, uint64_t sector, void *data, uint32_t length)
{
    static struct blk_request request;
    struct queue *queue = &blk->virtio.queues[0];
    void *token;
    uint32_t written;
    memset(&request, 0, sizeof request);
    request.header.type = type;
    request.header.sector = sector;
    request.data = data;
    request.length = length;
    require(blk_submit(queue, &request), "no free descriptor for a single request");
    queue_kick(queue);
    queue_await(queue);
    require(queue_pop(queue, &token, &written) && token == &request, "completed a request that was not made");
    return request.status;
}

void pattern_fill(void *data, uint32_t size, uint64_t place, uint64_t version, uint64_t seed)
{
    uint64_t *words = data, state = seed ^ place << 20 ^ version << 44;
    for (uint32_t i = 0; i < size / 8; i++)
        words[i] = random_next(&state);
    words[0] = place;
    words[1] = version;
    words[2] = seed;
}
