#!/usr/bin/env bash
# Everything that is tested about the SDKs, with both packages installed as a user would install
# them: `pip install` into a new environment, `npm install` of the packed tarball. Leaves nothing.
#
#   sdk/test.sh            all of it
#   sdk/test.sh unit       without a server
#
# ZEROBOOT_BIN: the server's binary (default: this checkout's target/). ZEROBOOT_REQUIRE_SERVER=1:
# no binary is a failure instead of a skip. ZEROBOOT_TEST_ENGINES=process,vm: which engines (default:
# process, and vm where the server would pick it).
# ZEROBOOT_PYTHON: what the sandboxes run; by default the environment made here, which has numpy.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(dirname "$here")
what=${1:-all}
# Not in /tmp: each sandbox has its own /tmp, which hides an interpreter that is in it, and a second context needs one.
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/zeroboot-sdk.XXXXXX")
# Sandboxes run as another user and must be able to read the interpreter's packages.
chmod 755 "$scratch"
trap 'rm -rf "$scratch"' EXIT
export PYTEST_DEBUG_TEMPROOT=$scratch # else pytest leaves its directories in /tmp

step() { printf '\n== %s\n' "$*"; }
begin=$SECONDS

# Copies, so that no build leaves anything in the checkout.
mkdir "$scratch/sdk"
tar -C "$here" --exclude=node_modules --exclude=dist --exclude=build --exclude='build-cjs-*' \
    --exclude='.*_cache' --exclude=__pycache__ --exclude='*.tgz' -cf - . | tar -C "$scratch/sdk" -xf -
ln -s "$root/openapi" "$scratch/openapi"
export PYTHONDONTWRITEBYTECODE=1

server=0
if [ "$what" = all ]; then
    if [ -z "${ZEROBOOT_BIN:-}" ]; then
        for kind in debug release; do
            if [ -x "$root/target/$kind/zeroboot" ]; then ZEROBOOT_BIN=$root/target/$kind/zeroboot; fi
        done
    fi
    if [ -x "${ZEROBOOT_BIN:-/nonexistent}" ]; then
        server=1
        export ZEROBOOT_BIN
    elif [ "${ZEROBOOT_REQUIRE_SERVER:-}" = 1 ]; then
        echo "no zeroboot binary: build it, or name it in ZEROBOOT_BIN" >&2
        exit 1
    fi
fi

step "install both packages"
install_python() {
    python3 -m venv "$scratch/venv"
    extra=()
    if [ "$server" = 1 ] && [ -z "${ZEROBOOT_PYTHON:-}" ]; then extra=(numpy); fi
    "$scratch/venv/bin/pip" -q --disable-pip-version-check install "$scratch/sdk/python[dev]" "${extra[@]}"
}
install_node() {
    cd "$scratch/sdk/typescript"
    npm ci --silent --no-audit --no-fund
    npm run --silent build
    npm pack --silent --pack-destination "$scratch" >/dev/null
    mkdir "$scratch/node"
    cd "$scratch/node"
    echo '{ "private": true, "type": "module" }' >package.json
    npm install --silent --no-audit --no-fund "$scratch"/zeroboot-sdk-*.tgz typescript@5 @types/node@20 ws@8
}
install_python & python_job=$!
install_node & node_job=$!
wait $python_job
wait $node_job
venv=$scratch/venv/bin

python_unit() {
    cd "$scratch/sdk/python"
    "$venv/ruff" check --no-cache .
    "$venv/ruff" check --no-cache --config pyproject.toml --extend-ignore S,EXE ../with_server.py
    "$venv/ruff" format --no-cache --check .
    "$venv/python" tools/sync.py --check
    rm -r src # from here on it is the installed package that counts
    "$venv/mypy" --cache-dir=/dev/null tests
    ZEROBOOT_OPENAPI=$root/openapi/zeroboot.json "$venv/pytest" -p no:cacheprovider \
        tests/test_client.py tests/test_live.py tests/test_result.py tests/test_openapi.py
}
node_unit() {
    cd "$scratch/sdk/typescript"
    npm run --silent lint
    npx tsc -p tsconfig.test.json
    ZEROBOOT_OPENAPI=$root/openapi/zeroboot.json node --test --test-reporter=spec build/test/
    # The installed package by `import`, by `require`, and in the types of both.
    cd "$scratch/node"
    node --input-type=module -e 'import { Sandbox } from "@zeroboot/sdk"; new Sandbox()'
    node --input-type=commonjs -e 'const { Sandbox } = require("@zeroboot/sdk"); new Sandbox()'
    mkdir types
    cat >types/use.mts <<'TS'
import { Sandbox, type Result } from "@zeroboot/sdk";
export const text = async (sb: Sandbox): Promise<string> => await sb.run("1");
export const code = async (sb: Sandbox): Promise<number> => ((await sb.run("1")) satisfies Result).exit_code;
// @ts-expect-error a language that there is not
export const bad = (sb: Sandbox) => sb.run("1", { language: "ruby" });
TS
    cp types/use.mts types/use.cts
    npx tsc --noEmit --strict --target es2022 --types node --module nodenext types/use.mts types/use.cts
    npx tsc --noEmit --strict --target es2022 --types node --module esnext --moduleResolution bundler \
        types/use.mts
}
step "unit tests, linters, strict types"
node_unit >"$scratch/node.log" 2>&1 & node_job=$!
python_unit
wait $node_job || { cat "$scratch/node.log"; exit 1; }
grep -E '^. (tests|pass|fail|skipped) ' "$scratch/node.log"

if [ "$server" = 1 ]; then
    export ZEROBOOT_PYTHON=${ZEROBOOT_PYTHON:-$venv/python}
    if [ -z "${ZEROBOOT_TEST_ENGINES:-}" ]; then
        ZEROBOOT_TEST_ENGINES=$(cd "$scratch/sdk" && "$venv/python" -c '
from with_server import Server
with Server() as server:
    picked = {template["engine"] for template in server.health()["templates"].values()}
print(",".join(sorted(picked | {"process"})))')
    fi
    export ZEROBOOT_TEST_ENGINES
    step "python: against $ZEROBOOT_BIN ($ZEROBOOT_TEST_ENGINES)"
    cd "$scratch/sdk/python"
    ZEROBOOT_REQUIRE_SERVER=1 "$venv/pytest" -p no:cacheprovider tests/test_contract.py tests/test_live_contract.py
    step "typescript: against $ZEROBOOT_BIN"
    cd "$scratch/sdk/typescript"
    for engine in ${ZEROBOOT_TEST_ENGINES//,/ }; do
        "$venv/python" "$scratch/sdk/with_server.py" --engine "$engine" -- \
            node --test --test-reporter=spec build/contract/
    done
    step "every example of README, docs, examples/ and the published pages"
    cd "$root"
    "$venv/python" tests/docs_examples.py --python "$venv/python" --node "$scratch/node"
elif [ "$what" = all ]; then
    echo "no zeroboot binary: nothing was tested against a server" >&2
fi
step "all passed in $((SECONDS - begin)) s"
