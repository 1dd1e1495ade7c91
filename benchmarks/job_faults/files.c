/* A library to preload: it counts, logs, and disturbs the file calls of a process below one folder.

   Everything that changes files passes here, whoever makes the call: Python, torch's C++ streams, and Rust. Calls are
   in order over all processes that share a log: each holds a lock from before the call until it is logged. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum { OPEN = 1, WRITE, SYNC, RENAME, UNLINK, MKDIR, RMDIR, TRUNCATE, READ, MARK };
enum { NOTHING, KILL, KILL_ALL, FAIL, FAIL_FROM_THERE, SHORT, STOP };

static struct {
    char root[PATH_MAX];
    int action, error, reads, number, count, log, lock, ids, armed, no_sync, no_lock, lock_error;
    int id[64];
} state = {.log = -1, .lock = -1};
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;
static __thread int inside;

#define REAL(name) ((__typeof__(&name))next(#name))
static void *next(const char *name) { return dlsym(RTLD_NEXT, name); }

/* the process's interface */

void faults_arm(const char *root, int action, int number, int error, int reads, const int *ids, int count) {
    snprintf(state.root, sizeof state.root, "%s", root);
    state.action = action, state.number = number, state.error = error, state.reads = reads, state.count = 0;
    state.ids = count < 64 ? count : 64;
    for (int i = 0; i < state.ids; i++) state.id[i] = ids[i];
    state.armed = 1;
}

void faults_log(const char *log, const char *lock) {
    if (state.log >= 0) close(state.log), close(state.lock);
    state.log = log ? syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_APPEND | O_CREAT | O_CLOEXEC, 0600) : -1;
    state.lock = log ? syscall(SYS_openat, AT_FDCWD, lock, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
}

/* what is left out on purpose: syncs, locks; or the error of a file system that knows no locks */
void faults_without(int no_sync, int no_lock, int lock_error) {
    state.no_sync = no_sync, state.no_lock = no_lock, state.lock_error = lock_error;
}

int faults_disarm(void) {
    state.armed = 0;
    return state.count;
}

/* which calls are concerned */

static int below(const char *path) {
    size_t length = strlen(state.root);
    return state.armed && !inside && !strncmp(path, state.root, length) && (path[length] == '/' || !path[length]);
}

