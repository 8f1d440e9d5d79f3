"""What the kernel holds a worker to: resource limits, death with its parent, no new privileges, no network, no hold on
other processes, no writing outside its scratch directory.

Called in the child after fork and before any user code. Layers that this kernel lacks are reported, not pretended.
"""

import ctypes
import os
import platform
import resource
import signal
import struct

LAYERS = (
    "rlimits",
    "parent_death_signal",
    "no_new_privileges",
    "own_session",
    "empty_environment",
    "scratch_directory",
    "network",
    "no_capabilities",
    "trace_scope",
    "signal_scope",
    "read_only_files",
)
"""Names as reported; `doctor` lists those that are not active."""

BY_BIRTH = {"own_session": True, "empty_environment": True, "scratch_directory": True}
"""Layers that no kernel lacks: a zygote forks every worker with them."""

FILE_SIZE = 1 << 30  # bytes a worker may write into one file of its scratch directory
DESCRIPTORS = 1024
SWEEP_SECONDS = 0.5  # how long a process that a function left behind may live on after its worker

_PR_SET_PDEATHSIG = 1
_PR_SET_SECCOMP = 22
_PR_SET_CHILD_SUBREAPER = 36
_PR_SET_NO_NEW_PRIVS = 38
_SECCOMP_MODE_FILTER = 2
_CLONE_NEWNET = 0x40000000

# AUDIT_ARCH_* and the numbers of socket(2) by machine.
_MACHINES = {"x86_64": (0xC000003E, 41), "aarch64": (0xC00000B7, 198)}
_AF_UNIX = 1
_CAPABILITY_VERSION_3 = 0x20080522

# Landlock; the same numbers on all machines.
_CREATE_RULESET, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446
_CREATE_RULESET_VERSION = 1
_RULE_PATH_BENEATH = 1
_ACCESS_FS_WRITE_FILE = 1 << 1
_ACCESS_FS_CHANGE_DIRECTORY = 0x1FF << 4  # removing, and making whatever kind
_ACCESS_FS_REFER = 1 << 13
_ACCESS_FS_TRUNCATE = 1 << 14
_SCOPE_SIGNAL = 1 << 1
_EACCES = 13

# What may be written beside the scratch directory: it holds nothing of anybody's, except memory that processes share.
_DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/shm")


def _prctl(option: int, argument: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.prctl(option, ctypes.c_ulong(argument), 0, 0, 0)) == 0


def die_with_parent(parent: int, number: signal.Signals = signal.SIGKILL) -> bool:
    """Ask for a signal when the parent's forking thread ends; exits at once if that has happened already."""
    active = _prctl(_PR_SET_PDEATHSIG, number)
    if os.getppid() != parent:
        os._exit(1)
    return active


def adopt_orphans() -> bool:
    """Make this process the parent of grandchildren whose parents die, so that they can be found and killed."""
    return _prctl(_PR_SET_CHILD_SUBREAPER, 1)


def give_up_privileges() -> bool:
    """No program that is started from here on gains rights by its owner or its capabilities."""
    return _prctl(_PR_SET_NO_NEW_PRIVS, 1)


def confine(parent: int, memory: int, scratch: str) -> dict[str, bool]:
    """Apply all layers to this process.

    Args:
        parent: Pid that must still be the parent.
        memory: Bytes of data (RLIMIT_DATA; address space says nothing for numerical libraries).
        scratch: The directory that it may write to.

    Returns:
        Layer → active.
    """
    layers = {"parent_death_signal": die_with_parent(parent)}
    layers["rlimits"] = _limit(resource.RLIMIT_DATA, memory)
    layers["rlimits"] &= _limit(resource.RLIMIT_CORE, 0)
    layers["rlimits"] &= _limit(resource.RLIMIT_FSIZE, FILE_SIZE)
    layers["rlimits"] &= _limit(resource.RLIMIT_NOFILE, DESCRIPTORS)
    # A write past RLIMIT_FSIZE is an OSError in the function, not the death of the worker.
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    layers["no_new_privileges"] = give_up_privileges()
    layers["network"] = _refuse_sockets() or _leave_network()
    layers["no_capabilities"] = _drop_capabilities()
    return layers | enter_domain(landlock_version(), scratch)


def confine_zygote(directory: str) -> None:
    """What of these layers a process can have that workers are yet to be forked from.

    Args:
        directory: Below which it, and they, may write.
    """
    give_up_privileges()
    _refuse_sockets()
    _drop_capabilities()
    enter_domain(landlock_version(), directory)


def _limit(kind: int, value: int) -> bool:
    hard = resource.getrlimit(kind)[1]
    bounded = value if hard == resource.RLIM_INFINITY else min(value, hard)
    try:
        resource.setrlimit(kind, (bounded, bounded))
    except (ValueError, OSError):
        return False
    return True


