#!/usr/bin/env bash
# Installs what tests need into .venv and runs them:
#   launch/test.sh            the test command: lint, types, and all tests but slow
#   launch/test.sh --slow     the full products and the long runs as well
#   launch/test.sh --core     model, loss, optimizer, training, decoding, data: what
#                             another Python or jax could change
#   launch/test.sh --parity   comparisons with PyTorch, transformers and llama.cpp,
#                             which it installs: several GB except on Python 3.11
#   launch/test.sh ARGS …     pytest with these arguments
# PYTHON=python3.13 launch/test.sh creates .venv with that interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

source launch/options.sh
helped "$@"
extras='test'
if [ "${1:-}" = --parity ]; then
  extras='test,parity'
  shift
  set -- -m 'parity and not slow' "$@"
fi
source launch/venv.sh "$extras"
# The page of `mtp report` is tested in a browser if one is installed.
if ! command -v chromedriver >/dev/null && [ "$(id -u)" = 0 ] &&
  command -v apt-get >/dev/null; then
  echo 'installing chromium-driver for the tests of the page'
  { apt-get update -qq && DEBIAN_FRONTEND=noninteractive apt-get install -y \
    -qq --no-install-recommends chromium-driver; } >/dev/null 2>&1 ||
    echo 'it could not be installed: those tests are skipped'
fi
ruff check .
ruff format --check .
basedpyright --level error
case ${1:-} in
  --slow)
    shift
    set -- -m 'slow or not slow' "$@"
    ;;
  --core)
    shift
    set -- tests/{losses,optim,checkpoint,model,train,decode,data} "$@"
    ;;
esac
# Two workers: compilation, most of the time, hardly uses a second core.
exec python -m pytest -n 2 --dist worksteal "$@"
