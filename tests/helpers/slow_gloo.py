"""A gloo whose threads are slow to give back the tensors of a collective, as on a loaded machine."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

_SOURCE = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <pthread.h>
#include <string.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

static volatile double seconds = 0;
void be_slow(double wanted) { seconds = wanted; }

int pthread_cond_broadcast(pthread_cond_t *condition) { /* "it is done", to the thread that waits */
  static int (*real)(pthread_cond_t *);
  char name[32] = "";
  if (!real) real = dlsym(RTLD_NEXT, "pthread_cond_broadcast");
  int result = real(condition);
  if (seconds > 0 && syscall(SYS_gettid) != getpid()) {
    pthread_getname_np(pthread_self(), name, sizeof name);
    if (!strcmp(name, "pt_gloo_runloop")) {
      struct timespec start, now;
      clock_gettime(CLOCK_MONOTONIC, &start);
      do clock_gettime(CLOCK_MONOTONIC, &now); /* runs, as a thread that has lost its core seems to */
      while ((now.tv_sec - start.tv_sec) + (now.tv_nsec - start.tv_nsec) * 1e-9 < seconds);
    }
  }
  return result;
}
"""


def compiler() -> str | None:
    """A C compiler, where there is one."""
    return shutil.which("cc") or shutil.which("gcc")


def build(folder: Path) -> Path:
    """The library for `LD_PRELOAD`; `be_slow(seconds)` of it says how slow gloo's threads are from then on."""
    (folder / "slow_gloo.c").write_text(_SOURCE)
    library = folder / "slow_gloo.so"
    command = [compiler() or "cc", "-shared", "-fPIC", "-o", str(library), str(folder / "slow_gloo.c"), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    return library
