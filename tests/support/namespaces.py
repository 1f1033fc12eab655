"""Which sandbox this machine allows."""

import os
import subprocess

from mtp_jax.evals.sandbox import launch

PLAIN = launch._command()
# Whether namespaces are available here, tested with util-linux.
NEW = ['--mount', '--net', '--pid', '--fork', *(['--user'] if os.geteuid() else [])]
HAS = subprocess.run(['unshare', *NEW, 'true'], capture_output=True)
KIND = 'weak' if HAS.returncode else 'full'
