/* A plugin for qemu's user emulation that counts the guest's instructions between marks.
 *
 * The guest sets a mark with the system call getpgid(FIRST_MARK - n), which fails and does nothing
 * else. At mark n the plugin appends "mark n TOTAL" to its file, and with blocks=1 a line
 * "PC EXECUTIONS OPCODE..." for each block of instructions that ran since the mark before.
 * Counters are not atomic: the guest must run on one thread while it counts.
 *
 * Built by tools/count_arm64/emulator.py. The declarations below are those of qemu's plugin
 * interface, version 1 (qemu 6.0 and later): https://www.qemu.org/docs/master/devel/tcg-plugins.html
 */
#include <inttypes.h>
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#define EXPORT __attribute__((visibility("default")))
#define FIRST_MARK (-4242000)
#define MOST_MARKS 100000
#define GETPGID 155

typedef uint64_t qemu_plugin_id_t;
struct qemu_plugin_tb;
struct qemu_plugin_insn;
enum qemu_plugin_op { QEMU_PLUGIN_INLINE_ADD_U64 };
typedef void (*translated_callback)(qemu_plugin_id_t, struct qemu_plugin_tb *);
typedef void (*system_call_callback)(qemu_plugin_id_t, unsigned, int64_t, uint64_t, uint64_t,
                                     uint64_t, uint64_t, uint64_t, uint64_t, uint64_t, uint64_t);
void qemu_plugin_register_vcpu_tb_trans_cb(qemu_plugin_id_t, translated_callback);
void qemu_plugin_register_vcpu_syscall_cb(qemu_plugin_id_t, system_call_callback);
void qemu_plugin_register_vcpu_tb_exec_inline(struct qemu_plugin_tb *, enum qemu_plugin_op, void *,
                                              uint64_t);
size_t qemu_plugin_tb_n_insns(const struct qemu_plugin_tb *);
uint64_t qemu_plugin_tb_vaddr(const struct qemu_plugin_tb *);
struct qemu_plugin_insn *qemu_plugin_tb_get_insn(const struct qemu_plugin_tb *, size_t);
const void *qemu_plugin_insn_data(const struct qemu_plugin_insn *);

EXPORT int qemu_plugin_version = 1;

struct block {
    uint64_t runs, runs_before, address;
    size_t length;
    uint32_t *opcodes; /* only if blocks are written */
    struct block *next;
};

static struct block *newest;
static FILE *file;
static bool write_blocks;

static void *checked(void *memory) {
    if (memory == NULL) {
        fputs("count_arm64's plugin: out of memory\n", stderr);
        abort();
    }
    return memory;
}

static void on_translated(qemu_plugin_id_t id, struct qemu_plugin_tb *tb) {
    (void)id;
    struct block *block = checked(calloc(1, sizeof *block));
    block->length = qemu_plugin_tb_n_insns(tb);
    block->address = qemu_plugin_tb_vaddr(tb);
    if (write_blocks) {
        block->opcodes = checked(malloc(block->length * sizeof *block->opcodes));
        for (size_t i = 0; i < block->length; i++)
            memcpy(block->opcodes + i, qemu_plugin_insn_data(qemu_plugin_tb_get_insn(tb, i)), 4);
    }
    block->next = newest;
    newest = block;
    qemu_plugin_register_vcpu_tb_exec_inline(tb, QEMU_PLUGIN_INLINE_ADD_U64, &block->runs, 1);
}

static void write_mark(long number) {
    uint64_t total = 0;
    for (struct block *b = newest; b != NULL; b = b->next)
        total += (b->runs - b->runs_before) * b->length;
    fprintf(file, "mark %ld %" PRIu64 "\n", number, total);
    for (struct block *b = newest; b != NULL; b = b->next) {
        uint64_t runs = b->runs - b->runs_before;
        b->runs_before = b->runs;
        if (!write_blocks || runs == 0)
            continue;
        fprintf(file, "%" PRIx64 " %" PRIu64, b->address, runs);
        for (size_t i = 0; i < b->length; i++)
            fprintf(file, " %" PRIx32, b->opcodes[i]);
        fputc('\n', file);
    }
    fflush(file);
}

static void on_system_call(qemu_plugin_id_t id, unsigned cpu, int64_t number, uint64_t first,
                           uint64_t b, uint64_t c, uint64_t d, uint64_t e, uint64_t f, uint64_t g,
                           uint64_t h) {
    (void)id, (void)cpu, (void)b, (void)c, (void)d, (void)e, (void)f, (void)g, (void)h;
    long mark = FIRST_MARK - (long)(int32_t)first;
    if (number == GETPGID && mark >= 0 && mark < MOST_MARKS)
        write_mark(mark);
}

EXPORT int qemu_plugin_install(qemu_plugin_id_t id, const void *info, int argc, char **argv) {
    (void)info;
    const char *path = NULL;
    for (int i = 0; i < argc; i++) {
        if (strncmp(argv[i], "out=", 4) == 0)
            path = argv[i] + 4;
        else if (strcmp(argv[i], "blocks=1") == 0)
            write_blocks = true;
    }
    file = path == NULL ? NULL : fopen(path, "w");
    if (file == NULL)
        return 1;
    qemu_plugin_register_vcpu_tb_trans_cb(id, on_translated);
    qemu_plugin_register_vcpu_syscall_cb(id, on_system_call);
    return 0;
}
