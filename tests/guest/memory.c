/* PVH start info, the memory map, a heap that never frees, and page tables that grow on demand. */
#include "guest.h"

struct start_info {
    uint32_t magic, version, flags, module_count;
    uint64_t modules, cmdline, rsdp, map;
    uint32_t map_count, reserved;
};

struct module_entry {
    uint64_t address, size, cmdline, reserved;
};

struct map_entry {
    uint64_t address, size;
    uint32_t type, reserved;
};

#define START_MAGIC 0x336ec578
#define MAP_RAM 1
#define HUGE 0x200000ull

extern uint64_t start_info, pml4[512];
extern char image_end[];
static struct map_entry map[32];
static unsigned map_count;
static struct module module;
static uint64_t heap, heap_end;

void memory_init(void)
{
    const struct start_info *info = (void *)start_info;
    if (info->magic != START_MAGIC)
        return;
    if (info->module_count) {
        const struct module_entry *entry = (void *)info->modules;
        module = (struct module){entry->address, entry->size};
    }
    if (info->version >= 1) {
        map_count = info->map_count < ARRAY_SIZE(map) ? info->map_count : ARRAY_SIZE(map);
        memcpy(map, (void *)info->map, map_count * sizeof *map);
    }
    heap = (uint64_t)image_end;
    heap_end = heap + (64 << 20);
    for (unsigned i = 0; i < map_count; i++)
        if (map[i].type == MAP_RAM && map[i].address <= heap && heap < map[i].address + map[i].size)
            heap_end = map[i].address + map[i].size;
    if (module.address >= heap && module.address < heap_end)
        heap_end = module.address;
}

void memory_report(void)
{
    const struct start_info *info = (void *)start_info;
    print("pvh.version=%u\npvh.modules=%u\n", info->version, info->module_count);
    print("module.address=0x%lx\nmodule.size=%lu\n", module.address, module.size);
    for (unsigned i = 0; i < map_count; i++)
        print("memory.%u=0x%lx+0x%lx type %u\n", i, map[i].address, map[i].size, map[i].type);
    print("memory.ram=%lu\n", ram_total());
}

const char *boot_cmdline(void)
{
    const struct start_info *info = (void *)start_info;
    return info->magic == START_MAGIC && info->cmdline ? (const char *)info->cmdline : "";
}

uint64_t boot_rsdp(void) { return ((const struct start_info *)start_info)->rsdp; }
struct module boot_module(void) { return module; }

uint64_t ram_total(void)
{
    uint64_t total = 0;
    for (unsigned i = 0; i < map_count; i++)
        total += map[i].type == MAP_RAM ? map[i].size : 0;
    return total;
}

uint64_t ram_end(void)
{
    uint64_t end = 0;
    for (unsigned i = 0; i < map_count; i++)
        if (map[i].type == MAP_RAM && map[i].address + map[i].size > end)
            end = map[i].address + map[i].size;
    return end;
}

bool is_ram(uint64_t address, uint64_t size)
{
    for (unsigned i = 0; i < map_count; i++)
        if (map[i].type == MAP_RAM && map[i].address <= address && address + size <= map[i].address + map[i].size)
            return true;
    return false;
}

void *allocate(uint64_t size, uint64_t alignment)
{
    uint64_t address = (heap + alignment - 1) & ~(alignment - 1);
    require(address + size <= heap_end, "out of guest memory: %lu bytes wanted, heap ends at 0x%lx", size, heap_end);
    heap = address + size;
    return memset((void *)address, 0, size);
}

static uint64_t *below(uint64_t *entry)
{
    if (!(*entry & 1))
        *entry = (uint64_t)allocate(PAGE, PAGE) | 7;
    return (uint64_t *)(*entry & ~0xfffull);
}

void map_range(uint64_t address, uint64_t size)
{
    require(address + size <= 1ull << 47, "0x%lx is beyond what identity mapping reaches", address);
    if (address + size <= 1ull << 32)
        return;
    for (uint64_t at = address & ~(HUGE - 1); at < address + size; at += HUGE) {
        uint64_t *directory = below(&below(&pml4[at >> 39])[at >> 30 & 511]);
        if (!(directory[at >> 21 & 511] & 1))
            directory[at >> 21 & 511] = at | 0x87;
    }
}
