# Sourced by the scripts that start training elsewhere: their own options, the
# command they start, --dry-run. Bash 4.4 or newer.

die() {
  echo "${0##*/}: $*" >&2
  exit 2
}

# helped ARGS…: prints the head comment of the script if the first one is --help.
helped() {
  local script
  script="$(dirname "${BASH_SOURCE[0]}")/${0##*/}"
  case ${1:-} in
    -h | --help)
      sed -n '2,/^[^#]/{/^# shellcheck/d;s/^#\( \|$\)//p}' "$script"
      exit 0
      ;;
  esac
}

# options 'NEEDED …' 'OPTIONAL=DEFAULT …' ARGS…: reads --NAME=VALUE, up to the
# first argument that is no option, into variables of these names; what follows
# stays in $rest.
options() {
  local _needed=$1 _optional="$2 dry_run=" _name _value _missing=
  shift 2
  helped "$@"
  for _name in $_optional; do printf -v "${_name%%=*}" %s "${_name#*=}"; done
  for _name in $_needed; do printf -v "$_name" %s ''; done
  while [[ ${1:-} == --* ]]; do
    _name=${1%%=*} _name=${_name#--} _value=${1#*=}
    _name=${_name//-/_}
    [[ " $_needed $_optional" =~ " $_name"(=| |$) ]] ||
      die "$1: not an option of this script; flags of mtp come after FLAGFILE"
    case $1 in
      *=*) ;;
      --dry-run | --spot) _value=yes ;;
      *) die "$1: give $1=VALUE" ;;
    esac
    printf -v "$_name" %s "$_value"
    shift
  done
  for _name in $_needed; do [ -n "${!_name}" ] || _missing+=" --$_name"; done
  [ -z "$_missing" ] || die "missing$_missing"
  rest=("$@")
}

# training FLAGFILE [FLAG …]: the command, in $train, as every machine runs it.
# Data and run directories are checked here, before anything is paid for.
training() {
  local name missing=
  [[ ${1:---} != --* ]] || die 'missing FLAGFILE'
  [ -f "$1" ] || die "$1: no such flag file, seen from the repository's root"
  for name in --data.store --train.workdir; do
    [[ " ${*%%=*} " == *" $name "* ]] || missing+=" $name"
  done
  [ -z "$missing" ] || die "missing$missing"
  # shellcheck disable=SC2034  # for the script
  train=(mtp train --flagfile="$1" --distributed.coordinator_address=auto "${@:2}")
}

# quoted ARGS…: one line that a shell reads as just these arguments.
quoted() {
  local arg line=
  for arg; do
    [[ $arg =~ ^[A-Za-z0-9_@%+=:,./-]+$ ]] || arg=${arg@Q}
    line+=" $arg"
  done
  echo "${line# }"
}

# run ARGS…: runs them, or prints what would run.
run() {
  if [ -n "$dry_run" ]; then quoted "$@"; else "$@"; fi
}
