#define _GNU_SOURCE
#include "file.h"

#include <errno.h>
#include <fcntl.h>
#include <linux/falloc.h>
#include <linux/fs.h>
#include <sys/ioctl.h>

static int allocate(int fd, int mode, uint64_t offset, uint64_t size)
{
    while (fallocate(fd, mode | FALLOC_FL_KEEP_SIZE, (off_t)offset, (off_t)size) < 0)
        if (errno != EINTR)
            return -errno;
    return 0;
}

int cv_file_punch(int fd, uint64_t offset, uint64_t size)
{
    return allocate(fd, FALLOC_FL_PUNCH_HOLE, offset, size);
}

int cv_file_zero(int fd, uint64_t offset, uint64_t size)
{
    return allocate(fd, FALLOC_FL_ZERO_RANGE, offset, size);
}

int cv_file_reserve(int fd, uint64_t offset, uint64_t size)
{
    return allocate(fd, 0, offset, size);
}

int cv_block_discard(int fd, uint64_t offset, uint64_t size)
{
    uint64_t range[2] = {offset, size};

    return ioctl(fd, BLKDISCARD, range) < 0 ? -errno : 0;
}

int cv_block_zero(int fd, uint64_t offset, uint64_t size)
{
    uint64_t range[2] = {offset, size};

    return ioctl(fd, BLKZEROOUT, range) < 0 ? -errno : 0;
}

int cv_block_shape(int fd, uint64_t *size, uint32_t *logical, uint32_t *physical)
{
    int sector = 512;
    unsigned int block = 512;

    if (ioctl(fd, BLKGETSIZE64, size) < 0)
        return -errno;
    if (ioctl(fd, BLKSSZGET, &sector) < 0 || ioctl(fd, BLKPBSZGET, &block) < 0)
        return -errno;
    *logical = (uint32_t)sector;
    *physical = block;
    return 0;
}
