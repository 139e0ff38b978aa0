"""The process that a generated program runs in; started by `sandbox`, alone.

Reads a task (JSON) from standard input, contains itself, runs the program in a
child, and writes `{"reason": ..., "nonce": ...}` to standard output. The nonce is
the task's: a program that writes to descriptors that are not its own, or leaves
early, does not know it. Only the standard library: it is started with `-I`, as a
file.
"""

import ctypes
import json
import os
import resource
import signal
import sys

_NEWNS, _NEWIPC, _NEWUSER = 0x00020000, 0x08000000, 0x10000000
_NEWPID, _NEWNET = 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_REC, _MS_PRIVATE = 0x2, 0x4, 0x4000, 0x40000
_MOUNT_SETATTR, _AT_RECURSIVE, _RDONLY, _AT_FDCWD = 442, 0x8000, 0x1, -100
_SET_PDEATHSIG, _SET_KEEPCAPS, _NO_NEW_PRIVS = 1, 8, 38
_CAPSET_VERSION, _DAC_READ_SEARCH = 0x20080522, 1 << 2
_CAPSET = {"x86_64": 126, "aarch64": 91}
_NOBODY = 65534
# Events that faulty code has no business with, where files are not protected.
_REFUSED = (
  "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink",
  "os.truncate", "os.chmod", "os.chown", "os.kill", "os.killpg", "os.fork",
  "os.forkpty", "os.exec", "os.posix_spawn", "os.spawn", "os.system",
  "os.startfile", "subprocess.Popen", "pty.spawn", "shutil.", "socket.",
  "ctypes.", "signal.pthread_kill",
)  # fmt: skip


def _call(result: int) -> None:
  if result != 0:
    error = ctypes.get_errno()
    raise OSError(error, os.strerror(error))


class _Attributes(ctypes.Structure):
  _fields_ = [
    (n, ctypes.c_uint64)
    for n in ("attr_set", "attr_clr", "propagation", "userns_fd")
  ]


def _enclose(folder: str, files_mb: int) -> None:
  """Moves this process into namespaces in which only `folder` is writable."""
  libc = ctypes.CDLL(None, use_errno=True)
  user, group = os.getuid(), os.getgid()
  spaces = _NEWNS | _NEWIPC | _NEWPID | _NEWNET
  # A superuser needs no user namespace, and in one of its own could not become
  # somebody else, as the limit on processes wants it.
  _call(libc.unshare(spaces | (0 if user == 0 else _NEWUSER)))
  if user != 0:
    for name, text in (
      ("setgroups", "deny"), ("uid_map", f"0 {user} 1"),
      ("gid_map", f"0 {group} 1"),
    ):  # fmt: skip
      with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
        file.write(text)
  _call(libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None))
  attributes = _Attributes(attr_set=_RDONLY)
  _call(
    libc.syscall(
      _MOUNT_SETATTR, _AT_FDCWD, b"/", _AT_RECURSIVE,
      ctypes.byref(attributes), ctypes.sizeof(attributes),
    )
  )  # fmt: skip
  size = f"size={files_mb}m,nr_inodes=1024,mode=0777".encode()
  flags = _MS_NOSUID | _MS_NODEV
  _call(libc.mount(b"tmpfs", folder.encode(), b"tmpfs", flags, size))
  os.chdir(folder)


def _become_nobody() -> None:
  """Gives up every right but to read the interpreter's own files."""
  libc = ctypes.CDLL(None, use_errno=True)
  if os.getuid() == 0 and os.uname().machine in _CAPSET:
    with open("/proc/self/uid_map") as file:  # noqa: PTH123
      outer = file.read().split()[1] == "0"
    kept = _DAC_READ_SEARCH
    if outer:
      _call(libc.prctl(_SET_KEEPCAPS, 1, 0, 0, 0))
      os.setgroups([])
      os.setgid(_NOBODY)
      os.setuid(_NOBODY)
      # An interpreter in somebody's home is not everybody's to read.
      kept = 0 if os.access(os.__file__, os.R_OK) else _DAC_READ_SEARCH
    header = (ctypes.c_uint32 * 2)(_CAPSET_VERSION, 0)
    rights = (ctypes.c_uint32 * 6)(kept, kept, 0)
    _call(libc.syscall(_CAPSET[os.uname().machine], header, rights))
  _call(libc.prctl(_NO_NEW_PRIVS, 1, 0, 0, 0))


