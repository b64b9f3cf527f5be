// The types of this package against `openapi/zeroboot.json`. Fails when either side moves alone.
import assert from "node:assert/strict";
import { existsSync, readFileSync } from "node:fs";
import { test } from "node:test";
import type { TestContext } from "node:test";
import { CODE_CLASSES, SERVER_CODES } from "../src/errors.js";
import {
  CELL_OUTCOMES,
  CHECKPOINT_FIELDS,
  COMMAND_FIELDS,
  CONTEXT_FIELDS,
  ENTRY_FIELDS,
  ENTRY_KINDS,
  SANDBOX_FIELDS,
} from "../src/live-answers.js";
import {
  ANSWER_FIELDS,
  HEALTH_FIELDS,
  HEALTH_STATUSES,
  ISOLATIONS,
  LIMIT_FIELDS,
  OUTCOMES,
  REQUEST_FIELDS,
  TEMPLATE_FIELDS,
} from "../src/wire.js";
import { OK } from "./stub.js";

interface Schema {
  $ref?: string;
  properties?: Record<string, Schema>;
  allOf?: Schema[];
  oneOf?: Schema[];
  anyOf?: Schema[];
  enum?: (string | null)[];
  const?: string;
  items?: Schema;
  additionalProperties?: Schema;
}
interface Operation {
  requestBody: { content: Record<string, { schema: Schema }> };
  responses: Record<string, { content: Record<string, { schema: Schema }> }>;
}

// From build/test, where the compiled tests are.
const file = process.env["ZEROBOOT_OPENAPI"]
  ? new URL(`file://${process.env["ZEROBOOT_OPENAPI"]}`)
  : new URL("../../../../openapi/zeroboot.json", import.meta.url);

let text = "";
function compare(name: string, body: () => void): void {
  void test(name, (t: TestContext) => {
    if (!existsSync(file)) {
      assert.notEqual(process.env["ZEROBOOT_REQUIRE_SERVER"], "1", `${file.pathname} is missing`);
      t.skip(`${file.pathname} is missing`);
      return;
    }
    text = readFileSync(file, "utf8");
    body();
  });
}

function resolve(schema: Schema): Schema {
  let found = schema;
  while (found.$ref !== undefined) {
    let at: unknown = JSON.parse(text);
    for (const step of found.$ref.replace("#/", "").split("/")) {
      at = (at as Record<string, unknown>)[step];
    }
    found = at as Schema;
  }
  return found;
}

function parts(schema: Schema): Schema[] {
  return [...(schema.allOf ?? []), ...(schema.oneOf ?? []), ...(schema.anyOf ?? [])];
}

function properties(schema: Schema): Record<string, Schema> {
  const whole = resolve(schema);
  return Object.assign({ ...whole.properties }, ...parts(whole).map(properties)) as Record<
    string,
    Schema
  >;
}

function words(schema: Schema | undefined): string[] {
  assert(schema);
  const whole = resolve(schema);
  if (whole.const !== undefined) return [whole.const];
  return [...(whole.enum ?? []).filter((word) => word !== null), ...parts(whole).flatMap(words)];
}

function operation(path = "/v1/exec", method = "post"): Operation {
  const api = JSON.parse(text) as { paths: Record<string, Record<string, Operation>> };
  const found = api.paths[path]?.[method];
  assert(found);
  return found;
}

const json = "application/json";
const request = (): Record<string, Schema> =>
  properties(operation().requestBody.content[json]?.schema ?? {});
const answer = (): Record<string, Schema> =>
  properties(operation().responses["200"]?.content[json]?.schema ?? {});
const same = (one: Iterable<string>, two: Iterable<string>): void => {
  assert.deepEqual([...one].sort(), [...two].sort());
};

compare("every field of a request can be sent, and no other", () => {
  same(REQUEST_FIELDS, Object.keys(request()));
  same(LIMIT_FIELDS, Object.keys(properties(request()["limits"] ?? {})));
});

compare("every field of an answer is in the result, and no other", () => {
  same(ANSWER_FIELDS, Object.keys(answer()));
  same(ANSWER_FIELDS, Object.keys(OK));
});

compare("the words are the same", () => {
  same(OUTCOMES, words(answer()["outcome"]));
  same(ISOLATIONS, words(answer()["isolation"]));
});

compare("health has the same fields and words", () => {
  const health = properties(
    operation("/v1/health", "get").responses["200"]?.content[json]?.schema ?? {},
  );
  same(HEALTH_FIELDS, Object.keys(health));
  same(HEALTH_STATUSES, words(health["status"]));
  const template = resolve(health["templates"] ?? {}).additionalProperties ?? {};
  same(TEMPLATE_FIELDS, Object.keys(properties(template)));
});

compare("error codes are known where only the code tells", () => {
  for (const code of SERVER_CODES) assert(text.includes(code), code);
});

compare("what live sandboxes say has the same fields and words", () => {
  const answered = (path: string, method = "get", status = "200"): Record<string, Schema> =>
    properties(operation(path, method).responses[status]?.content[json]?.schema ?? {});
  const inside = "/v1/sandboxes/{id}";
  same(SANDBOX_FIELDS, Object.keys(answered("/v1/sandboxes", "post", "201")));
  same(CHECKPOINT_FIELDS, Object.keys(answered("/v1/checkpoints/{id}")));
  const contexts = answered(`${inside}/contexts`)["contexts"];
  same(CONTEXT_FIELDS, Object.keys(properties(resolve(contexts ?? {}).items ?? {})));
  const entry = answered(`${inside}/files/stat`);
  same(ENTRY_FIELDS, Object.keys(entry));
  same(ENTRY_KINDS, words(entry["kind"]));
  const command = Object.keys(answered(`${inside}/commands/{run}`));
  for (const name of COMMAND_FIELDS) assert(command.includes(name), name);
  same(CELL_OUTCOMES, words(answered(`${inside}/run`, "post")["outcome"]));
});

compare("every code that has a class is in the API", () => {
  for (const code of CODE_CLASSES.keys()) assert(text.includes(`\`${code}\``), code);
});
