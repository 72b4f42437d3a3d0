#!/usr/bin/env bash
# make lint: every check is made, and each failure shown, before it fails.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
PATH=$PWD/.venvs/hpc/bin:$PATH
code=0
check() { echo "--- $*"; "$@" || code=1; }

check ruff check --quiet .
check ruff format --check --quiet .
check mypy
check python tools/docs.py --check
if command -v shellcheck >/dev/null; then
    mapfile -t scripts < <(find . -name .venvs -prune -o -name '*.sh' -print)
    check shellcheck --external-sources .ci/run "${scripts[@]}"
else
    echo "SHELL SCRIPTS NOT CHECKED: shellcheck is not installed" >&2
fi
[ $code = 0 ] && echo "lint: clean"
exit $code