def _limit(task: dict) -> None:
  megabyte = 2**20
  alone = task["isolation"] == "limits"
  cpu = int(task["seconds"]) + 1
  for what, amount in (
    (resource.RLIMIT_CPU, cpu),
    (resource.RLIMIT_AS, task["memory_mb"] * megabyte),
    (resource.RLIMIT_FSIZE, 0 if alone else task["files_mb"] * megabyte),
    (resource.RLIMIT_NPROC, 1),
    (resource.RLIMIT_NOFILE, 64),
    (resource.RLIMIT_CORE, 0),
    (resource.RLIMIT_STACK, 64 * megabyte),
  ):
    resource.setrlimit(what, (amount, amount))
  if alone:
    sys.addaudithook(_refuse)


def _refuse(event: str, args: tuple) -> None:
  if event == "open":
    mode, flags = args[1], args[2] or 0
    writes = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
    if (mode and set(mode) & set("wax+")) or flags & writes:
      raise PermissionError("a program may not write files here")
  elif event.startswith(_REFUSED):
    raise PermissionError(f"a program may not call {event} here")


def _tell(pipe: int, nonce: str, reason: str) -> None:
  os.write(pipe, json.dumps({"reason": reason, "nonce": nonce}).encode())


def _program(task: dict, pipe: int) -> None:
  """Runs the program; never returns."""
  nonce, program = task.pop("nonce"), task.pop("program")
  null = os.open(os.devnull, os.O_RDWR)
  for descriptor in (0, 1, 2):
    os.dup2(null, descriptor)
  if task["isolation"] == "namespaces":
    _become_nobody()
  _limit(task)
  try:
    exec(compile(program, "program.py", "exec"), {"__name__": "program"})
    reason = "passed"
  except MemoryError:
    reason = "memory"
  except (SystemExit, KeyboardInterrupt):
    reason = "exited"
  except BaseException as error:  # Whatever it is, it is the program's failure.
    reason = f"{type(error).__name__}: {error}"[:300]
  _tell(pipe, nonce, reason)
  os._exit(0)


def _init(task: dict, pipe: int) -> int:
  """Waits for the program; the first process of a namespace, and its end."""
  program = os.fork()
  if program == 0:
    _program(task, pipe)
  late = []

  def stop(*_) -> None:
    late.append(True)
    os.kill(program, signal.SIGKILL)

  signal.signal(signal.SIGALRM, stop)
  signal.setitimer(signal.ITIMER_REAL, task["seconds"])
  while True:
    pid, status = os.wait()
    if pid == program:
      break
  signal.setitimer(signal.ITIMER_REAL, 0)
  if os.WIFSIGNALED(status):
    over = late or os.WTERMSIG(status) == signal.SIGXCPU
    _tell(pipe, task["nonce"], "timeout" if over else "killed")
  return 0


def main() -> int:
  """Runs the task on standard input; returns the exit status."""
  task = json.loads(sys.stdin.buffer.read())
  pipe = os.dup(1)
  if task["isolation"] == "limits":
    return _init(task, pipe)
  try:
    _enclose(task["folder"], task["files_mb"])
  except (OSError, AttributeError) as error:
    _tell(pipe, task["nonce"], f"no namespaces: {error}")
    return 1
  first = os.fork()
  if first == 0:
    ctypes.CDLL(None).prctl(_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    os._exit(_init(task, pipe))
  return os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) and 1


if __name__ == "__main__":
  sys.exit(main())
