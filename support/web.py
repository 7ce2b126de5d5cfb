"""The server of demo.py's page: one WebSocket a visitor, beside the page's own files.

It brings messages to and fro. Of what they say it knows two: pictures ("drives"), and that they were "seen".
"""

import asyncio
import contextlib
import os
import sys
import threading
import webbrowser

try:
    import uvicorn
    from fastapi import FastAPI, WebSocket, WebSocketDisconnect
    from fastapi.staticfiles import StaticFiles
except ImportError as error:
    raise SystemExit(f"error: {error}: pip install -r requirements-demo.txt") from None

from support.run_files import ROOT

MAX_WAITING = 100  # commands of one visitor; no person is as fast


class NotUnderstood(Exception):
    """A message that the page does not send: its session is closed."""


class Latest:
    """The messages to a page: all notes, but of the pictures the last one, once the one before was seen.

    So a slow page gets fewer pictures, not an ever longer queue.
    """

    def __init__(self, loop):
        self.loop, self.notes, self.picture, self.there, self.seen = loop, [], None, asyncio.Event(), True

    def put(self, message):
        """From any thread."""
        with contextlib.suppress(RuntimeError):  # the server has ended
            self.loop.call_soon_threadsafe(self._put, message)

    def _put(self, message):
        if message and "drives" in message:
            self.picture = message
        else:
            self.notes.append(message)
        self.there.set()

    def was_seen(self):
        self.seen = True
        self.there.set()

    async def get(self):
        """The next message, None at the session's end."""
        while True:
            if self.notes:
                return self.notes.pop(0)
            if self.picture and self.seen:
                picture, self.picture, self.seen = self.picture, None, False
                return picture
            self.there.clear()
            await self.there.wait()


def make_app(make_session, understand, welcome, max_sessions):
    """The page and its WebSocket.

    `make_session(send)` makes a thread with `commands`, a queue for pairs of `understand(text)`, and `ended`, an event
    that shall end it; it sends dicts to the page, and None when it has ended. `welcome` is the first message.
    """
    app, sessions = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), set()

    @app.websocket("/drive")
    async def drive(socket: WebSocket):
        await socket.accept()
        if len(sessions) >= max_sessions:
            await socket.send_json({"full": max_sessions})
            await socket.close()
            return
        latest = Latest(asyncio.get_running_loop())
        session = make_session(latest.put)
        sessions.add(session)

        async def send():
            await socket.send_json(welcome)
            while message := await latest.get():
                await socket.send_json(message)
            await socket.close(1011, "the drive has ended")  # by an error, which the terminal shows

        async def receive():
            while True:
                command, value = understand(await socket.receive_text())
                if command == "seen":
                    latest.was_seen()
                elif session.commands.qsize() < MAX_WAITING:
                    session.commands.put((command, value))
                else:
                    raise NotUnderstood

        tasks = [asyncio.create_task(send()), asyncio.create_task(receive())]
        session.start()
        try:
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                task.result()
        except (NotUnderstood, KeyError):  # KeyError: a binary frame
            with contextlib.suppress(RuntimeError):
                await socket.close(1008, "not understood")
        except (WebSocketDisconnect, RuntimeError):
            pass
        finally:
            for task in tasks:
                task.cancel()
            session.ended.set()
            await asyncio.to_thread(session.join, 5)
            sessions.discard(session)

    app.mount("/", StaticFiles(directory=ROOT / "page", html=True))
    app.state.sessions = sessions
    return app


def has_display():
    """Whether a browser would open a window; without, Python may start one of text in this terminal."""
    return sys.platform == "darwin" or any(name in os.environ for name in ("BROWSER", "DISPLAY", "WAYLAND_DISPLAY"))


class Server(uvicorn.Server):
    """Says where it listens as soon as it does; with `open_browser` opens it there."""

    def __init__(self, app, host, port, open_browser):
        # a page that has vanished is noticed by the missing answer to a ping
        settings = {"log_level": "warning", "ws_max_size": 4096, "ws_ping_interval": 2, "ws_ping_timeout": 10}
        super().__init__(uvicorn.Config(app, host, port, **settings))
        self.open_browser = open_browser

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            port = self.servers[0].sockets[0].getsockname()[1]
            self.address = f"http://{'127.0.0.1' if self.config.host == '0.0.0.0' else self.config.host}:{port}"
            print(f"{self.address}  (Ctrl-C ends it)", flush=True)
            if self.open_browser and has_display():
                threading.Thread(target=webbrowser.open, args=(self.address,), daemon=True).start()
