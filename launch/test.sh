#!/usr/bin/env bash
# Lint, types and tests. `--slow` adds the tests that take minutes and has XLA optimize its code
# (tests/conftest.py); other arguments go to pytest.
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
check() { # check NAME COMMAND...: later checks run even if an earlier one fails
    local name=$1
    shift
    echo "== $name"
    "$@" || failed+=("$name")
}
bin=.venv/bin
check lint $bin/ruff check .
check format $bin/ruff format --check .
check types $bin/mypy
check tests $bin/python -m pytest -q -n auto --maxprocesses 4 --dist loadfile \
    --no-loadscope-reorder -m "$marks" "$@"

if [ ${#failed[@]} -gt 0 ]; then
    echo "FAILED: ${failed[*]}"
    exit 1
fi
echo "All checks passed."
