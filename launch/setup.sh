# Sourced by the other scripts: `setup` or `setup dev` creates or updates .venv in the repository.
# It finds Python >= 3.12 and installs the dependencies, in the versions of constraints.txt, only if
# a file that lists them has changed.

OLDEST=12 # Python 3.12

new_enough() { # runs the interpreter, because a shim on PATH may exist and still fail
    "$1" -c "import sys, venv, ensurepip; sys.exit(sys.version_info < (3, $OLDEST))" >/dev/null 2>&1
}

find_python() {
    local candidate
    for candidate in python3.12 python3.13 python3.14 python3 python \
        "${PYENV_ROOT:-$HOME/.pyenv}"/versions/3.1[2-9]*/bin/python; do
        if command -v "$candidate" >/dev/null && new_enough "$candidate"; then
            command -v "$candidate"
            return
        fi
    done
    return 1
}

make_environment() {
    local python
    rm -rf .venv
    if python=$(find_python); then
        echo "Creating .venv with $("$python" --version 2>&1) ($python)" >&2
        "$python" -m venv .venv
    elif command -v uv >/dev/null; then
        echo "Creating .venv with a Python from uv" >&2
        uv venv --quiet --seed --python ">=3.$OLDEST,<3.15" .venv
    else
        echo "No Python >= 3.$OLDEST found. Install uv (https://docs.astral.sh/uv) or python3.12 with its venv module, and run this again." >&2
        return 1
    fi
}

setup() { # setup [dev]
    local extra=${1:-} stamp want
    .venv/bin/python -c "import sys; sys.exit(sys.version_info < (3, $OLDEST))" 2>/dev/null ||
        make_environment || return 1
    # The stamp includes the folder, because .venv breaks if the checkout is moved.
    want="$(cat pyproject.toml setup.py constraints.txt | cksum) $PWD"
    for stamp in .venv/stamp-dev .venv/stamp-"${extra:-base}"; do
        [ "$(cat "$stamp" 2>/dev/null)" = "$want" ] && return 0
    done
    # An interrupted `python -m venv` leaves an environment without pip.
    .venv/bin/python -m pip --version >/dev/null 2>&1 ||
        .venv/bin/python -m ensurepip --upgrade >/dev/null 2>&1 || make_environment || return 1
    echo "Installing dependencies${extra:+ and $extra tools} (once, takes a few minutes)" >&2
    if ! .venv/bin/python -m pip install --quiet --disable-pip-version-check \
        -c constraints.txt -e ".${extra:+[$extra]}" >.venv/install.log 2>&1; then
        tail -5 .venv/install.log >&2
        echo "Installation failed; see .venv/install.log" >&2
        return 1
    fi
    echo "$want" >.venv/stamp-"${extra:-base}"
}

setup_compiler() { # installs the compiler of longlive_jax/planning/deviceless.py if ptxas exists
    local version
    command -v ptxas >/dev/null || return 0
    version=$(.venv/bin/python -c "import jaxlib; print(jaxlib.__version__)") || return 1
    [ "$(cat .venv/compile/stamp 2>/dev/null)" = "$version" ] && return 0
    echo "Installing the CUDA compiler of jax $version, which checks kernels without a GPU" >&2
    if .venv/bin/python -m pip install --quiet --disable-pip-version-check --no-deps --upgrade \
        --target .venv/compile "jax-cuda13-pjrt==$version" "jax-cuda13-plugin==$version" \
        nvidia-cuda-nvdisasm >.venv/compile.log 2>&1; then
        echo "$version" >.venv/compile/stamp
    else
        echo "Installation failed (see .venv/compile.log); tests that need it will be skipped" >&2
    fi
}
