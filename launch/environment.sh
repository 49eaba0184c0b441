# shellcheck shell=bash
# Sourced by the other scripts here: makes .venv once, installs wavepath with pinned versions, and again when they change.
# usage: setup_environment EXTRAS   (for example "" or "[test]")
setup_environment() {
  local root extras stamp venv
  root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
  extras="$1"
  venv="${WAVEPATH_VENV:-$root/.venv}"
  if [ ! -x "$venv/bin/python" ]; then
    echo "making a virtual environment in $venv" >&2
    "${PYTHON:-python3}" -m venv "$venv"
  fi
  stamp="$venv/.wavepath-$(echo "$extras" | tr -cd '[:lower:]')"
  if [ ! -f "$stamp" ] || ! cat "$root/pyproject.toml" "$root/constraints.txt" | cmp -s - "$stamp"; then
    echo "installing wavepath$extras with the versions of constraints.txt (some minutes the first time)" >&2
    "$venv/bin/python" -m pip install --quiet --disable-pip-version-check -c "$root/constraints.txt" -e "$root$extras"
    cat "$root/pyproject.toml" "$root/constraints.txt" > "$stamp"
  fi
  # shellcheck disable=SC2034  # used by the scripts that source this one
  WAVEPATH="$venv/bin/wavepath"
  # shellcheck disable=SC2034
  VENV_PYTHON="$venv/bin/python"
}
