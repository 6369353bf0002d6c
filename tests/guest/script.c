/* test=script: commands from the boot module (or from `script=` with ';' and ',' for newline and space). Every read
   prints script.LINE=0xVALUE. An expression adds terms: a number, $name, SLOT.bar0 .. bar5, SLOT.common, .notify,
   .isr, .config. $last is what was read last.

   r8 r16 r32 r64 ADDRESS          w8 .. w64 ADDRESS VALUE       in8 in16 in32 PORT      out8 .. out32 PORT VALUE
   cr8 cr16 cr32 SLOT OFFSET       cw8 .. cw32 SLOT OFFSET VALUE (0xcf8)                 er8 .. er64, ew8 .. ew64 (ECAM)
   set NAME VALUE                  alloc NAME SIZE               fill ADDRESS SIZE BYTE  mask VALUE
   expect VALUE                    unlike VALUE                  wait8 .. wait64 ADDRESS MASK VALUE MS
   sleep US                        irqwait VECTOR COUNT MS       loop COUNT ... end      say WORD
   test NAME                       power HOW */
#include "tests.h"
#include "virtio.h"

static struct {
    char name[24];
    uint64_t value;
} variables[64];
static unsigned variable_count, line_number;
static const char *text, *text_end, *at;

static bool word(char *into, size_t room)
{
    size_t length = 0;
    while (at < text_end && *at == ' ')
        at++;
    while (at < text_end && *at != ' ' && *at != '\n' && *at != '#' && length + 1 < room)
        into[length++] = *at++;
    into[length] = 0;
    return length;
}

static uint64_t *variable(const char *name)
{
    for (unsigned i = 0; i < variable_count; i++)
        if (same(variables[i].name, name))
            return &variables[i].value;
    require(variable_count < ARRAY_SIZE(variables) && strlen(name) < sizeof variables[0].name,
            "script line %u: %s does not fit", line_number, name);
    memcpy(variables[variable_count].name, name, strlen(name) + 1);
    return &variables[variable_count++].value;
}

static uint64_t place(unsigned slot, const char *name)
{
    struct virtio virtio;
    pci_init();
    struct pci *pci = pci_find(slot);
    require(pci, "script line %u: no function in slot %u", line_number, slot);
    if (starts(name, "bar")) {
        if (!(pci->command & PCI_COMMAND_MEMORY) || !pci->bars[name[3] - '0'].size)
            pci_enable(pci);
        return pci->bars[name[3] - '0'].address;
    }
    for (unsigned which = 0; virtio_find(&virtio, pci->device - 0x1040u, which); which++)
        if (virtio.pci == pci)
            return same(name, "common") ? virtio.common : same(name, "notify") ? virtio.notify
                : same(name, "isr") ? virtio.isr : virtio.config;
    fail("script line %u: slot %u is no virtio device", line_number, slot);
}

static uint64_t value(void)
{
    char expression[96];
    uint64_t total = 0;
    require(word(expression, sizeof expression), "script line %u: an operand is missing", line_number);
    for (char *term = expression; *term;) {
        bool negative = *term == '-';
        term += *term == '-' || *term == '+';
        char *end = term;
        while (*end && *end != '+' && *end != '-')
            end++;
        char stop = *end;
        *end = 0;
        uint64_t amount;
        if (*term == '$') {
            amount = *variable(term + 1);
        } else {
            const char *rest;
            amount = number(term, &rest);
            if (*rest == '.')
                amount = place((unsigned)amount, rest + 1);
            else
                require(!*rest && rest != term, "script line %u: %s is no value", line_number, term);
        }
        total += negative ? 0 - amount : amount;
        *end = stop;
        term = end;
    }
    return total;
}

static void got(uint64_t result)
{
    *variable("last") = result;
    print("script.%u=0x%lx\n", line_number, result);
}

