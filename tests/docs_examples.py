#!/usr/bin/env python3
"""Runs every example that we show against a real server.

    tests/docs_examples.py                 README.md, docs/*.md, sdk/*/README.md, examples/, published pages
    tests/docs_examples.py docs/sdk-python.md ...   only these

What runs: fenced blocks marked bash, sh, python, typescript, ts, javascript, js. Each runs by
itself in an empty directory, with `zeroboot` on the PATH, the packages of sdk/ installed, and
ZEROBOOT_BASE_URL and ZEROBOOT_API_KEY set. Addresses and keys in the text are replaced by those of
the server. TypeScript is type-checked (strict) first. A line such as `print(x)  # "2"` is also a
test: the program must print 2 (in a shell block after any command). An HTTP error fails a `curl`, and a
`curl` without an Authorization header gets one: the text may speak of a server without keys.

A comment in front of a block says what is special about it:

    <!-- example: skip: needs root -->       not run, and why
    <!-- example: continues -->              the block before it, of the same language, comes first

Options: --python FILE and --node DIR name an interpreter and a directory that have the packages
installed already (sdk/test.sh does that); without them they are made, which takes half a minute.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Optional

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "sdk"))

from with_server import Server  # noqa: E402

SECONDS = 60
LANGUAGES = {
    "bash": "sh", "sh": "sh", "shell": "sh", "curl": "sh",
    "python": "py", "py": "py",
    "typescript": "ts", "ts": "ts",
    "javascript": "mjs", "js": "mjs", "mjs": "mjs",
}  # fmt: skip
FENCE = re.compile(r"^( *)(```+|~~~+) *([\w+-]*)[^\n]*\n(.*?)^\1\2 *$", re.M | re.S)
MARK = re.compile(r"<!-- *example: *(skip|continues)\b *:? *([^\n]*?) *-->\s*\Z")
SHOWN = {
    "sh": re.compile(r'^[^#\n]*\S\s+#\s*"(.*)"\s*$', re.M),
    "py": re.compile(r'^\s*print\(.*\)\s*#\s*"(.*)"\s*$', re.M),
    "ts": re.compile(r'^\s*console\.log\(.*\);?\s*//\s*"(.*)"\s*$', re.M),
}
SHOWN["mjs"] = SHOWN["ts"]
ADDRESS = re.compile(r"https://api\.zeroboot\.dev|http://(?:127\.0\.0\.1|localhost):8080")
KEY = re.compile(r"zb_(?:live|demo)_[A-Za-z0-9_]*")

SHELL = """set -eu -o pipefail
curl() {
    case "$*" in
        *Authorization:*) command curl -sS --fail-with-body "$@" ;;
        *) command curl -sS --fail-with-body -H "Authorization: Bearer $ZEROBOOT_API_KEY" "$@" ;;
    esac
}
"""

# What the published blocks must print, and the call for those that only define something.
NUMPY = r'"stdout":"\[\s*0?\.\d+\s+0?\.\d+\s+0?\.\d+\s*\]\\n"'
PUBLISHED = {
    "000-1-exec.sh": ("", NUMPY),
    "000-2-quick-start.py": ("", r"\A2\n"),
    "000-3-quick-start.ts": ("", r"\A2\n"),
    "001-1-exec.sh": ("", NUMPY),
    "001-2-quick-start.py": ("", r"\A2\n4\.5\n\Z"),
    "001-3-quick-start.ts": ("", r"\A2\n3\n\Z"),
    "001-4-agent-loop.py": (
        "import json\nprint(json.dumps(response))\n",
        re.escape("{'success': True, 'output': '{\"agent\": \"result\", \"value\": 42}'}\n"),
    ),
    "001-5-concurrent.py": ("", "".join(rf"\[{i}\] {i**2}\n" for i in range(10))),
    "001-6-agent-tool.ts": (
        'console.log(JSON.stringify(await tool.execute({ code: "console.log(6 * 7)" })));\n',
        r'\A\{"success":true,"output":"42"\}\n',
    ),
    "001-7-fetch.ts": ('console.log(await execCode("print(6 * 7)"));\n', r"\A42\n"),
    "001-8-health.sh": ("", r'"status":\s*"ok"'),
}


@dataclass
class Example:
    name: str
    kind: str
    code: str
    pattern: str = ""
    shown: list[str] = field(default_factory=list)
    skip: Optional[str] = None


def of_markdown(path: Path) -> list[Example]:
    text = path.read_text()
    found: list[Example] = []
    last: dict[str, str] = {}
    for match in FENCE.finditer(text):
        indent, _, word, code = match.groups()
        kind = LANGUAGES.get(word.lower())
        if kind is None:
            continue
        line = text.count("\n", 0, match.start()) + 1
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        example = Example(f"{path.relative_to(ROOT)}:{line}", kind, code, shown=SHOWN[kind].findall(code))
        mark = MARK.search(text[: match.start()].rstrip("\n") + "\n")
        if mark and mark[1] == "skip":
            if not mark[2]:
                sys.exit(f"{example.name}: a skip needs a reason")
            example.skip = mark[2]
        else:
            if mark:
                if kind not in last:
                    sys.exit(f"{example.name}: continues nothing")
                example.code = last[kind] + example.code
                example.shown = SHOWN[kind].findall(example.code)
            last[kind] = example.code
        found.append(example)
    return found


def of_directory(directory: Path) -> list[Example]:
    return [
        Example(str(path.relative_to(ROOT)), path.suffix[1:], path.read_text())
        for path in sorted(directory.rglob("*"))
        if path.suffix in (".py", ".ts", ".mjs", ".sh") and "node_modules" not in path.parts
    ]


def published() -> list[Example]:
    found = []
    for example in of_directory(ROOT / "tests" / "published"):
        tail, example.pattern = PUBLISHED[Path(example.name).name]
        example.shown = SHOWN[example.kind].findall(example.code)
        if example.name.endswith("000-1-exec.sh"):
            if subprocess.run(["bash", "-n"], input=example.code, text=True, capture_output=True).returncode == 0:
                sys.exit(f"{example.name}: bash accepts it now; take the mend out")
            example.code = example.code.replace("""))'}'""", """))"}'""")
        example.code += tail
        found.append(example)
    if len(found) != len(PUBLISHED):
        sys.exit(f"{len(PUBLISHED)} published blocks are listed, {len(found)} are there")
    return found


