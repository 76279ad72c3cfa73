/* Loaded before libc: counts the calls by which a process changes files below a folder, and at the one that was
   asked for kills the process, or lets the call fail. A call is a number, so that every one of them has its turn. */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char below[4096]; /* only what lies here counts */
static long at;          /* the call that fails; 0: none */
static int code;         /* with which errno; 0: the process is killed before it, -1: after it */
static int lasting;      /* whether calls after it fail, too, as on a full disk */
static int reads;        /* whether reading counts instead of writing */
static long seen;

void faults_arm(const char *folder, long number, int error, int all, int reading) {
    strncpy(below, folder, sizeof below - 1);
    at = number;
    code = error;
    lasting = all;
    reads = reading;
    __atomic_store_n(&seen, 0, __ATOMIC_SEQ_CST);
}

long faults_seen(void) { return __atomic_load_n(&seen, __ATOMIC_SEQ_CST); }

/* What a full disk refuses is to take more; names can still be changed and removed. */
#define TAKES_NONE (code != ENOSPC)

static int counts_path(const char *path) { return below[0] && path && !strncmp(path, below, strlen(below)); }

static int counts_descriptor(int descriptor) {
    if (!below[0]) return 0;
    char link[64], path[4096];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t size = readlink(link, path, sizeof path - 1);
    if (size < 0) return 0;
    path[size] = 0;
    return counts_path(path);
}

/* 0: go on; 1: go on, and die afterwards; else errno. */
static int due(void) {
    long now = __atomic_add_fetch(&seen, 1, __ATOMIC_SEQ_CST);
    if (!at || now < at || (now > at && !lasting)) return 0;
    if (code == 0) kill(getpid(), SIGKILL);
    if (code == -1) return 1;
    return code;
}

#define DIE_AFTER(verdict) do { if ((verdict) == 1) kill(getpid(), SIGKILL); } while (0)

#define WRAP(type, name, parameters, arguments, reading, counting)                    \
    type name parameters {                                                           \
        static type(*real) parameters;                                               \
        if (!real) real = dlsym(RTLD_NEXT, #name);                                   \
        int verdict = reads == (reading) && (counting) ? due() : 0;                  \
        if (verdict > 1) { errno = verdict; return -1; }                             \
        type result = real arguments;                                                \
        DIE_AFTER(verdict);                                                          \
        return result;                                                               \
    }

WRAP(ssize_t, write, (int d, const void *b, size_t n), (d, b, n), 0, counts_descriptor(d))
WRAP(ssize_t, pwrite64, (int d, const void *b, size_t n, off64_t o), (d, b, n, o), 0, counts_descriptor(d))
WRAP(ssize_t, pwrite, (int d, const void *b, size_t n, off_t o), (d, b, n, o), 0, counts_descriptor(d))
WRAP(ssize_t, writev, (int d, const struct iovec *v, int n), (d, v, n), 0, counts_descriptor(d))
WRAP(ssize_t, sendfile64, (int o, int i, off64_t *p, size_t n), (o, i, p, n), 0, counts_descriptor(o))
WRAP(ssize_t, sendfile, (int o, int i, off_t *p, size_t n), (o, i, p, n), 0, counts_descriptor(o))
WRAP(ssize_t, copy_file_range, (int i, off64_t *a, int o, off64_t *b, size_t n, unsigned f), (i, a, o, b, n, f), 0,
     counts_descriptor(o))
WRAP(int, fsync, (int d), (d), 0, counts_descriptor(d))
WRAP(int, ftruncate64, (int d, off64_t n), (d, n), 0, counts_descriptor(d))
WRAP(int, ftruncate, (int d, off_t n), (d, n), 0, counts_descriptor(d))
WRAP(int, rename, (const char *a, const char *b), (a, b), 0, TAKES_NONE && (counts_path(a) || counts_path(b)))
WRAP(int, renameat, (int c, const char *a, int d, const char *b), (c, a, d, b), 0, TAKES_NONE && (counts_path(a) || counts_path(b)))
WRAP(int, renameat2, (int c, const char *a, int d, const char *b, unsigned f), (c, a, d, b, f), 0, TAKES_NONE && (counts_path(a) || counts_path(b)))
WRAP(int, mkdir, (const char *p, mode_t m), (p, m), 0, counts_path(p))
WRAP(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), 0, counts_path(p))
WRAP(int, rmdir, (const char *p), (p), 0, TAKES_NONE && (counts_path(p)))
WRAP(int, unlink, (const char *p), (p), 0, TAKES_NONE && (counts_path(p)))
WRAP(int, unlinkat, (int d, const char *p, int f), (d, p, f), 0, TAKES_NONE && (counts_path(p) || counts_descriptor(d)))
WRAP(ssize_t, read, (int d, void *b, size_t n), (d, b, n), 1, counts_descriptor(d))
WRAP(ssize_t, pread64, (int d, void *b, size_t n, off64_t o), (d, b, n, o), 1, counts_descriptor(d))
WRAP(ssize_t, preadv64, (int d, const struct iovec *v, int n, off64_t o), (d, v, n, o), 1, counts_descriptor(d))
WRAP(ssize_t, preadv2, (int d, const struct iovec *v, int n, off_t o, int f), (d, v, n, o, f), 1, counts_descriptor(d))
WRAP(ssize_t, preadv64v2, (int d, const struct iovec *v, int n, off64_t o, int f), (d, v, n, o, f), 1,
     counts_descriptor(d))

/* Files that are made: the mode follows the flags. */
#define WRAP_OPEN(name, parameters, path, arguments)                                  \
    int name parameters {                                                            \
        static int(*real) parameters;                                                \
        if (!real) real = (int(*) parameters)dlsym(RTLD_NEXT, #name);                \
        mode_t mode = 0;                                                             \
        if (flags & (O_CREAT | __O_TMPFILE)) {                                       \
            va_list more;                                                            \
            va_start(more, flags);                                                   \
            mode = va_arg(more, mode_t);                                             \
            va_end(more);                                                            \
        }                                                                            \
        int verdict = !reads && (flags & O_CREAT) && counts_path(path) ? due() : 0;   \
        if (verdict > 1) { errno = verdict; return -1; }                             \
        int result = real arguments;                                                 \
        DIE_AFTER(verdict);                                                          \
        return result;                                                               \
    }

WRAP_OPEN(open, (const char *path, int flags, ...), path, (path, flags, mode))
WRAP_OPEN(open64, (const char *path, int flags, ...), path, (path, flags, mode))
WRAP_OPEN(openat, (int at_folder, const char *path, int flags, ...), path, (at_folder, path, flags, mode))
WRAP_OPEN(openat64, (int at_folder, const char *path, int flags, ...), path, (at_folder, path, flags, mode))
