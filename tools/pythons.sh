#!/usr/bin/env bash
# pythons.sh MINOR...   Prints "MINOR PATH" for each Python that is found: on PATH, or in pyenv's folder.
set -uo pipefail
for minor in "$@"; do
    for python in "$(command -v "python$minor")" "${PYENV_ROOT:-$HOME/.pyenv}/versions/$minor".*/bin/"python$minor"; do
        # run it: pyenv puts a python3.10 on PATH that does nothing but complain
        "$python" -c '' 2>/dev/null || continue
        echo "$minor $python"
        break
    done
done
exit 0