def make_python(directory: Path) -> Path:
    venv.create(directory, with_pip=True)
    python = directory / "bin" / "python"
    subprocess.run([python, "-m", "pip", "-q", "install", ROOT / "sdk/python"], check=True)
    return python


def make_node(directory: Path) -> Path:
    sdk = ROOT / "sdk/typescript"
    run = lambda *command, cwd: subprocess.run(command, cwd=cwd, check=True, stdout=subprocess.DEVNULL)  # noqa: E731
    if not (sdk / "node_modules").is_dir():
        run("npm", "ci", cwd=sdk)
    run("npm", "run", "build", cwd=sdk)
    run("npm", "pack", "--pack-destination", str(directory), cwd=sdk)
    (tarball,) = directory.glob("*.tgz")
    (directory / "package.json").write_text('{ "private": true, "type": "module" }\n')
    run("npm", "install", tarball.name, "typescript@5", "@types/node@20", "ws@8", cwd=directory)
    return directory


def compile_typescript(examples: list[Example], node: Path) -> dict[str, Path]:
    """All at once: the compiler's start is most of its time. Errors stop the run."""
    if not examples:
        return {}
    sources = node / "examples"
    shutil.rmtree(sources, ignore_errors=True)
    sources.mkdir()
    names = {}
    for number, example in enumerate(examples):
        (sources / f"{number}.ts").write_text(example.code)
        names[f"examples/{number}.ts"] = example.name
    (sources / "tsconfig.json").write_text(
        '{"compilerOptions":{"strict":true,"target":"ES2022","module":"NodeNext","types":["node"],'
        '"moduleDetection":"force","skipLibCheck":false,"outDir":"out"},"include":["*.ts"]}'
    )
    done = subprocess.run(
        ["node", "node_modules/typescript/bin/tsc", "-p", "examples"], cwd=node, text=True, capture_output=True
    )
    if done.returncode != 0:
        said = re.sub(r"examples/\d+\.ts", lambda m: names[m[0]], done.stdout)
        sys.exit(f"the compiler refuses examples:\n{said}")
    return {example.name: sources / "out" / f"{number}.js" for number, example in enumerate(examples)}


