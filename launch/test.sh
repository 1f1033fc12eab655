#!/usr/bin/env bash
# Installs what tests need into .venv and runs them:
#   launch/test.sh            the test command: lint, and all tests but slow ones
#   launch/test.sh --slow     the full products and the long runs as well
#   launch/test.sh ARGS …     pytest with these arguments
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/options.sh
helped "$@"
python=${PYTHON:-python3}
source launch/venv.sh test
command -v chromedriver >/dev/null ||
  echo 'a page needs a browser: apt-get install chromium-driver' >&2
ruff check .
ruff format --check .
if [ "${1:-}" = --slow ]; then
  shift
  set -- -m 'slow or not slow' "$@"
fi
# Two at a time: compiling, most of the time, hardly uses a second core.
exec python -m pytest -n 2 --dist worksteal "$@"
