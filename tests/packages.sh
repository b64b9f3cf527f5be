# For scripts of the tests: `. tests/packages.sh`.

# installed HOME PIP NPM: a virtual environment and a node_modules in HOME with these packages. Made anew when the lists change.
installed() {
    local home=$1 pip=$2 npm=$3
    if [ "$(cat "$home/pins" 2>/dev/null)" = "$pip $npm" ]; then return; fi
    rm -rf "$home"
    mkdir -p "$home"
    python3 -m venv "$home/venv"
    # shellcheck disable=SC2086  # several words, here and below
    "$home/venv/bin/pip" install --quiet --disable-pip-version-check $pip
    echo '{"private": true}' >"$home/package.json"
    # shellcheck disable=SC2086
    (cd "$home" && npm install --silent --no-audit --no-fund $npm)
    echo "$pip $npm" >"$home/pins"
}
