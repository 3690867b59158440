"""The guard that keeps tests off the network, put up where this is imported, and what it has refused."""

import os
import runpy
import tempfile
from pathlib import Path

GUARD = Path(__file__).parent / "offline"
REFUSED = Path(tempfile.mkstemp(prefix="captioner-refused-")[1])
os.environ |= {"CAPTIONER_TESTS_REFUSED": str(REFUSED), "CAPTIONER_TESTS_SOCKETS": "none"}
others = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path != str(GUARD)]
os.environ["PYTHONPATH"] = os.pathsep.join([str(GUARD), *others])
runpy.run_path(str(GUARD / "sitecustomize.py"))


def take_refused() -> list[str]:
    """Return what was refused since this was last asked."""
    lines = REFUSED.read_text().splitlines()
    REFUSED.write_text("")
    return lines
