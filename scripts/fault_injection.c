/* Injects one fault into a process, at its N-th call of the system that concerns watched files.

   Loaded with LD_PRELOAD; scripts/inject_faults.py compiles it and tells it what to do. It counts calls
   of open, write, rename, unlink, mkdir, rmdir and fsync whose path, or whose file, lies below one of the
   watched folders. At the call with the given number it sends signals, or makes the call fail. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static const char *watched[8];
static int folders = 0;
static long at = 0;      /* number of the call; 0 only counts */
static int fault = 0;    /* below 0: a signal; above 0: an error number */
static int again = 0;    /* for a signal: send a second one at the next call */
static int for_ever = 0; /* for an error: at all later calls that write, too, like a full disk */
static long calls = 0;
static char last[PATH_MAX + 32];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

void fault_watch(const char *folder) { watched[folders++] = strdup(folder); }
void fault_at(long number, int what, int twice, int ever) {
    calls = 0; at = number; fault = what; again = twice; for_ever = ever;
}
long fault_calls(void) { return calls; }
const char *fault_last(void) { return last; }

static int is_watched(const char *path) {
    for (int i = 0; i < folders; i++)
        if (!strncmp(path, watched[i], strlen(watched[i]))) return 1;
    return 0;
}

/* Returns the error number with which the call must fail, or 0. */
static int step(const char *what, const char *path, int makes_data) {
    if (!folders || !path || !is_watched(path)) return 0;
    pthread_mutex_lock(&lock);
    long number = ++calls;
    int error = 0, number_of_signal = 0;
    if (at && (number == at || (again && number == at + 1) || (for_ever && number > at && makes_data))) {
        if (number == at) snprintf(last, sizeof last, "%s %s", what, path);
        if (fault < 0) number_of_signal = -fault; else error = fault;
    }
    pthread_mutex_unlock(&lock);
    if (number_of_signal) kill(getpid(), number_of_signal);
    return error;
}

static const char *absolute(int folder, const char *path, char *buffer) {
    if (!path || path[0] == '/') return path;
    char link[64]; ssize_t n;
    if (folder == AT_FDCWD) { if (!getcwd(buffer, PATH_MAX)) return path; }
    else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
        if ((n = readlink(link, buffer, PATH_MAX - 1)) < 0) return path;
        buffer[n] = 0;
    }
    strncat(buffer, "/", PATH_MAX - strlen(buffer) - 1);
    strncat(buffer, path, PATH_MAX - strlen(buffer) - 1);
    return buffer;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); if (!real) real = dlsym(RTLD_NEXT, #name)
#define FAIL(what, path, data) do { int e = step(what, path, data); if (e) { errno = e; return -1; } } while (0)

static const char *of(int descriptor, char *buffer) {
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t n = readlink(link, buffer, PATH_MAX - 1);
    if (n < 0) return NULL;
    buffer[n] = 0;
    return buffer;
}

#define OPENS(flags) (((flags) & (O_WRONLY | O_RDWR | O_CREAT)) ? 1 : 0)
#define OPEN(name) int name(const char *path, int flags, ...) { \
    REAL(int, name, const char *, int, ...); char b[PATH_MAX]; mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); } \
    if (OPENS(flags)) FAIL("open", absolute(AT_FDCWD, path, b), 1); \
    return real(path, flags, mode); }
#define OPENAT(name) int name(int folder, const char *path, int flags, ...) { \
    REAL(int, name, int, const char *, int, ...); char b[PATH_MAX]; mode_t mode = 0; \
    if (flags & (O_CREAT | O_TMPFILE)) { va_list l; va_start(l, flags); mode = va_arg(l, mode_t); va_end(l); } \
    if (OPENS(flags)) FAIL("open", absolute(folder, path, b), 1); \
    return real(folder, path, flags, mode); }
OPEN(open)
OPEN(open64)
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, write, int, const void *, size_t); char b[PATH_MAX];
    FAIL("write", of(fd, b), 1);
    return real(fd, data, size);
}
ssize_t writev(int fd, const struct iovec *data, int count) {
    REAL(ssize_t, writev, int, const struct iovec *, int); char b[PATH_MAX];
    FAIL("write", of(fd, b), 1);
    return real(fd, data, count);
}
int fsync(int fd) {
    REAL(int, fsync, int); char b[PATH_MAX];
    FAIL("fsync", of(fd, b), 1);
    return real(fd);
}
int rename(const char *from, const char *to) {
    REAL(int, rename, const char *, const char *); char b[PATH_MAX];
    FAIL("rename", absolute(AT_FDCWD, to, b), 0);
    return real(from, to);
}
int renameat(int f, const char *from, int t, const char *to) {
    REAL(int, renameat, int, const char *, int, const char *); char b[PATH_MAX];
    FAIL("rename", absolute(t, to, b), 0);
    return real(f, from, t, to);
}
int unlink(const char *path) {
    REAL(int, unlink, const char *); char b[PATH_MAX];
    FAIL("unlink", absolute(AT_FDCWD, path, b), 0);
    return real(path);
}
int unlinkat(int folder, const char *path, int flags) {
    REAL(int, unlinkat, int, const char *, int); char b[PATH_MAX];
    FAIL("unlink", absolute(folder, path, b), 0);
    return real(folder, path, flags);
}
int mkdir(const char *path, mode_t mode) {
    REAL(int, mkdir, const char *, mode_t); char b[PATH_MAX];
    FAIL("mkdir", absolute(AT_FDCWD, path, b), 1);
    return real(path, mode);
}
int rmdir(const char *path) {
    REAL(int, rmdir, const char *); char b[PATH_MAX];
    FAIL("rmdir", absolute(AT_FDCWD, path, b), 0);
    return real(path);
}
