// Two builds of the same sources: dist/esm for `import`, dist/cjs for `require`.
// The compiler takes the module format from the nearest package.json, so the second build runs on
// a copy of the sources that sits beside a package.json which says "commonjs".
import { execFileSync } from "node:child_process";
import { cpSync, mkdtempSync, readFileSync, rmSync, writeFileSync } from "node:fs";
import { createRequire } from "node:module";
import { dirname, join } from "node:path";
import { fileURLToPath } from "node:url";

const root = dirname(dirname(fileURLToPath(import.meta.url)));
const tsc = createRequire(import.meta.url).resolve("typescript/bin/tsc");
const compile = (project) =>
  execFileSync(process.execPath, [tsc, "-p", project], { stdio: "inherit" });

rmSync(join(root, "dist"), { recursive: true, force: true });
compile(join(root, "tsconfig.json"));

const copy = mkdtempSync(join(root, "build-cjs-"));
try {
  cpSync(join(root, "src"), join(copy, "src"), { recursive: true });
  writeFileSync(join(copy, "package.json"), '{ "type": "commonjs" }\n');
  const config = JSON.parse(readFileSync(join(root, "tsconfig.json"), "utf8"));
  config.compilerOptions.outDir = join(root, "dist/cjs");
  writeFileSync(join(copy, "tsconfig.json"), JSON.stringify(config));
  compile(join(copy, "tsconfig.json"));
  writeFileSync(join(root, "dist/cjs/package.json"), '{ "type": "commonjs" }\n');
} finally {
  rmSync(copy, { recursive: true, force: true });
}
