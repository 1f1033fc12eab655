# Sourced: makes .venv with this package and the extras "$1", once for each
# interpreter and state of setup.cfg, and activates it. $PYTHON is its interpreter; if
# unset, an existing .venv is used, else one is created with python3.
extras=$1
if [ -n "${PYTHON:-}" ] || ! [ -x .venv/bin/python ]; then
  python=${PYTHON:-python3}
  # The base interpreter: .venv's own would be deleted while creating the new one.
  code='import platform, sys
print(sys._base_executable, platform.python_version())
sys.exit(sys.version_info < (3, 11))'
  made_of=$("$python" -c "$code") || {
    echo "PYTHON=$python: not an interpreter of 3.11 or newer that runs" >&2
    exit 2
  }
  if [ "$(cat .venv/interpreter 2>/dev/null)" != "$made_of" ]; then
    echo "making .venv of Python ${made_of##* }"
    "${made_of% *}" -m venv --clear .venv
    printf '%s\n' "$made_of" >.venv/interpreter
  fi
fi
stamp=.venv/installed-$(printf %s "$extras" | tr -c 'a-z' '-')
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  echo "installing mtp_jax${extras:+[$extras]} into .venv, a minute or two"
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".${extras:+[$extras]}"
  touch "$stamp"
fi
source .venv/bin/activate
unset extras python code made_of stamp
