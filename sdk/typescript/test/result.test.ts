import assert from "node:assert/strict";
import { test } from "node:test";
import { format, inspect } from "node:util";
import { ExecutionError, isResult, ServerError, ZerobootError } from "../src/index.js";
import type { Result } from "../src/index.js";
import { makeResult } from "../src/result.js";
import { OK } from "./stub.js";

const make = (fields: Record<string, unknown> = {}): Result =>
  makeResult({ ...OK, ...fields }, "req");

test("a result is its output without the final newline", () => {
  for (const [stdout, text] of [
    ["2\n", "2"],
    ["2", "2"],
    ["a\n\n", "a\n"],
    ["a\r\n", "a"],
    ["", ""],
  ] as const) {
    const result = make({ stdout });
    assert.equal(String(result), text);
    assert.equal(`${result}`, text);
    assert.equal(result.text, text);
    assert.equal(result.stdout, stdout);
    assert.equal(result.output, stdout);
  }
});

test("console.log prints it as the text, and quoted inside an object", () => {
  assert.equal(format(make()), "2");
  assert.equal(format("out:", make()), "out: 2");
  assert.equal(inspect({ output: make() }), "{ output: '2' }");
});

test("a result goes where a string goes", () => {
  // The types are half of this test.
  const asField: { success: boolean; output?: string } = { success: true, output: make() };
  assert.equal(JSON.stringify(asField), '{"success":true,"output":"2"}');
  const asArgument = (text: string): string => text.trim() + text.slice(0, 1);
  assert.equal(asArgument(make()), "22");
  assert.equal(Number(make()), 2);
  assert(isResult(make()) && !isResult("2"));
});

test("every field of the answer is there", () => {
  const result = make() as unknown as Record<string, unknown>;
  for (const [name, value] of Object.entries(OK)) assert.deepEqual(result[name], value, name);
  assert.deepEqual(make({ brand_new: 1, length: 7 }).toObject()["brand_new"], 1);
});

test("bytes that are no text are exact", () => {
  const encoding = { stdout: "base64", stderr: "utf-8" };
  const result = make({ stdout: "/wBvaw==", encoding });
  assert.deepEqual([...result.stdoutBytes], [255, 0, 111, 107]);
  assert.equal(result.stdout, "\ufffd\0ok");
  assert.throws(() => make({ stdout: "***", encoding }), ServerError);
});

test("files come back as bytes, text or an error", () => {
  const files = JSON.parse(
    '{"a":{"text":"é"},"b":{"base64":"/w=="},"c":{"error":"no such file"},"__proto__":{"text":"x"}}',
  ) as unknown;
  const result = make({ files });
  assert.equal(result.files["a"]?.text(), "é");
  assert.deepEqual([...(result.files["b"]?.bytes() ?? [])], [255]);
  assert.equal(Object.keys(result.files).length, 4);
  assert.throws(
    () => result.files["c"]?.bytes(),
    (e) => e instanceof ZerobootError && e.message === "c: no such file",
  );
});

test("ok means: ended by itself, with zero", () => {
  assert(make().ok && String(make().check()) === "2");
  for (const fields of [{ exit_code: 3 }, { outcome: "deadline_passed" }, { outcome: "signaled" }]) {
    const result = make({ ...fields, stderr: "a\nboom\n" });
    assert.throws(
      () => result.check(),
      (e) => e instanceof ExecutionError && e.result === result && e.message.includes("boom"),
    );
  }
});

test("a short answer of an older server is enough", () => {
  const result = makeResult({ id: "1", stdout: "x\n", stderr: "", exit_code: 0 }, undefined);
  assert.equal(String(result), "x");
  assert(result.ok);
  assert.deepEqual(result.files, {});
});
