/* The command line: words of key=value; what is not given has a default at the place of use. */
#include "guest.h"

static char text[4096];
static const char *keys[128];
static const char *values[128];
static unsigned count;

/* Take key=value words that are separated by `separator`, in place; later ones win. */
static void take(char *at, char separator)
{
    while (*at && count < ARRAY_SIZE(keys)) {
        while (*at == separator || *at == '\n')
            *at++ = 0;
        if (!*at)
            break;
        keys[count] = at;
        values[count] = NULL;
        for (; *at && *at != separator && *at != '\n'; at++)
            if (*at == '=' && !values[count]) {
                *at = 0;
                values[count] = at + 1;
            }
        if (!values[count])
            values[count] = "1";                    /* a bare word is a switch */
        count++;
    }
}

void params_init(const char *cmdline)
{
    size_t length = strlen(cmdline);
    if (length >= sizeof text)
        length = sizeof text - 1;
    memcpy(text, cmdline, length);
    take(text, ' ');
}

unsigned params_push(const char *words, size_t length)
{
    static char pushed[256];
    unsigned before = count;
    require(length < sizeof pushed, "%lu bytes of parameters of one test", length);
    memcpy(pushed, words, length);
    pushed[length] = 0;
    take(pushed, ':');
    return before;
}

void params_pop(unsigned before) { count = before; }

const char *param(const char *key, const char *missing)
{
    for (unsigned i = count; i-- > 0;)
        if (same(keys[i], key))
            return values[i];
    return missing;
}

uint64_t param_number(const char *key, uint64_t missing)
{
    const char *value = param(key, NULL);
    return value ? number(value, NULL) : missing;
}

bool param_is(const char *key, const char *value) { return same(param(key, ""), value); }