static int place_at(int folder, const char *path, char *found) {
    if (!state.armed || inside) return 0;
    if (path[0] == '/') snprintf(found, PATH_MAX, "%s", path);
    else {
        char base[PATH_MAX - 2], link[64];
        if (folder == AT_FDCWD) {
            if (!getcwd(base, sizeof base)) return 0;
        } else {
            snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
            ssize_t length = readlink(link, base, sizeof base - 1);
            if (length < 0) return 0;
            base[length] = 0;
        }
        if (snprintf(found, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return 0;
    }
    return below(found);
}

static int place_of(int descriptor, char *found) {
    if (!state.armed || inside) return 0;
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
    ssize_t length = readlink(link, found, PATH_MAX - 1);
    if (length < 0) return 0;
    found[length] = 0;
    return below(found);
}

/* before and after each call */

static int begin(int operation) {
    pthread_mutex_lock(&mutex);
    inside = 1;
    if (state.lock >= 0) syscall(SYS_flock, state.lock, LOCK_EX);
    if ((operation == READ) != state.reads) return 0;
    state.count++;
    if (state.action == FAIL_FROM_THERE ? state.count < state.number : state.count != state.number) return 0;
    if (state.action == STOP) {
        if (state.lock >= 0) syscall(SYS_flock, state.lock, LOCK_UN);
        kill(getpid(), SIGSTOP);
        if (state.lock >= 0) syscall(SYS_flock, state.lock, LOCK_EX);
    } else if (state.action == KILL || state.action == KILL_ALL) {
        for (int i = 0; state.action == KILL_ALL && i < state.ids; i++)
            if (state.id[i] != getpid()) kill(state.id[i], SIGKILL);
        kill(getpid(), SIGKILL);
    } else if (state.action == FAIL) return state.error;
    else if (state.action == FAIL_FROM_THERE)
        return operation == WRITE || operation == MKDIR || operation == OPEN ? state.error : 0;
    else if (state.action == SHORT) return -1;
    return 0;
}

static void end(void) {
    int saved = errno;
    if (state.lock >= 0) syscall(SYS_flock, state.lock, LOCK_UN);
    inside = 0;
    pthread_mutex_unlock(&mutex);
    errno = saved;
}

static void note(int operation, const char *path, const char *other, int64_t at, const struct iovec *parts, int count,
                 int64_t size) {
    if (state.log < 0) return;
    int saved = errno;
    int64_t head[4] = {operation, at, strlen(path), other ? (int64_t)strlen(other) : 0};
    struct iovec all[68] = {{head, sizeof head}, {&size, sizeof size}, {(void *)path, head[2]},
                            {(void *)(other ? other : ""), head[3]}};
    int used = 4;
    for (int64_t left = size, i = 0; i < count && i < 64 && left > 0; i++) {
        all[used] = parts[i];
        if ((int64_t)all[used].iov_len > left) all[used].iov_len = left;
        left -= all[used++].iov_len;
    }
    ssize_t written = REAL(writev)(state.log, all, used); /* one call, so that what a kill cuts off is the end */
    (void)written;
    errno = saved;
}

/* of a file, which it keeps when it gets another name */
static int64_t number_of(int descriptor) {
    struct stat status;
    return fstat(descriptor, &status) ? 0 : (int64_t)status.st_ino;
}

#define FAILED(fault) do { if ((fault) > 0) { end(); errno = (fault); return -1; } } while (0)

/* opening */

static int opened(int folder, const char *path, int flags, mode_t mode) {
    char found[PATH_MAX];
    if (!place_at(folder, path, found)) return syscall(SYS_openat, folder, path, flags, mode);
    int changes = flags & (O_CREAT | O_TRUNC), fault = begin(changes ? OPEN : READ);
    FAILED(fault);
    int descriptor = syscall(SYS_openat, folder, path, flags, mode);
    if (descriptor >= 0 && changes) note(OPEN, found, flags & O_TRUNC ? "t" : 0, number_of(descriptor), 0, 0, 0);
    end();
    return descriptor;
}

#define MODE mode_t mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list rest; va_start(rest, flags); \
    mode = va_arg(rest, mode_t); va_end(rest); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }

static FILE *stream(const char *path, const char *mode, const char *name) {
    FILE *(*real)(const char *, const char *) = next(name);
    char found[PATH_MAX];
    if (!place_at(AT_FDCWD, path, found)) return real(path, mode);
    int changes = mode[0] == 'w' || mode[0] == 'a', fault = begin(changes ? OPEN : READ);
    if (fault > 0) { end(); errno = fault; return 0; }
    FILE *file = real(path, mode);
    if (file && changes) note(OPEN, found, mode[0] == 'w' ? "t" : 0, number_of(fileno(file)), 0, 0, 0);
    end();
    return file;
}
FILE *fopen(const char *path, const char *mode) { return stream(path, mode, "fopen"); }
FILE *fopen64(const char *path, const char *mode) { return stream(path, mode, "fopen64"); }

/* writing and reading: `at` is -1 for the position of the descriptor */

static ssize_t transfer(int descriptor, const struct iovec *parts, int count, int64_t at, int writes, int flags) {
    char found[PATH_MAX];
    int ours = place_of(descriptor, found), fault = ours ? begin(writes ? WRITE : READ) : 0;
    if (fault > 0) { end(); errno = fault; return -1; }
    struct iovec part = count > 0 ? parts[0] : (struct iovec){0};
    if (fault < 0 && count > 0) {
        part.iov_len = part.iov_len / 2 ? part.iov_len / 2 : part.iov_len;
        parts = &part, count = 1;
    }
    int64_t from = at;
    if (ours && writes && at < 0) {
        int append = fcntl(descriptor, F_GETFL) & O_APPEND;
        from = lseek(descriptor, 0, append ? SEEK_END : SEEK_CUR);
    }
    unsigned long low = (unsigned long)at, high = 0;
    ssize_t done = at < 0 ? syscall(writes ? SYS_writev : SYS_readv, descriptor, parts, count)
                          : syscall(writes ? SYS_pwritev2 : SYS_preadv2, descriptor, parts, count, low, high, flags);
    if (ours) {
        if (writes && done > 0) note(WRITE, found, 0, from, parts, count, done);
        end();
    }
    return done;
}

#define ONE(data, size) struct iovec part = {(void *)(data), size}
ssize_t write(int d, const void *data, size_t size) { ONE(data, size); return transfer(d, &part, 1, -1, 1, 0); }
ssize_t writev(int d, const struct iovec *parts, int count) { return transfer(d, parts, count, -1, 1, 0); }
ssize_t pwrite(int d, const void *data, size_t size, off_t at) { ONE(data, size); return transfer(d, &part, 1, at, 1, 0); }
ssize_t pwrite64(int d, const void *data, size_t size, off_t at) { ONE(data, size); return transfer(d, &part, 1, at, 1, 0); }
ssize_t pwritev(int d, const struct iovec *parts, int count, off_t at) { return transfer(d, parts, count, at, 1, 0); }
ssize_t pwritev64(int d, const struct iovec *parts, int count, off_t at) { return transfer(d, parts, count, at, 1, 0); }
ssize_t pwritev2(int d, const struct iovec *p, int n, off_t at, int flags) { return transfer(d, p, n, at, 1, flags); }
ssize_t pwritev64v2(int d, const struct iovec *p, int n, off_t at, int flags) { return transfer(d, p, n, at, 1, flags); }
ssize_t read(int d, void *data, size_t size) { ONE(data, size); return transfer(d, &part, 1, -1, 0, 0); }
ssize_t readv(int d, const struct iovec *parts, int count) { return transfer(d, parts, count, -1, 0, 0); }
ssize_t pread(int d, void *data, size_t size, off_t at) { ONE(data, size); return transfer(d, &part, 1, at, 0, 0); }
ssize_t pread64(int d, void *data, size_t size, off_t at) { ONE(data, size); return transfer(d, &part, 1, at, 0, 0); }
ssize_t preadv(int d, const struct iovec *parts, int count, off_t at) { return transfer(d, parts, count, at, 0, 0); }
ssize_t preadv64(int d, const struct iovec *parts, int count, off_t at) { return transfer(d, parts, count, at, 0, 0); }

/* copies inside of the kernel are not known here: callers copy by reading and writing then */
ssize_t sendfile(int to, int from, off_t *at, size_t size) {
    char found[PATH_MAX];
    if (place_of(to, found)) { errno = EINVAL; return -1; }
    return syscall(SYS_sendfile, to, from, at, size);
}
ssize_t sendfile64(int to, int from, off_t *at, size_t size) { return sendfile(to, from, at, size); }
ssize_t copy_file_range(int from, off_t *at, int to, off_t *there, size_t size, unsigned flags) {
    char found[PATH_MAX];
    if (place_of(to, found)) { errno = EXDEV; return -1; }
    return syscall(SYS_copy_file_range, from, at, to, there, size, flags);
}

/* names, sizes and syncs */

static int synced(int descriptor, int number) {
    char found[PATH_MAX];
    if (!place_of(descriptor, found)) return syscall(number, descriptor);
    int fault = begin(SYNC);
    FAILED(fault);
    if (!state.no_sync) note(SYNC, found, 0, number_of(descriptor), 0, 0, 0); /* the disk of the replay is all that is to be kept */
    end();
    return 0;
}
int fsync(int descriptor) { return synced(descriptor, SYS_fsync); }
int fdatasync(int descriptor) { return synced(descriptor, SYS_fdatasync); }

static int renamed(int a, const char *from, int b, const char *to, unsigned flags) {
    char found[PATH_MAX], other[PATH_MAX];
    int ours = place_at(b, to, other) && place_at(a, from, found);
    if (!ours) return syscall(SYS_renameat2, a, from, b, to, flags);
    int fault = begin(RENAME);
    FAILED(fault);
    int result = syscall(SYS_renameat2, a, from, b, to, flags);
    if (!result) note(RENAME, found, other, 0, 0, 0, 0);
    end();
    return result;
}
int rename(const char *from, const char *to) { return renamed(AT_FDCWD, from, AT_FDCWD, to, 0); }
int renameat(int a, const char *from, int b, const char *to) { return renamed(a, from, b, to, 0); }
int renameat2(int a, const char *from, int b, const char *to, unsigned flags) { return renamed(a, from, b, to, flags); }

static int removed(int folder, const char *path, int flags) {
    char found[PATH_MAX];
    if (!place_at(folder, path, found)) return syscall(SYS_unlinkat, folder, path, flags);
    int operation = flags & AT_REMOVEDIR ? RMDIR : UNLINK, fault = begin(operation);
    FAILED(fault);
    int result = syscall(SYS_unlinkat, folder, path, flags);
    if (!result) note(operation, found, 0, 0, 0, 0, 0);
    end();
    return result;
}
int unlink(const char *path) { return removed(AT_FDCWD, path, 0); }
int unlinkat(int folder, const char *path, int flags) { return removed(folder, path, flags); }
int rmdir(const char *path) { return removed(AT_FDCWD, path, AT_REMOVEDIR); }

static int made(int folder, const char *path, mode_t mode) {
    char found[PATH_MAX];
    if (!place_at(folder, path, found)) return syscall(SYS_mkdirat, folder, path, mode);
    int fault = begin(MKDIR);
    FAILED(fault);
    int result = syscall(SYS_mkdirat, folder, path, mode);
    if (!result) note(MKDIR, found, 0, 0, 0, 0, 0);
    end();
    return result;
}
int mkdir(const char *path, mode_t mode) { return made(AT_FDCWD, path, mode); }
int mkdirat(int folder, const char *path, mode_t mode) { return made(folder, path, mode); }

int ftruncate(int descriptor, off_t size) {
    char found[PATH_MAX];
    if (!place_of(descriptor, found)) return syscall(SYS_ftruncate, descriptor, size);
    int fault = begin(TRUNCATE);
    FAILED(fault);
    int result = syscall(SYS_ftruncate, descriptor, size);
    if (!result) note(TRUNCATE, found, 0, size, 0, 0, 0);
    end();
    return result;
}
int ftruncate64(int descriptor, off_t size) { return ftruncate(descriptor, size); }

int flock(int descriptor, int operation) {
    char found[PATH_MAX];
    if (place_of(descriptor, found)) {
        if (state.no_lock) return 0;
        if (state.lock_error) { errno = state.lock_error; return -1; }
    }
    return syscall(SYS_flock, descriptor, operation);
}
