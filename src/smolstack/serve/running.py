"""Running the server: a socket, signals, and the end."""

from __future__ import annotations

import math
import signal
import socket

import uvicorn

from smolstack.serve.app import Server
from smolstack.serve.settings import ServerSettings
from smolstack.vlm import VLM


def run(vlm: VLM, settings: ServerSettings, listener: socket.socket, *, log_level: str) -> None:
    """Serve until SIGTERM or SIGINT, then finish what is at work for ``settings.drain`` seconds."""
    server = Server(vlm, settings)
    config = uvicorn.Config(
        server.app,
        log_level=log_level,
        access_log=log_level == "info",
        timeout_graceful_shutdown=math.ceil(settings.drain),
        # A client that sends its headers byte by byte holds no more than this.
        h11_max_incomplete_event_size=64 * 1024,
        server_header=False,
    )
    runner = uvicorn.Server(config)

    def end(*_: object) -> None:
        runner.should_exit = True

    # uvicorn raises the signal again once it is done; to have ended as asked is no failure.
    signal.signal(signal.SIGTERM, end)
    try:
        runner.run(sockets=[listener])
    finally:
        if server.engine.alive:
            server.close()
