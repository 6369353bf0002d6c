/* Output on COM1 or the debug port, and the string functions that gcc expects to find. */
#include <stdarg.h>
#include "guest.h"

static char line[1024];
static unsigned line_length;
static uint16_t output_port = 0x3f8;

void output_init(void)
{
    if (param_is("out", "debug"))
        output_port = 0xe9;
}

static void put(char byte)
{
    line[line_length++] = byte;
    if (byte != '\n' && line_length < sizeof line)
        return;
    for (unsigned i = 0; i < line_length; i++)
        out8(output_port, (uint8_t)line[i]);
    line_length = 0;
}

static void put_number(uint64_t value, unsigned base)
{
    char digits[24];
    unsigned count = 0;
    do {
        digits[count++] = "0123456789abcdef"[value % base];
        value /= base;
    } while (value);
    while (count)
        put(digits[--count]);
}

void print_arguments(const char *format, va_list arguments);

void print_arguments(const char *format, va_list arguments)
{
    for (; *format; format++) {
        if (*format != '%') {
            put(*format);
            continue;
        }
        bool wide = format[1] == 'l';
        format += 1 + wide;
        if (*format == 's') {
            for (const char *text = va_arg(arguments, const char *); *text; text++)
                put(*text);
        } else if (*format == 'c') {
            put((char)va_arg(arguments, int));
        } else if (*format == 'd') {
            int64_t value = wide ? va_arg(arguments, int64_t) : va_arg(arguments, int);
            if (value < 0)
                put('-');
            put_number(value < 0 ? 0 - (uint64_t)value : (uint64_t)value, 10);
        } else {
            uint64_t value = wide ? va_arg(arguments, uint64_t) : va_arg(arguments, unsigned);
            put_number(value, *format == 'x' ? 16 : 10);
        }
    }
}

void print(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    print_arguments(format, arguments);
    va_end(arguments);
}

void *memcpy(void *to, const void *from, size_t size)
{
    void *start = to;
    __asm__ volatile("rep movsb" : "+D"(to), "+S"(from), "+c"(size)::"memory");
    return start;
}

void *memset(void *to, int byte, size_t size)
{
    void *start = to;
    __asm__ volatile("rep stosb" : "+D"(to), "+c"(size) : "a"(byte) : "memory");
    return start;
}

int memcmp(const void *left, const void *right, size_t size)
{
    const uint8_t *a = left, *b = right;
    for (; size; size--, a++, b++)
        if (*a != *b)
            return *a - *b;
    return 0;
}

size_t strlen(const char *text)
{
    size_t length = 0;
    while (text[length])
        length++;
    return length;
}

bool same(const char *left, const char *right)
{
    while (*left && *left == *right)
        left++, right++;
    return *left == *right;
}

bool starts(const char *text, const char *prefix)
{
    while (*prefix && *text == *prefix)
        text++, prefix++;
    return !*prefix;
}

uint64_t number(const char *text, const char **end)
{
    uint64_t value = 0;
    unsigned base = 10;
    if (text[0] == '0' && (text[1] | 0x20) == 'x') {
        base = 16;
        text += 2;
    }
    for (;; text++) {
        unsigned digit = *text >= '0' && *text <= '9' ? (unsigned)(*text - '0') : (unsigned)((*text | 0x20) - 'a' + 10);
        if (digit >= base || (*text < '0'))
            break;
        value = value * base + digit;
    }
    if (*text == 'K' || *text == 'k')
        value <<= 10, text++;
    else if (*text == 'M')
        value <<= 20, text++;
    else if (*text == 'G')
        value <<= 30, text++;
    if (end)
        *end = text;
    return value;
}

uint64_t random_next(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15;      /* splitmix64: any seed will do, 0 too */
    x = (x ^ x >> 30) * 0xbf58476d1ce4e5b9;
    x = (x ^ x >> 27) * 0x94d049bb133111eb;
    return x ^ x >> 31;
}

/* zlib's CRC-32, eight bytes a step, so that a host can compute the same. */
uint32_t crc32(uint32_t crc, const void *data, size_t size)
{
    static uint32_t table[8][256];
    if (!table[0][1]) {
        for (uint32_t i = 0; i < 256; i++) {
            uint32_t value = i;
            for (int bit = 0; bit < 8; bit++)
                value = value >> 1 ^ (value & 1 ? 0xedb88320 : 0);
            table[0][i] = value;
        }
        for (uint32_t i = 0; i < 256; i++)
            for (int t = 1; t < 8; t++)
                table[t][i] = table[t - 1][i] >> 8 ^ table[0][table[t - 1][i] & 0xff];
    }
    const uint8_t *bytes = data;
    crc = ~crc;
    for (; size >= 8; size -= 8, bytes += 8) {
        uint64_t v = *(const uint64_t *)bytes ^ crc;
        crc = table[7][v & 0xff] ^ table[6][v >> 8 & 0xff] ^ table[5][v >> 16 & 0xff] ^ table[4][v >> 24 & 0xff]
            ^ table[3][v >> 32 & 0xff] ^ table[2][v >> 40 & 0xff] ^ table[1][v >> 48 & 0xff] ^ table[0][v >> 56];
    }
    for (; size; size--, bytes++)
        crc = crc >> 8 ^ table[0][(crc ^ *bytes) & 0xff];
    return ~crc;
}
