// Loaded with LD_PRELOAD: counts the file operations below a folder, and at one of them stops the process, signals it, or fails.
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

enum action { WATCH, STOP, STOP_AT_CHANGES, TERMINATE, FAIL_ONCE, FAIL_FROM, NO_SPACE_FROM, LOSE_FSYNC, KILL };
enum kind { LOOK = 'l', READ = 'r', CHANGE = 'c', SPACE = 's', SYNC = 'f' };  // SPACE: a change that needs room on the disk

static char folder[4096];
static size_t length;
static int armed, action, error, report = -1;
static long count, at;

void arm(const char *path, long number, int what, int error_number, int descriptor) {
  length = strlen(strncpy(folder, path, sizeof folder - 1));
  count = 0, at = number, action = what, error = error_number, report = descriptor, armed = 1;
}

void disarm(void) { armed = 0; }

// In a launch of several processes, the first.
__attribute__((constructor)) static void arm_the_first(void) {
  const char *rank = getenv("RANK"), *point = getenv("CRASH_POINT");
  long number;
  int what, error_number, path;
  if (rank && !strcmp(rank, "0") && point && sscanf(point, "%ld %d %d %n", &number, &what, &error_number, &path) == 3)
    arm(point + path, number, what, error_number, open(getenv("CRASH_REPORT"), O_WRONLY | O_APPEND | O_CLOEXEC));
}

// To this thread, which then goes no further; another thread might take a signal to the process.
static void raise_here(int number) { syscall(SYS_tgkill, getpid(), syscall(SYS_gettid), number); }

// Called before each operation. Whether it is to fail, with errno set.
static int fails(const char *operation, const char *path, int kind) {
  if (!armed || !path || strncmp(path, folder, length) || (path[length] && path[length] != '/')) return 0;
  int changes = kind == CHANGE || kind == SPACE || kind == SYNC, saved = errno;
  long number = __sync_add_and_fetch(&count, 1);
  char line[8400];
  int size = snprintf(line, sizeof line, "%ld %c %s %s\n", number, kind, operation, path[length] ? path + length + 1 : ".");
  syscall(SYS_write, report, line, size);
  if ((action == STOP && number == at) || (action == STOP_AT_CHANGES && changes)) raise_here(SIGSTOP);
  if (action == TERMINATE && number == at) raise_here(SIGTERM);
  if (action == KILL && number == at) raise_here(SIGKILL);
  int failing = (action == FAIL_ONCE && number == at) || (action == FAIL_FROM && number >= at) ||
                (action == NO_SPACE_FROM && number >= at && kind == SPACE) || (action == LOSE_FSYNC && number == at && kind == SYNC);
  errno = failing ? error : saved;
  return failing;
}

static __thread char place[8400];

static const char *of(int descriptor) {
  if (!armed || descriptor < 0) return NULL;
  char link[64];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t size = syscall(SYS_readlink, link, place, 4095);
  return size < 0 ? NULL : (place[size] = 0, place);
}

static const char *at_path(int descriptor, const char *path) {
  if (!armed || !path || path[0] == '/' || descriptor == AT_FDCWD || !of(descriptor)) return path;
  if (path[0]) strcat(strcat(place, "/"), path);
  return place;
}

#define REAL(name) static __typeof__(&name) real; if (!real) real = (__typeof__(&name))dlsym(RTLD_NEXT, #name)
#define WRAP(type, name, parameters, arguments, path, kind, failed) \
  type name parameters { REAL(name); return fails(#name, path, kind) ? failed : real arguments; }

WRAP(int, rename, (const char *a, const char *b), (a, b), a, CHANGE, -1)
WRAP(int, renameat, (int d, const char *a, int e, const char *b), (d, a, e, b), at_path(d, a), CHANGE, -1)
WRAP(int, renameat2, (int d, const char *a, int e, const char *b, unsigned f), (d, a, e, b, f), at_path(d, a), CHANGE, -1)
WRAP(int, link, (const char *a, const char *b), (a, b), b, SPACE, -1)
WRAP(int, linkat, (int d, const char *a, int e, const char *b, int f), (d, a, e, b, f), at_path(e, b), SPACE, -1)
WRAP(int, unlink, (const char *p), (p), p, CHANGE, -1)
WRAP(int, unlinkat, (int d, const char *p, int f), (d, p, f), at_path(d, p), CHANGE, -1)
WRAP(int, rmdir, (const char *p), (p), p, CHANGE, -1)
WRAP(int, mkdir, (const char *p, mode_t m), (p, m), p, SPACE, -1)
WRAP(int, mkdirat, (int d, const char *p, mode_t m), (d, p, m), at_path(d, p), SPACE, -1)
WRAP(int, chmod, (const char *p, mode_t m), (p, m), p, CHANGE, -1)
WRAP(int, ftruncate64, (int d, off64_t n), (d, n), of(d), SPACE, -1)
WRAP(ssize_t, writev, (int d, const struct iovec *v, int n), (d, v, n), of(d), SPACE, -1)
WRAP(int, flock, (int d, int o), (d, o), of(d), READ, -1)
WRAP(DIR *, opendir, (const char *p), (p), p, READ, NULL)
WRAP(ssize_t, read, (int d, void *b, size_t n), (d, b, n), of(d), READ, -1)
WRAP(int, stat64, (const char *p, struct stat64 *s), (p, s), p, LOOK, -1)
WRAP(int, lstat64, (const char *p, struct stat64 *s), (p, s), p, LOOK, -1)
WRAP(int, fstatat64, (int d, const char *p, struct stat64 *s, int f), (d, p, s, f), at_path(d, p), LOOK, -1)

// A disk that becomes full takes the first half.
ssize_t write(int d, const void *b, size_t n) {
  REAL(write);
  if (!fails("write", of(d), SPACE)) return real(d, b, n);
  return error == ENOSPC && count == at && n > 1 ? real(d, b, n / 2) : -1;
}

#define OPEN(name, parameters, arguments, path) int name parameters { \
  REAL(name); mode_t m = 0; \
  if (f & (O_CREAT | __O_TMPFILE)) { va_list more; va_start(more, f); m = va_arg(more, mode_t); va_end(more); } \
  int creates = f & (O_CREAT | O_TRUNC), writes = (f & O_ACCMODE) != O_RDONLY; \
  return fails("open", path, creates ? SPACE : writes ? CHANGE : READ) ? -1 : real arguments; }
OPEN(open, (const char *p, int f, ...), (p, f, m), p)
OPEN(open64, (const char *p, int f, ...), (p, f, m), p)
OPEN(openat, (int d, const char *p, int f, ...), (d, p, f, m), at_path(d, p))
OPEN(openat64, (int d, const char *p, int f, ...), (d, p, f, m), at_path(d, p))

// Nothing waits for a disk: what would survive a power cut is worked out from the report. A sync that fails
// may have thrown away what it was to write, and the next one then succeeds (Rebello et al. 2020).
static struct { ino_t inode; off_t size; } synced[4096];
static int files;

int fsync(int d) {
  REAL(fsync);
  struct stat s;
  if (!of(d) || strncmp(place, folder, length) || fstat(d, &s)) return real(d);
  int failed = fails("fsync", place, SYNC), known = 0;
  while (known < files && synced[known].inode != s.st_ino) known++;
  if (!failed && known < 4096) {
    synced[known].inode = s.st_ino, synced[known].size = s.st_size, files += known == files;
  } else if (action == LOSE_FSYNC && S_ISREG(s.st_mode)) {
    truncate(of(d), known < files ? synced[known].size : 0);
    errno = error;
  }
  return failed ? -1 : 0;
}
