#!/usr/bin/env bash
# Runs the linter, the type checker, the documentation's build and the tests. `--slow` adds the
# tests that take minutes, and enables XLA's optimizations (see tests/conftest.py). Other arguments
# are passed to pytest.
set -uo pipefail
cd "$(dirname "$0")/.."
. launch/setup.sh
setup dev || exit 1
setup_compiler

marks="not slow"
if [ "${1:-}" = "--slow" ]; then
    marks=""
    export JAX_DISABLE_MOST_OPTIMIZATIONS=0
    shift
fi

failed=()
check() { # check NAME COMMAND...: records a failure and lets later checks run
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}
bin=.venv/bin
check lint $bin/ruff check .
check format $bin/ruff format --check .
check types $bin/mypy
check docs env NO_MKDOCS_2_WARNING=1 $bin/mkdocs build --strict --quiet
check tests $bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder -m "$marks" "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All checks passed."
