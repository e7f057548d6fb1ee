"""The thread that requests go through ends, whoever ends it and wherever."""

from __future__ import annotations

import threading

from rlaif_env.servers.transport import Transport


def made() -> Transport:
    return Transport("test", key="", timeout=1.0, connections=2, urls=["http://127.0.0.1:1"])


def test_closed_it_has_ended() -> None:
    transport = made()
    transport.close()
    assert not transport.thread.is_alive() and transport.loop.is_closed()


def test_a_finaliser_does_not_wait_for_a_thread_that_waits_for_it() -> None:
    """As where the collector runs amid an import, whose lock the thread needs to close its connections."""
    transport, importing, ended = made(), threading.Lock(), threading.Event()

    async def closing() -> None:
        with importing:
            pass

    transport.http.aclose = closing  # type: ignore[method-assign]

    def collected() -> None:
        with importing:
            transport.close(wait=False)
        ended.set()

    threading.Thread(target=collected, daemon=True).start()
    assert ended.wait(10)
    transport.thread.join(10)
    assert not transport.thread.is_alive()
