"""What the system lets the process have."""

import resource


def take_all_descriptors() -> int:
    """Raise the limit of open descriptors as far as it may be raised; gives what it is now.

    The limit that a shell gives, often 1024, is for programs that use `select`; a node has a descriptor for each
    connection and for what it keeps open.
    """
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return hard
