"""Processes forked with the libraries loaded, as torchrun starts them: its environment variables, its store, its ends.

torchrun itself imports everything again in each process, some five seconds a launch; one test starts it for real.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from datetime import timedelta
from typing import Any

from torch import distributed as dist


def started(size: int, work: Callable[[int], int | None]) -> tuple[list[int], Any]:
    """Fork so many processes that each do work by their rank; their ids, and the store that is torchrun's agent's."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    children = []
    sys.stdout.flush()
    sys.stderr.flush()
    for rank in range(size):
        if child := os.fork():
            children.append(child)
            continue
        code = 1
        try:
            os.environ.update(_environment(rank, size, store.port))
            code = work(rank) or 0
        except SystemExit as end:
            code = int(end.code or 0)
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)  # nothing of the parent's may run twice
    return children, store


def _environment(rank: int, size: int, port: int) -> Mapping[str, str]:
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }


def ended(children: list[int], seconds: float = 180, signal_others: int = 0) -> list[int]:
    """Wait for processes; their exit codes, -9 for one that was killed. As torchrun, tell the others of the first bad.

    TimeoutError if one is there after so many seconds: it is killed.
    """
    codes: dict[int, int] = {}
    until = time.monotonic() + seconds
    while len(codes) < len(children):
        for child in children:
            if child in codes:
                continue
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                codes[child] = os.waitstatus_to_exitcode(status)
                if codes[child] and signal_others:
                    for other in set(children) - codes.keys():
                        os.kill(other, signal_others)
                    signal_others = 0
        if time.monotonic() > until:
            for other in set(children) - codes.keys():
                os.kill(other, 9)
            raise TimeoutError(f"of {children} only {codes} ended within {seconds} seconds")
        time.sleep(0.01)
    return [codes[child] for child in children]
