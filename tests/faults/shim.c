// Preloaded into a process: counts what it does to files below a folder, and at the n-th such call kills the process or
// lets the call fail. Reads are not counted: they leave nothing behind.
//
//   fault_arm(folder, n, error)   from here on, in this process alone; error 0: SIGKILL before the n-th call; n 0: none
//   fault_count()                 calls since then
//
// Only calls through the dynamic linker are seen; C's own streams write behind its back.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/sendfile.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char root[PATH_MAX];
static size_t root_length;
static long wanted, seen;
static int failure;
static pid_t armed;

void fault_arm(const char* folder, long n, int error) {
  strncpy(root, folder, sizeof root - 1);
  root_length = strlen(root);
  wanted = n;
  seen = 0;
  failure = error;
  armed = getpid();
}

long fault_count(void) { return seen; }

static int below(const char* path) {
  return strncmp(path, root, root_length) == 0 && (path[root_length] == '/' || path[root_length] == 0);
}

static int descriptor_below(int descriptor) {
  char link[64], path[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  const ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return below(path);
}

static int named_below(int folder, const char* path) {
  if (path[0] == '/') return below(path);
  if (folder != AT_FDCWD) return descriptor_below(folder);
  char here[PATH_MAX];
  return getcwd(here, sizeof here) != NULL && below(here);
}

// Whether the call is to fail; does not come back if the process is to die.
static int fails(int counts) {
  if (armed == 0 || !counts || armed != getpid()) return 0;
  seen++;
  if (seen != wanted) return 0;
  if (failure == 0) kill(armed, SIGKILL);
  errno = failure;
  return 1;
}
#define WATCHED(counts) (armed != 0 && fails(counts))

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int writes(int flags) { return (flags & (O_WRONLY | O_RDWR | O_CREAT)) != 0; }

#define OPEN(name)                                                        \
  int name(const char* path, int flags, ...) {                            \
    va_list more;                                                         \
    va_start(more, flags);                                                \
    const mode_t mode = va_arg(more, mode_t);                             \
    va_end(more);                                                         \
    if (WATCHED(writes(flags) && named_below(AT_FDCWD, path))) return -1; \
    return NEXT(name)(path, flags, mode);                                 \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                    \
  int name(int folder, const char* path, int flags, ...) {              \
    va_list more;                                                       \
    va_start(more, flags);                                              \
    const mode_t mode = va_arg(more, mode_t);                           \
    va_end(more);                                                       \
    if (WATCHED(writes(flags) && named_below(folder, path))) return -1; \
    return NEXT(name)(folder, path, flags, mode);                       \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                        \
  FILE* name(const char* path, const char* mode) {                                         \
    if (WATCHED(strpbrk(mode, "wa+") != NULL && named_below(AT_FDCWD, path))) return NULL; \
    return NEXT(name)(path, mode);                                                         \
  }
FOPEN(fopen)
FOPEN(fopen64)

// A call of (type name)(parameters) that is counted if what it names is below the folder.
#define CALL(type, name, parameters, arguments, counts) \
  type name parameters {                                \
    if (WATCHED(counts)) return -1;                     \
    return NEXT(name) arguments;                        \
  }
#define PATH named_below(AT_FDCWD, path)
#define PATHS (named_below(AT_FDCWD, from) || named_below(AT_FDCWD, to))
#define FILE_ descriptor_below(file)
CALL(ssize_t, write, (int file, const void* from, size_t size), (file, from, size), FILE_)
CALL(ssize_t, pwrite, (int file, const void* from, size_t size, off_t at), (file, from, size, at), FILE_)
CALL(ssize_t, pwrite64, (int file, const void* from, size_t size, off64_t at), (file, from, size, at), FILE_)
CALL(ssize_t, writev, (int file, const struct iovec* from, int count), (file, from, count), FILE_)
CALL(int, fsync, (int file), (file), FILE_)
CALL(int, fdatasync, (int file), (file), FILE_)
CALL(int, ftruncate, (int file, off_t size), (file, size), FILE_)
CALL(int, ftruncate64, (int file, off64_t size), (file, size), FILE_)
CALL(int, fchmod, (int file, mode_t mode), (file, mode), FILE_)
CALL(int, fallocate, (int file, int how, off_t at, off_t size), (file, how, at, size), FILE_)
CALL(int, fallocate64, (int file, int how, off64_t at, off64_t size), (file, how, at, size), FILE_)
CALL(int, truncate, (const char* path, off_t size), (path, size), PATH)
CALL(int, truncate64, (const char* path, off64_t size), (path, size), PATH)
CALL(int, chmod, (const char* path, mode_t mode), (path, mode), PATH)
CALL(int, mkdir, (const char* path, mode_t mode), (path, mode), PATH)
CALL(int, mkdirat, (int folder, const char* path, mode_t mode), (folder, path, mode), named_below(folder, path))
CALL(int, rmdir, (const char* path), (path), PATH)
CALL(int, unlink, (const char* path), (path), PATH)
CALL(int, unlinkat, (int folder, const char* path, int how), (folder, path, how), named_below(folder, path))
CALL(int, rename, (const char* from, const char* to), (from, to), PATHS)
CALL(int, renameat, (int a, const char* from, int b, const char* to), (a, from, b, to),
     named_below(a, from) || named_below(b, to))
CALL(int, link, (const char* from, const char* to), (from, to), PATHS)
CALL(int, linkat, (int a, const char* from, int b, const char* to, int how), (a, from, b, to, how),
     named_below(a, from) || named_below(b, to))
CALL(int, symlink, (const char* from, const char* to), (from, to), named_below(AT_FDCWD, to))
CALL(ssize_t, copy_file_range, (int from, off64_t* at, int file, off64_t* to, size_t size, unsigned int how),
     (from, at, file, to, size, how), FILE_)
CALL(ssize_t, sendfile, (int file, int from, off_t* at, size_t size), (file, from, at, size), FILE_)
CALL(ssize_t, sendfile64, (int file, int from, off64_t* at, size_t size), (file, from, at, size), FILE_)

// These two return the error itself.
int posix_fallocate(int file, off_t at, off_t size) {
  if (WATCHED(descriptor_below(file))) return errno;
  return NEXT(posix_fallocate)(file, at, size);
}

int posix_fallocate64(int file, off64_t at, off64_t size) {
  if (WATCHED(descriptor_below(file))) return errno;
  return NEXT(posix_fallocate64)(file, at, size);
}

// The address does not say which file; there are no other mappings that are written back.
int msync(void* address, size_t size, int how) {
  if (WATCHED(1)) return -1;
  return NEXT(msync)(address, size, how);
}
