#include "vcpu.h"

#include <errno.h>
#include <pthread.h>
#include <signal.h>
#include <string.h>
#include <sys/ioctl.h>
#include <sys/mman.h>
#include <time.h>
#include <unistd.h>
#include <linux/kvm.h>

#define PM_TIMER_HZ 3579545ull
#define PORT_STAGE 0x80
#define PORT_DEBUG 0xe9
#define PORT_CONFIG_ADDRESS 0xcf8
#define PORT_CONFIG_DATA 0xcfc
#define UART_THR 0
#define UART_LSR 5
#define UART_LSR_THRE_TEMT 0x60
#define ECAM_SIZE (1u << 20)
#define STAGES 64

uint64_t cv_monotonic_ns(void)
{
    struct timespec now;

    clock_gettime(CLOCK_MONOTONIC, &now);
    return (uint64_t)now.tv_sec * 1000000000ull + (uint64_t)now.tv_nsec;
}

/* ---- rings between vCPU threads and core's main thread ---------------------------------------- */

static void lock(struct cv_board *board)
{
    while (__atomic_exchange_n(&board->lock, 1, __ATOMIC_ACQUIRE))
        ;
}

static void unlock(struct cv_board *board)
{
    __atomic_store_n(&board->lock, 0, __ATOMIC_RELEASE);
}

/* Append bytes; what does not fit is dropped and counted. Wakes the reader of an empty ring. */
static void put(struct cv_board *board, uint8_t *ring, uint32_t *head, const uint32_t *tail, int wake_fd,
                const uint8_t *bytes, uint32_t count)
{
    const uint64_t one = 1;
    int wake;

    lock(board);
    wake = *head == *tail;
    for (uint32_t i = 0; i < count; i++) {
        if (*head - *tail == CV_TX_RING) {
            board->tx_dropped += count - i;
            break;
        }
        ring[(*head)++ % CV_TX_RING] = bytes[i];
    }
    unlock(board);
    if (wake && wake_fd >= 0 && write(wake_fd, &one, sizeof(one)) < 0)
        return; /* EAGAIN: the counter is not zero, so the reader is awake anyway */
}

static uint32_t take(struct cv_board *board, const uint8_t *ring, const uint32_t *head, uint32_t *tail,
                     uint8_t *into, uint32_t room)
{
    uint32_t count = 0;

    lock(board);
    while (count < room && *tail != *head)
        into[count++] = ring[(*tail)++ % CV_TX_RING];
    unlock(board);
    return count;
}

uint32_t cv_board_take_tx(struct cv_board *board, uint8_t *into, uint32_t room)
{
    return take(board, board->tx, &board->tx_head, &board->tx_tail, into, room);
}

uint32_t cv_board_take_debug(struct cv_board *board, uint8_t *into, uint32_t room)
{
    return take(board, board->debug, &board->debug_head, &board->debug_tail, into, room);
}

/* ---- exits that need no Python ------------------------------------------------------------------ */

static void stage(struct cv_board *board, uint8_t code)
{
    lock(board);
    board->stage_code[board->stage_count % STAGES] = code;
    board->stage_ns[board->stage_count++ % STAGES] = cv_monotonic_ns();
    board->debug_last = code;
    unlock(board);
}

/* Config bytes of bus 0: 1 if settled, 0 if Python must answer. */
static int config_read(struct cv_board *board, uint32_t slot, uint32_t function, uint32_t reg, uint8_t *data,
                       uint32_t size)
{
    uint32_t first = reg / 4, last = (reg + size - 1) / 4;

    if (reg + size > CV_CONFIG_SIZE)
        return 0;
    if (function || !board->present[slot]) {
        memset(data, 0xff, size);
        return 1;
    }
    for (uint32_t dword = first; dword <= last; dword++)
        if (board->ask[slot][dword / 8] & (1u << (dword % 8)))
            return 0;
    memcpy(data, &board->config[slot][reg], size);
    return 1;
}

static int io_read(struct cv_board *board, uint16_t port, uint8_t size, uint8_t *data)
{
    if (port == board->pm_timer_port && size == 4) {
        unsigned __int128 ns = cv_monotonic_ns() - board->pm_timer_zero_ns;
        uint32_t ticks = (uint32_t)(ns * PM_TIMER_HZ / 1000000000ull);

        memcpy(data, &ticks, sizeof(ticks));
        return 1;
    }
    if (board->serial_port && port == board->serial_port + UART_LSR && size == 1) {
        uint32_t used = __atomic_load_n(&board->tx_head, __ATOMIC_RELAXED)
                      - __atomic_load_n(&board->tx_tail, __ATOMIC_RELAXED);

        /* A reader that is behind slows the guest down before bytes must be dropped. */
        data[0] = used > CV_TX_RING / 4 * 3 ? board->serial_lsr & ~UART_LSR_THRE_TEMT : board->serial_lsr;
        return board->serial_lsr != 0 && !(board->serial_lsr & 0x1e);
    }
    if (port == PORT_STAGE && size == 1) {
        data[0] = board->debug_last;
        return 1;
    }
    if (port == PORT_DEBUG && size == 1) {
        data[0] = PORT_DEBUG; /* the answer by which guests detect the port */
        return 1;
    }
    if (port >= PORT_CONFIG_DATA && port + size <= PORT_CONFIG_DATA + 4) {
        uint32_t address = __atomic_load_n(&board->config_address, __ATOMIC_RELAXED);

        if (!(address & 0x80000000u) || (address & 0x7f000000u))
            return 0;
        if ((address >> 16) & 0xff) {
            memset(data, 0xff, size);
            return 1;
        }
        return config_read(board, (address >> 11) & 31, (address >> 8) & 7,
                           (address & 0xfc) + (port - PORT_CONFIG_DATA), data, size);
    }
    return 0;
}

