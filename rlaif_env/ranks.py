"""Several processes that train as one: torch.distributed as torchrun starts it, or one process and none of it.

Every process ("rank") runs the same command. Rank 0 leads: it owns environments, rewards, files and console, and tells
the others what to do (`Ranks.tell`, `Ranks.hear`); what all compute together has the same calls on every rank.

Waiting happens in a thread, so that signals are handled meanwhile. A process that dies closes its connections, which
ends the others' waiting at once; of a machine that vanishes torchrun's own rendezvous learns, and sends SIGTERM.
"""

from __future__ import annotations

import importlib.metadata
import os
import shlex
import signal
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, NoReturn, TypeVar

from rlaif_env.api import RLAIFError

if TYPE_CHECKING:
    from torch import Tensor

_Result = TypeVar("_Result")
_BUCKET = 1 << 24  # values summed over the processes in one piece
_WAIT = timedelta(days=1)  # for a leader whose judge takes its time
_ROLL_CALL = 2.0  # seconds in which a process that lives says so


class LostRankError(RLAIFError):
    """A process of several is gone."""


class Ended(Exception):
    """The leader has come to its end, good or bad, and has said so itself."""


class Ranks:
    """The processes that train together, seen from one of them; one process alone where nothing is given.

    Attributes:
        rank: This process's number, from 0.
        size: How many there are.
        asked: The signal that asked a follower to end, for the leader to hear of; 0 is none.
    """

    def __init__(self, rank: int = 0, size: int = 1, store: Any = None) -> None:
        self.rank, self.size, self.asked = rank, size, 0
        self._store = store
        self._thread = ThreadPoolExecutor(1) if size > 1 else None
        self._needed = False  # others wait for this process in a way that only its end ends

    @classmethod
    @contextmanager
    def started(cls) -> Iterator[Ranks]:
        """The processes that torchrun started, by its environment variables, until the end of the block.

        Each takes the GPU of its number on its machine, where there are GPUs.

        Raises:
            RLAIFError: If a machine has more processes than GPUs.
        """
        if int(os.environ.get("WORLD_SIZE", "1")) == 1:
            yield cls()
            return
        import torch
        from torch import distributed as dist
        from torch.distributed.rendezvous import rendezvous

        gpus, local = torch.cuda.device_count(), int(os.environ.get("LOCAL_RANK", "0"))
        if gpus and os.environ.get("RLAIF_DEVICE") != "cpu":
            if local >= gpus:
                raise RLAIFError(f"expected at most {gpus} processes, one a GPU, found more; lower --nproc-per-node")
            torch.cuda.set_device(local)
        store, rank, size = next(iter(rendezvous("env://")))
        # torchrun starts processes again beside the same store, where the addresses of those before still stand
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.distributed_c10d.PrefixStore(f"attempt-{attempt}", store)
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(backend, timeout=_WAIT, store=store, rank=rank, world_size=size)
        ranks, orderly = cls(rank, size, dist.distributed_c10d.PrefixStore("ranks", store)), False
        try:
            yield ranks
            orderly = True
        except Exception:
            orderly = True
            raise
        finally:
            ranks._close(orderly)

    @property
    def leader(self) -> bool:
        """Whether this process leads."""
        return self.rank == 0

    def tell(self, name: str, *arguments: Any) -> None:
        """As the leader, send the others a message; as another, or alone, nothing."""
        if self.leader and self.size > 1:
            self._broadcast([(name, *arguments)])

    def hear(self) -> tuple[Any, ...]:
        """The leader's next message; `Ended` if there is none to come."""
        message: tuple[Any, ...] = self._broadcast([None])[0]
        return message

    def gather(self, work: Callable[[], _Result]) -> list[_Result]:
        """Do work on every process; all results, in order, on each. If it fails anywhere it fails everywhere.

        Raises:
            Exception: That of the first process in which it failed: there the error itself, elsewhere one of the same
                kind, if it is an RLAIFError or short of memory, that names the process.
        """
        if self.size == 1:
            return [work()]
        failed: Exception | None = None
        mine: Any = None
        try:
            mine = work()
        except (LostRankError, Ended):
            raise
        except Exception as error:
            failed = error
        gathered = self._all((self.asked, None if failed is None else self._named(failed), mine))
        if self.leader and (asked := max(number for number, _, _ in gathered)):
            os.kill(os.getpid(), asked)  # as if the leader had been asked
        for rank, (_, named, _) in enumerate(gathered):
            if named is not None:
                raise failed if failed is not None and rank == self.rank else named
        return [result for _, _, result in gathered]

    def agree(self, work: Callable[[], _Result]) -> _Result:
        """Do work on every process; the own result. If it fails anywhere it fails everywhere, as in `gather`."""
        results: list[_Result] = []
        self.gather(lambda: results.append(work()))
        return results[0]

    def bound(self, work: Callable[[], _Result]) -> _Result:
        """Do work that waits for all processes at places of its own: an error in one of them ends all.

        Raises:
            Exception: The own error; `LostRankError` or `Ended` if a process is gone.
        """
        from torch import distributed as dist

        try:
            return work()
        except (LostRankError, Ended):
            raise
        except Exception as error:
            if isinstance(error, dist.DistError) or "/gloo/" in str(error):
                self._gone(error)
            self._needed = True
            raise

    def given(self, work: Callable[[], _Result]) -> _Result:
        """What work gives that only the leader does, on every process; if it fails, it fails everywhere."""
        result: _Result = self.gather(lambda: work() if self.leader else None)[0]  # type: ignore[assignment]
        return result

    def check_same(self, facts: Mapping[str, object]) -> None:
        """Raise RLAIFError, on every process, if facts differ between processes."""
        if self.size == 1:
            return
        first, *others = self.gather(lambda: {name: str(fact) for name, fact in facts.items()})
        odd = [
            f"{name} {theirs.get(name, 'none'):.200} on rank {rank} and {first.get(name, 'none'):.200} on rank 0"
            for rank, theirs in enumerate(others, start=1)
            for name in {**first, **theirs}
            if theirs.get(name) != first.get(name)
        ]
        if odd:
            raise RLAIFError(
                f"expected the same on every process, found {'; '.join(odd[:5])}: start the same command everywhere, "
                "with the same packages and models"
            )

    def sum_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors, of the same shapes on every process, by their sums over the processes."""
        if self.size == 1:
            return
        import torch
        from torch import distributed as dist

        left = list(tensors)
        while left:
            first, bucket, held = left[0], list[Any](), 0
            while left and (left[0].dtype, left[0].device) == (first.dtype, first.device):
                if bucket and held + left[0].numel() > _BUCKET:
                    break
                held += left[0].numel()
                bucket.append(left.pop(0))
            flat = torch.cat([tensor.detach().reshape(-1) for tensor in bucket])
            self._wait(dist.all_reduce, flat)
            for tensor, part in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.detach().copy_(part.view_as(tensor))

    def sum_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace parameters' gradients by their sums; one that has none on any process keeps none."""
        if self.size == 1:
            return
        import torch

        counts = torch.tensor([int(parameter.grad is not None) for parameter in parameters])
        self.sum_([counts])
        used = [parameter for parameter, count in zip(parameters, counts.tolist(), strict=True) if count]
        for parameter in used:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        self.sum_([parameter.grad for parameter in used if parameter.grad is not None])

    def share(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The leader's tensors on every process, on the CPU; what the others give is not looked at."""
        if self.size == 1:
            return dict(tensors)
        import torch
        from torch import distributed as dist

        shapes = self._broadcast([{name: (tuple(t.shape), t.dtype) for name, t in tensors.items()}])[0]
        shared = {}
        for name, (shape, dtype) in shapes.items():
            shared[name] = tensors[name].cpu().contiguous() if self.leader else torch.empty(shape, dtype=dtype)
            self._wait(dist.broadcast, shared[name], 0)
        return shared

    def here(self, text: str = "") -> None:
        """Say that this process lives, or with a text why it is about to end; does nothing alone."""
        with suppress(Exception):  # the store may be gone with its process
            if self._store is not None:
                self._store.set(f"here/{self.rank}", text)

    def missing(self) -> dict[int, str]:
        """Call the roll: the processes that say nothing, or say why they end, by number, with what they said."""
        told: dict[int, str] = {self.rank: ""}
        until = time.monotonic() + _ROLL_CALL
        while len(told) < self.size and self._store is not None:
            with suppress(Exception):
                keys = {rank: f"here/{rank}" for rank in range(self.size) if rank not in told}
                told |= {rank: self._store.get(key).decode() for rank, key in keys.items() if self._store.check([key])}
            if time.monotonic() > until:
                break
            time.sleep(0.05)
        lost = {rank: told.get(rank, "no answer: it was killed, or its machine is gone") for rank in range(self.size)}
        return {rank: text for rank, text in lost.items() if text}

    def led(self) -> bool:
        """As a follower that lost a process: whether the leader is there, or was when it ended."""
        until = time.monotonic() + 1.5 * _ROLL_CALL
        while time.monotonic() < until:
            try:
                if any(self._store.check([key]) for key in ("ended", "here/0")):
                    return True
            except Exception:
                return False  # the store was the leader's
            time.sleep(0.05)
        return False

    def follow(self, work: Callable[[], int]) -> int:
        """Work as a follower and tell nobody but the leader; the exit code, 0 where the leader's says what happened.

        Ctrl-C and SIGTERM are the leader's to act on: they are noted, and answer its call of the roll.
        """

        def noted(number: int, frame: object) -> None:
            self.asked = number

        def answered() -> None:
            while os.read(reader, 1):
                self.here()

        reader, writer = os.pipe()
        os.set_blocking(writer, False)
        signal.set_wakeup_fd(writer)  # a handler waits for the main thread, which may wait amid a layer
        threading.Thread(target=answered, daemon=True).start()
        before = {number: signal.signal(number, noted) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the leader gives them
                return work()
        except Ended:
            return 0
        except LostRankError as error:
            print(error, file=sys.stderr)
            return 1
        except Exception as error:
            self.here(f"{type(error).__name__}: {error}")
            return 0 if not self._needed and self._left() else 1
        finally:
            signal.set_wakeup_fd(-1)
            os.close(writer)  # which ends the thread
            for number, handler in before.items():
                signal.signal(number, handler)

    def _left(self) -> bool:
        """As a follower that cannot go on and has said why, wait for the leader's end; whether that came."""
        from torch import distributed as dist

        with suppress(Exception):
            dist.destroy_process_group()  # a leader that waits for this process waits no longer
            self._store.wait(["ended"], timedelta(minutes=10))
            return True
        return False

    def _named(self, error: Exception) -> Exception:
        """An error as the other processes raise it."""
        if isinstance(error, RLAIFError):
            made: Exception = type(error)(f"rank {self.rank}: {error}")
            made.__dict__.update(error.__dict__)
            return made
        if isinstance(error, MemoryError):
            return MemoryError(str(error))
        return RuntimeError(f"rank {self.rank}: {type(error).__name__}: {error}")

    def _broadcast(self, message: list[Any]) -> list[Any]:
        from torch import distributed as dist

        self._wait(dist.broadcast_object_list, message, 0)
        return message

    def _all(self, mine: object) -> list[Any]:
        from torch import distributed as dist

        gathered: list[Any] = [None] * self.size
        self._wait(dist.all_gather_object, gathered, mine)
        return gathered

    def _wait(self, call: Callable[..., Any], *arguments: Any) -> None:
        """Call a collective operation; LostRankError if a process is gone, `Ended` if the leader ended so itself."""
        assert self._thread is not None
        try:
            self._thread.submit(call, *arguments).result()
        except RuntimeError as error:
            self._gone(error)

    def _gone(self, error: Exception) -> NoReturn:
        """Say what an error of a collective operation means."""
        self.here()
        if not self.leader:
            if self.led():
                raise Ended from error
            raise LostRankError(f"rank {self.rank}: lost the leader") from error
        raise LostRankError(f"expected {self.size} processes to the end, {self.lost() or error}") from error

    def lost(self) -> str:
        """Which processes are gone, in words; "" where none is."""
        return ", ".join(f"lost rank {rank} ({text})" for rank, text in self.missing().items())

    def _close(self, orderly: bool) -> None:
        """Give the connections up, but for after a signal: what is under way then ends with this process."""
        from torch import distributed as dist

        with suppress(Exception):
            if self.leader:
                self._store.set("ended", "")  # the others, whose waiting ends with this connection, look for it
        if orderly:
            with suppress(Exception):
                dist.destroy_process_group()


def facts_of(argv: Sequence[str]) -> dict[str, str]:
    """What has to be the same in every process: the command line and the versions of what computes."""
    packages = ("rlaif-env", "torch", "transformers", "peft", "numpy")
    versions = {}
    for name in packages:
        with suppress(importlib.metadata.PackageNotFoundError):
            versions[name] = importlib.metadata.version(name)
    return {"command line": shlex.join(argv), **versions}
