/* Calls on backing files that Python's os module lacks. All return 0 or -errno. */
#ifndef CELLVISOR_FILE_H
#define CELLVISOR_FILE_H
#include <stdint.h>
#include <sys/ioctl.h> /* TIOCGPTN */

/* fallocate(2) with a mode; the file keeps its size. */
int cv_file_punch(int fd, uint64_t offset, uint64_t size);
int cv_file_zero(int fd, uint64_t offset, uint64_t size);
int cv_file_reserve(int fd, uint64_t offset, uint64_t size);

/* BLKDISCARD and BLKZEROOUT of a block device. */
int cv_block_discard(int fd, uint64_t offset, uint64_t size);
int cv_block_zero(int fd, uint64_t offset, uint64_t size);

/* BLKGETSIZE64 in bytes, BLKSSZGET and BLKPBSZGET in bytes. */
int cv_block_shape(int fd, uint64_t *size, uint32_t *logical, uint32_t *physical);

#endif
