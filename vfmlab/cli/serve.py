"""`vfmlab app`."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated

from vfmlab.cli.arguments import arg
from vfmlab.errors import ConfigError

AppRoot = Annotated[Path, arg(aliases=["--runs"], help="folder of the run directories")]


def app(root: AppRoot = Path("runs"), port: int = 7860, host: str = "127.0.0.1", hosts: tuple[str, ...] = (),
        auth: str | None = None, mcp: bool = False) -> int:
    """Serve the app, to this machine only unless another host is named.

    Args:
        port: where to listen.
        host: the address to listen on; 0.0.0.0 is everybody who can reach this machine, so ask for a login
            then.
        hosts: further names under which browsers reach it, such as that of a proxy; all others are refused.
        auth: USER:PASSWORD to ask for; other users of this machine see command lines, but not VFMLAB_APP_AUTH
            in the environment.
        mcp: offer the app's endpoints as tools of the Model Context Protocol too.
    """
    login = auth if auth is not None else os.environ.get("VFMLAB_APP_AUTH")
    user, colon, password = (login or "").partition(":")
    if login is not None and not (user and colon and password):
        raise ConfigError("--auth (or VFMLAB_APP_AUTH) is of the form USER:PASSWORD, neither of them empty")
    print(f"vfmlab app: starting on http://{host}:{port} for the runs in {root} ...", flush=True)
    try:
        from apps import app as application
    except ModuleNotFoundError as error:
        if error.name != "apps":  # a package: the way to it is said for all commands
            raise
        raise ConfigError("the app needs the folder apps/ of the repository: in a clone, uv pip install -c "
                          "constraints.txt -e '.[app]'") from None
    if login is None and host not in ("127.0.0.1", "localhost", "::1"):
        warning = f"anybody who can reach {host}:{port} can use this app"
        print(f"vfmlab: {warning}; ask for a login with VFMLAB_APP_AUTH=USER:PASSWORD", file=sys.stderr)
    account = (user, password) if login is not None else None
    application.launch(root, host=host, port=port, auth=account, mcp=mcp, hosts=hosts)
    return 0
