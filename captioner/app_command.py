"""`captioner app`: the web app, served to this machine alone until Ctrl-C."""

from __future__ import annotations

import argparse
import os
import socket
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING

from captioner.caption_command import add_model, parse, saying_of_fonts
from captioner.errors import InputError

if TYPE_CHECKING:
    from captioner.ensemble import Ensemble
    from captioner.model import Captioner

HOST = "127.0.0.1"
PORT = 7860


def add_options(parser: argparse.ArgumentParser) -> None:
    """Define the options of the command."""
    add_model(parser)
    parser.add_argument("--port", type=int, default=PORT, metavar="N", help="(default %(default)s); 0 is any free one")


def understand(parser: argparse.ArgumentParser, args: Sequence[str]) -> argparse.Namespace:
    """Parse the command's arguments, and see to what can be seen to without a model.

    Raises
    ------
    InputError
        Where they cannot be used, or a package is not installed.
    """
    parser.set_defaults(paths=[])
    options = parse(parser, args)
    if options.paths:
        raise InputError(f"{options.paths[0]} is no checkpoint: give images on the app's page.")
    if not 0 <= options.port < 2**16:
        raise InputError(f"--port is {options.port}: give 0 to {2**16 - 1}.")
    for package in ("starlette", "uvicorn"):
        if find_spec(package) is None:
            raise InputError(f"The app needs {package}, which is not installed: pip install 'captioner[app]'.")
    return options


def run(options: argparse.Namespace, open_model: Callable[[], Captioner | Ensemble]) -> int:
    """Serve the app until the user interrupts.

    Parameters
    ----------
    options
        From `understand`.
    open_model
        Opens the checkpoints; called when all else has been looked at.

    Raises
    ------
    InputError
        Where the port or a checkpoint cannot be used.
    """
    with listen(options.port) as listening:
        model = open_model()

        from captioner.app import make_server

        server = make_server(model)
        print(f"The app is at http://{HOST}:{listening.getsockname()[1]} on this machine; Ctrl-C ends it.", flush=True)
        with saying_of_fonts():
            server.run(sockets=[listening])  # which raises KeyboardInterrupt at its end
    return 0


def listen(port: int) -> socket.socket:
    """Return a socket that listens on this machine alone.

    Raises
    ------
    InputError
        If the port cannot be used.
    """
    try:
        return socket.create_server((HOST, port))
    except OSError as error:
        reason = os.strerror(error.errno or 0)
        raise InputError(
            f"Port {port} cannot be used ({reason}): give another one as --port, or --port 0 for any free one."
        ) from error