def _refuse_sockets() -> bool:
    """A seccomp filter: socket(2) of any family but AF_UNIX is EACCES."""
    numbers = _MACHINES.get(platform.machine())
    if numbers is None:
        return False
    architecture, socket_number = numbers
    load, jump_equal, jump_above, answer = 0x20, 0x15, 0x35, 0x06
    allow, refuse = 0x7FFF0000, 0x00050000 | _EACCES
    program = [
        (load, 0, 0, 4),  # architecture
        (jump_equal, 0, 6, architecture),  # another one: refuse
        (load, 0, 0, 0),  # system call number
        (jump_above, 4, 0, 0x40000000),  # x32 numbers on x86-64: refuse
        (jump_equal, 0, 2, socket_number),
        (load, 0, 0, 16),  # its first argument, the family
        (jump_equal, 0, 1, _AF_UNIX),
        (answer, 0, 0, allow),
        (answer, 0, 0, refuse),
    ]
    code = ctypes.create_string_buffer(b"".join(struct.pack("<HBBI", *line) for line in program))
    header = ctypes.create_string_buffer(struct.pack("<H6xQ", len(program), ctypes.addressof(code)))
    return _prctl_pointer(_PR_SET_SECCOMP, _SECCOMP_MODE_FILTER, ctypes.addressof(header))


def _prctl_pointer(option: int, argument: int, pointer: int) -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.prctl(option, ctypes.c_ulong(argument), ctypes.c_ulong(pointer), 0, 0)) == 0


def _leave_network() -> bool:
    libc = ctypes.CDLL(None, use_errno=True)
    return int(libc.unshare(_CLONE_NEWNET)) == 0


def _drop_capabilities() -> bool:
    """Those of a node that runs as root: some open other processes' memory whatever else is refused."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, none = struct.pack("=Ii", _CAPABILITY_VERSION_3, 0), bytes(24)
    return int(libc.capset(header, none)) == 0


def landlock_version() -> int:
    """Of the kernel's interface; 0: it has none."""
    return max(0, _call(_CREATE_RULESET, None, 0, _CREATE_RULESET_VERSION))


def enter_domain(version: int, *scratch: str) -> dict[str, bool]:
    """Enter a Landlock domain, which no program started from here on leaves.

    Neither memory nor environment of processes outside can be read, nor signals sent there; and no file outside
    `scratch` can be changed, made, moved, linked or removed. All run as one user, so file modes are no hindrance.
    One domain for all: one that says nothing of files would keep them from being moved inside `scratch`, too.

    Args:
        version: Of Landlock's interface: signals need 6 (Linux 6.12), files 3 (Linux 6.2; before, they can be truncated
            by name), the rest 2 (Linux 5.19).
        scratch: Directories.

    Returns:
        `trace_scope`, `signal_scope` and `read_only_files` → active.
    """
    file = _ACCESS_FS_WRITE_FILE | _ACCESS_FS_TRUNCATE
    every = file | _ACCESS_FS_CHANGE_DIRECTORY | _ACCESS_FS_REFER
    if version >= 3:
        devices = {path: every if os.path.isdir(path) else file for path in _DEVICES if os.path.exists(path)}
        attributes = struct.pack("=QQQ", every, 0, _SCOPE_SIGNAL) if version >= 6 else struct.pack("=Q", every)
        active = _restrict(attributes, devices | dict.fromkeys(scratch, every))
    else:
        # A domain has to restrict something: moving files between directories, which is then allowed everywhere.
        active = version == 2 and _restrict(struct.pack("=Q", _ACCESS_FS_REFER), {"/": _ACCESS_FS_REFER})
    return {
        "trace_scope": active,
        "signal_scope": active and version >= 6,
        "read_only_files": active and version >= 3,
    }


def _restrict(attributes: bytes, allowed: dict[str, int]) -> bool:
    """Restrict this process from now on.

    Args:
        attributes: What the domain handles, as Landlock's structure.
        allowed: Path → of that what is allowed below it all the same.
    """
    ruleset = _call(_CREATE_RULESET, attributes, len(attributes), 0)
    if ruleset < 0:
        return False
    try:
        for path, access in allowed.items():
            place = os.open(path, os.O_PATH)
            try:
                if _call(_ADD_RULE, ruleset, _RULE_PATH_BENEATH, struct.pack("=Qi", access, place), 0) < 0:
                    return False
            finally:
                os.close(place)
        return _call(_RESTRICT_SELF, ruleset, 0) == 0
    finally:
        os.close(ruleset)


def _call(number: int, *arguments: int | bytes | None) -> int:
    libc = ctypes.CDLL(None, use_errno=True)
    converted = [ctypes.c_long(value) if isinstance(value, int) else value for value in arguments]
    return int(libc.syscall(ctypes.c_long(number), *converted))
