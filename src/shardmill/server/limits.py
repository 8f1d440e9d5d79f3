"""What the system lets the process have."""

import resource


def take_all_descriptors() -> int:
    """Raise the limit of open descriptors as far as it may be raised; gives what it is now.

    The limit that a shell gives, often 1024, is for programs that use `select`; a node has a descriptor for each
    connection and for what it keeps open.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError):
        # A hard limit above what the kernel gives any process.
        return soft
    return hard
