# Sourced: makes .venv with this package and the extras "$1", once for each
# state of setup.cfg, and activates it. $python is the interpreter it is made of.
stamp=.venv/installed-$(printf %s "$1" | tr -c 'a-z' '-')
if [ ! -e "$stamp" ] || [ setup.cfg -nt "$stamp" ]; then
  echo "making .venv and installing mtp_jax into it, a minute or two"
  "$python" -m venv .venv
  .venv/bin/python -m pip install --quiet --disable-pip-version-check \
    --editable ".${1:+[$1]}"
  touch "$stamp"
fi
source .venv/bin/activate
