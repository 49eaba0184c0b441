#!/usr/bin/env bash
# Installs wavepath with what its tests need and runs them.
#   bash launch/test.sh            the fast set (under 15 minutes on 2 cores)
#   bash launch/test.sh --all      the slow set as well
#   bash launch/test.sh -- ARGS    pytest with these arguments
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# shellcheck source=launch/environment.sh
source "$root/launch/environment.sh"
setup_environment "[test]"
select=()
case "${1:-}" in
  --all) shift; select=(-m "slow or not slow") ;;
  --) shift ;;
esac
exec "$VENV_PYTHON" -m pytest -n 2 "${select[@]}" "$@"
