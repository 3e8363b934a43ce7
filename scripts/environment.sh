# Sourced by the other scripts: makes the virtual environment .venv (once) and activates it.
# Needs Python 3.11 or later with pip; the environment variable PYTHON names another interpreter than python3.

# Installs the package with the given extras, e.g. "[test]", unless exactly this was installed before.
prepare_environment() {
    local extras="$1" python="${PYTHON:-python3}" wanted stamp
    if ! "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
        echo "error: Python 3.11 or later is needed, '$python' is not; set PYTHON to one" >&2
        return 2
    fi
    if [ ! -x .venv/bin/python ]; then
        "$python" -m venv .venv
    fi
    # shellcheck disable=SC1091
    source .venv/bin/activate
    wanted="$(cat pyproject.toml scripts/constraints.txt | cksum | tr ' ' -)"
    stamp=".venv/installed$extras"
    if [ "$(cat "$stamp" 2>/dev/null)" != "$wanted" ]; then
        python -m pip install --quiet --disable-pip-version-check -c scripts/constraints.txt -e ".$extras"
        echo "$wanted" >"$stamp"
    fi
}
