#!/usr/bin/env bash
# Train a language model as a chain of Slurm jobs, described by one YAML file.
#
#   ./train.sh configs/NAME.yaml [--key value ...]    check, plan and submit; without Slurm, train here
#   ./train.sh --help                                 everything else
#
# The first use makes .venv and installs requirements.lock; a changed lock updates it. Otherwise this is only
# `python -m jobs`, and works from any folder.
#
#   BATON_PYTHON   the Python that makes the environment, 3.10 or newer (default: the first one found)
#   BATON_VENV     where the environment is kept, say a shared file system (default: .venv beside this file)
set -euo pipefail

self=$(readlink -f "${BASH_SOURCE[0]}")
project=${self%/*}
lock=$project/requirements.lock
venv=${BATON_VENV:-$project/.venv}
# The lock that the environment was installed from, or the word `unfinished`. Processes that install hold it locked.
stamp=$venv/baton-requirements.lock

say() { printf 'baton: %s\n' "$*" >&2; }
die() { say "$@"; exit 1; }

is_installed() { [[ -x $venv/bin/python && -r $stamp && $(<"$stamp") == "$(<"$lock")" ]]; }

# Written for any Python, since its task is to turn down the old ones.
probe='
import sys
version = "%d.%d" % sys.version_info[:2]
if sys.version_info < (3, 10):
    sys.exit("is Python %s, too old" % version)
try:
    import ensurepip
except ImportError:
    sys.exit("is Python %s without ensurepip (Debian, Ubuntu: apt install python%s-venv)" % (version, version))
'

# Prints the name of a Python that can make the environment.
find_python() {
  local candidates=(python3 python3.13 python3.12 python3.11 python3.10) candidate problem problems=""
  [[ -z ${BATON_PYTHON:-} ]] || candidates=("$BATON_PYTHON")
  for candidate in "${candidates[@]}"; do
    if [[ -z $(type -P "$candidate") ]]; then
      problem="not found"
    elif problem=$("$candidate" -c "$probe" 2>&1); then
      printf '%s\n' "$candidate"
      return
    fi
    problems+=$'\n'"  $candidate: ${problem%%$'\n'*}"
  done
  die "no Python 3.10 or newer that can make a virtual environment; tried:$problems
Install one (Debian, Ubuntu: apt install python3 python3-venv; clusters: often module load python) or name it: BATON_PYTHON=/path/to/python3.11"
}

# Runs in a subshell: file descriptor 9, and with it the lock, is let go before training starts.
install() (
  if [[ -d $venv && ! -e $venv/pyvenv.cfg && ! -e $stamp && -n $(ls -A "$venv") ]]; then
    die "$venv is not a virtual environment and not empty; BATON_VENV must name a new folder"
  fi
  mkdir -p "$venv" || die "cannot make $venv; name another place: BATON_VENV=/path/to/venv"
  exec 9>>"$stamp"
  flock --nonblock 9 || { say "another process is installing into $venv, waiting for it"; flock 9; }
  if is_installed; then exit; fi

  state=$(<"$stamp")
  echo unfinished >"$stamp"
  if [[ $state == unfinished || ! -x $venv/bin/python ]]; then
    python=$(find_python)
    say "making $venv with $("$python" --version)"
    # An interrupted pip leaves packages that look whole, so nothing of them is kept.
    find "$venv" -mindepth 1 -maxdepth 1 ! -name "${stamp##*/}" -exec rm -rf {} +
    "$python" -I -m venv "$venv"
  fi
  say "installing requirements.lock into $venv, once; this takes some minutes"
  "$venv/bin/python" -I -m pip install --disable-pip-version-check --requirement "$lock" >&2 || die \
    "pip could not install requirements.lock, it says why above. Without internet here, run this once where there is" \
    "some (a login node), or give pip a mirror (PIP_INDEX_URL) or local files (PIP_FIND_LINKS)."
  cat "$lock" >"$stamp"
  say "installed"
)

is_installed || install
export PYTHONPATH=$project${PYTHONPATH:+:$PYTHONPATH}
# Else the folder that you are in comes first, and another checkout there would run instead (Python 3.11 and newer).
export PYTHONSAFEPATH=1
exec "$venv/bin/python" -m jobs "$@"
