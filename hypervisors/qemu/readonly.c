/*
 * What: loaded into QEMU (LD_PRELOAD), it has the file named by KATA_READ_ONLY opened for reading only,
 * whatever is asked for; every other file is opened as ever.
 * Why: a VM that begins from a template maps the template's memory privately. For that reading is enough, but
 * QEMU before 8.2 opens the file for writing all the same, and later ones do unless they are told otherwise.
 * The file is shared by all VMs of a template, so nobody who has taken one QEMU over may be able to write it.
 * Invariants: without it, or where it does not take, QEMU is refused the file (its mode is 0444, and its owner
 * root), and the VM does not start: it can fail, but not in the other direction.
 * Source: util/mmap-alloc.c and softmmu/physmem.c (file_ram_open) of QEMU 7.2; openat(2).
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <stdarg.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <unistd.h>

static int open_as_allowed(const char *path, int flags, mode_t mode)
{
    const char *only = getenv("KATA_READ_ONLY");

    if (only && path && strcmp(path, only) == 0)
        flags = (flags & ~(O_ACCMODE | O_CREAT | O_TRUNC)) | O_RDONLY;
    return (int)syscall(SYS_openat, AT_FDCWD, path, flags, mode);
}

int open64(const char *path, int flags, ...)
{
    mode_t mode = 0;
    va_list rest;

    if (flags & (O_CREAT | __O_TMPFILE)) {
        va_start(rest, flags);
        mode = va_arg(rest, mode_t);
        va_end(rest);
    }
    return open_as_allowed(path, flags, mode);
}

/* What a fortified program calls instead. */
int __open64_2(const char *path, int flags);

int __open64_2(const char *path, int flags)
{
    return open_as_allowed(path, flags, 0);
}
