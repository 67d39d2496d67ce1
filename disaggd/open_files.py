"""How many files, sockets among them, this process may have open at once."""

import resource


def allow_files(count: int) -> int:
    """Raise the limit to `count`, as far as the system lets us: many start processes with 1,024 and allow far more. Never lowers it.

    Returns `count`, or how many there may be if those are less.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    allowed = count if hard == resource.RLIM_INFINITY else min(count, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    return allowed