/* The commands whose name ends in a width: returns false if `name` is none of them. */
static bool access(const char *name, size_t length, unsigned size)
{
    char stem[8] = {0};
    memcpy(stem, name, length < 7 ? length : 7);
    bool ecam = stem[0] == 'e';
    uint64_t first, second;
    if (same(stem, "r")) {
        map_range(first = value(), 8);
        got(bus_read(first, size));
    } else if (same(stem, "w")) {
        map_range(first = value(), 8);
        bus_write(first, size, value());
    } else if (same(stem, "in")) {
        got(port_read((uint16_t)value(), size));
    } else if (same(stem, "out")) {
        first = value();
        port_write((uint16_t)first, size, (uint32_t)value());
    } else if (same(stem, "cr") || same(stem, "er")) {
        first = value();
        got(pci_raw_read(ecam, (unsigned)first, 0, (unsigned)value(), size));
    } else if (same(stem, "cw") || same(stem, "ew")) {
        first = value();
        second = value();
        pci_raw_write(ecam, (unsigned)first, 0, (unsigned)second, size, value());
    } else if (same(stem, "wait")) {
        map_range(first = value(), 8);
        uint64_t mask = value(), wanted = value(), limit = value(), end = now_ns() + limit * 1000000, seen;
        while (((seen = bus_read(first, size)) & mask) != wanted)
            require(now_ns() < end, "script line %u: 0x%lx stays 0x%lx", line_number, first, seen);
        got(seen);
    } else {
        return false;
    }
    return true;
}

static void command(const char *name)
{
    char argument[64];
    static const char *loop_begin;
    static unsigned loop_line;
    static uint64_t loop_left;
    size_t length = strlen(name);
    while (length && name[length - 1] >= '0' && name[length - 1] <= '9')
        length--;
    unsigned bits = (unsigned)number(name + length, NULL);
    if ((bits == 8 || bits == 16 || bits == 32 || bits == 64) && access(name, length, bits / 8))
        return;
    if (same(name, "set") || same(name, "alloc")) {
        require(word(argument, sizeof argument), "script line %u: no name", line_number);
        uint64_t amount = value();
        *variable(argument) = same(name, "set") ? amount : (uint64_t)allocate(amount, PAGE);
    } else if (same(name, "fill")) {
        uint64_t address = value(), size = value();
        memset((void *)address, (int)value(), size);
    } else if (same(name, "mask")) {
        *variable("last") &= value();
    } else if (same(name, "expect") || same(name, "unlike")) {
        uint64_t wanted = value(), last = *variable("last");
        require((last == wanted) == same(name, "expect"), "script line %u: %s 0x%lx, saw 0x%lx", line_number, name,
                wanted, last);
    } else if (same(name, "sleep")) {
        delay_us(value());
    } else if (same(name, "irqwait")) {
        uint64_t vector = value() & 0xff, wanted = value(), limit = value(), end = now_ns() + limit * 1000000;
        for (uint64_t seen = irq_total; irq_count[vector] < wanted && now_ns() < end; seen = irq_total)
            halt(seen);
        got(irq_count[vector]);
    } else if (same(name, "loop")) {
        loop_left = value();
        loop_begin = at;
        loop_line = line_number;
    } else if (same(name, "end")) {
        if (loop_begin && loop_left > 1) {
            loop_left--;
            at = loop_begin;
            line_number = loop_line;
        }
    } else if (same(name, "say")) {
        word(argument, sizeof argument);
        print("say=%s\n", argument);
    } else if (same(name, "test")) {
        word(argument, sizeof argument);
        run_test(argument, strlen(argument));
    } else if (same(name, "power")) {
        word(argument, sizeof argument);
        print("power=%s\nresult=ok\n", argument);
        platform_end(argument);
    } else {
        fail("script line %u: unknown command %s", line_number, name);
    }
}

void test_script(void)
{
    struct module module = boot_module();
    const char *given = param("script", NULL);
    require(given || module.size, "test=script needs a boot module or script=");
    text = (const char *)module.address;
    text_end = text + module.size;
    if (given) {
        size_t length = strlen(given);
        char *copy = allocate(length + 1, 8);
        for (size_t i = 0; i < length; i++)
            copy[i] = given[i] == ';' ? '\n' : given[i] == ',' ? ' ' : given[i];
        text = copy;
        text_end = copy + length;
    }
    line_number = 1;
    for (at = text; at < text_end;) {
        char name[32];
        if (word(name, sizeof name))
            command(name);
        while (at < text_end && *at != '\n')
            at++;
        if (at < text_end)
            at++;
        line_number++;
    }
    print("script.lines=%u\n", line_number);
}