def run(
    example: Example, server: Server, bin_directory: Path, python: Path, node: Path, compiled: dict[str, Path]
) -> Optional[str]:
    """None, or what is wrong."""
    environment = {
        **os.environ,
        "PATH": f"{bin_directory}:{python.parent}:{os.environ['PATH']}",
        "ZEROBOOT_BASE_URL": server.url,
        "ZEROBOOT_API_KEY": server.key,
    }
    with tempfile.TemporaryDirectory(prefix="zeroboot-example-") as directory:
        if example.kind == "py":
            command = [str(python), "-c", example.code]
        elif example.kind == "ts":
            command = ["node", str(compiled[example.name])]
        elif example.kind == "mjs":
            # Beside the packages, or it would not find them.
            script = node / f"{Path(directory).name}.mjs"
            script.write_text(example.code)
            command = ["node", str(script)]
        else:
            command = ["bash", "-c", SHELL + example.code]
        try:
            done = subprocess.run(
                command, cwd=directory, env=environment, text=True, timeout=SECONDS,
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return f"still running after {SECONDS} s"
    said = f"\n--- stdout\n{done.stdout[-2000:]}--- stderr\n{done.stderr[-2000:]}"
    if done.returncode != 0:
        return f"exit code {done.returncode}{said}"
    if example.pattern and not re.search(example.pattern, done.stdout):
        return f"the output does not match {example.pattern}{said}"
    lines = iter(done.stdout.splitlines())
    for text in example.shown:
        if text not in lines:  # consumes: the order counts
            return f"does not print {text!r}, as its comment says{said}"
    return None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--python", type=Path, help="an interpreter that has the package zeroboot")
    parser.add_argument("--node", type=Path, help="a directory that has @zeroboot/sdk and typescript")
    parser.add_argument("--engine", choices=["process", "vm"])
    parser.add_argument("--list", action="store_true", help="only say what would run")
    parser.add_argument("files", nargs="*", type=Path)
    given = parser.parse_args()

    if given.files:
        examples = [e for path in given.files for e in of_markdown(path.resolve())]
    else:
        pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), *sorted(ROOT.glob("sdk/*/README.md"))]
        examples = [e for page in pages if page.is_file() for e in of_markdown(page)]
        examples += of_directory(ROOT / "examples") + published()
    if given.list:
        for example in examples:
            print(f"{example.name} ({example.kind})" + (f": skipped: {example.skip}" if example.skip else ""))
        return 0

    failed = 0
    with tempfile.TemporaryDirectory(prefix="zeroboot-examples-") as scratch:
        python = given.python or make_python(Path(scratch) / "python")
        node = given.node or make_node(Path(scratch))
        with Server(given.engine) as server:
            for example in examples:
                example.code = KEY.sub(server.key, ADDRESS.sub(server.url, example.code))
            wanted = [e for e in examples if e.skip is None]
            compiled = compile_typescript([e for e in wanted if e.kind == "ts"], node)
            # Under its own name, whatever the file is called.
            bin_directory = Path(scratch) / "bin"
            bin_directory.mkdir()
            (bin_directory / "zeroboot").symlink_to(server.binary.resolve())
            rest = (server, bin_directory, python.absolute(), node.resolve(), compiled)
            # Mostly waiting: a few at a time, said in order.
            with ThreadPoolExecutor(4) as pool:
                answers = list(pool.map(lambda example: run(example, *rest), wanted))
            for example, wrong in zip(wanted, answers):  # noqa: B905 Python 3.9 has no strict
                failed += wrong is not None
                print(f"{'FAILED' if wrong else 'ok'} {example.name}" + (f": {wrong}" if wrong else ""), flush=True)
    skipped = [e for e in examples if e.skip is not None]
    for example in skipped:
        print(f"skipped {example.name}: {example.skip}")
    print(f"{len(wanted) - failed} examples ran, {failed} failed, {len(skipped)} skipped")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