static int io_write(struct cv_board *board, uint16_t port, uint8_t size, const uint8_t *data, uint32_t count)
{
    if (board->serial_port && port == board->serial_port + UART_THR && size == 1 && board->serial_tx_fast) {
        put(board, board->tx, &board->tx_head, &board->tx_tail, board->serial_wake_fd, data, count);
        return 1;
    }
    if (port == PORT_DEBUG && size == 1) {
        put(board, board->debug, &board->debug_head, &board->debug_tail, board->debug_wake_fd, data, count);
        return 1;
    }
    if (port == PORT_STAGE && size == 1) {
        stage(board, data[count - 1]);
        return 1;
    }
    if (port == PORT_CONFIG_ADDRESS && size == 4) {
        uint32_t address;

        memcpy(&address, data + 4 * (count - 1), 4);
        __atomic_store_n(&board->config_address, address, __ATOMIC_RELAXED);
        return 1;
    }
    return 0;
}

static int mmio_read(struct cv_board *board, uint64_t gpa, uint32_t size, uint8_t *data)
{
    uint64_t offset = gpa - board->ecam_base;

    if (gpa < board->ecam_base || offset >= ECAM_SIZE)
        return 0;
    return config_read(board, (offset >> 15) & 31, (offset >> 12) & 7, offset & 0xfff, data, size);
}

static int settle(struct cv_vcpu *vcpu, struct kvm_run *run)
{
    struct cv_board *board = vcpu->board;

    if (!board)
        return 0;
    if (run->exit_reason == KVM_EXIT_MMIO)
        return !run->mmio.is_write && mmio_read(board, run->mmio.phys_addr, run->mmio.len, run->mmio.data);
    uint8_t *data = (uint8_t *)run + run->io.data_offset;

    if (run->io.direction == KVM_EXIT_IO_OUT)
        return io_write(board, run->io.port, run->io.size, data, run->io.count);
    for (uint32_t i = 0; i < run->io.count; i++)
        if (!io_read(board, run->io.port, run->io.size, data + i * run->io.size))
            return 0;
    return 1;
}

/* ---- the run loop ------------------------------------------------------------------------------- */

static void ignore(int signal_number)
{
}

int cv_install_kick(int signal_number)
{
    struct sigaction action = { .sa_handler = ignore }; /* no SA_RESTART: KVM_RUN must return EINTR */

    return sigaction(signal_number, &action, NULL) ? -errno : 0;
}

void cv_vcpu_immediate_exit(struct cv_vcpu *vcpu, int on)
{
    __atomic_store_n(&((struct kvm_run *)vcpu->run)->immediate_exit, on ? 1 : 0, __ATOMIC_SEQ_CST);
}

void *cv_vcpu_map(int fd, size_t size)
{
    void *run = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);

    return run == MAP_FAILED ? NULL : run;
}

int cv_vcpu_unmap(void *run, size_t size)
{
    return munmap(run, size) ? -errno : 0;
}

int cv_vcpu_run(struct cv_vcpu *vcpu)
{
    struct kvm_run *run = vcpu->run;

    if (vcpu->board && !vcpu->board->first_entry_ns)
        vcpu->board->first_entry_ns = cv_monotonic_ns();
    for (;;) {
        vcpu->counters.entries++;
        if (ioctl(vcpu->fd, KVM_RUN, 0) < 0) {
            if (errno == EINTR || errno == EAGAIN) {
                vcpu->counters.kicks++;
                return CV_EXIT_KICK;
            }
            vcpu->reason = 0;
            vcpu->detail = errno;
            return CV_EXIT_ERROR;
        }
        vcpu->reason = run->exit_reason;
        vcpu->detail = 0;
        switch (run->exit_reason) {
        case KVM_EXIT_IO:
            if (settle(vcpu, run)) {
                vcpu->counters.settled++;
                continue;
            }
            vcpu->counters.io++;
            vcpu->is_write = run->io.direction == KVM_EXIT_IO_OUT;
            vcpu->size = run->io.size;
            vcpu->count = run->io.count;
            vcpu->address = run->io.port;
            vcpu->data = (uint8_t *)run + run->io.data_offset;
            return CV_EXIT_IO;
        case KVM_EXIT_MMIO:
            if (settle(vcpu, run)) {
                vcpu->counters.settled++;
                continue;
            }
            vcpu->counters.mmio++;
            vcpu->is_write = run->mmio.is_write;
            vcpu->size = run->mmio.len;
            vcpu->count = 1;
            vcpu->address = run->mmio.phys_addr;
            vcpu->data = run->mmio.data;
            return CV_EXIT_MMIO;
        case KVM_EXIT_INTR:
            return CV_EXIT_KICK;
        case KVM_EXIT_HLT:
            return CV_EXIT_HLT;
        case KVM_EXIT_SHUTDOWN:
            return CV_EXIT_SHUTDOWN;
        case KVM_EXIT_SYSTEM_EVENT:
            vcpu->detail = run->system_event.type;
            return CV_EXIT_SYSTEM;
        case KVM_EXIT_FAIL_ENTRY:
            vcpu->detail = run->fail_entry.hardware_entry_failure_reason;
            return CV_EXIT_ERROR;
        case KVM_EXIT_INTERNAL_ERROR:
            vcpu->detail = run->internal.suberror;
            return CV_EXIT_ERROR;
        default:
            return CV_EXIT_ERROR;
        }
    }
}
