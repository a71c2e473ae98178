import subprocess
import sys

import pytest


@pytest.mark.slow
def test_only_replicas_import_torch() -> None:
    """A process with torch holds several hundred MB more; neither the gateway nor the starter needs it."""
    code = "import sys, serving.app, serving.deployment; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
