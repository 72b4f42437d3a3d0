#!/usr/bin/env bash
# make test: the rings one after the other, however many fail, then what each ended with.
#
#   light        no torch, no Slurm: the plan, the parsers, the command line
#   pythons      the same with the oldest and the newest Python that is supported, where they are found
#   train        tiny models are really trained, in .venvs/train; some tests again with libraries a year older,
#                and what needs lm-eval, W&B, MLflow or aiohttp in .venvs/train-extras
#   integration  a real Slurm and Apptainer on this machine; needs root
# RINGS: some of them.  ARGS: options for pytest.
set -uo pipefail
cd "$(dirname "$0")/.." || exit
mapfile -t args < <(xargs -rn1 printf '%s\n' <<<"${ARGS:-}")        # xargs reads quotes as a shell does
ends=()
failed=0

ring() {  # NAME PYTHON WORDS...   one run of pytest
    local name=$1 python=$2 code begin=$SECONDS last
    shift 2
    echo "=== $name"
    "$python" -m pytest --durations=10 --color="$colour" "$@" "${args[@]}" 2>&1 | tee "$log"
    code=${PIPESTATUS[0]}
    last=$(tail -n 1 "$log" | tr -d '=')
    [ "$code" != 5 ] || [ ${#args[@]} = 0 ] || code=0        # ARGS chose none of the tests of this ring
    [ "$code" = 0 ] || failed=1
    note "$name" "$last" "$([ "$code" = 0 ] && echo ok || echo FAILED), $((SECONDS - begin)) s"
}
note() { ends+=("$(printf '%-20s%s (%s)' "$1" "$2" "$3")"); }
broken() { failed=1; note "$1" "NOT RUN" "FAILED: $2"; }

# many of them wait for processes of their own: four at once keep two cores at work
of_light=(-n 4 --dist worksteal -W error -m "not train and not integration")
light() { ring light .venvs/hpc/bin/python "${of_light[@]}"; }

pythons() {
    local minor found
    for minor in 3.10 3.13; do
        if ! read -r _ found < <(tools/pythons.sh "$minor"); then
            echo "NOT TESTED WITH PYTHON $minor: there is none on PATH or in ~/.pyenv/versions" >&2
            note "light, Python $minor" "NOT RUN" "no such Python here"
            continue
        fi
        if "$found" tools/venv.py ".venvs/py$minor" requirements-dev.txt --editable .; then
            ring "light, Python $minor" ".venvs/py$minor/bin/python" "${of_light[@]}"
        else
            broken "light, Python $minor" "no environment"
        fi
    done
}

train() {  # only the files that have such tests: the others import what this environment lacks
    local files
    make --no-print-directory train-env || { broken train "no environment"; return; }
    mapfile -t files < <(grep -rl --include='test_*.py' 'mark\.train' tests)
    # the models are tiny: two tests on a thread each are faster than one on two
    export OMP_NUM_THREADS=1
    ring train .venvs/train/bin/python -n 2 -m "train and not extras and not integration" "${files[@]}"
    if .venvs/train/bin/python tools/venv.py .venvs/train-old tests/requirements-train-old.txt --on .venvs/train; then
        ring "train, old libraries" .venvs/train-old/bin/python -n 2 -m "generations" "${files[@]}"
    else
        broken "train, old libraries" "no environment"
    fi
    if .venvs/train/bin/python tools/venv.py .venvs/train-extras tests/requirements-train-extras.txt --on .venvs/train; then
        ring "train, extras" .venvs/train-extras/bin/python -n 2 -m "extras" "${files[@]}"
    else
        broken "train, extras" "no environment"
    fi
    unset OMP_NUM_THREADS
}

integration() {  # its fixtures bring up the cluster and build the images
    if [ "$(id -u)" = 0 ] && ! tests/cluster/install-apptainer.sh; then
        broken integration "no Apptainer"
        return
    fi
    local was_up=yes
    if [ "$(id -u)" = 0 ]; then
        tests/cluster/cluster.sh status >/dev/null 2>&1 || was_up=no
        tests/cluster/cluster.sh up || { broken integration "no cluster"; return; }
    fi
    # most of the time a test waits for Slurm: two at once, each file by one worker
    ring integration .venvs/hpc/bin/python -n 2 --dist loadfile -m "integration and not alone" tests/integration
    ring "integration, alone" .venvs/hpc/bin/python -m "integration and alone" tests/integration
    [ "$was_up" = yes ] || tests/cluster/cluster.sh down
}

log=$(mktemp)
trap 'rm -f "$log"' EXIT
colour=no
[ ! -t 1 ] || colour=yes
for name in ${RINGS:-light pythons train integration}; do
    case $name in
        light) light ;;
        pythons) pythons ;;
        train) train ;;
        integration) integration ;;
        *) echo "there is no ring $name: light pythons train integration" >&2; exit 2 ;;
    esac
done
echo "=== in short"
printf '%s\n' "${ends[@]}"
exit $failed
