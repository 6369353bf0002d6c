/* virtio-rng and virtio-console. */
#include "tests.h"
#include "virtio.h"

static uint32_t transfer(struct queue *queue, void *data, uint32_t length, bool device_writes)
{
    struct segment segment = {data, length, device_writes};
    void *token;
    uint32_t written;
    require(queue_add(queue, &segment, 1, data), "no free descriptor");
    queue_kick(queue);
    queue_await(queue);
    require(queue_pop(queue, &token, &written) && token == data, "completed a buffer that was not given");
    return written;
}

/* test=rng: read `bytes=` in pieces of `bs=`; random means about half the bits set and no piece twice. */
void test_rng(void)
{
    struct virtio rng = {0};
    uint64_t wanted = param_number("bytes", 4096), got = 0, ones = 0, previous = 0, same_words = 0;
    uint32_t size = (uint32_t)param_number("bs", 256);
    require(virtio_find(&rng, VIRTIO_RNG, (unsigned)param_number("dev", 0)), "no virtio-rng device");
    virtio_negotiate(&rng, 0);
    virtio_queues(&rng, 1, 0);
    virtio_ready(&rng);
    uint8_t *data = allocate(size, PAGE);
    while (got < wanted) {
        memset(data, 0, size);
        uint32_t length = transfer(&rng.queues[0], data, size, true);
        require(length && length <= size, "rng gave %u bytes into %u", length, size);
        for (uint32_t i = 0; i < length; i++)
            ones += (unsigned)__builtin_popcount(data[i]);
        for (uint32_t i = 0; i + 8 <= length; i += 8) {
            same_words += *(uint64_t *)(data + i) == previous;
            previous = *(uint64_t *)(data + i);
        }
        got += length;
    }
    print("bytes=%lu\nones_permille=%lu\nirqs=%lu\n", got, ones * 1000 / (got * 8), device_irqs(&rng));
    require(ones * 1000 / (got * 8) > 430 && ones * 1000 / (got * 8) < 570 && !same_words,
            "not random: %lu of %lu bits set", ones, got * 8);
}

/* test=console: write `text=` (underscores are spaces) `repeat=` times, `numbered=1` with seven digits before it, then echo `lines=` lines of input back
 * upper-cased, telling the size of the terminal after each. */
void test_console(void)
{
    struct virtio console = {0};
    uint64_t lines = param_number("lines", 0);
    require(virtio_find(&console, VIRTIO_CONSOLE, (unsigned)param_number("dev", 0)), "no virtio-console device");
    virtio_negotiate(&console, 1);                      /* VIRTIO_CONSOLE_F_SIZE */
    virtio_queues(&console, 2, 0);
    virtio_ready(&console);
    if (console.features & 1)
        print("size=%lux%lu\n", virtio_config(&console, 0, 2), virtio_config(&console, 2, 2));
    const char *text = param("text", "hello_from_the_guest");
    char *buffer = allocate(PAGE, PAGE), *received = allocate(PAGE, PAGE);
    size_t length = strlen(text);
    bool numbered = param_number("numbered", 0);
    for (uint64_t line = 0, repeat = param_number("repeat", 1); line < repeat; line++) {
        uint32_t used = 0;
        for (uint64_t unit = 1000000; numbered && unit; unit /= 10)
            buffer[used++] = (char)('0' + line / unit % 10);
        for (size_t i = 0; i < length; i++)
            buffer[used++] = text[i] == '_' ? ' ' : text[i];
        buffer[used++] = '\n';
        transfer(&console.queues[1], buffer, used, false);
    }
    print("written=%lu\n", length);
    for (uint64_t line = 0, filled = 0; line < lines;) {
        uint32_t count = transfer(&console.queues[0], received, 64, true);
        require(count && count <= 64, "console gave %u bytes into 64", count);
        for (uint32_t i = 0; i < count && line < lines && filled < PAGE - 1; i++) {
            char byte = received[i] == '\r' ? '\n' : received[i];
            buffer[filled++] = byte >= 'a' && byte <= 'z' ? (char)(byte - 32) : byte;
            if (byte != '\n')
                continue;
            transfer(&console.queues[1], buffer, (uint32_t)filled, false);
            buffer[filled - 1] = 0;
            print("line.%lu=%s\n", line, buffer);
            if (console.features & 1)
                print("size.%lu=%lux%lu\n", line, virtio_config(&console, 0, 2), virtio_config(&console, 2, 2));
            line++;
            filled = 0;
        }
    }
    print("irqs=%lu\n", device_irqs(&console));
}
